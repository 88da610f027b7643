"""Fixed dimensional encodings: their speed against other implementations, and how near their inner products
come to Chamfer similarities.

``ns`` are nanoseconds a token, of the process's time on one thread and of wall clock on more. ``limit``: what
the multiply-adds alone would take at the rate that this machine was measured to reach, those that choose the
partitions and those that project the blocks (and filling tokens) of this data. Peers are installed by
``pip install fastembed muvera-python``, and left out where they are not. ``torch`` is the same in torch's own
operations. All encode batches of 500 sets, lutra as many as make up the tokens, the peers one: encodings of a
million tokens at once are new memory, whose pages the system takes as long to find as lutra to encode.

``error`` is the root of the mean squared difference of an inner product of encodings, over repetitions and
the query's vectors, from the Chamfer similarity over the query's vectors; ``ranking`` the same without what a
query's documents have in common, which changes no order; ``kept`` the share of queries whose best document by
Chamfer similarity is among the first ten by encodings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from real_data import data_folder

import lutra
from lutra.address import FDE

D = 128
_drawn: list[dict[str, Any]] = []


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Speed, then errors."""
    yield from speed(quick)
    yield from errors(quick)


# ---------------------------------------------------------------- speed
def speed(quick: bool) -> Iterator[dict[str, Any]]:
    from lutra.bench.limits import Limits

    limits = Limits.measure(True)
    n = 6400 if quick else 1_000_000
    e = FDE(D, 20, 5, 16)
    for what, length in (("documents", 100), ("documents", 300), ("queries", 32), ("sparse queries", 32)):
        if quick and length == 300:
            continue
        total = n if what == "documents" else n // 5
        tokens, ptr = vectors(total // length * length, length)
        query, sparse = what != "documents", what == "sparse queries"
        few = min(len(ptr) - 1, 10 if quick else 500)
        part, its = tokens[: ptr[few]], ptr[: few + 1]

        batches = [(tokens[a:b], its) for a, b in pairwise(range(0, len(tokens) + 1, len(part)))]

        def encode(batches=batches, query=query, sparse=sparse):
            for t, p in batches:
                lutra.address.fde(t, p, e, query=query, sparse=sparse)

        check(e, part, its, query)
        ways: dict[str, tuple[Callable[[], Any], int]] = {"lutra": (encode, len(part) * len(batches))}
        ways.update(peers(e, part, its, query))
        found = nanoseconds(ways, 1 if quick else 3)
        row = {"what": what, "tokens": ways["lutra"][1], "length": length, "ns": found.pop("lutra")}
        if limits is not None:
            row["limit"] = flops(e, part, its, query) / limits.flops * 1e9
        yield {**row, **found}


def vectors(n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Real tokens in sets of one length, as often as needed; random ones where there is no real data."""
    folder = data_folder()
    if folder is None:
        tokens = np.random.default_rng(0).standard_normal((n, D)).astype(np.float32)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    else:
        with np.load(folder / "debian_multivector_f16.npz") as file:
            real = file["doc_tokens"].astype(np.float32)
        tokens = np.resize(real, (n, D))
    return tokens, np.arange(0, n + 1, length)


def check(e: FDE, tokens: np.ndarray, ptr: np.ndarray, query: bool) -> None:
    """Against the composition in torch: equal but where a product is 0 up to rounding."""
    import torch

    from lutra.torch_ops.fde import compose

    few = min(len(ptr), 21)
    got = lutra.address.fde(tokens[: ptr[few - 1]], ptr[:few], e, query=query)
    want = compose(torch.from_numpy(tokens[: ptr[few - 1]]), torch.from_numpy(ptr[:few]), e, query).numpy()
    assert (np.abs(got - want) < 1e-4).mean() > 0.999
    rows = lutra.address.fde(tokens, ptr, e, query=True, sparse=True)
    assert np.array_equal(rows.dense(e.num_blocks), lutra.address.fde(tokens, ptr, e, query=True))


def flops(e: FDE, tokens: np.ndarray, ptr: np.ndarray, query: bool) -> float:
    """Operations a token: partitions, and projections of blocks and of the tokens that fill others."""
    numbers = lutra.address.simhash(tokens, e.planes)
    document = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    blocks = sum(len(np.unique(document * (1 << e.k_sim) + numbers[:, r])) for r in range(e.repetitions))
    if not query and e.fill_empty:  # at least: a filling token that is alone in its block is projected anyway
        dense = lutra.address.fde(tokens, ptr, e).reshape(-1, 1 << e.k_sim, e.width)
        blocks = max(blocks, sum(len(np.unique(r[:, 0])) for r in dense))
    return 2 * D * (e.repetitions * e.k_sim + e.width * blocks / len(tokens))


def peers(
    e: FDE, tokens: np.ndarray, ptr: np.ndarray, query: bool
) -> dict[str, tuple[Callable[[], Any], int]]:
    import torch

    from lutra.torch_ops.fde import compose

    docs = [tokens[a:b] for a, b in pairwise(ptr)]
    n = len(tokens)
    t, p = torch.from_numpy(tokens), torch.from_numpy(ptr)
    found: dict[str, tuple[Callable[[], Any], int]] = {"torch": (lambda: compose(t, p, e, query), n)}
    try:
        from fastembed.postprocess import Muvera

        fast = Muvera(D, e.k_sim, e.d_proj, e.repetitions)
        process = fast.process_query if query else fast.process_document
        found["fastembed"] = (lambda: [process(d) for d in docs], n)
    except ImportError:
        pass
    try:
        from muvera import Muvera as Batch

        batch = Batch(e.repetitions, e.k_sim, D, "ams_sketch", e.d_proj)
        encode = batch.encode_queries if query else batch.encode_documents
        found["muvera-python"] = (lambda: encode(docs), n)
    except ImportError:
        pass
    return found


def nanoseconds(ways: dict[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, float]:
    """The median time a token of each way; they take turns."""
    clock = time.process_time if lutra.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (way, n) in ways.items():
            begin = clock()
            way()
            if turn:  # the first is to warm up
                found[name].append((clock() - begin) * 1e9 / n)
    return {name: float(np.median(times)) for name, times in found.items()}


# ---------------------------------------------------------------- errors
def errors(quick: bool) -> Iterator[dict[str, Any]]:
    """Encodings of many sizes of real documents and queries."""
    d, dp, q, qp = sets(quick)
    exact = np.asarray(lutra.scan.maxsim(q, qp, d, dp, normalize=True))
    best = exact.argmax(1)
    _drawn.clear()
    for k_sim, d_proj in ((2, 16), (4, 16), (5, 16), (6, 16), (4, 8), (5, 32)):
        for repetitions in (1, 5) if quick else (1, 2, 5, 10, 20, 40):
            e = FDE(D, repetitions, k_sim, d_proj)
            found = e.encode_queries(q, qp) @ e.encode_documents(d, dp).T
            found /= repetitions * np.diff(qp)[:, None]
            first = np.argpartition(-found, 9, 1)[:, :10]
            off = found - exact
            row = {
                "what": "error", "k_sim": k_sim, "d_proj": d_proj, "repetitions": repetitions, "dim": e.dim,
                "error": float((off**2).mean() ** 0.5),
                "ranking": float((off - off.mean(1, keepdims=True)).std()),
                "kept": float((first == best[:, None]).any(1).mean()),
            }  # fmt: skip
            _drawn.append(row)
            yield row


def sets(quick: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Documents and queries; random unit vectors, a query's near to some of its document's, without data."""
    folder = data_folder()
    n = 60 if quick else 800
    if folder is not None:
        with np.load(folder / "debian_multivector_f16.npz") as file:
            d, dp, q, qp = (file[k] for k in ("doc_tokens", "doc_ptr", "query_tokens", "query_ptr"))
        dp, qp = dp[: n + 1].astype(np.int64), qp[: n + 1].astype(np.int64)
        return d[: dp[-1]].astype(np.float32), dp, q[: qp[-1]].astype(np.float32), qp
    rng = np.random.default_rng(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    d = unit(rng.standard_normal((n, 70, D)))
    q = unit(d[:, :10] + unit(rng.standard_normal((n, 10, D))))
    return d.reshape(-1, D), np.arange(n + 1) * 70, q.reshape(-1, D), np.arange(n + 1) * 10


def line(row: dict[str, Any]) -> str:
    if row["what"] == "error":
        return (
            f"k_sim {row['k_sim']}, d_proj {row['d_proj']:>2}, {row['repetitions']:>2} repetitions: "
            f"{row['dim']:>6} values, error {row['error']:.3f}, of ranking {row['ranking']:.3f}, "
            f"best document in the first 10: {row['kept']:.1%}"
        )
    limit = f", limit {row['limit']:>4.0f} ({row['limit'] / row['ns']:.0%})" if "limit" in row else ""
    peers = "".join(
        f", {name} {row[name]:.0f} ({row[name] / row['ns']:.1f}x)"
        for name in ("torch", "muvera-python", "fastembed")
        if name in row
    )
    return (
        f"{row['what']:<14} {row['tokens']:>7} tokens in sets of {row['length']}: "
        f"{row['ns']:>5.0f} ns a token{limit}{peers}"
    )


def expect(found: list[dict[str, Any]]) -> None:
    """Faster than the same in torch, and by far than fastembed; errors fall with more partitions, and with
    more repetitions more best documents are found."""
    for row in found:
        if row["what"] != "error":
            assert row["ns"] < row["torch"], row
            assert row["ns"] * 10 < row.get("fastembed", float("inf")), row
    of = {(r["k_sim"], r["d_proj"], r["repetitions"]): r for r in found if r["what"] == "error"}
    assert of[2, 16, 5]["error"] > of[4, 16, 5]["error"] > of[6, 16, 5]["error"]
    assert of[5, 16, 5]["kept"] >= of[5, 16, 1]["kept"] - 0.05


def plot(folder: Path) -> None:
    """The errors and what is kept, against values of an encoding, into fde-error.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), sharex=True)
    for i, (k_sim, d_proj) in enumerate(dict.fromkeys((r["k_sim"], r["d_proj"]) for r in _drawn)):
        mine = [r for r in _drawn if (r["k_sim"], r["d_proj"]) == (k_sim, d_proj)]
        style = {"marker": "os^vDP"[i % 6], "ms": 4, "lw": 1, "label": f"k_sim {k_sim}, d_proj {d_proj}"}
        for axis, name, factor in zip(axes, ("error", "ranking", "kept"), (1, 1, 100)):
            axis.plot([r["dim"] for r in mine], [factor * r[name] for r in mine], **style)
    axes[0].set_title("error of the Chamfer similarity (root mean square, a query vector)", fontsize=9)
    axes[1].set_title("the same without what a query's documents have in common", fontsize=9)
    axes[2].set_title("queries whose best document is in the first 10, %", fontsize=9)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlabel("values of an encoding")
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(folder / "fde-error.svg")
    plt.close(figure)
