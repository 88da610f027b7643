"""Inverted lists in one arena: where the rows of each list lie, with room to grow, moved and packed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .._ranges import ranges

BLOCK = 16  # rows; a list begins at a multiple of it, and its arrays may be interleaved within it
_PART = 1 << 16  # rows that are moved at a time


class Field(NamedTuple):
    """An array of the arena: a block of 16 rows is stored as (a, 16, b) values, so a row is (a, b).

    (1, b) is a plain matrix; (d, 1) interleaves the dimensions of 16 rows.
    """

    a: int
    b: int
    dtype: np.dtype[Any]

    def empty(self, blocks: int) -> np.ndarray:
        return np.zeros((blocks, self.a, BLOCK, self.b), self.dtype)


class Arena:
    """Rows in lists. Each row stands for a position, the number of a vector in the order of addition.

    Attributes
    ----------
    begin, rows : (nlist,) int64
        First row of each list, a multiple of 16, and the number of its rows.
    positions : (rows of the arena,) int32
        -1 where there is no row. None where row and position are the same (a single list).
    arrays : dict of (blocks, a, 16, b) arrays
    """

    def __init__(self, nlist: int, fields: dict[str, Field]) -> None:
        self.nlist = nlist
        self.fields = fields
        self.begin = np.zeros(nlist, np.int64)
        self.rows = np.zeros(nlist, np.int64)
        self._room = np.zeros(nlist, np.int64)  # rows that each list may have where it lies
        self._end = 0  # of the last list's room
        self.arrays = {name: field.empty(0) for name, field in fields.items()}
        self.positions = np.empty(0, np.int32) if nlist > 1 else None
        self.mapped = False

    @property
    def total(self) -> int:
        """Rows in all lists."""
        return int(self.rows.sum())

    @property
    def size(self) -> int:
        """Rows of the arena, used or not."""
        return BLOCK * len(next(iter(self.arrays.values())))

    @property
    def tight(self) -> bool:
        """Whether the lists follow one another without room between them."""
        padded = _padded(self.rows)
        return bool((self.begin == np.cumsum(padded) - padded).all()) and self.size == padded.sum()

    @property
    def nbytes(self) -> int:
        """Bytes of the lists when they are packed."""
        rows = int(_padded(self.rows).sum())
        each = sum(f.a * f.b * f.dtype.itemsize for f in self.fields.values())
        return rows * (each + (0 if self.positions is None else 4)) + 16 * self.nlist

    # ---- rows
    def where(self, lists: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the arena of some lists (default all), in order, and the list of each."""
        lists = np.arange(self.nlist) if lists is None else lists
        rows = self.rows[lists]
        return ranges(self.begin[lists], rows), np.repeat(lists, rows)

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Values (n, a, b) of rows."""
        return self.arrays[name][rows >> 4, :, rows & 15]

    def _put(self, rows: np.ndarray, values: dict[str, np.ndarray]) -> None:
        for name, new in values.items():
            array = self.arrays[name]
            for i in range(0, len(rows), _PART):
                part = rows[i : i + _PART]
                array[part >> 4, :, part & 15] = new[i : i + _PART]

    # ---- growing
    def append(self, lists: np.ndarray, positions: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Add rows to lists: the list and position of each, and its values (n, a, b)."""
        n = len(lists)
        if n == 0:
            return
        count = np.bincount(lists, minlength=self.nlist)
        self.own()
        self._make_room(count)
        narrow = lists.astype(np.min_scalar_type(self.nlist), copy=False)  # which NumPy sorts by radix
        order = np.argsort(narrow, kind="stable")
        place = np.empty(n, np.int64)
        place[order] = ranges(0, count)
        rows = self.begin[lists] + self.rows[lists] + place
        if n >= _PART:  # in the order of the arena, for the caches
            rows, positions = rows[order], positions[order]
            values = {name: _Picked(value, order) for name, value in values.items()}  # type: ignore[misc]
        self._put(rows, values)
        if self.positions is not None:
            self.positions[rows] = positions
        self.rows += count

    def _make_room(self, count: np.ndarray) -> None:
        need = self.rows + count
        short = np.flatnonzero(need > self._room)
        if len(short) == 0:
            return
        if self.nlist == 1:
            room = _padded(need if self.rows[0] == 0 else np.maximum(need, self.rows + self.rows // 2))
            self._rebuild(room)
            return
        used = int(_padded(self.rows).sum())
        extra = int(_padded(need[short] + need[short] // 4).sum())
        if 4 * int(count.sum()) >= used:  # much comes at once: everything is laid out anew, without room
            self._rebuild(_padded(need))
        elif self._end + extra > used + used // 4 + 64 * BLOCK:  # too much is given up already
            room = _padded(np.where(need > self.rows, need + need // 8, need))
            self._rebuild(room)
        else:
            self._move(short, _padded(need[short] + need[short] // 4))

    def _move(self, lists: np.ndarray, room: np.ndarray) -> None:
        """Give some lists more room, behind all others."""
        old, _ = self.where(lists)
        self._grow(self._end + int(room.sum()))
        self.begin[lists] = self._end + np.cumsum(room) - room
        self._room[lists] = room
        self._end += int(room.sum())
        new, _ = self.where(lists)
        self._put(new, {name: self.take(name, old) for name in self.fields})
        if self.positions is not None:
            self.positions[new] = self.positions[old]
            self.positions[old] = -1

    def _grow(self, rows: int) -> None:
        size = self.size
        if rows <= size:
            return
        blocks = max(rows, size + size // 16) // BLOCK
        for name, field in self.fields.items():
            grown = field.empty(blocks)
            grown[: size // BLOCK] = self.arrays[name]
            self.arrays[name] = grown
        if self.positions is not None:
            grown = np.full(blocks * BLOCK, -1, np.int32)
            grown[:size] = self.positions
            self.positions = grown

    def _blocks(self, room: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Blocks that hold rows now, where they come to lie by a new layout, and its list_begin."""
        begin = np.cumsum(room) - room
        count = _padded(self.rows) // BLOCK
        within = ranges(0, count)
        return (
            within + np.repeat(self.begin // BLOCK, count),
            within + np.repeat(begin // BLOCK, count),
            begin,
        )

    def _rebuild(self, room: np.ndarray) -> None:
        """Lay all lists out again, each with so much room (multiples of 16)."""
        old, new, begin = self._blocks(room)
        blocks = int(room.sum()) // BLOCK
        step = _PART // BLOCK
        for name, field in self.fields.items():
            array = field.empty(blocks)
            for i in range(0, len(old), step):
                array[new[i : i + step]] = self.arrays[name][old[i : i + step]]
            self.arrays[name] = array
        if self.positions is not None:
            positions = np.full((blocks, BLOCK), -1, np.int32)
            positions[new] = self.positions.reshape(-1, BLOCK)[old]
            self.positions = positions.reshape(-1)
        self.begin, self._room, self._end, self.mapped = begin, room.copy(), int(room.sum()), False

    def compact(self) -> None:
        """Give back all room."""
        if not self.tight:
            self._rebuild(_padded(self.rows))

    def own(self) -> None:
        """Copy arrays that are mapped from a file, before they are changed."""
        if self.mapped:
            self._rebuild(_padded(self.rows))

    # ---- removing
    def remove(self, keep: np.ndarray, before: int) -> None:
        """Keep the rows of the increasing positions ``keep``, which become 0, 1, 2, ..."""
        self.own()
        renumbered = np.full(before, -1, np.int32)
        renumbered[keep] = np.arange(len(keep), dtype=np.int32)
        rows, owner = self.where()
        new = renumbered[rows if self.positions is None else self.positions[rows]]
        stay = new >= 0
        left = np.bincount(owner[stay], minlength=self.nlist)
        source = rows[stay]
        target = ranges(self.begin, left)
        # target <= source, and both increase: no row is overwritten before it has moved
        moved = np.flatnonzero(target != source)
        for i in range(0, len(moved), _PART):
            part = moved[i : i + _PART]
            self._put(target[part], {name: self.take(name, source[part]) for name in self.fields})
        if self.positions is not None:
            self.positions[rows] = -1
            self.positions[target] = new[stay]
        self.rows = left.astype(np.int64)
        if self._end > 2 * int(_padded(self.rows).sum()) + 64 * BLOCK:
            self.compact()

    # ---- files
    def parts(self, name: str) -> Iterator[np.ndarray]:
        """The blocks of an array, packed, a part at a time; of 'positions' too."""
        array = (
            self.positions.reshape(-1, BLOCK)
            if name == "positions" and self.positions is not None
            else self.arrays[name]
        )
        if self.tight:
            for i in range(0, len(array), _PART // BLOCK):
                yield array[i : i + _PART // BLOCK]
            return
        old, _, _ = self._blocks(_padded(self.rows))
        for i in range(0, len(old), _PART // BLOCK):
            yield array[old[i : i + _PART // BLOCK]]

    def restore(self, rows: np.ndarray, arrays: dict[str, np.ndarray], positions: np.ndarray | None) -> None:
        """Take over the packed arrays of a file, which may be mapped."""
        self.rows = rows
        self._room = _padded(rows)
        self.begin = np.cumsum(self._room) - self._room
        self._end = int(self._room.sum())
        self.arrays = arrays
        self.positions = positions
        self.mapped = True


class _Picked:
    """Rows of an array in another order, taken a part at a time."""

    def __init__(self, values: np.ndarray, order: np.ndarray) -> None:
        self.values, self.order = values, order

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.values[self.order[part]]


def _padded(rows: np.ndarray) -> np.ndarray:
    return (rows + (BLOCK - 1)) // BLOCK * BLOCK
