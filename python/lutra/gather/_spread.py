"""Memory of large dense gradients: pages that are zero untouched, and pages of gradients that were freed.

What such a gradient costs is less its writing than the system's pages. 28 MB (10^6 rows of 7 floats) on a
Zen 4, two threads: faults on small pages 7.3 ms and 2.5 to give them back, on huge ones 1.8 ms; writing zeros
to pages that are there 0.3 to 0.5 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from math import prod
from typing import Any

from .._arrays import I32, I64, NUMPY, U8, Kind

#: Below this many bytes writing the zeros is as cheap.
_WORTH = 1 << 22
_PRIVATE = getattr(mmap, "MAP_PRIVATE", None)
_FREE: Any = getattr(mmap, "MADV_FREE", None)


def worth_spreading(kind: Kind, entries: int, rows: int, row_bytes: int) -> bool:
    """Whether a gradient with at most ``entries`` rows that are not zero is better spread than written whole.

    Memory fresh from the system is zero, and a page of it costs nothing until it is touched: a training step
    of an embedding of 10^6 x 64 with 64 ids takes 0.8 ms instead of 52. (numpy.zeros is no use: it asks for
    huge pages, and then nearly all of them are touched.)
    """
    return not kind.cuda and _PRIVATE is not None and entries * 4 <= rows and rows * row_bytes >= _WORTH


def few_pages(kind: Kind, entries: int, rows: int, row_bytes: int) -> bool:
    """As `worth_spreading`, where the pages of all rows are at hand (see `empty`).

    Untouched pages pay then only where most stay so: a fault costs what writing zeros to eight pages does.
    """
    few = entries * 8 * max(mmap.PAGESIZE, row_bytes) <= rows * row_bytes
    return worth_spreading(kind, entries, rows, row_bytes) and (few or _FREE is None)


def zeros(kind: Kind, shape: tuple[int, ...], code: int, like: Any) -> Any:
    """Zeros of which few pages will be written (CPU); the others cost nothing."""
    assert _PRIVATE is not None  # `worth_spreading` has seen to it
    dtype = kind.empty((0,), code, like).dtype
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=_PRIVATE | mmap.MAP_ANONYMOUS)
    return _array(kind, pages, shape, dtype)


def spread(kind: Kind, touched: Any, values: Any, rows: int) -> Any:
    """Zeros, (rows, dim), with ``values`` in the rows ``touched`` (each at most once)."""
    out = zeros(kind, (rows, values.shape[1]), kind.code(values), values)  # type: ignore[arg-type]
    out[touched] = values
    return out


def _array(kind: Kind, memory: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if kind is NUMPY:
        import numpy as np

        return np.frombuffer(memory, dtype=dtype).reshape(shape)
    return kind.torch.frombuffer(memory, dtype=dtype).view(shape)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- pages of freed gradients
#: Freed blocks that are kept, the latest last: (bytes, pages). Lists change in one step each, so that a
#: collection of garbage may free a gradient at any time, in any thread.
_kept: list[tuple[int, mmap.mmap]] = []
_MOST_BLOCKS, _MOST_BYTES = 16, 1 << 30


def empty(kind: Kind, shape: tuple[int, ...], code: int, like: Any) -> Any:
    """As ``kind.empty``, for a gradient that is written whole; a large one gets the pages of one before.

    A training step frees its gradients and asks for as many bytes in the next. Memory of that size goes back
    to the system each time with any common allocator, and its pages are then made anew. Here up to 1 GiB of
    freed gradients is kept, marked as the system's to take (MADV_FREE) should it run short.
    """
    dtype = kind.empty((0,), code, like).dtype
    size = prod(shape) * dtype.itemsize
    if kind.cuda or _PRIVATE is None or _FREE is None or size < _WORTH:
        return kind.empty(shape, code, like)
    return _array(kind, _block(size), shape, dtype)


def scratch(kind: Kind, like: Any, *parts: tuple[int, int]) -> list[Any]:
    """Uninitialised vectors, given as (length, dtype code), all in one block as of `empty`.

    The plan of a gradient takes a few MB, of which an allocator gives most back to the system each time.
    """
    dtypes = [kind.empty((0,), code, like).dtype for _, code in parts]
    sizes = [-(-n * d.itemsize // 64) * 64 for (n, _), d in zip(parts, dtypes)]
    total = sum(sizes)
    if kind.cuda or _PRIVATE is None or _FREE is None or total < 1 << 18:
        return [kind.empty((n,), code, like) for n, code in parts]
    # numbers of ids differ from step to step: sizes by quarters of powers of two
    step = 1 << max(total.bit_length() - 3, 0)
    block, out, at = _block(-(-total // step) * step), [], 0
    for (n, code), dtype, size in zip(parts, dtypes, sizes):
        if kind is NUMPY:
            import numpy as np

            out.append(np.frombuffer(block, dtype=dtype, count=n, offset=at))
        elif n:
            out.append(kind.torch.frombuffer(block, dtype=dtype, count=n, offset=at))  # type: ignore[attr-defined]
        else:
            out.append(kind.empty((0,), code, like))
        at += size
    return out


def plan_memory(kind: Kind, like: Any, n: int, rows: int) -> list[Any]:
    """For bag_sort of n ids: order, starts, touched, bag_of, count, workspace."""
    size = kind.kernels.bag_sort_workspace(n, rows)
    return scratch(kind, like, (n, I64), (n + 1, I64), (n, I64), (n, I32), (1, I64), (size, U8))


def _block(size: int) -> Any:
    """``size`` bytes that hold anything: an object with a buffer, whose pages are kept when it dies."""
    pages = None
    for entry in reversed(_kept):
        if entry[0] == size:
            with contextlib.suppress(ValueError):  # taken by another thread in between
                _kept.remove(entry)
                pages = entry[1]
                break
    if pages is None:
        pages = mmap.mmap(-1, size, flags=_PRIVATE | mmap.MAP_ANONYMOUS)  # type: ignore[operator]
        with contextlib.suppress(OSError, AttributeError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    # Not a memoryview: NumPy's arrays would keep what is below it, and the view itself would die.
    block = (ctypes.c_char * size).from_buffer(pages)
    weakref.finalize(block, _keep, size, pages).atexit = False
    return block


def _keep(size: int, pages: mmap.mmap) -> None:
    with contextlib.suppress(OSError):
        pages.madvise(_FREE)
        _kept.append((size, pages))
    while len(_kept) > _MOST_BLOCKS or sum(n for n, _ in list(_kept)) > _MOST_BYTES:
        with contextlib.suppress(IndexError):
            _kept.pop(0)
