"""``torch.ops.lutra.senses`` and its gradients; the same in torch's own ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gather import _senses as senses
from .library import gradient, register

ops = torch.ops.lutra


def _wide(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _entries(table: Tensor, ids: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of all senses of each id, the id that each belongs to, and where each id's begin."""
    ids = ids.reshape(-1).long()
    if offsets is None:
        each = table.shape[1]
        rows = (ids[:, None] * each + torch.arange(each, device=ids.device)).reshape(-1)
        owner = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(each)
        return rows, owner, torch.arange(ids.shape[0], device=ids.device) * each
    counts = offsets[ids + 1] - offsets[ids]
    starts = counts.cumsum(0) - counts
    owner = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(counts)
    rows = torch.arange(owner.shape[0], device=ids.device) - (starts - offsets[ids])[owner]
    return rows, owner, starts


def _softmax(x: Tensor, owner: Tensor, n: int) -> Tensor:
    top = x.new_full((n,), float("-inf")).scatter_reduce(0, owner, x, "amax")
    e = (x - top[owner]).exp()
    return e / x.new_zeros(n).index_add(0, owner, e)[owner]


def choose(
    table: Tensor, ids: Tensor, context: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, rows and scores without a kernel: (n, senses, dim) values are written on the way."""
    dim, n = table.shape[-1], ids.numel()
    rows, owner, starts = _entries(table, ids, offsets)
    flat = table.reshape(-1, dim)
    wide = _wide(table)
    scores = (flat[rows].to(wide) * context.reshape(n, dim).to(wide)[owner]).sum(-1)
    top = scores.new_full((n,), float("-inf")).scatter_reduce(0, owner, scores, "amax")
    place = torch.arange(rows.shape[0], device=rows.device)
    winner = (scores == top[owner]) | scores.isnan()
    first = starts.new_full((n,), rows.shape[0]).scatter_reduce(
        0, owner, place.masked_fill(~winner, rows.shape[0]), "amin"
    )
    best = rows[first]
    return flat[best].reshape(*ids.shape, dim), best.reshape(ids.shape), scores[first].reshape(ids.shape)


def compose(
    table: Tensor,
    ids: Tensor,
    context: Tensor,
    offsets: Tensor | None = None,
    gradient: str = "hard",
    temperature: float = 1.0,
) -> Tensor:
    """The vectors with their gradients in torch's own ops: what tests and benchmarks compare with."""
    dim, n = table.shape[-1], ids.numel()
    flat = table.reshape(-1, dim)
    context = context.to(table.dtype).reshape(n, dim)
    best = choose(table.detach(), ids, context.detach(), offsets)[1].reshape(-1)
    out = flat[best]
    if gradient == "straight_through":
        out = out + context - context.detach()
    if gradient == "softmax":
        rows, owner, _ = _entries(table, ids, offsets)
        p = _softmax((flat[rows] * context[owner]).sum(-1) / temperature, owner, n)
        soft = (p - p.detach()).unsqueeze(-1) * flat[rows].detach()
        out = out + torch.zeros_like(out).index_add(0, owner, soft)
    return out.reshape(*ids.shape, dim)


# ---------------------------------------------------------------- the operator
def _fake(table, ids, context, offsets=None, gradient="hard", temperature=1.0):
    senses._check(table, ids, context, offsets, gradient, temperature)
    return (
        table.new_empty((*ids.shape, table.shape[-1])),
        ids.new_empty(ids.shape, dtype=torch.int64),
        table.new_empty(ids.shape, dtype=_wide(table)),
    )


def _backward(
    kind, grad, table, ids, context, best, offsets, gradient, temperature, need_table, need_context
):
    """Sums of (n, senses) numbers at most: products with rows, and rows, are bags."""
    dim, n = table.shape[-1], ids.numel()
    flat, grad = table.reshape(-1, dim), grad.reshape(n, dim)
    to_table, to_context = table.new_empty(0), context.new_empty(0)
    context = context.reshape(n, dim)
    best = best.reshape(n)
    if gradient == "softmax":
        rows, owner, starts = _entries(table, ids, offsets)
        given, grad = context.to(table.dtype), grad.to(table.dtype)
        inner = ops.bag_weight_grad(given, flat, rows, starts, None, None, None, False)
        p = _softmax(inner / temperature, owner, n)
        gain = ops.bag_weight_grad(grad, flat, rows, starts, None, None, None, False)
        mean = gain.new_zeros(n).index_add(0, owner, p * gain)
        factor = p * (gain - mean[owner]) / temperature
        if need_context:
            to_context = ops.bag(flat, rows, starts, factor).to(context.dtype)
        if need_table:  # the chosen rows' gradients and those through the scores, as one sum
            to_table = ops.bag_backward(
                torch.cat([grad, given]), torch.cat([best, rows]),
                torch.cat([torch.arange(n, device=rows.device), starts + n]),
                torch.cat([factor.new_ones(n), factor]), None, flat.shape[0], "sum", None, False,
            )  # fmt: skip
    else:
        if need_context and gradient == "straight_through":
            to_context = grad.to(context.dtype, copy=True)
        elif need_context:
            to_context = torch.zeros_like(context)
        if need_table:
            to_table = ops.bag_backward(
                grad, best[:, None], None, None, None, flat.shape[0], "sum", None, False
            )
    return (
        to_table.reshape(table.shape) if need_table else to_table,
        to_context.reshape(*ids.shape, dim) if need_context else to_context,
    )


def _backward_fake(grad, table, ids, context, best, offsets, gradient, temperature, need_table, need_context):
    return (
        table.new_empty(table.shape if need_table else (0,)),
        context.new_empty(context.shape if need_context else (0,)),
    )


def _setup(ctx, inputs, output):
    table, ids, context, offsets, ctx.gradient, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(table, ids, context, output[1], offsets)


def _gradient(ctx, grad, *_):
    table, ids, context, best, offsets = ctx.saved_tensors
    need = ctx.needs_input_grad
    to_table, to_context = ops.senses_backward(
        grad, table, ids, context, best, offsets, ctx.gradient, ctx.temperature, need[0], need[2]
    )
    return to_table if need[0] else None, None, to_context if need[2] else None, None, None, None


register(
    'senses(Tensor table, Tensor ids, Tensor context, Tensor? offsets=None, str gradient="hard", '
    "float temperature=1.0) -> (Tensor, Tensor, Tensor)",
    senses._senses,
    _fake,
)
register(
    "senses_backward(Tensor grad, Tensor table, Tensor ids, Tensor context, Tensor best, Tensor? offsets, "
    "str gradient, float temperature, bool need_table, bool need_context) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
gradient("senses", _gradient, _setup)
