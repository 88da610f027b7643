"""SOAR: a second list for each vector, found where the first one's residual misleads a search."""

from __future__ import annotations

from typing import Any

from .. import address
from .._arrays import I64
from ._home import HOST, Home

_NEAR = 32  # centroids that are looked at
_PART = 1 << 12  # vectors at a time


def second_lists(x: Any, centroids: Any, weight: float, home: Home = HOST) -> tuple[Any, Any]:
    """First and second list of float32 vectors of a home.

    The first is the nearest centroid c, with residual r = x - c. The second minimises, over the other
    centroids c' with r' = x - c'::

        |r'|^2 + weight <r', r / |r|>^2

    among the 32 nearest to x. The minimum is no farther than sqrt(1 + weight) times the second nearest
    centroid, so it is among them but for crowds of centroids at nearly one distance.

    References
    ----------
    Sun et al., SOAR: improved indexing for approximate nearest neighbor search, NeurIPS 2023.
    """
    n, xp = len(x), home.xp
    first, second = home.empty((n,), I64), home.empty((n,), I64)
    near = min(_NEAR, len(centroids))
    for i in range(0, n, _PART):
        part = x[i : i + _PART]
        ids = address.nearest(part, centroids, near, "l2").ids
        residual = part - centroids[ids[:, 0]]
        norm = xp.sqrt(xp.einsum("ij,ij->i", residual, residual))
        along = residual / xp.where(norm > 0, norm, 1)[:, None]
        others = part[:, None] - centroids[ids[:, 1:]]
        loss = xp.einsum("ijk,ijk->ij", others, others)
        loss += weight * xp.square(xp.einsum("ijk,ik->ij", others, along))
        first[i : i + _PART] = ids[:, 0]
        second[i : i + _PART] = ids[home.arange(len(part)), 1 + loss.argmin(1)]
    return first, second
