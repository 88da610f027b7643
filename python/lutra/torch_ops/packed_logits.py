"""``torch.ops.lutra`` for `lutra.scan.packed_logits` and `packed_topk`."""

from __future__ import annotations

import torch

from ..scan._packed_logits import _packed_logits, _packed_logits_backward, _packed_topk
from .library import gradient, register


def _setup(ctx, inputs, output):
    hidden, packed, bias, ctx.kind, ctx.group = inputs
    ctx.dim = hidden.shape[1]
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(packed)


def _backward(ctx, grad):
    (packed,) = ctx.saved_tensors
    to_hidden = to_bias = None
    if ctx.needs_input_grad[0]:
        to_hidden = torch.ops.lutra.packed_logits_backward(grad, packed, ctx.dim, ctx.kind, ctx.group)
    if ctx.needs_input_grad[2]:
        to_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias)
    return to_hidden, None, to_bias, None, None


def _fake_topk(hidden, packed, bias=None, k=10, kind="int8", group=None):
    shape = (hidden.shape[0], k)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(shape, dtype=wide), hidden.new_empty(shape, dtype=torch.int64)


register(
    'packed_logits(Tensor hidden, Tensor packed, Tensor? bias=None, str kind="int8", int? group=None)'
    " -> Tensor",
    _packed_logits,
    lambda hidden, packed, bias=None, kind="int8", group=None: hidden.new_empty(
        (hidden.shape[0], packed.shape[0])
    ),
)
register(
    'packed_logits_backward(Tensor grad, Tensor packed, int dim, str kind="int8", int? group=None) -> Tensor',
    _packed_logits_backward,
    lambda grad, packed, dim, kind="int8", group=None: grad.new_empty((grad.shape[0], dim)),
)
register(
    'packed_topk(Tensor hidden, Tensor packed, Tensor? bias=None, int k=10, str kind="int8", int? group=None)'
    " -> (Tensor, Tensor)",
    _packed_topk,
    _fake_topk,
)
gradient("packed_logits", _backward, _setup)
