"""ball_carving: sums of similar vectors of a query, in place of the vectors."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from .._arrays import F32, F64, I32, I64, Kind, call, type_name
from ..reference import fde as reference
from ._ragged import check_finite, check_ptr, odd_row, ragged


def ball_carving(tokens: Any, ptr: Any, threshold: float = 0.7) -> tuple[Any, Any]:
    """Cluster the vectors of each query, and give the sum of each cluster in their place.

    In their order, a vector joins the first cluster whose centre, the cluster's first vector, it has an inner
    product with of ``threshold`` at least; otherwise it opens a cluster. Sums keep the weight that the
    vectors have in a Chamfer similarity: where a cluster's vectors have their best match in common, it does
    not change.

    Parameters
    ----------
    tokens : array, shape (n, d), float32, float16, bfloat16 or float64
        The vectors of all queries, one query after another; for the paper's use of unit norm.
    ptr : array, shape (queries + 1,), int64
        Query ``i`` has the rows ``ptr[i] : ptr[i + 1]``; from 0 to ``n``.
    threshold : float, default 0.7

    Returns
    -------
    tokens : array, shape (clusters, d), float32 (float64 for float64 tokens)
    ptr : array, shape (queries + 1,), int64

    Raises
    ------
    TypeError, ValueError
        As `fde`; a threshold that is no finite number.

    Notes
    -----
    Cost: ``2 d`` operations for each pair of a vector and a centre that it is compared with. Sums are in
    float32, in the order of the vectors. On CUDA the number of clusters is waited for,
    vectors are not checked, and float64 is computed on the CPU. Not differentiable.

    References
    ----------
    Dhulipala, Hadian, Jayaram, Lee and Mirrokni, MUVERA: Multi-Vector Retrieval via Fixed Dimensional
    Encodings, NeurIPS 2024, arXiv 2405.19504 (there with 0.7).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> tokens, ptr = lutra.address.ball_carving(np.array([[1., 0.], [0., 1.], [0.8, 0.6]]), np.array([0, 3]))
    >>> tokens
    array([[1.8, 0.6],
           [0. , 1. ]])
    """
    if isinstance(threshold, bool) or not hasattr(threshold, "__float__"):
        raise TypeError(f"threshold must be a number, got {threshold!r} of type {type_name(threshold)}")
    if not isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold!r}")
    return call("ball_carving", _ball_carving, (tokens, ptr), (float(threshold),))


def _ball_carving(kind: Kind, tokens: Any, ptr: Any, threshold: float) -> tuple[Any, Any]:
    code = ragged(kind, tokens, ptr)
    if kind.cuda and kind.kernels is not None and code != F64:
        return _on_cuda(kind, tokens, ptr, threshold, code)
    if kind.cuda or kind.kernels is None or code == F64:
        host = kind.to_numpy(tokens)
        begin = kind.to_numpy(ptr)
        check_finite(host)
        check_ptr(begin, host.shape[0])
        sums, bounds = reference.ball_carving(host, begin, threshold)
        return kind.from_numpy(sums, F64 if code == F64 else F32, tokens), kind.from_numpy(
            bounds, I64, tokens
        )
    (n, d), queries = tokens.shape, ptr.shape[0] - 1
    tokens, ptr = kind.dense(tokens), kind.dense(ptr)
    balls, where = np.empty(n, np.int32), np.zeros(queries + 1, np.int64)
    of = (kind.ptr(tokens), code, n, d, kind.ptr(ptr), queries)
    bad = kind.kernels.balls(*of, threshold, balls, where[1:])
    if bad != -1:
        raise odd_row(bad)
    np.cumsum(where, out=where)
    out = kind.empty((int(where[-1]), d), F32, tokens)
    kind.kernels.ball_sums(*of, balls, where, kind.ptr(out), int(where[-1]))
    return out, kind.from_numpy(where, I64, tokens)


def _on_cuda(kind: Any, tokens: Any, ptr: Any, threshold: float, code: int) -> tuple[Any, Any]:
    (n, d), queries = tokens.shape, ptr.shape[0] - 1
    check_ptr(kind.to_numpy(ptr), n)
    tokens, ptr = kind.dense(tokens), kind.dense(ptr)
    balls, scratch = kind.empty((n,), I32, tokens), kind.empty((n,), I32, tokens)
    where = kind.empty((queries + 1,), I64, tokens)
    where[:1] = 0
    of = (kind.ptr(tokens), code, n, d, kind.ptr(ptr), queries)
    kind.kernels.balls(*of, threshold, kind.ptr(balls), kind.ptr(where[1:]), *kind.launch(tokens, scratch))
    where = where.cumsum(0)
    out = kind.empty((int(where[-1]), d), F32, tokens)
    kind.kernels.ball_sums(*of, kind.ptr(balls), kind.ptr(where), kind.ptr(out), *kind.launch(tokens))
    return out, where
