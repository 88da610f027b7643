"""Rows of a graph: as `Rows`, of any dtype, aligned to cache lines."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._rows import Rows

_LINE = 64


class _Aligned:
    """Allocates what `Rows` asks its home for, so that no row of 64 bytes straddles two cache lines."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)

    def __deepcopy__(self, memo: Any) -> _Aligned:
        return self

    def empty(self, shape: tuple[int, ...], code: int) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        raw = np.empty(size + _LINE, np.uint8)
        start = -raw.ctypes.data % _LINE
        return raw[start : start + size].view(self.dtype).reshape(shape)

    @staticmethod
    def positions(a: np.ndarray) -> np.ndarray:
        return a

    @staticmethod
    def bring(a: np.ndarray) -> np.ndarray:
        return a


class Table(Rows):
    """Rows (n, width) of a NumPy dtype, with room to grow."""

    def __init__(self, width: int, dtype: Any) -> None:
        super().__init__(_Aligned(dtype), width, -1)  # type: ignore[arg-type]

    @property
    def dtype(self) -> Any:
        return self.home.dtype  # type: ignore[attr-defined]

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def take_over(self, array: np.ndarray, *, mapped: bool = False) -> None:
        """Hold this array (n, width); ``mapped`` says that it is the view of a file."""
        self._array, self.n, self.mapped = array.reshape(-1, self.width), len(array), mapped

    def append(self, values: Any, count: int) -> None:
        """``count`` more rows, of one value or of an array."""
        self.room(count)[:] = values
        self.grow(count)

    def own(self) -> None:
        """Copy rows that are a view of a file, so that they can be written."""
        if self.mapped:
            self.room(0)

    def parts(self) -> Any:
        for i in range(0, self.n, self.step):
            yield self.view[i : i + self.step]
