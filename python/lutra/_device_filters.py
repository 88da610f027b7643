"""Filters that lie on a GPU: resolved there, so that nothing is copied to the host and nothing waits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ._arrays import I64, U8, Kind, _adopt, is_native, kind_of, to_cupy

_INTEGERS = ("int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")  # uint8 holds packed bits
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: the bits in the highest byte, without a carry


def on_gpu(filter: Any) -> Any:
    """The filter as an array of torch or CuPy where it lies on a GPU; None where it does not."""
    if not (is_native(filter) or hasattr(filter, "__dlpack__")):
        return None
    native = _adopt(filter)
    return native if kind_of(native, "filter").cuda else None


def resolve(
    kind: Kind,
    like: Any,
    filter: Any,
    n: int,
    table: Callable[[], Any] | None = None,
    increasing: bool = False,
) -> Any:
    """A filter that is an array on a GPU as packed bits over positions, beside ``like``.

    Parameters
    ----------
    kind : Kind
        Of ``like``, an array on a GPU.
    filter : array
        Bools, packed bits (uint8) or row numbers (ids), of torch or CuPy.
    n : int
        Positions.
    table : function, optional
        Gives the id of each position, an int64 array beside ``like``; None: ids are positions.
    increasing : bool
        Whether these ids increase.

    Returns
    -------
    uint8 array, shape (ceil(n / 8),)
        Where ``filter`` is that already, itself: bits behind n are then as they are given.

    Raises
    ------
    TypeError, ValueError
        As `lutra._filters.resolve`, for shapes and dtypes. Numbers out of range are passed over, for to raise
        an error would mean to wait for the device.
    """
    if len(filter.shape) != 1:
        raise ValueError(f"filter must be 1-d, got shape {tuple(filter.shape)}")
    dtype, length, whole = str(filter.dtype).removeprefix("torch."), int(filter.shape[0]), (n + 7) // 8
    if dtype not in ("bool", "uint8", *_INTEGERS):
        raise TypeError(f"filter has dtype {dtype}; it must hold bools, packed bits (uint8) or integers")
    if table is None and dtype == "bool" and length != n:
        raise ValueError(f"filter has {length} bools; it needs {n}, one for each row")
    if table is None and dtype == "uint8" and length != whole:
        raise ValueError(
            f"filter has {length} bytes of packed bits; it needs {whole}, for {n} rows "
            "(ids in an array of another integer type are taken as ids)"
        )
    filter = kind.dense(_beside(kind, filter, like))
    if table is None and dtype == "uint8":
        return filter
    if n == 0 or length == 0:
        return _zeros(kind, like, whole)
    xp = sys.modules[kind.name]
    if dtype in _INTEGERS:
        passes = _named(kind, xp, kind.cast(filter, I64), like, n, table and table(), increasing)
    elif table is None:
        passes = filter
    elif dtype == "bool":
        ids = table()
        inside = ids < length
        passes = filter[xp.where(inside, ids, 0)] & inside
    else:
        ids = table()
        inside = ids < 8 * length
        bits = filter[xp.where(inside, ids >> 3, 0)] >> kind.cast(ids & 7, U8)
        passes = ((bits & 1) > 0) & inside
    return pack(kind, passes, like)


def pack(kind: Kind, passes: Any, like: Any) -> Any:
    """Bools as packed bits, in little order."""
    n = int(passes.shape[0])
    padded = _zeros(kind, like, (n + 7) // 8 * 8)
    padded[:n] = passes
    words = padded.view(sys.modules[kind.name].int64) * _GATHER
    return kind.cast((words >> 56) & 255, U8)


def _named(kind: Kind, xp: Any, wanted: Any, like: Any, n: int, ids: Any, increasing: bool) -> Any:
    """Whether each position's id is among those that are wanted, as bools."""
    if ids is not None and not increasing:
        wanted = xp.sort(wanted).values if kind.name == "torch" else xp.sort(wanted)
        return wanted[xp.searchsorted(wanted, ids).clip(0, len(wanted) - 1)] == ids
    if ids is None:
        rows = xp.where((wanted >= 0) & (wanted < n), wanted, n)
    else:
        rows = xp.searchsorted(ids, wanted).clip(0, n - 1)
        rows = xp.where(ids[rows] == wanted, rows, n)
    passes = _zeros(kind, like, n + 1)  # the last is of what is passed over
    if kind.name == "torch":
        passes.index_fill_(0, rows, 1)
    else:
        passes[rows] = 1
    return passes[:n]


def _zeros(kind: Kind, like: Any, n: int) -> Any:
    a = kind.empty((n,), U8, like)
    a[...] = 0
    return a


def _beside(kind: Kind, a: Any, like: Any) -> Any:
    """An array on a GPU in the library and on the device of ``like``."""
    if kind.name == "cupy":
        return to_cupy(a, like.device)
    of = kind_of(a, "filter")
    return (a.detach() if of is kind else sys.modules["torch"].from_dlpack(a)).to(like.device)
