"""``filter=`` of every search: which rows or ids may be reported.

A filter is resolved once a call into a bitmap over rows (of a functional op) or positions (of an index); the
kernels test a row's bit when the row is about to be offered, so that rows that could not win cost no test.

Where the search runs on a GPU, a filter that is an array on a GPU is resolved there, by `_device_filters`:
nothing waits, and a CUDA graph can hold it. All others are resolved on the host, and their bitmap is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import _device_filters
from ._arrays import U8, _adopt, is_native, kind_of, type_name

_KINDS = (
    "a bool array, packed bits (uint8, little bit order), an array or list of ids, "
    "or a function of an int64 array of ids that returns a bool array"
)


def resolve(filter: Any, n: int, ids: Any = None) -> Any:
    """A filter as a bitmap over rows, or over the positions of an index.

    Parameters
    ----------
    filter : None, array, list, set or callable
        One of

        - None: everything passes;
        - a bool array: element i says whether row (of an index: id) i passes;
        - packed bits: a uint8 array, bit ``i & 7`` of byte ``i >> 3`` says it of row (id) i, as
          ``np.packbits(mask, bitorder="little")`` makes them;
        - an array of any other integer type, a list, tuple, set or range: the rows (ids) that pass;
        - a callable, which gets all rows (ids) in one int64 array and returns a bool array of that shape.

        Arrays may be of any library and on any device.
    n : int
        Rows, or vectors in the index.
    ids : None, array of int64 (n,), or an index's ``Ids``
        The id of each position; None: ids are the row numbers.

    Returns
    -------
    uint8 array, shape (ceil(n / 8),), or None
        Bit ``i & 7`` of byte ``i >> 3`` is set where position i passes; the bits behind n are 0. It may be
        the caller's own memory: not to be written to. None where everything passes.

    Raises
    ------
    TypeError
        None of these kinds; a callable that returns no bool array.
    ValueError
        A bitmap of another length than n needs (where ids are row numbers; with ids of their own a bitmap may
        have any length, and ids beyond it do not pass); ids that are not 1-d.
    IndexError
        A row number outside [0, n). Ids that an index does not hold are passed over.
    """
    if filter is None:
        return None
    if getattr(ids, "are_positions", False):
        ids = None
    if callable(filter) and not is_native(filter) and not hasattr(filter, "__dlpack__"):
        return _called(filter, n, ids)
    a = _array(filter)
    if a.ndim != 1:
        raise ValueError(f"filter must be 1-d, got shape {a.shape}")
    if a.dtype == np.bool_:
        return _mask(a, n, ids)
    if a.dtype == np.uint8:
        return _bits(a, n, ids)
    if a.dtype.kind not in "iu":
        raise TypeError(f"filter has dtype {a.dtype}; it must be {_KINDS}")
    if a.dtype == np.uint64 and a.size and int(a.max()) >= 2**63:
        raise ValueError(f"filter holds {int(a.max())}; ids must be less than 2**63")
    return _ids(a.astype(np.int64, copy=False), n, ids)


def beside(like: Any, filter: Any, n: int, ids: Any = None, table: Callable[[], Any] | None = None) -> Any:
    """`resolve`: the bitmap as an array of the library of ``like``, on its device.

    Where both lie on a GPU nothing is copied to the host, and nothing waits for the device. ``table`` is a
    function that gives the ids of an index (``ids``) as an array beside ``like``.
    """
    if filter is None:
        return None
    kind = None if not is_native(like) or isinstance(like, np.ndarray) else kind_of(like, "queries")
    if kind is not None and kind.cuda and (native := _device_filters.on_gpu(filter)) is not None:
        if ids is None or ids.are_positions:
            return _device_filters.resolve(kind, like, native, n)
        return _device_filters.resolve(kind, like, native, n, table, ids.increasing)
    keep = resolve(filter, n, ids)
    if kind is None:
        return keep
    return kind.from_numpy(keep if keep.flags.writeable else keep.copy(), U8, like)


def count(keep: np.ndarray) -> int:
    """How many positions pass a resolved filter."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        whole = len(keep) & ~7
        wide = int(np.bitwise_count(keep[:whole].view(np.uint64)).sum(dtype=np.int64)) if whole else 0
        return wide + int(np.bitwise_count(keep[whole:]).sum(dtype=np.int64))
    return int(np.unpackbits(keep).sum(dtype=np.int64))


