"""deduplicate: groups of vectors that are nearly the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..index._progress import Progress
from ._pairs import neighbours
from ._source import Source

_FIRST = 16  # neighbours that are looked at first; more where all of them are duplicates


class Duplicates(NamedTuple):
    """What `deduplicate` found.

    Attributes
    ----------
    keep : array, shape (m,), int64
        Ids to keep, one of each group, in the order of the collection.
    representative : array, shape (n,), int64
        For each vector the id that is kept of its group.
    """

    keep: np.ndarray
    representative: np.ndarray


def deduplicate(
    x: Any,
    threshold: float = 0.95,
    *,
    metric: str | None = None,
    progress: bool | None = None,
) -> Duplicates:
    """Keep one of each group of near-duplicates.

    Two vectors are duplicates where their similarity reaches the threshold; groups are the connected
    components of that relation, and of each the lowest id is kept.

    Parameters
    ----------
    x : array, shape (n, d), float32, float16, bfloat16, float64, uint8 or int8; or an index
        Of an index, neighbours are those that its search finds for what ``reconstruct`` gives.
    threshold : float, default 0.95
        The least similarity of duplicates; for ``'l2'`` the largest squared distance.
    metric : {'cosine', 'ip', 'l2'}, optional
        Default: cosine, or that of the index.
    progress : bool or None
        A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

    Returns
    -------
    Duplicates
        ``(keep, representative)``, NumPy arrays.

    Raises
    ------
    TypeError, ValueError
        As `lutra.scan.knn`; a threshold that is NaN.

    Notes
    -----
    A chain of near neighbours is one group though its ends may differ: choose the threshold high. Cost: n^2 d
    multiply-adds with arrays; vectors with more than 15 duplicates are searched again with more neighbours,
    so that none is missed (bitwise equal ones are found beforehand). Memory: 40 bytes a vector, and blocks of
    32 MB. Arrays on a GPU are searched there; groups are joined on the host.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.array([[1, 0], [0, 1], [1, 0.1], [0, 2]], np.float32)
    >>> lutra.mine.deduplicate(x)
    Duplicates(keep=array([0, 1]), representative=array([0, 1, 0, 1]))
    """
    try:
        threshold = float(threshold)
    except (TypeError, ValueError):
        raise TypeError(f"threshold must be a number, got {threshold!r}") from None
    if np.isnan(threshold):
        raise ValueError("threshold is NaN; it must be a number")
    source = Source.of(x, "x", metric)
    n = source.n
    groups = Groups(n)
    left = _join_equal(source, threshold, groups)
    limit = np.float32(threshold * source.sign)
    k = _FIRST
    quiet = Progress(0, "", False)
    with Progress(len(left), "duplicates", progress) as bar:
        while len(left):
            again = []
            for a, b, key in neighbours(source, k, bar if k == _FIRST else quiet, left):
                near = key >= limit
                groups.join(a[near], b[near])
                full = np.bincount(a[near], minlength=n) >= k  # perhaps there are more
                again.append(np.flatnonzero(full))
            if k >= n - 1:
                break
            left = np.concatenate(again) if again else left[:0]
            k = min(n - 1, k * 8)
    # Names go by the lowest id, which is the first position unless an index was given ids out of order.
    names = source.named(np.arange(n))
    lowest = np.full(n, np.iinfo(np.int64).max)
    root = groups.roots()
    np.minimum.at(lowest, root, names)
    representative = lowest[root]
    return Duplicates(names[names == representative], representative)


class Groups:
    """Connected components: each position knows a lower one of its group, the lowest itself."""

    def __init__(self, n: int) -> None:
        self.parent = np.arange(n)

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        while len(a):
            a, b = self.parent[a], self.parent[b]
            apart = a != b
            low, high = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
            np.minimum.at(self.parent, high, low)
            self._shorten()
            a, b = low, high

    def _shorten(self) -> None:
        while True:
            above = self.parent[self.parent]
            if np.array_equal(above, self.parent):
                return
            self.parent = above

    def roots(self) -> np.ndarray:
        return self.parent


def _join_equal(source: Source, threshold: float, groups: Groups) -> np.ndarray:
    """Join bitwise equal vectors, where that makes them duplicates; the first of each, in order.

    Many equal vectors would make the neighbours of each other all that is found.
    """
    n = source.n
    everyone = np.arange(n)
    certain = {"cosine": threshold <= 0.99, "l2": threshold >= 0, "ip": False}[source.metric]
    if n < 2 or not certain:
        return everyone
    step = source.block(1)
    hashes = np.empty(n, np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**63, source.d, dtype=np.uint64) * 2 + np.uint64(1)
    for i in range(0, n, step):
        rows = np.ascontiguousarray(source.rows(slice(i, i + step)))
        hashes[i : i + step] = (rows.view(np.uint32).astype(np.uint64) * factors).sum(1, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    first = np.ones(n, bool)
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    for i in range(0, len(same), step):
        at = same[i : i + step]
        a, b = order[at - 1], order[at]
        rows, others = source.rows(a), source.rows(b)
        equal = (rows == others).all(1) & (np.ones(len(a), bool) if source.metric == "l2" else rows.any(1))
        groups.join(a[equal], b[equal])
        first[b[equal]] = False
    return everyone[first]
