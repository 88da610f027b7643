"""pq: asymmetric distances to product-quantized codes, with selection inside the scan."""

from __future__ import annotations

from typing import Any

from numpy import ndarray

from .. import _checks
from .._arrays import F32, F64, I64, NUMPY, U8, call
from .._checks import METRICS
from .._results import Neighbors
from ..reference import scan as reference
from ._knn import _tuple

_PQ_METRICS = {name: METRICS[name] for name in ("ip", "l2")}


def pq(queries: Any, codes: Any, codebooks: Any, k: int = 10, metric: str = "l2") -> Neighbors:
    """k nearest neighbours among product-quantized vectors.

    Vector i is known by its m codes: sub-vector j is ``codebooks[j, codes[i, j]]``. The query stays exact
    (asymmetric distance computation): its scores with all codebook entries form a table, and a vector's score
    is the sum of m table entries.

    Parameters
    ----------
    queries : array, shape (nq, m * dsub), float32 or float64
    codes : array, shape (n, m), uint8
        Each less than ksub.
    codebooks : array, shape (m, ksub, dsub), the type of queries
        ksub is at most 256.
    k : int, default 10
    metric : {'l2', 'ip'}, default 'l2'
        For cosine, normalise vectors and queries and take ``'ip'``.

    Returns
    -------
    scores, ids : arrays, shape (nq, k)
        As from `knn`.

    Raises
    ------
    IndexError
        A code that is not less than ksub (on CUDA its score is NaN).
    TypeError, ValueError
        As `knn`.

    Notes
    -----
    Cost: 2 nq m ksub dsub flops for the tables, then nq n m look-ups and additions. On CUDA 32 look-ups a
    cycle and multiprocessor, 64 in batches; above m = 96 the sub-spaces are taken in slabs, between which 4
    bytes a query and vector wait in device memory. Sums that may be among the k best are made once more in
    the order of the CPU. Gradient (torch): of the scores, to queries and codebooks.

    References
    ----------
    Jégou, Douze, Schmid, Product quantization for nearest neighbor search, PAMI 2011.
    """
    if type(queries) is type(codes) is type(codebooks) is ndarray:
        return _tuple(Neighbors, _pq(NUMPY, queries, codes, codebooks, k, metric))
    return _tuple(Neighbors, call("pq", _pq, (queries, codes, codebooks), (k, metric)))


def _pq(kind, queries, codes, codebooks, k=10, metric="l2"):
    k = _checks.integer("k", k, 1)
    metric_code = _checks.choice("metric", metric, _PQ_METRICS)
    for a, name, dims in ((queries, "queries", 2), (codes, "codes", 2), (codebooks, "codebooks", 3)):
        _checks.same_kind(kind, a, name, queries, "queries")
        _checks.ndim(a, name, dims)
    code = _checks.dtype(kind, queries, "queries", (F32, F64))
    _checks.dtype(kind, codes, "codes", (U8,))
    if _checks.dtype(kind, codebooks, "codebooks", (F32, F64)) != code:
        raise TypeError(
            f"codebooks has dtype {codebooks.dtype}, queries has {queries.dtype}; they must be equal"
        )
    (nq, d), (n, m), (books, ksub, dsub) = queries.shape, codes.shape, codebooks.shape
    if books != m or m * dsub != d or not 1 <= ksub <= 256:
        raise ValueError(
            f"queries {tuple(queries.shape)}, codes {tuple(codes.shape)} and codebooks "
            f"{tuple(codebooks.shape)} must have shapes (nq, m * dsub), (n, m) and (m, ksub, dsub) "
            "with ksub in [1, 256]"
        )
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "pq")
        q, rows, entries = (kind.to_numpy(a) for a in (queries, codes, codebooks))
        scores, ids = reference.pq(q, rows, entries, k, metric)
        return kind.from_numpy(scores, code, queries), kind.from_numpy(ids, I64, queries)
    queries, codes, codebooks = kind.dense(queries), kind.dense(codes), kind.dense(codebooks)
    scores, ids = kind.empty((nq, k), F32, queries), kind.empty((nq, k), I64, queries)
    scratch = kind.scratch("pq", queries, nq, n, m, ksub, k)
    bad = kind.kernels.pq(
        kind.ptr(queries), d, kind.ptr(codes), kind.ptr(codebooks), nq, n, m, ksub, dsub, k, metric_code,
        kind.ptr(scores), kind.ptr(ids), *kind.launch(queries, scratch),
    )  # fmt: skip
    if bad >= 0:
        row = kind.to_numpy(codes[bad : bad + 1])[0]
        wrong = [j for j in range(m) if row[j] >= ksub]
        if wrong:
            raise IndexError(
                f"codes[{bad}, {wrong[0]}] is {row[wrong[0]]}; codes must be < {ksub}, the size of a codebook"
            )
        raise ValueError(reference.nan_message("codes", bad))
    return scores, ids
