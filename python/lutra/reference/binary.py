"""Reference of packed bits: `lutra.scan.binary`, `lutra.scan.rescore_bits`, `lutra.address.binarize`."""

from __future__ import annotations

import numpy as np

from .scan import _no_nan, select

_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def bit_counts(packed):
    """Set bits of each row: (..., b) uint8 to (...) int64."""
    return _COUNTS[packed].sum(-1, dtype=np.int64)


def binary(queries, database, k=10, metric="hamming", keep=None):
    """Scores and ids of the k nearest rows of packed bits; see `lutra.scan.binary`."""
    nq, n = len(queries), len(database)
    scores, ids = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    every = np.arange(n)[None]
    if keep is not None:
        every = np.where(np.unpackbits(keep, count=n, bitorder="little"), every, -1)
    for i, q in enumerate(queries):
        if metric == "hamming":
            part = bit_counts(q ^ database).astype(np.float32)
        else:
            common, united = (bit_counts(a).astype(np.float32) for a in (q & database, q | database))
            part = np.float32(1) - np.divide(common, united, out=np.ones_like(common), where=united > 0)
        scores[i : i + 1], ids[i : i + 1] = select(part[None], every, k, "l2")
    return scores, ids


def signs(packed, d, dtype=np.float32):
    """Packed bits (..., ceil(d / 8)) as vectors (..., d) of 1 (set) and -1."""
    return np.unpackbits(packed, axis=-1, count=d, bitorder="little").astype(dtype) * 2 - 1


def rescore_bits(queries, database, candidates, k):
    """Scores and ids of the k best candidates by <q, signs>; see `lutra.scan.rescore_bits`."""
    outside = (candidates < -1) | (candidates >= len(database))
    if outside.any():
        i = int(np.flatnonzero(outside)[0])
        raise IndexError(
            f"candidates holds {int(candidates.ravel()[i])} at position {i}; "
            f"ids must lie in [0, {len(database)}), or be -1 (no candidate)"
        )
    ids = np.sort(candidates.astype(np.int64), axis=-1)
    ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1
    d = queries.shape[1]
    rows = database[np.maximum(ids, 0)] if len(database) else np.zeros((*ids.shape, (d + 7) // 8), np.uint8)
    wide = queries.astype(np.float64)
    scores = np.einsum("ij,ikj->ik", wide, signs(rows, d, np.float64))
    _no_nan(np.where(ids < 0, 0, scores), ids)
    return select(scores.astype(queries.dtype), ids, k)


def binarize(x, threshold=0.0):
    """Packed bits of x > threshold; see `lutra.address.binarize`."""
    return np.packbits(x > np.asarray(threshold, x.dtype), axis=-1, bitorder="little")
