"""knn and rescore: exact scores with selection inside the scan."""

from __future__ import annotations

from typing import Any

from numpy import ndarray

from .. import _checks, _filters
from .._arrays import BF16, F16, F32, F64, I8, I32, I64, U8, call, eager, is_torch, quick
from .._checks import EXACT_METRICS
from .._results import Neighbors
from ..reference import scan as reference

_tuple = tuple.__new__  # builds a named tuple in half the time of calling its class
_quick = quick("knn")
#: What a database may be stored as.
STORAGE = (F32, F16, BF16, I8, U8)


def knn(queries: Any, database: Any, k: int = 10, metric: str = "ip", *, filter: Any = None) -> Neighbors:
    """Exact k nearest neighbours.

    Scores and selects in one pass: no matrix of scores is written.

    Parameters
    ----------
    queries : array, shape (nq, d), float32, or the type of database
    database : array, shape (n, d), float32, float16, bfloat16, int8, uint8 or float64
        Values are converted to float32 as they are read; float64 goes with float64 queries only.
    k : int, default 10
        Neighbours per query; may exceed n.
    metric : {'ip', 'l2', 'cosine', 'l1', 'linf', 'poincare'}, default 'ip'
        ``'ip'`` is the inner product and ``'cosine'`` that over both norms (0 where one is 0): larger is
        better. Of the distances smaller is better: ``'l2'`` is the squared Euclidean distance, computed from
        differences; ``'l1'`` the sum and ``'linf'`` the maximum of absolute differences; ``'poincare'`` the
        hyperbolic distance arcosh(1 + 2 |q - x|^2 / ((1 - |q|^2) (1 - |x|^2))) in the open unit ball.
    filter : array, list, set or callable, optional
        Which rows may be found: a bool array (n,), packed bits (uint8, ``np.packbits(mask,
        bitorder="little")``), an array or list of row numbers, or a function of all row numbers (int64) that
        returns a bool array, called once. On CUDA, arrays that lie there are not looked at on the host, so
        that nothing waits; the others are copied.

    Returns
    -------
    scores : array, shape (nq, k), float32 (float64 for float64)
        Best first; where there are fewer than k rows, -inf (ip, cosine) or +inf (distances).
    ids : array, shape (nq, k), int64
        Rows of database; equal scores in the order of their ids; -1 where there are fewer than k rows.

    Raises
    ------
    TypeError
        A wrong type or dtype, or arrays of different libraries.
    ValueError
        Shapes that do not fit, k < 1, an unknown metric, a NaN score (its row is named; for 'poincare' also a
        row or query of norm >= 1). CUDA kernels raise nothing that would need the device to be waited for:
        there a NaN score comes first in its query's results.
    IndexError
        A row number in ``filter`` outside [0, n); in an array on CUDA it is passed over.

    Notes
    -----
    A score has the same bits whatever the other queries of the call, the number of threads and the filter,
    and from `rescore` and `range_search` too.

    Cost: 2 nq n d flops and, for few queries, one read of database. With a filter, n counts the rows that
    pass: the others are not read (on CUDA they are). float64 is computed by the reference. Gradient (torch):
    of the scores, to queries and database, for 'ip', 'l2' and 'cosine'.

    On CUDA, for these three metrics, more than 8 queries and k <= 2048, tensor cores bound all scores by
    products of bfloat16 terms (one for bfloat16 arrays, two for float32 queries of them, three for float32).
    The rows of the largest bounds are scored exactly, and a query that the bounds do not decide is searched
    for without them.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.eye(4, dtype=np.float32)
    >>> lutra.scan.knn(x[2:3], x, k=2).ids
    array([[2, 0]])
    >>> lutra.scan.knn(x[2:3], x, k=2, filter=[3, 1]).ids
    array([[1, 3]])
    """
    if filter is None and (type(queries) is ndarray or eager(queries)):
        result = _quick(queries, database, k, metric)
        if result is not None:
            return _tuple(Neighbors, result)
    keep = keep_of(filter, queries, database)
    return _tuple(Neighbors, call("knn", _knn, (queries, database), (k, metric, keep)))


