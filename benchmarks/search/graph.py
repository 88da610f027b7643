"""Graph search of real sentence embeddings, beside hnswlib."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import lutra
from lutra import scan
from lutra.index import HNSW

from .context import Context, K, Row, peer, recall

EFS = (10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 32, 36, 40, 48, 56, 64, 80, 96, 128, 160, 200, 256)


def real(c: Context) -> tuple[np.ndarray, np.ndarray] | None:
    """Debian's package descriptions and summaries as MiniLM embeddings; None without the data's folder."""
    if c.folder is None or not (c.folder / "debian_docs_f16.npy").exists():
        print("  (no debian_docs_f16.npy in the data folder: the graph's rows are left out)")
        return None
    names = ("debian_docs_f16.npy", "debian_queries_f16.npy")
    return tuple(np.load(c.folder / name).astype(np.float32) for name in names)  # type: ignore[return-value]


def graph(c: Context) -> None:
    """Time a query at recall .95 and .99, one at a time on one thread and all at once; building."""
    sets = real(c)
    if sets is None:
        return
    x, q = sets
    d = x.shape[1]
    truth = scan.knn(q, x, K, "cosine").ids
    threads = lutra.get_num_threads()
    hnswlib = peer("hnswlib")

    def build_ours(storage: str) -> HNSW:
        index = HNSW(d, metric="cosine", ef_construction=200, storage=storage)
        index.add(x)
        return index

    def build_theirs() -> Any:
        index = hnswlib.Index("cosine", d)
        index.init_index(len(x), M=16, ef_construction=200, random_seed=1)
        index.set_num_threads(threads)
        index.add_items(x)
        return index

    def seconds(build: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        index = build()
        return time.perf_counter() - start, index

    indexes = {storage: seconds(lambda s=storage: build_ours(s)) for storage in ("float32", "int8")}
    fast = min(indexes, key=lambda s: indexes[s][0])
    theirs_built, theirs = seconds(build_theirs) if hnswlib is not None else (None, None)
    c.add(
        Row(
            "graph", f"HNSW build, {len(x)} x {d}", "hnswlib M=16, ef 200", indexes[fast][0], theirs_built,
            target=1.0, unit="s", note=f"storage {fast}",
        )
    )  # fmt: skip
    for wanted in (0.95, 0.99):
        found = {}
        for storage, (_, index) in indexes.items():
            for ef in EFS:
                got = recall(index.search(q, K, ef_search=ef).ids, truth)
                if got >= wanted:
                    run = lambda q, i=index, ef=ef: i.search(q, K, ef_search=ef)  # noqa: E731
                    cost = c.time({"ours": lambda run=run: run(q)})["ours"]
                    found[cost] = (run, got, f"storage {storage}, ef {ef}")
                    break
        run, got, note = found[min(found)]
        its = None
        if theirs is not None:
            for ef in EFS:
                theirs.set_ef(ef)
                its = recall(theirs.knn_query(q, K)[0].astype(np.int64), truth)
                if its >= wanted:
                    break
            note += f"; hnswlib ef {ef}"
        some = np.ascontiguousarray(q[:: max(1, len(q) // 500)])

        def one_by_one(search: Callable[[np.ndarray], Any], rows: list[np.ndarray]) -> None:
            for row in rows:
                search(row)

        rows = [row[None] for row in some]
        for label, function, argument, count, used in (
            ("one at a time, 1 thread", one_by_one, rows, len(rows), 1),
            (
                f"batch of {len(q)}, {threads} threads",
                lambda search, queries: search(queries),
                q,
                len(q),
                threads,
            ),
        ):
            lutra.set_num_threads(used)
            functions = {"ours": lambda f=function, a=argument, run=run: f(run, a)}
            if theirs is not None:
                theirs.set_num_threads(used)
                functions["theirs"] = lambda f=function, a=argument: f(lambda z: theirs.knn_query(z, K), a)
            t = {name: s / count * 1e3 for name, s in c.time(functions).items()}
            c.add(
                Row(
                    "graph", f"HNSW at {wanted}, {label}", "hnswlib", t["ours"], t.get("theirs"), got, its,
                    1.5, note=note,
                )
            )  # fmt: skip
        lutra.set_num_threads(threads)