def positions(keep: np.ndarray, n: int) -> np.ndarray:
    """The positions that pass a resolved filter, increasing, int64."""
    return np.flatnonzero(np.unpackbits(keep, count=n, bitorder="little"))


def _array(filter: Any) -> np.ndarray:
    if isinstance(filter, np.ndarray):
        return filter
    if is_native(filter) or hasattr(filter, "__dlpack__"):
        native = _adopt(filter)
        return kind_of(native, "filter").to_numpy(native)
    if isinstance(filter, (set, frozenset)):
        filter = sorted(filter)
    if not isinstance(filter, (list, tuple, range)):
        raise TypeError(f"filter must be {_KINDS}; got {type_name(filter)}")
    try:
        a = np.asarray(filter)
    except (ValueError, OverflowError) as error:
        raise TypeError(f"filter must be {_KINDS}: {error}") from None
    if a.size == 0:
        return np.empty(0, np.int64)
    if a.dtype.kind not in "iub":
        raise TypeError(f"filter is a {type_name(filter)} of {a.dtype}; it must be {_KINDS}")
    return a


def _packed(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask, bitorder="little")


def _id_array(ids: Any) -> np.ndarray:
    return ids.array if hasattr(ids, "are_positions") else np.asarray(ids)


def _called(filter: Callable[[np.ndarray], Any], n: int, ids: Any) -> np.ndarray:
    # A copy: the function may do with its argument what it likes.
    mask = filter(np.arange(n) if ids is None else _id_array(ids).copy())
    if is_native(mask) or hasattr(mask, "__dlpack__"):
        native = _adopt(mask)
        mask = kind_of(native, "filter").to_numpy(native)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (n,):
        got = (
            f"{mask.dtype} of shape {mask.shape}" if isinstance(mask, np.ndarray) else f"a {type_name(mask)}"
        )
        raise TypeError(f"filter returned {got}; it must return a bool array of shape ({n},)")
    return _packed(mask)


def _mask(mask: np.ndarray, n: int, ids: Any) -> np.ndarray:
    if ids is None:
        if len(mask) != n:
            raise ValueError(f"filter has {len(mask)} bools; it needs {n}, one for each row")
        return _packed(mask)
    array = _id_array(ids)
    inside = array < len(mask)
    return _packed(inside & mask[np.where(inside, array, 0)] if len(mask) else inside)


def _bits(bits: np.ndarray, n: int, ids: Any) -> np.ndarray:
    if ids is None:
        if len(bits) != (n + 7) // 8:
            raise ValueError(
                f"filter has {len(bits)} bytes of packed bits; it needs {(n + 7) // 8}, for {n} rows "
                "(ids in a list or in an array of another integer type are taken as ids)"
            )
        bits = np.ascontiguousarray(bits)
        if n % 8 and bits[-1] >> (n % 8):
            bits = bits.copy()
            bits[-1] &= (1 << n % 8) - 1
        return bits
    array = _id_array(ids)
    byte = array >> 3
    inside = byte < len(bits)
    if len(bits) == 0:
        return _packed(inside)
    return _packed(
        inside & ((bits[np.where(inside, byte, 0)] >> (array & 7).astype(np.uint8)) & 1).astype(bool)
    )


def _ids(wanted: np.ndarray, n: int, ids: Any) -> np.ndarray:
    if ids is None:
        outside = (wanted < 0) | (wanted >= n)
        if outside.any():
            where = int(outside.argmax())
            raise IndexError(f"filter[{where}] is {int(wanted[where])}; rows must lie in [0, {n})")
        rows = wanted
    elif hasattr(ids, "positions"):
        rows = ids.positions(wanted)
        rows = rows[rows >= 0]
    else:
        return _packed(np.isin(np.asarray(ids), wanted))
    keep = np.zeros((n + 7) // 8, np.uint8)
    np.bitwise_or.at(keep, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))
    return keep
