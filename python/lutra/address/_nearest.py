"""nearest: the k nearest centroids, which is what k-means, PQ and IVF address by."""

from __future__ import annotations

from typing import Any

from numpy import ndarray

from .. import _checks
from .._arrays import call, eager, quick
from .._results import Neighbors
from ..scan._knn import _tuple, search

_quick = quick("nearest")
_NAMES = ("x", "centroids")


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
    With k = 1 and 200 or more vectors, sums are taken in another order than by `lutra.scan.knn`: the last
    bits of a score, and the choice between centroids that are equally near but for those, may differ from
    those of a smaller call.

    Cost: 2 n c d flops. Gradient (torch): of the scores, to x and centroids.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.address.nearest(np.array([[0.9], [0.2]], np.float32), np.array([[0.0], [1.0]], np.float32)).ids
    array([[1],
           [0]])
    """
    if type(x) is ndarray or eager(x):
        result = _quick(x, centroids, k, metric)
        if result is not None:
            return _tuple(Neighbors, result)
    return _tuple(Neighbors, call("nearest", _nearest, (x, centroids), (k, metric)))


def _nearest(kind, x, centroids, k=1, metric="l2"):
    if metric not in ("l2", "ip"):
        _checks.choice("metric", metric, {"l2": 1, "ip": 0})
    return search(kind, x, centroids, k, metric, _NAMES, "nearest")
