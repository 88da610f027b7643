"""csls: cross-domain similarity local scaling."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, scan
from .._arrays import F32
from .._results import Neighbors
from ..index._home import HOST, deliver
from ..index._progress import Progress
from ..index.base import Index
from ._source import Source, matrix

_EXPAND = 8  # candidates that an index is asked for, for each result


def csls(
    queries: Any,
    database: Any,
    k: int = 10,
    neighbourhood: int = 10,
    *,
    background: Any = None,
    progress: bool | None = None,
) -> Neighbors:
    """k best by cosine similarity, less what is similar to everything.

    CSLS(x, y) = 2 cos(x, y) - r(x) - r(y): r(x) is the mean cosine of a query with its nearest in the
    database, r(y) that of a vector of the database with its nearest among the queries. Hubs, which are near
    to many queries, lose by it.

    Parameters
    ----------
    queries : array, shape (nq, d), float32, float16, bfloat16, float64, uint8 or int8
    database : array, shape (n, d), likewise; or an index of metric 'cosine'
        Of an index, the 8 k nearest are ranked by CSLS; r(y) is computed for them alone, from what
        ``reconstruct`` gives.
    k : int, default 10
    neighbourhood : int, default 10
        Of how many nearest r is the mean; of all where there are fewer.
    background : array, shape (m, d), optional
        The queries that r(y) is taken over, where ``queries`` are too few to stand for all. Default:
        ``queries``.
    progress : bool or None
        A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

    Returns
    -------
    scores : array, shape (nq, k), float32, in the library of ``queries``
        Best first; -inf where k exceeds the database.
    ids : array, shape (nq, k), int64
        Rows, or the ids of the index; equal scores in their order; -1 where k exceeds the database.

    Raises
    ------
    TypeError, ValueError
        As `lutra.scan.knn`; an index of another metric; no background at all.

    Notes
    -----
    Cost: (m + 2 nq) n multiply-adds of d values. With arrays the result is exact: 2 cos(x, y) - r(y) is an
    inner product of d + 1 values, so the scan selects by CSLS itself; the database is copied once. A database
    on a GPU is searched there.

    References
    ----------
    Conneau, Lample, Ranzato, Denoyer, Jégou, Word Translation Without Parallel Data, ICLR 2018,
    arXiv 1710.04087.
    """
    k = _checks.integer("k", k, 1)
    neighbourhood = _checks.integer("neighbourhood", neighbourhood, 1)
    if isinstance(database, Index) and database.metric != "cosine":
        raise ValueError(f"database is an index of metric {database.metric!r}; CSLS needs 'cosine'")
    source = Source.of(database, "database", None)
    q = matrix(queries, "queries", source.d)
    back = q if background is None else matrix(background, "background", source.d)
    if len(back) == 0 and len(q):
        raise ValueError("background has no rows; r(y) needs one at least")
    is_index = isinstance(database, Index)
    total = 2 * len(q) if is_index else 2 * len(q) + source.n
    with Progress(total, "CSLS", progress) as bar:
        if is_index:
            results = _of_candidates(q, source, back, k, neighbourhood, bar)
        else:
            results = _of_all(q, source, back, k, neighbourhood, bar)
    return Neighbors(*deliver(HOST, results, queries))


def _mean_nearest(x: Any, source: Source, neighbourhood: int, bar: Progress) -> np.ndarray:
    """The mean cosine of each row of x with its nearest in a collection, float32; 0 without any."""
    count = min(neighbourhood, source.n)
    if count == 0:
        return np.zeros(len(x), np.float32)
    out = np.empty(len(x), np.float32)
    step = source.block(count)
    for i in range(0, len(x), step):
        scores, found = source.search(x[i : i + step], count)
        there = found >= 0  # an index may find fewer
        total = np.where(there, scores, 0).sum(1, dtype=np.float64)
        out[i : i + step] = total / np.maximum(there.sum(1), 1)
        bar.tick(len(scores))
    return out


def _of_all(q, source, back, k, neighbourhood, bar):
    home, x = source.home, source.x
    mean_of_queries = _mean_nearest(q, source, neighbourhood, bar)
    backs = Source.of(back, "background", "cosine")
    mean_of_rows = _mean_nearest(x, backs, neighbourhood, bar)
    # [x, 1] . [2 y, -r(y)] = 2 cos(x, y) - r(y)
    wide = home.empty((source.n, source.d + 1), F32)
    wide[:, :-1] = 2 * home.normalise(home.kind.cast(x, F32))
    wide[:, -1] = home.bring(-mean_of_rows)
    scores, ids = np.empty((len(q), k), np.float32), np.empty((len(q), k), np.int64)
    step = source.block(k)
    for i in range(0, len(q), step):
        some = home.kind.cast(home.bring(q[i : i + step]), F32)
        part = home.full((len(some), source.d + 1), 1, F32)
        part[:, :-1] = home.normalise(some)
        best, found = (HOST.bring(a) for a in scan.knn(part, wide, k, "ip"))
        ids[i : i + step] = found
        scores[i : i + step] = best - mean_of_queries[i : i + step, None]
        bar.tick(len(part))
    return scores, ids


def _of_candidates(q, source, back, k, neighbourhood, bar):
    backs = Source.of(back, "background", "cosine")
    scores, ids = np.full((len(q), k), -np.inf, np.float32), np.full((len(q), k), -1, np.int64)
    wanted = min(source.n, max(k * _EXPAND, neighbourhood))
    step = max(1, min(source.block(wanted), 4096))
    quiet = Progress(0, "", False)
    for i in range(0, len(q), step):
        part = q[i : i + step]
        near, found = source.search(part, wanted)
        there = found >= 0
        first = np.where(there, near, 0)[:, :neighbourhood]
        mean_of_queries = first.sum(1) / np.maximum(there[:, :neighbourhood].sum(1), 1)
        rows, inverse = np.unique(np.maximum(found, 0), return_inverse=True)
        means = _mean_nearest(source.rows(rows), backs, neighbourhood, quiet)
        key = 2 * near - means[inverse.reshape(found.shape)] - mean_of_queries[:, None]
        key = np.where(there, key, -np.inf).astype(np.float32)
        order = np.lexsort((found, -key), axis=1)[:, :k]
        scores[i : i + step, : order.shape[1]] = np.take_along_axis(key, order, 1)
        ids[i : i + step, : order.shape[1]] = np.take_along_axis(source.named(found), order, 1)
        bar.tick(2 * len(part))
    return scores, ids
