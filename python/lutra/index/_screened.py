"""The int8 copy that an index is screened by: codes that grow, shrink and are saved with its vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arrays import F32, I64, NUMPY
from ..scan import _screen
from . import _files
from ._home import HOST, Home

_PART = 1 << 24  # bytes of float32 rows that are coded at a time
_NAMES = ("screen_codes", "screen_inverse", "screen_half", "screen_mean", "screen_bounds")


class Screened:
    """A `lutra.scan.Screen` of rows (n, d) in a home, with room to grow."""

    def __init__(self, d: int, normalize: bool, home: Home = HOST) -> None:
        self.d, self.normalize, self.n, self.home = d, normalize, 0, home
        self._arrays = _screen.empty(home.kind, home.anchor, 0, d)
        self._mapped = False

    @property
    def nbytes(self) -> int:
        """Bytes of what is there, without the room."""
        return sum(a.nbytes for a in self.arrays)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Codes, inverse, half, mean, bounds; views."""
        blocks = (self.n + 15) // 16
        codes, inverse, half, mean, bounds = self._arrays
        return codes[:blocks], inverse[: blocks * 16], half[: blocks * 16], mean, bounds

    def set(self, rows: Any, first: int) -> None:
        """Code the rows of a collection ``rows`` (n, d) from number ``first`` on; those before are coded."""
        n, kind = len(rows), self.home.kind
        if first == 0 and n:
            self._start(rows)
        self._reserve(n)
        if kind.cuda and first < n:
            bad = self.home.full((1,), np.iinfo(np.int64).max, I64)
            _screen.encode(kind, rows[first:], first, self.normalize, self._arrays, bad=bad)
            row = int(bad[0])  # waits for the device, as every change of an index does
            if row < n:
                _screen.refuse(row)
            self.n = n
            return
        step = max(16, _PART // (4 * self.d) // 16 * 16)
        for i in range(first, n, step):
            part = NUMPY.dense(NUMPY.cast(rows[i : i + step], F32))
            _screen.encode(NUMPY, part, i, self.normalize, self._arrays)
        self.n = n

    def _start(self, rows: Any) -> None:
        if self.home.kind.cuda:
            new = _screen.empty(self.home.kind, rows, 0, self.d)
            _screen.begin(self.home.kind, rows, self.normalize, new)
            self._arrays = (*self._arrays[:3], *new[3:])
            return
        sample = rows[:: max(1, len(rows) // _screen._SAMPLE)]
        mean = _screen.mean_of(NUMPY.cast(sample, F32), self.normalize)
        self._arrays = (*self._arrays[:3], mean, np.zeros(4, np.float32))

    def _reserve(self, n: int) -> None:
        blocks, have = (n + 15) // 16, len(self._arrays[0])
        if blocks <= have and not self._mapped:
            return
        # Growing by half, so that many small additions cost linear time.
        room = blocks if self.n == 0 or blocks <= have else max(blocks, have + have // 2)
        new = _screen.empty(self.home.kind, self.home.anchor, room * 16, self.d)
        kept = min(blocks, len(self.arrays[0]))
        new[0][:kept] = self._arrays[0][:kept]
        for i in (1, 2):
            new[i][: kept * 16] = self._arrays[i][: kept * 16]
        self._arrays = (*new[:3], *(self.home.kind.copy(a) for a in self._arrays[3:]))
        self._mapped = False

    def search(self, q: Any, rows: Any, k: int, metric: str, keep: Any) -> Any:
        """Scores and positions: `lutra.scan.knn_screened`."""
        codes, inverse, half, mean, bounds = self.arrays
        return _screen._knn_screened(
            self.home.kind, q, rows, codes, inverse, half, mean, bounds, keep, k, metric
        )

    def to(self, home: Home) -> Screened:
        """The codes in another home."""
        moved = Screened(self.d, self.normalize, home)
        moved._arrays, moved.n = tuple(home.bring(a) for a in self.arrays), self.n
        return moved

    def tensors(self) -> list[Any]:
        """What a file keeps."""
        codes, *others = (HOST.bring(a) for a in self.arrays)
        flat = codes.reshape(codes.shape[0], -1)
        return [_files.Tensor.of_array(name, a) for name, a in zip(_NAMES, (flat, *others))]

    def restore(self, file: _files.File, n: int, mmap: bool) -> None:
        """Take over the codes of a file."""
        blocks, steps = (n + 15) // 16, (self.d + 3) // 4
        shapes = (blocks, steps * 64), (blocks * 16,), (blocks * 16,), (self.d,), (4,)
        found = []
        for name, shape, dtype in zip(_NAMES, shapes, ("U8", "F32", "F32", "F32", "F32")):
            array, mapped = file.tensor(name, dtype, shape, mmap=mmap)
            found.append(array)
            self._mapped |= mapped
        mean, bounds = found[3:]
        if not np.isfinite(mean).all() or not ((bounds >= 0) & (bounds < 1e30)).all():
            file.fail("screen_mean or screen_bounds hold values that no screen has")
        self._arrays = (found[0].reshape(blocks, steps, 16, 4), *found[1:])
        self.n = n
