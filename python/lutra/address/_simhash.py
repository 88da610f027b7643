"""simhash: partitions of vectors by the signs of products with given vectors."""

from __future__ import annotations

from typing import Any

from .. import _checks
from .._arrays import F32, F64, FLOATS, I32, Kind, call
from ..reference import fde as reference
from ._ragged import check_finite, odd_row

MOST_BITS = 31


def simhash(x: Any, planes: Any) -> Any:
    """Partition vectors by the signs of their products with planes: SimHash, numbered by a Gray code.

    Bit ``i`` is 1 where the product with plane ``i`` is greater than 0. The partition's number is ``g`` after
    ``g <- 2 g + (bit_i xor (g & 1))`` over all planes, so that ``g ^ (g >> 1)`` are the bits, the first
    plane's the highest.

    Parameters
    ----------
    x : array, shape (n, d), float32, float16, bfloat16 or float64
    planes : array, shape (d, k) or (repetitions, d, k), float32 or float64
        ``k`` from 0 to 31. `FDE.planes` are such.

    Returns
    -------
    array, shape (n,) or (n, repetitions), int32
        In [0, 2^k).

    Raises
    ------
    TypeError
        Another dtype, or arrays of two libraries.
    ValueError
        Another shape; NaN or infinity in ``x`` (not looked for on CUDA, where such products give a 0 bit).

    Notes
    -----
    Products are summed in float32 (float64 for float64 ``x``) in the order of the dimensions: a vector's
    number does not depend on what else is in ``x``. Where a product is 0 up to rounding, SIMD levels and
    backends may disagree on its sign. Cost: ``2 d k repetitions`` operations a vector, at the machine's
    multiply-add rate; products are not written to memory. No gradient.

    References
    ----------
    Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002.
    Dhulipala, Hadian, Jayaram, Lee and Mirrokni, MUVERA: Multi-Vector Retrieval via Fixed Dimensional
    Encodings, NeurIPS 2024, arXiv 2405.19504.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.address.simhash(np.array([[1., 1.], [1., -1.], [-1., -1.]]), np.eye(2))
    array([2, 3, 0], dtype=int32)
    """
    return call("simhash", _simhash, (x, planes), ())


def shape_of(x: Any, planes: Any) -> tuple[Any, ...]:
    """Checks that need no data; the result's shape."""
    _checks.ndim(x, "x", 2)
    _checks.ndim(planes, "planes", 2, 3)
    if planes.shape[-2] != x.shape[1]:
        raise ValueError(
            f"planes has shape {tuple(planes.shape)}; its last axis but one must be {x.shape[1]}, as x has "
            f"shape {tuple(x.shape)}"
        )
    if planes.shape[-1] > MOST_BITS:
        raise ValueError(f"planes has shape {tuple(planes.shape)}; at most {MOST_BITS} planes make a number")
    return (x.shape[0],) if len(planes.shape) == 2 else (x.shape[0], planes.shape[0])


def _simhash(kind: Kind, x: Any, planes: Any) -> Any:
    code = _checks.dtype(kind, x, "x", (*FLOATS, F64))
    _checks.same_kind(kind, planes, "planes", x, "x")
    of_planes = _checks.dtype(kind, planes, "planes", (F32, F64))
    shape = shape_of(x, planes)
    if kind.kernels is None or F64 in (code, of_planes):
        if kind.cuda and kind.name == "torch":
            from ..torch_ops.fde import compose_simhash

            return compose_simhash(x, planes)
        host = kind.to_numpy(x)
        check_finite(host, "x")
        return kind.from_numpy(reference.simhash(host, kind.to_numpy(planes)), I32, x)
    n, d = x.shape
    x, out = kind.dense(x), kind.empty(shape, I32, x)
    if len(planes.shape) == 3:  # columns: the planes of one repetition after those of another
        planes = planes.swapaxes(0, 1).reshape(d, -1)
    planes = kind.dense(planes)
    repetitions = shape[1] if len(shape) == 2 else 1
    k = planes.shape[1] // repetitions if repetitions else 0
    bad = kind.kernels.simhash(
        kind.ptr(x), code, n, d, kind.ptr(planes), repetitions, k, kind.ptr(out), *kind.launch(x)
    )
    if bad != -1:
        raise odd_row(bad, "x")
    return out
