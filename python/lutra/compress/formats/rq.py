"""Residual quantization: a row is a sum of centroids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...quant._kernels import rq_entries, rq_gram
from ...scan._lookups import full_precision
from ._books import enough, train_weights
from ._codes import CodesFormat, pack
from ._residual import greedy, refit
from .base import Data, Shape, register

BEAM = 5
MOST = 4096  # centroids: encoding works on the products of all pairs


@register
@dataclass(frozen=True)
class RQ(CodesFormat):
    """A row is the sum of one centroid from each of m code books, whose centroids have all dim columns.

    Chen, Guan, Wang, Approximate Nearest Neighbor Search by Residual Vector Quantization, Sensors 2010.
    Encoded by greedy training, on rows drawn in proportion to counts where there are any, a beam search of 5,
    and least squares for all centroids given the codes, weighed by the counts (the step of Babenko,
    Lempitsky, Additive Quantization, CVPR 2014). Code books take m 2**bits dim floats, m times those of
    `PQ`: for large tables.

    Parameters
    ----------
    m : int, default 8
        Code books; at most 4096 centroids in all.
    bits : int, default 8
        1 to 8.
    """

    m: int = 8
    bits: int = 8

    name: ClassVar[str] = "rq"
    layer: ClassVar[str] = "RQ"
    table_name: ClassVar[str] = "codebooks"
    adds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m << self.bits > MOST:
            raise ValueError(f"m * 2**bits is {self.m << self.bits}; it must be at most {MOST}")

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> RQ | None:
        """The most bits a row; among equals the larger code books. At most 64 code books."""
        every = (cls(m, bits) for bits in range(1, 9) for m in range(1, min(64, MOST >> bits) + 1))
        fitting = [one for one in every if one.nbytes(shape, dtype) <= nbytes]
        return max(fitting, key=lambda one: (one.m * one.bits, one.bits), default=None)

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        weights, points = train_weights(counts, len(table)), table
        if weights is not None:
            rng = np.random.default_rng(seed)
            points = table[np.sort(rng.choice(len(table), len(table), p=weights / weights.sum()))]
        books = greedy(enough(points, self.ksub, seed), self.m, self.ksub, seed, progress)
        entries = self._entries(np.ascontiguousarray(table), books)
        if len(table):
            books = refit(table, entries, books, weights)
        return {"codebooks": books, "codes": pack(entries, self.bits)}

    def _entries(self, x: np.ndarray, books: np.ndarray) -> np.ndarray:
        return rq_entries(x, books, rq_gram(books), BEAM)

    def lookups(self, data: Data, shape: Shape, hidden: Any) -> tuple[Any, Any, int]:
        wide = hidden.float() if hidden.element_size() < 4 else hidden
        with full_precision(wide):
            tables = wide @ data["codebooks"].to(wide.dtype).flatten(0, 1).T
        return tables.unflatten(1, (self.m, -1)).transpose(0, 1), data["codes"], self.bits
