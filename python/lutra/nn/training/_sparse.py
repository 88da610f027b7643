"""Tables of zeros and of thin groups as formats of `lutra.compress`: 'csr', 'mixed', 'columns'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...compress._table import Table
from ...compress.formats.base import Format, make

if TYPE_CHECKING:
    from ._base import TrainingMethod


def dtype_name(layer: TrainingMethod) -> str:
    return str(layer.weight.dtype).removeprefix("torch.")


def shape_of(layer: TrainingMethod) -> tuple[int, int]:
    return layer.num_embeddings, layer.embedding_dim


def integers(format: Format, layer: TrainingMethod, name: str) -> torch.dtype:
    """The integer type that a format stores one of its arrays in."""
    return getattr(torch, format.arrays(shape_of(layer))[name].dtype)


# ---------------------------------------------------------------- csr
def csr_table(layer: TrainingMethod) -> Table:
    """The entries of the layer's table that are not zero (one that is, where all are)."""
    values, columns, lengths = [], [], []
    for _, rows in layer._blocks():
        here = rows != 0
        lengths.append(here.sum(1))
        columns.append(here.nonzero()[:, 1])
        values.append(rows[here])
    weight = layer.weight
    length = torch.cat([torch.zeros(0, dtype=torch.int64, device=weight.device), *lengths])
    if int(length.sum()) == 0 and weight.numel():
        length[0], columns, values = 1, [length.new_zeros(1)], [weight.detach().new_zeros(1)]
    format = _csr(layer, int(length.sum()))
    indptr = torch.cat([length.new_zeros(1), length.cumsum(0)])
    data = {
        "values": torch.cat([weight.detach().new_zeros(0), *values]),
        "columns": torch.cat([length.new_zeros(0), *columns]).to(integers(format, layer, "columns")),
        "indptr": indptr.to(integers(format, layer, "indptr")),
    }
    return Table(format, shape_of(layer), data)


def csr_bytes(layer: TrainingMethod) -> int:
    kept = sum(int((rows != 0).sum()) for _, rows in layer._blocks())
    return _csr(layer, max(1, kept)).nbytes(shape_of(layer), dtype_name(layer))


def _csr(layer: TrainingMethod, kept: int) -> Format:
    return make("csr", density=kept / max(1, layer.weight.numel()))


# ---------------------------------------------------------------- mixed
def group_table(
    layer: TrainingMethod, group: Tensor, columns: list[Tensor], projections: list[Tensor]
) -> Table:
    """Rows of group f as ``weight[rows, columns[f]] @ projections[f]``."""
    format = _mixed(layer, group, [len(c) for c in columns])
    order = group.argsort(stable=True)
    weight, dim, data = layer.weight.detach(), layer.embedding_dim, {}
    for f, (rows, c, p) in enumerate(zip(order.split(list(format.sizes)), columns, projections)):  # type: ignore[attr-defined]
        if len(c) == 0:
            thin, p = weight.new_zeros(len(rows), 1), weight.new_zeros(1, dim)
        else:
            thin, p = weight[rows][:, c], p.detach().to(weight.dtype)
        if thin.shape[1] == dim:
            data[f"table_{f}"] = thin @ p
        else:
            data[f"table_{f}"], data[f"projection_{f}"] = thin.contiguous(), p.contiguous()
    if not format.ordered:  # type: ignore[attr-defined]
        data["position"] = order.argsort().to(integers(format, layer, "position"))
    return Table(format, shape_of(layer), data)


def group_bytes(layer: TrainingMethod, group: Tensor, widths: list[int]) -> int:
    return _mixed(layer, group, widths).nbytes(shape_of(layer), dtype_name(layer))


def _mixed(layer: TrainingMethod, group: Tensor, widths: list[int]) -> Format:
    sizes = torch.bincount(group, minlength=len(widths)).tolist()
    ordered = bool((group[1:] >= group[:-1]).all())
    return make("mixed", sizes=tuple(sizes), widths=tuple(max(1, w) for w in widths), ordered=ordered)


# ---------------------------------------------------------------- columns
def column_table(layer: TrainingMethod, kept: Tensor) -> Table:
    """The columns ``kept`` of the layer's table; the others are zero."""
    if len(kept) == 0:
        kept = kept.new_zeros(1)
    dim = layer.embedding_dim
    format = make("columns", keep=len(kept))
    dropped = torch.ones(dim, dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
    order = torch.cat([kept, dropped.nonzero().squeeze(1)])
    values = [rows[:, kept] for _, rows in layer._blocks()]
    data = {
        "values": torch.cat([layer.weight.detach()[:0, : len(kept)], *values]),
        "mean": layer.weight.detach().new_zeros(dim - len(kept)),
        "place": order.argsort().to(integers(format, layer, "place")),
    }
    return Table(format, shape_of(layer), data)


def column_bytes(layer: TrainingMethod, kept: int) -> int:
    return make("columns", keep=max(1, kept)).nbytes(shape_of(layer), dtype_name(layer))
