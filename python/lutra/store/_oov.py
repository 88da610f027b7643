"""Vectors of strings that a store does not hold, from their character n-grams."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..address import ngrams, random_rows
from ..gather import bag

LOW, HIGH = 3, 6
RANDOM_BUCKETS = 1 << 31


def _ids(texts: Sequence[str], buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the character n-grams of 3 to 6 characters of ``<word>``, lowered, of all words of a text."""
    found = ngrams(
        list(texts), buckets=buckets, word_ngrams=0, char_ngrams=(LOW, HIGH), tokenizer="whitespace"
    )
    return found.ids, found.offsets


def unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def bucket_rows(keys: Sequence[str], unit_rows: np.ndarray, buckets: int) -> np.ndarray:
    """Row b, float16: the mean of the unit vectors of all keys that have an n-gram which falls on b (as often
    as they have it). One at a time in the order of the keys, so that it does not depend on anything else."""
    ids, offsets = _ids(keys, buckets)
    of_key = np.repeat(np.arange(len(keys)), np.diff(np.append(offsets, len(ids))))
    order = np.argsort(ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(buckets))
    return bag(unit_rows, of_key[order], starts, mode="mean").astype(np.float16)


def vectors(texts: Sequence[str], table: np.ndarray | None, dim: int, norm: float) -> np.ndarray:
    """(texts, dim) float32, of length ``norm``.

    The mean of the bucket rows of the text's n-grams; where there is no table, or it knows none of them, the
    mean of a pseudo-random N(0, I) row of each n-gram: equal parts of strings make them alike, and nothing
    else does.
    """
    out = np.zeros((len(texts), dim), np.float32)
    if table is not None:
        ids, offsets = _ids(texts, len(table))
        out = bag(table, ids, offsets, mode="mean").astype(np.float32)
    unknown = np.flatnonzero(~out.any(1))
    if len(unknown):
        ids, offsets = _ids([texts[i] for i in unknown.tolist()], RANDOM_BUCKETS)
        ends = np.append(offsets[1:], len(ids))
        for row, begin, end in zip(unknown, offsets, ends):
            # a string without n-grams (empty, or white space) is one n-gram of its own
            of = ids[begin:end] if end > begin else np.array([RANDOM_BUCKETS])
            out[row] = random_rows(of, dim).mean(0)
    return unit(out) * np.float32(norm)
