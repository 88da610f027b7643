"""Sent2Vec: words a second of training, sentences a second of inference, and how good the vectors are.

The text is that of Debian's package descriptions in the data folder (658,570 words), or random words by
Zipf's law where there is none. The peer is the published program (github.com/epfml/sent2vec, ``make``): the
environment variable ``SENT2VEC`` names its binary, without it there is no peer. Both train with the same
parameters on the same file. A rate is that of the epochs behind the first: the time of 1 + n epochs less that
of one, so that reading and writing files is in neither. One thread by process time, two by wall clock.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from real_data import data_folder

import lutra


def texts(quick: bool) -> tuple[list[str], list[str], list[str]]:
    """Sentences to train on; queries; and documents, of which i is what query i should find."""

    def words(text: str) -> str:
        return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))

    folder = data_folder()
    if folder is None:
        rng, n = np.random.default_rng(0), 1000 if quick else 35_000
        lines = [" ".join(f"w{i}" for i in rng.zipf(1.3, 18) % 10_000) for _ in range(n)]
        return lines, lines[:500], lines[:500]
    rows = [line.split("\t") for line in (folder / "debian_texts.tsv").read_text("utf-8").splitlines()]
    rows = rows[: 300 if quick else None]
    sentences = [s for _, summary, text in rows for s in [summary, *re.split(r"(?<=[.!?])\s+", text)]]
    return [w for w in map(words, sentences) if w], [words(r[1]) for r in rows], [words(r[2]) for r in rows]


def found(model: lutra.Sent2Vec, queries: list[str], documents: list[str]) -> float:
    """The share of queries that have their own document among the first ten by cosine."""
    q, d = model.transform(queries), model.transform(documents)
    ids = lutra.scan.knn(q, d, 10, "cosine").ids
    return float((ids == np.arange(len(q))[:, None]).any(1).mean())


def rate(train: Callable[[int], float], words: int, more: int) -> float:
    """Words a second of the epochs behind the first; the longer run comes last, and leaves its model."""
    first = train(1)
    return more * words / (train(1 + more) - first)


def lines(quick: bool) -> Iterator[str]:
    """The figures, a line each."""
    sentences, queries, documents = texts(quick)
    words = sum(len(s.split()) for s in sentences)
    buckets, more, long = (5_000, 1, 3) if quick else (2_000_000, 30, 50)
    options = {"buckets": buckets, "min_count": 2 if quick else 5, "progress": False}
    yield f"{len(sentences)} sentences, {words} words; dim 100, bigrams, {buckets} buckets, 10 negatives"
    binary = os.environ.get("SENT2VEC")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text("\n".join(sentences) + "\n", "utf-8")
        for threads in (1, 2):
            clock = time.process_time if threads == 1 else time.perf_counter
            models = {}

            def ours(epochs: int, threads=threads, clock=clock, models=models) -> float:
                begin = clock()
                models["lutra"] = lutra.Sent2Vec(epochs=epochs, threads=threads, **options).fit(path)
                return clock() - begin

            def peer(epochs: int, threads=threads, models=models) -> float:
                before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                command = [
                    binary, "sent2vec", "-input", path, "-output", path.with_suffix(""), "-minCount",
                    options["min_count"], "-dim", 100, "-epoch", epochs, "-lr", 0.2, "-wordNgrams", 2,
                    "-neg", 10, "-thread", threads, "-t", 0.0001, "-dropoutK", 2, "-bucket", buckets,
                    "-verbose", 0,
                ]  # fmt: skip
                subprocess.run(list(map(str, command)), check=True, capture_output=True)
                wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
                models["epfml"] = lutra.Sent2Vec.from_epfml(path.with_suffix(".bin"))
                used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                return used if threads == 1 else wall

            for name, train in (("lutra", ours), ("epfml", peer)):
                if name == "epfml" and not binary:
                    continue
                speed = rate(train, words, more)
                model = models[name]
                loss = f", last epoch's loss {model.loss_[-1]:.3f}" if model.loss_ else ""
                yield (
                    f"{name}, {threads} threads: {speed / 1e6:.2f} M words/s; after {1 + more} epochs "
                    f"{found(model, queries, documents):.1%} find their document{loss}"
                )
                if threads == 1:
                    train(long)
                    share = found(models[name], queries, documents)
                    yield f"{name}, 1 thread: after {long} epochs {share:.1%} find their document"
        model = models["lutra"]
        model.transform(sentences)
        for threads in (1, 2):
            lutra.set_num_threads(threads)
            times = []
            for _ in range(3 if quick else 9):
                begin = time.perf_counter()
                model.transform(sentences)
                times.append(time.perf_counter() - begin)
            yield f"transform, {threads} threads: {len(sentences) / np.median(times) / 1e6:.2f} M sentences/s"
        lutra.set_num_threads(0)
