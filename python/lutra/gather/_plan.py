"""The plan of a gradient: ids sorted by row, and where each row's entries are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._arrays import F32, Kind, is_torch
from . import _spread
from ._bag import MODES, _explain


class Plan(NamedTuple):
    """The outputs of the kernel bag_sort (csrc/gather/bag.h)."""

    order: Any
    starts: Any
    touched: Any
    bag_of: Any
    bag_scale: Any
    count: Any


def sort_ids(
    kind: Kind, ids: Any, id_code: int, offsets: Any, bags: int, length: int, padding: int, mode: str,
    rows: int, include_last_offset: bool, explain: Callable[[], None] | None = None,
) -> Plan:  # fmt: skip
    """Sort contiguous ids by row (CPU); IndexError for what is out of range, by ``explain`` where given."""
    n_ids = ids.shape[0] if offsets is not None else bags * length
    order, starts, touched, bag_of, count, workspace = _spread.plan_memory(kind, ids, n_ids, rows)
    bag_scale = kind.empty((bags,), F32, ids) if mode == "mean" else None
    ptr = kind.ptr
    bad = kind.kernels.bag_sort(
        ptr(ids), id_code, n_ids, None if offsets is None else ptr(offsets), include_last_offset, bags,
        length, padding, MODES[mode], rows, ptr(order), ptr(starts), ptr(touched), ptr(bag_of),
        None if bag_scale is None else ptr(bag_scale), ptr(count), ptr(workspace), workspace.shape[0],
    )  # fmt: skip
    if bad != -1:
        if explain is not None:
            explain()
        _explain(kind, ids, offsets, rows, include_last_offset)
    return Plan(order, starts, touched, bag_of, bag_scale, count)


def leave_out(rows: Any, ids: Any, pad: int | None) -> tuple[Any, Any, int | None]:
    """(rows, entries, padding_idx) for a bag of ``rows``, one of each of the flat ``ids``.

    Entries of ``pad`` point at a row of zeros behind the others, which is the padding then.
    """
    n = ids.shape[0]
    if is_torch(rows):
        import torch

        entries = torch.arange(n, device=ids.device)
        if pad is None:
            return rows, entries, None
        return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), torch.where(ids == pad, n, entries), n
    entries = np.arange(n)
    if pad is None:
        return rows, entries, None
    zeros = np.zeros_like(rows, shape=(1, rows.shape[1]))
    return np.concatenate([rows, zeros]), np.where(ids == pad, n, entries), n
