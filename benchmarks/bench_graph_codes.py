"""`lutra.index.HNSW` over codes beside 8-bit rows, and beside FAISS's graph over the same codes.

``python benchmarks/bench_graph_codes.py [--n 50000] [--ef 20 40 80 160] [--dsub 4 8]`` prints a table for the
sentence embeddings in LUTRA_DATA (or ../shared/data), where they are there, and for n clustered vectors:
recall@10 against exact search, and the median time of a query, one at a time on one thread. All indexes take
turns at every ef. ``dsub``: dimensions of a sub-vector. M = 16 and ef_construction = 200 everywhere. FAISS
ranks the ``ef`` that its walk found again by float32 vectors (IndexRefineFlat), lutra by float16 ones.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from bench_graph import Set, clustered, embeddings, recall

import lutra
from lutra.index import HNSW
from lutra.quant import PQ

Search = Callable[[np.ndarray, int], np.ndarray]  # queries, ef: ids


class Made(NamedTuple):
    name: str
    seconds: float  # to add, all threads
    bytes: float  # a vector: rows and links, without vectors kept for the exact scores
    search: Search
    threads: Callable[[int], Any]


def ours(s: Set, name: str, storage: Any, refine: str | None) -> Made:
    d = s.x.shape[1]
    index = HNSW(d, 16, s.metric, storage=storage, refine=refine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 8288 vectors are few to train on
        index.train(s.x, progress=False)
    start = time.perf_counter()
    index.add(s.x)
    seconds = time.perf_counter() - start
    kept = {"float32": 4, "float16": 2, None: 0}[refine] * d
    codebooks = 0 if index.quantizer is None else index.quantizer.codebooks.nbytes
    each = (index.nbytes - codebooks) / len(s.x) - kept
    return Made(
        name, seconds, each, lambda q, ef: index.search(q, 10, ef_search=ef).ids, lutra.set_num_threads
    )


def theirs(s: Set, m: int) -> Made:
    faiss = pytest.importorskip("faiss")
    x, d = unit(s), s.x.shape[1]
    base = faiss.IndexHNSWPQ(d, m, 16)
    base.hnsw.efConstruction = 200
    faiss.downcast_index(base.storage).pq.cp.min_points_per_centroid = 1  # else a warning for each sub-space
    index = faiss.IndexRefineFlat(base)
    index.train(x)
    start = time.perf_counter()
    index.add(x)
    seconds = time.perf_counter() - start

    def search(q: np.ndarray, ef: int) -> np.ndarray:
        base.hnsw.efSearch = ef
        index.k_factor = max(1, ef // 10)
        return index.search(q, 10)[1]

    return Made(f"FAISS HNSWPQ, m={m}", seconds, m + 16 * 8, search, faiss.omp_set_num_threads)


def unit(s: Set) -> np.ndarray:
    if s.metric != "cosine":
        return s.x
    return s.x / np.linalg.norm(s.x, axis=1, keepdims=True)


def timed(made: Made, q: np.ndarray, ef: int) -> float:
    """The median seconds of a query alone."""
    made.threads(1)
    times = []
    for i in range(len(q)):
        start = time.perf_counter()
        made.search(q[i : i + 1], ef)
        times.append(time.perf_counter() - start)
    made.threads(0 if made.threads is lutra.set_num_threads else lutra.get_num_threads())
    return float(np.median(times))


def report(s: Set, efs: list[int], ms: list[int]) -> None:
    print(f"{s.name}, {s.metric}; recall@10 and microseconds a query, one thread")
    indexes = [ours(s, "int8", "int8", "float32")]
    for m in ms:
        for bits in (8, 4):
            storage = PQ(s.x.shape[1], m, bits)
            indexes.append(ours(s, f"PQ m={m} bits={bits}", storage, "float16"))
            if bits == 8:
                indexes.append(ours(s, f"PQ m={m} bits={bits}, refine=None", storage, None))
        indexes.append(theirs(s, m))
    queries = s.q if s.metric != "cosine" else s.q / np.linalg.norm(s.q, axis=1, keepdims=True)
    rows: list[list[str]] = [[] for _ in indexes]
    for ef in efs:
        best = [np.inf] * len(indexes)
        for _ in range(3):
            for i, made in enumerate(indexes):
                best[i] = min(best[i], timed(made, queries[::4], ef))
        for i, made in enumerate(indexes):
            found = recall(made.search(queries, ef), s.truth)
            rows[i].append(f"{found:.3f} in {1e6 * best[i]:.0f}")
    print("| | bytes a vector | build s |", " | ".join(f"ef {ef}" for ef in efs), "|")
    for made, row in zip(indexes, rows):
        print(f"| {made.name} | {made.bytes:.0f} | {made.seconds:.1f} |", " | ".join(row), "|")


# ---- under pytest: a search with a recall to reach
@pytest.fixture(scope="module")
def made(full):
    return clustered(100_000 if full else 10_000)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes(benchmark, made, bits):
    d = made.x.shape[1]
    index = ours(made, "", PQ(d, d // 4, bits), "float16")
    found = benchmark(lambda: index.search(made.q, 80))
    assert recall(found, made.truth) > (0.9 if bits == 8 else 0.7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="*", default=[50_000])
    parser.add_argument("--ef", type=int, nargs="*", default=[20, 40, 80, 160])
    parser.add_argument("--dsub", type=int, nargs="*", default=[4, 8])
    arguments = parser.parse_args()
    for dataset in [embeddings(), *map(clustered, arguments.n)]:
        if dataset is not None:
            report(dataset, arguments.ef, [dataset.x.shape[1] // dsub for dsub in arguments.dsub])
