"""Training of code books for tables: weighted by counts, and for tables of few rows."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ...quant._kernels import pq_entries

ROUNDS = 10  # of k-means with weights, after the trainer's own


def train_weights(counts: np.ndarray | None, rows: int) -> np.ndarray | None:
    """Weights of rows in training: counts, with a floor so that rows never met are not forgotten."""
    if counts is None or not rows:
        return None
    return counts + 0.05 * max(float(counts.mean()), 1e-9)


def quiet_train(quantizer: Any, x: np.ndarray, progress: bool | None, **options: Any) -> Any:
    """Train on a table as it is: that it has few rows for its centroids is the caller's choice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ vectors for", UserWarning)
        return quantizer.train(x, progress=progress, **options)


def enough(x: np.ndarray, ksub: int, seed: int) -> np.ndarray:
    """At least ksub rows to train on: repeated, with a little noise so that centroids differ."""
    if len(x) >= ksub:
        return x
    if not len(x):
        return np.zeros((ksub, x.shape[1]), np.float32)
    more = x[np.arange(ksub - len(x)) % len(x)]
    noise = np.random.default_rng(seed).standard_normal(more.shape, dtype=np.float32)
    return np.concatenate([x, more + noise * (1e-3 * float(np.abs(x).mean()))])


def weighted(x: np.ndarray, books: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Code books (m, ksub, dsub) after some rounds of k-means of weighted rows."""
    m, ksub, dsub = books.shape
    books = books.copy()
    columns = [np.ascontiguousarray(c) for c in (x * weights[:, None]).T.astype(np.float64)]
    for _ in range(ROUNDS):
        entries = pq_entries(x, books)
        for j in range(m):
            total = np.bincount(entries[:, j], weights, ksub)
            used = total > 0
            for i in range(dsub):
                sums = np.bincount(entries[:, j], columns[j * dsub + i], ksub)
                books[j, used, i] = sums[used] / total[used]
    return books
