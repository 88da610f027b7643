"""quantize_rows and dequantize_rows: tables as 8-bit codes with a scale and a minimum per row."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import F16, F32, F64, FLOATS, I8, U8, call
from ..reference import gather as reference
from ._bag import _table

_tuple = tuple.__new__
_DTYPES = {"uint8": U8, "int8": I8}
_BLOCK = 1 << 20  # values worked on at a time: temporaries stay in the cache


class QuantizedRows(NamedTuple):
    """Result of `quantize_rows`; `bag` takes the three as table, scale and minimum."""

    codes: Any
    scale: Any
    minimum: Any


def quantize_rows(table: Any, dtype: str = "uint8") -> QuantizedRows:
    """Store each row of a table as 8-bit codes with a scale and a minimum of its own.

    Parameters
    ----------
    table : array, shape (rows, dim), float32, float16, bfloat16 or float64
        Finite.
    dtype : {'uint8', 'int8'}, default 'uint8'

    Returns
    -------
    codes : array, shape (rows, dim), of ``dtype``
    scale : array, shape (rows,), float32
        ``(max - min) / 255`` of the row; 1 for a constant row.
    minimum : array, shape (rows,), float32
        The value of code 0: the row's minimum for 'uint8', and that plus 128 scales for 'int8'.

    Raises
    ------
    TypeError
        Another type or dtype.
    ValueError
        A wrong shape or ``dtype``; a row that holds NaN or infinity (its number is named).

    Notes
    -----
    A value is off by at most half a scale. Ties round to even.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> q = lutra.gather.quantize_rows(np.array([[0., 1., 2.]], np.float32))
    >>> q.codes
    array([[  0, 128, 255]], dtype=uint8)
    """
    return _tuple(QuantizedRows, call("quantize_rows", _quantize_rows, (table,), (dtype,)))


def dequantize_rows(codes: Any, scale: Any, minimum: Any) -> Any:
    """The table behind 8-bit codes: ``minimum + scale * codes`` of each row.

    Parameters
    ----------
    codes : array, shape (rows, dim), uint8 or int8
    scale, minimum : arrays, shape (rows,), float32

    Returns
    -------
    table : array, shape (rows, dim), float32
    """
    return call("dequantize_rows", _dequantize_rows, (codes, scale, minimum), ())


def _quantize_rows(kind, table, dtype="uint8"):
    code = _checks.choice("dtype", dtype, _DTYPES)
    source = _checks.dtype(kind, table, "table", (*FLOATS, F64))
    _checks.ndim(table, "table", 2)
    rows, dim = table.shape
    if dim == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}; a row without values has no minimum")
    if kind.name == "torch":
        return _quantize_torch(table, dtype)
    codes = kind.empty((rows, dim), code, table)
    scale, minimum = kind.empty((rows,), F32, table), kind.empty((rows,), F32, table)
    step = max(1, _BLOCK // dim)
    for r in range(0, rows, step):
        block = table[r : r + step]
        if source not in (F32, F64, F16):  # bfloat16
            block = kind.cast(block, F32)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are reported below
            parts = reference.quantize_rows(block, dtype)
        codes[r : r + step], scale[r : r + step], minimum[r : r + step] = parts
        bad = ~(abs(minimum[r : r + step]) < float("inf")) | ~(scale[r : r + step] < float("inf"))
        if bool(bad.any()):
            _not_finite(r + int(bad.argmax()))
    return codes, scale, minimum


def _not_finite(row):
    raise ValueError(f"table[{row}] holds NaN or infinity; quantize_rows needs finite values")


def _quantize_torch(table, dtype):
    """The formula of `lutra.reference.gather.quantize_rows` on torch tensors, on any device."""
    import torch

    table = table.detach()
    rows, dim = table.shape
    codes = table.new_empty((rows, dim), dtype=getattr(torch, dtype))
    scale, minimum = (table.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    step = max(1, (_BLOCK if table.device.type == "cpu" else _BLOCK * 64) // dim)
    for r in range(0, rows, step):
        block = table[r : r + step]
        block = block if block.dtype == torch.float64 else block.float()
        low, high = block.amin(1), block.amax(1)
        s = (high / 255 - low / 255).float()
        s = torch.where(s > 0, s, torch.ones_like(s))
        q = ((block / 2 - low[:, None] / 2) / (s[:, None] / 2)).round_().clamp_(0, 255)
        low = low.float()
        if dtype == "int8":
            q, low = q - 128, low + 128 * s
        codes[r : r + step], scale[r : r + step], minimum[r : r + step] = q.to(codes.dtype), s, low
    bad = ~(torch.isfinite(minimum) & torch.isfinite(scale))
    if bool(bad.any()):
        _not_finite(int(bad.to(torch.uint8).argmax()))
    return codes, scale, minimum


def _dequantize_rows(kind, codes, scale, minimum):
    for a, name in ((scale, "scale"), (minimum, "minimum")):
        if a is None:
            raise TypeError(f"{name} is None; it must be an array of shape (rows,)")
        _checks.same_kind(kind, a, name, codes, "codes")
    _checks.dtype(kind, codes, "codes", (U8, I8))
    _table(kind, codes, scale, minimum)
    rows = kind.cast(codes, F32)  # a copy: the codes are integers
    rows *= scale[:, None]
    rows += minimum[:, None]
    return rows
