"""A collection to be mined: plain arrays, or an index."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, scan
from ..index._home import HOST, check_matrix, to_float32
from ..index.base import Index

METRICS = {"ip": 0, "l2": 1, "cosine": 2}
BLOCK = 1 << 25  # bytes of results and vectors that are held at a time
_PART = 1 << 14


def matrix(x: Any, name: str, d: int | None = None) -> np.ndarray:
    """A caller's vectors on the host as float32, checked; a view where they are that already."""
    native = check_matrix(x, name)
    if d is not None and native.shape[1] != d:
        raise ValueError(f"{name} has {native.shape[1]} columns; d = {d} is needed")
    rows = HOST.bring(native)
    if rows.dtype == np.float32:
        for i in range(0, len(rows), _PART):  # NaN and infinities are refused
            to_float32(HOST, rows[i : i + _PART], name, i)
        return np.ascontiguousarray(rows)
    out = np.empty(rows.shape, np.float32)
    for i in range(0, len(rows), _PART):
        out[i : i + _PART] = to_float32(HOST, rows[i : i + _PART], name, i)
    return out


class Source:
    """Vectors by position, and a search that answers with positions."""

    n: int
    d: int
    metric: str
    ids: np.ndarray | None  # of the positions; None: the positions themselves

    @staticmethod
    def of(x: Any, name: str, metric: str | None) -> Source:
        """Arrays with the metric (default cosine), or an index with its own."""
        if isinstance(x, Index):
            if metric is not None and metric != x.metric:
                raise ValueError(f"metric is {metric!r}, but {name} is an index of {x.metric!r}")
            return _OfIndex(x, name)
        metric = "cosine" if metric is None else metric
        _checks.choice("metric", metric, METRICS)
        return _OfArray(matrix(x, name), metric)

    @property
    def sign(self) -> int:
        """1 where larger scores are better, -1 for distances."""
        return -1 if self.metric == "l2" else 1

    def rows(self, positions: Any) -> np.ndarray:
        """float32 vectors at positions (a slice or an array)."""
        raise NotImplementedError

    def search(self, q: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions of the k nearest; -1 where there are fewer."""
        raise NotImplementedError

    def named(self, positions: np.ndarray) -> np.ndarray:
        """The ids of positions; -1 stays -1."""
        if self.ids is None or not self.n:
            return positions
        return np.where(positions < 0, -1, self.ids[positions])

    def places(self, ids: np.ndarray, name: str) -> np.ndarray:
        """Positions of ids, all of which must be there."""
        raise NotImplementedError

    def block(self, k: int) -> int:
        """Queries of a block, so that their vectors and results stay small."""
        return max(1, BLOCK // (12 * max(k, 1) + 4 * self.d))


class _OfArray(Source):
    def __init__(self, x: np.ndarray, metric: str) -> None:
        self.x, self.metric, self.ids = x, metric, None
        self.n, self.d = x.shape

    def rows(self, positions):
        return self.x[positions]

    def search(self, q, k):
        return scan.knn(q, self.x, k, self.metric)

    def places(self, ids, name):
        bad = (ids < 0) | (ids >= self.n)
        if bad.any():
            raise IndexError(f"{name} holds {int(ids[bad][0])}; rows must lie in [0, {self.n})")
        return ids


class _OfIndex(Source):
    def __init__(self, index: Index, name: str) -> None:
        if index.metric not in METRICS:
            raise ValueError(
                f"{name} is an index of metric {index.metric!r}; it must be 'ip', 'l2' or 'cosine'"
            )
        self.index, self.metric, self.d = index, index.metric, index.d
        self.ids = index.ids
        self.n = len(self.ids)
        self._order = np.argsort(self.ids, kind="stable")
        self._sorted = self.ids[self._order]

    def rows(self, positions):
        assert self.ids is not None
        return self.index.reconstruct(self.ids[positions])

    def search(self, q, k):
        scores, ids = self.index.search(q, k)
        return scores, np.where(ids < 0, -1, self._find(ids))

    def _find(self, ids):
        return self._order[np.minimum(np.searchsorted(self._sorted, ids), max(0, self.n - 1))]

    def places(self, ids, name):
        found = self._find(ids) if self.n else np.zeros(ids.shape, np.int64)
        bad = self.named(found) != ids if self.n else np.ones(ids.shape, bool)
        if bad.any():
            raise IndexError(f"{name} holds {int(ids[bad][0])}, which is not in the index")
        return found
