"""Codebooks for the anisotropic loss: inner products with the queries that find a vector count more."""

from __future__ import annotations

import numpy as np

from ..index._progress import Progress
from ._kernels import pq_entries


def weights(directions: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors along ``directions`` and how much more an error along them counts (0: as any other).

    The definition is that of csrc/address/pq_encode.h.
    """
    squares = np.square(directions, dtype=np.float64).sum(1)
    present = np.where(squares > 0, squares, 1)
    share = np.minimum(threshold * threshold / present, 0.81)
    more = np.maximum((directions.shape[1] - 1) * share / (1 - share) - 1, 0)
    return directions / np.sqrt(present)[:, None], np.where(squares > 0, more, 0)


def fit(
    points: np.ndarray,
    directions: np.ndarray,
    books: np.ndarray,
    threshold: float,
    n_iter: int,
    bar: Progress,
) -> np.ndarray:
    """Codebooks (m, ksub, dsub) that lower the loss of ``points``: codes and centroids in turn.

    Given the codes, the loss is quadratic in the centroids; those of a sub-space have a least-squares
    solution each, given the other sub-spaces, so that no step raises the loss.
    """
    unit, more = weights(directions, threshold)
    before = None
    for i in range(n_iter):
        entries = pq_entries(points, books, directions, threshold)
        if before is not None and np.array_equal(entries, before):
            bar.tick(n_iter - i)
            break
        before = entries
        books = update(points.astype(np.float64), unit, more, entries, books)
        bar.tick()
    return books


def update(
    points: np.ndarray, unit: np.ndarray, more: np.ndarray, entries: np.ndarray, books: np.ndarray
) -> np.ndarray:
    """The best centroids for given codes, one sub-space after the other."""
    m, ksub, dsub = books.shape
    new = books.astype(np.float64)
    along = np.zeros(len(points))
    for j in range(m):
        part = slice(j * dsub, (j + 1) * dsub)
        along += ((points[:, part] - new[j, entries[:, j]]) * unit[:, part]).sum(1)
    for j in range(m):
        part, codes = slice(j * dsub, (j + 1) * dsub), entries[:, j]
        x, u = points[:, part], unit[:, part]
        others = along - ((x - new[j, codes]) * u).sum(1)
        target = x + (more * (others + (x * u).sum(1)))[:, None] * u
        counts = np.bincount(codes, minlength=ksub)
        left, right = np.empty((ksub, dsub, dsub)), np.empty((ksub, dsub))
        for a in range(dsub):
            right[:, a] = np.bincount(codes, target[:, a], ksub)
            for b in range(a, dsub):
                left[:, a, b] = left[:, b, a] = np.bincount(codes, more * u[:, a] * u[:, b], ksub)
        used = counts > 0
        left += counts[:, None, None] * np.eye(dsub)
        new[j, used] = np.linalg.solve(left[used], right[used, :, None])[:, :, 0]
        along = others + ((x - new[j, codes]) * u).sum(1)
    return new.astype(np.float32)
