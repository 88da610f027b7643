"""A dense array that is zero but for a few rows, without writing the zeros."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

from .._arrays import NUMPY, Kind

#: Below this many bytes writing the zeros is as cheap.
_WORTH = 1 << 22
_PRIVATE = getattr(mmap, "MAP_PRIVATE", None)


def worth_spreading(kind: Kind, entries: int, rows: int, row_bytes: int) -> bool:
    """Whether a gradient with at most ``entries`` rows that are not zero is better spread than written whole.

    Memory fresh from the system is zero, and a page of it costs nothing until it is touched: a training step
    of an embedding of 10^6 x 64 with 64 ids takes 0.8 ms instead of 52. (numpy.zeros is no use: it asks for
    huge pages, and then nearly all of them are touched.)
    """
    return not kind.cuda and _PRIVATE is not None and entries * 4 <= rows and rows * row_bytes >= _WORTH


def fresh_pages(size: int, entries: int) -> mmap.mmap:
    """``size`` bytes of zeros, of which ``entries`` places will be written.

    Where they fall on most of the small pages anyway, huge ones spare a fault for each: thin rows lie many to
    a page (10^6 x 16 with 82,000 ids, one thread: forward and backward 34 ms, with huge pages 13).
    """
    assert _PRIVATE is not None
    pages = mmap.mmap(-1, size, flags=_PRIVATE | mmap.MAP_ANONYMOUS)
    if entries * mmap.PAGESIZE > size and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def spread(kind: Kind, touched: Any, values: Any, rows: int) -> Any:
    """Zeros, (rows, dim), with ``values`` in the rows ``touched`` (each at most once)."""
    assert _PRIVATE is not None  # `worth_spreading` has seen to it
    dim = values.shape[1]
    pages = fresh_pages(rows * dim * values.dtype.itemsize, values.shape[0])
    if kind is NUMPY:
        import numpy as np

        out = np.frombuffer(pages, dtype=values.dtype).reshape(rows, dim)
        out[touched] = values
        return out
    torch = kind.torch  # type: ignore[attr-defined]
    out = torch.frombuffer(pages, dtype=values.dtype).view(rows, dim)
    return out.index_copy_(0, touched, values)
