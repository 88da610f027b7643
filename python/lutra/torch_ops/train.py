"""``torch.ops.lutra`` for `lutra.gather.tensor_train`."""

from __future__ import annotations

import torch

from ..gather import _train as train
from .library import gradient, register

ops = torch.ops.lutra


def _fake(
    core1, core2, core3, ids, offsets=None, weights=None, rows=None, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    sizes, _, bags, _ = train._shapes(core1, core2, core3, ids, offsets, rows, mode, include_last_offset)
    return core1.new_empty((bags, sizes[3] * sizes[4] * sizes[5]))


def _setup(ctx, inputs, output):
    *arrays, ctx.rows, ctx.mode, ctx.padding_idx, ctx.last = inputs
    ctx.save_for_backward(*arrays)


def _backward(ctx, grad):
    core1, core2, core3, ids, offsets, weights = ctx.saved_tensors
    to_cores, to_weights = (None, None, None), None
    if any(ctx.needs_input_grad[:3]):
        to_cores = ops.tensor_train_backward(
            grad, core1, core2, core3, ids, offsets, weights, ctx.rows, ctx.mode, ctx.padding_idx, ctx.last
        )
    if weights is not None and ctx.needs_input_grad[5]:
        to_weights = ops.tensor_train_weight_grad(
            grad, core1, core2, core3, ids, offsets, ctx.rows, ctx.padding_idx, ctx.last
        ).to(weights.dtype)
    return (*to_cores, None, None, to_weights, None, None, None, None)


def _wide(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


register(
    "tensor_train(Tensor core1, Tensor core2, Tensor core3, Tensor ids, Tensor? offsets, Tensor? weights, "
    "SymInt? rows, str mode, int? padding_idx, bool include_last_offset) -> Tensor",
    train._tensor_train,
    _fake,
)
register(
    "tensor_train_backward(Tensor grad, Tensor core1, Tensor core2, Tensor core3, Tensor ids, "
    "Tensor? offsets, Tensor? weights, SymInt? rows, str mode, int? padding_idx, bool include_last_offset) "
    "-> (Tensor, Tensor, Tensor)",
    train._tensor_train_backward,
    lambda grad, core1, core2, core3, *_: tuple(c.new_empty(c.shape) for c in (core1, core2, core3)),
)
register(
    "tensor_train_weight_grad(Tensor grad, Tensor core1, Tensor core2, Tensor core3, Tensor ids, "
    "Tensor? offsets, SymInt? rows, int? padding_idx, bool include_last_offset) -> Tensor",
    train._tensor_train_weight_grad,
    lambda grad, core1, core2, core3, ids, *_: grad.new_empty(ids.shape, dtype=_wide(core1)),
)
gradient("tensor_train", _backward, _setup)
