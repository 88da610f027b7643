"""Medians of ways that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def medians(ways: dict[str, Callable[[], object]], seconds: float, most: int = 101) -> dict[str, float]:
    """Milliseconds of each way: the process's time on one thread, wall clock on more.

    A way's turn is one call that is not counted and, where that was short, three that are: what the others
    left in the caches is theirs.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in ways}
    begin = time.perf_counter()
    for way in ways.values():
        way()
    while True:
        for name, way in ways.items():
            start = clock()
            way()
            first = (clock() - start) * 1e3
            for _ in range(3 if first < 20 else 0):
                start = clock()
                way()
                found[name].append((clock() - start) * 1e3)
            if first >= 20:
                found[name].append(first)
        rounds = min(map(len, found.values()))
        if rounds >= most or (rounds >= 3 and time.perf_counter() - begin > seconds):
            return {name: statistics.median(times) for name, times in found.items()}


def median_seconds(function: Callable[[], object], seconds: float = 1.0) -> float:
    """The median time of a call, after one to warm up."""
    function()
    times: list[float] = []
    while (sum(times) < seconds and len(times) < 50) or len(times) < 3:
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
