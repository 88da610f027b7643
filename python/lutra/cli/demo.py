"""``lutra demo``: a question to the docstrings of Python's standard library, exact and compressed search."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import _backend, index
from ..bench.timing import interleaved
from . import output, stdlib_texts
from .embedding import Fields, HashedText, split_identifier
from .stdlib_texts import Text

DIM, REFERENCE_DIM = 512, 256  # on the NumPy reference half of it: a little less sharp, half the wait
SUBVECTOR = 8  # dimensions to a byte of PQ: 64 bytes a text instead of 2048
REFINE = 4
K = 10
PROBES = 200  # questions for recall and times
CANDIDATES = 80  # texts from which the modules are ranked
MODULE_BOOST = 1.2  # a module's own docstring says best what it is for
EVIDENCE = (1.0, 0.3, 0.2, 0.1)  # share of a module's best texts in its score


class Hit(NamedTuple):
    """A module: its score, and the texts that gave it, the best first."""

    score: float
    texts: list[Text]

    @property
    def module(self) -> str:
        """The module's name."""
        return self.texts[0].module


class Collection(NamedTuple):
    """Everything that answers questions."""

    texts: list[Text]
    encoder: HashedText
    vectors: np.ndarray
    exact: index.Flat
    pq: index.PQ


# ---------------------------------------------------------------- building
def paragraphs(doc: str) -> tuple[str, str]:
    """The first paragraph of a docstring and the rest."""
    summary, _, body = doc.partition("\n\n")
    return summary, body


def as_fields(texts: Sequence[Text]) -> list[Fields]:
    """Texts in the parts that are weighted differently; the context is the enclosing module's summary."""
    summaries = {text.title: paragraphs(text.doc)[0] for text in texts if text.kind == "module"}

    def context(title: str) -> str:
        while "." in title:
            title = title.rpartition(".")[0]
            if title in summaries:
                return summaries[title]
        return ""

    return [Fields(split_identifier(t.title), *paragraphs(t.doc), context(t.title)) for t in texts]


