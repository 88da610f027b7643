"""What is found, how fast, and in how many bytes: exact MaxSim, MultiVector, and what it competes with.

800 Debian package descriptions and summaries, a vector of 128 values for each token (random words where
there is no real data): a summary should find its own description. ``recall`` is the share of the ten
documents that exact MaxSim finds; ``ms`` the time of a query in a batch of all; ``bytes`` of a document in
the index.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from real_data import data_folder

import lutra
from lutra import metrics
from lutra.index import MultiVector

K = 10
_ENCODINGS = [(5, 3, 8), (10, 4, 8), (20, 4, 8), (20, 5, 16), (20, 5, 32)]
_CANDIDATES = (10, 20, 40, 80, 160)
_drawn: dict[str, list[tuple[float, float, float]]] = {}


def data(quick: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Documents and queries, each tokens and offsets; query i belongs to document i."""
    folder = data_folder()
    if folder is None:
        rng, n, d = np.random.default_rng(0), 300 if quick else 800, 128
        words = rng.standard_normal((2000, d)).astype(np.float32)
        documents = [rng.choice(2000, rng.integers(20, 120), replace=False) for _ in range(n)]
        queries = [rng.choice(document, 9, replace=False) for document in documents]
        sets = []
        for ids in (documents, queries):
            flat = np.concatenate(ids)
            tokens = words[flat] + rng.standard_normal((len(flat), d)).astype(np.float32)
            tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
            sets += [tokens, np.concatenate([[0], np.cumsum([len(i) for i in ids])])]
        return tuple(sets)  # type: ignore[return-value]
    with np.load(folder / "debian_multivector_f16.npz") as file:
        d, dp, q, qp = (file[n] for n in ("doc_tokens", "doc_ptr", "query_tokens", "query_ptr"))
    dp, qp = dp.astype(np.int64), qp.astype(np.int64)
    if quick:
        dp, qp = dp[:301], qp[:301]
    return d[: dp[-1]].astype(np.float32), dp, q[: qp[-1]].astype(np.float32), qp


def timed(search: Callable[[], Any], quick: bool) -> tuple[Any, float]:
    """The result, and the median seconds of a call."""
    result, times = search(), []
    while len(times) < (1 if quick else 3) or (sum(times) < 0.5 and not quick):
        begin = time.perf_counter()
        search()
        times.append(time.perf_counter() - begin)
    return result, float(np.median(times))


def pooled(tokens: np.ndarray, ptr: np.ndarray) -> np.ndarray:
    """The mean of each set, of norm 1."""
    means = np.add.reduceat(tokens, ptr[:-1]) / np.diff(ptr)[:, None]
    return means / np.linalg.norm(means, axis=1, keepdims=True)


