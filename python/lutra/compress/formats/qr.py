"""Quotient and remainder: two small tables, combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import _checks
from ...gather import Pieces
from ._books import train_weights
from ._least_squares import means
from ._pieces import PiecesFormat
from .base import Array, Data, Format, Shape, register

ROUNDS = 12


@register
@dataclass(frozen=True)
class QR(PiecesFormat):
    """``row(x) = quotients[x div c] + remainders[x mod c]``, or their product element by element.

    Shi, Mudigere, Naumov, Yang, Compositional Embeddings Using Complementary Partitions, arXiv 1909.02107.
    Every id has a row of its own, from two tables of ceil(rows / c) and c rows (``table`` holds both, the
    quotients first). Made for training from the start: ids that share a row say nothing of one another, so
    of a trained
    table least squares (alternating) keeps about (rows of the two tables) / (rows) of the variance and loses
    the rest.

    Parameters
    ----------
    c : int, default 1024
        Remainders.
    combine : {'sum', 'product'}, default 'sum'
    """

    c: int = 1024
    combine: str = "sum"

    name: ClassVar[str] = "qr"
    layer: ClassVar[str] = "QR"
    table_name: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        _checks.integer("c", self.c, 1)
        _checks.choice("combine", self.combine, {"sum": 0, "product": 1})

    def quotients(self, rows: int) -> int:
        return -(-rows // self.c)

    def pieces(self, shape: Shape) -> Pieces:
        return Pieces("qr", (self.c, self.quotients(shape[0])), shape[1], self.combine)

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return {"table": Array((self.quotients(shape[0]) + self.c, shape[1]))}

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> QR | None:
        """The most rows within the budget: many remainders, few quotients."""
        row = cls(1).nbytes((0, shape[1]), dtype)
        c = min(nbytes // row if row else 0, max(shape[0], 1))
        while c > 0 and c * c >= shape[0]:  # fewer remainders than that make the table larger again
            over = cls(c).nbytes(shape, dtype) - nbytes
            if over <= 0:
                return cls(c)
            c -= max(1, over // row // 2)
        return None

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        n, x = len(table), np.arange(len(table))
        w = train_weights(counts, n)
        quotient, remainder, of = x // self.c, x % self.c, self.quotients(n)
        b = np.zeros((self.c, table.shape[1]), np.float32)
        if self.combine == "sum":
            for _ in range(ROUNDS):
                a = means(table - b[remainder], quotient, of, w)
                b = means(table - a[quotient], remainder, self.c, w)
        else:
            b += np.random.default_rng(seed).standard_normal(b.shape, dtype=np.float32)
            for _ in range(ROUNDS):  # each column: a rank of one, by turns
                a = _factor(table, b[remainder], quotient, of, w)
                b = _factor(table, a[quotient], remainder, self.c, w)
        if not n:
            a = np.zeros((0, table.shape[1]), np.float32)
        return {"table": np.concatenate([a, b])}

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        wanted = self.arrays(shape)["table"].shape
        table = np.random.default_rng(seed).standard_normal(wanted, dtype=np.float32)
        return {"table": table / np.float32(2**0.5) if self.combine == "sum" else table}

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old rows stay, new quotients are fitted; new ids of an old quotient take its row."""
        old, table = self.quotients(shape[0]), np.asarray(data["table"], np.float32)
        a, b = table[:old], table[old:]
        total = rows + len(values)
        keep, of = min(self.quotients(rows), old), self.quotients(total)
        x = np.arange(rows, total)
        new = x // self.c - keep
        mine = new >= 0
        if of > keep:
            v, r = values[mine].astype(np.float32), b[x[mine] % self.c]
            if self.combine == "sum":
                more = means(v - r, new[mine], of - keep, None)
            else:
                more = _factor(v, r, new[mine], of - keep, None)
            a = np.concatenate([a[:keep], more])
        else:
            a = a[:of]
        return self, {"table": np.concatenate([a, b]).astype(data["table"].dtype)}


def _factor(x: np.ndarray, y: np.ndarray, groups: np.ndarray, count: int, w: np.ndarray | None) -> np.ndarray:
    """For each group the row a that makes ``a * y`` nearest to x."""
    return means(x * y, groups, count, w) / np.maximum(means(y * y, groups, count, w), 1e-12)
