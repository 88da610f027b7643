"""paraphrase_mining: the nearest pairs of a collection."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from ..index._progress import Progress
from ._source import Source


class Pairs(NamedTuple):
    """Pairs of a collection, best first.

    Attributes
    ----------
    scores : array, shape (m,), float32
    i, j : arrays, shape (m,), int64
        Rows, or ids of the index; i was added before j. Equal scores by i, then j.
    """

    scores: np.ndarray
    i: np.ndarray
    j: np.ndarray


def paraphrase_mining(
    x: Any,
    top_k: int = 100,
    max_pairs: int = 500_000,
    *,
    min_score: float | None = None,
    metric: str | None = None,
    progress: bool | None = None,
) -> Pairs:
    """The nearest pairs of a collection, such as paraphrases among sentences.

    Each vector's ``top_k`` nearest others are looked at, and the ``max_pairs`` best of all these pairs are
    kept.

    Parameters
    ----------
    x : array, shape (n, d), float32, float16, bfloat16, float64, uint8 or int8; or an index
    top_k : int, default 100
    max_pairs : int, default 500000
    min_score : float, optional
        Pairs must score so much at least (for ``'l2'``: at most).
    metric : {'cosine', 'ip', 'l2'}, optional
        Default: cosine, or that of the index.
    progress : bool or None
        A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

    Returns
    -------
    Pairs
        ``(scores, i, j)``; each pair once.

    Raises
    ------
    TypeError, ValueError
        As `lutra.scan.knn`.

    Notes
    -----
    Cost: n^2 d multiply-adds with arrays, n searches with an index (from what ``reconstruct`` gives). Memory:
    48 bytes for each of max_pairs, and blocks of 32 MB. The same as ``paraphrase_mining`` of
    sentence-transformers, in exact search. Arrays on a GPU are searched there; pairs are kept on the host.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.array([[1, 0], [0, 1], [1, 0.1]], np.float32)
    >>> lutra.mine.paraphrase_mining(x, max_pairs=1)[1:]
    (array([0]), array([2]))
    """
    top_k = _checks.integer("top_k", top_k, 1)
    max_pairs = _checks.integer("max_pairs", max_pairs, 1)
    source = Source.of(x, "x", metric)
    limit = -np.inf if min_score is None else float(min_score) * source.sign
    if np.isnan(limit):
        raise ValueError("min_score is NaN; it must be a number")
    pool = _Pool(source.n, max_pairs, limit)
    with Progress(source.n, "pairs", progress) as bar:
        for a, b, key in neighbours(source, top_k, bar):
            pool.add(a, b, key)
    key, a, b = pool.best()
    return Pairs((key * source.sign).astype(np.float32), source.named(a), source.named(b))


def neighbours(source: Source, k: int, bar: Progress, positions: np.ndarray | None = None) -> Any:
    """Each position (or some) with its k nearest others: flat arrays (position, other, key), block by block.

    Keys are greater for the better.
    """
    k = min(k, max(0, source.n - 1))
    count = source.n if positions is None else len(positions)
    step = source.block(k + 1)
    for i in range(0, count if k else 0, step):
        who = np.arange(i, min(i + step, count)) if positions is None else positions[i : i + step]
        scores, found = source.near(who, k + 1)
        # Not oneself; where that is not among them (many equal vectors), not the last.
        other = (found != who[:, None]) & (found >= 0)
        other &= np.cumsum(other, axis=1) <= k
        rows, columns = np.nonzero(other)
        yield who[rows], found[rows, columns], scores[rows, columns] * source.sign
        bar.tick(len(who))


class _Pool:
    """The best pairs so far: at most twice as many as are wanted, each once."""

    def __init__(self, n: int, wanted: int, limit: float) -> None:
        self.n, self.wanted, self.limit = n, wanted, limit
        self.key = np.empty(0, np.float32)
        self.pair = np.empty(0, np.int64)  # low * n + high

    def add(self, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> None:
        good = key >= self.limit
        pair = np.minimum(a, b)[good] * self.n + np.maximum(a, b)[good]
        self.pair, self.key = np.concatenate([self.pair, pair]), np.concatenate([self.key, key[good]])
        if len(self.pair) > 2 * self.wanted:
            self._cut()

    def _cut(self) -> None:
        # A pair may come from both its ends, with scores that differ in the last bit: the better one counts.
        order = np.lexsort((-self.key, self.pair))
        pair, key = self.pair[order], self.key[order]
        first = np.ones(len(pair), bool)
        first[1:] = pair[1:] != pair[:-1]
        pair, key = pair[first], key[first]
        order = np.lexsort((pair, -key))[: self.wanted]
        self.pair, self.key = pair[order], key[order]
        if len(order) == self.wanted:
            self.limit = max(self.limit, float(self.key[-1]))

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._cut()
        return self.key, self.pair // max(1, self.n), self.pair % max(1, self.n)