class Bench:
    """The data, what exact search finds, and rows of figures."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.d, self.dp, self.q, self.qp = data(quick)
        self.n = len(self.dp) - 1
        self.own = np.arange(self.n)
        self.exact = lutra.scan.maxsim(self.q, self.qp, self.d, self.dp, k=K).ids

    def row(self, what: str, search: Callable[[], Any], nbytes: float, **more: Any) -> dict[str, Any]:
        ids, seconds = timed(search, self.quick)
        ids = np.asarray(getattr(ids, "ids", ids))
        return {
            "what": what, **more,
            "recall": metrics.recall_at_k(ids, self.exact, K),
            "success@10": metrics.success_at_k(ids, self.own, K),
            "ndcg@10": metrics.ndcg_at_k(ids, self.own, K),
            "ms": 1e3 * seconds / self.n, "bytes": nbytes / self.n,
        }  # fmt: skip

    def build(self, *parts: Any, tokens: Any = None, ptr: Any = None, **options: Any) -> MultiVector:
        index = MultiVector(self.d.shape[1], *parts, **options)
        documents = (self.d, self.dp) if tokens is None else (tokens, ptr)
        if not index.is_trained:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # 800 documents are few to train on
                index.train(documents, progress=False)
        index.add(documents, progress=False)
        return index

    def search(self, index: MultiVector, **options: Any) -> Callable[[], Any]:
        return lambda: index.search((self.q, self.qp), K, **options)


def nearest_tokens(b: Bench, each: int) -> Callable[[], Any]:
    """The heuristic that MUVERA replaces: the documents of each query token's nearest tokens, then MaxSim."""
    owner = np.repeat(np.arange(b.n), np.diff(b.dp))

    def search() -> Any:
        near = owner[lutra.scan.knn(b.q, b.d, each).ids]
        sets = [np.unique(near[low:high]) for low, high in zip(b.qp[:-1], b.qp[1:])]
        candidates = np.full((b.n, max(map(len, sets))), -1)
        for row, found in zip(candidates, sets):
            row[: len(found)] = found
        search.candidates = (candidates >= 0).sum(1).mean()  # type: ignore[attr-defined]
        return lutra.scan.maxsim(b.q, b.qp, b.d, b.dp, candidates=candidates, k=K)

    return search


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    b = Bench(quick)
    counts = (10, 40) if quick else _CANDIDATES
    _drawn.clear()

    yield b.row("exact MaxSim, float32", lambda: lutra.scan.maxsim(b.q, b.qp, b.d, b.dp, k=K), b.d.nbytes)
    single = pooled(b.d, b.dp), pooled(b.q, b.qp)
    yield b.row("mean vectors", lambda: lutra.scan.knn(single[1], single[0], K), single[0].nbytes)
    for each in (4, 16) if quick else (4, 16, 64):
        search = nearest_tokens(b, each)
        row = b.row(f"nearest {each} tokens", search, b.d.nbytes)
        yield {**row, "candidates": float(search.candidates)}  # type: ignore[attr-defined]
    for repetitions, k_sim, d_proj in _ENCODINGS[1:3] if quick else _ENCODINGS:
        index = b.build("float32", repetitions=repetitions, k_sim=k_sim, d_proj=d_proj)
        name = f"{index.encoder.dim} ({repetitions}, {k_sim}, {d_proj})"
        for count in counts:
            row = b.row(f"FDE {name}", b.search(index, candidates=count), index.nbytes, candidates=count)
            _drawn.setdefault(name, []).append((count, row["recall"], row["ms"]))
            yield row
    some = 20 if quick else 80
    size = {"repetitions": 5, "k_sim": 4} if quick else {}
    for kind in ("float16", "int8", "pq", "SQ4", "IVF16,SQfp16", "HNSW16,SQfp16"):
        index = b.build(kind, **size)
        if kind.startswith("IVF"):
            index.index.nprobe = 8
            kind += ", 8 lists"
        yield b.row(f"encodings {kind}", b.search(index, candidates=some), index.nbytes, candidates=some)
    carved = b.build("float16", ball_carving=0.7, **size)
    yield b.row("ball carving .7", b.search(carved, candidates=some), carved.nbytes, candidates=some)
    for tokens in ("int8", "residual4", "residual2", "residual1"):
        index = b.build("float16", tokens, **size)
        row = b.row(f"tokens {tokens}", b.search(index, candidates=some), index._tokens.nbytes)
        yield {**row, "candidates": some}
        if tokens == "residual2":
            search = b.search(index, candidates=some, generator="centroids")
            row = b.row("centroid interaction", search, index._tokens.nbytes, candidates=some)
            yield row


def expect(found: list[dict[str, Any]]) -> None:
    """Exact search finds what it should; more candidates find no less; encodings beat the fewest tokens."""
    by = {row["what"]: row for row in found}
    exact = by["exact MaxSim, float32"]
    assert exact["recall"] == 1.0
    assert exact["success@10"] > 0.5
    for name in {row["what"] for row in found if row["what"].startswith("FDE")}:
        recalls = [row["recall"] for row in found if row["what"] == name]
        assert recalls == sorted(recalls)
        assert recalls[-1] > 0.6, (name, recalls)


def line(row: dict[str, Any]) -> str:
    candidates = f"{row['candidates']:6.0f} candidates" if "candidates" in row else " " * 17
    return (
        f"{row['what']:32} {candidates}: recall {row['recall']:.3f}, success@10 {row['success@10']:.3f}, "
        f"nDCG@10 {row['ndcg@10']:.3f}, {row['ms']:.3f} ms, {row['bytes']:,.0f} bytes"
    )


def plot(folder: Path) -> None:
    """Recall against candidates, for each size of encodings, into multivector-recall.svg."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, points in _drawn.items():
        counts, recalls, _ = zip(*points)
        axes.plot(counts, recalls, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(_CANDIDATES, [str(c) for c in _CANDIDATES])
    axes.set_xlabel("candidates that are ranked by MaxSim, of 800 documents")
    axes.set_ylabel("recall of the exact 10 best")
    axes.legend(title="dimensions (R, k_sim, d_proj)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "multivector-recall.svg")
    plt.close(figure)
