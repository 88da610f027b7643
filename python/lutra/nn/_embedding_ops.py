"""``torch.ops.lutra.embedding``: torch's look-up with a gradient of the touched rows."""

from __future__ import annotations

import torch

from .._arrays import torch_kind
from ..gather._bag import _bag_backward_rows
from ..torch_ops import plain
from ..torch_ops.library import gradient, register

ops = torch.ops.lutra


def sparse_rows(rows, values, shape):
    """The coalesced sparse tensor of ``values`` in the given rows (increasing, each once)."""
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, shape, check_invariants=False, is_coalesced=True
    )


def _embedding(kind, weight, ids, padding_idx=None):
    return torch.embedding(weight, ids)


def _setup(ctx, inputs, output):
    weight, ids, ctx.padding_idx = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(ids)


def _backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    rows, dim = ctx.shape
    grad, ids = grad.reshape(-1, dim), ids.reshape(-1, 1)
    options = (None, None, None, rows, "sum", ctx.padding_idx, False)
    if plain(grad, ids):
        touched, values = _bag_backward_rows(torch_kind(grad.is_cuda), grad, ids, *options)
    else:
        touched, values = ops.bag_backward_rows(grad, ids, *options)
    return sparse_rows(touched, values, ctx.shape), None, None


register(
    "embedding(Tensor weight, Tensor ids, int? padding_idx=None) -> Tensor",
    _embedding,
    lambda weight, ids, padding_idx=None: weight.new_empty((*ids.shape, weight.shape[1])),
)
gradient("embedding", _backward, _setup)
