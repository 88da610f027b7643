"""The ids of an index: positions in, user ids out, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._home import HOST, Home, check_ids

_MAX = np.iinfo(np.int64).max
_FEW = 4096  # recent ids that a dictionary holds before the sorted copy is made again


class Ids:
    """Unique ids >= 0, one for each position.

    While ids are the positions themselves nothing is stored. Increasing ids are their own sorted index; for
    others a sorted copy is kept, with a dictionary for the most recent: many small additions are cheap.

    Attributes
    ----------
    next : int
        The id that the next addition without ids begins with: one more than the largest that ever was.
    """

    def __init__(self) -> None:
        self.n = 0
        self.next = 0
        self._array: np.ndarray | None = None  # None: ids are positions
        self._increasing = True
        self._sorted = np.empty(0, np.int64)  # ids in increasing order, of the positions below len(_sorted)
        self._order = np.empty(0, np.int64)  # their positions
        self._recent: dict[int, int] = {}  # of the positions from len(_sorted)
        self._there: tuple[Home, Any] | None = None  # copy in a home that is not the host
        self._order_there: tuple[Home, Any, Any] | None = None  # its order, and the ids in that order

    @property
    def are_positions(self) -> bool:
        return self._array is None

    @property
    def increasing(self) -> bool:
        """Whether the ids rise with their positions."""
        return self._increasing

    @property
    def array(self) -> np.ndarray:
        """All ids in the order of their positions."""
        return np.arange(self.n) if self._array is None else self._array[: self.n]

    @property
    def nbytes(self) -> int:
        return 0 if self._array is None else 8 * self.n

    # ---- adding
    def check_new(self, ids: Any, count: int) -> np.ndarray | None:
        """Ids for ``count`` new vectors, checked but not yet added; None: one after another from ``next``."""
        if ids is None:
            if self.next > _MAX - count:
                raise ValueError(f"the ids after {self.next - 1} exceed int64; give ids")
            return None
        new = check_ids(ids)
        if new.shape != (count,):
            raise ValueError(f"ids has shape {new.shape}; x has {count} rows, one id is needed for each")
        if count == 0:
            return new
        low, high = int(new.min()), int(new.max())
        if low < 0:
            where = int((new < 0).argmax())
            raise ValueError(f"ids[{where}] is {int(new[where])}; ids must be >= 0")
        if high == _MAX:
            raise ValueError(f"ids holds {_MAX}; ids must be less than 2**63 - 1")
        if count > 1 and not _increase(new):
            order = np.argsort(new, kind="stable")
            again = np.flatnonzero(new[order][1:] == new[order][:-1])
            if len(again):
                first, second = order[again[0]], order[again[0] + 1]
                raise ValueError(
                    f"ids[{first}] and ids[{second}] are both {int(new[first])}; ids must be unique"
                )
        if low < self.next:
            known = np.flatnonzero(self.positions(new) >= 0)
            if len(known):
                raise ValueError(
                    f"ids[{known[0]}] is {int(new[known[0]])}, which is in the index; remove_ids it first"
                )
        return new

    def add(self, new: np.ndarray | None, count: int) -> None:
        """Add what `check_new` returned."""
        if count == 0:
            return
        if self._array is None:
            if self.next == self.n and (
                new is None or np.array_equal(new, np.arange(self.n, self.n + count))
            ):
                self.n += count
                self.next = self.n
                return
            self._array = np.arange(self.n)
        if new is None:
            new = np.arange(self.next, self.next + count)
        last = int(self._array[self.n - 1]) if self.n else -1
        increasing = self._increasing and int(new[0]) > last and (count == 1 or _increase(new))
        if self.n + count > len(self._array):
            grown = np.empty(max(self.n + count, self.n + self.n // 2), np.int64)
            grown[: self.n] = self._array[: self.n]
            self._array = grown
        self._array[self.n : self.n + count] = new
        self.n += count
        self.next = max(self.next, int(new.max()) + 1)
        self._there = self._order_there = None
        if increasing:
            return
        if self._increasing or len(self._recent) + count > max(_FEW, len(self._sorted) // 4):
            self._sort()
        else:
            self._recent.update(zip(new.tolist(), range(self.n - count, self.n)))

    def _sort(self) -> None:
        array = self.array
        self._increasing = _increase(array)
        self._recent = {}
        if self._increasing:
            self._sorted = self._order = np.empty(0, np.int64)
        else:
            self._order = np.argsort(array, kind="stable")
            self._sorted = array[self._order]

    # ---- looking up
    def positions(self, ids: np.ndarray) -> np.ndarray:
        """The position of each id, -1 for those that are not there."""
        if self._array is None:
            return np.where((ids >= 0) & (ids < self.n), ids, -1)
        table = self.array if self._increasing else self._sorted
        if len(table) == 0:
            where = np.full(ids.shape, -1, np.int64)
        else:
            slot = np.minimum(np.searchsorted(table, ids), len(table) - 1)
            where = np.where(table[slot] == ids, slot if self._increasing else self._order[slot], -1)
        if self._recent:
            get = self._recent.get
            for i in np.flatnonzero(where < 0):
                where[i] = get(int(ids[i]), -1)
        return where

    def of(self, home: Home, positions: Any) -> Any:
        """User ids of found positions (an array of ``home``; -1 stays -1)."""
        if self._array is None or self.n == 0:
            return positions
        return home.xp.where(positions < 0, -1, self.table(home)[positions])

    def table(self, home: Home) -> Any:
        """All ids in the order of their positions, in a home, which keeps its copy."""
        if home is HOST:
            return self.array
        if self._there is None or self._there[0] is not home:
            table = home.bring(self.array)
            home.wait()  # other streams may search with it at once
            self._there = home, table
        return self._there[1]

    def places(self, home: Home, ids: Any) -> Any:
        """`positions` of an array of ids in a home, which stay there."""
        if home is HOST:
            return self.positions(ids)
        xp = home.xp
        if self._array is None or self.n == 0:
            return xp.where((ids >= 0) & (ids < self.n), ids, -1)
        table, order = self.table(home), None
        if not self._increasing:
            if self._order_there is None or self._order_there[0] is not home:
                order = xp.argsort(table)
                ordered = home, order, table[order]
                home.wait()  # other streams may search with it at once
                self._order_there = ordered
            _, order, table = self._order_there
        slot = home.kind.dense(xp.searchsorted(table, home.kind.dense(ids)).clip(0, self.n - 1))
        return xp.where(table[slot] == ids, slot if order is None else order[slot], -1)

    # ---- removing
    def keep(self, positions: np.ndarray) -> None:
        """Keep the ids at these increasing positions."""
        self._array = self.array[positions]
        self.n = len(positions)
        self._there = self._order_there = None
        if not self._increasing:
            self._sort()

    @classmethod
    def load(cls, array: np.ndarray | None, n: int, following: int) -> Ids:
        """Ids from a file; ``array`` None: the positions. ValueError where they are no valid ids."""
        ids = cls()
        if array is not None:
            ids.check_new(array, n)
            ids._array = np.empty(0, np.int64)
            ids.add(array, n)
        else:
            ids.n = ids.next = n
        if following < ids.next:
            raise ValueError(f"the next id is {following}, but {ids.next - 1} is in use")
        ids.next = following
        return ids


def _increase(a: np.ndarray) -> bool:
    return bool((a[1:] > a[:-1]).all())
