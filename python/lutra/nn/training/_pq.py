"""Codes and codebooks as format 'pq' of `lutra.compress`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...compress._table import Table
from ...compress.formats.base import Format, make
from ...quant import _bits
from ._sparse import dtype_name, shape_of

if TYPE_CHECKING:
    from ._base import TrainingMethod


def pq_table(layer: TrainingMethod, codes: Tensor, books: Tensor) -> Table:
    """Codes (rows, m), each below k <= 256, and codebooks (m, k, d), or (1, k, d) for all parts."""
    m, (_, k, d) = codes.shape[1], books.shape
    format = _pq(m, k)
    bits: int = format.bits  # type: ignore[attr-defined]
    whole = books.new_zeros(m, 1 << bits, d)  # entries behind the k-th are in no code
    whole[:, :k] = books
    packed = _bits.pack(codes.cpu().numpy().astype(np.uint8), bits)
    return Table(
        format, shape_of(layer), {"codebooks": whole, "codes": torch.from_numpy(packed).to(books.device)}
    )


def pq_bytes(layer: TrainingMethod, m: int, k: int) -> int:
    return _pq(m, k).nbytes(shape_of(layer), dtype_name(layer))


def _pq(m: int, k: int) -> Format:
    return make("pq", m=m, bits=max(1, (k - 1).bit_length()))
