"""``lutra bench``: the microbenchmarks as a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from ..bench import Case, Limits, Row, all_cases, data, run_case
from ..bench.memory import knn_peak

#: Peers with a column of their own; the others ("nn.Linear") are named in the last one.
COLUMNS = ("numpy", "torch", "faiss")


def time_text(seconds: float) -> str:
    """Three digits and a unit: ``'1.23 ms'``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def rate_text(row: Row) -> str:
    """``'1.2 M queries/s'``, or empty where the case counts nothing."""
    if not row.unit or row.ours is None:
        return ""
    rate = row.work / row.ours.median
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {prefix if row.unit != 'B' else prefix.upper()}{_unit(row.unit)}/s"
    return f"{rate:.3g} {row.unit}/s"


def _unit(unit: str) -> str:
    return unit if unit == "B" else f" {unit}"


def ratio_text(ratio: float | None) -> str:
    """``'2.1x'``: how many times faster than the peer; red below 1."""
    if ratio is None:
        return "[dim]-[/]"
    text = f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
    return f"[red]{text}[/]" if ratio < 1 else text


def cells(row: Row) -> list[str]:
    """A row of the table."""
    if row.ours is None:
        style = {"WRONG": "bold red", "ERROR": "bold red", "skipped": "dim"}.get(row.state, "none")
        return [row.name, f"[{style}]{row.state}[/]", "", "", "", "", "", f"[{style}]{escape(row.note)}[/]"]
    notes = [f"{ratio_text(row.ratio(peer))} {peer}" for peer in row.peers if peer not in COLUMNS]
    share = "[dim]-[/]" if row.share is None else f"{row.share:.0%} {row.limit_of}"
    return [
        row.name, time_text(row.ours.median), rate_text(row), *(ratio_text(row.ratio(p)) for p in COLUMNS),
        share, ", ".join(notes) or row.note,
    ]  # fmt: skip


def heading(limits: Limits | None) -> str:
    """What the shares are shares of."""
    if limits is None:
        return "NumPy reference (no compiled module): nothing here is fast, and no limits were measured"
    return (
        f"{limits.level}, {limits.threads} thread{'s' if limits.threads > 1 else ''}; limits measured here: "
        f"memory {limits.bandwidth / 1e9:.1f} GB/s, FMA {limits.flops / 1e9:.0f} GFLOP/s"
    )


def table(rows: list[Row], limits: Limits | None) -> Table:
    """The table that the command prints."""
    out = Table(title=heading(limits), title_justify="left", caption_justify="left")
    out.caption = "ratios: how many times faster than the peer, by medians of turns in one run"
    out.add_column("benchmark")
    for name in ("time", "rate", "vs NumPy", "vs torch", "vs FAISS", "share of limit"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("also")
    for row in rows:
        out.add_row(*cells(row))
    return out


def memory_row(quick: bool) -> Row:
    """Peak memory of a search beyond its inputs and outputs, as a row with a note only."""
    n = 100_000 if quick else 1_000_000
    peak = knn_peak(n)
    text = f"{peak / 2**20:.1f} MiB beyond inputs and outputs"
    return Row(
        f"knn ip, 1024 queries, {n:.0e} rows: memory".replace("e+0", "e"), "memory", text, bytes=float(peak)
    )


def selected(pattern: str | None, quick: bool) -> tuple[list[Case], bool]:
    """The cases whose name or verb contains ``pattern``, and whether the memory row is asked for."""
    wanted = (pattern or "").lower()
    cases = [
        case for case in all_cases()
        if (wanted in case.name.lower() or wanted in f"{case.verb}.") and not (quick and case.full_only)
    ]  # fmt: skip
    return cases, wanted in "knn memory"


def show(pattern: str | None = None, quick: bool = False, json_file: Path | None = None) -> None:
    """Run the benchmarks, print the table, write the JSON; exit code 1 where one is wrong or fails.

    Parameters
    ----------
    pattern : str, optional
        Only benchmarks whose name contains it (or whose verb is it).
    quick : bool, default False
        Small sizes and few repetitions: under a minute.
    json_file : path, optional
        Times in seconds, bytes, flops, ratios, limits and the machine.
    """
    cases, with_memory = selected(pattern, quick)
    if not cases:
        names = ", ".join(case.name for case in all_cases())
        raise SystemExit(f"lutra bench: no benchmark's name contains {pattern!r}; there are: {names}")
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise SystemExit(f"lutra bench: the folder of {str(json_file)!r} does not exist")
    limits = Limits.measure(quick)
    rows: list[Row] = []
    with tqdm(
        total=len(cases) + with_memory, unit="case", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        for case, following in zip(cases, [*cases[1:], None]):
            bar.set_description(case.name)
            rows.append(run_case(case, limits, quick))
            bar.update()
            if following is None or following.verb != case.verb:
                data.clear()
        if with_memory:
            bar.set_description("memory")
            rows.append(memory_row(quick))
            bar.update()
    # A file or a pipe has no width of its own: write whole lines there.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table(rows, limits))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(rows, limits, quick), indent=2) + "\n", encoding="utf-8")
    if any(row.state in ("WRONG", "ERROR") for row in rows):
        raise SystemExit(1)


def as_json(rows: list[Row], limits: Limits | None, quick: bool) -> dict[str, Any]:
    """Everything that the table shows, in plain types."""
    from .info import collect

    return {
        "machine": collect(),
        "limits": None if limits is None else limits._asdict(),
        "quick": quick,
        "results": [row.as_json() for row in rows],
    }
