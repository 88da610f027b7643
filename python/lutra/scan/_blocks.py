"""The scan of panels by block-sparse queries: the call into the kernels, for `lutra.index.Blocks`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _backend
from ..reference import blocks as reference
from ..reference.scan import nan_message

_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "uint8": 4}


class Rows(NamedTuple):
    """Checked block-sparse queries, NumPy: query i has the blocks ``blocks[ptr[i] : ptr[i + 1]]``.

    Attributes
    ----------
    ptr : (nq + 1,) int64
    blocks : (nnz,) int32, rising within a query
    values : (nnz, width) float32
    """

    ptr: np.ndarray
    blocks: np.ndarray
    values: np.ndarray


def screened(k: int) -> int:
    """How many of the best by rounded tables are scored by exact ones."""
    return k + k // 2 + 24


def dense_rows(q: np.ndarray, width: int) -> Rows:
    """The blocks of dense queries (nq, num_blocks * width) that are not zero."""
    parts = q.reshape(len(q), -1, width)
    query, block = np.nonzero(parts.any(2))
    ptr = np.zeros(len(q) + 1, np.int64)
    np.cumsum(np.bincount(query, minlength=len(q)), out=ptr[1:])
    return Rows(ptr, block.astype(np.int32), np.ascontiguousarray(parts[query, block]))


def scan(
    rows: Rows,
    panels: Any,
    k: int,
    scale: np.ndarray | None = None,
    books: np.ndarray | None = None,
    keep: np.ndarray | None = None,
) -> tuple[Any, Any]:
    """Scores and positions (nq, k), see csrc/scan/blocks.h and, with ``books``, csrc/scan/blocks_pq.h.

    ``panels`` : lutra.index._panels.Panels. ``scale`` (n,) or (n, 1). ``books`` (sub-spaces, dsub, 256); the
    panels then hold codes, and tables are rounded for a choice of the best `screened(k)`.
    """
    if scale is not None:
        scale = scale.reshape(-1)
    if _backend.core is None:
        books = None if books is None else books.transpose(0, 2, 1)
        return reference.blocks(*rows, panels.used, panels.n, k, scale, books, keep)
    nq = len(rows.ptr) - 1
    num_blocks, depth, lanes = panels.shape
    scores, ids = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    shape = (nq, rows.values.shape[1], num_blocks, lanes)
    if books is None:
        bad = _backend.core.blocks(
            *rows, *shape, panels.addresses, panels.n, _TYPES[panels.dtype.name], scale, keep, k, scores, ids
        )
    else:
        bad = _backend.core.blocks_pq(
            *rows, *shape, panels.addresses, panels.n, depth, books, keep, k, screened(k), scores, ids
        )
    if bad >= 0:
        raise ValueError(nan_message("the index", bad))
    return scores, ids
