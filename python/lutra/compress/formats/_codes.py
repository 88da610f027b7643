"""What formats of stored codes share: `pq`, `opq`, `clusters` and `rq`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from ... import _checks
from ...gather import Pieces
from ...quant import _bits
from ._pieces import PiecesFormat
from .base import Array, Data, Format, Shape


class CodesFormat(PiecesFormat):
    """Rows of m codes of ``bits`` bits each, packed, into m books of ``2**bits`` centroids.

    The centroids of the j-th book are the j-th part of a row, or whole rows that add up (``adds``). A format
    names its books (``table_name``), says how codes are chosen (`_entries`), and encodes.
    """

    m: int
    bits: int

    stored_name: ClassVar[str | None] = "codes"
    adds: ClassVar[bool] = False
    most_bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        _checks.integer("m", self.m, 1)
        _checks.integer("bits", self.bits, 1, self.most_bits)

    @property
    def ksub(self) -> int:
        """Centroids of a book."""
        return 1 << self.bits

    def _width(self, dim: int) -> int:
        """Columns of a centroid."""
        if self.adds:
            return dim
        if dim % self.m:
            raise ValueError(f"m is {self.m}; it must divide the dimension, {dim}")
        return dim // self.m

    def pieces(self, shape: Shape) -> Pieces:
        width = shape[1] if self.adds else shape[1] // self.m
        return Pieces("codes", (self.m, self.bits), width, "sum" if self.adds else "concat")

    def arrays(self, shape: Shape) -> dict[str, Array]:
        rows, dim = shape
        return {
            self.table_name: Array((self.m, self.ksub, self._width(dim))),
            "codes": Array((rows, _bits.packed_size(self.m, self.bits)), "uint8", False),
        }

    # ---------------------------------------------------------------- data
    @abstractmethod
    def _entries(self, x: np.ndarray, books: np.ndarray) -> np.ndarray:
        """Codes (n, m), unpacked, of rows (n, dim) float32, contiguous, as they are coded."""

    def _coded(self, x: np.ndarray, data: Data) -> np.ndarray:
        """Rows as their codes stand for them."""
        return x

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        """Codes at random, and books that give rows about N(0, 1)."""
        rng = np.random.default_rng(seed)
        entries = rng.integers(0, self.ksub, (shape[0], self.m), dtype=np.uint16)
        wanted = self.arrays(shape)[self.table_name].shape
        books = rng.standard_normal(wanted, dtype=np.float32)
        if self.adds:
            books /= np.float32(self.m**0.5)
        return {self.table_name: books, "codes": pack(entries, self.bits)}

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old rows keep their codes, new ones get the best of the same centroids."""
        x = self._coded(np.ascontiguousarray(values, np.float32), data)
        books = np.ascontiguousarray(data[self.table_name], np.float32)
        new = pack(self._entries(x, books), self.bits)
        return self, {**data, "codes": np.concatenate([data["codes"][:rows], new])}


def pack(entries: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) entries of up to 16 bits, packed as `lutra.quant` packs those of up to 8."""
    n, m = entries.shape
    if bits <= 8:
        return _bits.pack(entries.astype(np.uint8, copy=False), bits)
    words = np.ascontiguousarray(entries, "<u2").view(np.uint8).reshape(n, m, 2)
    planes = np.unpackbits(words, axis=2, bitorder="little")[:, :, :bits]
    return np.packbits(planes.reshape(n, m * bits), axis=1, bitorder="little")
