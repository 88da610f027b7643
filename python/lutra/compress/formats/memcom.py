"""MEmCom: rows shared by remainder, each id with a factor of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import _checks, gather
from ..._arrays import is_torch
from ...gather import Pieces
from ._books import train_weights
from ._least_squares import means
from ._pieces import PiecesFormat
from .base import SIZES, Array, Data, Format, Shape, register

ROUNDS = 12


@register
@dataclass(frozen=True)
class MEmCom(PiecesFormat):
    """``row(x) = table[x mod size] * multiplier[x] (+ bias[x])``: one or two numbers an id.

    Pansare et al., Learning Compressed Embeddings for On-Device Inference, MLSys 2022, arXiv 2203.10135.
    Encoded by the leading singular pair of the rows that share a row (alternating least squares), which keeps
    a little more than size / rows of the variance of a trained table; made for training from the start.

    Parameters
    ----------
    size : int, default 4096
        Rows of the table.
    bias : bool, default False
        A number more for each id, added to all columns.
    """

    size: int = 4096
    bias: bool = False

    name: ClassVar[str] = "memcom"
    layer: ClassVar[str] = "MEmCom"
    table_name: ClassVar[str] = "table"
    weights_name: ClassVar[str | None] = "multiplier"

    def __post_init__(self) -> None:
        _checks.integer("size", self.size, 1)
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias must be a bool, got {type(self.bias).__qualname__}")

    def pieces(self, shape: Shape) -> Pieces:
        return Pieces("modulo", (self.size,), shape[1], "sum")

    def arrays(self, shape: Shape) -> dict[str, Array]:
        out = {"table": Array((self.size, shape[1])), "multiplier": Array((shape[0], 1))}
        return {**out, "bias": Array((shape[0], 1))} if self.bias else out

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> MEmCom | None:
        rows, dim = shape
        size = (nbytes // SIZES[dtype] - rows) // max(dim, 1)
        return cls(min(size, max(rows, 1))) if size >= 1 else None

    # ---------------------------------------------------------------- data
    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        weights, n = train_weights(counts, len(table)), len(table)
        place = np.arange(n) % self.size
        # Begin with the longest row of each place: no means, which may cancel.
        order = np.argsort((table * table).sum(1), kind="stable")
        shared = np.zeros((self.size, table.shape[1]), np.float32)
        shared[place[order]] = table[order]
        bias = np.zeros((n, 1), np.float32)
        factor = self._factors(table, shared[place])
        for _ in range(ROUNDS):
            square = means(factor * factor, place, self.size, weights)
            shared = means((table - bias) * factor, place, self.size, weights) / np.maximum(square, 1e-20)
            if self.bias:
                bias = (table - shared[place] * factor).mean(1, keepdims=True)
            factor = self._factors(table - bias, shared[place])
        data = {"table": shared.astype(np.float32), "multiplier": factor}
        return {**data, "bias": bias} if self.bias else data

    @staticmethod
    def _factors(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """For each row the number that makes ``number * y`` nearest to x."""
        return (x * y).sum(1, keepdims=True) / np.maximum((y * y).sum(1, keepdims=True), 1e-20)

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        data = {
            "table": np.random.default_rng(seed).standard_normal((self.size, shape[1]), dtype=np.float32),
            "multiplier": np.ones((shape[0], 1), np.float32),
        }
        return {**data, "bias": np.zeros((shape[0], 1), np.float32)} if self.bias else data

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old rows stay; new ones get the best factor (and bias) for the row they share."""
        x = values.astype(np.float32)
        shared = np.asarray(data["table"], np.float32)[np.arange(rows, rows + len(x)) % self.size]
        out, new = dict(data), {"multiplier": self._factors(x, shared)}
        if self.bias:
            new["bias"] = (x - shared * new["multiplier"]).mean(1, keepdims=True)
        for key, value in new.items():
            out[key] = np.concatenate([data[key][:rows], value.astype(data[key].dtype)])
        return self, out

    # ---------------------------------------------------------------- the bias
    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        out = super().rows(data, shape, ids)
        return out + data["bias"][ids].astype(np.float32) if self.bias else out

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        out = super().lookup(data, shape, ids)
        return out + data["bias"][ids] if self.bias else out

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        options: dict[str, Any] = {
            "mode": mode, "padding_idx": padding_idx, "include_last_offset": include_last_offset,
        }  # fmt: skip
        out = super().bag(data, shape, ids, offsets, weights, sparse=sparse, **options)
        if not self.bias or mode not in ("sum", "mean"):
            return out
        more = gather.bag(data["bias"], ids, offsets, weights, sparse_grad=sparse, **options)
        return out + (more if is_torch(out) else more.astype(out.dtype))
