"""Exact hash tables from 63-bit keys to 31-bit values; csrc/address/key_table.h has the layout."""

from __future__ import annotations

import numpy as np

from .. import _backend
from ..reference import fgrams as reference
from ..reference.fgrams import NO_KEY, empty_table

__all__ = ["NO_KEY", "Counts", "KeyTable", "lookup"]

PER_BUCKET = 3  # keys a bucket of five: 21 bytes a key, and one key in 25 is beyond its first cache line


def lookup(keys: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The value of each key, int32, or -1 where it is not in the table."""
    if _backend.core is None:
        return reference.lookup(keys, buckets)
    out = np.empty(len(keys), np.int32)
    _backend.core.key_lookup(np.ascontiguousarray(keys), len(keys), buckets, len(buckets), out)
    return out


class KeyTable:
    """A table that grows while keys are put in."""

    def __init__(self, expected: int) -> None:
        self.buckets = empty_table(max(1, -(-expected // PER_BUCKET)))
        self.used = 0
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def insert(self, keys: np.ndarray, values: np.ndarray) -> int:
        """Put keys in; the position of the first that is there already, or -1."""
        self.used += len(keys)
        self._parts.append((keys, values))
        if self.used > PER_BUCKET * len(self.buckets):
            self.buckets = empty_table(-(-self.used * 5 // (4 * PER_BUCKET)))
            for part in self._parts[:-1]:
                self._put(*part)
        return self._put(keys, values)

    def _put(self, keys: np.ndarray, values: np.ndarray) -> int:
        if _backend.core is None:
            return reference.insert(keys, values, self.buckets)
        values = np.ascontiguousarray(values, np.int32)
        return _backend.core.key_insert(
            np.ascontiguousarray(keys), values, len(keys), self.buckets, len(self.buckets)
        )


class Counts:
    """How often each key occurs: exact up to `limit` distinct keys.

    Beyond it the rarest are dropped, as many as it takes to halve the table; ``lost`` is the most that any
    count is then too low by (Misra and Gries 1982).
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.lost = limit, 0
        self._used = 0
        self._slots = self._empty(1 << 16)
        self._counts: dict[int, int] = {}  # without compiled code

    @staticmethod
    def _empty(capacity: int) -> np.ndarray:
        slots = np.empty((capacity, 2), np.int64)
        slots[:, 0] = NO_KEY
        return slots

    def __len__(self) -> int:
        return self._used if _backend.core is not None else len(self._counts)

    def add(self, keys: np.ndarray) -> None:
        """Count keys; NO_KEY is passed over."""
        if _backend.core is None:
            for key, n in zip(*np.unique(keys[keys != NO_KEY], return_counts=True)):
                self._counts[int(key)] = self._counts.get(int(key), 0) + int(n)
        else:
            self._reserve(len(keys))
            self._count(keys, None)
        if len(self) > self.limit:
            self._drop()

    def _reserve(self, more: int) -> None:
        need, capacity = self._used + more, len(self._slots)
        if need <= capacity // 2:
            return
        while need > capacity // 2:
            capacity *= 2
        self._refill(*self._entries(), capacity)

    def _refill(self, keys: np.ndarray, counts: np.ndarray, capacity: int) -> None:
        self._slots, self._used = self._empty(capacity), 0
        self._count(keys, counts)

    def _count(self, keys: np.ndarray, weights: np.ndarray | None) -> None:
        assert _backend.core is not None
        self._used = _backend.core.key_count(
            np.ascontiguousarray(keys), weights, len(keys), self._slots, len(self._slots), self._used
        )

    def _entries(self) -> tuple[np.ndarray, np.ndarray]:
        if _backend.core is None:
            keys = np.fromiter(self._counts, np.int64, len(self._counts))
            return keys, np.fromiter(self._counts.values(), np.int64, len(self._counts))
        full = self._slots[:, 0] != NO_KEY
        return self._slots[full, 0], self._slots[full, 1]

    def _drop(self) -> None:
        keys, counts = self._entries()
        # the least count of the half that stays; whoever has no more goes, and ties with it
        level = int(np.partition(counts, len(counts) - self.limit // 2)[len(counts) - self.limit // 2 - 1])
        kept = counts > level
        keys, counts = keys[kept], counts[kept]
        self.lost += level
        if _backend.core is None:
            self._counts = dict(zip(keys.tolist(), counts.tolist()))
        else:
            self._refill(keys, counts, len(self._slots))

    def most(self, least: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys that occur at least so often, and their counts; keys increase."""
        keys, counts = self._entries()
        kept = counts >= least
        keys, counts = keys[kept], counts[kept]
        order = np.argsort(keys)
        return keys[order], counts[order]
