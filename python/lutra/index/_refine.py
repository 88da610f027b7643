"""refine: the best candidates of a coarse search, by exact scores."""

from __future__ import annotations

from typing import Any

from .. import _checks, scan
from .._arrays import BF16, F16, F32, F64, I8, I32, I64, U8, kind_of
from .._results import Neighbors
from ._home import HOST, Home, adopt, deliver

_PART = 1 << 26  # bytes of candidate rows that are converted at a time


def refine(queries: Any, vectors: Any, candidates: Any, k: int = 10, metric: str = "ip") -> Neighbors:
    """The best k of each query's candidates, by exact scores.

    `lutra.scan.rescore` for vectors that may be stored in half precision, on a GPU too: there the rows of the
    candidates, and no others, are converted to float32.

    Parameters
    ----------
    queries : array, shape (nq, d), float32 or float64
    vectors : array, shape (n, d), float32, float16, bfloat16, int8, uint8 or float64
    candidates : array, shape (nq, c), int64 or int32
        Rows of ``vectors``, for example the ids that `lutra.scan.pq` found; -1 is skipped, a row that is
        named twice counts once.
    k : int, default 10
        May exceed c.
    metric : {'ip', 'l2', 'cosine', 'l1', 'linf', 'poincare'}, default 'ip'
        On CUDA the first three.

    Returns
    -------
    scores : array, shape (nq, k)
    ids : array, shape (nq, k), int64
        Rows of ``vectors``, best first, equal scores in the order of their ids; -1 where k exceeds the
        candidates.

    Raises
    ------
    IndexError
        A candidate outside [-1, n) (on CUDA it is skipped).
    TypeError, ValueError
        As `lutra.scan.rescore`.

    Notes
    -----
    Cost: nq c random reads of a row.
    """
    if getattr(queries, "dtype", None) == getattr(vectors, "dtype", None):
        return scan.rescore(queries, vectors, candidates, k, metric)
    arrays = adopt(queries, "queries"), adopt(vectors, "vectors"), adopt(candidates, "candidates")
    kind = kind_of(arrays[0], "queries")
    home = Home(kind, kind.empty((0,), F32, arrays[0]))
    return Neighbors(*deliver(home, tuple(_converted(home, *arrays, k, metric)), queries))


def _converted(home: Home, queries: Any, vectors: Any, candidates: Any, k: int, metric: str) -> Any:
    kind = home.kind
    for a, name in ((queries, "queries"), (vectors, "vectors"), (candidates, "candidates")):
        _checks.same_kind(kind, a, name, queries, "queries")
        _checks.ndim(a, name, 2)
    _checks.dtype(kind, queries, "queries", (F32, F64))
    code = _checks.dtype(kind, vectors, "vectors", (F32, F16, BF16, I8, U8, F64))
    if _checks.dtype(kind, candidates, "candidates", (I32, I64)) == I32:
        candidates = kind.cast(candidates, I64)
    queries = kind.cast(home.bring(queries), F32)
    vectors = home.bring(vectors)
    (nq, c), (n, d) = candidates.shape, vectors.shape
    if n == 0 or c == 0 or nq == 0 or nq != queries.shape[0] or d != queries.shape[1]:
        return scan.rescore(
            queries, kind.cast(vectors, F32), candidates, k, metric
        )  # which says what is wrong
    wrong = (candidates < -1) | (candidates >= n)
    if not kind.cuda and bool(wrong.any()):  # on CUDA that would mean to wait
        row, column = divmod(int(HOST.bring(wrong).argmax()), c)
        raise IndexError(
            f"candidates[{row}, {column}] is {int(candidates[row, column])}; candidates must be in [-1, {n})"
        )
    if not kind.cuda and code != F64:
        return scan.rescore(queries, vectors, candidates, k, metric)
    return rescore_converted(home, queries, vectors, candidates, k, metric)


def rescore_converted(
    home: Home, queries: Any, vectors: Any, candidates: Any, k: int, metric: str, scales: Any = None
) -> Any:
    """Scores and rows of the best candidates, whose rows alone become float32 (times ``scales`` (n, 1))."""
    kind, xp = home.kind, home.xp
    (nq, c), (n, d) = candidates.shape, vectors.shape
    scores, ids = [], []
    step = max(1, _PART // (4 * c * d))
    for i in range(0, nq, step):
        # Sorted, so that a row's place in the compact copy has the order of its id.
        part = home.sort(candidates[i : i + step])
        absent = (part < 0) | (part >= n)
        absent[:, 1:] |= part[:, 1:] == part[:, :-1]
        rows = part.reshape(-1).clip(0, n - 1)
        compact = kind.cast(vectors[rows], F32)
        if scales is not None:
            compact = compact * scales[rows]
        places = xp.where(absent, -1, home.arange(len(rows)).reshape(part.shape))
        best, where = scan.rescore(queries[i : i + step], compact, places, k, metric)
        scores.append(best)
        ids.append(xp.where(where < 0, -1, rows[where]))
    if len(scores) == 1:
        return scores[0], ids[0]
    return xp.concatenate(scores), xp.concatenate(ids)
