"""Subspace clusters: product quantization with large code books."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import _checks, address
from ...gather import Pieces
from ...index import kmeans
from ._books import enough, pack_wide, train_weights
from ._least_squares import means
from ._pieces import PiecesFormat, divisors
from .base import Array, Data, Format, Shape, register


@register
@dataclass(frozen=True)
class Clusters(PiecesFormat):
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
    stored_name: ClassVar[str | None] = "codes"

    def __post_init__(self) -> None:
        _checks.integer("m", self.m, 1)
        _checks.integer("bits", self.bits, 1, 16)

    def pieces(self, shape: Shape) -> Pieces:
        return Pieces("codes", (self.m, self.bits), shape[1] // self.m)

    def arrays(self, shape: Shape) -> dict[str, Array]:
        rows, dim = shape
        if dim % self.m:
            raise ValueError(f"m is {self.m}; it must divide the dimension, {dim}")
        return {
            "centroids": Array((self.m, 1 << self.bits, dim // self.m)),
            "codes": Array((rows, (self.m * self.bits + 7) // 8), "uint8", False),
        }

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
        shape = self.arrays(table.shape)["centroids"].shape
        weights, n, width = train_weights(counts, len(table)), len(table), shape[2]
        centroids, entries = np.zeros(shape, np.float32), np.zeros((n, self.m), np.int64)
        for j in range(self.m):
            part = np.ascontiguousarray(table[:, j * width : (j + 1) * width])
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # few points for the centroids: the caller's choice
                points = enough(part, shape[1], seed)
                centroids[j] = kmeans(points, shape[1], n_iter=12, seed=seed + j, progress=progress).centroids
            entries[:, j] = _nearest(part, centroids[j])
            if weights is not None and n:
                used = np.bincount(entries[:, j], minlength=shape[1]) > 0
                centroids[j][used] = means(part, entries[:, j], shape[1], weights)[used]
                entries[:, j] = _nearest(part, centroids[j])
        return {"centroids": centroids, "codes": pack_wide(entries, self.bits)}

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        entries = rng.integers(0, 1 << self.bits, (shape[0], self.m))
        wanted = self.arrays(shape)["centroids"].shape
        return {
            "centroids": rng.standard_normal(wanted, dtype=np.float32),
            "codes": pack_wide(entries, self.bits),
        }

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old rows keep their codes, new ones get the nearest of the same centroids."""
        x = values.astype(np.float32).reshape(len(values), self.m, shape[1] // self.m)
        books = np.asarray(data["centroids"], np.float32)
        new = [_nearest(np.ascontiguousarray(x[:, j]), books[j]) for j in range(self.m)]
        codes = pack_wide(np.stack(new, 1), self.bits)
        return self, {**data, "codes": np.concatenate([data["codes"][:rows], codes])}


def _nearest(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    if not len(x):
        return np.zeros(0, np.int64)
    return address.nearest(x, np.ascontiguousarray(centroids), 1, "l2")[1][:, 0]
