"""Input for benchmarks, made from seeds; the large arrays are shared between cases."""

from __future__ import annotations

import inspect
import sys
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np


@lru_cache(maxsize=4)
def vectors(n: int, d: int, seed: int = 0) -> np.ndarray:
    """(n, d) float32, standard normal. Cached: do not write to it."""
    return np.random.default_rng([seed, n, d]).standard_normal((n, d), dtype=np.float32)


@lru_cache(maxsize=2)
def clustered(n: int, d: int, queries: int = 1024, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) vectors around n / 100 centres, at least one, and queries of the same kind; unit norm, float32.

    Centres are normal, and so is the spread around them, of 0.55 their size, falling from one dimension to
    the next and turned at random: the nearest neighbours are mostly of one's own cluster, and within it
    codes of few bits tell them apart badly, as with embeddings. Cached: do not write to them.
    """
    rng = np.random.default_rng([seed, n, d])
    centres = rng.standard_normal((max(1, n // 100), d), dtype=np.float32)
    fall = (np.arange(1, d + 1, dtype=np.float32) ** -0.2)[None]
    fall *= 0.55 / np.sqrt((fall * fall).mean())
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0].astype(np.float32)
    out = []
    for count in (n, queries):
        x = rng.standard_normal((count, d), dtype=np.float32) * fall @ turn
        x += centres[rng.integers(0, len(centres), count)]
        x /= np.sqrt((x * x).sum(1, keepdims=True))
        out.append(x)
    return out[0], out[1]


def fresh(arrays: list[Any]) -> Callable[[], Any]:
    """A function that gives the next of some arrays, round and round.

    A benchmark of a gather must not ask for the same rows again and again: they would come from a cache.
    """
    return cycle(arrays).__next__


def bag_ids(rows: int, bags: int, length: int, calls: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Ids (bags, length) int64 for so many calls, uniform in [0, rows)."""
    rng = np.random.default_rng([seed, rows, bags, length])
    return list(rng.integers(0, rows, (calls, bags, length), dtype=np.int64))


@lru_cache(maxsize=2)
def texts(limit: int) -> list[str]:
    """Paragraphs of the standard library's source, about ``limit`` bytes: real text on every machine."""
    out: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for block in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            block = inspect.cleandoc(block)
            if len(block) > 20:
                out.append(block)
                size += len(block.encode())
                if size >= limit:
                    return out
    return out


def clear() -> None:
    """Let go of the cached arrays."""
    vectors.cache_clear()
    clustered.cache_clear()
    texts.cache_clear()


def installed(name: str) -> Any:
    """An optional module, or None."""
    try:
        __import__(name)
    except ImportError:
        return None
    return sys.modules[name]
