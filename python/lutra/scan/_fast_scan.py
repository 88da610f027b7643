"""fast_scan: look-ups of 4-bit codes in registers, with selection inside; the layout of its codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, _filters
from .._arrays import F32, I64, NUMPY, U8, call
from .._results import Neighbors
from ..reference import fast_scan as reference
from ._knn import _tuple, device_keep

_METRICS = {"ip": 0, "l2": 1}


def pack4(entries: Any) -> Any:
    """Lay 4-bit entries out for `fast_scan`.

    Parameters
    ----------
    entries : array, shape (n, m), uint8
        Below 16; the high bits are dropped.

    Returns
    -------
    array, shape (ceil(n / 16), ceil(m / 8), 16, 4), uint8
        Blocks of 16 rows. Byte i of a row in group g holds entry 8 g + i in its low four bits and entry
        8 g + 4 + i in its high four; what is missing is 0.

    Raises
    ------
    TypeError, ValueError
        Another dtype, or not two dimensions of one column at least.

    See Also
    --------
    unpack4 : the inverse.
    """
    return call("pack4", _pack4, (entries,), ())


def _pack4(kind, entries):
    _checks.ndim(entries, "entries", 2)
    _checks.dtype(kind, entries, "entries", (U8,))
    n, m = entries.shape
    if m < 1:
        raise ValueError("entries must have one column at least")
    if kind.kernels is None:
        _checks.no_kernel(kind, "pack4")
        return kind.from_numpy(reference.pack4(kind.to_numpy(entries) & 15), U8, entries)
    shape = (n + 15) // 16, (m + 7) // 8, 16, 4
    out = (
        kind.empty(shape, U8, entries)
        if kind.cuda
        else kind.from_numpy(np.zeros(shape, np.uint8), U8, entries)
    )
    entries = kind.dense(entries)
    kind.kernels.pack4(kind.ptr(entries), n, m, 0, kind.ptr(out), *kind.launch(entries))
    return out


def unpack4(packed: Any, n: int, m: int) -> Any:
    """The entries of codes that `pack4` laid out.

    Parameters
    ----------
    packed : array, shape (blocks, groups, 16, 4), uint8
    n, m : int
        Rows and entries of a row; at most 16 * blocks and 8 * groups.

    Returns
    -------
    array, shape (n, m), uint8

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape; n or m beyond what ``packed`` holds.
    """
    return call("unpack4", _unpack4, (packed,), (n, m))


def _unpack4(kind, packed, n, m):
    _check_packed(kind, packed, "packed", n, m)
    if kind.kernels is None:
        _checks.no_kernel(kind, "unpack4")
        return kind.from_numpy(reference.unpack4(kind.to_numpy(packed), n, m), U8, packed)
    out = kind.empty((n, m), U8, packed)
    packed = kind.dense(packed)
    kind.kernels.unpack4(kind.ptr(packed), None, n, m, 0, kind.ptr(out), *kind.launch(packed))
    return out


def _check_packed(kind, packed, name, n, m):
    _checks.ndim(packed, name, 4)
    _checks.dtype(kind, packed, name, (U8,))
    n, m = _checks.integer("n", n, 0), _checks.integer("m", m, 1)
    blocks, groups = packed.shape[:2]
    if tuple(packed.shape[2:]) != (16, 4) or n > 16 * blocks or groups != (m + 7) // 8:
        raise ValueError(
            f"{name} has shape {tuple(packed.shape)}; {n} rows of {m} entries need "
            f"({(n + 15) // 16}, {(m + 7) // 8}, 16, 4), as pack4 makes it"
        )


def fast_scan(
    tables: Any,
    codes: Any,
    n: int,
    k: int = 10,
    metric: str = "ip",
    *,
    bias: Any = None,
    add: Any = None,
    mul: Any = None,
    filter: Any = None,
) -> Neighbors:
    """The k best rows of 4-bit codes, by sums of look-ups that are made in registers.

    ``score[i, r] = bias[i] + mul[r] * sum_j tables[i, j, entry[r, j]] + add[r]``, with the tables rounded to
    integers: product quantization with 16 centroids a sub-space, scalar codes of 4 bits, signs in groups of
    four. Eight to ten times as fast as look-ups in memory.

    Parameters
    ----------
    tables : array, shape (nq, m, 16), float32
        Finite.
    codes : array, shape (blocks, ceil(m / 8), 16, 4), uint8
        From `pack4`.
    n : int
        Rows, at most 16 * blocks.
    k : int, default 10
        May exceed n.
    metric : {'ip', 'l2'}, default 'ip'
        Whether greater scores or smaller ones are better.
    bias : array, shape (nq,), float32, optional
        Of each query.
    add, mul : array, shape (n,), float32, optional
        Of each row.
    filter : optional
        As in `knn`.

    Returns
    -------
    scores : array, shape (nq, k), float32
        Best first; where k exceeds what may be found -inf (ip) or +inf (l2).
    ids : array, shape (nq, k), int64
        Rows, equal scores in their order; -1 where k exceeds what may be found.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `knn`; tables that are not finite, codes of another shape.

    Notes
    -----
    A query's tables are rounded to multiples of a 254th of the largest range of two tables that share a byte;
    a sum errs by at most m / 2 of them. Cost: nq n m / 64 byte permutations, and n m / 2 bytes to read.
    On CUDA m is at most 1700 or so, tables lie in shared memory (32 look-ups a cycle and multiprocessor), and
    a query whose tables are not finite has scores of NaN. Not differentiable.

    References
    ----------
    André, Kermarrec, Le Scouarnec, Accelerated Nearest Neighbor Search with Quick ADC, ICMR 2017,
    arXiv 1704.07355.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> entries = np.array([[0, 1], [2, 3], [15, 15]], np.uint8)
    >>> tables = np.tile(np.arange(16, dtype=np.float32), (1, 2, 1))
    >>> lutra.scan.fast_scan(tables, lutra.scan.pack4(entries), 3, k=2).ids
    array([[2, 1]])
    """
    arrays = (tables, codes, bias, add, mul)
    if filter is None and all(a is None or type(a) is np.ndarray for a in arrays):
        return _tuple(Neighbors, _fast_scan(NUMPY, *arrays, None, n, k, metric))
    keep = None if filter is None else _filters.beside(tables, filter, _checks.integer("n", n, 0))
    return _tuple(Neighbors, call("fast_scan", _fast_scan, (*arrays, keep), (n, k, metric)))


def _fast_scan(kind, tables, codes, bias=None, add=None, mul=None, keep=None, n=0, k=10, metric="ip"):
    k = _checks.integer("k", k, 1)
    metric_code = _checks.choice("metric", metric, _METRICS)
    n = _checks.integer("n", n, 0)
    _checks.ndim(tables, "tables", 3)
    _checks.dtype(kind, tables, "tables", (F32,))
    nq, m, entries = tables.shape
    if entries != 16 or m < 1:
        raise ValueError(f"tables must have shape (nq, m, 16), m >= 1; got {tuple(tables.shape)}")
    _checks.same_kind(kind, codes, "codes", tables, "tables")
    _check_packed(kind, codes, "codes", n, m)
    for a, name, length in ((bias, "bias", nq), (add, "add", n), (mul, "mul", n)):
        if a is None:
            continue
        _checks.same_kind(kind, a, name, tables, "tables")
        _checks.dtype(kind, a, name, (F32,))
        if tuple(a.shape) != (length,):
            raise ValueError(f"{name} must have shape ({length},), got {tuple(a.shape)}")
    if keep is not None and (kind.code(keep) != U8 or tuple(keep.shape) != ((n + 7) // 8,)):
        raise ValueError(f"keep must be uint8 of shape ({(n + 7) // 8},), got {tuple(keep.shape)}")
    if kind.kernels is None:
        _checks.no_kernel(kind, "fast_scan")
        some = [None if a is None else kind.to_numpy(a) for a in (bias, add, mul, keep)]
        scores, ids = reference.fast_scan(kind.to_numpy(tables), kind.to_numpy(codes), n, k, metric, *some)
        return kind.from_numpy(scores, F32, tables), kind.from_numpy(ids, I64, tables)
    tables, codes = kind.dense(tables), kind.dense(codes)
    keep = device_keep(kind, keep, tables)  # of the torch op: perhaps on the host
    bias, add, mul, keep = (None if a is None else kind.dense(a) for a in (bias, add, mul, keep))
    scores, ids = kind.empty((nq, k), F32, tables), kind.empty((nq, k), I64, tables)
    p = lambda a: None if a is None else kind.ptr(a)  # noqa: E731
    if kind.cuda:
        kind.kernels.fast_scan(
            nq, m, k, metric_code, p(tables), p(bias), p(codes), n, p(add), p(mul), p(keep), p(scores),
            p(ids), *kind.launch(tables, kind.scratch("fast_scan", tables, nq, n, m, k)),
        )  # fmt: skip
        return scores, ids
    bad = kind.kernels.fast_scan(
        nq, m, k, metric_code, p(tables), None, 0, p(bias), p(codes), n, p(add), p(mul), None, False,
        None, None, 0, None, None, 0, p(keep), n, None, 0, 0, 0, 0, None, None, 0, 0, p(scores), p(ids),
    )  # fmt: skip
    if bad != -1:
        values = kind.to_numpy(tables)
        at = np.argwhere(~np.isfinite(values))
        where = list(map(int, at[0])) if len(at) else ""
        raise ValueError(f"tables{where} is not finite, or tables range beyond float32; they must be finite")
    return scores, ids
