"""Column pruning: some columns of a table, and the mean of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import _checks, gather
from ..._arrays import is_torch
from ._bags import bag_counts, index_type, row_weights, same_padding
from .base import Array, Data, Format, Shape, register


@register
@dataclass(frozen=True)
class ColumnPruned(Format):
    """The ``keep`` columns in which rows differ most; every other column is one number, its mean.

    Encoding keeps the columns of the greatest variance (weighed by counts), which is the best choice in the
    sum of squares for this form. ``place[j]`` says where column ``j`` lies in the kept columns followed by
    the means.

    Parameters
    ----------
    keep : int, default 64
        Columns kept, at most dim.
    """

    keep: int = 64

    name: ClassVar[str] = "columns"
    layer: ClassVar[str] = "ColumnPruned"

    def __post_init__(self) -> None:
        _checks.integer("keep", self.keep, 1)

    def arrays(self, shape: Shape) -> dict[str, Array]:
        rows, dim = shape
        if self.keep > dim:
            raise ValueError(f"keep is {self.keep}; it must be at most the dimension, {dim}")
        return {
            "values": Array((rows, self.keep)),
            "mean": Array((dim - self.keep,)),
            "place": Array((dim,), index_type(dim), False),
        }

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> ColumnPruned | None:
        one = cls(1).nbytes(shape, dtype)
        each = (shape[0] - 1) * Array((1,)).nbytes(dtype)  # a column more is a mean less
        if one > nbytes:
            return None
        return cls(min((nbytes - one) // each + 1, shape[1]) if each > 0 else shape[1])

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        dim = table.shape[1]
        self.arrays(table.shape)
        weights = row_weights(counts, len(table))
        weights = weights / max(weights.sum(), 1e-300)
        wide = table.astype(np.float64)
        mean = weights @ wide
        variance = weights @ (wide - mean) ** 2
        chosen = np.argsort(-variance, kind="stable")
        kept, others = np.sort(chosen[: self.keep]), np.sort(chosen[self.keep :])
        return {
            "values": np.ascontiguousarray(table[:, kept]),
            "mean": mean[others].astype(np.float32),
            "place": _places(kept, others, dim),
        }

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        self.arrays(shape)
        dim = shape[1]
        rng = np.random.default_rng(seed)
        kept = np.sort(rng.permutation(dim)[: self.keep])
        others = np.setdiff1d(np.arange(dim), kept)
        values = rng.standard_normal((shape[0], self.keep), dtype=np.float32)
        return {
            "values": values * np.float32((dim / self.keep) ** 0.5),  # rows as long as dense ones
            "mean": np.zeros(dim - self.keep, np.float32),
            "place": _places(kept, others, dim),
        }

    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        thin = data["values"][ids].astype(np.float32)
        return _widen(thin, data, np.ones((len(thin), 1), np.float32))

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        thin = data["values"][ids]
        return _widen(thin, data, thin.new_ones(thin.shape[0], 1))

    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        thin = gather.bag(data["values"], ids.reshape(-1, 1), sparse_grad=sparse)
        return _widen(thin, data, _ones(thin))

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        thin = gather.bag(
            data["values"], ids, offsets, weights, mode=mode, padding_idx=padding_idx,
            include_last_offset=include_last_offset, sparse_grad=sparse,
        )  # fmt: skip
        # A column that is one number adds it once for each entry, weighed; empty bags stay zero.
        padding = same_padding(padding_idx, shape[0])
        counts = bag_counts(ids, offsets, weights, thin, padding, include_last_offset)
        if mode != "sum":
            counts = (counts > 0).to(thin.dtype) if is_torch(counts) else (counts > 0).astype(thin.dtype)
        return _widen(thin, data, counts)

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        kept = np.argsort(data["place"].astype(np.int64))[: self.keep]
        old = data["values"][:rows]
        return self, {**data, "values": np.concatenate([old, values[:, kept].astype(old.dtype)])}

    def logits(self, data: Data, shape: Shape, hidden: Any) -> Any:
        order = data["place"].long().argsort()
        thin = hidden[:, order[: self.keep]] @ data["values"].T
        return thin + (hidden[:, order[self.keep :]] @ data["mean"])[:, None]


def _places(kept: np.ndarray, others: np.ndarray, dim: int) -> np.ndarray:
    return np.argsort(np.concatenate([kept, others])).astype(index_type(dim))


def _ones(thin: Any) -> Any:
    return thin.new_ones(thin.shape[0], 1) if is_torch(thin) else np.ones((len(thin), 1), thin.dtype)


def _widen(thin: Any, data: Data, counts: Any) -> Any:
    """Kept columns and counts * mean, in the order of the table's columns."""
    if is_torch(thin):
        import torch

        return torch.cat([thin, counts * data["mean"]], 1).index_select(1, data["place"].long())
    mean = data["mean"].astype(thin.dtype)
    return np.concatenate([thin, counts * mean], 1)[:, data["place"].astype(np.int64)]
