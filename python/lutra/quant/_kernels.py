"""The kernels of this package on float32 NumPy arrays, or the reference where nothing is compiled."""

from __future__ import annotations

import numpy as np

from .. import _backend
from ..reference import quant as reference

ROUNDS = 10  # of choosing again each entry of a code, given the others


def multiply(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rows (n, a) times (a, b), float32, each row by itself: its result never depends on the other rows."""
    x, matrix = np.ascontiguousarray(x), np.ascontiguousarray(matrix)
    if _backend.core is None:
        return reference.linear(x, matrix)
    (n, a), b = x.shape, matrix.shape[1]
    y = np.empty((n, b), np.float32)
    _backend.core.linear(x, matrix, n, a, b, y)
    return y


def pq_entries(
    x: np.ndarray, books: np.ndarray, directions: np.ndarray | None = None, threshold: float = 0.0
) -> np.ndarray:
    """Entries (n, m) uint8 of vectors (n, m * dsub), see csrc/address/pq_encode.h."""
    x = np.ascontiguousarray(x)
    if directions is not None:
        directions = np.ascontiguousarray(directions)
    m, ksub, dsub = books.shape
    out = np.empty((len(x), m), np.uint8)
    if _backend.core is None:
        step = max(1, (1 << 22) // (m * ksub * dsub))
        for i in range(0, len(x), step):
            toward = None if directions is None else directions[i : i + step]
            out[i : i + step] = reference.pq_encode(x[i : i + step], books, toward, threshold, ROUNDS)
        return out
    _backend.core.pq_encode(x, books, len(x), m, ksub, dsub, out, directions, threshold, ROUNDS)
    return out


def pq_vectors(entries: np.ndarray, books: np.ndarray) -> np.ndarray:
    """Vectors (n, m * dsub) of entries (n, m), each below ksub, see csrc/address/pq_decode.h."""
    (n, m), (_, ksub, dsub) = entries.shape, books.shape
    if _backend.core is None:
        return reference.pq_decode(entries, books)
    x = np.empty((n, m * dsub), np.float32)
    _backend.core.pq_decode(entries, np.ascontiguousarray(books), n, m, ksub, dsub, x)
    return x


def rq_entries(x: np.ndarray, books: np.ndarray, gram: np.ndarray, beam: int) -> np.ndarray:
    """Entries (n, m) uint8 of vectors (n, d), see csrc/address/rq_encode.h; ``gram`` is from `rq_gram`."""
    m, ksub, d = books.shape
    centroids = books.reshape(m * ksub, d)
    columns, norms = np.ascontiguousarray(centroids.T), np.ascontiguousarray(np.diagonal(gram))
    out = np.empty((len(x), 1, m), np.uint8)
    step = max(16, (1 << 21) // (m * ksub))
    for i in range(0, len(x), step):
        dots = multiply(x[i : i + step], columns)
        if _backend.core is None:
            out[i : i + step], _ = reference.rq_encode(dots, norms, gram, m, beam)
        else:
            _backend.core.rq_encode(
                dots, norms, gram, len(dots), m, ksub, beam, 0, m, 1, 1, None, None, out[i : i + step], None
            )
    return out[:, 0]


def rq_extend(
    dots: np.ndarray, gram: np.ndarray, m: int, beam: int, codes: np.ndarray, reached: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Partial codes (n, width, j) and scores with one more of m codebooks, see csrc/address/rq_encode.h.

    ``dots`` (n, ksub) are of codebook j alone, and ``gram`` holds its columns and those of codebooks before.
    """
    (n, width, j), ksub = codes.shape, dots.shape[1]
    norms, keep = np.ascontiguousarray(np.diagonal(gram)), min(beam, width * ksub)
    if _backend.core is None:
        return reference.rq_encode(dots, norms, gram, m, beam, j, j + 1, codes, reached, keep)
    out, scores = np.empty((n, keep, j + 1), np.uint8), np.empty((n, keep), np.float32)
    _backend.core.rq_encode(
        dots, norms, gram, n, m, ksub, beam, j, j + 1, width, keep, codes, reached, out, scores
    )
    return out, scores


def rq_gram(books: np.ndarray) -> np.ndarray:
    """Inner products of all centroids (m, ksub, d): (m * ksub, m * ksub)."""
    centroids = books.reshape(-1, books.shape[2])
    return multiply(centroids, centroids.T)
