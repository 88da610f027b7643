"""knn_screened: exact search that reads an int8 copy of the collection, and few exact rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import BF16, F16, F32, F64, I8, I64, U8, call
from .._results import Neighbors
from ..reference import screen as reference
from ..reference.scan import nan_message
from ._knn import _knn, _tuple, device_keep, keep_of

METRICS = {"ip": 0, "l2": 1, "cosine": 2}
MAX_DIMS = 65536  # more, and sums of products could leave 32 bits
_VNNI = True  # tests turn it off
_SAMPLE = 1 << 16  # rows that the mean is taken of


class Screen(NamedTuple):
    """An int8 copy of a collection, from `quantize_int8`.

    Attributes
    ----------
    codes : uint8, shape (ceil(n / 16), ceil(d / 4), 16, 4)
        ``128 + round((x - mean) / scale)``, 16 rows side by side with 4 dimensions each.
    inverse : float32, shape (16 ceil(n / 16),)
        1 / scale of each row, scale = max abs(x - mean) / 127.
    half : float32, shape (16 ceil(n / 16),)
        Half the squared norm of x - mean, over the scale.
    mean : float32, shape (d,)
    bounds : float32, shape (4,)
        Over all rows, the largest norm of what the codes lose (over the scale), of the codes, of x and of
        x - mean.
    """

    codes: Any
    inverse: Any
    half: Any
    mean: Any
    bounds: Any


def quantize_int8(x: Any, metric: str = "ip") -> Screen:
    """Codes of 8 bits for `knn_screened`.

    Parameters
    ----------
    x : array, shape (n, d), float32, float16, bfloat16, int8 or uint8
        Finite, d <= 65536.
    metric : {'ip', 'l2', 'cosine'}, default 'ip'
        For ``'cosine'`` the rows are normalised first; codes for ``'ip'`` and ``'l2'`` are the same.

    Returns
    -------
    Screen
        Arrays of the kind of ``x``: d + 8 bytes a row, with d and n rounded up to 4 and 16.

    Raises
    ------
    TypeError
        No array, or another dtype.
    ValueError
        A shape or metric that does not fit; a row with NaN or infinities, or a norm of 1e15 and more. On
        CUDA, where nothing waits for the device to see it, such a row has codes of 0 and ``inverse`` 1e-42,
        and every search scores it.

    Notes
    -----
    Each row has its own scale, and the mean of (a sample of) the rows is subtracted: neither changes an order
    by inner product or distance, both make the codes finer. Cost: one read of ``x``.
    """
    _checks.choice("metric", metric, METRICS)
    return Screen(*call("quantize_int8", _quantize_int8, (x,), (metric == "cosine",)))


def _quantize_int8(kind, x, normalize=False, bias=None, sample=_SAMPLE):
    """Codes; with ``bias`` (n,), float32, for scores ``<q, x> + bias``."""
    _checks.ndim(x, "x", 2)
    code = _checks.dtype(kind, x, "x", (F32, F16, BF16, I8, U8))
    n, d = x.shape
    _check_size(d)
    if code != F32 and not kind.cuda:
        x = kind.cast(x, F32)
    if kind.kernels is None:
        if kind.cuda:
            _checks.no_kernel(kind, "quantize_int8")
        parts = reference.quantize_int8(kind.to_numpy(x), normalize)
        return tuple(kind.from_numpy(p, F32 if p.dtype == np.float32 else U8, x) for p in parts)
    x = kind.dense(x)
    out = empty(kind, x, n, d)
    if kind.cuda:
        begin(kind, x, normalize, out, sample)
    else:
        mean = mean_of(kind.to_numpy(x), normalize, sample)
        out = (*out[:3], kind.from_numpy(mean, F32, x), out[4])
    encode(kind, x, 0, normalize, out, bias=bias)
    return out


def _check_size(d):
    if d > MAX_DIMS:
        raise ValueError(f"x has {d} columns; at most {MAX_DIMS} can be screened")


def empty(kind, like, n, d):
    """Arrays for the codes of n rows, not filled (on the CPU the bounds are 0)."""
    blocks = (n + 15) // 16
    bounds = kind.empty((4,), F32, like) if kind.cuda else kind.from_numpy(np.zeros(4, np.float32), F32, like)
    shapes = ((blocks, (d + 3) // 4, 16, 4), U8), ((blocks * 16,), F32), ((blocks * 16,), F32), ((d,), F32)
    return (*(kind.empty(shape, code, like) for shape, code in shapes), bounds)


def mean_of(x: np.ndarray, normalize: bool, sample: int = _SAMPLE) -> np.ndarray:
    """The mean of some rows (any mean will do, as long as it stays the same)."""
    with np.errstate(over="ignore", invalid="ignore"):
        rows = x[:: max(1, len(x) // sample)]
        rows = reference.unit(rows) if normalize else rows
        mean = (
            rows.mean(0, dtype=np.float64).astype(np.float32)
            if len(rows)
            else np.zeros(x.shape[1], np.float32)
        )
    return np.where(np.isfinite(mean), mean, np.float32(0))


def begin(kind, x, normalize, screen, sample=_SAMPLE):
    """On CUDA: the mean of some of the rows ``x`` and bounds of 0, into the arrays of a screen."""
    n, d = x.shape
    step = max(1, n // sample)
    kind.kernels.screen_mean(
        kind.ptr(x), kind.code(x), d, n, d, step, normalize, kind.ptr(screen[3]), kind.ptr(screen[4]),
        *kind.launch(x, kind.scratch("screen_mean", x, n, d, step, normalize)),
    )  # fmt: skip


def encode(kind, x, first, normalize, screen, name="x", bias=None, bad=None):
    """Codes of float32 rows ``x``, number ``first`` and on of the collection, into the arrays of a screen.

    On CUDA rows are of any type; ``bad`` (1,), int64, 2^63 - 1 at first, becomes the first that has no codes.
    """
    codes, inverse, half, mean, bounds = (kind.ptr(a) for a in screen)
    n, d = x.shape
    if kind.cuda:
        kind.kernels.screen_encode(
            kind.ptr(x), kind.code(x), d, n, d, first, mean, normalize, codes, inverse, half, bounds,
            *(None if a is None else kind.ptr(a) for a in (bias, bad)), *kind.launch(x),
        )  # fmt: skip
        return
    bad = kind.kernels.screen_encode(
        kind.ptr(x), d, n, d, first, mean, normalize, codes, inverse, half, bounds,
        None if bias is None else kind.ptr(bias),
    )  # fmt: skip
    if bad >= 0:
        refuse(bad, name)


def refuse(row, name="x"):
    raise ValueError(
        f"row {row} of {name} holds NaN or infinite values, or its norm is 1e15 or more; "
        "it cannot be screened"
    )


def knn_screened(
    queries: Any, database: Any, screen: Screen, k: int = 10, metric: str = "ip", *, filter: Any = None
) -> Neighbors:
    """Exact k nearest neighbours, by a scan of 8-bit codes.

    The codes' scores are known to within a bound. Rows whose bound reaches the k-th best exact score so far
    are scored exactly in the same pass, so no neighbour is missed: the results are those of `knn`, and rows
    whose scores differ in the last bits of float32 alone may change places. Some hundreds of a million rows
    are scored exactly; the others cost a quarter of the memory traffic and of the arithmetic of `knn`.

    Parameters
    ----------
    queries : array, shape (nq, d), float32 or float64
    database : array, shape (n, d), float32, float16, bfloat16, int8 or uint8
        The rows that ``screen`` was made of, unchanged.
    screen : Screen
        ``quantize_int8(database, metric)``.
    k : int, default 10
        May exceed n. Worth it while k is a small part of n.
    metric : {'ip', 'l2', 'cosine'}, default 'ip'
    filter : optional
        Rows that may be found; see `knn`.

    Returns
    -------
    scores : array, shape (nq, k), float32
    ids : array, shape (nq, k), int64
        As from `knn`.

    Raises
    ------
    TypeError
        A wrong type or dtype, or arrays of different libraries.
    ValueError
        Shapes that do not fit, k < 1, an unknown metric, a NaN score (its row is named; on CUDA a NaN score
        comes first in its query's results).

    Notes
    -----
    Cost: one read of the codes (few queries) or 2 nq n d operations on 8-bit integers, 128 an instruction
    with AVX-512 VNNI; and the rows that are scored exactly. Gradient (torch): of the scores, to queries and
    database. float64 queries are computed by the reference (a TypeError on CUDA).

    On CUDA the results are those of `knn` there to the bit. The bar that bounds have to reach comes from a
    sample of the rows, and what reaches it is scored after the pass; a query with too many or too few such
    rows is searched for without the codes, in the same call. Fewer than 32,768 rows, k > 256, rows of more
    than some 14,000 columns, up to 8 queries whose codes save less than 100 MB of reading (8-bit rows: none)
    and searches with more than n / 64 candidates (long rows, large k) are left to `knn`.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.eye(4, dtype=np.float32)
    >>> lutra.scan.knn_screened(x[2:3], x, lutra.scan.quantize_int8(x), k=2).ids
    array([[2, 0]])
    """
    if not isinstance(screen, tuple) or len(screen) != 5:
        raise TypeError(f"screen must come from lutra.scan.quantize_int8, got {type(screen).__name__}")
    if filter is not None:
        _checks.ndim(database, "database", 2)
    keep = keep_of(filter, queries, database)
    return _tuple(
        Neighbors, call("knn_screened", _knn_screened, (queries, database, *screen), (keep, k, metric))
    )


def _check(kind, queries, database, screen, keep, metric):
    arrays = zip(
        ("queries", "database", *(f"screen.{f}" for f in Screen._fields)), (queries, database, *screen)
    )
    for name, a in arrays:
        _checks.same_kind(kind, a, name, queries, "queries")
    _checks.ndim(queries, "queries", 2)
    _checks.ndim(database, "database", 2)
    code = _checks.dtype(kind, queries, "queries", (F32, F64))
    _checks.dtype(kind, database, "database", (F32, F16, BF16, I8, U8) if code == F32 else (F32, F64))
    (n, d), nq_d = database.shape, queries.shape[1]
    if nq_d != d:
        raise ValueError(f"database has {d} columns, queries has {nq_d}; they must be equal")
    _check_size(d)
    blocks = (n + 15) // 16
    shapes = (blocks, (d + 3) // 4, 16, 4), (blocks * 16,), (blocks * 16,), (d,), (4,)
    for name, a, shape, want in zip(Screen._fields, screen, shapes, (U8, F32, F32, F32, F32)):
        _checks.dtype(kind, a, f"screen.{name}", (want,))
        if tuple(a.shape) != shape:
            raise ValueError(
                f"screen.{name} has shape {tuple(a.shape)}; for this database it must be {shape}"
            )
    if keep is not None and (kind.code(keep) != U8 or tuple(keep.shape) != ((n + 7) // 8,)):
        raise ValueError(
            f"keep must be uint8 of shape ({(n + 7) // 8},), got {keep.dtype} {tuple(keep.shape)}"
        )
    return code


def _knn_screened(
    kind, queries, database, codes, inverse, half, mean, bounds, keep=None, k=10, metric="ip", counts=None,
    bias=None,
):  # fmt: skip
    k = _checks.integer("k", k, 1)
    metric_code = _checks.choice("metric", metric, METRICS)
    screen = codes, inverse, half, mean, bounds
    keep = device_keep(kind, keep, queries)
    code = _check(kind, queries, database, screen, keep, metric)
    kernels = kind.kernels
    if kernels is not None and code == F32:
        (nq, d), n = queries.shape, database.shape[0]
        queries, database, keep = (a if a is None else kind.dense(a) for a in (queries, database, keep))
        screen = tuple(kind.dense(a) for a in screen)
        scores, ids = kind.empty((nq, k), F32, queries), kind.empty((nq, k), I64, queries)
        if kind.cuda:
            plain = keep is None and bias is None
            scratch = kind.scratch("screen", queries, nq, n, d, k, metric_code, kind.code(database), plain)
            kernels.screen(
                kind.ptr(queries), d, kind.ptr(database), kind.code(database), d, nq, n, d, k, metric_code,
                *(kind.ptr(a) for a in screen), None if keep is None else kind.ptr(keep),
                kind.ptr(scores), kind.ptr(ids), None if bias is None else kind.ptr(bias),
                *kind.launch(queries, scratch),
            )  # fmt: skip
            return scores, ids
        bad, passed = kernels.screen(
            kind.ptr(queries), d, kind.ptr(database), kind.code(database), d, nq, n, d, k, metric_code,
            *(kind.ptr(a) for a in screen), None if keep is None else kind.ptr(keep), _VNNI,
            kind.ptr(scores), kind.ptr(ids), None if bias is None else kind.ptr(bias),
        )  # fmt: skip
        if counts is not None:
            counts.append(passed)
        if bad >= 0:
            raise ValueError(nan_message("database", bad))
        if bad == -1:
            return scores, ids
        return _knn(kind, queries, database, k, metric, keep, bias)  # scores beyond the bounds
    if kind.cuda:
        _checks.no_kernel(kind, "knn_screened")
    q, x, bits = (None if a is None else kind.to_numpy(a) for a in (queries, database, keep))
    scores, ids = reference.knn_screened(q, x, None, k, metric, bits)
    return kind.from_numpy(scores, code, queries), kind.from_numpy(ids, I64, queries)
