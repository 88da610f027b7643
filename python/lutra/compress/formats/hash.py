"""Hash embeddings: k rows of a shared table, weighted by the id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import _checks
from ...gather import Pieces
from ...reference import pieces as reference
from ._books import train_weights
from ._least_squares import least_squares, universal
from ._pieces import PiecesFormat
from .base import SIZES, Array, Data, Format, Shape, register

ROUNDS = 4


@register
@dataclass(frozen=True)
class Hash(PiecesFormat):
    """``row(x) = sum_j importance[x, j] table[h_j(x)]``, with k universal hash functions.

    Svenstrup, Hansen, Winther, Hash Embeddings for Efficient Word Representations, NeurIPS 2017. The k
    weights of each id are trained with the table. Made for training from the start: of a trained table, least
    squares (conjugate gradients for the table and exact weights, by turns) keeps one to two times
    size / rows of the variance.

    Parameters
    ----------
    size : int, default 4096
        Rows of the table.
    k : int, default 2
        Hash functions.
    seed : int, default 0
        Of the hash functions.
    """

    size: int = 4096
    k: int = 2
    seed: int = 0

    name: ClassVar[str] = "hash"
    layer: ClassVar[str] = "Hash"
    table_name: ClassVar[str] = "table"
    weights_name: ClassVar[str | None] = "importance"

    def __post_init__(self) -> None:
        _checks.integer("size", self.size, 1)
        _checks.integer("k", self.k, 1, 64)
        _checks.integer("seed", self.seed, 0)

    def pieces(self, shape: Shape) -> Pieces:
        return Pieces("hash", (self.k, self.size, *universal(self.seed, 2 * self.k)), shape[1], "sum")

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return {"table": Array((self.size, shape[1])), "importance": Array((shape[0], self.k))}

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> Hash | None:
        rows, dim = shape
        size = (nbytes // SIZES[dtype] - rows * 2) // max(dim, 1)
        return cls(min(size, max(rows, 1))) if size >= 1 else None

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        weights = train_weights(counts, len(table))
        importance = np.ones((len(table), self.k), np.float32)
        pieces = self.pieces(table.shape)
        shared = least_squares(pieces, table, None, importance, weights, None, 12)
        for _ in range(ROUNDS):
            importance = self._importance(pieces, table, shared)
            shared = least_squares(pieces, table, None, importance, weights, shared, 12)
        return {"table": shared, "importance": importance}

    def _importance(
        self, pieces: Pieces, x: np.ndarray, table: np.ndarray, ids: np.ndarray | None = None
    ) -> np.ndarray:
        """The best weights of each row given the table: a system of k equations a row."""
        ids = np.arange(len(x)) if ids is None else ids
        out = np.empty((len(x), self.k), np.float32)
        for i in range(0, len(x), 4096):
            index, _ = reference.addresses("hash", pieces.numbers, ids[i : i + 4096])
            parts = table[index].astype(np.float64)
            gram = parts @ parts.transpose(0, 2, 1)
            ridge = 1e-6 * (np.trace(gram, axis1=1, axis2=2)[:, None, None] + 1e-12) * np.eye(self.k)
            dots = parts @ x[i : i + 4096, :, None]
            out[i : i + 4096] = np.linalg.solve(gram + ridge, dots)[:, :, 0]
        return out

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        table = np.random.default_rng(seed).standard_normal((self.size, shape[1]), dtype=np.float32)
        return {"table": table, "importance": np.full((shape[0], self.k), self.k**-0.5, np.float32)}

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old rows stay; new ones get the best weights for the table that there is."""
        ids, total = np.arange(rows, rows + len(values)), (rows + len(values), shape[1])
        table = np.asarray(data["table"], np.float32)
        new = self._importance(self.pieces(total), values.astype(np.float32), table, ids)
        old = data["importance"][:rows]
        return self, {"table": data["table"], "importance": np.concatenate([old, new.astype(old.dtype)])}
