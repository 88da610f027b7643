"""Reference of `lutra.scan.quantize_int8` and `lutra.scan.knn_screened`."""

from __future__ import annotations

import numpy as np

from .scan import _no_nan, pairwise, select


def unit(x):
    """Rows (float32) over their norms, zero rows as they are."""
    norm = np.sqrt(np.square(x, dtype=np.float64).sum(-1, keepdims=True))
    return np.divide(x, norm, out=np.zeros(x.shape), where=norm != 0).astype(np.float32)


def quantize_int8(x, normalize=False):
    """Codes, inverse scales, half norms, mean and bounds; see `lutra.scan.Screen`."""
    n, d = x.shape
    x = x.astype(np.float32)
    finite = np.isfinite(x).all(1) & (np.square(x, dtype=np.float64).sum(1) < 1e30)
    if not finite.all():
        raise ValueError(
            f"row {int(np.flatnonzero(~finite)[0])} of x holds NaN or infinite values, "
            "or its norm is 1e15 or more; it cannot be screened"
        )
    rows = unit(x) if normalize else x
    mean = rows.mean(0, dtype=np.float64).astype(np.float32) if n else np.zeros(d, np.float32)
    centred = rows - mean
    scale = np.maximum(np.abs(centred).max(1, initial=0), 1e-30 * 127) / np.float32(127)
    code = np.rint(centred / scale[:, None])
    blocks, steps = (n + 15) // 16, (d + 3) // 4
    padded = np.full((blocks * 16, steps * 4), 128, np.uint8)
    padded[:n, :d] = code + 128
    inverse, half = np.ones(blocks * 16, np.float32), np.zeros(blocks * 16, np.float32)
    square = np.square(centred).sum(1)
    inverse[:n], half[:n] = 1 / scale, square / (2 * scale)
    lost = np.linalg.norm(centred - scale[:, None] * code, axis=1) / scale
    norms = np.linalg.norm(code, axis=1), np.linalg.norm(rows, axis=1), np.sqrt(square)
    bounds = np.array([v.max(initial=0) for v in (lost, *norms)], np.float32) * np.float32(1.0001)
    return padded.reshape(blocks, 16, steps, 4).swapaxes(1, 2).copy(), inverse, half, mean, bounds


def knn_screened(queries, database, screen, k=10, metric="ip", keep=None):
    """The screen rules nothing out that belongs to the results: exact search."""
    n = len(database)
    ids = np.arange(n)
    if keep is not None:
        ids = np.flatnonzero(np.unpackbits(keep, count=n, bitorder="little"))
    rows = database[ids]
    scores, found = [], []
    for q in queries:
        part = pairwise(q[None], rows, metric)
        _no_nan(part, ids[None])
        s, i = select(part, ids[None], k, metric)
        scores.append(s)
        found.append(i)
    if not scores:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    return np.concatenate(scores), np.concatenate(found)
