"""A collection to be mined: plain arrays, or an index."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, scan
from .._arrays import BF16, F16, F32
from ..index._home import HOST, check_matrix, home_of, to_float32
from ..index.base import Index

METRICS = {"ip": 0, "l2": 1, "cosine": 2}
BLOCK = 1 << 25  # bytes of results and vectors that are held at a time
_PART, _GPU_PART = 1 << 14, 1 << 18  # rows that are looked at a time


def matrix(x: Any, name: str, d: int | None = None) -> Any:
    """A caller's vectors, checked: as float32 on the host, or where they lie on a GPU with kernels.

    A view where they are that already; half precision stays what it is on a GPU.
    """
    native = check_matrix(x, name)
    if d is not None and native.shape[1] != d:
        raise ValueError(f"{name} has {native.shape[1]} columns; d = {d} is needed")
    home = home_of(native, name)
    if home.kind.kernels is not None and home.kind.cuda:
        for i in range(0, native.shape[0], _GPU_PART):
            to_float32(home, native[i : i + _GPU_PART], name, i)
        kept = home.kind.code(native) in (F32, F16, BF16)
        return home.kind.dense(native if kept else home.kind.cast(native, F32))
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
        """float32 vectors at positions (a slice or an array), on the host."""
        raise NotImplementedError

    def search(self, q: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions of the k nearest to vectors that lie anywhere; -1 where there are fewer."""
        raise NotImplementedError

    def near(self, positions: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` for the vectors at positions."""
        return self.search(self.rows(positions), k)

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
    """Arrays, which are searched where they lie."""

    def __init__(self, x: Any, metric: str) -> None:
        self.x, self.metric, self.ids, self.home = x, metric, None, home_of(x)
        self.n, self.d = (int(v) for v in x.shape)

    def _part(self, positions):
        rows = self.x[positions if isinstance(positions, slice) else self.home.positions(positions)]
        return self.home.kind.cast(rows, F32)

    def rows(self, positions):
        return HOST.bring(self._part(positions))

    def search(self, q, k):
        home = self.home
        found = scan.knn(home.kind.cast(home.bring(q), F32), self.x, k, self.metric)
        return HOST.bring(found.scores), HOST.bring(found.ids)

    def near(self, positions, k):
        return self.search(self._part(positions), k)

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
        scores, ids = (HOST.bring(a) for a in self.index.search(q, k))
        return scores, np.where(ids < 0, -1, self._find(ids))

    def _find(self, ids):
        return self._order[np.minimum(np.searchsorted(self._sorted, ids), max(0, self.n - 1))]

    def places(self, ids, name):
        found = self._find(ids) if self.n else np.zeros(ids.shape, np.int64)
        bad = self.named(found) != ids if self.n else np.ones(ids.shape, bool)
        if bad.any():
            raise IndexError(f"{name} holds {int(ids[bad][0])}, which is not in the index")
        return found
