"""Vectors of `Blocks` on a GPU: whole rows, for a dense scan; panels again on the host and in files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ._home import HOST, Home
from ._panels import Panels
from ._rows import Rows


def to_rows(panels: Panels, home: Home, code: int) -> Rows:
    """The rows of panels in a home."""
    rows = Rows(home, panels.width, code)
    room = rows.room(panels.n)
    for i in range(0, panels.n, rows.step):
        part = panels.take(np.arange(i, min(panels.n, i + rows.step)))
        room[i : i + len(part)] = home.bring(part)
    rows.grow(panels.n)
    return rows


def to_panels(rows: Rows, panels: Panels) -> None:
    """Write rows into empty panels."""
    panels.reserve(rows.n)
    first = 0
    for part in rows.parts():
        panels.write(first, np.ascontiguousarray(part))
        first += len(part)
    panels.grow(rows.n)


def panel_parts(rows: Rows, panels: Panels) -> Iterator[np.ndarray]:
    """Rows as the panels that a file holds, one after another; lanes without a row are 0."""
    lanes = panels.lanes
    step = max(1, rows.step // lanes) * lanes  # rows that are copied to the host at a time
    for i in range(0, rows.n, step):
        whole = HOST.bring(rows.view[i : i + step]).astype(
            panels.dtype, copy=False
        )  # bfloat16 comes as float32
        for j in range(0, len(whole), lanes):
            panel = np.zeros((panels.width, lanes), panels.dtype)
            part = whole[j : j + lanes]
            panel[:, : len(part)] = part.T
            yield panel.reshape(panels.shape)
