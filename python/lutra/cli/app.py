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


@app.command()
def compress(
    path: Annotated[Path, typer.Argument(help="A safetensors file, or a folder of save_pretrained.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FILE", help="The new file (of a folder: the new folder)."),
    ] = None,
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the tables' bytes: '8%', or bytes such as '12MB'. All formats are tried."),
    ] = None,
    format: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A format, such as 'low_rank:rank=64'; with --budget the only one to try."),
    ] = None,
    formats: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="A,B", help="The formats to try, by name; default all."),
    ] = None,
    tensor: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NAME", help="A table to compress (may be repeated); default: found by name."),
    ] = None,
    head: Annotated[
        str,
        typer.Option(
            metavar="auto|compressed", help="compressed: an untied output head (lm_head.weight), too."
        ),
    ] = "auto",
    min_rows: Annotated[int, typer.Option(min=1, help="Rows that a table has at least to be found.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the encoding.")] = 0,
    report: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.html", help="Draw size against error for all formats."),
    ] = None,
    limit: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="CPU seconds that a format may take on a table of the report; default 30."),
    ] = None,
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Write the table that is printed to FILE as well."),
    ] = None,
) -> None:
    """Compress the embedding tables of a safetensors file or of a Hugging Face folder."""
    from . import compress as command

    names = [name.strip() for name in (formats or "").split(",") if name.strip()]
    command.run(
        path, output, budget, format, names, tensor or [], head, min_rows, seed, report, json_file, limit
    )


@app.command()
def decompress(
    path: Annotated[Path, typer.Argument(help="What 'lutra compress' wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The dense file or folder.")],
) -> None:
    """Write a compressed file back with dense tables, for any other program."""
    from . import compress as command

    command.undo(path, output)
