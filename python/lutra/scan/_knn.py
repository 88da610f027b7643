"""knn and rescore: exact scores with selection inside the scan."""

from __future__ import annotations

from typing import Any

from numpy import ndarray

from .. import _checks
from .._arrays import F32, F64, I32, I64, call, eager, quick
from .._checks import METRICS
from .._results import Neighbors
from ..reference import scan as reference

_tuple = tuple.__new__  # builds a named tuple in half the time of calling its class
_quick = quick("knn")
#: Largest k of the CUDA kernels: their selection lives in shared memory.
CUDA_MAX_K = 2048


def knn(queries: Any, database: Any, k: int = 10, metric: str = "ip") -> Neighbors:
    """Exact k nearest neighbours.

    Scores and selects in one pass: no matrix of scores is written.

    Parameters
    ----------
    queries : array, shape (nq, d), float32 or float64
    database : array, shape (n, d), the type of queries
    k : int, default 10
        Neighbours per query; may exceed n.
    metric : {'ip', 'l2', 'cosine'}, default 'ip'
        ``'ip'`` is the inner product, larger is better; ``'l2'`` the squared Euclidean distance, smaller is
        better, computed from differences; ``'cosine'`` the inner product over both norms (0 where one is 0).

    Returns
    -------
    scores : array, shape (nq, k), the type of queries
        Best first; where k > n, -inf (ip, cosine) or +inf (l2).
    ids : array, shape (nq, k), int64
        Rows of database; equal scores in the order of their ids; -1 where k > n.

    Raises
    ------
    TypeError
        A wrong type or dtype, or arrays of different libraries.
    ValueError
        Shapes that do not fit, k < 1, an unknown metric, a NaN score (its row is named). CUDA kernels raise
        nothing that would need the device to be waited for: there a NaN score comes first in its query's
        results, and k is at most 2048.

    Notes
    -----
    Cost: 2 nq n d flops and, for few queries, one read of database. float64 is computed by the reference.
    Gradient (torch): of the scores, to queries and database.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.eye(4, dtype=np.float32)
    >>> lutra.scan.knn(x[2:3], x, k=2).ids
    array([[2, 0]])
    """
    if type(queries) is ndarray or eager(queries):
        result = _quick(queries, database, k, metric)
        if result is not None:
            return _tuple(Neighbors, result)
    return _tuple(Neighbors, call("knn", _knn, (queries, database), (k, metric)))


def rescore(queries: Any, database: Any, candidates: Any, k: int, metric: str = "ip") -> Neighbors:
    """The best k of each query's own candidates, by exact scores.

    Parameters
    ----------
    queries : array, shape (nq, d), float32 or float64
    database : array, shape (n, d), the type of queries
    candidates : array, shape (nq, c), int64 or int32
        Rows of database; -1 is skipped, and a row that is named twice counts once.
    k : int
        May exceed c.
    metric : {'ip', 'l2', 'cosine'}, default 'ip'

    Returns
    -------
    scores, ids : arrays, shape (nq, k)
        As from `knn`.

    Raises
    ------
    IndexError
        A candidate outside [-1, n). On CUDA, where nothing waits for the device, it is named once among its
        query's results, first, with a NaN score and id -1.
    TypeError, ValueError
        As `knn`.

    Notes
    -----
    Cost: nq c random reads of a row.
    """
    return _tuple(Neighbors, call("rescore", _rescore, (queries, database, candidates), (k, metric)))


def pair(kind, queries, database, names=("queries", "database")):
    """Check a pair of matrices; the dtype code of both."""
    for a, name in ((queries, names[0]), (database, names[1])):
        _checks.same_kind(kind, a, name, queries, names[0])
        _checks.ndim(a, name, 2)
    code = _checks.dtype(kind, queries, names[0], (F32, F64))
    if _checks.dtype(kind, database, names[1], (F32, F64)) != code:
        raise TypeError(
            f"{names[1]} has dtype {database.dtype}, {names[0]} has {queries.dtype}; they must be equal"
        )
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"{names[1]} has {database.shape[1]} columns, {names[0]} has {queries.shape[1]}; "
            "they must be equal"
        )
    return code


