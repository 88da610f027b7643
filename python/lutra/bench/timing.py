"""Timing several functions against each other, fairly."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

#: A sample shorter than this is made of several calls.
SAMPLE = 500e-6
#: Thread pools spin for a while after a call (OpenBLAS about 26 ms); a function measured after another one of
#: many threads would share its cores with them.
SETTLE = 0.03


class Timing(NamedTuple):
    """Seconds for one call."""

    median: float
    best: float
    samples: int


def _sample(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleaved(
    functions: Mapping[str, Callable[[], Any]], budget: float = 2.0, rounds: int = 30, settle: float = SETTLE
) -> dict[str, Timing]:
    """Time functions in turns: in each round every one gets one warm-up call and a few samples.

    Parameters
    ----------
    functions : mapping of str to callable without arguments
    budget : float, default 2.0
        Seconds for all of it, roughly: no new round is begun beyond it. Every function is called at least
        twice; the first call is a warm-up, unless it alone took more than half of the budget.
    rounds : int, default 30
        At most this many.
    settle : float, default 0.03
        Seconds of sleep before each function's turn, where a call is long enough to use threads.

    Returns
    -------
    dict of str to Timing
        Medians over all samples.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    calls: dict[str, int] = {}
    slow: set[str] = set()
    started = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name, function in functions.items():
            first = _sample(function, 1)
            if first > budget / 2:  # once more would cost more than it tells
                slow.add(name)
                samples[name].append(first)
                continue
            short = _sample(function, 1)
            calls[name] = max(1, round(SAMPLE / max(short, 1e-9)))
        active = {n: f for n, f in functions.items() if n not in slow}
        for done in range(rounds):
            if done >= 2 and time.perf_counter() - started > budget:
                break
            for name, function in active.items():
                if settle and calls[name] * 2 < SAMPLE / 20e-6:  # calls of 40 microseconds and more
                    time.sleep(settle)
                function()
                for _ in range(3):
                    samples[name].append(_sample(function, calls[name]))
                    if samples[name][-1] * calls[name] > budget / 20:
                        break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(median(s), min(s), len(s)) for name, s in samples.items()}
