"""The plan of a gradient: ids sorted by row, and where each row's entries are."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from .._arrays import F32, I32, I64, NUMPY, U8, Kind
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
    rows: int, include_last_offset: bool,
) -> Plan:  # fmt: skip
    """Sort contiguous ids by row (CPU); IndexError for what is out of range."""
    n_ids = ids.shape[0] if offsets is not None else bags * length
    order, touched = kind.empty((n_ids,), I64, ids), kind.empty((n_ids,), I64, ids)
    starts, count = kind.empty((n_ids + 1,), I64, ids), kind.empty((1,), I64, ids)
    bag_of = kind.empty((n_ids,), I32, ids)
    bag_scale = kind.empty((bags,), F32, ids) if mode == "mean" else None
    size = kind.kernels.bag_sort_workspace(n_ids, rows)
    workspace, ptr = kind.empty((size,), U8, ids), kind.ptr
    bad = kind.kernels.bag_sort(
        ptr(ids), id_code, n_ids, None if offsets is None else ptr(offsets), include_last_offset, bags,
        length, padding, MODES[mode], rows, ptr(order), ptr(starts), ptr(touched), ptr(bag_of),
        None if bag_scale is None else ptr(bag_scale), ptr(count), ptr(workspace), size,
    )  # fmt: skip
    if bad != -1:
        _explain(kind, ids, offsets, rows, include_last_offset)
    return Plan(order, starts, touched, bag_of, bag_scale, count)


def zeros(kind: Kind, shape: tuple[int, ...], code: int, like: Any, entries: int) -> Any:
    """Zeros of which ``entries`` places will be written (see `_spread`): the other pages cost nothing."""
    itemsize = kind.empty((0,), code, like).dtype.itemsize
    size = prod(shape) * itemsize
    if _spread._PRIVATE is None or size < _spread._WORTH:
        out = kind.empty(shape, code, like)
        out[...] = 0
        return out
    pages = _spread.fresh_pages(size, entries)
    dtype = kind.empty((0,), code, like).dtype
    if kind is NUMPY:
        import numpy as np

        return np.frombuffer(pages, dtype=dtype).reshape(shape)
    return kind.torch.frombuffer(pages, dtype=dtype).view(shape)  # type: ignore[attr-defined]
