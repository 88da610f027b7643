"""Reference of `lutra.scan.maxsim`: late interaction, one document at a time.

score(i, j) = sum over the tokens t of query i of max over the tokens p of document j of <t, p>. Maxima start
at -inf,
so a document without tokens scores -inf, and a query without tokens 0. Masked tokens do not exist.
"""

from __future__ import annotations

import numpy as np

from .scan import _wide, select, unpack


def check_ptr(name, ptr, n, of):
    """Offsets begin at 0, do not fall and end at the number of tokens."""
    if ptr[0] != 0:
        raise ValueError(f"{name} begins with {int(ptr[0])}; it must begin with 0")
    if ptr[-1] != n:
        raise ValueError(f"{name} ends with {int(ptr[-1])}; it must end with {n}, the number of rows of {of}")
    falls = np.flatnonzero(np.diff(ptr) < 0)
    if len(falls):
        i = int(falls[0])
        raise ValueError(
            f"{name} falls from {int(ptr[i])} to {int(ptr[i + 1])} at position {i + 1}; offsets must not fall"
        )


def check_candidates(candidates, documents):
    """Ids of documents, or -1."""
    outside = (candidates < -1) | (candidates >= documents)
    if outside.any():
        i = int(np.flatnonzero(outside)[0])
        raise IndexError(
            f"candidates holds {int(candidates.ravel()[i])} at position {i}; "
            f"ids must lie in [0, {documents}), or be -1 (no candidate)"
        )


def nan_message(document):
    return (
        f"the score of document {document} is NaN: its tokens or a query's hold NaN or infinite values "
        "(or doc_scale does)"
    )


def decode_residual(codes, centroid_ids, centroids, values, normalize):
    """Tokens (n, d): centroid plus the value of each dimension's code, over its norm where that is wanted."""
    n, d = len(codes), centroids.shape[1]
    bits = (len(values) - 1).bit_length()
    outside = (centroid_ids < 0) | (centroid_ids >= len(centroids))
    if outside.any():
        i = int(np.flatnonzero(outside)[0])
        raise IndexError(
            f"centroid_ids[{i}] is {int(centroid_ids[i])}; ids must lie in [0, {len(centroids)})"
        )
    rows = (
        np.zeros((n, d), np.float32) if n == 0 else centroids[centroid_ids] + values[unpack(codes, d, bits)]
    )
    if normalize:
        norm = np.sqrt(np.square(rows, dtype=np.float64).sum(-1, keepdims=True))
        rows = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0, casting="same_kind")
    return rows


@np.errstate(invalid="ignore", over="ignore")  # NaN scores are reported
def maxsim(
    queries, query_ptr, docs, doc_ptr, candidates=None, doc_scale=None, doc_mask=None, query_mask=None
):
    """Scores (nq, columns) and arg-maxima (columns, query tokens) int32.

    Columns are the documents, or the places of ``candidates`` (nq, columns). The arg-maximum of a query's
    token is
    the row of docs that gives its maximum, the lowest of equals; -1 where there is none.
    """
    check_ptr("query_ptr", query_ptr, len(queries), "queries")
    check_ptr("doc_ptr", doc_ptr, len(docs), "docs")
    nq, documents = len(query_ptr) - 1, len(doc_ptr) - 1
    if candidates is not None:
        check_candidates(candidates, documents)
    q, x = _wide(queries), _wide(docs)
    if doc_scale is not None:
        x = x * doc_scale[:, None].astype(x.dtype)
    owner = np.repeat(np.arange(nq), np.diff(query_ptr))  # of each query token
    live = np.ones(len(q), bool) if query_mask is None else query_mask.astype(bool)
    counts = np.bincount(owner[live], minlength=nq)
    columns = documents if candidates is None else candidates.shape[1]
    scores = np.full((nq, columns), -np.inf, q.dtype)
    argmax = np.full((columns, len(q)), -1, np.int32)
    if candidates is None:
        scores[counts == 0] = 0
    else:
        scores[(candidates >= 0) & (counts == 0)[:, None]] = 0
    if not live.any():
        return scores, argmax
    needed = np.arange(documents) if candidates is None else np.unique(candidates[candidates >= 0])
    for j in needed:
        rows = np.arange(doc_ptr[j], doc_ptr[j + 1])
        if doc_mask is not None:
            rows = rows[doc_mask[rows].astype(bool)]
        if candidates is None:
            tokens, pairs = np.flatnonzero(live), None
        else:
            pairs = np.argwhere(candidates == j)
            tokens = np.flatnonzero(live & np.isin(owner, pairs[:, 0]))
        if not len(rows) or not len(tokens):
            continue
        similarity = q[tokens] @ x[rows].T
        best = np.argmax(similarity, axis=1)
        most = similarity[np.arange(len(tokens)), best]
        sums = np.zeros(nq, q.dtype)
        np.add.at(sums, owner[tokens], most)
        if np.isnan(sums).any():
            raise ValueError(nan_message(int(j)))
        if pairs is None:
            scores[counts > 0, j] = sums[counts > 0]
            argmax[j, tokens] = rows[best]
        else:
            row_of = np.full(len(q), -1, np.int64)
            row_of[tokens] = rows[best]
            for i, c in pairs:
                if counts[i]:
                    scores[i, c] = sums[i]
                    mine = slice(query_ptr[i], query_ptr[i + 1])
                    argmax[c, mine] = row_of[mine]
    return scores, argmax


def maxsim_backward(grad, queries, query_ptr, docs, doc_ptr, candidates, argmax):
    """Gradients of `maxsim` to queries and docs, in float32 or wider."""
    q, x = _wide(queries), _wide(docs)
    to_q, to_x = np.zeros_like(q), np.zeros_like(x)
    g = grad.astype(q.dtype)
    for i in range(len(query_ptr) - 1):
        for t in range(query_ptr[i], query_ptr[i + 1]):
            columns = np.flatnonzero(argmax[:, t] >= 0)
            rows = argmax[columns, t]
            to_q[t] = g[i, columns] @ x[rows]
            np.add.at(to_x, rows, g[i, columns, None] * q[t])
    return to_q, to_x


def top(scores, k, candidates=None):
    """The k best of each row of scores, equal scores by increasing id; a candidate that is named twice "
    "counts once."""
    if candidates is None:
        ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        return select(scores, ids, k)
    order = np.argsort(candidates, axis=-1, kind="stable")
    ids, scores = np.take_along_axis(candidates, order, -1), np.take_along_axis(scores, order, -1)
    repeated = np.zeros_like(ids, bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return select(scores, np.where(repeated, -1, ids), k)
