"""The best table of pieces for given rows, where addresses are given: least squares."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import gather
from ...gather import Pieces
from ...reference import pieces as reference

STEPS = 24


def spread(pieces: Pieces, grad: np.ndarray, stored: Any, factors: Any) -> np.ndarray:
    """The transpose of decoding all rows: values (rows, dim) added up where their pieces lie."""
    rows = len(grad)
    index, signs = reference.addresses(pieces.kind, pieces.numbers, np.arange(rows), stored)
    out_rows = pieces.table_rows
    if pieces.kind == "robe":
        parts = grad.reshape(rows, pieces.m, pieces.width) * signs[..., None]
        at = (index[..., None] + np.arange(pieces.width)) % out_rows
        return np.bincount(at.reshape(-1), parts.reshape(-1), out_rows).astype(np.float32)
    if pieces.combine == "concat":
        parts = grad.reshape(rows * pieces.m, pieces.width)
        return gather.bag_grad(np.ascontiguousarray(parts), index.reshape(-1, 1), rows=out_rows)
    # Every piece takes the whole row: bags of one row's pieces.
    return gather.bag_grad(grad, index, None, factors, rows=out_rows)


def least_squares(
    pieces: Pieces, rows: np.ndarray, stored: Any = None, factors: Any = None, weights: Any = None,
    start: np.ndarray | None = None, steps: int = STEPS,
) -> np.ndarray:  # fmt: skip
    """The table whose decoded rows are nearest to ``rows`` (n, dim) in the (weighted) sum of squares.

    Conjugate gradients on the normal equations; what no piece uses stays 0.
    """
    shape = (pieces.table_rows,) if pieces.kind == "robe" else (pieces.table_rows, pieces.width)
    table = np.zeros(shape, np.float32) if start is None else start.astype(np.float32)
    ids = np.arange(len(rows)).reshape(-1, 1)
    scale = np.float32(1) if weights is None else (weights / weights.mean()).astype(np.float32)[:, None]

    def decode(t: np.ndarray) -> np.ndarray:
        return gather.bag_pieces(t, ids, pieces=pieces, rows=len(rows), stored=stored, piece_weights=factors)

    residual = rows if start is None else rows - decode(table)
    r = spread(pieces, residual * scale, stored, factors)
    p, norm = r, float(np.vdot(r, r))
    first = norm
    for _ in range(steps):
        if norm <= 1e-9 * first or norm == 0:
            break
        q = spread(pieces, decode(p) * scale, stored, factors)
        length = float(np.vdot(p, q))
        if length <= 0:
            break
        step = np.float32(norm / length)
        table = table + step * p
        r = r - step * q
        before, norm = norm, float(np.vdot(r, r))
        p = r + np.float32(norm / before) * p
    return table


def means(values: np.ndarray, groups: np.ndarray, count: int, weights: np.ndarray | None) -> np.ndarray:
    """Weighted means (count, dim) of the rows of each group; empty groups give 0."""
    w = np.ones(len(values), np.float32) if weights is None else weights.astype(np.float32)
    sums = gather.bag_grad(np.ascontiguousarray(values * w[:, None]), groups.reshape(-1, 1), rows=count)
    total = np.bincount(groups, w, count).astype(np.float32)
    return sums / np.where(total > 0, total, 1)[:, None]


def universal(seed: int, count: int) -> tuple[int, ...]:
    """``count`` numbers in [1, P) for hash functions."""
    # SplitMix64 (Steele, Lea, Flood 2014) in Python's integers, which torch.compile can trace
    low = (1 << 64) - 1
    state, numbers = (seed ^ 0x68617368) & low, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & low
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & low
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & low
        numbers.append(1 + (z ^ (z >> 31)) % (reference.PRIME - 1))
    return tuple(numbers)
