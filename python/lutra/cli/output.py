"""What the commands share: where they print, how they fail."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: What a user can mend: an error of one line instead of a traceback.
ERRORS = (OSError, ValueError, TypeError, IndexError, ImportError, MemoryError, NotImplementedError)


def console() -> Console:
    """The terminal; a pipe or a file has no width of its own and gets whole lines."""
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if wide else Console(width=120)


def progress() -> Progress:
    """Bars on standard error, gone when they are done, and none where nobody looks."""
    columns = (
        TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def fail(error: BaseException) -> NoReturn:
    """One line on standard error, and exit code 1."""
    print(f"lutra: {error}", file=sys.stderr)
    raise SystemExit(1)


def check_output(path: Path, inputs: list[Path]) -> None:
    """Refuse, before anything takes long, a file that cannot be written or that is one of the inputs."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist")
    for given in inputs:
        if given.exists() and path.exists() and path.samefile(given):
            raise ValueError(f"{path} is read by this command; give another name for the output")


def size_text(n: float) -> str:
    """'12.3 MiB'."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


def time_text(seconds: float) -> str:
    """'12.3 ms'."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"
