"""The commands and their options. What each does is in a module of its own, imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="lutra: fast kernels that turn arithmetic into memory.",
)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Version, backends and why one is missing, SIMD level, threads, GPU."""
    from . import info as command

    command.show(as_json=as_json)


@app.command()
def demo(
    question: Annotated[
        str, typer.Argument(help="What to look for in Python's standard library.")
    ] = "parse command line arguments",
    top: Annotated[int, typer.Option(min=1, max=100, help="Number of matches to show.")] = 10,
) -> None:
    """Search the docstrings of Python's standard library: exact and PQ, sizes, recall and times."""
    from . import demo as command

    command.show(question, top=top)


@app.command()
def bench(
    pattern: Annotated[
        Optional[str],  # noqa: UP045 (typer evaluates it, on Python 3.10 too)
        typer.Option("--filter", metavar="NAME", help="Only benchmarks whose name contains NAME."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few repetitions.")] = False,
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Write the results to FILE as well."),
    ] = None,
) -> None:
    """Microbenchmarks: times, ratios to NumPy, torch and FAISS, and the share of the machine's limit."""
    from . import bench as command

    command.show(pattern=pattern, quick=quick, json_file=json_file)
