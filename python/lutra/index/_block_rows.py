"""Vectors of `Blocks` on a GPU: whole rows, for dense scans; panels again on the host and in files.

Rows of floats are as the panels have them, of codes their bytes. A row of int8 is one of
`lutra.gather.pack_rows`: codes from 0 to 255, then scale and minimum, so that 128 stands for 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import scan
from .._arrays import F32, I8, I64, NUMPY, U8
from ._home import HOST, Home
from ._panels import Panels
from ._rows import Rows

_TAIL = 8  # bytes of a row's scale and minimum
_ZERO = 128  # the code of 0: a whole number's byte with its highest bit turned


def new_rows(home: Home, width: int, code: int) -> Rows:
    """No rows yet, of vectors that are stored as ``code``."""
    return Rows(home, width + _TAIL, U8) if code == I8 else Rows(home, width, code)


def pack_int8(home: Home, stored: Any, scale: Any, out: Any) -> None:
    """Whole numbers (n, d) int8 and scales (n, 1) as rows."""
    kind: Any = home.kind
    byte = kind._dtypes[U8]
    tail = home.empty((len(stored), 2), F32)
    tail[:, :1], tail[:, 1:] = scale, scale * -float(_ZERO)
    out[:, :-_TAIL] = stored.view(byte) ^ _ZERO
    out[:, -_TAIL:] = tail.view(byte)


def unpack_int8(home: Home, rows: Any) -> Any:
    """The whole numbers of rows, int8."""
    kind: Any = home.kind
    return (rows[:, :-_TAIL] ^ _ZERO).view(NUMPY.dtype(I8) if kind is NUMPY else kind._dtypes[I8])


def to_rows(panels: Panels, home: Home, code: int, scale: Rows | None) -> Rows:
    """The rows of panels in a home."""
    rows = new_rows(home, panels.width, code)
    room = rows.room(panels.n)
    for i in range(0, panels.n, rows.step):
        part = home.bring(panels.take(np.arange(i, min(panels.n, i + rows.step))))
        if scale is None:
            room[i : i + len(part)] = part
        else:
            pack_int8(home, part, home.bring(scale.view[i : i + len(part)]), room[i : i + len(part)])
    rows.grow(panels.n)
    return rows


def to_panels(rows: Rows, panels: Panels) -> None:
    """Write rows into empty panels."""
    panels.reserve(rows.n)
    first = 0
    for part in rows.parts():
        panels.write(first, np.ascontiguousarray(_stored(part, panels)))
        first += len(part)
    panels.grow(rows.n)


def panel_parts(rows: Rows, panels: Panels) -> Iterator[np.ndarray]:
    """Rows as the panels that a file holds, one after another; lanes without a row are 0."""
    lanes = panels.lanes
    step = max(1, rows.step // lanes) * lanes  # rows that are copied to the host at a time
    for i in range(0, rows.n, step):
        whole = _stored(HOST.bring(rows.view[i : i + step]), panels)
        for j in range(0, len(whole), lanes):
            panel = np.zeros((panels.width, lanes), panels.dtype)
            part = whole[j : j + lanes]
            panel[:, : len(part)] = part.T
            yield panel.reshape(panels.shape)


def _stored(rows: np.ndarray, panels: Panels) -> np.ndarray:
    """Rows on the host as panels have them; bfloat16 comes as float32."""
    if panels.dtype == np.int8:
        return unpack_int8(HOST, rows)
    return rows.astype(panels.dtype, copy=False)


def scan_int8(home: Home, q: Any, rows: Any, k: int, keep: Any) -> tuple[Any, Any]:
    """The k best rows of int8, by tensor cores; what a filter leaves out has the score -inf."""
    if keep is None:
        return scan.packed_topk(q, rows, k)
    xp, at, worst = home.xp, home.arange(len(rows)), -float("inf")
    passes = home.kind.cast(keep[at >> 3], I64) >> (at & 7) & 1
    bias = home.kind.cast(xp.where(passes > 0, 0.0, worst), F32)
    scores, ids = scan.packed_topk(q, rows, k, bias)
    return scores, xp.where(scores == worst, -1, ids)
