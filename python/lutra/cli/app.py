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


@app.command()
def index(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DOCS", help="Vectors: .npy (n, d), .npz with one array, or .npz with tokens and ptr."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The index file.")],
    factory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TEXT",
            help="What to build, in FAISS's words: 'Flat', 'HNSW32', 'IVF1024,PQ32'; default: chosen by "
            "measuring. Of token vectors: the index of their encodings, also 'float16', 'int8', 'pq'.",
        ),
    ] = None,
    metric: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="ip|l2|cosine", help="Of single vectors; default ip, the inner product."),
    ] = None,
    recall: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of the true neighbours that the chosen index shall find; default 0.95."),
    ] = None,
    memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What the chosen index may take: '25%' of the vectors, '2GB'."),
    ] = None,
    ids: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.npy", help="Ids; default those in the .npz file, else 0, 1, 2, ..."),
    ] = None,
    array: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME", help="An array of an .npz file with several ('doc': doc_tokens, doc_ptr)."
        ),
    ] = None,
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="How token vectors are kept: float16 (default), int8, residual2, ..."),
    ] = None,
    repetitions: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Of the encodings of token vectors (MUVERA); default 20."),
    ] = None,
    k_sim: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Bits of a partition of the encodings; default 5."),
    ] = None,
    d_proj: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Dimensions of a block of the encodings; default 16."),
    ] = None,
    candidates: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Documents that MaxSim ranks for a query; default 200."),
    ] = None,
    pool: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="FACTOR", help="Pool so many tokens of a document into one first (with scipy)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Build an index of a file of vectors, of one or many a document."""
    from . import build as command

    command.run(
        source, output, as_json, ids=ids, array=array, factory=factory, metric=metric, recall=recall,
        memory=memory, tokens=tokens, repetitions=repetitions, k_sim=k_sim, d_proj=d_proj,
        candidates=candidates, pool=pool,
    )  # fmt: skip


@app.command()
def search(
    path: Annotated[Path, typer.Argument(metavar="INDEX", help="What 'lutra index' or index.save wrote.")],
    queries: Annotated[
        Path, typer.Argument(metavar="QUERIES", help="A file of vectors, as for 'lutra index'.")
    ],
    k: Annotated[int, typer.Option("-k", min=1, help="Results of a query.")] = 10,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FILE.npz", help="Write scores and ids (queries, k) to FILE."),
    ] = None,
    relevant: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="What is relevant, for metrics: ids (.npy, padded with -1), ids and ptr (.npz), "
            "a list for each query (.json), or trec_eval's lines.",
        ),
    ] = None,
    metrics: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="A,B", help="Default ndcg@10,mrr@10,recall@100,success@10."),
    ] = None,
    texts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Line i is shown with id i."),
    ] = None,
    query_texts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Line i is shown with query i."),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Queries whose results are printed.")] = 5,
    array: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="The array of an .npz file with several."),
    ] = None,
    candidates: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Documents that MaxSim ranks for a query (of token vectors)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Search an index with a file of queries: results, and metrics where it is known what is relevant."""
    from . import search as command

    command.run(
        command.Request(
            path, queries, k, output, relevant, metrics, texts, query_texts, show, array, candidates, as_json
        )
    )
