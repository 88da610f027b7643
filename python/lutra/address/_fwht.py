"""fwht: the fast Walsh-Hadamard transform."""

from __future__ import annotations

from math import isfinite, prod
from typing import Any

from .. import _checks
from .._arrays import F64, FLOATS, call
from ..reference import address as reference


def fwht(x: Any, scale: float = 1.0) -> Any:
    """Walsh-Hadamard transform of the last axis: ``scale * H x`` with ``H[i, j] = (-1)**popcount(i & j)``.

    Parameters
    ----------
    x : array, shape (..., n), float32, float16, bfloat16 or float64
        ``n`` must be a power of two.
    scale : float, default 1.0
        A factor of the result. With ``n ** -0.5`` the transform is orthogonal and its own inverse; with
        ``1 / n`` it is the inverse of the transform with 1.

    Returns
    -------
    array, the shape and type of x
        In natural (Sylvester) order, ``scale * x @ scipy.linalg.hadamard(n)``; summed in float32 (float64
        for float64), rounded once. A NaN or an infinity reaches every value of its row.

    Raises
    ------
    TypeError
        ``x`` is no array, or has another dtype; ``scale`` is no number.
    ValueError
        ``n`` is not a power of two; ``scale`` is not finite.

    Notes
    -----
    Cost: ``n log2 n`` additions a row and one pass over the memory. Gradient (torch): the transform of the
    gradient with the same scale. On CUDA rows of more than 8192 values and float64 are transformed by torch's
    own operations, one pass a level; not those of CuPy.

    References
    ----------
    Fino and Algazi, Unified Matrix Treatment of the Fast Walsh-Hadamard Transform, IEEE Transactions on
    Computers, 1976.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.address.fwht(np.array([1., 0., 1., 0.], np.float32))
    array([2., 2., 0., 0.], dtype=float32)
    """
    try:
        scale = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"scale must be a number, got {scale!r}") from None
    if not isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}")
    return call("fwht", _fwht, (x,), (scale,))


def _fwht_length(x):
    """The length of a row, checked."""
    n = x.shape[-1] if len(x.shape) else 0
    if n < 1 or n & (n - 1):
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must be a power of two")
    return n


def _fwht(kind, x, scale=1.0):
    n = _fwht_length(x)
    code = _checks.dtype(kind, x, "x", (*FLOATS, F64))
    if kind.cuda and not (kind.kernels is not None and code != F64 and n <= kind.kernels.fwht_most):
        if kind.name != "torch":
            raise NotImplementedError("fwht of CuPy arrays takes no float64 and rows of at most 8192 values")
        return _levels(kind.torch, x, n, scale)
    if not kind.cuda and (kind.kernels is None or code == F64):
        return kind.from_numpy(reference.fwht(kind.to_numpy(x), scale), code, x)
    x = kind.dense(x)
    out = kind.empty(tuple(x.shape), code, x)
    kind.kernels.fwht(kind.ptr(x), code, prod(x.shape[:-1]), n, scale, kind.ptr(out), *kind.launch(x))
    return out


def _levels(torch, x, n, scale):
    """The transform in torch's operations."""
    y, h = (x if x.dtype is torch.float64 else x.float()), 1
    while h < n:
        a, b = y.reshape(*x.shape[:-1], n // (2 * h), 2, h).unbind(-2)
        y = torch.stack((a + b, a - b), -2)
        h *= 2
    return (y.reshape(x.shape) * scale).to(x.dtype)
