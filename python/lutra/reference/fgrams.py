"""Reference of exact key tables and of `lutra.address.longest_match`: dictionaries, and a table's layout.

A table of buckets (csrc/address/key_table.h) is (buckets, 8) int64: five keys, -1 where free, then five int32
values, then an int32 that is 1 where keys have gone on to the next bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NO_KEY = -1
SLOTS = 5
NODE = 1 << 30


def empty_table(n_buckets: int) -> np.ndarray:
    """A table without keys, its buckets aligned to cache lines."""
    whole = np.empty((n_buckets + 1) * 8, np.int64)
    skip = -whole.ctypes.data % 64 // 8
    buckets = whole[skip : skip + n_buckets * 8].reshape(n_buckets, 8)
    buckets[:, :SLOTS], buckets[:, SLOTS:] = NO_KEY, 0
    return buckets


def home(keys: np.ndarray, n_buckets: int) -> np.ndarray:
    """The bucket where each key belongs."""
    h = keys.astype(np.int64).view(np.uint64)
    with np.errstate(over="ignore"):
        h = (h ^ (h >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(32)
    return (((h >> np.uint64(32)) * np.uint64(n_buckets)) >> np.uint64(32)).astype(np.int64)


def _values(buckets: np.ndarray) -> np.ndarray:
    return buckets.view(np.int32)[:, 2 * SLOTS :]


def insert(keys: np.ndarray, values: np.ndarray, buckets: np.ndarray) -> int:
    """Put keys in, in order; the position of the first that was there already, or -1."""
    numbers, twice = _values(buckets), -1
    for i, (key, at) in enumerate(zip(keys.tolist(), home(keys, len(buckets)).tolist())):
        while True:
            row = buckets[at, :SLOTS].tolist()
            if key in row:
                twice = i if twice < 0 else twice
                break
            if NO_KEY in row and not numbers[at, SLOTS]:
                place = row.index(NO_KEY)
                buckets[at, place], numbers[at, place] = key, values[i]
                break
            numbers[at, SLOTS] = 1
            at = (at + 1) % len(buckets)
    return twice


def lookup(keys: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The value of each key, int32, or -1."""
    out = np.full(len(keys), -1, np.int32)
    open_, at = np.flatnonzero(keys != NO_KEY), home(keys, len(buckets))
    while len(open_):
        rows = buckets[at[open_]]
        same = rows[:, :SLOTS] == keys[open_, None]
        numbers = _values(rows)
        hit = same.any(1)
        out[open_[hit]] = numbers[hit, same[hit].argmax(1)]
        open_ = open_[~hit & (numbers[:, SLOTS] == 1)]
        at[open_] = (at[open_] + 1) % len(buckets)
    return out


def rows_of(tokens: np.ndarray, offsets: np.ndarray | None = None) -> list[np.ndarray]:
    """The sequences of 2-d tokens, or of 1-d ones that begin at offsets."""
    if offsets is None:
        return list(tokens.reshape(-1, tokens.shape[-1])) if tokens.ndim != 1 else [tokens]
    return np.split(tokens, offsets[1:]) if len(offsets) else []


def longest_match(
    tokens: np.ndarray, ngrams: Iterable[Sequence[int]], offsets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The id and the length of the longest n-gram that ends at each token, by a dictionary."""
    known = {tuple(map(int, g)): i for i, g in enumerate(ngrams)}
    longest = max(map(len, known), default=1)
    ids, lengths = [], []
    for row in rows_of(tokens, offsets):
        values = row.tolist()
        for i in range(len(values)):
            best = -1, 1
            for n in range(min(longest, i + 1), 1, -1):
                found = known.get(tuple(values[i - n + 1 : i + 1]))
                if found is not None:
                    best = found, n
                    break
            ids.append(best[0])
            lengths.append(best[1])
    shape = tokens.shape
    return np.array(ids, np.int64).reshape(shape), np.array(lengths, np.int32).reshape(shape)


def count_fgrams(
    rows: Iterable[Any], size: int, max_length: int, min_count: int = 1, separator: int | None = None
) -> list[tuple[tuple[int, ...], int]]:
    """The most frequent n-grams of 2..max_length tokens with their counts: the most frequent first, of
    equally frequent ones the shorter, then the one of lower tokens."""
    counts: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        values = [int(v) for v in row]
        for i in range(len(values)):
            for n in range(2, min(max_length, len(values) - i) + 1):
                counts[tuple(values[i : i + n])] += 1
    kept = [(g, c) for g, c in counts.items() if c >= min_count and separator not in g]
    return sorted(kept, key=lambda e: (-e[1], len(e[0]), e[0]))[:size]
