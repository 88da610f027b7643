"""Logits of a compressed table by decoded tiles, as torch operators.

A tile of rows is decoded, multiplied with, and forgotten; the backward pass decodes it again. So memory is
that of a tile beside the result. They are operators, so that torch.compile takes them as they are.

``hidden`` (n, dim) and the tile are multiplied in the type of ``hidden``. The arrays of the format come as a
list, in the order of `Format.arrays`, the format as the JSON of its configuration.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..compress.formats.base import Format, make
from ..torch_ops.library import LIBRARY

#: The configuration that stands for a dense table, whose one array is the table.
DENSE = "dense"
#: A tile in bytes: decoded, it is still in the cache when it is multiplied.
TILE_BYTES = 4 << 20


class Source(NamedTuple):
    """A table to decode tiles of: its format, its shape, and the row that is kept apart (-1: none)."""

    format: Format | None  # None: a dense table
    names: tuple[str, ...]
    rows: int
    dim: int
    pad: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.dim

    def block(self, dtype: torch.dtype) -> int:
        return max(64, TILE_BYTES // (max(self.dim, 1) * dtype.itemsize) // 64 * 64)

    def ranges(self, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
        step = self.block(dtype)
        for begin in range(0, self.rows, step):
            yield begin, min(begin + step, self.rows)

    def tile(
        self, arrays: list[Tensor], pad_row: Tensor | None, begin: int, end: int,
        dtype: torch.dtype | None = None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Rows [begin, end), as ``dtype`` or in the type that the format gives them; perhaps in ``out``."""
        if self.format is None:
            rows = arrays[0][begin:end]
        else:
            data = dict(zip(self.names, arrays))
            rows = self.format.between(data, self.shape, begin, end, dtype, out)
            if pad_row is not None and begin <= self.pad < end:
                here = torch.arange(begin, end, device=rows.device) == self.pad
                rows = torch.where(here.unsqueeze(1), pad_row.to(rows.dtype), rows)
        return rows if dtype is None else rows.to(dtype)

    def tiles(
        self, arrays: list[Tensor], pad_row: Tensor | None, like: Tensor
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(begin, end, rows in the type of ``like``), one after the other: the next may overwrite one. No
        gradients.
        """
        place = like.new_empty((min(self.block(like.dtype), self.rows), self.dim))  # its pages are kept
        for begin, end in self.ranges(like.dtype):
            yield begin, end, self.tile(arrays, pad_row, begin, end, like.dtype, place[: end - begin])


@functools.lru_cache(64)
def source(config: str, rows: int, dim: int, pad: int) -> Source:
    if config == DENSE:
        return Source(None, ("weight",), rows, dim, pad)
    format = make(json.loads(config))
    return Source(format, tuple(format.arrays((rows, dim))), rows, dim, pad)


# ---------------------------------------------------------------- gradients of tiles
def _recording():
    """Let autograd record inside an operator, whose implementation runs below it."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(include, exclude)


class ArrayGradients:
    """Sums of the gradients that tiles give to the format's arrays, in float32 or wider."""

    def __init__(self, arrays: list[Tensor], which: list[bool]) -> None:
        self.arrays, self.which = arrays, which
        self.sums = [
            torch.zeros_like(a, dtype=torch.promote_types(a.dtype, torch.float32)) if w else None
            for a, w in zip(arrays, which)
        ]

    def add(
        self, table: Source, pad_row: Tensor | None, begin: int, end: int, dtype: torch.dtype, grad_of
    ) -> None:
        """Decode the tile, give its rows to ``grad_of`` (as ``dtype`` where they get no gradient), and add
        what the gradient it returns amounts to.
        """
        if not any(self.which):
            grad_of(table.tile(self.arrays, pad_row, begin, end, dtype))
            return
        with _recording(), torch.enable_grad():
            leaves = [a.detach().requires_grad_(w) for a, w in zip(self.arrays, self.which)]
            wanted = [leaf for leaf, w in zip(leaves, self.which) if w]
            rows = table.tile(leaves, pad_row, begin, end)
            with torch.no_grad():
                grad = grad_of(rows.detach())
            found = torch.autograd.grad(rows, wanted, grad.to(rows.dtype), allow_unused=True)
        places = [s for s in self.sums if s is not None]
        for total, g in zip(places, found):
            if g is None:
                continue
            if g.is_sparse:
                g = g if g.is_coalesced() else g.coalesce()
                total.index_add_(0, g._indices()[0], g._values().to(total.dtype))
            else:
                total += g

    def results(self) -> list[Tensor]:
        return [s.to(a.dtype) for s, a in zip(self.sums, self.arrays) if s is not None]


# ---------------------------------------------------------------- logits
def _logits(hidden, arrays, pad_row, config, rows, dim, pad):
    table = source(config, rows, dim, pad)
    out = hidden.new_empty((hidden.shape[0], rows))
    for begin, end, tile in table.tiles(arrays, pad_row, hidden):
        if begin == 0 and end == rows:
            return torch.mm(hidden, tile.T)
        out[:, begin:end] = torch.mm(hidden, tile.T)
    return out


def _logits_backward(grad, hidden, arrays, pad_row, config, rows, dim, pad, to_hidden, which):
    table = source(config, rows, dim, pad)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.new_zeros(hidden.shape, dtype=wide)
    sums = ArrayGradients(arrays, which)
    for begin, end in table.ranges(hidden.dtype):
        part = grad[:, begin:end].to(hidden.dtype)

        def grad_of(tile, part=part):
            if to_hidden:
                total.add_(torch.mm(part, tile.to(hidden.dtype)))
            return torch.mm(part.T, hidden)

        sums.add(table, pad_row, begin, end, hidden.dtype, grad_of)
    return [total.to(hidden.dtype), *sums.results()]


# ---------------------------------------------------------------- cross entropy
# loss_t = log sum_i exp(logit_ti) - logit_{t, target_t}: the logits of a tile live only as long as the tile.
def _cross_entropy(hidden, targets, arrays, pad_row, bias, config, rows, dim, pad, smoothing):
    table = source(config, rows, dim, pad)
    n, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    lse = hidden.new_full((n,), -torch.inf, dtype=wide)
    picked, mean = hidden.new_zeros((n,), dtype=wide), hidden.new_zeros((n,), dtype=wide)
    for begin, end, tile in table.tiles(arrays, pad_row, hidden):
        logits = _biased(torch.mm(hidden, tile.T).to(wide), bias, begin, end)
        lse = torch.logaddexp(lse, torch.logsumexp(logits, 1))
        here = (targets >= begin) & (targets < end)
        place = (targets - begin).clamp(0, end - begin - 1).unsqueeze(1)
        picked += torch.where(here, logits.gather(1, place).squeeze(1), 0)
        if smoothing:
            mean += logits.sum(1) / rows
    loss = lse - (1 - smoothing) * picked - smoothing * mean
    return loss, lse


def _cross_entropy_backward(
    grad, hidden, targets, lse, arrays, pad_row, bias, config, rows, dim, pad, smoothing, which
):
    table = source(config, rows, dim, pad)
    wide = lse.dtype
    total = hidden.new_zeros(hidden.shape, dtype=wide)
    to_bias = None if bias is None else torch.empty_like(bias, dtype=wide)
    sums = ArrayGradients(arrays, which)
    weight, tokens = grad.to(wide).unsqueeze(1), torch.arange(hidden.shape[0], device=hidden.device)
    for begin, end in table.ranges(hidden.dtype):

        def grad_of(tile, begin=begin, end=end):
            tile = tile.to(hidden.dtype)
            p = _biased(torch.mm(hidden, tile.T).to(wide), bias, begin, end)
            p.sub_(lse.unsqueeze(1)).exp_()
            if smoothing:
                p -= smoothing / rows
            here = (targets >= begin) & (targets < end)
            p[tokens[here], targets[here] - begin] -= 1 - smoothing
            p *= weight
            if to_bias is not None:
                to_bias[begin:end] = p.sum(0)
            p = p.to(hidden.dtype)
            total.add_(torch.mm(p, tile))
            return torch.mm(p.T, hidden)

        sums.add(table, pad_row, begin, end, hidden.dtype, grad_of)
    first = [total.to(hidden.dtype)]
    return first + ([] if to_bias is None else [to_bias.to(bias.dtype)]) + sums.results()


def _biased(logits, bias, begin, end):
    return logits if bias is None else logits.add_(bias[begin:end])


# ---------------------------------------------------------------- registration
_TABLE = "str config, int rows, int dim, int pad"
_names = {
    f"tiled_logits(Tensor hidden, Tensor[] arrays, Tensor? pad_row, {_TABLE}) -> Tensor": _logits,
    f"tiled_logits_backward(Tensor grad, Tensor hidden, Tensor[] arrays, Tensor? pad_row, {_TABLE}, "
    "bool to_hidden, bool[] which) -> Tensor[]": _logits_backward,
    f"tiled_cross_entropy(Tensor hidden, Tensor targets, Tensor[] arrays, Tensor? pad_row, Tensor? bias, "
    f"{_TABLE}, float smoothing) -> (Tensor, Tensor)": _cross_entropy,
    "tiled_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor targets, Tensor lse, Tensor[] arrays, "
    f"Tensor? pad_row, Tensor? bias, {_TABLE}, float smoothing, bool[] which) -> Tensor[]": (
        _cross_entropy_backward
    ),
}
for _schema, _implementation in _names.items():
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_schema.split("(")[0], _implementation, _key)


