"""Exact scores of candidates whose rows are not at hand as float32: only they are fetched, in parts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import scan

_PART = 1 << 24  # bytes of fetched rows at a time


def rescore_fetched(
    q: np.ndarray,
    fetch: Callable[[np.ndarray], np.ndarray],
    candidates: np.ndarray,
    k: int,
    metric: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of each query's candidates; ``fetch(positions)`` gives float32 rows as wide as q."""
    (nq, c), width = candidates.shape, q.shape[1]
    scores, ids = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    step = max(1, _PART // (4 * max(1, c) * width))
    for i in range(0, nq, step):
        # Sorted, so that a row's place in the compact copy has the order of its position: ties stay right.
        part = np.sort(candidates[i : i + step], axis=1)
        rows = np.ascontiguousarray(fetch(np.maximum(part, 0).ravel()), np.float32)
        places = np.where(part < 0, -1, np.arange(part.size).reshape(part.shape))
        best, where = scan.rescore(q[i : i + step], rows, places, k, metric)
        scores[i : i + step] = best
        ids[i : i + step] = np.where(where < 0, -1, part.ravel()[where])
    return scores, ids