def build(
    texts: Sequence[Text], bar: Callable[[str, int], Callable[[int], object]], dim: int | None = None
) -> Collection:
    """Embed texts and index them; ``bar(description, total)`` gives a function that is told of progress."""
    dim = dim or (REFERENCE_DIM if _backend.core is None else DIM)
    done = bar("hashing n-grams", 1)
    encoder = HashedText(dim)
    bags = encoder.fit(as_fields(texts), [MODULE_BOOST if t.kind == "module" else 1.0 for t in texts])
    done(1)
    vectors = encoder.embed(bags, bar("embedding", len(texts)))
    done = bar("exact index", len(texts))
    exact = index.Flat(dim, "ip")
    exact.add(vectors)
    done(len(texts))
    done = bar("PQ index", 2)
    bits = 8 if len(texts) >= 256 else max(1, len(texts).bit_length() - 1)
    pq = index.PQ(dim, dim // SUBVECTOR, bits, "ip", refine="float32")
    # NumPy takes seconds a round: fewer rounds, fewer texts
    rounds, per_centroid = (10, 256) if _backend.core is not None else (3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there are few texts for so many centroids
        pq.train(vectors, n_iter=rounds, max_points_per_centroid=per_centroid, progress=False)
    done(1)
    pq.add(vectors)
    done(1)
    return Collection(list(texts), encoder, vectors, exact, pq)


# ---------------------------------------------------------------- asking
def ask(collection: Collection, question: str, top: int, compressed: bool = False) -> list[Hit]:
    """The top-level modules that answer a question, best first.

    Texts of one module tend to be found together; one line a module leaves room for the others. What
    ranks it is its best text, and to a lesser part the next ones: a chance resemblance has no company.
    """
    bags = collection.encoder.questions([question])
    if not bags.weights.any():
        return []
    vector = collection.encoder.embed(bags)
    count = max(CANDIDATES, 4 * top)
    if compressed:
        found = collection.pq.search(vector, count, refine=REFINE)
    else:
        found = collection.exact.search(vector, count)
    hits: dict[str, Hit] = {}
    for score, i in zip(found.scores[0].tolist(), found.ids[0].tolist()):
        if i < 0 or score <= 0:
            break
        text = collection.texts[i]
        before = hits.get(text.module, Hit(0.0, []))
        if len(before.texts) < len(EVIDENCE):
            share = EVIDENCE[len(before.texts)] * score
            hits[text.module] = Hit(before.score + share, [*before.texts, text])
    return sorted(hits.values(), key=lambda hit: -hit.score)[:top]


def probes(texts: Sequence[Text]) -> list[str]:
    """Questions for measurements: first sentences of texts spread over the library."""
    summaries = [paragraphs(t.doc)[0].partition(". ")[0] for t in texts if t.kind in ("function", "method")]
    summaries = summaries or [t.doc for t in texts]
    return summaries[:: max(1, len(summaries) // PROBES)][:PROBES]


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact neighbours that were found."""
    return float(np.mean([len(np.intersect1d(f, e)) / len(e) for f, e in zip(found, exact)]))


def competitors(collection: Collection, k: int) -> dict[str, Callable[[np.ndarray], Any]]:
    """Ways to find the k best of the collection, by name; the peers have the same matrix."""
    vectors, pq = collection.vectors, collection.pq

    def numpy(q):
        scores = q @ vectors.T
        best = np.argpartition(scores, -k, axis=1)[:, -k:]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
        return np.take_along_axis(best, order, 1)

    ways: dict[str, Callable[[np.ndarray], Any]] = {
        "exact": lambda q: collection.exact.search(q, k).ids,
        "PQ": lambda q: pq.search(q, k, refine=1).ids,
        "PQ, refined": lambda q: pq.search(q, k, refine=REFINE).ids,
        "NumPy: matmul, argpartition": numpy,
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        tensor = torch.from_numpy(vectors)
        ways["torch: matmul, topk"] = lambda q: torch.topk(torch.from_numpy(q) @ tensor.T, k).indices
    return ways


# ---------------------------------------------------------------- printing
def hits_table(question: str, hits: Sequence[Hit], width: int = 120) -> Table:
    table = Table(title=f"[bold]{escape(question)}[/]", title_justify="left")
    table.add_column("score", justify="right")
    table.add_column("name", style="bold cyan", overflow="fold")
    table.add_column("what it says", ratio=2)
    if width >= 110:
        table.add_column("also there", style="dim", ratio=1)
    for hit in hits:
        best, *others = hit.texts
        summary = " ".join(paragraphs(best.doc)[0].split())
        summary = summary if len(summary) <= 160 else f"{summary[:157]}..."
        also = ", ".join(text.title.removeprefix(f"{hit.module}.") for text in others)
        cells = (f"{hit.score:.1f}", escape(best.title), escape(summary), escape(also))
        table.add_row(*cells[: len(table.columns)])
    return table


def _size(n: float) -> str:
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.0f} KiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def measurements(collection: Collection, seconds: float) -> Table:
    """Size, recall and times of every way to search."""
    q = collection.encoder.embed(collection.encoder.questions(probes(collection.texts)))
    k = min(K, len(collection.texts))
    ways = competitors(collection, k)
    exact = collection.exact.search(q, k).ids
    one = q[:1].copy()
    single = interleaved({name: partial(way, one) for name, way in ways.items()}, seconds / 2)
    batch = interleaved({name: partial(way, q) for name, way in ways.items()}, seconds / 2)
    full = collection.exact.nbytes
    codes = collection.pq.nbytes - full
    sizes = {"PQ": codes, "PQ, refined": codes + full}
    table = Table(
        title=f"{len(collection.texts)} texts, {collection.vectors.shape[1]} dimensions, k = {k}",
        title_justify="left",
        caption=f"times are medians of turns in one run, lutra with {_backend.get_num_threads()} thread(s); "
        f"recall over {len(q)} docstrings as questions",
        caption_justify="left",
    )
    table.add_column("search")
    for name in ("size", f"recall@{k}", "one question", f"each of {len(q)}"):
        table.add_column(name, justify="right")
    for name, way in ways.items():
        share = recall(np.asarray(way(q)), exact)
        ours = "lutra " if ":" not in name else ""
        table.add_row(
            f"[bold]{ours}{name}[/]" if ours else name, _size(sizes.get(name, full)), f"{share:.3f}",
            _time(single[name].median), _time(batch[name].median / len(q)),
        )  # fmt: skip
    return table


def show(question: str, top: int = 10) -> None:
    """Run the demo and print its tables.

    Parameters
    ----------
    question : str
    top : int, default 10
        Number of matches to show.
    """
    if not question.strip():
        raise SystemExit('lutra demo: the question is empty; ask for example: lutra demo "compress a file"')
    started = time.perf_counter()
    console = output.console()
    with output.progress() as progress:

        def bar(description: str, total: int) -> Callable[[int], object]:
            task = progress.add_task(description, total=total)
            return lambda n: progress.advance(task, n)

        names = stdlib_texts.modules()
        done = bar("reading docstrings", len(names))
        texts: list[Text] = []
        for name in names:
            texts += stdlib_texts.read_module(name)
            done(1)
        collection = build(texts, bar)
    hits = ask(collection, question, top)
    compressed = {hit.module for hit in ask(collection, question, top, compressed=True)}
    if hits:
        table = hits_table(question, hits, console.width)
        same = sum(hit.module in compressed for hit in hits)
        table.caption_justify = "left"
        table.caption = f"PQ with refinement finds {same} of these {len(hits)} modules too"
        console.print(table)
    else:
        console.print(f"Nothing in the standard library resembles {question!r}.", markup=False)
    built = time.perf_counter() - started
    with Console(stderr=True).status("measuring recall and times"):
        table = measurements(collection, seconds=4)
    console.print(table)
    size = sum(len(t.doc.encode()) for t in texts)
    console.print(
        f"{len(texts)} docstrings ({_size(size)}) read, embedded and indexed in {built:.1f} s; "
        f"{time.perf_counter() - started:.1f} s in all, on {_backend_name()}.",
        highlight=False,
    )


def _backend_name() -> str:
    if _backend.core is None:
        return "the NumPy reference"
    return f"the CPU ({_backend.simd_level()}, {_backend.get_num_threads()} threads)"
