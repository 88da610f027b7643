"""nearest: the k nearest centroids, which is what k-means, PQ and IVF address by."""

from __future__ import annotations

from typing import Any

from numpy import ndarray

from .. import _checks
from .._arrays import F32, I64, call, eager, quick
from .._results import Neighbors
from ..reference.scan import nan_message
from ..scan._knn import _tuple, pair, search

_quick = quick("nearest")
_NAMES = ("x", "centroids")
_VNNI = True  # tests turn it off
#: From so many centroids and dimensions on, k = 1 has a kernel of its own (csrc/address/assign.h).
SCREENED = (128, 32)


def nearest(x: Any, centroids: Any, k: int = 1, metric: str = "l2") -> Neighbors:
    """The k nearest centroids of each vector.

    The same kernel as `lutra.scan.knn` with the roles named: distances are selected from as they are
    computed, and no (n, number of centroids) matrix is written.

    Parameters
    ----------
    x : array, shape (n, d), float32 or float64
    centroids : array, shape (c, d), the type of x
    k : int, default 1
    metric : {'l2', 'ip'}, default 'l2'
        Squared Euclidean distance (smaller is better) or inner product (larger is better).

    Returns
    -------
    scores : array, shape (n, k)
    ids : array, shape (n, k), int64
        Best first, equal scores in the order of their ids; -1 where k > c.

    Raises
    ------
    TypeError, ValueError
        As `lutra.scan.knn`.

    Notes
    -----
    With k = 1, 128 centroids or more and 32 dimensions or more, products of 8-bit integers (four times as
    fast with AVX-512 VNNI) bound every score, and the few centroids that the bounds leave are scored in
    float32: the result is exact, and does not depend on the batch. With fewer centroids, k = 1 and 200 or
    more vectors, sums are taken in another order than by `lutra.scan.knn`: the last bits of a score, and the
    choice between centroids that are equally near but for those, may differ from those of a smaller call. On
    CUDA scores have the bits of `lutra.scan.knn`: tensor cores bound them by products of bfloat16 terms, and
    the few that the bounds leave are computed exactly.

    Cost: 2 n c d flops. Gradient (torch): of the scores, to x and centroids.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.address.nearest(np.array([[0.9], [0.2]], np.float32), np.array([[0.0], [1.0]], np.float32)).ids
    array([[1],
           [0]])
    """
    if (type(x) is ndarray or eager(x)) and not (k == 1 and _many(centroids)):
        result = _quick(x, centroids, k, metric)
        if result is not None:
            return _tuple(Neighbors, result)
    return _tuple(Neighbors, call("nearest", _nearest, (x, centroids), (k, metric)))


def _many(centroids):
    shape: Any = getattr(centroids, "shape", ())
    return len(shape) == 2 and shape[0] >= SCREENED[0] and SCREENED[1] <= shape[1] <= 65536


def _nearest(kind, x, centroids, k=1, metric="l2"):
    if metric not in ("l2", "ip"):
        _checks.choice("metric", metric, {"l2": 1, "ip": 0})
    if k == 1 and kind.kernels is not None and not kind.cuda and _many(centroids):
        x, code = pair(kind, x, centroids, _NAMES)
        if code == F32:
            return assign(kind, x, centroids, metric)
    return search(kind, x, centroids, k, metric, _NAMES, "nearest")


def assign(kind, x, centroids, metric, rows=None, out=None, counts=None):
    """The nearest centroid of each vector, or of those at int64 ``rows``: ``out`` = scores, ids (n, 1)."""
    x, centroids = kind.dense(x), kind.dense(centroids)
    (n, d), c = x.shape, centroids.shape[0]
    scores, ids = out or (kind.empty((n, 1), F32, x), kind.empty((n, 1), I64, x))
    bad, exact = kind.kernels.assign(
        kind.ptr(x), d, kind.ptr(centroids), d, n if rows is None else len(rows), c, d,
        0 if metric == "ip" else 1, None if rows is None else kind.ptr(rows), n, _VNNI,
        kind.ptr(scores), kind.ptr(ids),
    )  # fmt: skip
    if counts is not None:
        counts.append(exact)
    if bad >= 0:
        raise ValueError(nan_message("centroids", bad))
    return scores, ids
