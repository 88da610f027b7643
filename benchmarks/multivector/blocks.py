"""lutra.index.Blocks against the dense product of encodings in torch, and what its formats lose.

A query of R repetitions has a block where one of its tokens falls, so that 32 random tokens have 64 % of 640
blocks and the ten of a package's summary 27 %. ``dense`` is ``torch.topk(q @ x.T, k)`` on float32 encodings.
At 100,000 encodings of 10,240 dimensions two copies are too much for the machine: the dense product runs
first, and its copy is freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from real_data import data_folder

from lutra.bench import interleaved
from lutra.bench.limits import Limits

K = 100
DTYPES = ("float32", "float16", "int8", "pq")
BYTES = {"float32": 4, "float16": 2, "int8": 1, "pq": 1 / 8}


def _tokens(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Tokens and offsets of the Debian documents and queries; None where there is no real data."""
    folder = data_folder()
    if folder is None:
        return None
    data = np.load(folder / "debian_multivector_f16.npz")
    names = ("doc_tokens", "doc_ptr", "query_tokens", "query_ptr")
    tokens, ptr, query_tokens, query_ptr = (data[name] for name in names)
    return tokens.astype(np.float32), ptr, query_tokens.astype(np.float32), query_ptr


def _documents(enc: Any, count: int, real: Any, rng: np.random.Generator) -> np.ndarray:
    """Encodings of runs of 40 to 110 tokens, of the real documents where there are any."""
    lengths = rng.integers(40, 111, count)
    if real is None:
        tokens = rng.standard_normal((int(lengths.sum()), enc.d)).astype(np.float32)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    else:
        begin = rng.integers(0, len(real[0]) - 110, count)
        rows = np.arange(lengths.sum()) + np.repeat(begin - (np.cumsum(lengths) - lengths), lengths)
        tokens = real[0][rows]
    return enc.encode_documents(tokens, np.append(0, np.cumsum(lengths)))


