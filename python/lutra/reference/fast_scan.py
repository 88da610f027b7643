"""Reference of the scan of 4-bit codes: `lutra.scan.fast_scan`, `pack4`, `unpack4`."""

from __future__ import annotations

import numpy as np

from .scan import select

ROWS = 16  # of a block


def groups(m):
    """Groups of eight look-ups."""
    return (m + 7) // 8


def pack4(entries):
    """(n, m) entries below 16 as blocks (ceil(n / 16), groups, 16, 4); see `lutra.scan.pack4`."""
    n, m = entries.shape
    g, blocks = groups(m), (n + ROWS - 1) // ROWS
    full = np.zeros((blocks * ROWS, g * 8), np.uint8)
    full[:n, :m] = entries
    full = full.reshape(blocks, ROWS, g, 2, 4)
    return np.ascontiguousarray((full[:, :, :, 0] | full[:, :, :, 1] << 4).transpose(0, 2, 1, 3))


def unpack4(packed, n, m):
    """The first n rows of m entries of blocks; see `lutra.scan.unpack4`."""
    rows = packed.transpose(0, 2, 1, 3)  # (blocks, 16, groups, 4)
    entries = np.stack([rows & 15, rows >> 4], axis=3)
    return np.ascontiguousarray(entries.reshape(packed.shape[0] * ROWS, packed.shape[1] * 8)[:n, :m])


def rounded_tables(tables):
    """Integer tables (nq, m, 16), their step (nq,) and the sum of their least values (nq,)."""
    nq, m, _ = tables.shape
    g = groups(m)
    full = np.zeros((nq, g * 8, 16), np.float32)
    full[:, :m] = tables
    low = full.min(2)
    spread = (full.max(2) - low).reshape(nq, g, 2, 4).sum(2, dtype=np.float32)
    widest = spread.max((1, 2)) if g else np.zeros(nq, np.float32)
    step = np.where(widest > 0, widest / np.float32(254), np.float32(1)).astype(np.float32)
    per = (np.float32(1) / step)[:, None, None]
    entries = ((full - low[:, :, None]) * per + np.float32(0.5)).astype(np.int32)
    return entries[:, :m], step, low.sum(1, dtype=np.float32)


def fast_scan(tables, codes, n, k=10, metric="ip", bias=None, add=None, mul=None, keep=None):
    """Scores and ids of the k best rows by rounded tables; see `lutra.scan.fast_scan`."""
    nq, m, _ = tables.shape
    sign = np.float32(-1 if metric == "l2" else 1)
    bad = np.argwhere(~np.isfinite(tables))
    if len(bad):
        raise ValueError(f"tables{list(map(int, bad[0]))} is {tables[tuple(bad[0])]}; tables must be finite")
    look, step, least = rounded_tables(sign * tables)
    entries = unpack4(codes, n, m)
    every = np.arange(n)
    if keep is not None:
        every = np.where(np.unpackbits(keep, count=n, bitorder="little"), every, -1)
    scores, ids = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    for i in range(nq):
        total = np.zeros(n, np.int64)
        for j in range(m):
            total += look[i, j, entries[:, j]]
        keys = least[i] + step[i] * total.astype(np.float32)
        if mul is not None:
            keys = keys * mul
        if bias is not None:
            keys = keys + sign * bias[i]
        if add is not None:
            keys = keys + sign * add
        scores[i : i + 1], ids[i : i + 1] = select((sign * keys)[None], every[None], k, metric)
    return scores, ids
