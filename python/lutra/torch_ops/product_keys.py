"""``torch.ops.lutra.product_keys`` and its gradient; the same in torch's own ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..address._product_keys import _product_keys, _shape
from .library import gradient, register

ops = torch.ops.lutra


def compose(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and ids in torch's own ops: for CUDA tensors, and what tests and benchmarks compare with.

    Equal scores come in the order that ``torch.topk`` gives.
    """
    lead, _, n, half = _shape(queries, keys, k)
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    q, keys = queries.to(wide).reshape(*lead, 2, half), keys.to(wide)
    best, numbers = torch.einsum("...ed,...end->...en", q, keys).topk(k, -1)
    sums = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
    scores, at = sums.topk(k, -1)
    ids = numbers[..., 0, :].gather(-1, at // k) * n + numbers[..., 1, :].gather(-1, at % k)
    return scores, ids


def _fake(queries, keys, k):
    lead = _shape(queries, keys, k)[0]
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return queries.new_empty((*lead, k), dtype=wide), queries.new_empty((*lead, k), dtype=torch.int64)


def _backward(kind, grad, queries, keys, ids, need_queries, need_keys):
    """A query's half receives the bag of its sub-keys, a sub-key the sum of the halves that chose it."""
    *lead, d = queries.shape
    *of_heads, _, n, half = keys.shape
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    k = ids.shape[-1]
    rows = torch.stack([ids // n, ids % n + n], -2).reshape(-1, 2 * k)  # in the (2 n, half) of a head
    if of_heads:
        own = torch.arange(of_heads[0], device=ids.device) * (2 * n)
        rows = (rows.view(-1, of_heads[0], 2 * k) + own[:, None]).reshape(-1, 2 * k)
    rows = rows.view(-1, k)
    weights = grad.to(wide).reshape(-1, 1, k).expand(-1, 2, k).reshape(-1, k)
    flat = keys.reshape(-1, half).to(wide)
    to_queries, to_keys = queries.new_empty(0), keys.new_empty(0)
    if need_queries:
        to_queries = ops.bag(flat, rows, None, weights).reshape(*lead, d).to(queries.dtype)
    if need_keys:
        halves = queries.reshape(-1, half).to(wide)
        to_keys = ops.bag_backward(halves, rows, None, weights, None, flat.shape[0], "sum", None, False)
        to_keys = to_keys.reshape(keys.shape).to(keys.dtype)
    return to_queries, to_keys


def _backward_fake(grad, queries, keys, ids, need_queries, need_keys):
    return (
        queries.new_empty(queries.shape if need_queries else (0,)),
        keys.new_empty(keys.shape if need_keys else (0,)),
    )


def _setup(ctx, inputs, output):
    queries, keys, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(queries, keys, output[1])


def _gradient(ctx, grad, _):
    queries, keys, ids = ctx.saved_tensors
    need = ctx.needs_input_grad
    to_queries, to_keys = ops.product_keys_backward(grad, queries, keys, ids, need[0], need[1])
    return to_queries if need[0] else None, to_keys if need[1] else None, None


register("product_keys(Tensor queries, Tensor keys, int k) -> (Tensor, Tensor)", _product_keys, _fake)
register(
    "product_keys_backward(Tensor grad, Tensor queries, Tensor keys, Tensor ids, bool need_queries, "
    "bool need_keys) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
gradient("product_keys", _gradient, _setup)
