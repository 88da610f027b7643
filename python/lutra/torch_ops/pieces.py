"""``torch.ops.lutra`` for `lutra.gather.bag_pieces`."""

from __future__ import annotations

import torch

from ..gather import _bag as bag
from ..gather import _pieces as pieces
from ..gather import _scaled as scaled
from .gather import _needs, run
from .library import gradient, register

ops = torch.ops.lutra


def _fake(
    table, ids, offsets=None, weights=None, stored=None, piece_weights=None, source="codes", numbers=(),
    width=0, combine="concat", rows=0, mode="sum", padding_idx=None, include_last_offset=False,
):  # fmt: skip
    bags, _ = bag._layout(ids, offsets, include_last_offset)
    return table.new_empty((bags, pieces.Pieces(source, tuple(numbers), width, combine).dim))


def _backward_fake(
    grad, ids, offsets, weights, stored, piece_weights, table, source, numbers, width, combine, rows, mode,
    padding_idx, include_last_offset,
):  # fmt: skip
    of = pieces.Pieces(source, tuple(numbers), width, combine)
    return grad.new_empty((of.table_rows, 1 if source == "robe" else width))


def _dots_fake(
    grad, table, ids, offsets, stored, source, numbers, width, combine, rows, padding_idx, include_last_offset
):
    m = 1 if combine == "product" else pieces.Pieces(source, tuple(numbers), width, combine).m
    return grad.new_empty((ids.numel(), m), dtype=torch.float32)


def _scaled_fake(
    grad, table, scale, ids, offsets, weights, mode, padding_idx, include_last_offset, need_table, need_scale,
    need_weights,
):  # fmt: skip
    return (
        grad.new_empty(table.shape if need_table else (0,)),
        grad.new_empty(scale.shape if need_scale else (0,)),
        grad.new_empty(ids.shape if need_weights else (0,), dtype=torch.float32),
    )


def _setup(ctx, inputs, output):
    table, ids, offsets, weights, stored, piece_weights, *ctx.options = inputs
    ctx.shape = table.shape
    ctx.scaled = ctx.options[0] == "modulo" and piece_weights is not None and table.is_cpu
    reads = _needs(ctx, 3) or _needs(ctx, 5) or ctx.options[3] == "product" or ctx.scaled
    ctx.save_for_backward(table if reads else None, ids, offsets, weights, stored, piece_weights)


def _backward(ctx, grad):
    table, ids, offsets, weights, stored, piece_weights = ctx.saved_tensors
    source, numbers, width, combine, rows, mode, padding_idx, last = ctx.options
    of = (source, numbers, width, combine, rows)
    to_table = to_weights = to_pieces = None
    if ctx.scaled:  # one sort for all
        needs = [_needs(ctx, i) for i in (0, 5, 3)]
        a, b, c = ops.scaled_rows_backward(
            grad,
            table.reshape(-1, width),
            piece_weights,
            ids,
            offsets,
            weights,
            mode,
            padding_idx,
            last,
            *needs,
        )
        to_table, to_pieces = a.reshape(ctx.shape) if needs[0] else None, b if needs[1] else None
        to_weights = c.to(weights.dtype) if needs[2] else None
        return to_table, None, None, to_weights, None, to_pieces, *(None,) * len(ctx.options)
    if _needs(ctx, 0):
        to_table = ops.bag_pieces_backward(
            grad, ids, offsets, weights, stored, piece_weights, table, *of, mode, padding_idx, last
        ).reshape(ctx.shape)
    if _needs(ctx, 3) or _needs(ctx, 5):
        dots = ops.piece_dots(grad, table, ids, offsets, stored, *of, padding_idx, last)
        if _needs(ctx, 3):
            own = dots if piece_weights is None else dots * piece_weights[_inside(ids, rows)]
            to_weights = own.sum(1).reshape(ids.shape).to(weights.dtype)
        if _needs(ctx, 5):
            to_pieces = _piece_weight_grad(dots, ids, offsets, weights, rows, mode, padding_idx, last)
            to_pieces = to_pieces.to(piece_weights.dtype)
    return to_table, None, None, to_weights, None, to_pieces, *(None,) * len(ctx.options)


def _piece_weight_grad(dots, ids, offsets, weights, rows, mode, padding_idx, last):
    """Dots of the entries, added up by id: (rows, m). Entries of no bag and padding have dots of 0."""
    if mode == "mean":
        from ..compress.formats._bags import bag_counts

        counts = bag_counts(ids, offsets, None, dots, padding_idx, last).reshape(-1).clamp(min=1)
        dots = dots / _of_bags(counts, ids, offsets, last)[:, None]
    elif weights is not None:
        dots = dots * weights.reshape(-1, 1)
    if dots.is_cuda:  # torch's additions are in any order there
        arguments = (dots, ids.reshape(-1, 1), None, None, None, rows, "sum", None, False)
        return run("bag_backward", bag._bag_backward, arguments)
    # torch adds the entries of a column one after another, in their order; sorting pays for wide rows only.
    flat = _inside(ids, rows)
    columns = [dots.new_zeros(rows).index_add(0, flat, column) for column in dots.unbind(1)]
    return torch.stack(columns, 1) if len(columns) > 1 else columns[0].unsqueeze(1)


def _inside(ids, rows):
    """Flat ids; those of no bag, which may be anything and whose gradients are 0, as some row."""
    return ids.reshape(-1).clamp(0, max(rows - 1, 0))


def _of_bags(values, ids, offsets, last):
    """Values of bags for each entry."""
    if offsets is None:
        return values.repeat_interleave(ids.shape[1])
    n = ids.shape[0]
    ends = torch.cat([offsets[1:], offsets.new_full((0 if last else 1,), n)])
    out = values.new_ones(n)
    first = int(offsets[0]) if len(offsets) else 0
    spread = values.repeat_interleave((ends - offsets[: len(ends)]).long())
    out[first : first + len(spread)] = spread
    return out


_OF = "str source, SymInt[] numbers, SymInt width, str combine, SymInt rows"
register(
    "bag_pieces(Tensor table, Tensor ids, Tensor? offsets, Tensor? weights, Tensor? stored, "
    f"Tensor? piece_weights, {_OF}, str mode, int? padding_idx, bool include_last_offset) -> Tensor",
    pieces._bag_pieces,
    _fake,
)
register(
    "bag_pieces_backward(Tensor grad, Tensor ids, Tensor? offsets, Tensor? weights, Tensor? stored, "
    f"Tensor? piece_weights, Tensor? table, {_OF}, str mode, int? padding_idx, "
    "bool include_last_offset) -> Tensor",
    pieces._pieces_backward,
    _backward_fake,
)
register(
    f"piece_dots(Tensor grad, Tensor table, Tensor ids, Tensor? offsets, Tensor? stored, {_OF}, "
    "int? padding_idx, bool include_last_offset) -> Tensor",
    pieces._piece_dots,
    _dots_fake,
)
register(
    "scaled_rows_backward(Tensor grad, Tensor table, Tensor scale, Tensor ids, Tensor? offsets, "
    "Tensor? weights, str mode, int? padding_idx, bool include_last_offset, bool need_table, "
    "bool need_scale, bool need_weights) -> (Tensor, Tensor, Tensor)",
    scaled._scaled_rows_backward,
    _scaled_fake,
)
gradient("bag_pieces", _backward, _setup)