def _fake(name, function):
    torch.library.register_fake(f"lutra::{name}", function, lib=LIBRARY)


def _like(arrays, which):
    return [torch.empty_like(a) for a, w in zip(arrays, which) if w]


def _fake_loss(hidden, *_):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty((hidden.shape[0],), dtype=wide) for _ in range(2))


def _fake_loss_backward(grad, hidden, targets, lse, arrays, pad_row, bias, *rest):
    to_bias = [] if bias is None else [torch.empty_like(bias)]
    return [torch.empty_like(hidden), *to_bias, *_like(arrays, rest[-1])]


_fake(
    "tiled_logits",
    lambda hidden, arrays, pad_row, config, rows, *_: hidden.new_empty((hidden.shape[0], rows)),
)
_fake(
    "tiled_logits_backward",
    lambda grad, hidden, arrays, *rest: [torch.empty_like(hidden), *_like(arrays, rest[-1])],
)
_fake("tiled_cross_entropy", _fake_loss)
_fake("tiled_cross_entropy_backward", _fake_loss_backward)


def _spread(found, which):
    """One gradient for each array, None where none was asked for."""
    found = iter(found)
    return [next(found) if w else None for w in which]


def _setup_logits(ctx, inputs, output):
    hidden, arrays, pad_row, *ctx.table = inputs
    ctx.has_pad = pad_row is not None
    ctx.save_for_backward(hidden, *arrays, *([pad_row] if ctx.has_pad else []))


