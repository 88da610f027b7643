"""Inverted lists in one arena: where the rows of each list lie, with room to grow, moved and packed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .._arrays import BF16, F16, F32, I8, I32, I64, U8
from ._home import HOST, Home

BLOCK = 16  # rows; a list begins at a multiple of it, and its arrays may be interleaved within it
_PART = 1 << 16  # rows that are moved at a time
#: dtype codes by the names of NumPy's dtypes.
CODES = {"float32": F32, "float16": F16, "bfloat16": BF16, "int8": I8, "uint8": U8}


class Field(NamedTuple):
    """An array of the arena: a block of 16 rows is stored as (a, 16, b) values, so a row is (a, b).

    (1, b) is a plain matrix; (d, 1) interleaves the dimensions of 16 rows.
    """

    a: int
    b: int
    dtype: np.dtype[Any]

    def empty(self, blocks: int, home: Home = HOST) -> Any:
        if home is HOST:
            return np.zeros((blocks, self.a, BLOCK, self.b), self.dtype)
        return home.full((blocks, self.a, BLOCK, self.b), 0, CODES[self.dtype.name])


class Arena:
    """Rows in lists. Each row stands for a position, the number of a vector in the order of addition.

    Attributes
    ----------
    home : Home
        Where positions and arrays lie.
    begin, rows : (nlist,) int64
        First row of each list, a multiple of 16, and the number of its rows; on the host.
    positions : (rows of the arena,) int32
        -1 where there is no row. None where row and position are the same (a single list).
    arrays : dict of (blocks, a, 16, b) arrays
    """

    def __init__(self, nlist: int, fields: dict[str, Field], home: Home = HOST) -> None:
        self.nlist = nlist
        self.fields = fields
        self.home = home
        self.begin = np.zeros(nlist, np.int64)
        self.rows = np.zeros(nlist, np.int64)
        self._room = np.zeros(nlist, np.int64)  # rows that each list may have where it lies
        self._end = 0  # of the last list's room
        self.arrays = {name: field.empty(0, home) for name, field in fields.items()}
        self.positions: Any = home.empty((0,), I32) if nlist > 1 else None
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

    @property
    def longest(self) -> int:
        """Rows of the longest list."""
        return int(self.rows.max(initial=0))

    @property
    def typical(self) -> int:
        """Rows of the list of a row drawn at random: about what a probed list has."""
        total = self.total
        return int(np.square(self.rows, dtype=np.float64).sum() / total) if total else 0

    def to(self, home: Home) -> Arena:
        """The same lists in another home."""
        arena = Arena(self.nlist, self.fields, home)
        arena.begin, arena.rows, arena._room = self.begin.copy(), self.rows.copy(), self._room.copy()
        arena._end = self._end
        step = _PART // BLOCK
        for name, field in self.fields.items():
            old = self.arrays[name]
            new = arena.arrays[name] = field.empty(len(old), home)
            for i in range(0, len(old), step):
                new[i : i + step] = home.bring(old[i : i + step])
        if self.positions is not None:
            arena.positions = home.full((self.size,), -1, I32)
            arena.positions[:] = home.bring(self.positions)
        return arena

    # ---- rows
    def where(self, lists: np.ndarray | None = None, home: Home | None = None) -> tuple[Any, Any]:
        """Rows of the arena of some lists (default all), in order, and the list of each; in ``home``."""
        home = home or self.home
        lists = np.arange(self.nlist) if lists is None else lists
        rows = self.rows[lists]
        return home.ranges(self.begin[lists], rows), home.repeat(lists, rows)

    def take(self, name: str, rows: Any) -> Any:
        """Values (n, a, b) of rows."""
        return self.arrays[name][rows >> 4, :, rows & 15]

    def _put(self, rows: Any, values: dict[str, Any]) -> None:
        for name, new in values.items():
            array = self.arrays[name]
            for i in range(0, len(rows), _PART):
                part = rows[i : i + _PART]
                array[part >> 4, :, part & 15] = new[i : i + _PART]

    # ---- growing
    def append(self, lists: Any, positions: Any, values: dict[str, Any]) -> None:
        """Add rows to lists: the list and position (int32) of each, and its values (n, a, b), in the home."""
        n, home = len(lists), self.home
        if n == 0:
            return
        count = home.bincount(lists, self.nlist)
        self.own()
        self._make_room(count)
        order = home.argsort(lists, self.nlist)  # rows in the order of the arena, for the caches
        start = self.begin + self.rows - (np.cumsum(count) - count)
        rows = home.positions(start)[lists[order]] + home.arange(n)
        self._put(rows, {name: _Picked(value, order) for name, value in values.items()})
        if self.positions is not None:
            self.positions[rows] = positions[order]
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
            grown = field.empty(blocks, self.home)
            grown[: size // BLOCK] = self.arrays[name]
            self.arrays[name] = grown
        if self.positions is not None:
            grown = self.home.full((blocks * BLOCK,), -1, I32)
            grown[:size] = self.positions
            self.positions = grown

    def _blocks(self, room: np.ndarray) -> tuple[Any, Any, np.ndarray]:
        """Blocks that hold rows now, where they come to lie by a new layout, and its list_begin."""
        begin = np.cumsum(room) - room
        count, home = _padded(self.rows) // BLOCK, self.home
        return home.ranges(self.begin // BLOCK, count), home.ranges(begin // BLOCK, count), begin

    def _rebuild(self, room: np.ndarray) -> None:
        """Lay all lists out again, each with so much room (multiples of 16)."""
        old, new, begin = self._blocks(room)
        blocks = int(room.sum()) // BLOCK
        step = _PART // BLOCK
        for name, field in self.fields.items():
            array = field.empty(blocks, self.home)
            for i in range(0, len(old), step):
                array[new[i : i + step]] = self.arrays[name][old[i : i + step]]
            self.arrays[name] = array
        if self.positions is not None:
            positions = self.home.full((blocks, BLOCK), -1, I32)
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
        home = self.home
        renumbered = home.full((before,), -1, I32)
        renumbered[home.positions(keep)] = home.kind.cast(home.arange(len(keep)), I32)
        rows, owner = self.where()
        at = rows if self.positions is None else home.kind.cast(self.positions[rows], I64)
        new = renumbered[at]
        stay = new >= 0
        left = home.bincount(owner[stay], self.nlist)
        source = rows[stay]
        target = home.ranges(self.begin, left)
        # target <= source, and both increase: no row is overwritten before it has moved
        moved = home.nonzero(target != source)
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
        """The blocks of an array, packed, a part at a time, on the host; of 'positions' too."""
        whole = name == "positions" and self.positions is not None
        array = self.positions.reshape(-1, BLOCK) if whole else self.arrays[name]
        dtype = np.dtype(np.int32) if whole else self.fields[name].dtype  # bfloat16 leaves torch as float32
        old = None if self.tight else self._blocks(_padded(self.rows))[0]
        for i in range(0, len(array) if old is None else len(old), _PART // BLOCK):
            part = slice(i, i + _PART // BLOCK)
            yield HOST.bring(array[part if old is None else old[part]]).astype(dtype, copy=False)

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

    def __init__(self, values: Any, order: Any) -> None:
        self.values, self.order = values, order

    def __getitem__(self, part: slice) -> Any:
        return self.values[self.order[part]]


def _padded(rows: np.ndarray) -> np.ndarray:
    return (rows + (BLOCK - 1)) // BLOCK * BLOCK
