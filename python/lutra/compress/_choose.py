"""The chooser: formats under a budget, scored by what they lose."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .formats import FORMATS, Format
from .formats.base import SIZES, Data, Shape

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(budget: Any, dense: int) -> int:
    """Bytes of a budget: ``'8%'``, a share such as 0.08, bytes as an int, or ``'12MB'``.

    ``dense`` are the bytes that shares are of.
    """
    if isinstance(budget, (bool, np.bool_)):
        raise TypeError("budget must be a share, a number of bytes or text, got a bool")
    if isinstance(budget, (int, np.integer)):
        number = int(budget)
    elif isinstance(budget, (float, np.floating)):
        if not 0 < budget <= 1:
            raise ValueError(f"budget is {budget}; a share must lie in (0, 1]; bytes are given as an int")
        number = int(budget * dense)
    elif isinstance(budget, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[kmg]?i?b)?\s*", budget, re.IGNORECASE)
        unit = (found.group(2) or "").upper() if found else "?"
        if found is None or (unit not in _UNITS and unit != "%"):
            raise ValueError(f"budget {budget!r} must read as '8%', '0.08', '12MB' or a number of bytes")
        value = float(found.group(1))
        if unit == "%":
            number = int(value / 100 * dense)
        elif not unit and "." in found.group(1):
            return parse_budget(value, dense)
        else:
            number = int(value * _UNITS[unit])
    else:
        raise TypeError(f"budget must be a share, a number of bytes or text, got {type(budget).__qualname__}")
    if number < 1:
        raise ValueError(f"budget is {budget!r}, less than a byte")
    return number


@dataclass
class Job:
    """A table to be compressed.

    Attributes
    ----------
    name : str
    table : ndarray, shape (rows, dim), float32
    counts : ndarray, shape (rows,), float64, optional
    dtype : str
        What its floats are stored as.
    extra : int
        Bytes that are kept besides the format (a padding row).
    """

    name: str
    table: np.ndarray
    counts: np.ndarray | None = None
    dtype: str = "float32"
    extra: int = 0
    uses: float = 1.0

    @property
    def shape(self) -> Shape:
        return int(self.table.shape[0]), int(self.table.shape[1])

    @property
    def dense(self) -> int:
        return self.table.size * SIZES[self.dtype]


@dataclass
class Option:
    """A format that was tried on a table; ``format`` None is the dense table itself."""

    format: Format | None
    nbytes: int
    data: Data = field(default_factory=dict)
    error: float = float("nan")
    cosine: float = float("nan")
    seconds: float = 0.0
    cpu: float = 0.0  # seconds too, of all threads: what other programs do does not count
    note: str = ""
    divergence: float | None = None


def classes(formats: Any = None) -> list[type[Format]]:
    """Classes of formats by name; None is all."""
    if formats is None:
        return [FORMATS[name] for name in sorted(FORMATS) if not FORMATS[name].slow]
    names = [formats] if isinstance(formats, str) else list(formats)
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"formats must be among {', '.join(sorted(FORMATS))}; got {name!r}")
    if not names:
        raise ValueError("formats is empty")
    return [FORMATS[name] for name in names]


def smallest(job: Job, kinds: Iterable[type[Format]]) -> tuple[int, Format] | None:
    """The fewest bytes that any of the formats can store a table in, and which."""
    best: tuple[int, Format] | None = None
    for cls in kinds:
        low, high = 0, 2 * job.dense + 4096
        found = cls.fit(job.shape, high, job.dtype)
        if found is None:
            continue
        while high - low > 1:  # the least limit that has a fit
            middle = (low + high) // 2
            fit = cls.fit(job.shape, middle, job.dtype)
            if fit is None:
                low = middle
            else:
                high, found = min(middle, max(low + 1, fit.nbytes(job.shape, job.dtype))), fit
        size = found.nbytes(job.shape, job.dtype) + job.extra
        if best is None or size < best[0]:
            best = (size, found)
    return best


def no_fit(jobs: list[Job], kinds: list[type[Format]], budget: int) -> ValueError:
    """The error for a budget that no format can meet."""
    least = [smallest(job, kinds) for job in jobs]
    if any(one is None for one in least):
        bad = next(job.name for job, one in zip(jobs, least) if one is None)
        return ValueError(f"no format can store {bad}")
    total = sum(one[0] for one in least if one)
    dense = sum(job.dense for job in jobs)
    how = ", ".join(sorted({one[1].describe() for one in least if one}))
    return ValueError(
        f"budget is {budget} bytes; the smallest that can be met is {total} bytes "
        f"({total / dense:.2%}), with {how}"
    )


# ---------------------------------------------------------------- scoring
def rounded(data: Data, dtype: str) -> Data:
    """Arrays as they are after storing: floats rounded to ``dtype``, as float32."""
    if dtype in ("float32", "float64"):
        return data
    return {k: round_to(v, dtype) if v.dtype == np.float32 else v for k, v in data.items()}


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to those of a narrower type, ties to even."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    return (bfloat16_bits(x).astype(np.uint32) << 16).view(np.float32)


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 as the upper halves of bfloat16, rounded, ties to even (uint16)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def row_weights(counts: np.ndarray | None, rows: int) -> np.ndarray:
    """How much each row counts; the sum is one. Rows that calibration did not see count a little."""
    if counts is None or not counts.sum():
        return np.full(rows, 1 / rows)
    weights = counts + 0.01 * counts.mean()
    return weights / weights.sum()


def score(format: Format, data: Data, job: Job) -> tuple[float, float]:
    """Weighted relative error and weighted mean cosine of a table in a format."""
    weights = row_weights(job.counts, len(job.table))
    begin, lost, whole, cosine = 0, 0.0, 0.0, 0.0
    for block in format.decode(rounded(data, job.dtype), job.shape):
        x = job.table[begin : begin + len(block)].astype(np.float64)
        y = np.asarray(block, np.float64)
        w = weights[begin : begin + len(block)]
        square = np.einsum("ij,ij->i", x, x)
        norms = np.sqrt(square * np.einsum("ij,ij->i", y, y))
        lost += float(w @ ((x - y) ** 2).sum(1))
        whole += float(w @ square)
        dots = np.einsum("ij,ij->i", x, y)
        cosine += float(w @ np.where(norms > 0, dots / np.maximum(norms, 1e-300), square == 0))
        begin += len(block)
    if not np.isfinite(lost):
        raise ValueError("decoded rows are not finite")
    return float(np.sqrt(lost / whole)) if whole else float(lost > 0), cosine


def attempt(job: Job, format: Format, seed: int = 0) -> Option:
    """Encode and score; what fails is noted, not raised: other formats may do."""
    nbytes = format.nbytes(job.shape, job.dtype) + job.extra
    begin, busy = time.perf_counter(), time.process_time()
    option = Option(format, nbytes)
    try:
        option.data = format.encode(job.table, job.counts, seed, False)
        option.error, option.cosine = score(format, option.data, job)
    except Exception as problem:
        option.data, option.note = {}, f"failed: {type(problem).__name__}: {problem}"
    option.seconds, option.cpu = time.perf_counter() - begin, time.process_time() - busy
    return option


def fits(job: Job, kinds: list[type[Format]], budget: int) -> list[Format]:
    """The best of each kind within a budget."""
    found: dict[str, Format] = {}
    for cls in kinds:
        format = cls.fit(job.shape, budget - job.extra, job.dtype)
        if format is not None and format.nbytes(job.shape, job.dtype) + job.extra <= budget:
            found[format.describe()] = format
    return list(found.values())


# ---------------------------------------------------------------- several tables
#: Shares of its even part of the budget that a table of several is tried with; the finer where that is cheap.
GRID = (0.25, 0.5, 1.0, 2.0, 4.0)
FINE = (0.18, 0.25, 0.35, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.8, 4.0, 5.6)


def plan(jobs: list[Job], kinds: list[type[Format]], budget: int) -> list[list[Format | None]]:
    """The formats to try on each table."""
    if len(jobs) == 1:
        out: list[list[Format | None]] = [list(fits(jobs[0], kinds, budget))]
    else:
        share = budget / sum(job.dense for job in jobs)
        out = []
        for job in jobs:
            tried: dict[str, Format | None] = {}
            for part in FINE if len(jobs) * len(kinds) <= 12 else GRID:
                for format in fits(job, kinds, min(job.dense, int(part * share * job.dense))):
                    tried[format.describe()] = format
            least = smallest(job, kinds)
            if least is not None and least[0] <= budget:
                tried[least[1].describe()] = least[1]
            tried["dense"] = None
            out.append(list(tried.values()))
    least_ = [min((_size(job, f) for f in formats), default=None) for job, formats in zip(jobs, out)]
    if any(n is None for n in least_) or sum(n for n in least_ if n is not None) > budget:
        raise no_fit(jobs, kinds, budget)
    return out


def _size(job: Job, format: Format | None) -> int:
    return job.dense if format is None else format.nbytes(job.shape, job.dtype) + job.extra


def distribute(jobs: list[Job], options: list[list[Option]], budget: int) -> list[Option]:
    """One option a table so that the expected loss is least under a total budget.

    The loss of a table is its squared relative error times how often it is used. Along the lower convex
    hull of each table's (bytes, loss), the step that saves most per byte is taken while it fits (the
    Lagrangian solution); what is left over goes to single options that fit.
    """
    uses = np.array([job.uses for job in jobs], float)
    uses = uses / uses.sum() if uses.sum() else np.full(len(jobs), 1 / len(jobs))
    usable = [[o for o in each if not o.note] for each in options]
    for job, each in zip(jobs, usable):
        if not each:
            raise ValueError(f"{job.name}: every format failed")

    def loss(table: int, option: Option) -> float:
        return float(uses[table]) * option.error**2

    hulls = [_hull(each, [loss(t, o) for o in each]) for t, each in enumerate(usable)]
    taken = [hull[0] for hull in hulls]
    place = [0] * len(jobs)
    spent = sum(o.nbytes for o in taken)
    if spent > budget:
        raise ValueError(f"budget is {budget} bytes; the smallest of what could be encoded takes {spent}")
    stuck: set[int] = set()
    while True:
        best, gain = -1, 0.0
        for t, hull in enumerate(hulls):
            if t in stuck or place[t] + 1 >= len(hull):
                continue
            now, after = hull[place[t]], hull[place[t] + 1]
            rate = (loss(t, now) - loss(t, after)) / max(1, after.nbytes - now.nbytes)
            if rate > gain:
                best, gain = t, rate
        if best < 0:
            break
        step = hulls[best][place[best] + 1]
        if spent - taken[best].nbytes + step.nbytes > budget:
            stuck.add(best)
            continue
        spent += step.nbytes - taken[best].nbytes
        taken[best] = step
        place[best] += 1
    while True:  # what is left over
        moves = [
            (loss(t, taken[t]) - loss(t, o), t, o)
            for t, each in enumerate(usable)
            for o in each
            if spent - taken[t].nbytes + o.nbytes <= budget and loss(t, o) < loss(t, taken[t])
        ]
        if not moves:
            return taken
        _, t, o = max(moves, key=lambda m: m[0])
        spent += o.nbytes - taken[t].nbytes
        taken[t] = o


def _hull(options: list[Option], losses: list[float]) -> list[Option]:
    """The lower convex hull of (bytes, loss), by rising bytes and falling loss."""
    hull: list[tuple[int, float, Option]] = []
    for nbytes, lost, i in sorted((o.nbytes, losses[i], i) for i, o in enumerate(options)):
        if hull and lost >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (b0, l0, _), (b1, l1, _) = hull[-2], hull[-1]
            if (l0 - l1) * (nbytes - b1) > (l1 - lost) * (b1 - b0):
                break
            hull.pop()
        if hull and nbytes == hull[-1][0]:
            hull.pop()
        hull.append((nbytes, lost, options[i]))
    return [o for _, _, o in hull]
