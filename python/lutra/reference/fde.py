"""Reference of `lutra.address.simhash`, `fde` and `ball_carving`, and the random numbers behind an encoder.

Everything random is a function of (seed, repetition, plane or output, dimension) alone, drawn by
`address.random_rows`, so an encoder with more planes, repetitions or dimensions begins with the same ones.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from .address import random_rows

# What a sequence of random_rows is used for: 4 * repetition + one of these.
_PLANES, _SIGNS, _COUNT, _SKETCH = range(4)
#: Planes are rounded to multiples of 1 / _GRID: the last bits of a platform's sine do not reach them, and
#: their products with small integers are exact.
_GRID = 4096.0


def planes(seed: int, repetitions: int, d: int, k_sim: int) -> np.ndarray:
    """Gaussian vectors, (repetitions, d, k_sim) float32."""
    ids = np.broadcast_to(np.arange(k_sim), (repetitions, k_sim))
    values = random_rows(ids, d, 4 * np.arange(repetitions) + _PLANES, seed=seed, dtype="float64")
    return np.ascontiguousarray((np.rint(values * _GRID) / _GRID).transpose(0, 2, 1)).astype(np.float32)


def signs(seed: int, repetitions: int, d: int, d_proj: int) -> np.ndarray:
    """Independent +1 and -1, (repetitions, d, d_proj) int8."""
    ids = np.broadcast_to(np.arange(d_proj), (repetitions, d_proj))
    words = random_rows(ids, d, 4 * np.arange(repetitions) + _SIGNS, seed=seed, output="words")
    return np.ascontiguousarray(_sign(words).transpose(0, 2, 1))


def count(seed: int, repetitions: int, d: int, d_proj: int) -> tuple[np.ndarray, np.ndarray]:
    """The output (int32) and the sign (int8) of each input, (repetitions, d) each."""
    ids = np.broadcast_to(np.arange(2), (repetitions, 2))
    words = random_rows(ids, d, 4 * np.arange(repetitions) + _COUNT, seed=seed, output="words")
    return _below(words[:, 0], d_proj), _sign(words[:, 1])


def sketch(seed: int, n: int, final_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The output (int32) and the sign (int8) of each of n coordinates of the final count-sketch."""
    words = random_rows(np.arange(2), n, np.array(_SKETCH), seed=seed, output="words")
    return _below(words[0], final_dim), _sign(words[1])


def _sign(words: np.ndarray) -> np.ndarray:
    return np.where(words < 0, -1, 1).astype(np.int8)


def _below(words: np.ndarray, n: int) -> np.ndarray:
    return (words.view(np.uint32).astype(np.uint64) * np.uint64(n) >> np.uint64(32)).astype(np.int32)


