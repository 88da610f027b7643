"""CSR: a table of which only the greatest entries are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import gather
from ..._arrays import is_torch, torch_kind
from ...reference import csr as reference
from ._bags import index_type, row_weights
from .base import SIZES, Array, Data, Format, Shape, check_ids, register


@register
@dataclass(frozen=True)
class CSR(Format):
    """A pruned table in compressed sparse rows: where each row's entries begin, their columns, their values.

    The entries of the greatest magnitude in the whole table are kept (with counts: of the greatest magnitude
    times the root of the row's count), which is the best choice in the sum of squares for so many; rows may
    hold more or fewer. Only their values are trained, the pattern stays.

    Parameters
    ----------
    density : float, default 0.125
        Share of the entries kept. An entry takes its value and 1 byte for its column (dim up to 256), or 2.
    """

    density: float = 0.125

    name: ClassVar[str] = "csr"
    layer: ClassVar[str] = "CSR"

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, (int, float)):
            raise TypeError(f"density must be a number, got {type(self.density).__qualname__}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density!r}")

    def kept(self, shape: Shape) -> int:
        """How many entries a table of that shape keeps."""
        return min(round(self.density * shape[0] * shape[1]), shape[0] * shape[1])

    def arrays(self, shape: Shape) -> dict[str, Array]:
        kept = self.kept(shape)
        return {
            "values": Array((kept,)),
            "columns": Array((kept,), _column_type(shape[1]), False),
            "indptr": Array((shape[0] + 1,), "int32" if kept < 1 << 31 else "int64", False),
        }

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> CSR | None:
        cells = shape[0] * shape[1]
        each = SIZES[dtype] + SIZES[_column_type(shape[1])]
        start = SIZES["int32"] if nbytes < each << 31 else SIZES["int64"]
        kept = min((nbytes - start * (shape[0] + 1)) // each, cells)
        if kept < 1 or not cells:
            return None
        density = kept / cells
        short = int(density * 1e6) / 1e6  # for the reader; never more than fits
        found = cls(short if short > 0 and cells > 1_000_000 else density)
        return found if found.nbytes(shape, dtype) <= nbytes else None

    # ---------------------------------------------------------------- data
    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        kept = self.kept(table.shape)
        worth = np.abs(table)
        if counts is not None:
            worth *= np.sqrt(row_weights(counts, len(table)))[:, None].astype(np.float32)
        return _pruned(table, worth, kept, self.arrays(table.shape))

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        """As many entries in each row, in columns at random, with the norms that dense N(0, 1) rows have.

        Encoding a random table would leave some rows empty: these could never be trained.
        """
        rows, dim = shape
        kept, arrays = self.kept(shape), self.arrays(shape)
        if not kept:
            return _pruned(np.zeros(shape, np.float32), np.zeros(shape, np.float32), 0, arrays)
        rng = np.random.default_rng(seed)
        lengths = np.full(rows, kept // rows, np.int64)
        lengths[rng.permutation(rows)[: kept % rows]] += 1
        mixed = np.argsort(rng.random(shape, dtype=np.float32), axis=1)
        columns = np.sort(np.where(np.arange(dim) < lengths[:, None], mixed, dim), axis=1)
        scale = np.float32((rows * dim / kept) ** 0.5)
        return {
            "values": scale * rng.standard_normal(kept, dtype=np.float32),
            "columns": columns[columns < dim].astype(arrays["columns"].dtype),
            "indptr": np.concatenate([[0], np.cumsum(lengths)]).astype(arrays["indptr"].dtype),
        }

    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        values = data["values"].astype(np.float32)
        return reference.rows(data["indptr"], data["columns"], values, ids, shape[1])

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        import torch

        indptr, values = data["indptr"].long(), data["values"]
        begins = indptr[ids]
        lengths = indptr[ids + 1] - begins
        before = torch.cumsum(lengths, 0) - lengths
        total = int(lengths.sum())  # waits for a GPU: how many entries there are depends on the ids
        row = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), lengths, output_size=total)
        at = torch.arange(total, device=ids.device) + (begins - before)[row]
        out = torch.zeros(len(ids) * shape[1], dtype=values.dtype, device=values.device)
        return out.index_add(0, row * shape[1] + data["columns"][at].long(), values[at]).view(-1, shape[1])

    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        values = data["values"]
        if _by_torch(values):
            return self.lookup(data, shape, check_ids(ids, shape[0]))
        return gather.bag_csr(values, data["indptr"], data["columns"], ids.reshape(-1, 1), dim=shape[1])

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        values = data["values"]
        if _by_torch(values) or mode not in ("sum", "mean"):
            return super().bag(
                data, shape, ids, offsets, weights, mode=mode, padding_idx=padding_idx,
                include_last_offset=include_last_offset, sparse=sparse,
            )  # fmt: skip
        return gather.bag_csr(
            values, data["indptr"], data["columns"], ids, offsets, weights, dim=shape[1], mode=mode,
            padding_idx=padding_idx, include_last_offset=include_last_offset,
        )  # fmt: skip

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old rows stay as they are, new ones are pruned to the same density."""
        old = int(data["indptr"][rows if rows <= shape[0] else shape[0]])
        indptr = data["indptr"][: min(rows, shape[0]) + 1].astype(np.int64)
        parts = {"values": [data["values"][:old]], "columns": [data["columns"][:old]], "indptr": [indptr]}
        if len(values):
            new_kept = self.kept((len(values), shape[1]))
            new = _pruned(values, np.abs(values), new_kept, self.arrays((len(values), shape[1])))
            parts["values"].append(new["values"].astype(data["values"].dtype))
            parts["columns"].append(new["columns"])
            parts["indptr"].append(new["indptr"][1:].astype(np.int64) + old)
        grown = {k: np.concatenate(v) for k, v in parts.items()}
        total = (len(grown["indptr"]) - 1, shape[1])
        found = CSR(max(len(grown["values"]) / max(total[0] * total[1], 1), 1e-12))
        grown["indptr"] = grown["indptr"].astype(found.arrays(total)["indptr"].dtype)
        return found, grown


def _column_type(dim: int) -> str:
    kind = index_type(dim)
    return "int32" if kind == "int64" else kind


def _pruned(table: np.ndarray, worth: np.ndarray, kept: int, arrays: dict[str, Array]) -> Data:
    """The ``kept`` entries of the greatest worth; of equals those that come first."""
    dim = table.shape[1]
    flat = worth.reshape(-1)
    if kept < flat.size:
        limit = np.partition(flat, flat.size - kept)[flat.size - kept]
        chosen = flat > limit
        equal = np.flatnonzero(flat == limit)
        chosen[equal[: kept - int(chosen.sum())]] = True
    else:
        chosen = np.ones(flat.size, bool)
    at = np.flatnonzero(chosen)
    indptr = np.zeros(len(table) + 1, np.int64)
    np.cumsum(chosen.reshape(len(table), dim).sum(1), out=indptr[1:])
    return {
        "values": np.ascontiguousarray(table.reshape(-1)[at], np.float32),
        "columns": (at % dim).astype(arrays["columns"].dtype),
        "indptr": indptr.astype(arrays["indptr"].dtype),
    }


def _by_torch(values: Any) -> bool:
    """Whether torch's own ops compute: where there is no kernel."""
    if not is_torch(values):
        return False
    return str(values.dtype) == "torch.float64" or (values.is_cuda and torch_kind(True).kernels is None)
