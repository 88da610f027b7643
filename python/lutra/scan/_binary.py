"""binary and rescore_bits: packed bits, with selection inside the scan."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, _filters
from .._arrays import F32, F64, I32, I64, NUMPY, U8, call
from .._results import Neighbors
from ..reference import binary as reference
from ..reference.scan import nan_message
from ._knn import _tuple, device_keep

BINARY_METRICS = {"hamming": 0, "jaccard": 1}


def binary(
    queries: Any, database: Any, k: int = 10, metric: str = "hamming", *, filter: Any = None
) -> Neighbors:
    """k nearest neighbours of packed bits.

    Counts and selects in one pass: no matrix of distances is written.

    Parameters
    ----------
    queries : array, shape (nq, b), uint8
        Rows of 8 b bits, as from `lutra.address.binarize` or ``numpy.packbits``. Only the set of bits counts,
        so their order within a byte is free, but must be one for both arrays.
    database : array, shape (n, b), uint8
    k : int, default 10
        Neighbours per query; may exceed n.
    metric : {'hamming', 'jaccard'}, default 'hamming'
        ``'hamming'``: the number of bits that differ. ``'jaccard'``: the distance 1 - |q & x| / |q | x|, as
        in FAISS and SciPy; 0 where both are empty. Smaller is better for both.
    filter : optional
        Which rows may be found: bools (n,), packed bits of them (uint8, ceil(n / 8), little bit order), an
        array or list of row numbers, or a function of all row numbers that gives bools.

    Returns
    -------
    scores : array, shape (nq, k), float32
        Best first; +inf where k exceeds what may be found.
    ids : array, shape (nq, k), int64
        Rows of database; equal scores in the order of their ids; -1 where k exceeds what may be found.

    Raises
    ------
    TypeError
        A wrong type or dtype, or arrays of different libraries.
    ValueError
        Shapes that do not fit, rows of no bytes, k < 1, an unknown metric, a filter of the wrong length.
    IndexError
        A row number in the filter that is out of range.

    Notes
    -----
    Cost: nq n b / 64 popcounts of 64 bytes with AVX-512 VPOPCNTDQ and, for few queries, one read of database.
    On CUDA a multiprocessor counts 16 words of 4 bytes a cycle. Not differentiable.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.array([[0b0000], [0b0111], [0b1111]], np.uint8)
    >>> lutra.scan.binary(np.array([[0b0011]], np.uint8), x, k=2)
    Neighbors(scores=array([[1., 2.]], dtype=float32), ids=array([[1, 0]]))
    """
    if type(queries) is np.ndarray and type(database) is np.ndarray and filter is None:
        return _tuple(Neighbors, _binary(NUMPY, queries, database, None, k, metric))
    keep = None
    if filter is not None:
        _checks.ndim(database, "database", 2)
        keep = _filters.beside(queries, filter, database.shape[0])
    return _tuple(Neighbors, call("binary", _binary, (queries, database, keep), (k, metric)))


def _binary(kind, queries, database, keep=None, k=10, metric="hamming"):
    k = _checks.integer("k", k, 1)
    metric_code = _checks.choice("metric", metric, BINARY_METRICS)
    for a, name in ((queries, "queries"), (database, "database")):
        _checks.same_kind(kind, a, name, queries, "queries")
        _checks.ndim(a, name, 2)
        _checks.dtype(kind, a, name, (U8,))
    if queries.shape[1] != database.shape[1] or queries.shape[1] == 0:
        raise ValueError(
            f"database has rows of {database.shape[1]} bytes, queries of {queries.shape[1]}; "
            "they must be equal, and a byte at least"
        )
    (nq, b), n = queries.shape, database.shape[0]
    if keep is not None and (kind.code(keep) != U8 or tuple(keep.shape) != ((n + 7) // 8,)):
        raise ValueError(
            f"keep must be uint8 of shape ({(n + 7) // 8},), got {keep.dtype} {tuple(keep.shape)}"
        )
    if kind.kernels is None:
        _checks.no_kernel(kind, "binary")
        bits = None if keep is None else kind.to_numpy(keep)
        scores, ids = reference.binary(kind.to_numpy(queries), kind.to_numpy(database), k, metric, bits)
        return kind.from_numpy(scores, F32, queries), kind.from_numpy(ids, I64, queries)
    queries, database = kind.dense(queries), kind.dense(database)
    keep = device_keep(kind, keep, queries)  # of the torch op: perhaps on the host
    keep = None if keep is None else kind.dense(keep)
    scores, ids = kind.empty((nq, k), F32, queries), kind.empty((nq, k), I64, queries)
    more = kind.launch(queries, kind.scratch("binary", queries, nq, n, b, k, kind.ptr(database)))
    kind.kernels.binary(
        kind.ptr(queries), kind.ptr(database), nq, n, b, k, metric_code,
        None if keep is None else kind.ptr(keep), kind.ptr(scores), kind.ptr(ids), *more,
    )  # fmt: skip
    return scores, ids


def rescore_bits(queries: Any, database: Any, candidates: Any, k: int) -> Neighbors:
    """The best k of each query's candidates among packed bits, by the exact query.

    Asymmetric scores: the query stays as it is, a row's bits stand for 1 (set) and -1, and the score is
    their inner product. It ranks what `binary` found for the query's own bits better than their distances do.

    Parameters
    ----------
    queries : array, shape (nq, d), float32 or float64
    database : array, shape (n, ceil(d / 8)), uint8
        Bits in little order (`lutra.address.binarize`); spare bits of the last byte are not looked at.
    candidates : array, shape (nq, c), int64 or int32
        Rows of database; -1 is skipped, and a row that is named twice counts once.
    k : int
        May exceed c.

    Returns
    -------
    scores : array, shape (nq, k), the type of queries
        Larger is better; -inf where k exceeds the candidates.
    ids : array, shape (nq, k), int64
        Rows of database, equal scores in the order of their ids; -1 where k exceeds the candidates.

    Raises
    ------
    IndexError
        A candidate outside [-1, n) (on CUDA it shows as a NaN with id -1).
    TypeError, ValueError
        As `binary`; a query that holds NaN (on CUDA its scores are NaN).

    Notes
    -----
    Cost: nq c random reads of a row. Not differentiable. float64 is computed by the reference.

    References
    ----------
    Yamada, Asai, Hajishirzi, Efficient Passage Retrieval with Hashing for Open-domain Question Answering,
    ACL 2021, arXiv 2106.00882.
    """
    return _tuple(Neighbors, call("rescore_bits", _rescore_bits, (queries, database, candidates), (k,)))


def _rescore_bits(kind, queries, database, candidates, k):
    k = _checks.integer("k", k, 1)
    for a, name in ((queries, "queries"), (database, "database"), (candidates, "candidates")):
        _checks.same_kind(kind, a, name, queries, "queries")
        _checks.ndim(a, name, 2)
    code = _checks.dtype(kind, queries, "queries", (F32, F64))
    _checks.dtype(kind, database, "database", (U8,))
    _checks.dtype(kind, candidates, "candidates", (I32, I64))
    (nq, d), n, c = queries.shape, database.shape[0], candidates.shape[1]
    if database.shape[1] != (d + 7) // 8:
        raise ValueError(
            f"database has rows of {database.shape[1]} bytes; queries of d = {d} need {(d + 7) // 8}"
        )
    if candidates.shape[0] != nq:
        raise ValueError(f"candidates has {candidates.shape[0]} rows, queries has {nq}; they must be equal")
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "rescore_bits")
        picks = kind.to_numpy(candidates)
        scores, ids = reference.rescore_bits(kind.to_numpy(queries), kind.to_numpy(database), picks, k)
        return kind.from_numpy(scores, code, queries), kind.from_numpy(ids, I64, queries)
    if kind.cuda:
        queries, database = kind.dense(queries), kind.dense(database)
        candidates = kind.dense(kind.cast(candidates, I64))
        scores, ids = kind.empty((nq, k), F32, queries), kind.empty((nq, k), I64, queries)
        kind.kernels.rescore_bits(
            kind.ptr(queries), kind.ptr(database), nq, n, d, kind.ptr(candidates), c, k, kind.ptr(scores),
            kind.ptr(ids), *kind.launch(queries, kind.scratch("rescore_bits", queries, nq, c, k)),
        )  # fmt: skip
        return scores, ids
    picks = kind.to_numpy(candidates)
    # Sorted here: the kernel meets rows in the order of the memory, and repeated ones side by side.
    order = np.sort(picks.astype(np.int64, copy=False), axis=-1)
    queries, database = kind.dense(queries), kind.dense(database)
    scores, ids = kind.empty((nq, k), F32, queries), kind.empty((nq, k), I64, queries)
    bad = kind.kernels.rescore_bits(
        kind.ptr(queries), kind.ptr(database), nq, n, d, order, c, k, kind.ptr(scores), kind.ptr(ids)
    )
    if bad >= 2 << 40:
        reference.rescore_bits(kind.to_numpy(queries), kind.to_numpy(database), picks, k)  # names the place
    if bad >= 0:
        raise ValueError(nan_message("database", bad))
    return scores, ids
