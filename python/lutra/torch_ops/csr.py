"""``torch.ops.lutra`` for `lutra.gather.bag_csr`."""

from __future__ import annotations

import torch

from ..gather import _csr as csr
from .library import gradient, register

ops = torch.ops.lutra


def _wide(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _fake(
    values, indptr, columns, ids, offsets=None, weights=None, dim=0, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    _, bags, _ = csr._shapes(values, indptr, columns, ids, offsets, weights, dim, mode, include_last_offset)
    return values.new_empty((bags, dim))


def _setup(ctx, inputs, output):
    values, indptr, columns, ids, offsets, weights, _, ctx.mode, ctx.padding_idx, ctx.last = inputs
    reads = weights is not None and ctx.needs_input_grad[5]  # else the values may be updated in place
    ctx.save_for_backward(values if reads else None, indptr, columns, ids, offsets, weights)


def _backward(ctx, grad):
    values, indptr, columns, ids, offsets, weights = ctx.saved_tensors
    to_values = to_weights = None
    if ctx.needs_input_grad[0]:
        to_values = ops.bag_csr_backward(
            grad, indptr, columns, ids, offsets, weights, ctx.mode, ctx.padding_idx, ctx.last
        )
    if values is not None:
        to_weights = ops.bag_csr_weight_grad(
            grad, values, indptr, columns, ids, offsets, ctx.padding_idx, ctx.last
        ).to(weights.dtype)
    return to_values, None, None, None, None, to_weights, None, None, None, None


register(
    "bag_csr(Tensor values, Tensor indptr, Tensor columns, Tensor ids, Tensor? offsets, Tensor? weights, "
    "SymInt dim, str mode, int? padding_idx, bool include_last_offset) -> Tensor",
    csr._bag_csr,
    _fake,
)
register(
    "bag_csr_backward(Tensor grad, Tensor indptr, Tensor columns, Tensor ids, Tensor? offsets, "
    "Tensor? weights, str mode, int? padding_idx, bool include_last_offset) -> Tensor",
    csr._bag_csr_backward,
    lambda grad, indptr, columns, *_: grad.new_empty(columns.shape),
)
register(
    "bag_csr_weight_grad(Tensor grad, Tensor values, Tensor indptr, Tensor columns, Tensor ids, "
    "Tensor? offsets, int? padding_idx, bool include_last_offset) -> Tensor",
    csr._bag_csr_weight_grad,
    lambda grad, values, indptr, columns, ids, *_: grad.new_empty(ids.shape, dtype=_wide(values)),
)
gradient("bag_csr", _backward, _setup)
