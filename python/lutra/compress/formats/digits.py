"""Digits: an id's digits choose the parts of its row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import _checks
from ...gather import Pieces
from ...reference import pieces as reference
from ._books import train_weights
from ._least_squares import means
from ._pieces import PiecesFormat, divisors
from .base import Array, Data, Format, Shape, register


@register
@dataclass(frozen=True)
class Digits(PiecesFormat):
    """Part j of row x is row ``(x div base**j) mod base`` of a table of its own: no codes are stored.

    The subspace embedding of arXiv 2308.08688, by its digits. ``base`` is the least whose m digits tell all
    ids apart (0: found from the rows). Made for training from the start; of a trained table the best digits
    can do are means of many unrelated rows: nearly all of the variance is lost. `Clusters` has codes from
    the table instead.

    Parameters
    ----------
    m : int, default 2
        Digits, parts of a row; divides dim.
    base : int, default 0
    """

    m: int = 2
    base: int = 0

    name: ClassVar[str] = "digits"
    layer: ClassVar[str] = "Digits"
    table_name: ClassVar[str] = "tables"

    def __post_init__(self) -> None:
        _checks.integer("m", self.m, 1)
        _checks.integer("base", self.base, 0)

    def base_for(self, rows: int) -> int:
        if self.base:
            return self.base
        q = int(rows ** (1 / self.m)) + 1
        while q > 1 and (q - 1) ** self.m >= rows:
            q -= 1
        while q**self.m < rows:
            q += 1
        return q

    def entries(self, rows: int) -> int:
        """Rows of a part's table: as many as the base, or (after growing) as the last digit takes."""
        q = self.base_for(rows)
        return max(q, max(rows - 1, 0) // q ** (self.m - 1) + 1)

    def pieces(self, shape: Shape) -> Pieces:
        numbers = (self.m, self.base_for(shape[0]), self.entries(shape[0]))
        return Pieces("digits", numbers, shape[1] // self.m)

    def arrays(self, shape: Shape) -> dict[str, Array]:
        if shape[1] % self.m:
            raise ValueError(f"m is {self.m}; it must divide the dimension, {shape[1]}")
        return {"tables": Array((self.m, self.entries(shape[0]), shape[1] // self.m))}

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> Digits | None:
        for m in divisors(shape[1]):
            if m > 1 and cls(m).nbytes(shape, dtype) <= nbytes:
                return cls(m)
        return None

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        shape = self.arrays(table.shape)["tables"].shape
        pieces, weights = self.pieces(table.shape), train_weights(counts, len(table))
        index, _ = reference.addresses("digits", pieces.numbers, np.arange(len(table)))
        parts = table.reshape(len(table), self.m, table.shape[1] // self.m)
        tables = [means(parts[:, j], index[:, j] - j * shape[1], shape[1], weights) for j in range(self.m)]
        return {"tables": np.stack(tables).astype(np.float32).reshape(shape)}

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        wanted = self.arrays(shape)["tables"].shape
        return {"tables": np.random.default_rng(seed).standard_normal(wanted, dtype=np.float32)}

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """The base stays and so do old rows; what is new are entries for greater last digits."""
        fixed = Digits(self.m, self.base_for(shape[0]))
        total, tables = rows + len(values), data["tables"]
        grown = np.zeros(fixed.arrays((total, shape[1]))["tables"].shape, np.float32)
        kept = min(tables.shape[1], grown.shape[1])
        grown[:, :kept] = tables[:, :kept]
        if grown.shape[1] > kept:
            last = np.arange(rows, total) // fixed.base ** (self.m - 1) - kept
            mine = last >= 0
            part = values.astype(np.float32).reshape(len(values), self.m, shape[1] // self.m)[mine, -1]
            grown[-1, kept:] = means(part, last[mine], grown.shape[1] - kept, None)
        return fixed, {"tables": grown.astype(tables.dtype)}
