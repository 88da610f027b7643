"""Rows of one array with room to grow."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arrays import BF16, F16, F32, I8, I32, NUMPY, U8
from ._home import HOST, Home

#: Bytes per row value, and how many bytes are copied at a time where rows move.
_SIZE = {F32: 4, I32: 4, F16: 2, BF16: 2, I8: 1, U8: 1}
_STEP = 1 << 24


class Rows:
    """The rows (n, width) of one array in a home, with spare capacity behind them.

    The capacity grows by half at least, so that many small additions cost linear time. Rows that were mapped
    from a file are read-only: the first change copies them.
    """

    def __init__(self, home: Home, width: int, code: int) -> None:
        self.home = home
        self.width = width
        self.code = code
        self.n = 0
        self.mapped = False
        self._array: Any = home.empty((0, width), code)

    @classmethod
    def of(cls, array: Any, code: int, *, mapped: bool) -> Rows:
        """Take over a NumPy array; ``mapped`` says that it is the view of a file."""
        rows = cls(HOST, array.shape[1], code)
        rows._array, rows.n, rows.mapped = array, array.shape[0], mapped
        return rows

    @property
    def view(self) -> Any:
        """The rows. A view: not to be handed out."""
        return self._array[: self.n]

    @property
    def nbytes(self) -> int:
        return self.n * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.width * _SIZE[self.code]

    @property
    def step(self) -> int:
        """Rows that are copied or converted at a time."""
        return max(1, _STEP // max(1, self.row_bytes))

    def room(self, extra: int) -> Any:
        """The next ``extra`` rows, uninitialised; `grow` makes them count."""
        need = self.n + extra
        if self.mapped or need > self._array.shape[0]:
            capacity = need if self.n == 0 else max(need, self.n + self.n // 2)
            array = self.home.empty((capacity, self.width), self.code)
            array[: self.n] = self.view
            self._array, self.mapped = array, False
        return self._array[self.n : need]

    def grow(self, extra: int) -> None:
        self.n += extra

    def keep(self, positions: Any) -> None:
        """Keep the rows at increasing positions (on the host), in place where the memory is ours."""
        start = 0
        if self.mapped:
            array = self.home.empty((len(positions), self.width), self.code)
            for i in range(0, len(positions), self.step):
                array[i : i + self.step] = self._array[positions[i : i + self.step]]
            self._array, self.mapped = array, False
        else:
            # positions[i] >= i: no row is overwritten before it has moved
            moved = positions != np.arange(len(positions))
            start = int(moved.argmax()) if moved.any() else len(positions)
            for i in range(start, len(positions), self.step):
                part = self.home.positions(positions[i : i + self.step])
                self._array[i : i + len(part)] = self._array[part]
        self.n = len(positions)
        if self.n < self._array.shape[0] // 4:
            self._array = self._copy(self.home)  # give the memory back

    def _copy(self, home: Home) -> Any:
        array = home.empty((self.n, self.width), self.code)
        for i in range(0, self.n, self.step):
            part = self.view[i : i + self.step]
            array[i : i + self.step] = part if home is self.home else home.bring(part)
        return array

    def to(self, home: Home) -> Rows:
        """The rows in another home."""
        rows = Rows(home, self.width, self.code)
        rows._array, rows.n = self._copy(home), self.n
        return rows

    def parts(self) -> Any:
        """The rows as NumPy arrays, one part after another."""
        dtype = NUMPY.dtype(self.code)  # bfloat16 leaves torch as float32
        for i in range(0, self.n, self.step):
            yield HOST.bring(self.view[i : i + self.step]).astype(dtype, copy=False)
