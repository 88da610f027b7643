"""Where rows come from: an array, an embedding layer, a compressed table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import F64, FLOATS, Kind, is_torch, kind_of
from ..compress._table import Table


class Source:
    """Rows as NumPy float32 (float64 for a float64 array), and the way back to the caller's library.

    Parameters
    ----------
    source : array (rows, dim), torch.nn.Embedding, layer of lutra.nn with ``to_table``, or Table
    """

    def __init__(self, source: Any) -> None:
        self.layer = None
        if hasattr(source, "to_table"):
            self.layer, source = source, source.to_table()
        elif (
            hasattr(source, "weight") and not isinstance(source, (np.ndarray, Table)) and not is_torch(source)
        ):
            self.layer, source = source, source.weight
        self.table = source if isinstance(source, Table) else None
        self.array = source
        if self.table is None:
            self.kind: Kind = kind_of(source, "source")
            self.code = _checks.dtype(self.kind, source, "source", (*FLOATS, F64))
            _checks.ndim(source, "source", 2)
            self._values = self.kind.to_numpy(source)
            self.shape = tuple(source.shape)
        else:
            self.shape = self.table.shape

    def rows(self, ids: np.ndarray) -> np.ndarray:
        if self.table is not None:
            like = next(iter(self.table.data.values()))
            if is_torch(like):
                import torch

                with torch.no_grad():
                    return self.table[torch.from_numpy(ids).to(like.device)].float().cpu().numpy()
            return np.asarray(self.table[ids], np.float32)
        rows = self._values[ids]
        return rows if rows.dtype == np.float64 else rows.astype(np.float32)

    def blocks(self, size: int = 1 << 14) -> Iterator[np.ndarray]:
        for begin in range(0, self.shape[0], size):
            yield self.rows(np.arange(begin, min(begin + size, self.shape[0])))

    def moments(self, ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the rows in each dimension, float64."""
        dim = self.shape[1]
        total, square, n = np.zeros(dim), np.zeros(dim), 0
        chosen = np.arange(self.shape[0]) if ids is None else ids
        shift = self.rows(chosen[:1]).astype(np.float64).sum(0)  # near the mean: nothing cancels
        for begin in range(0, len(chosen), 1 << 14):
            rows = self.rows(chosen[begin : begin + (1 << 14)]).astype(np.float64) - shift
            total, square, n = total + rows.sum(0), square + (rows**2).sum(0), n + len(rows)
        mean = total / max(n, 1)
        return mean + shift, np.sqrt(np.maximum(square / max(n, 1) - mean**2, 0))

    def back(self, rows: np.ndarray) -> Any:
        """Rows in the library, type and device of the source (float32 of the data's library for a Table)."""
        if self.table is None:
            return self.kind.from_numpy(rows, self.code, self.array)
        like = next(iter(self.table.data.values()))
        if is_torch(like):
            import torch

            return torch.from_numpy(rows).to(like.device)
        return rows
