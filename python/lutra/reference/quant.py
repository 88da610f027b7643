"""Reference of the kernels that `lutra.quant` is made of."""

from __future__ import annotations

import numpy as np


def linear(x, matrix):
    """Rows (n, a) times a matrix (a, b), each row by itself; see csrc/address/linear.h."""
    return np.einsum("ik,kj->ij", x, matrix, optimize=False)


def pq_encode(x, books, directions=None, threshold=0.0, rounds=0):
    """Entries (n, m) uint8 for codebooks (m, ksub, dsub); see csrc/address/pq_encode.h."""
    m, _, dsub = books.shape
    n = len(x)
    r = x.reshape(n, m, 1, dsub) - books
    errors = np.square(r).sum(-1)
    entries = errors.argmin(-1)
    if threshold <= 0 or not n:
        return entries.astype(np.uint8)
    u = (x if directions is None else directions).astype(np.float32)
    squares = np.square(u).sum(1)
    present = np.where(squares > 0, squares, 1)
    share = np.minimum(threshold * threshold / present, 0.81)
    weight = np.where(squares > 0, np.maximum((m * dsub - 1) * share / (1 - share) - 1, 0), 0)
    u = u / np.sqrt(present)[:, None]
    along = np.einsum("njck,njk->njc", r, u.reshape(n, m, dsub))
    every = np.arange(n)
    total = sum(along[every, j, entries[:, j]] for j in range(m))
    active = weight > 0
    for _ in range(rounds):
        if not active.any():
            break
        changed = np.zeros(n, bool)
        for j in range(m):
            others = total - along[every, j, entries[:, j]]
            loss = errors[:, j] + weight[:, None] * np.square(others[:, None] + along[:, j])
            best = loss.argmin(1)
            moves = active & (best != entries[:, j])
            entries[moves, j] = best[moves]
            total = np.where(moves, others + along[every, j, best], total)
            changed |= moves
        active &= changed
    return entries.astype(np.uint8)


def pq_decode(entries, books):
    """Vectors (n, m * dsub) of entries (n, m); see csrc/address/pq_decode.h."""
    return books[np.arange(len(books)), entries].reshape(len(entries), -1)


def rq_encode(dots, norms, gram, m, beam, begin=0, end=None, start=None, reached=None, keep=1):
    """Entries (n, keep, end) uint8 and scores (n, keep) by beam search; see csrc/address/rq_encode.h."""
    end = m if end is None else end
    n, ksub = len(dots), norms.size // m
    norms, gram = norms.reshape(m, ksub), gram.reshape(m, ksub, m, ksub)
    if begin == 0:
        reached, codes = np.zeros((n, 1), np.float32), np.empty((n, 1, 0), np.int64)
    else:
        codes = start.astype(np.int64)
    every = np.arange(n)[:, None]
    for j in range(begin, end):
        cross = np.zeros((n, reached.shape[1], ksub), np.float32)
        for i in range(j):
            cross += gram[i, :, j][codes[:, :, i]]
        first = norms[j] - 2 * dots[:, (j - begin) * ksub : (j - begin + 1) * ksub]
        scores = reached[:, :, None] + (first[:, None] + 2 * cross)
        scores = scores.reshape(n, scores.shape[1] * ksub)
        order = np.argsort(scores, axis=1, kind="stable")[:, :beam]
        reached = np.take_along_axis(scores, order, 1)
        codes = np.concatenate([codes[every, order // ksub], (order % ksub)[:, :, None]], axis=2)
    return codes[:, :keep].astype(np.uint8), reached[:, :keep]
