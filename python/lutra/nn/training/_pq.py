"""Codes and codebooks as format 'pq' of `lutra.compress`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...compress._table import Table
from ...compress.formats.base import Format, make
from ._sparse import dtype_name, shape_of

if TYPE_CHECKING:
    from ._base import TrainingMethod


def pq_table(layer: TrainingMethod, codes: Tensor, books: Tensor) -> Table:
    raise NotImplementedError


def pq_bytes(layer: TrainingMethod, m: int, k: int) -> int:
    return _pq(m, k).nbytes(shape_of(layer), dtype_name(layer))


def _pq(m: int, k: int) -> Format:
    return make("pq", m=m, bits=max(1, (k - 1).bit_length()))
