"""sign_hash: MemoryFormer's hash of vectors by the signs of their values."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from numpy import ndarray

from .. import _checks
from .._arrays import F32, F64, FLOATS, I32, call, eager, quick
from ..reference import address as reference

_tuple = tuple.__new__  # builds a named tuple in half the time of calling its class
_quick = quick("sign_hash")
_INF = float("inf")

SCORES = {"prob": 0, "scaled": 1}


class SignHash(NamedTuple):
    """Result of `sign_hash`."""

    codes: Any
    weights: Any


def sign_hash(x: Any, bits: int = 8, score: str = "prob", temperature: float = 1.0) -> SignHash:
    """Hash chunks of each vector by the signs of their values.

    The last axis is cut into ``d / bits`` chunks; the signs of a chunk give its code (bit 0 is the sign of
    the first value, 1 for values >= 0), and the magnitudes give a weight that makes the hash trainable.

    Parameters
    ----------
    x : array, shape (..., d), float32, float16, bfloat16 or float64
        ``d`` must be a multiple of ``bits``.
    bits : int, default 8
        Bits per code, 1 to 16.
    score : {'prob', 'scaled'}, default 'prob'
        ``'prob'`` is the paper's weight, the product of ``sigmoid(2 |z_i| / t)`` over the chunk;
        ``'scaled'``, as in the published code, multiplies it by the sum of ``|z_i|``.
    temperature : float, default 1.0
        ``t`` above; positive.

    Returns
    -------
    codes : array, shape (..., d / bits), int32
    weights : array, shape (..., d / bits), float32 (float64 for float64 input)
        NaN where the chunk holds a NaN.

    Raises
    ------
    TypeError
        ``x`` is no array, or has another dtype.
    ValueError
        ``d`` is not a multiple of ``bits``; ``bits``, ``score`` or ``temperature`` is out of range.

    Notes
    -----
    Cost: one pass over ``x``. Gradient (torch): through the weights; the codes have none.

    References
    ----------
    Ding et al., MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers,
    NeurIPS 2024, arXiv 2411.12992.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.address.sign_hash(np.array([[1., -1., 2., 3.]], np.float32), bits=2).codes
    array([[1, 3]], dtype=int32)
    """
    if type(x) is ndarray or eager(x):
        result = _quick(x, bits, score, temperature)
        if result is not None:
            return _tuple(SignHash, result)
    return _tuple(SignHash, call("sign_hash", _sign_hash, (x,), (bits, score, temperature)))


def _sign_hash_shape(x, bits, score, temperature):
    """Checks that need no data; (score code, chunks)."""
    if type(bits) is not int or not 1 <= bits <= 16:
        bits = _checks.integer("bits", bits, 1, 16)
    score_code = _checks.choice("score", score, SCORES)
    if type(temperature) is not float or not 0 < temperature < _INF:
        _checks.positive("temperature", temperature)
    shape = x.shape
    if len(shape) == 0 or shape[-1] % bits:
        raise ValueError(f"x has shape {tuple(shape)}; its last axis must be a multiple of bits = {bits}")
    return score_code, shape[-1] // bits


def _sign_hash(kind, x, bits=8, score="prob", temperature=1.0):
    score_code, tables = _sign_hash_shape(x, bits, score, temperature)
    code = kind.code(x)
    if code not in FLOATS or kind.kernels is None:
        code = _checks.dtype(kind, x, "x", (*FLOATS, F64))
        _checks.no_kernel(kind, "sign_hash")
        codes, weights = reference.sign_hash(kind.to_numpy(x), bits, score, temperature)
        return kind.from_numpy(codes, I32, x), kind.from_numpy(weights, F64 if code == F64 else F32, x)
    x = kind.dense(x)
    shape = (*x.shape[:-1], tables)
    codes, weights = kind.empty(shape, I32, x), kind.empty(shape, F32, x)
    kind.kernels.sign_hash(
        kind.ptr(x), code, prod(shape[:-1]), tables, bits, score_code, temperature,
        kind.ptr(codes), kind.ptr(weights), *kind.launch(x),
    )  # fmt: skip
    return codes, weights


def _sign_hash_backward(kind, grad_weights, x, bits, score, temperature):
    """Gradient of the weights with respect to x (torch's backward; see csrc/address/sign_hash.h)."""
    score_code, tables = _sign_hash_shape(x, bits, score, temperature)
    code = _checks.dtype(kind, x, "x", (*FLOATS, F64))
    if kind.kernels is None or code == F64:
        grad = reference.sign_hash_backward(
            kind.to_numpy(grad_weights), kind.to_numpy(x), bits, score, temperature
        )
        return kind.from_numpy(grad, code, x)
    x, grad_weights = kind.dense(x), kind.dense(grad_weights)
    grad = kind.empty(tuple(x.shape), code, x)
    kind.kernels.sign_hash_backward(
        kind.ptr(x), code, prod(x.shape[:-1]), tables, bits, score_code, temperature,
        kind.ptr(grad_weights), kind.ptr(grad), *kind.launch(x),
    )  # fmt: skip
    return grad