# ---------------------------------------------------------------- partitions
def simhash(x: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Partitions of x (n, d) by vectors (d, k) or (repetitions, d, k): (n,) or (n, repetitions) int32.

    Bit i is [product with vector i > 0]; a partition is g after g <- 2 g + (bit xor (g & 1)) over all bits.
    """
    if vectors.ndim == 3:
        each = [simhash(x, v) for v in vectors]
        return np.stack(each, 1) if each else np.zeros((len(x), 0), np.int32)
    bits = x.astype(np.float64) @ vectors.astype(np.float64) > 0
    number = np.zeros(len(x), np.int32)
    for i in range(bits.shape[1]):
        number = 2 * number + (bits[:, i] ^ (number & 1))
    return number


def sketch_bits(partition: np.ndarray) -> np.ndarray:
    """The bits of a partition's sketch (the first vector's is the highest): what distances are counted on."""
    return partition ^ partition >> 1


def popcount(x: np.ndarray) -> np.ndarray:
    total = np.zeros(x.shape, np.int64)
    for shift in range(32):
        total += x >> shift & 1
    return total


# ---------------------------------------------------------------- encodings
def _occupied(tokens, ptr, partitions, number):
    """Blocks with tokens: (document * number + partition, rising), sums, counts and the first token."""
    document = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    key = document * number + partitions
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    if not len(first):
        return ordered, np.zeros((0, tokens.shape[1])), first, first
    counts = np.diff(first, append=len(ordered))
    return ordered[first], np.add.reduceat(tokens[order], first, 0), counts, order[first]


def _projected(x, psi, scale):
    return x if psi is None else (x @ psi.astype(np.float64)) * scale


def fde(
    tokens: np.ndarray,
    ptr: np.ndarray,
    vectors: np.ndarray,
    psi: np.ndarray | None,
    scale: float = 1.0,
    *,
    query: bool = False,
    fill_empty: bool = True,
    final: tuple[np.ndarray, np.ndarray, int] | None = None,
) -> np.ndarray:
    """Encodings; see `lutra.address.fde`. ``vectors`` (repetitions, d, k), ``psi`` (repetitions, d, width)
    or None, ``final`` the outputs, signs and length of a count-sketch."""
    x = tokens.astype(np.float64)
    repetitions, d, k = vectors.shape
    number, documents = 1 << k, len(ptr) - 1
    width = d if psi is None else psi.shape[2]
    out = np.zeros((documents, repetitions, number, width))
    for r in range(repetitions):
        key, sums, counts, first = _occupied(x, ptr, simhash(tokens, vectors[r]), number)
        of = None if psi is None else psi[r]
        divisor = 1 if query else counts[:, None]
        out[key // number, r, key % number] = _projected(sums, of, scale) / divisor
        if query or not fill_empty:
            continue
        bounds = np.searchsorted(key, np.arange(documents + 1) * number)
        for document, (begin, end) in enumerate(pairwise(bounds)):
            if begin == end:  # no token: zeros
                continue
            mine = begin + np.argsort(first[begin:end])  # by their first token: ties go to the lowest
            taken = key[mine] % number
            empty = np.setdiff1d(np.arange(number), taken)
            distance = popcount(sketch_bits(taken)[:, None] ^ sketch_bits(empty)[None])
            nearest = first[mine[distance.argmin(0)]] if len(empty) else empty
            out[document, r, empty] = _projected(x[nearest], of, scale)
    flat = out.reshape(documents, repetitions * number * width)
    if final is not None:
        target, sign, length = final
        sketched = np.zeros((length, documents))
        np.add.at(sketched, target, (flat * sign).T)
        flat = np.ascontiguousarray(sketched.T)
    return flat.astype(np.float64 if tokens.dtype == np.float64 else np.float32)


def fde_blocks(
    tokens: np.ndarray, ptr: np.ndarray, vectors: np.ndarray, psi: np.ndarray | None, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The blocks of query encodings that have tokens: (ptr, blocks, values)."""
    x = tokens.astype(np.float64)
    repetitions, d, k = vectors.shape
    number, documents = 1 << k, len(ptr) - 1
    width = d if psi is None else psi.shape[2]
    rows, blocks, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros((0, width))]
    for r in range(repetitions):
        key, sums, _, _ = _occupied(x, ptr, simhash(tokens, vectors[r]), number)
        rows.append(key // number)
        blocks.append(r * number + key % number)
        values.append(_projected(sums, None if psi is None else psi[r], scale))
    row, block = np.concatenate(rows), np.concatenate(blocks)
    order = np.lexsort((block, row))
    out = np.concatenate(values)[order].astype(np.float64 if tokens.dtype == np.float64 else np.float32)
    return np.searchsorted(row[order], np.arange(documents + 1)), block[order].astype(np.int32), out


def ball_carving(tokens: np.ndarray, ptr: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Sums of clusters: a token joins the first whose centre, its first token, it matches to threshold."""
    x = tokens.astype(np.float64)
    sums: list[Any] = []
    bounds = [0]
    for begin, end in pairwise(ptr):
        centres: list[int] = []
        own: list[np.ndarray] = []
        for i in range(begin, end):
            fits = np.flatnonzero(x[centres] @ x[i] >= threshold)
            if len(fits):
                own[fits[0]] = own[fits[0]] + x[i]
            else:
                centres.append(i)
                own.append(x[i])
        sums += own
        bounds.append(len(sums))
    out = np.array(sums).reshape(len(sums), tokens.shape[1])
    dtype = np.float64 if tokens.dtype == np.float64 else np.float32
    return out.astype(dtype), np.array(bounds, np.int64)
