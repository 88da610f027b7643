"""Checks of vectors that lie one after another, with a pointer array that says where each set begins."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from .._arrays import F64, FLOATS, I64, Kind

MOST_ROWS = (1 << 31) - 1


def ragged(kind: Kind, tokens: Any, ptr: Any, d: int | None = None, name: str = "tokens") -> int:
    """The dtype code of ``tokens`` (n, d), cut by ``ptr``. Values are looked at on the CPU only."""
    code = _checks.dtype(kind, tokens, name, (*FLOATS, F64))
    _checks.ndim(tokens, name, 2)
    if d is not None and tokens.shape[1] != d:
        raise ValueError(
            f"{name} has shape {tuple(tokens.shape)}; the encoder is for vectors of {d} dimensions"
        )
    _checks.same_kind(kind, ptr, "ptr", tokens, name)
    _checks.dtype(kind, ptr, "ptr", (I64,))
    _checks.ndim(ptr, "ptr", 1)
    if ptr.shape[0] < 1:
        raise ValueError(
            f"ptr is empty; it must hold 0 and where each set of {name} ends, up to {tokens.shape[0]}"
        )
    if tokens.shape[0] > MOST_ROWS:
        raise ValueError(f"{name} has {tokens.shape[0]} rows; at most {MOST_ROWS} in one call")
    if not kind.cuda:
        check_ptr(kind.to_numpy(ptr), tokens.shape[0], name)
    return code


def check_ptr(values: np.ndarray, n: int, name: str = "tokens") -> None:
    """ValueError unless the values rise from 0 to n."""
    if values[0] != 0 or values[-1] != n:
        raise ValueError(
            f"ptr goes from {values[0]} to {values[-1]}; it must begin with 0 and end with {n}, "
            f"the rows of {name}"
        )
    falls = np.flatnonzero(values[1:] < values[:-1])
    if len(falls):
        i = int(falls[0])
        raise ValueError(f"ptr must not fall: ptr[{i}] is {values[i]}, ptr[{i + 1}] is {values[i + 1]}")


def odd_row(i: int, name: str = "tokens") -> ValueError:
    return ValueError(f"{name}[{i}] holds NaN or infinity")


def check_finite(tokens: np.ndarray, name: str = "tokens") -> None:
    """ValueError for the first row with NaN or infinity."""
    fine = np.isfinite(tokens).all(1)
    if not fine.all():
        raise odd_row(int(fine.argmin()), name)
