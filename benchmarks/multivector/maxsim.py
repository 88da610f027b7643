"""MaxSim: 32 query tokens and 1,000 documents of 80 to 300 tokens of 128 dimensions, unit norm.

``torch`` is einsum over documents padded to the longest, its maxima and sums; maxsim-cpu and numkong (PyPI)
are timed where they are installed, numkong with documents that were packed before; it chooses the maxima by
coarser products. ``scores off by`` is the largest difference from float32's. ``GFLOP/s`` counts 2 x query
tokens x document tokens x 128, of tokens that are there; ``of FMA`` is its share of the machine's fp32
multiply-adds, measured in the same run. On one thread the time is the process's, on more wall clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from layers.timing import medians

import lutra
from lutra import _backend
from lutra.bench import interleaved

D, TOKENS = 128, 32


def timed(ways: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Milliseconds; on several threads with pauses, for other libraries' threads spin for a while."""
    if torch.get_num_threads() == 1:
        return medians(ways, seconds)
    return {name: 1e3 * t.median for name, t in interleaved(ways, seconds).items()}


def problem(documents: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query and documents: tokens and offsets of each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(80, 301, documents)
    ptr = np.concatenate([[0], np.cumsum(lengths)])
    x = torch.from_numpy(rng.standard_normal((int(ptr[-1]), D)).astype(np.float32))
    q = torch.from_numpy(rng.standard_normal((TOKENS, D)).astype(np.float32))
    q, x = (torch.nn.functional.normalize(a, dim=1) for a in (q, x))
    return q, torch.tensor([0, TOKENS]), x, torch.from_numpy(ptr)


def padded(x: torch.Tensor, ptr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents padded to the longest, and where tokens are missing."""
    rows = torch.nn.utils.rnn.pad_sequence(list(torch.split(x, ptr.diff().tolist())), batch_first=True)
    return rows, torch.arange(rows.shape[1]) >= ptr.diff()[:, None]


def einsum(q: torch.Tensor, x: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Scores (documents,)."""
    similarity = torch.einsum("td,npd->ntp", q, x)
    return similarity.masked_fill(missing[:, None], -torch.inf).amax(2).sum(1)


def peers(q: torch.Tensor, x: torch.Tensor, ptr: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Other packages' ways, where they are installed, each giving the scores."""
    threads = torch.get_num_threads()
    found: dict[str, Callable[[], Any]] = {}
    parts = [p.numpy() for p in torch.split(x, ptr.diff().tolist())]
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    try:
        import maxsim_cpu
    except ImportError:
        pass
    else:
        found["maxsim-cpu"] = lambda: maxsim_cpu.maxsim_scores_variable(q.numpy(), parts)
    try:
        import numkong
    except ImportError:
        return found
    pool = ThreadPoolExecutor(threads)
    halves = np.array_split(np.arange(len(parts)), threads)
    for dtype in ("f32", "bf16"):
        kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]

        def pack(a: torch.Tensor, kind: torch.dtype = kind, dtype: str = dtype) -> Any:
            return numkong.maxsim_pack(numkong.from_dlpack(a.to(kind)), dtype=dtype)

        packed = [pack(p) for p in torch.split(x, ptr.diff().tolist())]

        def scores(packed: list[Any] = packed, pack: Callable[..., Any] = pack) -> np.ndarray:
            of_query = pack(q)  # angular distances: 1 - cosine

            def some(ids: np.ndarray) -> list[float]:
                return [len(q) - numkong.maxsim_packed(of_query, packed[i]) for i in ids]

            lists = pool.map(some, halves) if threads > 1 else map(some, halves)
            return np.concatenate(list(lists))

        found[f"numkong {dtype}"] = scores
    return found


def close(got: Any, want: torch.Tensor, tolerance: float, name: str) -> float:
    """How far scores are from those of float32."""
    got = torch.as_tensor(np.asarray(got, dtype=np.float32)).reshape(-1)
    worst = float((got - want).abs().max())
    assert worst <= tolerance, f"{name}: scores differ by {worst}"
    return worst


def ours(
    q: torch.Tensor, q_ptr: torch.Tensor, x: torch.Tensor, ptr: torch.Tensor
) -> dict[str, tuple[Callable[[], Any], float]]:
    """lutra's ways, and how far their scores may be from those of float32."""
    maxsim = lutra.scan.maxsim
    half, short, q_short = x.half(), x.bfloat16(), q.bfloat16()
    scale = x.abs().amax(1) / 127
    codes = (x / scale[:, None]).round().to(torch.int8)
    q_codes = (q * (127 / q.abs().max())).round().to(torch.int8)
    one = float(x.abs().max()) / 127  # int8 queries: one scale for all documents
    coarse = (x / one).round().to(torch.int8)
    unit = one * float(q.abs().max()) / 127
    quantizer = lutra.quant.ResidualQuantizer(D, bits=2, num_centroids=64)
    tokens = x.numpy()
    quantizer.train(tokens[:4096])
    residual = quantizer.encode(tokens)
    residual = lutra.scan.ResidualTokens(*map(torch.as_tensor, residual[:4]), residual[4])
    return {
        "float32": (lambda: maxsim(q, q_ptr, x, ptr), 1e-4),
        "float32, the best 10": (lambda: maxsim(q, q_ptr, x, ptr, k=10), np.inf),
        "float16": (lambda: maxsim(q, q_ptr, half, ptr), 1e-2),
        "bfloat16, float32 query": (lambda: maxsim(q, q_ptr, short, ptr), 5e-2),
        "bfloat16": (lambda: maxsim(q_short, q_ptr, short, ptr), 1e-1),
        "int8, float32 query": (lambda: maxsim(q, q_ptr, codes, ptr, doc_scale=scale), 0.2),
        "int8": (lambda: maxsim(q_codes, q_ptr, coarse, ptr) * unit, 1.0),
        "residual codes, 2 bits": (lambda: maxsim(q, q_ptr, residual, ptr), np.inf),
    }


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """One row a way."""
    threads = torch.get_num_threads()
    seconds = 0.3 if quick else 8.0
    q, q_ptr, x, ptr = problem(60 if quick else 1000)
    dense, missing = padded(x, ptr)
    want = einsum(q, dense, missing)
    flops = 2.0 * TOKENS * len(x) * D
    limit = _backend.core.measure_fma(threads) if _backend.core is not None else float("inf")
    ways: dict[str, Callable[[], Any]] = {}
    off: dict[str, float] = {}
    for name, (way, tolerance) in ours(q, q_ptr, x, ptr).items():
        if np.isfinite(tolerance):
            off[name] = close(way(), want, tolerance, name)
        ways[name] = way
    ways["padded float32"] = lambda: lutra.scan.maxsim_padded(q[None], dense, doc_mask=~missing)
    off["padded float32"] = close(ways["padded float32"](), want, 1e-4, "padded float32")
    best = lutra.scan.maxsim(q, q_ptr, x, ptr, k=10)
    assert torch.equal(best.ids[0], torch.argsort(-lutra.scan.maxsim(q, q_ptr, x, ptr)[0], stable=True)[:10])
    others = {"torch": lambda: einsum(q, dense, missing)}
    short, q_short = dense.bfloat16(), q.bfloat16()
    others["torch bfloat16"] = lambda: einsum(q_short, short, missing)
    others.update(peers(q, x, ptr))
    for name, way in others.items():
        found = way().float() if name.startswith("torch") else way()
        off[name] = close(found, want, 1.0 if name not in ("torch", "maxsim-cpu") else 1e-3, name)
    times = timed({**ways, **others}, seconds)
    if _backend.core is not None:  # again: the machine may have been busier before
        limit = max(limit, _backend.core.measure_fma(threads))
    for name, ms in times.items():
        rate = flops / ms * 1e3
        of = {"library": "peer" if name in others else "lutra", "threads": threads}
        row = {"what": name, **of, "ms": ms, "gflops": rate / 1e9, "of_fma": rate / limit}
        if name in off:
            row["off"] = off[name]
        yield row
    yield from training(quick)


def training(quick: bool) -> Iterator[dict[str, Any]]:
    """A step of contrastive training: 16 queries with 32 documents, scores and both gradients."""
    generator = torch.Generator().manual_seed(0)
    n, documents, length = (4, 6, 60) if quick else (16, 32, 180)
    q, x = (
        torch.randn(*s, D, generator=generator).requires_grad_() for s in ((n, TOKENS), (documents, length))
    )
    missing = torch.arange(length) >= torch.randint(
        length // 2, length + 1, (documents, 1), generator=generator
    )
    weights = torch.randn(n, documents, generator=generator)
    live = ~missing

    def fused() -> tuple[torch.Tensor, ...]:
        scores = lutra.scan.maxsim_padded(q, x, doc_mask=live)
        return torch.autograd.grad((scores * weights).sum(), (q, x))

    def dense() -> tuple[torch.Tensor, ...]:
        similarity = torch.einsum("qtd,npd->qntp", q, x).masked_fill(missing[:, None], -torch.inf)
        return torch.autograd.grad((similarity.amax(3).sum(2) * weights).sum(), (q, x))

    for a, b in zip(fused(), dense()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    times = timed({"lutra": fused, "peer": dense}, 0.3 if quick else 4.0)
    for library, ms in times.items():
        what = f"training, {n} x {documents}" + (", torch" if library == "peer" else "")
        yield {"what": what, "library": library, "threads": torch.get_num_threads(), "ms": ms}


def line(row: dict[str, Any]) -> str:
    text = f"{row['what']:28} {row['ms']:9.3f} ms"
    if "gflops" in row:
        text += f"  {row['gflops']:7.1f} GFLOP/s  {row['of_fma']:5.2f} of FMA"
    if "off" in row:
        text += f"  scores off by {row['off']:.1e}"
    return text
