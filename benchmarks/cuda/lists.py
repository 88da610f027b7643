"""IVF lists, k-means and indexes on the GPU."""

from __future__ import annotations

from collections.abc import Iterator

from harness import Case


def cases(scale: int) -> Iterator[Case]:
    yield from ()
