"""Scan of codes in bit planes, the highest plane first: the call into the kernel, for the indexes."""

from __future__ import annotations

import numpy as np

from .. import _backend
from ..reference import planes as reference

_METRICS = {"ip": 0, "l2": 1}
_SCREEN = (16, 128)  # rows that are scored in full at first: so many times k, and so many at least


def plane_scan(
    rotated: np.ndarray,
    codes: np.ndarray,
    low: np.ndarray,
    n: int,
    bits: int,
    k: int,
    metric: str,
    high: float,
    levels: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    add: np.ndarray | None = None,
    mul: np.ndarray | None = None,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of n rows: scores (nq, k) float32 and rows (nq, k) int64.

    Formula, layout and what "best" leaves to chance are in csrc/scan/fast_scan.h. Arrays are checked.

    Parameters
    ----------
    rotated : (nq, d) float32
    codes : (blocks, ceil(ceil(d / 4) / 8), 16, 4) uint8
        The highest plane, four dimensions an entry, as `lutra.scan.pack4` lays it out.
    low : (n, 2 (bits - 1) ceil(d / 16)) uint8
        The other planes of each row.
    high : float
        What a bit of the highest plane stands for in the screen: +-high.
    levels : (2**bits,) float32 or None
    bias : (nq,), add, mul : (n,) float32 or None
    keep : (ceil(n / 8),) uint8 or None

    Raises
    ------
    ValueError
        A score that is NaN or infinite.
    """
    if _backend.core is None:
        return reference.plane_scan(rotated, codes, low, n, bits, k, metric, levels, bias, add, mul, keep)
    nq, d = rotated.shape
    padded = np.zeros((nq, -(-d // reference.PART) * reference.PART), np.float32)
    padded[:, :d] = rotated
    scores, ids = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    bad = _backend.core.plane_scan(
        nq, d, bits, k, max(_SCREEN[0] * k, _SCREEN[1]), _METRICS[metric], padded, high, levels, bias, codes,
        low, n, add, mul, keep, scores, ids,
    )  # fmt: skip
    if bad == -2:
        raise ValueError("the queries are too large: their look-ups leave float32")
    if bad >= 0:
        raise ValueError(f"the score of row {bad} is NaN or infinite: the index is damaged")
    return scores, ids
