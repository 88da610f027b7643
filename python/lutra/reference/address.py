"""Reference of `lutra.address`."""

from __future__ import annotations

import numpy as np

from . import scan
from .ngrams import ngrams, token_ngrams  # noqa: F401


def _wide(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.float64 else x.astype(np.float32)


def _sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def sign_hash(x, bits=8, score="prob", temperature=1.0):
    """Codes (int32) and weights of the sign hash; see `lutra.address.sign_hash`."""
    z = _wide(x).reshape(*x.shape[:-1], x.shape[-1] // bits, bits)
    codes = ((z >= 0).astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(-1, dtype=np.int32)
    a = np.abs(z)
    weights = _sigmoid(2 * a / z.dtype.type(temperature)).prod(-1)
    if score == "scaled":
        weights = weights * a.sum(-1)
    return codes, weights


def product_keys(queries, keys, k):
    """Scores and ids of the k best product keys; see `lutra.address.product_keys`."""
    q, keys = _wide(queries), _wide(keys)
    n = keys.shape[-2]
    halves = q.reshape(*q.shape[:-1], 2, q.shape[-1] // 2)
    scores = (halves[..., None, :] @ np.swapaxes(keys, -1, -2))[..., 0, :]  # (..., 2, n)
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    best = np.take_along_axis(scores, order, -1)
    rank = np.arange(1, k + 1)
    a, b = np.nonzero(rank[:, None] * rank <= k)  # no other pair can be among the k best sums
    with np.errstate(invalid="ignore"):
        sums = best[..., 0, a] + best[..., 1, b]
    bad = np.isnan(scores).any((-1, -2)) | np.isnan(sums).any(-1)
    if bad.any():
        raise ValueError(product_message(np.argwhere(bad)[0]))
    ids = order[..., 0, a] * n + order[..., 1, b]
    chosen = np.lexsort((ids, -sums), axis=-1)[..., :k]
    return np.take_along_axis(sums, chosen, -1), np.take_along_axis(ids, chosen, -1)


def product_message(at):
    """The error of a query, named by its place in the leading axes, with a NaN score."""
    place = ", ".join(str(int(i)) for i in at)
    return f"a score of the query at [{place}] is NaN: it, or a key, holds NaN or infinite values"


def sign_hash_backward(grad_weights, x, bits=8, score="prob", temperature=1.0):
    """Gradient of ``sum(grad_weights * weights)`` with respect to ``x``."""
    z = _wide(x).reshape(*x.shape[:-1], x.shape[-1] // bits, bits)
    t = z.dtype.type(temperature)
    a, sign = np.abs(z), np.sign(z)
    p = _sigmoid(2 * a / t).prod(-1, keepdims=True)
    u = (sign - np.tanh(z / t)) / t
    inner = u if score == "prob" else sign + a.sum(-1, keepdims=True) * u
    return (grad_weights[..., None] * p * inner).reshape(x.shape).astype(z.dtype)


def fwht(x, scale=1.0):
    """Walsh-Hadamard transform of the last axis, natural order; see `lutra.address.fwht`."""
    y = _wide(x)
    n, h = x.shape[-1], 1
    while h < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([a + b, a - b], -2)
        h *= 2
    return (y.reshape(x.shape) * y.dtype.type(scale)).astype(y.dtype)


def nearest(x, centroids, k=1, metric="l2"):
    """Scores and ids of the k nearest centroids; see `lutra.address.nearest`."""
    return scan.knn(x, centroids, k, metric)


# ---- counter-based random rows
def philox4x32(counter, key, rounds=10):
    """Philox4x32: counter (..., 4) and key (..., 2), uint32, to (..., 4) uint32."""
    c = [np.asarray(counter)[..., i].astype(np.uint64) for i in range(4)]
    k = [np.asarray(key)[..., i].astype(np.uint64) for i in range(2)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(q >> np.uint64(32)) ^ c[1] ^ k[0], q & low, (p >> np.uint64(32)) ^ c[3] ^ k[1], p & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(np.broadcast_arrays(*c), -1).astype(np.uint32)


def check_tokens(ids):
    """IndexError for the first token outside [0, 2^32)."""
    bad = (ids < 0) | (ids.astype(np.int64) >> 32 != 0)
    if bad.any():
        at = np.unravel_index(int(bad.reshape(-1).argmax()), ids.shape)
        raise IndexError(f"ids[{', '.join(map(str, at))}] is {ids[at]}; tokens must lie in [0, 2^32)")


def random_rows(ids, dim, sequences=None, *, seed=0, scale=1.0, dtype="float32", output="normal"):
    """Rows of normal values, or of the words behind them (int32); see `lutra.address.random_rows`.

    Dimension 64 g + 16 w + l is word w of block 16 g + l. The formula is computed in float64.
    """
    check_tokens(ids)
    groups = -(-dim // 64)
    shape = ids.shape
    key = np.zeros(shape, np.int64)
    if sequences is not None:
        key[...] = sequences.reshape(sequences.shape + (1,) * (ids.ndim - sequences.ndim))
    key, token = key.reshape(-1).view(np.uint64), ids.reshape(-1).astype(np.int64).view(np.uint64)
    counter = np.empty((token.size, groups * 16, 4), np.uint64)
    counter[..., 0] = np.arange(groups * 16)
    counter[..., 1] = token[:, None]
    counter[..., 2], counter[..., 3] = (key & np.uint64(0xFFFFFFFF))[:, None], (key >> np.uint64(32))[:, None]
    seed = int(seed) % (1 << 64)
    words = philox4x32(counter, np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64))
    words = words.reshape(token.size, groups, 16, 4)
    if output == "words":
        values = words.view(np.int32)
    else:
        a, b = words[..., 0::2], words[..., 1::2]
        u = (a >> 1).astype(np.int32).astype(np.float32) * np.float32(2.0**-31) + np.float32(2.0**-32)
        t = (b << np.uint32(2)).view(np.int32).astype(np.float32) * np.float32(2.0**-31)
        r, t = np.sqrt(-2 * np.log(u.astype(np.float64))), np.pi / 4 * t.astype(np.float64)
        c = r * np.cos(t) * np.where(b >> 31, -1, 1)
        s = r * np.sin(t)
        swap = (b >> 30 & 1).astype(bool)
        values = np.stack([np.where(swap, s, c), np.where(swap, c, s)], -1).reshape(words.shape) * scale
        values = values.astype(dtype)
    rows = values.transpose(0, 1, 3, 2).reshape(token.size, groups * 64)[:, :dim]
    return np.ascontiguousarray(rows).reshape(*shape, dim)
