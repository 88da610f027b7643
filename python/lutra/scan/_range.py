"""range_search: all rows within a radius, exactly."""

from __future__ import annotations

from typing import Any

from .. import _checks
from .._arrays import F32, F64, I64, NUMPY, call, type_name
from .._results import RangeResult
from ..reference import scan as reference
from ._knn import device_keep, exact_metric, keep_of, numpy_keep, pair, wide_numpy


def range_search(
    queries: Any, database: Any, radius: float, metric: str = "ip", *, filter: Any = None
) -> RangeResult:
    """All rows of a collection within a radius of each query.

    Parameters
    ----------
    queries : array, shape (nq, d), float32, or the type of database
    database : array, shape (n, d), float32, float16, bfloat16, int8, uint8 or float64
    radius : float
        Rows with score >= radius are found for 'ip' and 'cosine', those with score <= radius for the
        distances ('l2' is squared, and so is its radius). It is rounded to float32 first, as scores are.
    metric : {'ip', 'l2', 'cosine', 'l1', 'linf', 'poincare'}, default 'ip'
        As for `knn`.
    filter : array, list, set or callable, optional
        Which rows may be found, as for `knn`.

    Returns
    -------
    offsets : array, shape (nq + 1,), int64
        What was found for query i is at ``offsets[i] : offsets[i + 1]`` of the others.
    scores : array, shape (offsets[-1],), float32 (float64 for float64)
        Best first within a query.
    ids : array, shape (offsets[-1],), int64
        Rows of database; equal scores in the order of their ids.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `knn`; a radius that is no number, or NaN.

    Notes
    -----
    Scores have the bits that `knn` gives them. Cost: that of `knn`, and 60 bytes and a share of a sort for
    each row that is found. On CUDA the collection is read twice for every 8 queries, and between the two the
    call waits for the device, to learn how much was found; a NaN score is found, and first.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.array([[0.0], [1.0], [3.0]], np.float32)
    >>> lutra.scan.range_search(x[:1], x, 1.0, "l2").ids
    array([0, 1])
    """
    keep = keep_of(filter, queries, database)
    return RangeResult(*call("range_search", _range_search, (queries, database), (radius, metric, keep)))


def check_radius(radius: Any) -> float:
    """The radius as a float, not NaN."""
    try:
        value = float(radius)
    except (TypeError, ValueError):
        raise TypeError(f"radius must be a number, got {radius!r} of type {type_name(radius)}") from None
    if value != value:
        raise ValueError("radius is NaN; it must be a number")
    return value


def _on_cuda(kind, queries, database, radius, metric, code, keep):
    keep = device_keep(kind, keep, queries)
    queries, database = kind.dense(queries), kind.dense(database)
    (nq, d), n = queries.shape, database.shape[0]
    arguments = (
        kind.ptr(queries), d, kind.ptr(database), d, nq, n, d, radius, metric, code,
        None if keep is None else kind.ptr(keep),
    )  # fmt: skip
    offsets = kind.empty((nq + 1,), I64, queries)
    scratch = kind.scratch("range", queries, nq, d, metric, 0)
    kind.kernels.range_count(*arguments, kind.ptr(offsets), *kind.launch(queries, scratch))
    total = int(offsets[nq])  # waits for the device
    scores, ids = kind.empty((total,), F32, queries), kind.empty((total,), I64, queries)
    if total:
        scratch = kind.scratch("range", queries, nq, d, metric, total)
        kind.kernels.range_write(
            *arguments, total, kind.ptr(offsets), kind.ptr(scores), kind.ptr(ids),
            *kind.launch(queries, scratch),
        )  # fmt: skip
    return offsets, scores, ids


def _range_search(kind, queries, database, radius, metric="ip", keep=None):
    radius = check_radius(radius)
    metric_code = exact_metric(kind, metric)
    queries, code = pair(kind, queries, database)
    if kind.cuda and kind.kernels is not None and code != F64:
        return _on_cuda(kind, queries, database, radius, metric_code, code, keep)
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "range_search")
        q, x = wide_numpy(kind, queries, code), wide_numpy(kind, database, code)
        offsets, scores, ids = reference.range_search(q, x, radius, metric, numpy_keep(kind, keep))
    else:
        queries, database = kind.dense(queries), kind.dense(database)
        (nq, d), n = queries.shape, database.shape[0]
        bad, offsets, scores, ids = kind.kernels.range_search(
            kind.ptr(queries), d, kind.ptr(database), d, nq, n, d, radius, metric_code, code,
            None if keep is None else kind.ptr(keep),
        )  # fmt: skip
        if bad >= 0:
            raise ValueError(reference.nan_message("database", bad, metric))
    if kind is NUMPY:
        return offsets, scores, ids
    return (
        kind.from_numpy(offsets, I64, queries),
        kind.from_numpy(scores, F64 if code == F64 else F32, queries),
        kind.from_numpy(ids, I64, queries),
    )
