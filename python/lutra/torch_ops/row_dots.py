"""``torch.ops.lutra.row_dots`` and its gradient, which is made of bags."""

from __future__ import annotations

import torch

from ..gather._row_dots import _check, _row_dots
from .library import gradient, register

ops = torch.ops.lutra


def _fake(table, ids, x, sparse_grad=False):
    _check(table, ids, x)
    wide = torch.float64 if torch.float64 in (table.dtype, x.dtype) else torch.float32
    return x.new_empty(ids.shape, dtype=wide)


def _setup(ctx, inputs, output):
    table, ids, x, ctx.sparse = inputs
    ctx.shape, ctx.dtype = table.shape, table.dtype
    # Either is kept only where the other's gradient reads it.
    need_table, _, need_x = ctx.needs_input_grad[:3]
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(table if need_x else None, ids, x if need_table else None)


def _backward(ctx, grad):
    table, ids, x = ctx.saved_tensors
    to_table = to_x = None
    if ctx.needs_input_grad[0]:
        options = (ids, None, grad, None, ctx.shape[0], "sum", None, False)
        x = x.to(ctx.dtype)
        if ctx.sparse:
            rows, values = ops.bag_backward_rows(x, *options)
            to_table = torch.sparse_coo_tensor(
                rows.unsqueeze(0), values, ctx.shape, check_invariants=False, is_coalesced=True
            )
        else:
            to_table = ops.bag_backward(x, *options)
    if ctx.needs_input_grad[2]:
        to_x = ops.bag(table, ids, None, grad).to(ctx.x_dtype)
    return to_table, None, to_x, None


register("row_dots(Tensor table, Tensor ids, Tensor x, bool sparse_grad=False) -> Tensor", _row_dots, _fake)
gradient("row_dots", _backward, _setup)
