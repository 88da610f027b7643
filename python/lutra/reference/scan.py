"""Reference of `lutra.scan`."""

from __future__ import annotations

import numpy as np

#: Metrics of which the smaller score is the better.
DISTANCES = ("l2", "l1", "linf", "poincare")


def _wide(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.float64 else x.astype(np.float32)


@np.errstate(invalid="ignore", over="ignore")  # NaN scores are reported, infinite ones are scores
def pairwise(queries, rows, metric="ip"):
    """Scores of every query (nq, d) with every row: (n, d), or (nq, n, d) for rows of each query's own."""
    q, x = _wide(queries)[:, None], _wide(rows)
    if metric == "l2":
        return np.square(q - x).sum(-1)
    if metric == "l1":
        return np.abs(q - x).sum(-1)
    if metric == "linf":
        return np.abs(q - x).max(-1, initial=0)
    if metric == "poincare":
        return _poincare(q, x)
    if metric == "cosine":
        return (_unit(q) * _unit(x)).sum(-1)
    return (q * x).sum(-1)


def _poincare(q, x):
    """arcosh(1 + 2 |q - x|^2 / ((1 - |q|^2) (1 - |x|^2))); NaN where one is outside the open unit ball."""
    room = [1 - np.square(a, dtype=np.float64).sum(-1) for a in (q, x)]
    with np.errstate(divide="ignore"):
        y = 2 * np.square(q - x).sum(-1) / (room[0] * room[1])
    y = np.where((room[0] > 0) & (room[1] > 0), y, np.nan)
    return np.log1p(y + np.sqrt(y * (y + 2))).astype(np.result_type(q, x))


def _unit(x):
    """Vectors over their norms, which are computed in float64: fp32 squares overflow from 2e19."""
    norm = np.sqrt(np.square(x, dtype=np.float64).sum(-1, keepdims=True))
    return np.divide(x, norm, out=np.zeros(x.shape), where=norm != 0).astype(x.dtype)


def select(scores, ids, k, metric="ip"):
    """The k best of each row of ``scores``, best first, equal scores by increasing id; padded with id -1.

    ``ids`` (nq, n); entries with id -1 are no candidates. A NaN score is an error: the op reports the row.
    """
    smaller = metric in DISTANCES
    worst = np.inf if smaller else -np.inf
    if k == 1 and ids.shape[1] and (ids >= 0).all() and (np.diff(ids, axis=1) > 0).all():
        # argmin takes the first, the lowest id, among equals
        first = np.argmin(scores if smaller else -scores, axis=1)[:, None]
        return np.take_along_axis(scores, first, 1), np.take_along_axis(ids, first, 1).astype(np.int64)
    key = np.where(ids < 0, np.inf, scores if smaller else -scores)
    # absent entries after present ones, then by score, then by id
    order = np.lexsort((ids, key, ids < 0), axis=-1)[:, :k]
    best = np.take_along_axis(np.where(ids < 0, worst, scores), order, -1)
    who = np.take_along_axis(ids, order, -1)
    missing = k - order.shape[1]
    if missing > 0:
        best = np.pad(best, ((0, 0), (0, missing)), constant_values=worst)
        who = np.pad(who, ((0, 0), (0, missing)), constant_values=-1)
    return best.astype(scores.dtype), who.astype(np.int64)


def _row_mask(keep, n):
    """Rows that may be found, from packed bits; None: all."""
    return None if keep is None else np.unpackbits(keep, count=n, bitorder="little").astype(bool)


def _parts(queries, database, metric, name, mask):
    """Scores of some queries at a time with the rows of ``mask``: the first query's number, the scores."""
    rows = np.arange(len(database)) if mask is None else np.flatnonzero(mask)
    x = _wide(database if mask is None else database[rows])
    # the broadcast holds step * n * d values, which had better stay in the cache
    step = max(1, 2**18 // max(1, len(x) * queries.shape[1]))
    for i in range(0, len(queries), step):
        scores = pairwise(queries[i : i + step], x, metric)
        _no_nan(scores, rows[None], name, metric)
        yield i, scores, rows


def knn(queries, database, k=10, metric="ip", name="database", keep=None):
    """Scores and ids of the k nearest rows; see `lutra.scan.knn`. ``name`` is the database's in an error.

    ``keep``: packed bits of the rows that may be found.
    """
    dtype = _wide(queries[:0]).dtype
    scores, ids = np.empty((len(queries), k), dtype), np.empty((len(queries), k), np.int64)
    mask = _row_mask(keep, len(database))
    for i, part, rows in _parts(queries, database, metric, name, mask):
        here = slice(i, i + len(part))
        scores[here], ids[here] = select(part, np.broadcast_to(rows, part.shape), k, metric)
    return scores, ids


def range_search(queries, database, radius, metric="ip", keep=None):
    """Offsets, scores and ids of all rows within a radius; see `lutra.scan.range_search`."""
    offsets, scores, ids = [0], [np.empty(0, _wide(queries[:0]).dtype)], [np.empty(0, np.int64)]
    mask = _row_mask(keep, len(database))
    for _, part, rows in _parts(queries, database, metric, "database", mask):
        limit = part.dtype.type(radius)
        for found in part:
            inside = np.flatnonzero(found <= limit if metric in DISTANCES else found >= limit)
            best, who = select(found[None, inside], rows[None, inside], max(1, len(inside)), metric)
            scores.append(best[0, : len(inside)])
            ids.append(who[0, : len(inside)])
            offsets.append(offsets[-1] + len(inside))
    return np.array(offsets), np.concatenate(scores), np.concatenate(ids)


def rescore(queries, database, candidates, k, metric="ip"):
    """Scores and ids of the k best candidates; see `lutra.scan.rescore`."""
    candidates = candidates.astype(np.int64)
    outside = (candidates < -1) | (candidates >= len(database))
    if outside.any():
        i = int(np.flatnonzero(outside)[0])
        raise IndexError(
            f"candidates holds {int(candidates.ravel()[i])} at position {i}; "
            f"ids must lie in [0, {len(database)}), or be -1 (no candidate)"
        )
    first = np.sort(candidates, axis=-1)
    repeated = np.zeros_like(first, bool)
    repeated[:, 1:] = first[:, 1:] == first[:, :-1]
    ids = np.where(repeated, -1, first)
    rows = (
        database[np.maximum(ids, 0)]
        if len(database)
        else np.zeros((*ids.shape, queries.shape[1]), queries.dtype)
    )
    scores = pairwise(queries, rows, metric)
    _no_nan(np.where(ids < 0, 0, scores), ids, "database", metric)
    return select(scores, ids, k, metric)


def _no_nan(scores, ids, name="database", metric="ip"):
    bad = np.isnan(scores)
    if bad.any():
        ids = np.broadcast_to(ids, scores.shape)
        raise ValueError(nan_message(name, int(ids[bad].min()), metric))


def nan_message(name, row, metric="ip"):
    """The error of a NaN score: who holds it cannot be told from the score alone."""
    if metric == "poincare":
        return (
            f"the score of row {row} of {name} is NaN: for 'poincare' that row and all queries must lie in "
            "the open unit ball (norm < 1)"
        )
    return f"the score of row {row} of {name} is NaN: that row or a query holds NaN or infinite values"


def pq_tables(queries, codebooks, metric="l2"):
    """Scores (nq, m, ksub) of each sub-vector of each query with each entry of its codebook."""
    m, _, dsub = codebooks.shape
    q = _wide(queries).reshape(len(queries), m, 1, dsub)
    c = _wide(codebooks)
    return np.square(q - c).sum(-1) if metric == "l2" else (q * c).sum(-1)


def pq(queries, codes, codebooks, k=10, metric="l2"):
    """Scores and ids of the k nearest of a product-quantized collection; see `lutra.scan.pq`."""
    m, ksub, _ = codebooks.shape
    if (codes >= ksub).any():
        row, j = (int(v) for v in np.argwhere(codes >= ksub)[0])
        raise IndexError(
            f"codes[{row}, {j}] is {int(codes[row, j])}; codes must be < {ksub}, the size of a codebook"
        )
    tables = pq_tables(queries, codebooks, metric)
    n = len(codes)
    scores, ids = np.empty((len(queries), k), tables.dtype), np.empty((len(queries), k), np.int64)
    all_ids = np.arange(n)[None]
    for i, table in enumerate(tables):
        sums = np.zeros((1, n), tables.dtype)
        for j in range(m):
            sums[0] += table[j, codes[:, j]]
        if np.isnan(sums).any():
            raise ValueError(nan_message("codes", int(np.argwhere(np.isnan(sums))[0][1])))
        scores[i : i + 1], ids[i : i + 1] = select(sums, all_ids, k, metric)
    return scores, ids


# ---------------------------------------------------------------- sums of look-ups
def unpack(codes, m, bits):
    """Entries (n, m) of packed codes: entry j is bits [j bits, (j + 1) bits) of a row, lowest first."""
    planes = np.unpackbits(codes, axis=1, count=m * bits, bitorder="little").reshape(len(codes), m, bits)
    return planes.astype(np.int64) @ (1 << np.arange(bits))


def lookups(tables, codes, bits=8, bias=None):
    """Sums of look-ups (tokens, n): tables (m, tokens, 2**bits), packed codes (n, ceil(m * bits / 8))."""
    m, tokens, _ = tables.shape
    entries = unpack(codes, m, bits)
    out = np.zeros((tokens, len(codes)), _wide(tables[:0]).dtype)
    for j in range(m):
        out += tables[j][:, entries[:, j]]
    return out if bias is None else out + bias.astype(out.dtype)


def lookups_topk(tables, codes, k, bits=8, bias=None):
    """The k largest of `lookups` and their rows."""
    return topk_of(lookups(tables, codes, bits, bias), k, "codes")


def topk_of(scores, k, name):
    """The k largest of each row of scores and where they are; a NaN is an error that names the column."""
    ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    _no_nan(scores, ids, name)
    return select(scores, ids, k)


def packed_logits(hidden, rows, bias=None):
    """Products of queries with decoded rows, and the bias."""
    out = _wide(hidden) @ _wide(rows).T
    return out if bias is None else out + bias.astype(out.dtype)


def lookups_backward(grad, codes, m, bits=8):
    """Gradient of `lookups` to its tables."""
    entries = unpack(codes, m, bits)
    out = np.zeros((m, len(grad), 1 << bits), _wide(grad[:0]).dtype)
    for j in range(m):
        for t in range(len(grad)):
            np.add.at(out[j, t], entries[:, j], grad[t])
    return out
