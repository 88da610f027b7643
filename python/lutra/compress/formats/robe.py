"""ROBE: pieces of rows begin anywhere in one array of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import _checks
from ...gather import Pieces
from ._books import train_weights
from ._least_squares import least_squares, universal
from ._pieces import PiecesFormat, divisors
from .base import SIZES, Array, Data, Format, Shape, register


@register
@dataclass(frozen=True)
class ROBE(PiecesFormat):
    """Random offset block embedding: a row is dim / block blocks of one array, at hashed places, with signs.

    Desai, Chou, Shrivastava, Random Offset Block Embedding Array, MLSys 2022, arXiv 2108.02191. Block j of
    row x begins at ``((A x + B j + C) mod 2038074743) mod size`` and goes round the array's end. Nothing
    grows
    with the rows. Made for training from the start: of a trained table, least squares (conjugate gradients)
    keeps about size / (rows dim) of the variance.

    Parameters
    ----------
    size : int, default 65536
        Elements of the array.
    block : int, default 16
        Elements of a block; divides dim. Long blocks are read faster.
    seed : int, default 0
        Of the hash functions.
    """

    size: int = 65536
    block: int = 16
    seed: int = 0

    name: ClassVar[str] = "robe"
    layer: ClassVar[str] = "ROBE"
    table_name: ClassVar[str] = "memory"

    def __post_init__(self) -> None:
        _checks.integer("size", self.size, 1)
        _checks.integer("block", self.block, 1)
        _checks.integer("seed", self.seed, 0)
        if self.block > self.size:
            raise ValueError(f"block is {self.block}; it must be at most size, {self.size}")

    def pieces(self, shape: Shape) -> Pieces:
        return Pieces("robe", (shape[1] // self.block, self.size, *universal(self.seed, 6)), self.block)

    def arrays(self, shape: Shape) -> dict[str, Array]:
        if shape[1] % self.block:
            raise ValueError(f"block is {self.block}; it must divide the dimension, {shape[1]}")
        return {"memory": Array((self.size,))}

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> ROBE | None:
        size = min(nbytes // SIZES[dtype], max(shape[0] * shape[1], 1))
        if size < shape[1]:  # less than one row: no table any more
            return None
        blocks = [d for d in divisors(shape[1]) if d <= min(size, 32)]
        return cls(size, blocks[-1])

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        self.arrays(table.shape)
        weights = train_weights(counts, len(table))
        return {"memory": least_squares(self.pieces(table.shape), table, weights=weights)}

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        self.arrays(shape)
        return {"memory": np.random.default_rng(seed).standard_normal(self.size, dtype=np.float32)}

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """The array stays: old rows are what they were, new ones what their hashes say."""
        return self, dict(data)
