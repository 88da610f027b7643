"""`lutra.index.HNSW` beside hnswlib at equal recall: queries a second and the time to build.

``python benchmarks/bench_graph.py [--n 100000] [--storage int8 float32]`` prints a table for clustered
vectors and, where LUTRA_DATA (or ../shared/data) has them, sentence embeddings. Both libraries take turns at
every ef, in one run; recall is against exact search; the queries a second at a recall are interpolated
between two ef. hnswlib has M = 16 and ef_construction = 200, as is its custom, and so has lutra.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import lutra
from lutra.bench import data
from lutra.index import HNSW, Flat

EFS = (10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320)
RECALLS = (0.9, 0.95, 0.99)


class Set(NamedTuple):
    name: str
    metric: str
    x: np.ndarray
    q: np.ndarray
    truth: np.ndarray


class Point(NamedTuple):
    recall: float
    single: float  # queries a second, one at a time on one thread
    batch: float  # all at once on all threads


def dataset(name: str, metric: str, x: np.ndarray, q: np.ndarray) -> Set:
    flat = Flat(x.shape[1], metric)
    flat.add(x)
    return Set(name, metric, x, q, flat.search(q, 10).ids)


def clustered(n: int, d: int = 128) -> Set:
    return dataset(f"clustered {n} x {d}", "l2", *data.clustered(n, d, 1000))


def embeddings() -> Set | None:
    folders = [os.environ.get("LUTRA_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    for folder in folders:
        if folder and Path(folder, "debian_docs_f16.npy").is_file():
            x, q = (
                np.load(Path(folder, f"debian_{n}_f16.npy")).astype(np.float32) for n in ("docs", "queries")
            )
            return dataset("sentence embeddings 8288 x 384", "cosine", x, q[::4].copy())
    return None


def seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def recall(ids: np.ndarray, truth: np.ndarray) -> float:
    return float((ids[:, :, None] == truth[:, None]).any(2).mean())


def measured(search: Callable[[np.ndarray], np.ndarray], threads: Callable[[int], Any], s: Set) -> Point:
    cores = len(os.sched_getaffinity(0))
    threads(cores)
    found = recall(search(s.q), s.truth)
    batch = len(s.q) / seconds(lambda: search(s.q))
    threads(1)
    few = [s.q[i : i + 1] for i in range(0, len(s.q), 2)]
    single = len(few) / seconds(lambda: [search(q) for q in few], 2)
    threads(cores)
    return Point(found, single, batch)


def ours(s: Set, **options: Any) -> tuple[HNSW, float]:
    index = HNSW(s.x.shape[1], 16, s.metric, **options)
    return index, seconds(lambda: index.add(s.x), 1)


def peer(s: Set) -> tuple[Any, float]:
    hnswlib = pytest.importorskip("hnswlib")
    index = hnswlib.Index(s.metric, s.x.shape[1])
    index.init_index(len(s.x), M=16, ef_construction=200)
    index.set_num_threads(len(os.sched_getaffinity(0)))
    return index, seconds(lambda: index.add_items(s.x), 1)


def curves(s: Set, index: HNSW, other: Any) -> tuple[list[Point], list[Point]]:
    mine, theirs = [], []
    for ef in EFS:
        index.ef_search = ef
        mine.append(measured(lambda q: index.search(q, 10).ids, lutra.set_num_threads, s))
        other.set_ef(ef)
        theirs.append(measured(lambda q: other.knn_query(q, 10)[0], other.set_num_threads, s))
    lutra.set_num_threads(0)
    return mine, theirs


def at(points: list[Point], wanted: float) -> tuple[float, float]:
    """Queries a second (single, batch) at a recall; NaN where no ef reaches it."""
    before = None
    for point in points:
        if point.recall >= wanted:
            if before is None or point.recall == before.recall:
                return point.single, point.batch
            t = (wanted - before.recall) / (point.recall - before.recall)
            return (
                before.single * (point.single / before.single) ** t,
                before.batch * (point.batch / before.batch) ** t,
            )
        before = point
    return math.nan, math.nan


def report(s: Set, storages: list[str]) -> None:
    other, theirs_build = peer(s)
    print(f"\n{s.name}, {s.metric}; hnswlib builds in {theirs_build:.2f} s")
    for storage in storages:
        index, build = ours(s, storage=storage)
        print(f"  storage={storage!r}: builds in {build:.2f} s, {theirs_build / build:.2f} x as fast")
        mine, theirs = curves(s, index, other)
        for wanted in RECALLS:
            (single, batch), (single_, batch_) = at(mine, wanted), at(theirs, wanted)
            print(
                f"    recall@10 {wanted}: one at a time {single:7.0f} a second ({single_:.0f}, "
                f"x {single / single_:.2f}), in batches {batch:7.0f} ({batch_:.0f}, x {batch / batch_:.2f})"
            )


# ---- under pytest: one search each, with a recall to reach
@pytest.fixture(scope="module")
def made(full):
    return clustered(100_000 if full else 10_000)


@pytest.fixture(scope="module")
def index(made):
    return ours(made)[0]


@pytest.fixture(scope="module")
def other(made):
    return peer(made)[0]


@pytest.mark.parametrize("queries", [1, 1000])
def test_lutra(benchmark, made, index, queries):
    found = benchmark(lambda: index.search(made.q[:queries], 10, ef_search=40).ids)
    assert recall(found, made.truth[:queries]) > 0.9


@pytest.mark.parametrize("queries", [1, 1000])
def test_hnswlib(benchmark, made, other, queries):
    other.set_ef(40)
    found = benchmark(lambda: other.knn_query(made.q[:queries], 10)[0])
    assert recall(found, made.truth[:queries]) > 0.8


def test_build(benchmark, made):
    benchmark.pedantic(lambda: ours(made), rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="*", default=[100_000])
    parser.add_argument("--storage", nargs="*", default=["int8"])
    arguments = parser.parse_args()
    for dataset_ in [embeddings(), *map(clustered, arguments.n)]:
        if dataset_ is not None:
            report(dataset_, arguments.storage)
