"""MagSVD: magnitudes and low-rank directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import _checks, gather
from ..._arrays import is_torch
from ...gather import Pieces
from ...gather._pieces import MOST_ROWS, composes
from ._bags import at_least_one, bag_counts, principal, row_weights, same_padding
from .base import Array, Data, Format, Shape, register


@register
@dataclass(frozen=True)
class MagSVD(Format):
    """``table[i] = magnitude[i] * (factor[i] @ basis)``, factor (rows, rank), basis (rank, dim).

    Rows are split into their norms and their directions, and the directions are decomposed (Balazy, Banaei,
    Lebret, Tabor, Aberer, Direction is what you need, 2021). Long rows, which frequent tokens need not have,
    so weigh no more than short ones: cosines are kept better than by `LowRank`, squared errors worse. With
    counts, directions are weighed by them.

    Parameters
    ----------
    rank : int, default 64
        At most dim.
    """

    rank: int = 64

    name: ClassVar[str] = "magsvd"
    layer: ClassVar[str] = "MagSVD"

    def __post_init__(self) -> None:
        _checks.integer("rank", self.rank, 1)

    def arrays(self, shape: Shape) -> dict[str, Array]:
        rows, dim = shape
        if self.rank > dim:
            raise ValueError(f"rank is {self.rank}; it must be at most the dimension, {dim}")
        return {
            "magnitude": Array((rows, 1)),
            "factor": Array((rows, self.rank)),
            "basis": Array((self.rank, dim)),
        }

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> MagSVD | None:
        one, two = cls(1).nbytes(shape, dtype), cls(2).nbytes((shape[0], max(shape[1], 2)), dtype)
        if shape[1] < 2:
            return cls(1) if one <= nbytes else None
        rank = min(int((nbytes - one) // (two - one)) + 1, shape[1]) if nbytes >= one else 0
        return cls(rank) if rank >= 1 else None

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        self.arrays(table.shape)
        wide = table.astype(np.float64)
        norms = np.sqrt((wide * wide).sum(1, keepdims=True))
        directions = wide / np.where(norms > 0, norms, 1)
        basis = principal(directions, row_weights(counts, len(table)), self.rank)
        return {
            "magnitude": norms.astype(np.float32),
            "factor": (directions @ basis.T).astype(np.float32),
            "basis": basis.astype(np.float32),
        }

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        self.arrays(shape)
        rows, dim = shape
        rng = np.random.default_rng(seed)
        directions = rng.standard_normal((rows, self.rank), dtype=np.float32)
        directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-20)
        # orthonormal rows of the basis keep the directions' norms
        basis = np.linalg.qr(rng.standard_normal((dim, self.rank)))[0].T
        return {
            "magnitude": np.full((rows, 1), dim**0.5, np.float32),
            "factor": directions,
            "basis": np.ascontiguousarray(basis, np.float32),
        }

    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        thin = data["factor"][ids].astype(np.float32) * data["magnitude"][ids].astype(np.float32)
        return thin @ data["basis"].astype(np.float32)

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        return (data["factor"][ids] * data["magnitude"][ids]) @ data["basis"]

    def _scaled(self, data: Data, shape: Shape, sparse: bool) -> Pieces | None:
        """The thin rows with their magnitudes as pieces, whose gradients take one sort of the ids."""
        factor = data["factor"]
        if sparse or not 0 < shape[0] <= MOST_ROWS or (is_torch(factor) and composes(factor)):
            return None
        return Pieces("modulo", (shape[0],), self.rank, "sum")

    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        ids = ids.reshape(-1, 1)
        if self._scaled(data, shape, sparse) is not None:
            return self.bag(data, shape, ids)
        magnitude = gather.bag(data["magnitude"], ids, sparse_grad=sparse)
        return gather.bag(data["factor"], ids, weights=magnitude, sparse_grad=sparse) @ data["basis"]

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        if mode not in ("sum", "mean") or (weights is not None and mode != "sum"):
            return super().bag(
                data, shape, ids, offsets, weights, mode=mode, padding_idx=padding_idx,
                include_last_offset=include_last_offset, sparse=sparse,
            )  # fmt: skip
        if weights is not None and weights.shape != ids.shape:
            raise ValueError(
                f"weights has shape {tuple(weights.shape)}; it must be that of ids, {tuple(ids.shape)}"
            )
        # The magnitudes are weights of the thin rows: their sum first, then one product a bag.
        pieces = self._scaled(data, shape, sparse)
        if pieces is not None:
            thin = gather.bag_pieces(
                data["factor"], ids, offsets, weights, pieces=pieces, rows=shape[0],
                piece_weights=data["magnitude"], mode=mode, padding_idx=padding_idx,
                include_last_offset=include_last_offset,
            )  # fmt: skip
            return thin @ data["basis"]
        factors = gather.bag(data["magnitude"], ids.reshape(-1, 1), sparse_grad=sparse).reshape(ids.shape)
        if weights is not None:
            factors = factors * (weights if is_torch(weights) else weights.astype(factors.dtype))
        thin = gather.bag(
            data["factor"], ids, offsets, factors, padding_idx=padding_idx,
            include_last_offset=include_last_offset, sparse_grad=sparse,
        )  # fmt: skip
        if mode == "mean":
            padding = same_padding(padding_idx, shape[0])
            thin = thin / at_least_one(bag_counts(ids, offsets, None, thin, padding, include_last_offset))
        return thin @ data["basis"]

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        basis = data["basis"]  # the old rows stay as they are; new ones are projected on the same basis
        wide = values.astype(np.float64)
        norms = np.sqrt((wide * wide).sum(1, keepdims=True))
        directions = wide / np.where(norms > 0, norms, 1)
        new = np.linalg.lstsq(basis.T.astype(np.float64), directions.T, rcond=None)[0]
        parts = {"magnitude": norms, "factor": new.T}
        grown = {k: np.concatenate([data[k][:rows], v.astype(data[k].dtype)]) for k, v in parts.items()}
        return self, {**grown, "basis": basis}

    def logits(self, data: Data, shape: Shape, hidden: Any) -> Any:
        return ((hidden @ data["basis"].T) @ data["factor"].T) * data["magnitude"].T
