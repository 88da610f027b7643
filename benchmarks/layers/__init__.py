"""Sections of the layers' benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lutra.bench import interleaved


def turns(
    about: dict[str, Any], ours: Callable[[], Any], peer: Callable[[], Any], quick: bool
) -> dict[str, Any]:
    """A row with the medians of a function and its peer in torch's ops, in milliseconds, and their ratio."""
    times = interleaved({"ours": ours, "torch": peer}, 0.3 if quick else 1.5)
    a, b = 1e3 * times["ours"].median, 1e3 * times["torch"].median
    return {**about, "ours": a, "torch": b, "ratio": b / a}
