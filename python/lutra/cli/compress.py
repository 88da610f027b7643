"""``lutra compress`` and ``lutra decompress``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .. import compress as compression
from ..compress._report import size_text
from .output import fail


def run(
    path: Path, output: Path | None, budget: str | None, format: str | None, formats: list[str],
    tensors: list[str], head: str, min_rows: int, seed: int, report: Path | None, json_file: Path | None,
    limit: float | None,
) -> None:  # fmt: skip
    """Compress a file, or draw the report, or both; errors are one line and exit with 1."""
    try:
        _run(path, output, budget, format, formats, tensors, head, min_rows, seed, report, json_file, limit)
    except (OSError, ValueError, TypeError, ImportError, MemoryError) as error:
        fail(error)


def _run(
    path: Path, output: Path | None, budget: str | None, format: str | None, formats: list[str],
    tensors: list[str], head: str, min_rows: int, seed: int, report: Path | None, json_file: Path | None,
    limit: float | None,
) -> None:  # fmt: skip
    if output is None and report is None:
        raise ValueError("give an output (-o FILE), a report (--report FILE.html), or both")
    if output is not None and budget is None and format is None:
        raise ValueError("give a budget (--budget 8%) or a format (--format low_rank:rank=64)")
    progress = True if sys.stderr.isatty() else None
    chosen: dict[str, Any] = {"tensors": tensors or None, "min_rows": min_rows, "seed": seed}
    chosen |= {"formats": formats or None, "head": head}
    if report is not None:
        from ..compress import _html

        left_out = _html.write(path, report, progress=progress, limit=limit, **chosen)
        Console().print(f"report: {escape(str(report))}")
        if left_out:
            text = _html.missing(left_out, _html.LIMIT if limit is None else limit)
            Console().print(escape(text))
    if output is not None:
        done = compression.compress_file(path, output, format, budget=budget, progress=progress, **chosen)
        done.show()
        console = Console()
        console.print(f"{escape(str(output))}: {size_text(_size(path))} -> {size_text(_size(output))}")
        if json_file is not None:
            import json

            tables = {"tables": [vars(e) for e in done.tables], "tried": [vars(e) for e in done.tried]}
            json_file.write_text(json.dumps(tables).replace("NaN", "null") + "\n")


def undo(path: Path, output: Path) -> None:
    try:
        names = compression.decompress_file(path, output)
    except (OSError, ValueError, TypeError, MemoryError) as error:
        fail(error)
    else:
        console = Console()
        console.print(f"dense again: {escape(', '.join(names))}")
        console.print(f"{escape(str(output))}: {size_text(_size(path))} -> {size_text(_size(output))}")


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(f.stat().st_size for f in path.glob("*.safetensors"))
    return path.stat().st_size