def check_k(kind, k):
    """k as an int; CUDA has a largest one."""
    if type(k) is not int or k < 1 or kind.cuda:
        k = _checks.integer("k", k, 1)
        if kind.cuda and k > CUDA_MAX_K:
            raise ValueError(f"k must be at most {CUDA_MAX_K} on CUDA, got {k}; the CPU has no such limit")
    return k


def search(kind, queries, database, k, metric, names, op):
    """knn under the argument names of its caller (`lutra.address.nearest` is the same kernel)."""
    k = check_k(kind, k)
    metric_code = _checks.choice("metric", metric, METRICS)
    kernels = kind.kernels
    if not (
        database is not None
        and kernels is not None
        and kind.code(queries) == 0 == kind.code(database)
        and len(queries.shape) == 2 == len(database.shape)
        and queries.shape[1] == database.shape[1]
        and not kind.cuda
    ):
        code = pair(kind, queries, database, names)
        if kernels is None or code == F64:
            _checks.no_kernel(kind, op)
            scores, ids = reference.knn(kind.to_numpy(queries), kind.to_numpy(database), k, metric, names[1])
            return kind.from_numpy(scores, code, queries), kind.from_numpy(ids, I64, queries)
    nq, d = queries.shape
    n = database.shape[0]
    queries, database = kind.dense(queries), kind.dense(database)
    scores, ids = kind.empty((nq, k), F32, queries), kind.empty((nq, k), I64, queries)
    scratch = kind.scratch("knn", queries, nq, n, d, k, metric_code) if kind.cuda else None
    bad = kernels.knn(
        kind.ptr(queries), d, kind.ptr(database), d, nq, n, d, k, metric_code,
        kind.ptr(scores), kind.ptr(ids), *kind.launch(queries, scratch),
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(reference.nan_message(names[1], bad))
    return scores, ids


def _knn(kind, queries, database, k=10, metric="ip"):
    return search(kind, queries, database, k, metric, ("queries", "database"), "knn")


def _rescore(kind, queries, database, candidates, k, metric="ip"):
    k = check_k(kind, k)
    metric_code = _checks.choice("metric", metric, METRICS)
    code = pair(kind, queries, database)
    _checks.same_kind(kind, candidates, "candidates", queries, "queries")
    _checks.ndim(candidates, "candidates", 2)
    if _checks.dtype(kind, candidates, "candidates", (I32, I64)) == I32:
        candidates = kind.cast(candidates, I64)
    nq, d = queries.shape
    n, c = database.shape[0], candidates.shape[1]
    if candidates.shape[0] != nq:
        raise ValueError(f"candidates has {candidates.shape[0]} rows, queries has {nq}; they must be equal")
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "rescore")
        q, x, picks = (kind.to_numpy(a) for a in (queries, database, candidates))
        scores, ids = reference.rescore(q, x, picks, k, metric)
        return kind.from_numpy(scores, code, queries), kind.from_numpy(ids, I64, queries)
    queries, database, candidates = kind.dense(queries), kind.dense(database), kind.dense(candidates)
    scores, ids = kind.empty((nq, k), F32, queries), kind.empty((nq, k), I64, queries)
    scratch = kind.scratch("rescore", queries, nq, c)
    bad = kind.kernels.rescore(
        kind.ptr(queries), d, kind.ptr(database), d, nq, n, d, kind.ptr(candidates), c, k, metric_code,
        kind.ptr(scores), kind.ptr(ids), *kind.launch(queries, scratch),
    )  # fmt: skip
    if bad >= 0:  # the reference finds the first offender and raises
        q, x, picks = (kind.to_numpy(a) for a in (queries, database, candidates))
        reference.rescore(q, x, picks, k, metric)
    return scores, ids
