"""Vectors in panels: a fixed number of vectors side by side, cut into blocks of dimensions.

A panel is one array (blocks, depth, lanes): a block of all its vectors is one run of memory, so that a scan
may read some blocks and pass over others. Panels are arrays of their own: growing copies nothing, and what is
mapped from a file is copied panel by panel, when it is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .. import _backend

_CHUNK = 1 << 25  # bytes of panels that are allocated at a time at most, beyond what an addition needs
_COLUMNS = 256  # that are transposed at a time: the source stays in the caches


class Panels:
    """Rows of ``blocks * depth`` values in panels of ``lanes``.

    Attributes
    ----------
    n : int
        Rows.
    arrays : list of (blocks, depth, lanes) arrays
        At least as many as rows need. The lanes behind row n hold anything.
    """

    def __init__(self, blocks: int, depth: int, lanes: int, dtype: np.dtype[Any]) -> None:
        self.shape = (blocks, depth, lanes)
        self.dtype = dtype
        self.n = 0
        self.arrays: list[np.ndarray] = []
        self._addresses: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what is in use, at addresses of its own."""
        return {**self.__dict__, "arrays": self.used, "_addresses": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Panels:
        copy = Panels(*self.shape, self.dtype)
        copy.reserve(self.n)
        for to, source in zip(copy.arrays, self.used):
            to[:] = source
        copy.n = self.n
        return copy

    @property
    def lanes(self) -> int:
        return self.shape[2]

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, without room to grow."""
        return self.n * self.width * self.dtype.itemsize

    @property
    def used(self) -> list[np.ndarray]:
        """The panels that hold rows."""
        return self.arrays[: (self.n + self.lanes - 1) // self.lanes]

    @property
    def addresses(self) -> np.ndarray:
        """Where each panel begins, (panels,) int64: for the kernels."""
        if self._addresses is None:
            self._addresses = np.array([a.ctypes.data for a in self.arrays], np.int64)
        return self._addresses

    # ---- growing
    def reserve(self, extra: int) -> None:
        """Make room for ``extra`` rows behind the last."""
        if extra == 0:
            return
        if self.n % self.lanes:
            self._own(self.n // self.lanes)
        missing = (self.n + extra + self.lanes - 1) // self.lanes - len(self.arrays)
        if missing <= 0:
            return
        each = self.width * self.lanes * self.dtype.itemsize
        spare = 0 if not self.arrays else min(len(self.arrays) // 4, _CHUNK // each)
        self.arrays += self._empty(max(missing, spare))
        self._addresses = None

    def _empty(self, count: int) -> list[np.ndarray]:
        """Panels in one piece of memory, aligned for the kernels, in huge pages where there are any."""
        each = self.width * self.lanes * self.dtype.itemsize
        memory = np.empty(count * each + 64, np.uint8)
        if _backend.core is not None and memory.nbytes >= 1 << 22:
            _backend.core.huge_pages(memory.ctypes.data, memory.nbytes)
        start = -memory.ctypes.data % 64
        flat = memory[start : start + count * each].view(self.dtype)
        return list(flat.reshape(count, *self.shape))

    def _own(self, panel: int) -> None:
        """Copy a panel that is mapped from a file, before it is changed."""
        if not self.arrays[panel].flags.writeable:
            (mine,) = self._empty(1)
            mine[:] = self.arrays[panel]
            self.arrays[panel] = mine
            self._addresses = None

    def write(self, first: int, values: np.ndarray) -> None:
        """Write rows (m, width), contiguous, to the places from n + first on, which are reserved."""
        at, done = self.n + first, 0
        while done < len(values):
            panel, lane = divmod(at + done, self.lanes)
            count = min(self.lanes - lane, len(values) - done)
            rows = values[done : done + count]
            done += count
            if _backend.core is not None:
                _backend.core.panel_put(
                    rows.view(np.uint8), count, self.width, self.dtype.itemsize,
                    self.arrays[panel].ctypes.data, self.lanes, lane,
                )  # fmt: skip
                continue
            to = self.arrays[panel].reshape(self.width, self.lanes)[:, lane : lane + count]
            for i in range(0, self.width, _COLUMNS):
                to[i : i + _COLUMNS] = rows[:, i : i + _COLUMNS].T

    def grow(self, count: int) -> None:
        """Let the rows that were written count."""
        self.n += count

    # ---- rows
    def take(self, positions: np.ndarray) -> np.ndarray:
        """Rows (m, width) at positions."""
        out = np.empty((len(positions), self.width), self.dtype)
        panels, lanes = positions // self.lanes, positions % self.lanes
        for panel in np.unique(panels):
            here = np.flatnonzero(panels == panel)
            flat = self.arrays[panel].reshape(self.width, self.lanes)
            for i in range(0, self.width, _COLUMNS):
                out[here, i : i + _COLUMNS] = flat[i : i + _COLUMNS, lanes[here]].T
        return out

    def keep(self, positions: np.ndarray) -> None:
        """Keep the rows at increasing positions."""
        moved = np.flatnonzero(positions != np.arange(len(positions)))
        # positions[i] >= i, so a panel is overwritten only when all its rows have moved
        first = int(moved[0]) if len(moved) else len(positions)
        fresh: np.ndarray | None = None
        for start in range(first // self.lanes * self.lanes, len(positions), self.lanes):
            part = positions[start : start + self.lanes]
            if part[-1] == start + len(part) - 1 and part[0] == start:
                continue  # nothing of it moves
            panel = start // self.lanes
            if fresh is None:
                (fresh,) = self._empty(1)
            from_panels = part // self.lanes
            for source in np.unique(from_panels):
                to = np.flatnonzero(from_panels == source)
                fresh[..., to] = self.arrays[source][..., part[to] % self.lanes]
            if self.arrays[panel].flags.writeable:
                self.arrays[panel][:] = fresh
            else:
                self.arrays[panel], fresh = fresh, None
        self.n = len(positions)
        self.arrays = self.used
        self._addresses = None

    # ---- files
    def parts(self) -> Iterator[np.ndarray]:
        """The panels in use, one after another; lanes without a row are 0."""
        for number, panel in enumerate(self.used):
            rows = min(self.lanes, self.n - number * self.lanes)
            if rows < self.lanes:
                panel = panel.copy()
                panel[..., rows:] = 0
            yield panel

    def restore(self, panels: Sequence[np.ndarray] | np.ndarray, n: int) -> None:
        """Take over the panels of a file, which may be mapped."""
        self.arrays, self.n, self._addresses = list(panels), n, None
