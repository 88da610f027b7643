"""binarize: packed sign bits of vectors."""

from __future__ import annotations

from math import isnan, prod
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import F32, F64, FLOATS, I8, U8, call, is_native
from ..reference import binary as reference


def binarize(x: Any, threshold: Any = 0.0) -> Any:
    """Vectors as packed bits: is each value above the threshold?

    Parameters
    ----------
    x : array, shape (..., d), float32, float16, bfloat16, float64, int8 or uint8
    threshold : float, or array of shape (d,) in the library of x, default 0.0
        One for all dimensions, or one for each (their medians, for vectors whose signs say little). Compared
        in float32; in float64 for float64 input.

    Returns
    -------
    array, shape (..., ceil(d / 8)), uint8
        Bit j % 8 of byte j // 8, counted from the lowest, is ``x[..., j] > threshold``: what
        ``numpy.packbits(x > threshold, axis=-1, bitorder="little")`` gives, and the bit order of FAISS. Spare
        bits are 0. NaN gives 0.

    Raises
    ------
    TypeError
        x is no array or has another dtype; a threshold that is no number or array.
    ValueError
        x is 0-d; a threshold that is NaN (in an array on CUDA it gives 0 bits) or of another shape.
    NotImplementedError
        float64 on CUDA.

    Notes
    -----
    Cost: one pass over x. Not differentiable.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.address.binarize(np.array([[1.0, -1.0, 0.5, 0.0]], np.float32))
    array([[5]], dtype=uint8)
    """
    thresholds = None
    if is_native(threshold) or hasattr(threshold, "__dlpack__"):
        thresholds, threshold = threshold, 0.0
    else:
        try:
            threshold = float(threshold)
        except (TypeError, ValueError):
            raise TypeError(f"threshold must be a number or an array, got {threshold!r}") from None
        if isnan(threshold):
            raise ValueError("threshold is NaN; it must be a number")
    return call("binarize", _binarize, (x, thresholds), (threshold,))


def _binarize(kind, x, thresholds=None, threshold=0.0):
    code = _checks.dtype(kind, x, "x", (*FLOATS, F64, I8, U8))
    if len(x.shape) == 0:
        raise ValueError("x is 0-d; it must have an axis of values")
    d = x.shape[-1]
    if kind.cuda:
        return _on_cuda(kind, x, thresholds, threshold, code, d)
    limit = np.full(d, threshold, np.float64 if code == F64 else np.float32)
    if thresholds is not None:
        _check_thresholds(kind, x, thresholds, d)
        limit = np.ascontiguousarray(kind.to_numpy(thresholds), limit.dtype)
        if np.isnan(limit).any():
            raise ValueError(f"threshold[{int(np.isnan(limit).argmax())}] is NaN; it must be a number")
    if code in (I8, U8):
        x, code = kind.cast(x, F32), F32
    shape = (*x.shape[:-1], (d + 7) // 8)
    if kind.kernels is None or code == F64:
        return kind.from_numpy(reference.binarize(_floats(kind.to_numpy(x)), limit), U8, x)
    x = kind.dense(x)
    out = kind.empty(shape, U8, x)
    kind.kernels.binarize(kind.ptr(x), code, prod(shape[:-1]), d, limit, kind.ptr(out))
    return out


def _check_thresholds(kind, x, thresholds, d):
    _checks.same_kind(kind, thresholds, "threshold", x, "x")
    _checks.dtype(kind, thresholds, "threshold", (*FLOATS, F64))
    if tuple(thresholds.shape) != (d,):
        raise ValueError(f"threshold has shape {tuple(thresholds.shape)}; it must be a number or ({d},)")


def _on_cuda(kind, x, thresholds, threshold, code, d):
    if kind.kernels is None or code == F64:
        raise NotImplementedError("binarize takes no float64 on CUDA: cast the array to float32")
    if thresholds is not None:
        _check_thresholds(kind, x, thresholds, d)
        thresholds = kind.dense(kind.cast(thresholds, F32))
    if code in (I8, U8):
        x, code = kind.cast(x, F32), F32
    x = kind.dense(x)
    out = kind.empty((*x.shape[:-1], (d + 7) // 8), U8, x)
    kind.kernels.binarize(
        kind.ptr(x), code, prod(x.shape[:-1]), d, None if thresholds is None else kind.ptr(thresholds),
        threshold, kind.ptr(out), *kind.launch(x),
    )  # fmt: skip
    return out


def _floats(x):
    return x.astype(np.float32) if x.dtype == np.float16 else x
