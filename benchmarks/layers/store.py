"""VectorStore: opening, look-ups by key, unknown keys, neighbours."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import lutra

from .timing import median_seconds

_OPEN = """
import time, sys
import lutra, lutra.index, safetensors.numpy
begin = time.perf_counter()
store = lutra.VectorStore(sys.argv[1])
opened = time.perf_counter()
store[sys.argv[2]]
print(1e3 * (opened - begin), 1e6 * (time.perf_counter() - opened))
"""


def lines(quick: bool) -> Iterator[str]:
    """Opening and asking a vector store."""
    n, dim = (5_000, 32) if quick else (1_000_000, 100)
    rng = np.random.default_rng(0)
    keys = [f"key{i:x}_{i * 7919 % 1000}" for i in range(n)]
    rows = rng.standard_normal((n, dim), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float16", "int8"):
            path = Path(folder, f"{dtype}.safetensors")
            begin = time.perf_counter()
            made = lutra.VectorStore.from_arrays(keys, rows, dtype=dtype)
            seconds = time.perf_counter() - begin
            made.save(path)
            command = [sys.executable, "-c", _OPEN, str(path), keys[n // 2]]
            runs = [
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                for _ in range(5)
            ]
            opened, first = np.median(np.array(runs, float), 0)
            s = lutra.VectorStore(path)
            assert s.rows_of(keys[:1000]).tolist() == list(range(1000))
            many = [keys[i] for i in rng.integers(0, n, 1000)]
            one = median_seconds(lambda s=s: s[keys[7]], 0.2)
            similar = median_seconds(lambda s=s: s.most_similar(keys[7]), 0.5)
            several = median_seconds(lambda s=s, many=many: s[many], 0.2)
            unknown = median_seconds(lambda s=s: s["keyf00_unheard"], 0.2)
            yield (
                f"{n} x {dim} {dtype}, {path.stat().st_size / 1e6:.0f} MB, made in {seconds:.1f} s: a fresh "
                f"process opens it in {opened:.1f} ms and has its first vector {first:.0f} us later; one key "
                f"{1e6 * one:.1f} us, 1000 keys {1e6 * several:.0f} us, an unknown one {1e6 * unknown:.0f} "
                f"us, most_similar {1e3 * similar:.1f} ms"
            )
