"""Groups of rows: fields of a recommender, or rows of similar frequency."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _checks
from ..._arrays import is_torch


def row_order(rows: int, counts: Any) -> np.ndarray:
    """Rows from the most to the least frequent; without counts they are taken to be in that order already."""
    if counts is None:
        return np.arange(rows)
    counts = np.asarray(counts.detach().cpu() if is_torch(counts) else counts, np.float64)
    if counts.shape != (rows,):
        raise ValueError(f"counts has shape {counts.shape}; it must be ({rows},), one per row of the table")
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise ValueError("counts must be finite and not negative")
    return np.argsort(-counts, kind="stable")


def row_groups(name: str, groups: Any, rows: int, counts: Any = None) -> Tensor:
    """The group of each row, (rows,) int64.

    ``groups``: an integer, that many groups of about equal size by frequency; or an integer array (rows,),
    groups numbered from 0 without gaps.
    """
    if isinstance(groups, (int, np.integer)) and not isinstance(groups, bool):
        number = _checks.integer(name, groups, 1, max(1, rows))
        out = np.empty(rows, np.int64)
        out[row_order(rows, counts)] = np.arange(rows) * number // max(1, rows)
        return torch.from_numpy(out)
    array = np.asarray(groups.detach().cpu() if is_torch(groups) else groups)
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be an integer or an integer array of shape ({rows},), the group of each row; "
            f"got shape {array.shape}, dtype {array.dtype}"
        )
    if counts is not None:
        raise ValueError(f"counts has no use where {name} says the group of each row")
    present = np.unique(array)
    if rows and not np.array_equal(present, np.arange(len(present))):
        raise ValueError(f"{name} must be numbered from 0 without gaps, got groups {present[:10].tolist()}")
    return torch.from_numpy(array.astype(np.int64))


def check_rate(name: str, value: Any, low: float = 0.0, high: float = 1.0) -> float:
    """A finite number in [low, high]."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}; it must lie in [{low}, {high}]")
    return number
