"""SOAR: a second list for each vector, found where the first one's residual misleads a search."""

from __future__ import annotations

import numpy as np

from .. import address

_NEAR = 32  # centroids that are looked at
_PART = 1 << 12  # vectors at a time


def second_lists(x: np.ndarray, centroids: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """First and second list of float32 vectors.

    The first is the nearest centroid c, with residual r = x - c. The second minimises, over the other
    centroids c' with r' = x - c'::

        |r'|^2 + weight <r', r / |r|>^2

    among the 32 nearest to x. The minimum is no farther than sqrt(1 + weight) times the second nearest
    centroid, so it is among them but for crowds of centroids at nearly one distance.

    References
    ----------
    Sun et al., SOAR: improved indexing for approximate nearest neighbor search, NeurIPS 2023.
    """
    n = len(x)
    first, second = np.empty(n, np.int64), np.empty(n, np.int64)
    near = min(_NEAR, len(centroids))
    for i in range(0, n, _PART):
        part = x[i : i + _PART]
        ids = address.nearest(part, centroids, near, "l2").ids
        residual = part - centroids[ids[:, 0]]
        norm = np.sqrt(np.einsum("ij,ij->i", residual, residual))
        along = residual / np.where(norm > 0, norm, 1)[:, None]
        others = part[:, None] - centroids[ids[:, 1:]]
        loss = np.einsum("ijk,ijk->ij", others, others)
        loss += weight * np.square(np.einsum("ijk,ik->ij", others, along))
        first[i : i + _PART] = ids[:, 0]
        second[i : i + _PART] = ids[np.arange(len(part)), 1 + loss.argmin(1)]
    return first, second
