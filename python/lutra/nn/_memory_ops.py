"""``torch.ops.lutra.memory_linear``: sign_hash and tables as one op.

One op instead of two halves the dispatcher's and autograd's share of a call, which counts at one token, and
keeps the codes and weights of the forward pass for the backward.
"""

from __future__ import annotations

from math import prod

import torch

from .._arrays import F32, FLOATS, I8, I32, torch_kind
from ..address._sign_hash import _sign_hash, _sign_hash_backward, _sign_hash_shape
from ..gather._bag import _bag_backward_rows
from ..gather._tables import _check_rows, _launch, _result_code, _tables, _tables_backward
from ..gather._tables_update import _flat
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


def memory_linear(
    kind, x, tables, bias=None, bits=8, score="prob", temperature=1.0, scale=None, minimum=None, *, keep=True
):
    """(out, codes, weights) of a `lutra.nn.MemoryLinear`.

    int8 tables come with ``scale`` and ``minimum`` (see `lutra.gather.tables`); their out has the type of the
    bias, or else of x. Without ``keep`` codes and weights may be None.
    """
    score_code, shape = _shape(x, tables, bits, score, temperature)
    x_code, kernels = kind.code(x), kind.kernels
    code = _check_rows(kind, tables, scale, minimum)
    result = code if code != I8 else x_code
    if bias is not None:
        if bias.shape != tables.shape[2:] or _apart(kind, x, bias):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)} on {bias.device}; it must be ({tables.shape[2]},) on "
                f"{x.device}"
            )
        if code != I8 and kind.code(bias) != code:
            bias = kind.cast(bias, code)
        result = _result_code(kind, code, bias)
    served = x_code in FLOATS and result in FLOATS
    apart = any(a is not None and _apart(kind, x, a) for a in (tables, scale, minimum))
    if kernels is None or not served or apart:
        codes, weights = _sign_hash(kind, x, bits, score, temperature)
        return _tables(kind, tables, codes, weights, bias, scale, minimum, result), codes, weights
    chunks, entries, dim = tables.shape
    x, tables = kind.dense(x), kind.dense(tables)
    bias, scale, minimum = (None if a is None else kind.dense(a) for a in (bias, scale, minimum))
    out = kind.empty((*shape[:-1], dim), result, x)
    tokens, ptr = prod(shape[:-1]), kind.ptr
    codes = weights = at_codes = at_weights = None
    if keep or not kind.cuda or tokens > kernels.hashed_inline:
        codes, weights = kind.empty(shape, I32, x), kind.empty(shape, F32, x)
        at_codes, at_weights = ptr(codes), ptr(weights)
    at_bias, at_scale, at_minimum = (None if a is None else ptr(a) for a in (bias, scale, minimum))
    rows = (
        ptr(tables), code, chunks, entries, dim, at_codes, at_weights, at_bias, tokens, ptr(out), result,
        at_scale, at_minimum,
    )  # fmt: skip
    if kind.cuda:
        launch, _scratch = _launch(kind, tables, code, tokens)
        kernels.memory_linear(ptr(x), x_code, bits, score_code, temperature, *rows, *launch)
    else:
        kernels.sign_hash(ptr(x), x_code, tokens, chunks, bits, score_code, temperature, at_codes, at_weights)
        kernels.tables(*rows)
    return out, codes, weights


def _backward_op(
    kind, grad, x, tables, codes, weights, bits, score, temperature, need_x, need_tables, scale=None,
    minimum=None,
):  # fmt: skip
    """Gradients of x and of the tables; empty where not needed."""
    to_tables, to_weights = _tables_backward(
        kind, grad, tables, codes, weights, need_tables, need_x, scale, minimum
    )
    if not need_x:
        return x.new_empty(0), to_tables
    to_x = _sign_hash_backward(kind, to_weights.to(weights.dtype), x, bits, score, temperature)
    return to_x, to_tables


def _fake(x, tables, bias=None, bits=8, score="prob", temperature=1.0, scale=None, minimum=None):
    _, shape = _shape(x, tables, bits, score, temperature)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = tables.dtype
    if dtype == torch.int8:
        dtype = x.dtype if bias is None else bias.dtype
    return (
        tables.new_empty((*shape[:-1], tables.shape[2]), dtype=dtype),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(shape, dtype=wide),
    )


def _backward_fake(
    grad, x, tables, codes, weights, bits, score, temperature, need_x, need_tables, scale=None, minimum=None
):
    return (
        x.new_empty(x.shape if need_x else 0),
        grad.new_empty(tables.shape if need_tables else 0),
    )


def _setup(ctx, inputs, output):
    x, tables, bias, *options, scale, minimum = inputs
    _, codes, weights = output
    ctx.options = options
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(codes, weights)
    ctx.save_for_backward(x, tables, codes, weights, scale, minimum)


