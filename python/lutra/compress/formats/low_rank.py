"""Low rank: a table as the product of a thin one and a small matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import _checks, gather
from .base import Array, Data, Format, Shape, register


@register
@dataclass(frozen=True)
class LowRank(Format):
    """``table = factor @ basis``, factor (rows, rank), basis (rank, dim).

    Encoded by the singular value decomposition, which is the best in the sum of squares (Eckart and Young
    1936); with counts, in the sum of squares weighed by them.

    Parameters
    ----------
    rank : int, default 64
        At most dim.
    """

    rank: int = 64

    name: ClassVar[str] = "low_rank"
    layer: ClassVar[str] = "LowRank"

    def __post_init__(self) -> None:
        _checks.integer("rank", self.rank, 1)

    def arrays(self, shape: Shape) -> dict[str, Array]:
        rows, dim = shape
        if self.rank > dim:
            raise ValueError(f"rank is {self.rank}; it must be at most the dimension, {dim}")
        return {"factor": Array((rows, self.rank)), "basis": Array((self.rank, dim))}

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> LowRank | None:
        rank = min(int(nbytes // cls(1).nbytes(shape, dtype)), shape[1])
        return cls(rank) if rank >= 1 else None

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        self.arrays(table.shape)
        weight = (
            None
            if counts is None
            else np.sqrt(np.maximum(counts, 0) + 1e-3 * max(counts.mean(), 1e-9))[:, None]
        )
        x = table.astype(np.float64) if weight is None else table * weight
        # The right singular vectors are the eigenvectors of a (dim, dim) matrix: no need of the tall factor.
        _, vectors = np.linalg.eigh(x.T @ x)
        basis = np.ascontiguousarray(vectors[:, ::-1][:, : self.rank].T)
        factor = table.astype(np.float64) @ basis.T
        return {"factor": factor.astype(np.float32), "basis": basis.astype(np.float32)}

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        self.arrays(shape)
        rng = np.random.default_rng(seed)
        factor = rng.standard_normal((shape[0], self.rank), dtype=np.float32)
        basis = rng.standard_normal((self.rank, shape[1]), dtype=np.float32) / np.float32(self.rank**0.5)
        return {"factor": factor, "basis": basis}

    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        return data["factor"][ids].astype(np.float32) @ data["basis"].astype(np.float32)

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        return data["factor"][ids] @ data["basis"]

    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        factor = gather.bag(data["factor"], ids.reshape(-1, 1), sparse_grad=sparse)
        return factor @ data["basis"]

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        if mode == "max":  # not linear: the rows themselves are needed
            return super().bag(
                data, shape, ids, offsets, weights, mode=mode, padding_idx=padding_idx,
                include_last_offset=include_last_offset, sparse=sparse,
            )  # fmt: skip
        # The sum of the thin rows first, one product a bag instead of one a row.
        thin = gather.bag(
            data["factor"], ids, offsets, weights, mode=mode, padding_idx=padding_idx,
            include_last_offset=include_last_offset, sparse_grad=sparse,
        )  # fmt: skip
        return thin @ data["basis"]

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        basis = data["basis"]  # the old rows stay as they are; new ones are projected on the same basis
        new = np.linalg.lstsq(basis.T.astype(np.float64), values.T.astype(np.float64), rcond=None)[0].T
        kept = data["factor"][:rows]
        return self, {"factor": np.concatenate([kept, new.astype(kept.dtype)]), "basis": basis}

    def logits(self, data: Data, shape: Shape, hidden: Any) -> Any:
        return (hidden @ data["basis"].T) @ data["factor"].T
