"""Scans of inverted lists: the calls into the kernels, for the indexes. Arrays are checked NumPy arrays.

The convention of lists is in csrc/scan/lists.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _backend
from .._checks import METRICS
from ..reference import lists as reference

_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}


class Lists(NamedTuple):
    """Where the lists lie in their arena, and what may be found.

    Attributes
    ----------
    begin : (nlist,) int64, multiples of 16
    rows : (nlist,) int64
    positions : (rows of the arena,) int32 or None
        What a row is reported as; -1: an empty row. None: its own number.
    npositions : int
    keep : (ceil(npositions / 8),) uint8 or None
        Packed bits over positions: which may be found.
    probes : (nq, nprobe) int64 or None
        The lists of each query, -1: none. None: rows 0 to ``rows[0]`` for every query.
    """

    begin: np.ndarray
    rows: np.ndarray
    positions: np.ndarray | None
    npositions: int
    keep: np.ndarray | None
    probes: np.ndarray | None


def list_rows(q: np.ndarray, x: np.ndarray, lists: Lists, k: int, metric: str) -> tuple[Any, Any]:
    """Exact scores of rows: ``x`` (blocks, d, 16) float32, float16, bfloat16 or int8; ip or l2."""
    assert lists.probes is not None
    if _backend.core is None:
        return reference.list_rows(q, x, lists, k, metric)
    nq, d = q.shape
    scores, ids = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    bad = _backend.core.list_rows(
        q, d, x, _TYPES[x.dtype.name], lists.begin, lists.rows, len(lists.begin), 16 * len(x),
        lists.positions, lists.npositions, lists.keep, lists.probes, nq, lists.probes.shape[1], k,
        METRICS[metric], scores, ids,
    )  # fmt: skip
    _check(bad)
    return scores, ids


def list_scalar(
    q: np.ndarray,
    codes: np.ndarray,
    bits: int,
    step: np.ndarray,
    offset: np.ndarray,
    centroids: np.ndarray | None,
    lists: Lists,
    k: int,
    metric: str,
) -> tuple[Any, Any]:
    """Scores of scalar codes; ``codes`` (blocks, bytes, 16), 8 or 6 bits, step and offset (d,).

    The layout is in csrc/scan/list_scalar.h; ``centroids`` (nlist, d) where codes are of residuals.
    """
    assert lists.probes is not None
    if _backend.core is None:
        return reference.list_scalar(q, codes, bits, step, offset, centroids, lists, k, metric)
    nq, d = q.shape
    scores, ids = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    bad = _backend.core.list_scalar(
        q, d, codes, bits, step, offset, centroids, lists.begin, lists.rows, len(lists.begin),
        16 * len(codes), lists.positions, lists.npositions, lists.keep, lists.probes, nq,
        lists.probes.shape[1], k, METRICS[metric], scores, ids,
    )  # fmt: skip
    _check(bad)
    return scores, ids


def lut8(
    lut: np.ndarray,
    codes: np.ndarray,
    lists: Lists,
    k: int,
    metric: str,
    base: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    add: np.ndarray | None = None,
    mul: np.ndarray | None = None,
    bits: int = 8,
) -> tuple[Any, Any]:
    """base + bias + mul * (sums of look-ups) + add over codes of 5 to 8 bits; lut (nq, m, ksub) float32.

    ``codes`` (rows, ceil(m bits / 8)) uint8, packed as the quantizers do it.
    """
    if _backend.core is None:
        return reference.lut8(lut, codes, base, bias, add, mul, lists, k, metric, bits)
    nq, m, ksub = lut.shape
    scores, ids = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    nprobe = 1 if lists.probes is None else lists.probes.shape[1]
    bad = _backend.core.lut8(
        lut, m, ksub, bits, codes, base, bias, add, mul, lists.begin, lists.rows, len(lists.begin),
        len(codes), lists.positions, lists.npositions, lists.keep, lists.probes, nq, nprobe, k,
        METRICS[metric], scores, ids,
    )  # fmt: skip
    _check(bad)
    return scores, ids


def _check(bad: int) -> None:
    if bad >= 1 << 40:
        raise ValueError(f"list {bad - (1 << 40)} of the index leaves its memory: the index is damaged")
    if bad >= 0:
        raise ValueError(
            f"the score of position {bad} is NaN, or there is no such position: "
            "the index or a query holds NaN or infinite values, or the index is damaged"
        )
