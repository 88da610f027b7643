"""Product quantization: each part of a row is one of a few centroids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...quant import PQ as Quantizer
from ...quant._kernels import pq_entries
from ...scan._lookups import full_precision, pq_tables
from ._books import enough, quiet_train, train_weights, weighted
from ._codes import CodesFormat, pack
from ._pieces import divisors
from .base import Data, Shape, register


@register
@dataclass(frozen=True)
class PQ(CodesFormat):
    """Each of m sub-vectors of a row is one of ``2**bits`` centroids; a row is m codes of so many bits.

    Jégou, Douze, Schmid, Product Quantization for Nearest Neighbor Search, PAMI 2011. Encoded by k-means in
    each sub-space (`lutra.quant.PQ`); with counts, rows count by them. Codes are packed as FAISS packs them:
    entry j of a row takes the bits [j bits, (j + 1) bits), the lowest first.

    Parameters
    ----------
    m : int, default 32
        Sub-vectors; divides dim.
    bits : int, default 8
        1 to 8.
    """

    m: int = 32
    bits: int = 8

    name: ClassVar[str] = "pq"
    layer: ClassVar[str] = "PQ"
    table_name: ClassVar[str] = "codebooks"

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> PQ | None:
        """The most bits a row; among equals the larger code books, whose sub-vectors are longer."""
        every = (cls(m, bits) for m in divisors(shape[1]) for bits in range(1, 9))
        fitting = [one for one in every if one.nbytes(shape, dtype) <= nbytes]
        return max(fitting, key=lambda one: (one.m * one.bits, one.bits), default=None)

    # ---------------------------------------------------------------- data
    def _train(
        self, x: np.ndarray, seed: int, progress: bool | None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Code books for rows, and further arrays."""
        trained = quiet_train(Quantizer(x.shape[1], self.m, self.bits, seed=seed), x, progress)
        return trained.codebooks, {}

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        self.arrays(table.shape)
        books, data = self._train(enough(table, self.ksub, seed), seed, progress)
        x = self._coded(table, data)
        weights = train_weights(counts, len(table))
        if weights is not None:
            books = weighted(x, books, weights)
        return {"codebooks": books, "codes": pack(pq_entries(x, books), self.bits), **data}

    def _entries(self, x: np.ndarray, books: np.ndarray) -> np.ndarray:
        return pq_entries(x, books)

    def lookups(self, data: Data, shape: Shape, hidden: Any) -> tuple[Any, Any, int] | None:
        if self.name not in ("pq", "opq"):  # what else inherits may decode in another way
            return None
        rotation = data.get("rotation")
        if rotation is not None:  # a row is coded @ rotation: turn the query instead
            with full_precision(hidden):
                wide = hidden.float() if hidden.element_size() < 4 else hidden
                hidden = wide @ rotation.to(wide.dtype).T
        return pq_tables(hidden, data["codebooks"]), data["codes"], self.bits