def _bias_grad(grad, dtype):
    """The gradient of the bias, (dim,) of its type, from that of the outputs, (tokens, dim)."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.sum(0, dtype=wide).to(dtype)


def _backward(ctx, grad, _codes, _weights):
    x, tables, codes, weights, scale, minimum = ctx.saved_tensors
    need_x, need_tables, need_bias = ctx.needs_input_grad[:3]
    if any(ctx.needs_input_grad[6:8]):
        raise NotImplementedError("scale and minimum of int8 tables have no gradient")
    to_x = to_tables = to_bias = None
    if need_x or need_tables:
        a, b = ops.memory_linear_backward(
            grad, x, tables, codes, weights, *ctx.options, need_x, need_tables, scale, minimum
        )
        to_x, to_tables = a if need_x else None, b if need_tables else None
    if need_bias:
        to_bias = _bias_grad(grad.reshape(-1, grad.shape[-1]), ctx.bias_dtype)
    return to_x, to_tables, to_bias, None, None, None, None, None


register(
    'memory_linear(Tensor x, Tensor tables, Tensor? bias=None, int bits=8, str score="prob", '
    "float temperature=1.0, Tensor? scale=None, Tensor? minimum=None) "
    "-> (Tensor, Tensor, Tensor)",
    memory_linear,
    _fake,
)
register(
    "memory_linear_backward(Tensor grad, Tensor x, Tensor tables, Tensor codes, Tensor weights, int bits, "
    "str score, float temperature, bool need_x, bool need_tables, Tensor? scale=None, Tensor? minimum=None) "
    "-> (Tensor, Tensor)",
    _backward_op,
    _backward_fake,
)
gradient("memory_linear", _backward, _setup)


class TouchedRows(torch.autograd.Function):
    """`lutra.gather.tables` whose tables get no dense gradient.

    ``take(grad, codes, weights)`` is handed what the gradient is made of; where it is None, the gradient is a
    sparse tensor of the touched rows.
    """

    @staticmethod
    def forward(ctx, tables, take, codes, weights, bias):
        ctx.take, ctx.bias_dtype = take, None if bias is None else bias.dtype
        ctx.save_for_backward(tables, codes, weights)
        return _tables(torch_kind(tables.is_cuda), tables, codes, weights, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        tables, codes, weights = ctx.saved_tensors
        kind = torch_kind(grad.is_cuda)
        to_weights = None
        if ctx.needs_input_grad[3]:
            to_weights = _tables_backward(kind, grad, tables, codes, weights, False, True)[1]
            to_weights = to_weights.to(weights.dtype)
        to_tables, to_bias = _hand_over(ctx, kind, grad, tables, codes, weights, ctx.needs_input_grad[4])
        return to_tables, None, None, to_weights, to_bias


class TouchedLayer(torch.autograd.Function):
    """As `TouchedRows`, with the hash (of a fixed temperature) in the same node."""

    @staticmethod
    def forward(ctx, tables, take, x, bias, bits, score, temperature):
        ctx.take, ctx.bias_dtype = take, None if bias is None else bias.dtype
        ctx.options = bits, score, temperature
        out, codes, weights = memory_linear(torch_kind(x.is_cuda), x, tables, bias, *ctx.options)
        ctx.save_for_backward(x, tables, codes, weights)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, tables, codes, weights = ctx.saved_tensors
        kind, to_x = torch_kind(grad.is_cuda), None
        if ctx.needs_input_grad[2]:
            to_weights = _tables_backward(kind, grad, tables, codes, weights, False, True)[1]
            to_x = _sign_hash_backward(kind, to_weights.to(weights.dtype), x, *ctx.options)
        to_tables, to_bias = _hand_over(ctx, kind, grad, tables, codes, weights, ctx.needs_input_grad[3])
        return to_tables, None, to_x, to_bias, None, None, None


def _hand_over(ctx, kind, grad, tables, codes, weights, need_bias):
    """Gradients of the tables (sparse; None where ``ctx.take`` takes what it is made of) and of the bias."""
    flat, to_tables = grad.reshape(-1, grad.shape[-1]), None
    to_bias = _bias_grad(flat, ctx.bias_dtype) if need_bias else None
    if ctx.needs_input_grad[0]:
        n_tables = tables.shape[0]
        codes, weights = codes.reshape(-1, n_tables), weights.detach().reshape(-1, n_tables)
        if ctx.take is None:
            to_tables = _touched(kind, tables, flat, codes, weights)
        else:
            ctx.take(flat, codes, weights)
    return to_tables, to_bias


def _touched(kind, tables, grad, codes, weights):
    entries = tables.shape[1]
    _, ids, weights = _flat(kind, tables, codes, weights)
    rows, values = _bag_backward_rows(kind, grad, ids, None, weights, None, tables.shape[0] * entries)
    places = torch.stack([rows // entries, rows % entries])
    return torch.sparse_coo_tensor(places, values, tables.shape, check_invariants=False, is_coalesced=True)
