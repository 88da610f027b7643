"""What a search costs besides time: a busy neighbour, memory."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np

import lutra
from lutra.bench.memory import peak_growth
from lutra.index import IVF, Codes, Flat
from lutra.quant import PQ

from .context import Context, K, Row


def busy(c: Context) -> None:
    """A short search beside a process that keeps one core busy: the slowest of a hundred, for two threads."""
    x, q = c.x[:20_000], c.q[:1]
    index = Flat(c.d)
    index.add(x)
    threads = lutra.get_num_threads()

    def worst() -> tuple[float, float]:
        times = []
        for _ in range(200):
            start = time.perf_counter()
            index.search(q, K)
            times.append(time.perf_counter() - start)
        return float(np.median(times)) * 1e3, float(np.quantile(times, 0.99)) * 1e3

    quiet = worst()
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        loud = worst()
        lutra.set_num_threads(1)
        single = worst()
    finally:
        lutra.set_num_threads(threads)
        neighbour.kill()
        neighbour.wait()
    c.add(
        Row(
            "manners", "2 10^4 x 128, batch 1, one core busy", "itself on one thread", loud[0], single[0],
            note=f"99 % of searches within {loud[1]:.3f} ms; idle {quiet[0]:.3f} ms",
        )
    )  # fmt: skip


def memory(c: Context) -> None:
    """Bytes an index keeps for its codes, and what a search of the whole batch allocates."""
    seen = peak_growth(lambda: np.ones(32 << 20, np.uint8)) / 2**20
    if not 31 < seen < 48:
        raise AssertionError(f"32 MiB were allocated, {seen:.1f} seen: the figures below mean nothing")
    pq = PQ(c.d, 32, 4)
    pq.train(c.sample, progress=False)
    for name, index, codes in (
        ("Flat", Flat(c.d, "ip"), 4 * c.d),
        ("Codes PQ32x4", Codes(pq, "ip"), 16),
        ("IVF PQ32x4", IVF(c.d, 1024 if c.n > 500_000 else 64, PQ(c.d, 32, 4), "ip"), 16 + 4),
    ):
        index.train(c.sample) if not index.is_trained else None
        index.add(c.x)
        index.search(c.q[:4], K)
        grown = peak_growth(lambda index=index: index.search(c.q, K)) / 2**20
        share = index.nbytes / (codes * c.n)
        c.add(
            Row(
                "manners", f"memory of {name}", "codes and positions", index.nbytes / 2**20,
                codes * c.n / 2**20, unit="MiB",
                note=f"{share:.3f} of its codes; a search of {len(c.q)} allocates {grown:.1f} MiB",
            )
        )  # fmt: skip
        if grown > 64:
            raise AssertionError(f"a search with {name} allocated {grown:.1f} MiB; the limit is 64")
