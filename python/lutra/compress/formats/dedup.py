"""Deduplicated blocks: blocks of rows that are alike are stored once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import _checks, address
from ...gather import Pieces
from ...index import kmeans
from ._books import train_weights
from ._least_squares import means
from ._pieces import PiecesFormat
from .base import SIZES, Array, Data, Format, Shape, register


@register
@dataclass(frozen=True)
class Dedup(PiecesFormat):
    """``row(x) = table[remap[x div s] s + x mod s]``: blocks of s rows, alike ones stored once.

    ``remap`` takes 4 bytes a block of rows. Encoded by k-means of the blocks, each being a vector of s dim
    numbers: equal blocks are found exactly, alike ones are replaced by their (with counts: weighted) mean.
    With s = 1 it is vector quantization of whole rows.

    Parameters
    ----------
    blocks : int, default 4096
        Blocks that are stored.
    s : int, default 1
        Rows of a block.
    """

    blocks: int = 4096
    s: int = 1

    name: ClassVar[str] = "dedup"
    layer: ClassVar[str] = "Dedup"
    table_name: ClassVar[str] = "table"
    stored_name: ClassVar[str | None] = "remap"

    def __post_init__(self) -> None:
        _checks.integer("blocks", self.blocks, 1, (1 << 31) - 1)
        _checks.integer("s", self.s, 1)

    def pieces(self, shape: Shape) -> Pieces:
        return Pieces("blocks", (self.s, self.blocks), shape[1], "sum")

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return {
            "table": Array((self.blocks * self.s, shape[1])),
            "remap": Array((-(-shape[0] // self.s),), "int32", False),
        }

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> Dedup | None:
        rows, dim = shape
        blocks = (nbytes - 4 * rows) // max(dim * SIZES[dtype], 1)
        return cls(min(blocks, max(rows, 1))) if blocks >= 1 else None

    def _blocks(self, table: np.ndarray) -> np.ndarray:
        """Rows as blocks, (blocks, s * dim); the last is filled up with zeros."""
        missing = -len(table) % self.s
        return np.pad(table, ((0, missing), (0, 0))).reshape(-1, self.s * table.shape[1])

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        x = self._blocks(table)
        stored, remap = np.zeros((self.blocks, x.shape[1]), np.float32), np.arange(len(x), dtype=np.int32)
        distinct, first = np.unique(x, axis=0, return_inverse=True) if len(x) else (x, remap)
        if len(distinct) <= self.blocks:
            stored[: len(distinct)] = distinct
            remap = first.reshape(-1).astype(np.int32)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                centroids = kmeans(x, self.blocks, n_iter=8, seed=seed, progress=progress).centroids
            remap = _nearest(x, centroids)
            weights = train_weights(counts, len(table))
            if weights is not None:
                weights = np.pad(weights, (0, -len(table) % self.s)).reshape(-1, self.s).sum(1)
            used = np.bincount(remap, minlength=self.blocks) > 0
            stored[:] = centroids
            stored[used] = means(x, remap.astype(np.int64), self.blocks, weights)[used]
        return {"table": stored.reshape(-1, table.shape[1]), "remap": remap}

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        remap = rng.integers(0, self.blocks, -(-shape[0] // self.s)).astype(np.int32)
        return {
            "table": rng.standard_normal((self.blocks * self.s, shape[1]), dtype=np.float32), "remap": remap,
        }  # fmt: skip

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old blocks stay where they are; new ones get the nearest of those stored."""
        kept = rows // self.s  # a block that new rows share is chosen anew
        table = np.asarray(data["table"], np.float32)
        ids = np.arange(kept * self.s, rows)
        old = self.rows(data, shape, ids)
        x = self._blocks(np.concatenate([old, values.astype(np.float32)]))
        stored = table.reshape(self.blocks, -1)
        new = _nearest(x, stored)
        if not len(values) and len(new):
            new = np.asarray(data["remap"][kept : kept + len(new)])
        return self, {**data, "remap": np.concatenate([data["remap"][:kept], new]).astype(np.int32)}


def _nearest(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    if not len(x):
        return np.zeros(0, np.int32)
    return address.nearest(x, np.ascontiguousarray(centroids), 1, "l2")[1][:, 0].astype(np.int32)
