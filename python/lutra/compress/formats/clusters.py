"""Subspace clusters: product quantization with large code books."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import address
from ...index._home import HOST
from ...index._kmeans import lloyd
from ...index._progress import Progress
from ._books import enough, train_weights
from ._codes import CodesFormat, pack
from ._least_squares import means
from ._pieces import divisors
from .base import Data, Shape, register

ROUNDS = 12  # of k-means at most
GAIN = 0.003  # a round that lowers the error by less is the last
POINTS = 256  # rows for each centroid that k-means sees at most


@register
@dataclass(frozen=True)
class Clusters(CodesFormat):
    """Part j of a row is one of ``2**bits`` centroids of a trained table's parts, up to 2**16 of them.

    The subspace embedding of arXiv 2308.08688 with codes from k-means: few wide parts, many clusters; `PQ`
    has many narrow parts and at most 256. Codes are packed to their bits. Cost of encoding: 2 dim 2**bits
    flops a row and round of k-means.

    Parameters
    ----------
    m : int, default 8
        Parts; divides dim.
    bits : int, default 10
        1 to 16.
    """

    m: int = 8
    bits: int = 10

    name: ClassVar[str] = "clusters"
    layer: ClassVar[str] = "Clusters"
    table_name: ClassVar[str] = "centroids"
    most_bits: ClassVar[int] = 16

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> Clusters | None:
        """The largest code books that take at most half of the budget, then the most parts."""
        best = None
        for bits in range(1, 13):
            if 1 << bits > max(shape[0], 2):
                break
            for m in divisors(shape[1]):
                one = cls(m, bits)
                books = one.arrays(shape)["centroids"].nbytes(dtype)
                if one.nbytes(shape, dtype) <= nbytes and (bits == 1 or 2 * books <= nbytes):
                    best = one
        return best

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        wanted = self.arrays(table.shape)["centroids"].shape
        weights, n, width = train_weights(counts, len(table)), len(table), wanted[2]
        centroids, entries = np.zeros(wanted, np.float32), np.zeros((n, self.m), np.int64)
        with Progress(self.m * ROUNDS, "clusters", progress) as bar:
            for j in range(self.m):
                part = np.ascontiguousarray(table[:, j * width : (j + 1) * width])
                centroids[j] = _rounds(enough(part, self.ksub, seed), self.ksub, (seed, j), bar)
                entries[:, j] = _nearest(part, centroids[j])
                if weights is not None and n:
                    used = np.bincount(entries[:, j], minlength=self.ksub) > 0
                    centroids[j][used] = means(part, entries[:, j], self.ksub, weights)[used]
                    entries[:, j] = _nearest(part, centroids[j])
        return {"centroids": centroids, "codes": pack(entries, self.bits)}

    def _entries(self, x: np.ndarray, books: np.ndarray) -> np.ndarray:
        parts = x.reshape(len(x), self.m, -1) if len(x) else np.zeros((0, self.m, books.shape[2]), np.float32)
        return np.stack([_nearest(np.ascontiguousarray(parts[:, j]), books[j]) for j in range(self.m)], 1)


def _rounds(x: np.ndarray, k: int, seed: tuple[int, int], bar: Progress) -> np.ndarray:
    """Centroids (k, d) by k-means, until a round gains little."""
    rng = np.random.default_rng(seed)
    points = x[np.sort(rng.choice(len(x), POINTS * k, replace=False))] if len(x) > POINTS * k else x
    centroids, before, quiet = None, np.inf, Progress(1, "", False)
    for i in range(ROUNDS):
        centroids, errors = lloyd(HOST, points, k, 1, "random", False, rng, quiet, start=centroids)
        if errors[0] >= (1 - GAIN) * before:
            bar.tick(ROUNDS - i)
            break
        before = errors[0]
        bar.tick()
    assert centroids is not None
    return centroids


def _nearest(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    if not len(x):
        return np.zeros(0, np.int64)
    return address.nearest(x, np.ascontiguousarray(centroids), 1, "l2")[1][:, 0]
