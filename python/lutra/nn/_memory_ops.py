"""``torch.ops.lutra.memory_linear``: sign_hash and tables as one op.

One op instead of two halves the dispatcher's and autograd's share of a call, which counts at one token, and
keeps the codes and weights of the forward pass for the backward.
"""

from __future__ import annotations

from math import prod

import torch

from .._arrays import F32, FLOATS, I32
from ..address._sign_hash import _sign_hash, _sign_hash_backward, _sign_hash_shape
from ..gather._bag import _bag_backward
from ..gather._spread import worth_spreading
from ..gather._tables import _tables, _tables_backward
from ..torch_ops.library import gradient, register

ops = torch.ops.lutra


def _shape(x, tables, bits, score, temperature):
    """Checks that need no data; (score code, shape of the codes)."""
    score_code, chunks = _sign_hash_shape(x, bits, score, temperature)
    if len(tables.shape) != 3 or tables.shape[0] != chunks or tables.shape[1] != 1 << bits:
        raise ValueError(
            f"tables has shape {tuple(tables.shape)}; for x of shape {tuple(x.shape)} and bits = {bits} "
            f"it must be ({chunks}, {1 << bits}, out_features)"
        )
    return score_code, (*x.shape[:-1], chunks)


def _apart(kind, x, other):
    return not other.is_cuda or other.device != x.device if kind.cuda else not other.is_cpu


def memory_linear(kind, x, tables, bias=None, bits=8, score="prob", temperature=1.0):
    """(out, codes, weights) of a `lutra.nn.MemoryLinear`."""
    score_code, shape = _shape(x, tables, bits, score, temperature)
    x_code, code, kernels = kind.code(x), kind.code(tables), kind.kernels
    if kernels is None or x_code not in FLOATS or code not in FLOATS or _apart(kind, x, tables):
        codes, weights = _sign_hash(kind, x, bits, score, temperature)
        return _tables(kind, tables, codes, weights, bias), codes, weights
    chunks, entries, dim = tables.shape
    if bias is not None:
        if bias.shape != tables.shape[2:] or _apart(kind, x, bias):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)} on {bias.device}; it must be ({dim},) on {x.device}"
            )
        bias = kind.dense(kind.cast(bias, code) if kind.code(bias) != code else bias)
    x, tables = kind.dense(x), kind.dense(tables)
    codes, weights = kind.empty(shape, I32, x), kind.empty(shape, F32, x)
    out = kind.empty((*shape[:-1], dim), code, x)
    tokens, ptr, launch = prod(shape[:-1]), kind.ptr, kind.launch(x)
    at_codes, at_weights = ptr(codes), ptr(weights)
    kernels.sign_hash(
        ptr(x), x_code, tokens, chunks, bits, score_code, temperature, at_codes, at_weights, *launch
    )
    kernels.tables(
        ptr(tables), code, chunks, entries, dim, at_codes, at_weights, None if bias is None else ptr(bias),
        tokens, ptr(out), *launch,
    )  # fmt: skip
    return out, codes, weights


def _backward_op(kind, grad, x, tables, codes, weights, bits, score, temperature, need_x, need_tables):
    """Gradients of x and of the tables; empty where not needed."""
    n_tables, entries, dim = tables.shape
    code, tokens = kind.code(tables), prod(codes.shape[:-1])
    few = need_tables and kind.kernels is not None and code in FLOATS
    if few and worth_spreading(kind, tokens, entries, n_tables * dim * tables.dtype.itemsize):
        # Few tokens touch few rows: sum those as a bag over all tables, and leave the rest alone.
        ids = codes.reshape(tokens, n_tables) + torch.arange(n_tables, dtype=torch.int64) * entries
        to_tables = _bag_backward(
            kind,
            grad.reshape(tokens, dim),
            ids,
            None,
            weights.reshape(tokens, n_tables),
            None,
            n_tables * entries,
        ).view(n_tables, entries, dim)
        _, to_weights = _tables_backward(kind, grad, tables, codes, weights, False, need_x)
    else:
        to_tables, to_weights = _tables_backward(kind, grad, tables, codes, weights, need_tables, need_x)
    if not need_x:
        return x.new_empty(0), to_tables
    to_x = _sign_hash_backward(kind, to_weights.to(weights.dtype), x, bits, score, temperature)
    return to_x, to_tables


def _fake(x, tables, bias=None, bits=8, score="prob", temperature=1.0):
    _, shape = _shape(x, tables, bits, score, temperature)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        tables.new_empty((*shape[:-1], tables.shape[2])),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(shape, dtype=wide),
    )


def _backward_fake(grad, x, tables, codes, weights, bits, score, temperature, need_x, need_tables):
    return x.new_empty(x.shape if need_x else 0), tables.new_empty(tables.shape if need_tables else 0)


def _setup(ctx, inputs, output):
    x, tables, bias, *ctx.options = inputs
    _, codes, weights = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(codes, weights)
    ctx.save_for_backward(x, tables, codes, weights)


def _backward(ctx, grad, _codes, _weights):
    x, tables, codes, weights = ctx.saved_tensors
    need_x, need_tables, need_bias = ctx.needs_input_grad[:3]
    to_x = to_tables = to_bias = None
    if need_x or need_tables:
        a, b = ops.memory_linear_backward(grad, x, tables, codes, weights, *ctx.options, need_x, need_tables)
        to_x, to_tables = a if need_x else None, b if need_tables else None
    if need_bias:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=wide).to(ctx.bias_dtype)
    return to_x, to_tables, to_bias, None, None, None


register(
    'memory_linear(Tensor x, Tensor tables, Tensor? bias=None, int bits=8, str score="prob", '
    "float temperature=1.0) -> (Tensor, Tensor, Tensor)",
    memory_linear,
    _fake,
)
register(
    "memory_linear_backward(Tensor grad, Tensor x, Tensor tables, Tensor codes, Tensor weights, int bits, "
    "str score, float temperature, bool need_x, bool need_tables) -> (Tensor, Tensor)",
    _backward_op,
    _backward_fake,
)
gradient("memory_linear", _backward, _setup)
