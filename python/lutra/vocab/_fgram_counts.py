"""count_fgrams: the frequent n-grams of a stream of tokens, in a pass for each length."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import is_torch
from ..address._key_table import NO_KEY, Counts, KeyTable, lookup
from ..index._progress import Progress
from ..reference.fgrams import NODE
from ._fgrams import FGrams

_CHUNK = 1 << 20


def count_fgrams(
    tokens: Any,
    size: int,
    max_length: int = 5,
    *,
    min_count: int = 2,
    separator: int | None = None,
    max_candidates: int = 1 << 26,
    progress: bool | None = None,
) -> FGrams:
    """The most frequent n-grams (f-grams) of a stream of tokens.

    Parameters
    ----------
    tokens : array, path, or sequence of these
        Integer arrays (NumPy, mapped or not, or torch): 1-d is one sequence, of 2-d each row is one. Paths
        are .npy files, which are mapped. The stream is read ``max_length - 1`` times, a million tokens at a
        time. Anything that can be iterated over several times will do; an iterator that ends is refused.
    size : int
        At most so many n-grams.
    max_length : int, default 5
        Longest n-gram, in tokens; 2 at least.
    min_count : int, default 2
        Rarer n-grams are left out.
    separator : int, optional
        A token that divides sequences: no n-gram holds it.
    max_candidates : int, default 2^26
        At most about so many n-grams of a length are counted at a time, in 48 bytes each at most. Where a
        stream has more, the rarest are dropped on the way, and counts may be too low; see ``lost``.
    progress : bool, optional
        None shows a bar after two seconds on a terminal, True at once, False never.

    Returns
    -------
    FGrams
        The most frequent first; of equally frequent ones the shorter, then the one of lower tokens.
        ``counts`` are theirs; ``lost`` is 0 where all counts are exact, else the most by which any may be too
        low.

    Raises
    ------
    TypeError, ValueError, IndexError
        Tokens that are no integers in [0, 2^30), or an option out of range.

    Notes
    -----
    The pass of length n counts an n-gram only where both (n-1)-grams in it are among the ``size`` most
    frequent so far and occur ``min_count`` times: others cannot be among the result (Agrawal and Srikant
    1994). Every end of a f-gram, and every beginning, is a f-gram as well, unless counts were lost.

    References
    ----------
    Yu et al., Scaling Embedding Layers in Language Models (SCONE), arXiv 2502.01637, algorithm 3.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> fgrams = lutra.vocab.count_fgrams(np.array([1, 2, 3, 1, 2, 3, 1, 2]), 10, 3)
    >>> list(fgrams), fgrams.counts.tolist()
    ([(1, 2), (2, 3), (3, 1), (1, 2, 3), (2, 3, 1), (3, 1, 2)], [3, 2, 2, 2, 2, 2])
    """
    size = _checks.integer("size", size, 0, NODE - 1)
    max_length = _checks.integer("max_length", max_length, 2, 64)
    least = _checks.integer("min_count", min_count, 1)
    limit = _checks.integer("max_candidates", max_candidates, 2)
    if separator is not None:
        separator = _checks.integer("separator", separator, 0)
    stream = _stream(tokens)
    total = sum(part.size for part in stream())
    levels: list[_Level] = []
    lost = 0
    with Progress(total * (max_length - 1), "f-grams", progress) as bar:
        for n in range(2, max_length + 1):
            counted = Counts(limit)
            for chunk, fresh in _chunks(stream(), n, separator):
                counted.add(_keys(chunk, levels))
                bar.tick(fresh)
            lost = max(lost, counted.lost)
            levels.append(_Level(*counted.most(least)))
            del counted
            least = max(least, _keep(levels, size))
            if not len(levels[-1].keys):
                break
    return _result(levels, size, lost)


class _Level:
    """The n-grams of one length: key i is (id of its first n - 1 tokens) << 32 | last token; they increase,
    so that ids are in the order of the tokens."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray) -> None:
        self.keys, self.counts = keys, counts
        self.buckets: np.ndarray | None = None

    def ids(self, keys: np.ndarray) -> np.ndarray:
        if self.buckets is None:
            table = KeyTable(len(self.keys))
            table.insert(self.keys, np.arange(len(self.keys)))
            self.buckets = table.buckets
        return lookup(keys, self.buckets).astype(np.int64)


def _keep(levels: list[_Level], size: int) -> int:
    """Cut the newest level to what may still be among the result; the count that it takes to be."""
    new = levels[-1]
    number = sum(len(level.keys) for level in levels)
    if number <= size:
        return 1
    if size == 0:
        new.keys, new.counts = new.keys[:0], new.counts[:0]
        return 1
    counts = np.concatenate([level.counts for level in levels])
    least = int(np.partition(counts, number - size)[number - size])
    # Shorter n-grams come first among equals; they are cut in the end, the newest ones now.
    room = size - int((counts > least).sum()) - sum(int((lv.counts == least).sum()) for lv in levels[:-1])
    ties = np.flatnonzero(new.counts == least)[: max(room, 0)]
    kept = np.sort(np.concatenate([np.flatnonzero(new.counts > least), ties]))
    new.keys, new.counts = new.keys[kept], new.counts[kept]
    return least


