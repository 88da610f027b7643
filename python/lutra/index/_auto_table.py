"""What `auto` prints: a table, with rich where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np

_COLUMNS = ("index", "recall", "us/query", "bytes/vector", "build s", "parameters")


class Table:
    """Rows as they come, as plain text or through rich's console."""

    def __init__(
        self, show: bool, n: int, d: int, metric: str, recall: float, limit: float, sample: int, queries: int
    ) -> None:
        self.show = show
        self._console: Any = None
        if not show:
            return
        try:
            from rich.console import Console

            self._console = Console(highlight=False)
        except ImportError:
            pass
        room = "any memory" if np.isinf(limit) else f"{limit / n:.0f} bytes a vector"
        self._say(
            f"{n} vectors of {d} dimensions, {metric}; recall {recall:g} in {room}. "
            f"Measured on {sample} of them with {queries} queries; times and bytes are projected to all."
        )
        self._line(*_COLUMNS, style="bold")

    def _say(self, text: str, style: str | None = None) -> None:
        if self._console is not None:
            self._console.print(text, style=style, markup=False)
        else:
            print(text, flush=True)

    def _line(self, *cells: str, style: str | None = None) -> None:
        name, *rest, last = cells
        self._say(f"{name:32s}" + "".join(f"{cell:>13s}" for cell in rest) + f"  {last}", style)

    def row(self, entry: Any, recall: float) -> None:
        if not self.show:
            return
        if entry.tuned is None:
            self._line(
                entry.text, "", "", f"{entry.nbytes:.0f}", f"{entry.build:.1f}", entry.note, style="dim"
            )
            return
        self._line(
            entry.text, f"{entry.tuned.recall:.4f}", f"{1e6 * entry.seconds:.1f}", f"{entry.nbytes:.0f}",
            f"{entry.build:.1f}", _words(entry.tuned.parameters),
            style=None if entry.tuned.reached else "dim",
        )  # fmt: skip

    def final(self, entry: Any, tuned: Any, nbytes: int) -> None:
        if self.show:
            self._say(
                f"{entry.text} over all vectors: recall {tuned.recall:.4f}, {1e6 * tuned.seconds:.1f} us a "
                f"query, {nbytes / 1e6:.1f} MB{'; ' if tuned.parameters else ''}{_words(tuned.parameters)}"
                f"{'' if tuned.reached else ': falls short'}",
                "green" if tuned.reached else "yellow",
            )


def _words(parameters: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items())
