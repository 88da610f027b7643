"""The number of candidates, and the width of an approximate index of encodings, that reach a recall."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np

from .. import _checks
from ._home import HOST
from .tune import Trial, Tuned, owner, recall_of

_MOST = 20_000  # candidates that are tried
_REPEAT = 0.05  # seconds that a setting is timed for, at least


def tune(index: Any, tokens: Any, ptr: Any, recall: float, k: int) -> Tuned:
    """See `MultiVector.tune`."""
    recall = _checks.positive("recall", recall)
    if recall > 1:
        raise ValueError(f"recall must be in (0, 1], got {recall}")
    k = _checks.integer("k", k, 1)
    if len(ptr) < 2:
        raise ValueError("queries has no rows")
    truth = HOST.bring(index.search((tokens, ptr), k, generator="all").ids)
    truth = truth[:, : min(k, index.ntotal)]
    trials: list[Trial] = []
    slower = 0
    for widths in _widths(index, k):
        for name, value in widths.items():
            setattr(owner(index.index, name), name, value)
        least = _least(index, tokens, ptr, truth, recall)
        if least is None:
            most = {"candidates": min(index.ntotal, _MOST), **widths}
            trials.append(_measure(index, tokens, ptr, truth, most))
            continue
        before = min((t.seconds for t in trials if t.recall >= recall), default=np.inf)
        trials.append(_measure(index, tokens, ptr, truth, {"candidates": least, **widths}))
        slower = slower + 1 if trials[-1].seconds > before else 0
        if slower == 2:
            break  # from here on wider searches of the encodings cost more than fewer candidates save
    good = [t for t in trials if t.recall >= recall]
    chosen = min(good, key=lambda t: t.seconds) if good else max(trials, key=lambda t: t.recall)
    _set(index, chosen.parameters)
    if not good:
        warnings.warn(
            f"recall {recall:g} is out of reach: {chosen.recall:.4f} with {chosen.parameters}", stacklevel=3
        )
    return Tuned(chosen.parameters, chosen.recall, chosen.seconds, bool(good), trials)


def _widths(index: Any, k: int) -> list[dict[str, int]]:
    """Settings of the index of encodings, from narrow to wide."""
    for name in ("nprobe", "ef_search"):
        found = owner(index.index, name)
        if found is not None:
            most = found.nlist if name == "nprobe" else max(2 * k, min(4096, index.ntotal))
            low = 1 if name == "nprobe" else k
            values = {most} | {low * 2**i for i in range(20) if low * 2**i < most}
            return [{name: value} for value in sorted(values)]
    return [{}]


def _least(index: Any, tokens: Any, ptr: Any, truth: np.ndarray, recall: float) -> int | None:
    """The fewest candidates that hold enough of the truth, by bisection; None where the most do not."""
    low, high = truth.shape[1], min(index.ntotal, _MOST)

    def enough(count: int) -> bool:
        ids = HOST.bring(index.search((tokens, ptr), truth.shape[1], candidates=count).ids)
        return recall_of(ids, truth) >= recall

    if enough(low):
        return low
    step = low
    while low + step < high and not enough(low + step):  # few are cheap to measure: gallop up before halving
        low += step
        step *= 2
    if low + step >= high:
        if not enough(high):
            return None
    else:
        high = low + step
    while high - low > max(1, low // 16):  # to a sixteenth: the recall of other queries varies by more
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def _set(index: Any, parameters: dict[str, int]) -> None:
    for name, value in parameters.items():
        setattr(index if name == "candidates" else owner(index.index, name), name, value)


def _measure(index: Any, tokens: Any, ptr: Any, truth: np.ndarray, parameters: dict[str, int]) -> Trial:
    """The recall, and the time of the fastest of a few searches."""
    _set(index, parameters)
    k, best, end = truth.shape[1], np.inf, time.perf_counter() + _REPEAT
    while True:
        begin = time.perf_counter()
        ids = HOST.bring(index.search((tokens, ptr), k).ids)
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() >= end:
            return Trial(dict(parameters), recall_of(ids, truth), best / (len(ptr) - 1))
