"""Reference of codes in bit planes: their layout, and the scan by full scores."""

from __future__ import annotations

import numpy as np

from .fast_scan import pack4, unpack4
from .scan import select

PART = 16  # dimensions whose bits lie together


def low_size(d, bits):
    """Bytes of a row's lower planes."""
    return (bits - 1) * 2 * ((d + PART - 1) // PART)


def split(u, bits):
    """Integers (n, d) below 2**bits: entries of the highest plane (n, ceil(d / 4)), bytes of the others."""
    n, d = u.shape
    parts = (d + PART - 1) // PART
    full = np.zeros((n, parts * PART), np.uint8)
    full[:, :d] = u
    top = (full >> (bits - 1)).reshape(n, parts * PART // 4, 4)
    entries = (top * np.array([1, 2, 4, 8], np.uint8)).sum(2, dtype=np.uint8)
    low = [np.packbits((full >> b) & 1, axis=1, bitorder="little") for b in range(bits - 2, -1, -1)]
    return np.ascontiguousarray(entries[:, : (d + 3) // 4]), np.concatenate(low, axis=1)


def join(entries, low, d, bits):
    """The inverse of `split`."""
    n = len(entries)
    top = ((entries[:, :, None] >> np.arange(4, dtype=np.uint8)) & 1).reshape(n, -1)[:, :d]
    u = top.astype(np.uint8)
    planes = low.reshape(n, bits - 1, -1)
    for p in range(bits - 1):
        u = 2 * u + np.unpackbits(planes[:, p], axis=1, count=d, bitorder="little")
    return u


def values(u, bits, levels):
    """What the integers stand for, float32."""
    if levels is None:
        return u.astype(np.float32) - np.float32(((1 << bits) - 1) / 2)
    return levels[u].astype(np.float32)


def plane_scan(
    rotated, codes, low, n, bits, k, metric, levels=None, bias=None, add=None, mul=None, keep=None
):
    """Scores and ids of the k best rows by full scores; see csrc/scan/fast_scan.h.

    rotated (nq, d); codes: blocks of the highest plane, as `pack4` makes them; low (n, low_size(d, bits)).
    """
    nq, d = rotated.shape
    x = values(join(unpack4(codes, n, (d + 3) // 4), low[:n], d, bits), bits, levels)
    scores = rotated.astype(np.float64) @ x.T.astype(np.float64)
    for term, op in ((mul, np.multiply), (add, np.add)):
        if term is not None:
            scores = op(scores, term[:n])
    if bias is not None:
        scores = scores + bias[:, None]
    ids = np.arange(n)
    if keep is not None:
        ids = np.where(np.unpackbits(keep, count=n, bitorder="little"), ids, -1)
    return select(scores.astype(np.float32), np.tile(ids, (nq, 1)), k, metric)


__all__ = ["join", "low_size", "pack4", "plane_scan", "split", "unpack4", "values"]
