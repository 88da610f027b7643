"""What formats that are composed of other bags share."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import gather
from ..._arrays import is_torch


def same_padding(padding_idx: int | None, rows: int) -> int | None:
    """``padding_idx`` as an id that is not negative; a ValueError where it is no row."""
    if padding_idx is None:
        return None
    return gather._bag._padding(padding_idx, rows)


def bag_counts(
    ids: Any, offsets: Any, weights: Any, like: Any, padding: int | None, include_last_offset: bool
) -> Any:
    """(bags, 1): how many entries a bag holds, padding left out, or the sum of their weights."""
    if weights is None and padding is None and offsets is None:
        shape, length = (ids.shape[0], 1), ids.shape[1]
        return like.new_full(shape, length) if is_torch(like) else np.full(shape, length, like.dtype)
    if is_torch(like):
        import torch

        ones = torch.ones(2, 1, dtype=like.dtype, device=like.device)
        pads = torch.zeros_like(ids) if padding is None else (ids == padding).to(ids.dtype)
    else:
        ones = np.ones((2, 1), like.dtype)
        pads = np.zeros_like(ids) if padding is None else (ids == padding).astype(ids.dtype)
    return gather.bag(
        ones, pads, offsets, weights, padding_idx=None if padding is None else 1,
        include_last_offset=include_last_offset,
    )  # fmt: skip


def at_least_one(counts: Any) -> Any:
    return counts.clamp(min=1) if is_torch(counts) else np.maximum(counts, 1)


def index_type(n: int) -> str:
    """The smallest integer type that NumPy and torch share and that holds [0, n)."""
    return "uint8" if n <= 1 << 8 else "int16" if n <= 1 << 15 else "int32" if n <= 1 << 31 else "int64"


def row_weights(counts: np.ndarray | None, rows: int) -> np.ndarray:
    """Weights of rows in a weighted decomposition: the counts, with a floor for rows that never occurred."""
    if counts is None:
        return np.ones(rows)
    return counts + 1e-3 * max(float(counts.mean()) if rows else 0.0, 1e-9)


def principal(x: np.ndarray, weights: np.ndarray, rank: int) -> np.ndarray:
    """The ``rank`` leading right singular vectors of the weighted rows, (rank, dim) float64.

    They are eigenvectors of a (dim, dim) matrix, so that no tall factor is needed.
    """
    wide = x.astype(np.float64)
    _, vectors = np.linalg.eigh((wide * weights[:, None]).T @ wide)
    return np.ascontiguousarray(vectors[:, ::-1][:, :rank].T)
