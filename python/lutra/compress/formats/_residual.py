"""Code books of residual codes for a table: greedy, then fitted to the codes by least squares."""

from __future__ import annotations

import numpy as np

from ... import address, gather
from ...index._home import HOST
from ...index._kmeans import lloyd
from ...index._progress import Progress
from ...quant._kernels import multiply
from ...quant.rq import _dimensions

ROUNDS = 2  # of k-means in each number of dimensions
TURNS = 8  # code books that are trained in the same principal components
POINTS = 1 << 14  # rows at least that a code book is trained on


def greedy(x: np.ndarray, m: int, ksub: int, seed: int, progress: bool | None) -> np.ndarray:
    """Code books (m, ksub, dim), each by k-means of what the nearest centroids of those before leave over.

    As `lutra.quant.RQ` trains, in ever more principal components, but with one partial code a row and few
    rounds: `refit` makes up for it and more.
    """
    rng = np.random.default_rng(seed)
    most = max(ksub * 256, POINTS)
    left = x[np.sort(rng.choice(len(x), most, replace=False))] if len(x) > most else x.copy()
    dim = x.shape[1]
    books, turn = np.zeros((m, ksub, dim), np.float32), np.eye(dim, dtype=np.float32)
    steps = _dimensions(dim)
    with Progress(m * ROUNDS * len(steps), "rq", progress) as bar:
        for j in range(m):
            if j % TURNS == 0:
                more = _principal(left[rng.permutation(len(left))[:POINTS]])
                left, turn = multiply(left, more), multiply(turn, more)
            mean = left.mean(0, dtype=np.float64).astype(np.float32)
            centred, centroids = left - mean, None
            for d in steps:
                start: np.ndarray | None = centroids
                if start is not None:
                    start = np.pad(start, ((0, 0), (0, d - start.shape[1])))
                some = np.ascontiguousarray(centred[:, :d])
                centroids, _ = lloyd(HOST, some, ksub, ROUNDS, "random", False, rng, bar, start=start)
            assert centroids is not None
            nearest = address.nearest(centred, centroids, 1, "l2").ids[:, 0]
            centroids = centroids + mean
            books[j] = multiply(centroids, turn.T)
            left = left - centroids[nearest]
    return books


def _principal(x: np.ndarray) -> np.ndarray:
    """An orthogonal matrix (dim, dim): the principal components of rows, the largest first."""
    centred = x - x.mean(0, dtype=np.float64).astype(np.float32)
    _, columns = np.linalg.eigh(multiply(centred.T, centred).astype(np.float64))
    return np.ascontiguousarray(columns[:, ::-1], np.float32)


def refit(x: np.ndarray, entries: np.ndarray, books: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The code books with which the given codes have the least (weighted) squared error.

    Least squares for all m ksub centroids at once, with a slight pull to those that were there: the codes
    leave m - 1 directions open, and centroids without a row are not to move. Cost: n m**2 additions and
    (m ksub)**3 / 3 flops.
    """
    m, ksub, dim = books.shape
    size = m * ksub
    at = entries.astype(np.int64) + np.arange(m) * ksub
    # as relative weights, so that the pull means the same whatever the counts
    w = None if weights is None else (weights / max(float(weights.mean()), 1e-30)).astype(np.float32)
    gram = np.zeros((size, size))
    shares = None if w is None else np.repeat(w, m)
    for j in range(m):
        pairs = (entries[:, j, None].astype(np.int64) * size + at).reshape(-1)
        gram[j * ksub : (j + 1) * ksub] = np.bincount(pairs, shares, ksub * size).reshape(ksub, size)
    flat = books.reshape(size, dim)
    rows = x if w is None else x * w[:, None]
    goal = gather.bag_grad(np.ascontiguousarray(rows), at, rows=size).astype(np.float64)
    pull = 0.1
    gram.reshape(-1)[:: size + 1] += pull
    found = np.linalg.solve(gram, goal + pull * flat)
    return found.astype(np.float32).reshape(books.shape)
