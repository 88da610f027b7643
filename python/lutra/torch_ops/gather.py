"""``torch.ops.lutra`` for `lutra.gather`."""

from __future__ import annotations

import torch

from .. import _checks
from .._arrays import torch_kind
from ..gather import _bag as bag
from ..gather import _rows as quantized
from ..gather import _tables as tables
from .library import gradient, plain, register

ops = torch.ops.lutra
_wraps = torch._C._functorch.is_functorch_wrapped_tensor


def _needs(ctx, i):
    """Whether input i needs a gradient (the dispatcher leaves out trailing inputs with default values)."""
    return i < len(ctx.needs_input_grad) and ctx.needs_input_grad[i]


def _wide(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- bag
def _bag_fake(
    table, ids, offsets=None, weights=None, scale=None, minimum=None, mode="sum", padding_idx=None,
    include_last_offset=False, sparse_grad=False,
):  # fmt: skip
    _checks.choice("mode", mode, bag.MODES)
    bags, _ = bag._layout(ids, offsets, include_last_offset)
    dtype = table.dtype if table.dtype.is_floating_point else torch.float32
    return table.new_empty((bags, table.shape[1]), dtype=dtype)


def _argmax_fake(table, ids, offsets=None, padding_idx=None, include_last_offset=False):
    bags, _ = bag._layout(ids, offsets, include_last_offset)
    return table.new_empty((bags, table.shape[1]), dtype=torch.int64)


def _backward_fake(grad, ids, offsets, weights, argmax, rows, mode, padding_idx, include_last_offset):
    return grad.new_empty((rows, grad.shape[1]))


def _backward_rows_fake(grad, ids, offsets, weights, argmax, rows, mode, padding_idx, include_last_offset):
    touched = torch.library.get_ctx().new_dynamic_size()
    return grad.new_empty((touched,), dtype=torch.int64), grad.new_empty((touched, grad.shape[1]))


def _weight_grad_fake(grad, table, ids, offsets, scale, minimum, padding_idx, include_last_offset):
    return grad.new_empty(ids.shape, dtype=_wide(table))


def _bag_setup(ctx, inputs, output):
    table, ids, offsets, weights, scale, minimum, ctx.mode, ctx.padding_idx, ctx.last, ctx.sparse = inputs
    ctx.shape = table.shape
    # The table is kept only where the gradient reads it, so that it may be updated in place otherwise.
    reads = ctx.mode == "max" or (weights is not None and _needs(ctx, 3))
    ctx.save_for_backward(table if reads else None, ids, offsets, weights, scale, minimum)


def run(name, implementation, arguments):
    """An op of a backward pass, directly where nothing needs torch's dispatcher, which takes longer."""
    # A function that torch.func.vjp gave is called outside of it, with tensors that wrap others all the same.
    if plain(*arguments[:5]) and not any(t is not None and _wraps(t) for t in arguments[:5]):
        return implementation(torch_kind(arguments[0].is_cuda), *arguments)
    return getattr(ops, name)(*arguments)


def _bag_backward(ctx, grad):
    table, ids, offsets, weights, scale, minimum = ctx.saved_tensors
    to_table = to_weights = None
    if _needs(ctx, 0):
        argmax = None
        if ctx.mode == "max":  # found again: cheaper than (bags, dim) int64 kept for every call
            argmax = ops.bag_argmax(table, ids, offsets, ctx.padding_idx, ctx.last)
        arguments = (grad, ids, offsets, weights, argmax, ctx.shape[0], ctx.mode, ctx.padding_idx, ctx.last)
        if ctx.sparse:
            rows, values = run("bag_backward_rows", bag._bag_backward_rows, arguments)
            to_table = torch.sparse_coo_tensor(
                rows.unsqueeze(0), values, ctx.shape, check_invariants=False, is_coalesced=True
            )
        else:
            to_table = run("bag_backward", bag._bag_backward, arguments)
    if _needs(ctx, 3):
        to_weights = ops.bag_weight_grad(
            grad, table, ids, offsets, scale, minimum, ctx.padding_idx, ctx.last
        ).to(weights.dtype)
    return to_table, None, None, to_weights, None, None, None, None, None, None


register(
    "bag(Tensor table, Tensor ids, Tensor? offsets=None, Tensor? weights=None, Tensor? scale=None, "
    'Tensor? minimum=None, str mode="sum", int? padding_idx=None, bool include_last_offset=False, '
    "bool sparse_grad=False) -> Tensor",
    bag._bag,
    _bag_fake,
)
register(
    "bag_argmax(Tensor table, Tensor ids, Tensor? offsets=None, int? padding_idx=None, "
    "bool include_last_offset=False) -> Tensor",
    bag._bag_argmax,
    _argmax_fake,
)
_GRAD = (
    "(Tensor grad, Tensor ids, Tensor? offsets, Tensor? weights, Tensor? argmax, SymInt rows, str mode, "
    "int? padding_idx, bool include_last_offset)"
)
register(f"bag_backward{_GRAD} -> Tensor", bag._bag_backward, _backward_fake)
register(f"bag_backward_rows{_GRAD} -> (Tensor, Tensor)", bag._bag_backward_rows, _backward_rows_fake)
register(
    "bag_weight_grad(Tensor grad, Tensor table, Tensor ids, Tensor? offsets, Tensor? scale, Tensor? minimum, "
    "int? padding_idx, bool include_last_offset) -> Tensor",
    bag._bag_weight_grad,
    _weight_grad_fake,
)
gradient("bag", _bag_backward, _bag_setup)


# ---------------------------------------------------------------- tables
def _tables_fake(tables_, codes, weights=None, bias=None, scale=None, minimum=None):
    packed = tables_.dtype == torch.int8
    dtype = tables_.dtype if not packed else torch.float32 if bias is None else bias.dtype
    return tables_.new_empty(tables._check(tables_, codes, weights, bias), dtype=dtype)


def _tables_backward_fake(grad, tables_, codes, weights, need_tables, need_weights, scale=None, minimum=None):
    return (
        grad.new_empty(tables_.shape if need_tables else (0,)),
        grad.new_empty(codes.shape if need_weights else (0,), dtype=_wide(tables_)),
    )


def _tables_setup(ctx, inputs, output):
    tables_, codes, weights, bias, scale, minimum = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(tables_, codes, weights, scale, minimum)


def _tables_backward(ctx, grad):
    tables_, codes, weights, scale, minimum = ctx.saved_tensors
    to_tables = to_weights = to_bias = None
    need_tables, need_weights = _needs(ctx, 0), _needs(ctx, 2)
    if _needs(ctx, 4) or _needs(ctx, 5):
        raise NotImplementedError("scale and minimum of int8 tables have no gradient")
    if need_tables or need_weights:
        a, b = ops.tables_backward(grad, tables_, codes, weights, need_tables, need_weights, scale, minimum)
        to_tables = a if need_tables else None
        to_weights = b.to(weights.dtype) if need_weights else None
    if _needs(ctx, 3):
        flat = grad.reshape(-1, grad.shape[-1])
        to_bias = flat.sum(0, dtype=_wide(flat)).to(ctx.bias_dtype)
    return to_tables, None, to_weights, to_bias, None, None


register(
    "tables(Tensor tables, Tensor codes, Tensor? weights=None, Tensor? bias=None, Tensor? scale=None, "
    "Tensor? minimum=None) -> Tensor",
    tables._tables,
    _tables_fake,
)
register(
    "tables_backward(Tensor grad, Tensor tables, Tensor codes, Tensor? weights, bool need_tables, "
    "bool need_weights, Tensor? scale=None, Tensor? minimum=None) -> (Tensor, Tensor)",
    tables._tables_backward,
    _tables_backward_fake,
)
gradient("tables", _tables_backward, _tables_setup)


# ---------------------------------------------------------------- 8-bit rows
def _quantize_fake(table, dtype="uint8"):
    _checks.choice("dtype", dtype, quantized._DTYPES)
    rows = table.shape[:1]
    return (
        table.new_empty(table.shape, dtype=getattr(torch, dtype)),
        table.new_empty(rows, dtype=torch.float32),
        table.new_empty(rows, dtype=torch.float32),
    )


register(
    'quantize_rows(Tensor table, str dtype="uint8") -> (Tensor, Tensor, Tensor)',
    quantized._quantize_rows,
    _quantize_fake,
)
register(
    "dequantize_rows(Tensor codes, Tensor scale, Tensor minimum) -> Tensor",
    quantized._dequantize_rows,
    lambda codes, scale, minimum: scale.new_empty(codes.shape),
)
