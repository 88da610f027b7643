"""``torch.ops.lutra`` for packed rows."""

from __future__ import annotations

import torch

from .. import _checks
from ..gather import _bag_packed as bag
from ..gather import _packed as packed
from .library import gradient, register

ops = torch.ops.lutra


# ---------------------------------------------------------------- pack and unpack
def _pack_fake(table, scale, minimum, kind, group, rounding, seed):
    at = packed.row_layout(table.shape[1], kind, group)
    return table.new_empty((table.shape[0], at.row_bytes), dtype=torch.uint8)


def _unpack_fake(rows, ids, dim, kind, group, dtype):
    _checks.choice("dtype", dtype, packed.OUT_TYPES)
    n = rows.shape[0] if ids is None else ids.shape[0]
    return rows.new_empty((n, dim), dtype=getattr(torch, dtype))


register(
    "pack_rows(Tensor table, Tensor? scale, Tensor? minimum, str kind, int? group, str rounding, int seed) "
    "-> Tensor",
    packed._pack_rows,
    _pack_fake,
)
register(
    "pack_rows_out(Tensor table, Tensor(a!) out, Tensor? ids, Tensor? scale, Tensor? minimum, str kind, "
    "int? group, str rounding, int seed) -> ()",
    packed._pack_rows_out,
    lambda *_: None,
)
register(
    "unpack_rows(Tensor packed, Tensor? ids, int dim, str kind, int? group, str dtype) -> Tensor",
    packed._unpack_rows,
    _unpack_fake,
)


# ---------------------------------------------------------------- bags
def _bag_fake(rows, ids, offsets, weights, dim, kind, group, mode, padding_idx, include_last_offset, dtype):
    _checks.choice("dtype", dtype, packed.OUT_TYPES)
    bags, _ = bag._layout(ids, offsets, include_last_offset)
    return rows.new_empty((bags, dim), dtype=getattr(torch, dtype))


def _weight_grad_fake(grad, rows, ids, offsets, dim, kind, group, padding_idx, include_last_offset):
    return grad.new_empty(ids.shape, dtype=torch.float32)


def _bag_setup(ctx, inputs, output):
    rows, ids, offsets, weights, *options = inputs
    ctx.options = options[:3] + options[4:6]
    ctx.save_for_backward(rows, ids, offsets, weights)


def _bag_backward(ctx, grad):
    rows, ids, offsets, weights = ctx.saved_tensors
    to_weights = None
    if weights is not None and ctx.needs_input_grad[3]:
        to_weights = ops.bag_packed_weight_grad(grad, rows, ids, offsets, *ctx.options).to(weights.dtype)
    return (None, None, None, to_weights, *[None] * 7)


_OPTIONS = "int dim, str kind, int? group"
register(
    f"bag_packed(Tensor packed, Tensor ids, Tensor? offsets, Tensor? weights, {_OPTIONS}, str mode, "
    "int? padding_idx, bool include_last_offset, str dtype) -> Tensor",
    bag._bag_packed,
    _bag_fake,
)
register(
    f"bag_packed_weight_grad(Tensor grad, Tensor packed, Tensor ids, Tensor? offsets, {_OPTIONS}, "
    "int? padding_idx, bool include_last_offset) -> Tensor",
    bag._bag_packed_weight_grad,
    _weight_grad_fake,
)
gradient("bag_packed", _bag_backward, _bag_setup)