def rescore(queries: Any, database: Any, candidates: Any, k: int, metric: str = "ip") -> Neighbors:
    """The best k of each query's own candidates, by exact scores.

    Parameters
    ----------
    queries : array, shape (nq, d), float32, or the type of database
    database : array, shape (n, d), float32, float16, bfloat16, int8, uint8 or float64
        As for `knn`.
    candidates : array, shape (nq, c), int64 or int32
        Rows of database; -1 is skipped, and a row that is named twice counts once.
    k : int
        May exceed c.
    metric : {'ip', 'l2', 'cosine', 'l1', 'linf', 'poincare'}, default 'ip'

    Returns
    -------
    scores, ids : arrays, shape (nq, k)
        As from `knn`, to the bit.

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


def keep_of(filter, queries, database):
    """A filter of rows as packed bits beside the queries."""
    if filter is None:
        return None
    shape = tuple(getattr(database, "shape", ()))
    return _filters.beside(queries, filter, shape[0] if shape else 0)


def pair(kind, queries, database, names=("queries", "database")):
    """Check a pair of matrices: the queries, float32 or float64, and the dtype code of the database."""
    for a, name in ((queries, names[0]), (database, names[1])):
        _checks.same_kind(kind, a, name, queries, names[0])
        _checks.ndim(a, name, 2)
    of_queries = _checks.dtype(kind, queries, names[0], (*STORAGE, F64))
    code = _checks.dtype(kind, database, names[1], (*STORAGE, F64))
    if of_queries != code and (of_queries != F32 or code == F64):
        raise TypeError(
            f"{names[1]} has dtype {_dtype(database)}, {names[0]} has {_dtype(queries)}; "
            f"{names[0]} must have the dtype of {names[1]}, or be float32 where {names[1]} is not float64"
        )
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"{names[1]} has {database.shape[1]} columns, {names[0]} has {queries.shape[1]}; "
            "they must be equal"
        )
    return (queries if of_queries in (F32, F64) else kind.cast(queries, F32)), code


def _dtype(a):
    return str(a.dtype).removeprefix("torch.")


def exact_metric(kind, metric):
    """The number of a metric."""
    return _checks.choice("metric", metric, EXACT_METRICS)


def device_keep(kind, keep, like):
    """Packed bits of a filter where the kernel reads them; null stays null."""
    if keep is None or not kind.cuda:
        return keep
    if is_torch(keep):
        return kind.dense(keep.to(like.device)) if is_torch(like) else kind.from_numpy(keep.numpy(), U8, like)
    return kind.from_numpy(keep, U8, like)


def numpy_keep(kind, keep):
    return None if keep is None else kind.to_numpy(keep)


def wide_numpy(kind, a, code):
    """An array for the reference, with 8-bit integers as float32."""
    a = kind.to_numpy(a)
    return a if code == F64 else a.astype("float32", copy=False)


def search(kind, queries, database, k, metric, names, op, keep=None, bias=None):
    """knn under the argument names of its caller (`lutra.address.nearest` is the same kernel).

    With ``bias`` (n,), float32, for metric 'ip' and where there are kernels, scores are ``<q, x> + bias``.
    """
    k = k if type(k) is int and k > 0 else _checks.integer("k", k, 1)
    metric_code = exact_metric(kind, metric)
    of_queries = kind.code(queries)
    queries, code = pair(kind, queries, database, names)
    kernels = kind.kernels
    if kernels is None or code == F64:
        _checks.no_kernel(kind, op)
        q, x = wide_numpy(kind, queries, code), wide_numpy(kind, database, code)
        scores, ids = reference.knn(q, x, k, metric, names[1], numpy_keep(kind, keep))
        code = F64 if code == F64 else F32
        return kind.from_numpy(scores, code, queries), kind.from_numpy(ids, I64, queries)
    keep = device_keep(kind, keep, queries)
    nq, d = queries.shape
    n = database.shape[0]
    queries, database = kind.dense(queries), kind.dense(database)
    scores, ids = kind.empty((nq, k), F32, queries), kind.empty((nq, k), I64, queries)
    bias = None if bias is None else kind.dense(bias)
    bits, shift = (None if a is None else kind.ptr(a) for a in (keep, bias))
    if kind.cuda:
        bf16 = of_queries == BF16  # the queries' values need one term of bf16 instead of two
        plain = bits is None and shift is None
        scratch = kind.scratch("knn", queries, nq, n, d, k, metric_code, code, bf16, plain)
        more = code, bf16, bits, shift, *kind.launch(queries, scratch)
    else:
        more = code, bits, op == "nearest", shift
    bad = kernels.knn(
        kind.ptr(queries), d, kind.ptr(database), d, nq, n, d, k, metric_code,
        kind.ptr(scores), kind.ptr(ids), *more,
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(reference.nan_message(names[1], bad, metric))
    return scores, ids


def _knn(kind, queries, database, k=10, metric="ip", keep=None, bias=None):
    return search(kind, queries, database, k, metric, ("queries", "database"), "knn", keep, bias)


def _rescore(kind, queries, database, candidates, k, metric="ip"):
    k = k if type(k) is int and k > 0 else _checks.integer("k", k, 1)
    metric_code = exact_metric(kind, metric)
    queries, code = pair(kind, queries, database)
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
        q, x = wide_numpy(kind, queries, code), wide_numpy(kind, database, code)
        scores, ids = reference.rescore(q, x, kind.to_numpy(candidates), k, metric)
        code = F64 if code == F64 else F32
        return kind.from_numpy(scores, code, queries), kind.from_numpy(ids, I64, queries)
    queries, database, candidates = kind.dense(queries), kind.dense(database), kind.dense(candidates)
    scores, ids = kind.empty((nq, k), F32, queries), kind.empty((nq, k), I64, queries)
    more = code, *kind.launch(queries, kind.scratch("rescore", queries, nq, c, d, k, metric_code))
    bad = kind.kernels.rescore(
        kind.ptr(queries), d, kind.ptr(database), d, nq, n, d, kind.ptr(candidates), c, k, metric_code,
        kind.ptr(scores), kind.ptr(ids), *more,
    )  # fmt: skip
    if bad >= 0:  # the reference finds the first offender and raises
        q, x = wide_numpy(kind, queries, code), wide_numpy(kind, database, code)
        reference.rescore(q, x, kind.to_numpy(candidates), k, metric)
    return scores, ids
