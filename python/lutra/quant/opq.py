"""OPQ: product quantization after a rotation that is learnt for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from ..index._progress import Progress
from ._anisotropic import fit
from ._kernels import multiply, pq_entries, pq_vectors
from ._rotation import check_rotation
from .base import Tables, training_home
from .pq import PQ


class OPQ(PQ):
    """Optimized product quantization: a learnt rotation, then `PQ`.

    Parameters
    ----------
    d, m, bits, loss, threshold, seed
        As `PQ`.

    Notes
    -----
    Training starts from principal components, dealt to the sub-spaces so that the products of their variances
    are alike, and then alternates: codebooks for the rotated vectors; the rotation that brings the vectors
    nearest to what their codes stand for (orthogonal Procrustes). Rotated queries are scanned with the same
    tables as `PQ`'s; a query costs 2 d**2 flops more.

    References
    ----------
    Ge, He, Ke, Sun, Optimized product quantization for approximate nearest neighbor search, CVPR 2013.
    """

    def __init__(
        self, d: int, m: int, bits: int = 8, *, loss: str = "l2", threshold: float = 0.2, seed: int = 0
    ) -> None:
        super().__init__(d, m, bits, loss=loss, threshold=threshold, seed=seed)
        self._rotation: np.ndarray | None = None

    @property
    def rotation(self) -> np.ndarray | None:
        """The rotation, shape (d, d), float32: ``x @ rotation.T`` is what is coded; None before training."""
        return self._rotation

    def train(
        self,
        x: Any,
        *,
        n_iter: int = 25,
        init: str = "random",
        max_points_per_centroid: int | None = 256,
        loss: str | None = None,
        threshold: float | None = None,
        directions: Any = None,
        rotations: int = 40,
        progress: bool | None = None,
    ) -> OPQ:
        """Learn the rotation and the codebooks.

        Parameters
        ----------
        x, n_iter, init, max_points_per_centroid, loss, threshold, directions, progress
            As `PQ.train`; ``n_iter`` is that of the last codebooks. The rotation is always that of the
            loss 'l2'.
        rotations : int, default 40
            Rounds in which the rotation is improved.

        Returns
        -------
        OPQ
            Itself.

        Raises
        ------
        TypeError, ValueError
            As `PQ.train`.

        Notes
        -----
        Cost: (rotations + n_iter) times 2 d 2**bits flops for each vector, and 3 products of d**2 flops.
        """
        n_iter = _checks.integer("n_iter", n_iter, 1)
        rotations = _checks.integer("rotations", rotations, 0)
        self._check_init(init)
        loss, threshold = self._training_loss(loss, threshold, directions)
        points, home = self._sample(x, max_points_per_centroid), training_home(x)
        rotation = principal_rotation(points, self.m)
        few = 4
        toward = points if directions is None else self._sample_directions(directions, x, len(points))
        steps = rotations + self.m * (few + n_iter) + (n_iter if loss != "l2" else 0)
        with Progress(steps, "OPQ training", progress) as bar:
            rotated = multiply(points, rotation.T)
            books = self._kmeans(rotated, few, init, bar, home)
            for _ in range(rotations):
                entries = pq_entries(rotated, books)
                books = update(rotated, entries, books)
                decoded = pq_vectors(entries, books)
                u, _, vt = np.linalg.svd(decoded.T.astype(np.float64) @ points.astype(np.float64))
                rotation = (u @ vt).astype(np.float32)
                rotated = multiply(points, rotation.T)
                bar.tick()
            books = self._kmeans(rotated, n_iter, init, bar, home)
            if loss != "l2":
                books = fit(rotated, multiply(toward, rotation.T), books, threshold, n_iter, bar)
        self._rotation, self._codebooks = rotation, books
        self.loss, self.threshold = loss, threshold
        return self

    # ---- codes
    @property
    def _turn(self) -> np.ndarray:
        assert self._rotation is not None
        return self._rotation.T

    def _turned(self, x: np.ndarray) -> np.ndarray:
        return multiply(x, self._turn)

    def _turned_there(self, kind: Any, x: Any) -> Any:
        assert self._rotation is not None
        return kind.dense(x @ self._copies.get(kind, "rotation", self._rotation, x).T)

    def _decode_there(self, kind: Any, entries: Any) -> Any:
        assert self._rotation is not None
        turned = super()._decode_there(kind, entries)
        return turned @ self._copies.get(kind, "rotation", self._rotation, turned)

    def _entries_of(self, x: np.ndarray, directions: np.ndarray | None) -> np.ndarray:
        turned = None if directions is None else self._turned(directions)
        return super()._entries_of(self._turned(x), turned)

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        assert self._rotation is not None
        return multiply(super()._decode(codes), self._rotation)

    def _norms(self, codes: np.ndarray) -> np.ndarray:
        x = super()._decode(codes)  # the rotation changes no norm
        return np.einsum("ij,ij->i", x, x)

    def _tables(self, q: np.ndarray, metric: str) -> Tables:
        return super()._tables(self._turned(q), metric)

    # ---- files
    def _layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {**super()._layout(), "rotation": ("F32", (self.d, self.d))}

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = super()._tensors()
        if self._rotation is not None:
            tensors["rotation"] = self._rotation
        return tensors

    def _assign(self, tensors: dict[str, np.ndarray]) -> None:
        check_rotation(tensors["rotation"], "rotation")
        super()._assign(tensors)
        self._rotation = tensors["rotation"]


def principal_rotation(points: np.ndarray, m: int) -> np.ndarray:
    """Principal components (d, d) as rows, dealt to m sub-spaces of balanced products of variances."""
    d = points.shape[1]
    centred = points.astype(np.float64) - points.mean(0, dtype=np.float64)
    values, columns = np.linalg.eigh(centred.T @ centred / max(1, len(points)))
    values = np.log(np.maximum(values, 1e-12 * max(values[-1], 1e-300)))
    buckets: list[list[int]] = [[] for _ in range(m)]
    product = np.zeros(m)
    for i in np.argsort(-values, kind="stable").tolist():
        free = [b for b in range(m) if len(buckets[b]) < d // m]
        bucket = min(free, key=lambda b: (product[b], b))
        buckets[bucket].append(i)
        product[bucket] += values[i] - values.min()
    return columns.T[np.concatenate(buckets).astype(np.int64)].astype(np.float32)


def update(points: np.ndarray, entries: np.ndarray, books: np.ndarray) -> np.ndarray:
    """The means of the sub-vectors that have each entry; an entry that nobody has keeps its centroid."""
    m, ksub, dsub = books.shape
    new = books.copy()
    for j in range(m):
        counts = np.bincount(entries[:, j], minlength=ksub)
        used = counts > 0
        for i in range(dsub):
            sums = np.bincount(entries[:, j], weights=points[:, j * dsub + i], minlength=ksub)
            new[j, used, i] = sums[used] / counts[used]
    return new
