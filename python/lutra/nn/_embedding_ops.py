"""``torch.ops.lutra.embedding``: torch's look-up with a gradient of the touched rows."""

from __future__ import annotations

import torch

from .._arrays import torch_kind
from ..gather._bag import _bag_backward, _bag_backward_rows
from ..torch_ops import plain
from ..torch_ops.library import gradient, register

ops = torch.ops.lutra


def sparse_rows(rows, values, shape):
    """The coalesced sparse tensor of ``values`` in the given rows (increasing, each once)."""
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, shape, check_invariants=False, is_coalesced=True
    )


def _embedding(kind, weight, ids, padding_idx=None, sparse=True):
    return torch.embedding(weight, ids)


def _setup(ctx, inputs, output):
    weight, ids, ctx.padding_idx, ctx.sparse = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(ids)


def _backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    rows, dim = ctx.shape
    if not ctx.sparse:
        return ops.embedding_dense_backward(grad, ids, rows, ctx.padding_idx), None, None, None
    grad, ids = grad.reshape(-1, dim), ids.reshape(-1, 1)
    options = (None, None, None, rows, "sum", ctx.padding_idx, False)
    if plain(grad, ids):
        touched, values = _bag_backward_rows(torch_kind(grad.is_cuda), grad, ids, *options)
    else:
        touched, values = ops.bag_backward_rows(grad, ids, *options)
    return sparse_rows(touched, values, ctx.shape), None, None, None


def _dense_backward(kind, grad, ids, rows, padding_idx):
    grad = grad.reshape(-1, grad.shape[-1])
    return _bag_backward(kind, grad, ids.reshape(-1, 1), None, None, None, rows, "sum", padding_idx, False)


def _dense_setup(ctx, inputs, output):
    _, ids, _, ctx.padding_idx = inputs
    ctx.save_for_backward(ids)


def _dense_twice(ctx, grad):
    (ids,) = ctx.saved_tensors
    out = torch.nn.functional.embedding(ids, grad)
    if ctx.padding_idx is not None:
        out = out.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)
    return out, None, None, None


register(
    "embedding(Tensor weight, Tensor ids, int? padding_idx=None, bool sparse=True) -> Tensor",
    _embedding,
    lambda weight, ids, padding_idx=None, sparse=True: weight.new_empty((*ids.shape, weight.shape[1])),
)
register(
    "embedding_dense_backward(Tensor grad, Tensor ids, SymInt rows, int? padding_idx) -> Tensor",
    _dense_backward,
    lambda grad, ids, rows, padding_idx: grad.new_empty((rows, grad.shape[-1])),
)
gradient("embedding", _backward, _setup)
gradient("embedding_dense_backward", _dense_twice, _dense_setup)
