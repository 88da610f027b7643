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


def sign_hash_backward(grad_weights, x, bits=8, score="prob", temperature=1.0):
    """Gradient of ``sum(grad_weights * weights)`` with respect to ``x``."""
    z = _wide(x).reshape(*x.shape[:-1], x.shape[-1] // bits, bits)
    t = z.dtype.type(temperature)
    a, sign = np.abs(z), np.sign(z)
    p = _sigmoid(2 * a / t).prod(-1, keepdims=True)
    u = (sign - np.tanh(z / t)) / t
    inner = u if score == "prob" else sign + a.sum(-1, keepdims=True) * u
    return (grad_weights[..., None] * p * inner).reshape(x.shape).astype(z.dtype)


def nearest(x, centroids, k=1, metric="l2"):
    """Scores and ids of the k nearest centroids; see `lutra.address.nearest`."""
    return scan.knn(x, centroids, k, metric)
