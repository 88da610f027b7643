"""What a conversion did, as a table."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Entry:
    """A table in a format.

    Attributes
    ----------
    module : str
    format : str
        'dense' for a table that stays as it is.
    before, after : int
        Bytes of the dense table and of all that stands for it now.
    error : float
        Relative error of the rows: the square root of sum w |x - x'|^2 / sum w |x|^2, w how often a row is
        used.
    cosine : float
        Mean cosine of the rows and what they became, weighted alike.
    divergence : float, optional
        Mean Kullback-Leibler divergence (nats) of the model's predictions from those before, on the
        calibration sequences.
    seconds : float
        The encoding took.
    note : str
        Why it was left out, where it was.
    """

    module: str
    format: str
    before: int
    after: int
    error: float = float("nan")
    cosine: float = float("nan")
    divergence: float | None = None
    seconds: float = 0.0
    note: str = ""
    chosen: bool = False

    @property
    def share(self) -> float:
        return self.after / self.before if self.before else 1.0


COLUMNS = ("module", "format", "before", "after", "share", "error", "cosine", "KL", "seconds", "")


def size_text(n: int) -> str:
    """'1.23 MB' (powers of 1000)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n < 999.5 * size else f"{n / size:.0f} {unit}"
    return f"{n} B"


def _number(x: float | None, spec: str) -> str:
    return "-" if x is None or x != x else format(x, spec)


def cells(e: Entry) -> list[str]:
    note = e.note or ("chosen" if e.chosen else "")
    return [
        e.module, e.format, size_text(e.before), size_text(e.after) if e.after else "-",
        f"{e.share:.2%}" if e.after else "-", _number(e.error, ".4f"), _number(e.cosine, ".4f"),
        _number(e.divergence, ".4g"), f"{e.seconds:.2f}", note,
    ]  # fmt: skip


def text_table(rows: list[list[str]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Aligned text; columns that hold nothing are left out."""
    kept = [i for i in range(len(columns)) if any(r[i] not in ("", "-") for r in rows)]
    lines = [[columns[i] for i in kept], *([r[i] for i in kept] for r in rows)]
    width = [max(len(line[j]) for line in lines) for j in range(len(kept))]
    left = {0, 1, len(columns) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(w) if kept[j] in left else cell.rjust(w)
            for j, (cell, w) in enumerate(zip(line, width))
        ).rstrip()
        for line in lines
    )


@dataclass(repr=False)
class Report:
    """What `lutra.compress.convert` did.

    Attributes
    ----------
    tables : list of Entry
        What each table became.
    tried : list of Entry
        All that a budget let it try, best first.
    budget : int, optional
        Bytes.
    skipped : dict of str to str
        Embeddings that were left alone, and why.
    unfit : list of str
        Formats that were not tried, since none of their sizes is within the budget.
    """

    tables: list[Entry] = field(default_factory=list)
    tried: list[Entry] = field(default_factory=list)
    budget: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    unfit: list[str] = field(default_factory=list)

    @property
    def before(self) -> int:
        return sum(e.before for e in self.tables)

    @property
    def after(self) -> int:
        return sum(e.after for e in self.tables)

    def _summary(self) -> str:
        share = self.after / self.before if self.before else 1.0
        text = f"{size_text(self.before)} -> {size_text(self.after)} ({share:.2%})"
        text = text if self.budget is None else f"{text}, budget {size_text(self.budget)}"
        return f"{text}\nno size within the budget: {', '.join(self.unfit)}" if self.unfit else text

    def __str__(self) -> str:
        out = [text_table([cells(e) for e in self.tables]), self._summary()]
        if self.tried:
            out = ["tried:", text_table([cells(e) for e in self.tried]), "", "tables:", *out]
        out += [f"left alone: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(out)

    __repr__ = __str__

    def show(self) -> None:
        """Print it: with rich where that is installed, as text elsewhere."""
        try:
            from rich import box
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table
        except ImportError:
            print(self)
            return
        console = Console(file=sys.stdout)
        for title, entries in (("tried", self.tried), ("tables", self.tables)):
            if not entries:
                continue
            rows = [cells(e) for e in entries]
            kept = [i for i in range(len(COLUMNS)) if any(r[i] not in ("", "-") for r in rows)]
            if len(self.tables) == 1:  # what all have in common stands above
                title = ("tried on " if title == "tried" else "") + entries[0].module
                title += f", {size_text(entries[0].before)}"
                kept = [i for i in kept if COLUMNS[i] not in ("module", "before")]
            table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            for i in kept:
                text = i in (0, 1, len(COLUMNS) - 1)
                side: Any = "left" if text else "right"
                table.add_column(COLUMNS[i], justify=side, overflow="fold", no_wrap=not text)
            for entry, row in zip(entries, rows):
                table.add_row(*(escape(row[i]) for i in kept), style="bold" if entry.chosen else None)
            console.print(table)
        console.print(self._summary())
        for name, why in self.skipped.items():
            console.print(f"left alone: {escape(name)}: {escape(why)}")