def _keys(chunk: np.ndarray, levels: list[_Level]) -> np.ndarray:
    """The key of the n-gram that ends at each token from the n-th on, n = len(levels) + 2; NO_KEY where it is
    cut by the end of a sequence, or cannot be frequent."""
    ids = chunk
    for n in range(2, len(levels) + 3):  # ids[i]: of the (n-1)-gram that ends at token i + n - 2
        gone = (ids[:-1] < 0) | (ids[1:] < 0)
        keys = np.where(gone, NO_KEY, ids[:-1] << 32 | chunk[n - 1 :])
        if n < len(levels) + 2:
            ids = levels[n - 2].ids(keys)
    return keys


def _result(levels: list[_Level], size: int, lost: int) -> FGrams:
    lengths = np.concatenate([np.full(len(lv.keys), n) for n, lv in enumerate(levels, 2)])
    counts = np.concatenate([level.counts for level in levels])
    order = np.argsort(-counts, kind="stable")[:size]  # levels are in order of length, then of tokens
    longest = int(lengths[order].max(initial=0))
    rows = np.full((len(order), longest), -1, np.int32)
    first = 0
    for n, level in enumerate(levels, 2):
        where = np.flatnonzero(lengths[order] == n)
        at = order[where] - first
        first += len(level.keys)
        if not len(where):
            continue
        for m in range(n, 1, -1):
            key = levels[m - 2].keys[at]
            rows[where, m - 1] = key & 0xFFFFFFFF
            at = key >> 32
        rows[where, 0] = at
    result = FGrams(rows, counts[order])
    result.lost = lost
    return result


# ---------------------------------------------------------------- the stream
def _stream(tokens: Any) -> Callable[[], Iterator[np.ndarray]]:
    """A function that begins the stream anew: sequences, 1-d."""
    if isinstance(tokens, Iterator):
        raise TypeError(
            "tokens is an iterator, which ends after one pass; each length needs one: give a list of arrays "
            "or paths, or an object that can be iterated over again"
        )
    single = isinstance(tokens, (str, os.PathLike)) or hasattr(tokens, "dtype")
    if not single and not isinstance(tokens, Iterable):
        raise TypeError(f"tokens must be arrays or paths, got {type(tokens).__qualname__}")

    def begin() -> Iterator[np.ndarray]:
        for i, part in enumerate([tokens] if single else tokens):
            name = "tokens" if single else f"tokens[{i}]"
            if isinstance(part, (str, os.PathLike)):
                part = np.load(part, mmap_mode="r", allow_pickle=False)
            elif is_torch(part):
                part = part.cpu().numpy()
            elif isinstance(part, (list, tuple)):
                part = np.asarray(part) if len(part) else np.zeros(0, np.int64)
            if not isinstance(part, np.ndarray) or part.dtype.kind not in "iu" or part.ndim not in (1, 2):
                got = f"{part.dtype} of shape {part.shape}" if hasattr(part, "shape") else repr(part)
                raise TypeError(f"{name} must be a 1-d or 2-d array of integers, got {got}")
            yield part

    return begin


def _chunks(parts: Iterable[np.ndarray], n: int, separator: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """About a million tokens at a time, int64, with -1 for the separator and between sequences; and how many
    of them are new. A sequence that is cut goes on with its last n - 1 tokens, in which no n-gram of length n
    ends."""
    waiting: list[np.ndarray] = []
    room, fresh = _CHUNK, 0
    end = np.full(1, -1, np.int64)
    for part in parts:
        for block in _blocks(part, n):
            tokens = _checked(block, separator)
            if tokens.ndim == 2:
                tokens = np.pad(tokens, ((0, 0), (0, 1)), constant_values=-1).reshape(-1)
            waiting += [tokens, end]
            fresh += len(tokens)
            room -= len(tokens)
            if room <= 0:
                yield np.concatenate(waiting), fresh
                waiting, room, fresh = [], _CHUNK, 0
    if waiting:
        yield np.concatenate(waiting), fresh


def _blocks(part: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """Pieces of a sequence that go together by n - 1 tokens, or some of the rows."""
    if part.ndim == 2:
        if part.shape[1] > _CHUNK:
            for row in part:
                yield from _blocks(row, n)
            return
        step = max(1, _CHUNK // max(part.shape[1], 1))
        for begin in range(0, len(part), step):
            yield part[begin : begin + step]
        return
    for begin in range(0, len(part), _CHUNK):
        yield part[max(begin - n + 1, 0) : begin + _CHUNK]


def _checked(block: np.ndarray, separator: int | None) -> np.ndarray:
    if block.size:
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= NODE:
            raise IndexError(f"tokens holds {low if low < 0 else high}; tokens must lie in [0, 2^30)")
    tokens = block.astype(np.int64)
    if separator is not None:
        tokens[tokens == separator] = -1
    return tokens
