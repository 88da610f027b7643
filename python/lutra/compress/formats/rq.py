"""Residual quantization: a row is a sum of centroids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import _checks
from ...gather import Pieces
from ...quant import RQ as Quantizer
from ...quant import _bits
from ...quant._kernels import rq_entries, rq_gram
from ...scan._lookups import full_precision
from ._books import enough, quiet_train, train_weights
from ._pieces import PiecesFormat
from .base import Array, Data, Format, Shape, register

BEAM = 5
MOST = 4096  # centroids: encoding works on the products of all pairs


@register
@dataclass(frozen=True)
class RQ(PiecesFormat):
    """A row is the sum of one centroid from each of m code books, whose centroids have all dim columns.

    Chen, Guan, Wang, Approximate Nearest Neighbor Search by Residual Vector Quantization, Sensors 2010.
    Encoded by `lutra.quant.RQ`, a beam search of 5; with counts, on rows drawn in proportion to them. Code
    books take m 2**bits dim floats, m times those of `PQ`: for large tables.

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
    stored_name: ClassVar[str | None] = "codes"

    def __post_init__(self) -> None:
        _checks.integer("m", self.m, 1)
        _checks.integer("bits", self.bits, 1, 8)
        if self.m << self.bits > MOST:
            raise ValueError(f"m * 2**bits is {self.m << self.bits}; it must be at most {MOST}")

    def pieces(self, shape: Shape) -> Pieces:
        return Pieces("codes", (self.m, self.bits), shape[1], "sum")

    def arrays(self, shape: Shape) -> dict[str, Array]:
        rows, dim = shape
        return {
            "codebooks": Array((self.m, 1 << self.bits, dim)),
            "codes": Array((rows, _bits.packed_size(self.m, self.bits)), "uint8", False),
        }

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
        quantizer = Quantizer(table.shape[1], self.m, self.bits, beam=BEAM, seed=seed)
        books = quiet_train(quantizer, enough(points, 1 << self.bits, seed), progress).codebooks
        return {"codebooks": books, "codes": self._codes(table, books)}

    def _codes(self, x: np.ndarray, books: np.ndarray) -> np.ndarray:
        return _bits.pack(rq_entries(np.ascontiguousarray(x), books, rq_gram(books), BEAM), self.bits)

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        entries = rng.integers(0, 1 << self.bits, (shape[0], self.m), dtype=np.uint8)
        books = rng.standard_normal((self.m, 1 << self.bits, shape[1]), dtype=np.float32)
        return {"codebooks": books / np.float32(self.m**0.5), "codes": _bits.pack(entries, self.bits)}

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old rows keep their codes, new ones get the best of the same centroids."""
        new = self._codes(values.astype(np.float32), np.ascontiguousarray(data["codebooks"], np.float32))
        return self, {**data, "codes": np.concatenate([data["codes"][:rows], new])}

    def lookups(self, data: Data, shape: Shape, hidden: Any) -> tuple[Any, Any, int]:
        wide = hidden.float() if hidden.element_size() < 4 else hidden
        with full_precision(wide):
            tables = wide @ data["codebooks"].to(wide.dtype).flatten(0, 1).T
        return tables.unflatten(1, (self.m, -1)).transpose(0, 1), data["codes"], self.bits
