"""Reference of `lutra.models.ffn_memory`."""

from __future__ import annotations

import numpy as np


def column_top(scores, k):
    """The k largest of each column of scores (n, columns), of equal ones the first.

    Returns values (columns, k), padded with -inf, and rows, padded with -1.
    """
    columns = scores.shape[1]
    values, rows = np.full((columns, k), -np.inf, scores.dtype), np.full((columns, k), -1, np.int64)
    for column in range(columns):
        order = np.argsort(-scores[:, column], kind="stable")[:k]
        values[column, : len(order)], rows[column, : len(order)] = scores[order, column], order
    return values, rows


def value_tokens(values, embedding, k):
    """The k tokens of largest logits ``values @ embedding.T``, and their probabilities."""
    logits = values.astype(np.float64) @ embedding.astype(np.float64).T
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    p = np.exp(logits - logits.max(1, keepdims=True))
    return ids, np.take_along_axis(p / p.sum(1, keepdims=True), ids, 1)
