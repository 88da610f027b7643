"""Argument checks that the ops share. Each error names the argument, what it got and what it needs."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from ._arrays import CODES, NAMES, Kind, kind_of, type_name, where

METRICS = {"ip": 0, "l2": 1, "cosine": 2}
#: Of the exact scans.
EXACT_METRICS = {**METRICS, "l1": 3, "linf": 4, "poincare": 5}


def choice(name: str, value: Any, options: dict[str, int]) -> int:
    """The number behind a string option."""
    try:
        return options[value]
    except (KeyError, TypeError):  # unknown, or not hashable
        allowed = ", ".join(repr(o) for o in options)
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}") from None


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An int (or a NumPy integer) within bounds."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type_name(value)}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bounds}, got {number}")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number > 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type_name(value)}") from None
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return number


def same_kind(kind: Kind, a: Any, name: str, first: Any, first_name: str) -> None:
    """``a`` must be an array of the same library and on the same device as ``first``."""
    other = kind_of(a, name)
    if other is not kind:
        raise TypeError(
            f"{name} is a {where(other, a)}, {first_name} is a {where(kind, first)}; "
            "all arrays of a call must be of one library and on one device"
        )
    if kind.cuda and a.device != first.device:
        raise ValueError(
            f"{name} is on {a.device}, {first_name} on {first.device}; they must be on one device"
        )


def dtype(kind: Kind, a: Any, name: str, allowed: Iterable[int]) -> int:
    """The dtype code of ``a``, which must be one of ``allowed``."""
    code = kind.code(a)
    if code is None or code not in allowed:
        names = ", ".join(NAMES[c] for c in CODES.values() if c in tuple(allowed))
        raise TypeError(f"{name} has dtype {str(a.dtype).removeprefix('torch.')}; it must be one of {names}")
    return code


def ndim(a: Any, name: str, *allowed: int) -> None:
    """The number of dimensions of ``a`` must be one of ``allowed``."""
    if len(a.shape) not in allowed:
        need = " or ".join(f"{n}-d" for n in allowed)
        raise ValueError(f"{name} must be {need}, got shape {tuple(a.shape)}")


def no_kernel(kind: Kind, op: str) -> None:
    """On CUDA nothing falls back on the reference in silence: say what is missing."""
    if kind.cuda and kind.kernels is None:
        raise RuntimeError(f"{op} on CUDA arrays needs lutra's CUDA module, which is missing: {kind.why_not}")
    if kind.cuda:
        raise TypeError(f"{op} has no float64 kernel on CUDA; cast to float32, or move the arrays to the CPU")
