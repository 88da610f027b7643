"""``lutra search``: results of queries in an index file, as a table, JSON or a file, and their metrics."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from .. import index as indexes
from .. import metrics
from .._results import Neighbors
from ..index import _files
from ..metrics._evaluate import parse
from . import output, vectors
from .relevance import read_relevance

_PART = 1 << 20  # bytes of query vectors that are searched at a time
DEFAULT = "ndcg@10,mrr@10,recall@100,success@10"


@dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    path: Path
    queries: Path
    k: int = 10
    results: Path | None = None
    relevant: Path | None = None
    metrics: str | None = None
    texts: Path | None = None
    query_texts: Path | None = None
    show: int = 5
    array: str | None = None
    candidates: int | None = None
    as_json: bool = False


def run(request: Request) -> None:
    """Search and report; errors are one line and exit with 1."""
    try:
        _run(request)
    except output.ERRORS as error:
        output.fail(error)


def _run(r: Request) -> None:
    if r.results is not None:
        output.check_output(r.results, [r.path, r.queries])
    if r.metrics is not None and r.relevant is None:
        raise ValueError("--metrics needs to know what is relevant: give --relevant FILE")
    names = [name.strip() for name in (r.metrics or DEFAULT).split(",") if name.strip()]
    depth = max([r.k, *(parse(name)[1] or r.k for name in names)]) if r.relevant is not None else r.k
    index = indexes.open(r.path) if r.path.is_dir() else indexes.load(r.path)
    data = vectors.read(r.queries, "query", r.array)
    relevant = None if r.relevant is None else read_relevance(r.relevant, data.size)
    texts, query_texts = (None if file is None else read_texts(file) for file in (r.texts, r.query_texts))
    found, seconds = search(index, data, depth, r)
    values = None if relevant is None else metrics.evaluate(found.ids, relevant, names)
    found = Neighbors(found.scores[:, : r.k], found.ids[:, : r.k])
    if r.results is not None:
        save(r.results, found)
    if r.as_json:
        facts = {
            "index": repr(index), "queries": data.size, "k": r.k, "seconds": seconds,
            "ids": found.ids.tolist(), "scores": [[_number(s) for s in row] for row in found.scores.tolist()],
        }  # fmt: skip
        print(json.dumps(facts if values is None else {**facts, "metrics": values}))
        return
    console = output.console()
    if r.show and data.size:
        console.print(results_table(found, texts, query_texts, r.show, console.width))
    if values is not None:
        console.print(metrics_table(values, data.size))
    each = output.time_text(seconds / max(1, data.size))
    console.print(f"{data.size} queries, k = {depth}, {each} each, in {escape(repr(index))}", highlight=False)
    if r.results is not None:
        console.print(f"scores and ids: {escape(str(r.results))}", highlight=False)


def search(index: Any, data: vectors.Vectors, k: int, r: Request) -> tuple[Neighbors, float]:
    """The results of all queries, and the seconds that the searches took."""
    multi, name = isinstance(index, indexes.MultiVector), str(r.path)
    if multi and data.ptr is None:
        raise ValueError(
            f"{name} holds documents of many vectors each, the queries ({data.what}) are single vectors; "
            "an .npz file with 'query_tokens' and 'query_ptr' is needed"
        )
    if not multi and data.ptr is not None:
        raise ValueError(
            f"{name} holds single vectors, the queries ({data.what}) are many vectors each; "
            "an array (n, d) is needed"
        )
    if r.candidates is not None and not multi:
        raise ValueError(f"--candidates is for an index of token vectors; {name} holds single vectors")
    options = {} if r.candidates is None else {"candidates": r.candidates}
    parts, seconds = [], 0.0
    with output.progress() as bars:
        task = bars.add_task("search", total=data.size)
        for low, high in _parts(data):
            started = time.perf_counter()
            if data.ptr is None:
                parts.append(index.search(np.asarray(data.x[low:high]), k))
            else:
                some = data.ptr[low : high + 1]
                x = data.x[some[0] : some[-1]]
                parts.append(index.search(x, k, ptr=some - some[0], **options))
            seconds += time.perf_counter() - started
            bars.advance(task, high - low)
    if not parts:
        return Neighbors(np.empty((0, k), np.float32), np.empty((0, k), np.int64)), seconds
    return Neighbors(*(np.concatenate([np.asarray(a) for a in each]) for each in zip(*parts))), seconds


def _parts(data: vectors.Vectors) -> list[tuple[int, int]]:
    """Ranges of queries, so large that batches are fast and progress is seen."""
    if data.ptr is None:
        step = max(64, _PART // max(1, data.x[:1].nbytes))
    else:
        step = max(16, _PART // max(1, data.x.nbytes // max(1, data.size)))
    return [(i, min(i + step, data.size)) for i in range(0, data.size, step)]


def save(path: Path, found: Neighbors) -> None:
    """scores and ids as an .npz file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, scores=found.scores, ids=found.ids)
    _files.write_bytes(path, [buffer.getbuffer()])


# ---- texts
def read_texts(path: Path) -> list[str]:
    """The lines of a file, with spaces for tabs: line i is of document i."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error})") from None
    return [" | ".join(part.strip() for part in line.split("\t")) for line in lines]


def _text(texts: list[str] | None, i: int, width: int) -> str:
    if texts is None or not 0 <= i < len(texts):
        return ""
    text = texts[i]
    return escape(text if len(text) <= width else f"{text[: width - 1]}…")


# ---- tables
def results_table(
    found: Neighbors, texts: list[str] | None, queries: list[str] | None, show: int, width: int
) -> Table:
    """The results of the first queries."""
    nq = len(found.ids)
    title = f"the first {show} of {nq} queries" if nq > show else None
    table = Table(title=title, title_justify="left")
    for name in ("query", "rank", "score", "id"):
        table.add_column(name, justify="right", no_wrap=True)
    if texts is not None or queries is not None:
        table.add_column("text", no_wrap=True, overflow="ellipsis")
    room = max(20, width - 48)
    for i in range(min(nq, show)):
        if queries is not None:
            table.add_row(str(i), "", "", "", f"[bold]{_text(queries, i, room)}[/]")
        for rank, (score, name) in enumerate(zip(found.scores[i].tolist(), found.ids[i].tolist()), 1):
            if name < 0:
                break
            cells = [str(i) if rank == 1 and queries is None else "", str(rank), f"{score:.4f}", str(name)]
            table.add_row(*cells, *([_text(texts, name, room)] if len(table.columns) > 4 else []))
        table.add_section()
    return table


def metrics_table(values: dict[str, float], count: int) -> Table:
    table = Table()
    table.add_column("metric")
    table.add_column(f"mean of {count} queries", justify="right")
    for name, value in values.items():
        table.add_row(escape(name), f"{value:.4f}")
    return table


def _number(score: float) -> float | None:
    """JSON has no infinities."""
    return score if np.isfinite(score) else None