def _saved(ctx, first):
    tensors = list(ctx.saved_tensors)
    pad_row = tensors.pop() if ctx.has_pad else None
    return tensors[:first], tensors[first:], pad_row


def _backward_logits(ctx, grad):
    (hidden,), arrays, pad_row = _saved(ctx, 1)
    to_hidden, which = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1])
    found = torch.ops.lutra.tiled_logits_backward(grad, hidden, arrays, pad_row, *ctx.table, to_hidden, which)
    return (found[0] if to_hidden else None, _spread(found[1:], which), None, None, None, None, None)


def _setup_loss(ctx, inputs, output):
    hidden, targets, arrays, pad_row, bias, *ctx.table = inputs
    ctx.has_pad, ctx.has_bias = pad_row is not None, bias is not None
    ctx.mark_non_differentiable(output[1])
    optional = [t for t in (bias, pad_row) if t is not None]
    ctx.arrays = len(arrays)
    ctx.save_for_backward(hidden, targets, output[1], *arrays, *optional)


def _backward_loss(ctx, grad, _):
    (hidden, targets, lse), arrays, pad_row = _saved(ctx, 3)
    bias = arrays.pop() if ctx.has_bias else None
    which = list(ctx.needs_input_grad[2])
    found = torch.ops.lutra.tiled_cross_entropy_backward(
        grad, hidden, targets, lse, arrays, pad_row, bias, *ctx.table, which
    )
    to_bias = found.pop(1) if ctx.has_bias else None
    return (found[0], None, _spread(found[1:], which), None, to_bias, None, None, None, None, None)


torch.library.register_autograd(
    "lutra::tiled_logits", _backward_logits, setup_context=_setup_logits, lib=LIBRARY
)
torch.library.register_autograd(
    "lutra::tiled_cross_entropy", _backward_loss, setup_context=_setup_loss, lib=LIBRARY
)
