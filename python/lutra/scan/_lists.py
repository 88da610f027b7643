"""Scans of inverted lists: the calls into the kernels, for the indexes. Arrays are checked by the caller.

They are NumPy arrays, or all of them torch or CuPy arrays on one GPU. The convention of lists is in
csrc/scan/lists.h. On a GPU nothing is raised for data: a NaN score comes first, a position that is none is
passed over, and a list that leaves the arena counts as empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _backend
from .._arrays import F32, I64, kind_of
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
        The lists of each query, -1: none. None: rows 0 to ``rows[0]`` for every query; not on a GPU.
    longest, typical : int
        Rows of the longest list, and about of one that a query probes. Needed on a GPU, where the host cuts
        the work without reading ``rows``.
    repeated : bool
        Whether a position may stand in two lists. On a GPU it then counts once where both scores are
        equal.
    """

    begin: Any
    rows: Any
    positions: Any
    npositions: int
    keep: Any
    probes: Any
    longest: int = 0
    typical: int = 0
    repeated: bool = False


def list_rows(q: Any, x: Any, lists: Lists, k: int, metric: str) -> tuple[Any, Any]:
    """Exact scores of rows: ``x`` (blocks, d, 16) float32, float16, bfloat16 or int8; ip or l2."""
    assert lists.probes is not None
    if type(q) is not np.ndarray:
        kind = kind_of(q, "q")
        d, code = q.shape[1], kind.code(x)
        assert code is not None
        mine = kind.ptr(q), d, d, kind.ptr(x), code
        return _on_gpu(kind, "list_rows", mine, (d, code), q, x, lists, k, metric)
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
    q: Any,
    codes: Any,
    bits: int,
    step: Any,
    offset: Any,
    centroids: Any,
    lists: Lists,
    k: int,
    metric: str,
) -> tuple[Any, Any]:
    """Scores of scalar codes; ``codes`` (blocks, bytes, 16), 8 or 6 bits, step and offset (d,).

    The layout is in csrc/scan/list_scalar.h; ``centroids`` (nlist, d) where codes are of residuals.
    """
    assert lists.probes is not None
    if type(q) is not np.ndarray:
        kind = kind_of(q, "q")
        d = q.shape[1]
        center = None if centroids is None else kind.ptr(centroids)
        mine = kind.ptr(q), d, d, kind.ptr(codes), bits, kind.ptr(step), kind.ptr(offset), center
        return _on_gpu(kind, "list_scalar", mine, (d,), q, codes, lists, k, metric)
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
    lut: Any,
    codes: Any,
    lists: Lists,
    k: int,
    metric: str,
    base: Any = None,
    bias: Any = None,
    add: Any = None,
    mul: Any = None,
    bits: int = 8,
) -> tuple[Any, Any]:
    """base + bias + mul * (sums of look-ups) + add over codes of 5 to 8 bits; lut (nq, m, ksub) float32.

    ``codes`` (rows, ceil(m bits / 8)) uint8, packed as the quantizers do it. On a GPU also codes of 4 bits,
    ``codes`` (blocks, ceil(m / 8), 16, 4) as in csrc/scan/fast_scan.h.
    """
    if type(lut) is not np.ndarray:
        kind = kind_of(lut, "lut")
        nq, m, ksub = lut.shape
        terms = (None if a is None else kind.ptr(a) for a in (base, bias, add, mul))
        mine = kind.ptr(lut), m, ksub, bits, kind.ptr(codes), *terms
        rows = 16 * codes.shape[0] if bits == 4 else codes.shape[0]
        return _on_gpu(kind, "list_lut", mine, (m, ksub, bits), lut, codes, lists, k, metric, rows)
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


def _on_gpu(
    kind: Any, name: str, mine: tuple[Any, ...], sizes: tuple[int, ...], q: Any, x: Any, lists: Lists, k: int,
    metric: str, arena_rows: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The kernel ``name``; ``mine``: its arguments before those of lists, ``sizes``: for its workspace."""
    nq, nprobe = lists.probes.shape
    nlist, rows = lists.begin.shape[0], 16 * x.shape[0] if arena_rows is None else arena_rows
    scores, ids = kind.empty((nq, k), F32, q), kind.empty((nq, k), I64, q)
    shape = nlist, rows, lists.npositions, nq, nprobe, k, lists.longest, lists.typical, lists.repeated
    scratch = kind.scratch(name, q, *shape, *sizes)
    positions, keep = (None if a is None else kind.ptr(a) for a in (lists.positions, lists.keep))
    getattr(kind.kernels, name)(
        *mine, kind.ptr(lists.begin), kind.ptr(lists.rows), nlist, rows, positions, lists.npositions, keep,
        kind.ptr(lists.probes), nq, nprobe, k, METRICS[metric], lists.longest, lists.typical, lists.repeated,
        kind.ptr(scores), kind.ptr(ids), *kind.launch(q, scratch),
    )  # fmt: skip
    return scores, ids


def query_tables(q: Any, a: Any, constant: Any = None, *, distances: bool = False) -> Any:
    """Look-up tables (nq, m, columns) on a GPU; see csrc/scan/list_cuda.h.

    Entry (j, c) is constant[j, c] + <q's part j, a[j, :, c]>, or with ``distances`` the squared distance to
    it; ``a`` (m, dsub, columns), ``constant`` (m, columns).
    """
    kind = kind_of(q, "q")
    q = kind.dense(q)
    (nq, d), (m, dsub, columns) = q.shape, a.shape
    assert m * dsub == d
    out = kind.empty((nq, m, columns), F32, q)
    kind.kernels.tables_of_queries(
        kind.ptr(q), nq, kind.ptr(a), None if constant is None else kind.ptr(constant), m, dsub, columns,
        distances, kind.ptr(out), *kind.launch(q),
    )  # fmt: skip
    return out


def _check(bad: int) -> None:
    if bad >= 1 << 40:
        raise ValueError(f"list {bad - (1 << 40)} of the index leaves its memory: the index is damaged")
    if bad >= 0:
        raise ValueError(
            f"the score of position {bad} is NaN, or there is no such position: "
            "the index or a query holds NaN or infinite values, or the index is damaged"
        )
