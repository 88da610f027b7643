"""Product quantization: each part of a row is one of a few centroids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import _checks
from ...gather import Pieces
from ...quant import PQ as Quantizer
from ...quant import _bits
from ...quant._kernels import pq_entries
from ...scan._lookups import full_precision, pq_tables
from ._books import enough, quiet_train, train_weights, weighted
from ._pieces import PiecesFormat, divisors
from .base import Array, Data, Format, Shape, register


@register
@dataclass(frozen=True)
class PQ(PiecesFormat):
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
    stored_name: ClassVar[str | None] = "codes"

    def __post_init__(self) -> None:
        _checks.integer("m", self.m, 1)
        _checks.integer("bits", self.bits, 1, 8)

    def pieces(self, shape: Shape) -> Pieces:
        return Pieces("codes", (self.m, self.bits), shape[1] // self.m)

    def arrays(self, shape: Shape) -> dict[str, Array]:
        rows, dim = shape
        if dim % self.m:
            raise ValueError(f"m is {self.m}; it must divide the dimension, {dim}")
        return {
            "codebooks": Array((self.m, 1 << self.bits, dim // self.m)),
            "codes": Array((rows, _bits.packed_size(self.m, self.bits)), "uint8", False),
        }

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

    def _coded(self, x: np.ndarray, data: Data) -> np.ndarray:
        """Rows as their codes stand for them."""
        return x

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        self.arrays(table.shape)
        books, data = self._train(enough(table, 1 << self.bits, seed), seed, progress)
        x = self._coded(table, data)
        weights = train_weights(counts, len(table))
        if weights is not None:
            books = weighted(x, books, weights)
        return {"codebooks": books, "codes": _bits.pack(pq_entries(x, books), self.bits), **data}

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        wanted = self.arrays(shape)
        rng = np.random.default_rng(seed)
        entries = rng.integers(0, 1 << self.bits, (shape[0], self.m), dtype=np.uint8)
        books = rng.standard_normal(wanted["codebooks"].shape, dtype=np.float32)
        return {"codebooks": books, "codes": _bits.pack(entries, self.bits)}

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old rows keep their codes, new ones get the nearest of the same centroids."""
        x = self._coded(np.ascontiguousarray(values, np.float32), data)
        books = np.ascontiguousarray(data["codebooks"], np.float32)
        new = _bits.pack(pq_entries(x, books), self.bits)
        return self, {**data, "codes": np.concatenate([data["codes"][:rows], new])}

    def lookups(self, data: Data, shape: Shape, hidden: Any) -> tuple[Any, Any, int] | None:
        if self.name not in ("pq", "opq"):  # what else inherits may decode in another way
            return None
        rotation = data.get("rotation")
        if rotation is not None:  # a row is coded @ rotation: turn the query instead
            with full_precision(hidden):
                wide = hidden.float() if hidden.element_size() < 4 else hidden
                hidden = wide @ rotation.to(wide.dtype).T
        return pq_tables(hidden, data["codebooks"]), data["codes"], self.bits
