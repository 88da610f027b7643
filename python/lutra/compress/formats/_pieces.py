"""What formats share whose rows are made of pieces of small tables (`lutra.gather.bag_pieces`)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from ... import gather
from ..._arrays import is_torch
from ...gather import Pieces
from ...gather import _pieces as op
from ...reference import pieces as reference
from .base import Data, Format, Shape, check_ids


class PiecesFormat(Format):
    """Rows, look-ups and bags of a format that says where its pieces lie.

    Subclasses name their arrays: ``table_name``, and where there are any, ``stored_name`` (codes, a remap)
    and ``weights_name`` (factors of each row's pieces).
    """

    table_name: ClassVar[str]
    stored_name: ClassVar[str | None] = None
    weights_name: ClassVar[str | None] = None

    @abstractmethod
    def pieces(self, shape: Shape) -> Pieces:
        """Where the pieces of rows lie."""

    def parts(self, data: Data) -> tuple[Any, Any, Any]:
        """The table of pieces, what is stored of addresses, the factors."""
        return tuple(
            None if name is None else data[name]
            for name in (self.table_name, self.stored_name, self.weights_name)
        )  # type: ignore[return-value]

    # Rows may be turned, or get something added, after the pieces: see OPQ and MEmCom.
    def finish(self, data: Data, rows: Any) -> Any:
        return rows

    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        table, stored, factors = self.parts(data)
        pieces = self.pieces(shape)
        table = table.reshape(-1 if pieces.kind == "robe" else (pieces.table_rows, pieces.width))
        return reference.rows(
            pieces.kind, pieces.numbers, pieces.combine, table, ids, stored, factors, pieces.width
        )

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        table, stored, factors = self.parts(data)
        return op.compose_rows(self.pieces(shape), table, ids, stored, factors)

    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        table = data[self.table_name]
        if is_torch(table) and op.composes(table):
            return self.lookup(data, shape, check_ids(ids.reshape(-1), shape[0]))
        return self.bag(data, shape, ids.reshape(-1, 1), sparse=sparse)

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        if mode not in ("sum", "mean"):  # maxima are of decoded rows
            return super().bag(
                data, shape, ids, offsets, weights, mode=mode, padding_idx=padding_idx,
                include_last_offset=include_last_offset, sparse=sparse,
            )  # fmt: skip
        table, stored, factors = self.parts(data)
        return gather.bag_pieces(
            table, ids, offsets, weights, pieces=self.pieces(shape), rows=shape[0], stored=stored,
            piece_weights=factors, mode=mode, padding_idx=padding_idx,
            include_last_offset=include_last_offset,
        )  # fmt: skip


def divisors(n: int) -> list[int]:
    """Divisors of n, increasing."""
    return [d for d in range(1, n + 1) if n % d == 0]
