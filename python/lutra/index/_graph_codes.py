"""How a graph stores vectors as the codes of a product quantizer; `csrc/graph/keys_codes.h` compares them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..quant import _bits
from ..quant.base import Quantizer
from ..quant.opq import OPQ
from ..quant.pq import PQ
from ._home import HOST

_STEP = 16  # rows take a multiple of so many bytes
_MOST = 65536  # sub-vectors: so many 16-bit integers add up to 32 bits


class Coder:
    """Rows of codes: entries of 1 to 4 bits take half a byte, of 5 to 8 a byte.

    Parameters
    ----------
    quantizer : PQ or OPQ
        Trained or not.
    normalise : bool
        Vectors and queries are divided by their norms.
    """

    def __init__(self, quantizer: PQ, normalise: bool) -> None:
        self.quantizer, self.normalise = quantizer, normalise
        self.bits = 4 if quantizer.bits <= 4 else 8
        self.size = _bits.packed_size(quantizer.m, self.bits)
        self.stride = -(-self.size // _STEP) * _STEP
        self._made: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.quantizer._tensors().values())

    def parts(self) -> tuple[np.ndarray, np.ndarray, int, int]:
        """What the kernels need: codebooks twice, m, bits of a row's entry."""
        source = self.quantizer._books
        if self._made is None or self._made[0] is not source:
            # Whole for all 4 or 8 bits, whatever stands in a file: bits beyond the quantizer's do not count.
            copies = (1 << self.bits) // self.quantizer.ksub
            books = np.ascontiguousarray(np.concatenate([source] * copies, 1) if copies > 1 else source)
            self._made = source, books, np.ascontiguousarray(books.transpose(0, 2, 1))
        return self._made[1], self._made[2], self.quantizer.m, self.bits

    def encode(self, x: np.ndarray, rows: np.ndarray) -> None:
        quantizer = self.quantizer
        entries = quantizer._entries(quantizer._encode(HOST.normalise(x) if self.normalise else x))
        rows[:] = 0
        rows[:, : self.size] = _bits.pack(entries, self.bits)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        quantizer = self.quantizer
        entries = _bits.unpack(np.ascontiguousarray(rows[:, : self.size]), quantizer.m, self.bits)
        return quantizer._decode(_bits.pack(entries & np.uint8(quantizer.ksub - 1), quantizer.bits))

    def turned(self, q: np.ndarray) -> np.ndarray | None:
        """Queries as the codebooks see them; None where that is as they are, or of unit norm."""
        if not isinstance(self.quantizer, OPQ):
            return None
        return self.quantizer._turned(HOST.normalise(q) if self.normalise else q)


def check_quantizer(quantizer: Any, d: int) -> PQ | None:
    """The quantizer, None for what is none; an error for one that a graph cannot walk on."""
    if not isinstance(quantizer, Quantizer):
        return None
    if not isinstance(quantizer, PQ):
        raise ValueError(
            f"storage may be the quantizers PQ and OPQ of lutra.quant, got {quantizer!r}; take one of them, "
            "or 'int8' for codes of a byte a dimension"
        )
    if quantizer.d != d:
        raise ValueError(f"the quantizer has d = {quantizer.d}; the index has d = {d}")
    if quantizer.m > _MOST:
        raise ValueError(f"a graph is over codes of at most {_MOST} sub-vectors, got m = {quantizer.m}")
    return quantizer