def _queries(enc: Any, count: int, real: Any, rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """Block-sparse queries, of 32 random unit tokens and of the real queries."""
    tokens = rng.standard_normal((32 * count, enc.d)).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    yield "32 random", enc.encode_queries(tokens, np.arange(count + 1) * 32, sparse=True)
    if real is not None:
        some = real[3][: count + 1]
        yield "Debian", enc.encode_queries(real[2][: some[-1]], some, sparse=True)


def _repeated(base: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """n vectors: the same ones again and again, a little shorter each time."""
    for i in range(0, n, len(base)):
        yield base[: n - i] * np.float32(1 - 0.01 * (i // len(base)))


def _index(dtype: str, base: np.ndarray, n: int, width: int) -> Any:
    import warnings

    import lutra.index

    index = lutra.index.Blocks(base.shape[1], width, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few vectors for 256 centroids: the codes are scanned, not judged
        index.train(base[:1024], n_iter=2)
    for part in _repeated(base, n):
        index.add(part)
    return index


def _speed(quick: bool) -> Iterator[dict[str, Any]]:
    import torch

    import lutra.address

    rng = np.random.default_rng(0)
    real = _tokens(rng)
    enc = lutra.address.FDE(128, 4 if quick else 20, 5, 16)
    n, batch = (3000, 8) if quick else (100_000, 32)
    base = _documents(enc, min(n, 4096), real, rng)
    cases = [
        (name, nq, _first(rows, nq)) for name, rows in _queries(enc, batch, real, rng) for nq in (1, batch)
    ]
    seconds = 0.2 if quick else 1.5
    limits = Limits.measure(quick=True)
    x = torch.empty((n, enc.dim))
    for i, part in enumerate(_repeated(base, n)):
        x[i * len(base) : i * len(base) + len(part)] = torch.from_numpy(part)
    dense, best = {}, {}
    for name, nq, rows in cases:
        q = torch.from_numpy(rows.dense(enc.num_blocks))

        def product(q=q, x=x):
            return torch.topk(q @ x.T, K)

        best[name, nq] = product().values.numpy()
        dense[name, nq] = interleaved({"dense": product}, seconds)["dense"].median
    del x, product
    for dtype in DTYPES:
        index = _index(dtype, base, n, enc.width)
        for name, nq, rows in cases:
            found = index.search_blocks(rows, K).scores
            close = {"float32": 1e-4, "float16": 2e-3, "int8": 2e-2, "pq": 0.5}[dtype]
            assert np.abs(found - best[name, nq]).max() <= close * np.abs(best[name, nq]).max()

            def scan(index=index, rows=rows):
                return index.search_blocks(rows, K)

            ours = interleaved({"ours": scan}, seconds)["ours"].median
            read = n * len(np.unique(rows.blocks)) * enc.width * BYTES[dtype]
            row = {
                "what": "scan", "n": n, "d": enc.dim, "tokens": name, "queries": nq, "dtype": dtype,
                "share": len(rows.blocks) / nq / enc.num_blocks, "ours": 1e3 * ours,
                "torch": 1e3 * dense[name, nq], "ratio": dense[name, nq] / ours, "bytes/s": read / ours,
                "flop/s": 2.0 * n * rows.values.size / ours,
            }  # fmt: skip
            if limits is not None:
                row |= {
                    "of bandwidth": row["bytes/s"] / limits.bandwidth,
                    "of FMA": row["flop/s"] / limits.flops,
                }
            yield row
        del index, scan


def _first(rows: Any, nq: int) -> Any:
    end = int(rows.ptr[nq])
    return type(rows)(rows.ptr[: nq + 1], rows.blocks[:end], rows.values[:end])


def _quality(quick: bool) -> Iterator[dict[str, Any]]:
    """The share of the float32 encodings' own best that the formats find."""
    import lutra.address
    import lutra.index

    rng = np.random.default_rng(1)
    real = _tokens(rng)
    enc = lutra.address.FDE(128, 4 if quick else 20, 5, 16)
    n = 2000 if quick else 12_000
    documents = _documents(enc, n, real, rng)
    for name, rows in _queries(enc, 50 if quick else 400, real, rng):
        truth = None
        for dtype in DTYPES:
            index = lutra.index.Blocks(enc.dim, enc.width, dtype)
            if dtype == "pq":
                import warnings

                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    index.train(documents, n_iter=3 if quick else 10)
            index.add(documents)
            found = index.search_blocks(rows, K).ids
            truth = found if truth is None else truth
            shares = {k: _share(found, truth, k) for k in (10, 100)}
            wide = float(np.mean([np.isin(t[:10], f).mean() for t, f in zip(truth, found)]))
            yield {
                "what": "recall", "n": n, "d": enc.dim, "tokens": name, "dtype": dtype,
                "bytes": enc.dim * BYTES[dtype], "10@10": shares[10], "10@100": wide, "100@100": shares[100],
            }  # fmt: skip


def _share(found: np.ndarray, truth: np.ndarray, k: int) -> float:
    return float(np.mean([np.isin(t[:k], f[:k]).mean() for t, f in zip(truth, found)]))


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds of scans, then the recall of the formats."""
    yield from _speed(quick)
    yield from _quality(quick)


def line(row: dict[str, Any]) -> str:
    head = f"{row['what']:6} {row['n']:>7,} x {row['d']:,}  {row['tokens']:9} "
    if row["what"] == "recall":
        return (
            f"{head}{row['dtype']:8} {row['bytes']:>8,.0f} bytes  10 of 10 {row['10@10']:.3f}  "
            f"10 in 100 {row['10@100']:.3f}  100 of 100 {row['100@100']:.3f}"
        )
    tail = f"  {row['of bandwidth']:.0%} of memory, {row['of FMA']:.0%} of FMA" if "of FMA" in row else ""
    return (
        f"{head}{row['queries']:>3} queries  {row['share']:.0%} of blocks  {row['dtype']:8} "
        f"{row['ours']:9.2f} ms  dense {row['torch']:9.2f} ms  {row['ratio']:6.2f} x{tail}"
    )


def expect(rows: list[dict[str, Any]]) -> None:
    """Of the quick form: every format finds most of what float32 finds."""
    for row in rows:
        if row["what"] == "recall":
            low = {"float32": 1.0, "float16": 0.98, "int8": 0.95, "pq": 0.5}[row["dtype"]]
            assert row["100@100"] >= low, row
