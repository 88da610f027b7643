"""auto: the kind of index and its parameters, by measurement on a sample of the user's own vectors."""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import _checks, scan
from ._auto_table import Table
from ._home import HOST, check_matrix, to_float32
from ._ids import Ids
from .factory import factory
from .tune import Search, Trial, Tuned

_SAMPLE = 50_000  # vectors that candidates are tried on
_QUERIES = 400
_METRICS = {"ip": 0, "l2": 1, "cosine": 2}
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass
class Tried:
    """A candidate as it was measured on the sample.

    Attributes
    ----------
    text : str
        For `lutra.index.factory`.
    nbytes : float
        Bytes a vector in an index of all vectors, by projection.
    build : float
        Seconds to train and fill an index of all vectors, by projection.
    tuned : Tuned or None
        None where the candidate was left out, for the reason in ``note``.
    seconds : float
        A query's time in an index of all vectors, by projection.
    note : str
    """

    text: str
    nbytes: float
    build: float = 0.0
    tuned: Tuned | None = None
    seconds: float = np.inf
    note: str = ""


def auto(
    x: Any,
    recall: float = 0.95,
    memory: Any = None,
    *,
    metric: str = "l2",
    k: int = 10,
    queries: Any = None,
    ids: Any = None,
    seconds: float | None = None,
    verbose: bool = True,
    seed: int = 0,
) -> Any:
    """An index of ``x`` that reaches a recall within a memory, and answers as fast as can be found.

    Candidates are built over a sample of the vectors and tuned (`tune`) with queries that are not in it,
    against exact ground truth. The one that promises the least time is then built over all vectors and tuned
    again; where it falls short there, the next one.

    Parameters
    ----------
    x : array, shape (n, d)
    recall : float in (0, 1], default 0.95
        Share of the true k nearest neighbours to be found, on average.
    memory : None, int, float or str
        What the index may take (``index.nbytes``): None, any; an int, bytes; a float in (0, 1] or ``"25%"``,
        that share of the vectors in float32; ``"2GB"``, ``"300MB"``.
    metric : {'l2', 'ip', 'cosine'}, default 'l2'
    k : int, default 10
    queries : array, shape (nq, d), optional
        Like those to come, best of all real ones. Default: vectors of ``x``, each without itself among its
        neighbours.
    ids : array or list of int, shape (n,), optional
        Unique and not negative. Default: 0, 1, 2, ...
    seconds : float, optional
        About how long all may take; candidates whose building would exceed it are left out.
    verbose : bool, default True
        Print what is tried, in a table where rich is installed.
    seed : int, default 0
        Of the sample.

    Returns
    -------
    Index
        Trained, filled with all of ``x``, its search parameters set. Its attribute
        ``tried`` is the list of candidates (`Tried`), ``tuned`` the last measurement (`Tuned`).

    Raises
    ------
    TypeError, ValueError
        An argument of another type or out of range; fewer than 2 vectors; a memory in which nothing fits.

    Warns
    -----
    UserWarning
        No candidate within the memory reaches the recall; the index is then the one that comes closest.

    Notes
    -----
    Times depend on the machine and what else it does; the recall does not. Queries are timed in one batch.

    Examples
    --------
    >>> index = lutra.index.auto(x, recall=0.95, memory="25%")    # doctest: +SKIP
    """
    started = time.perf_counter()
    recall = _checks.positive("recall", recall)
    if recall > 1:
        raise ValueError(f"recall must be in (0, 1], got {recall}")
    _checks.choice("metric", metric, _METRICS)
    k = _checks.integer("k", k, 1)
    if seconds is not None:
        seconds = _checks.positive("seconds", seconds)
    native = HOST.bring(check_matrix(x, "x"))
    n, d = native.shape
    if n < 2:
        raise ValueError(f"x has {n} rows; at least 2 are needed")
    names = None if ids is None else Ids().check_new(ids, n)
    limit = memory_of(memory, n, d)
    rng = np.random.default_rng(seed)
    split = _split(native, queries, rng, k)
    table = Table(verbose, n, d, metric, recall, limit, len(split.sample), len(split.queries))
    tried = _explore(split, n, d, metric, k, recall, limit, seconds, started, table)
    index = _build(native, names, split, tried, metric, k, recall, limit, table)
    index.tried = tried
    return index


def memory_of(memory: Any, n: int, d: int) -> float:
    """Bytes, from what the caller gave."""
    full = 4 * n * d
    expected = "memory must be None, bytes, a share in (0, 1], '25%' or '2GB'"
    if memory is None:
        return np.inf
    if isinstance(memory, str):
        if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", memory):
            value = float(match[1]) / 100 * full
        elif match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", memory.upper()):
            unit = _UNITS[match[2]]
            value = float(match[1]) * (2 ** (10 * " KMGT".index(match[2])) if match[3] and match[2] else unit)
        else:
            raise ValueError(f"{expected}; got {memory!r}")
    elif isinstance(memory, bool) or not isinstance(memory, (int, float, np.integer, np.floating)):
        raise TypeError(f"{expected}; got {memory!r} of type {type(memory).__name__}")
    elif isinstance(memory, (float, np.floating)) and memory <= 1:
        value = float(memory) * full
    else:
        value = float(memory)
    if not value > 0:
        raise ValueError(f"{expected}; got {memory!r}")
    return value


# ---- the sample
@dataclass
class _Split:
    sample: np.ndarray
    queries: np.ndarray
    truth: np.ndarray | None  # of the sample, rows
    own: np.ndarray | None  # rows of x that the queries are, or None


def _split(native: Any, queries: Any, rng: np.random.Generator, k: int) -> _Split:
    n, d = native.shape
    own = None
    rows = rng.permutation(n)
    if queries is None:
        count = max(1, min(_QUERIES, n // 5))
        own = np.sort(rows[:count])
        q, rows = native[own], rows[count:]
    else:
        q = HOST.bring(check_matrix(queries, "queries", d))
        if not len(q):
            raise ValueError("queries has no rows")
        q = q[: max(_QUERIES, 1)]
    picked = np.sort(rows[:_SAMPLE])
    sample = np.ascontiguousarray(to_float32(HOST, native[picked], "x", picked))
    q = np.ascontiguousarray(
        to_float32(HOST, q, "queries" if own is None else "x", 0 if own is None else own)
    )
    return _Split(sample, q, None, own)


# ---- candidates
def candidates(n: int, d: int) -> list[tuple[str, float]]:
    """Texts for an index of n vectors, with the bytes a vector that they take, about."""
    found: list[tuple[str, float]] = [("Flat", 4 * d), ("SQfp16", 2 * d)]
    codes = [("RaBitQ4", d / 2 + 24), ("RaBitQ6", 0.75 * d + 24), ("RaBitQ8", d + 24)]
    fast = [f"PQ{m}x4fs" for m in _divisors(d, (d // 2, d // 4))]
    if n >= 5000:
        lists = f"IVF{_nlist(n)}"
        found += [(f"{lists},Flat", 4 * d + 8), (f"{lists},SQfp16", 2 * d + 8)]
        found += [(f"{lists},{code}", size + 8) for code, size in codes]
        for code in fast:
            size = int(code[2:-4]) / 2 + 12
            found += [
                (f"{lists},{code},RFlat", size + 4 * d),
                (f"{lists},{code},Refine(SQfp16)", size + 2 * d),
            ]
            found += [(f"{lists},{code},Refine(SQ8)", size + d + 4)]
        links = 24
        found += [(f"HNSW{links}", 4 * d + 8 * links), (f"HNSW{links},SQ8", d + 8 + 8 * links)]
        found += [(f"HNSW{links},SQ8,RFlat", 5 * d + 8 + 8 * links)]
    found += codes
    for code in fast[:1]:
        size = int(code[2:-4]) / 2 + 8
        found += [
            (f"{code},Refine(SQfp16)", size + 2 * d),
            (f"{code},Refine(SQ8)", size + d + 4),
            (code, size),
        ]
    if m := _divisors(d, (d // 2,)):
        found.append((f"PQ{m[0]}", m[0] + 4))
    return found


def _divisors(d: int, wanted: tuple[int, ...]) -> list[int]:
    """For each wanted number of sub-vectors the largest that divides d and does not exceed it."""
    found: list[int] = []
    for most in wanted:
        m = next((m for m in range(max(1, most), 0, -1) if d % m == 0), 1)
        if m > d // 16 and m not in found:
            found.append(m)
    return found


def _nlist(n: int) -> int:
    return int(2 ** round(np.log2(4 * np.sqrt(n)))) if n >= 5000 else max(1, int(np.sqrt(n)))


def _scaled(text: str, n: int) -> str:
    """A text for an index of n vectors: with as many lists as suit them."""
    return re.sub(r"IVF\d+", f"IVF{_nlist(n)}", text)


def _growth(text: str, ratio: float) -> float:
    """How much longer a query takes where there are so many times as many vectors."""
    if "IVF" in text:
        return ratio**0.5
    return 1 + 0.15 * np.log2(ratio) if "HNSW" in text else ratio


def _explore(
    split: _Split, n: int, d: int, metric: str, k: int, recall: float, limit: float,
    seconds: float | None, started: float, table: Table,
) -> list[Tried]:  # fmt: skip
    m = len(split.sample)
    ratio = max(1.0, n / m)
    kk = min(k, m)
    truth = scan.knn(split.queries, split.sample, kk, metric).ids
    tried: list[Tried] = []
    fitting = [(text, size) for text, size in candidates(n, d) if size * n <= 1.02 * limit]
    for text, size in fitting:
        entry = Tried(text, size)
        tried.append(entry)
        left = np.inf if seconds is None else seconds - (time.perf_counter() - started)
        if left <= 0 and any(t.tuned for t in tried):
            entry.note = "no time left"
        else:
            _measure(entry, _scaled(text, m), split, truth, metric, kk, recall, ratio, limit / n, left)
        table.row(entry, recall)
    if not any(entry.tuned for entry in tried):
        least = min(size for _, size in candidates(n, d)) * n
        raise ValueError(
            f"memory allows {limit:.0f} bytes for {n} vectors of {d} dimensions; "
            f"the smallest candidate takes about {least:.0f}"
        )
    return tried


def _measure(
    entry: Tried, text: str, split: _Split, truth: np.ndarray, metric: str, k: int, recall: float,
    ratio: float, each: float, left: float,
) -> None:  # fmt: skip
    start = time.perf_counter()
    d = split.sample.shape[1]
    index = factory(text, d, metric)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few vectors to train on: it is a sample
            index.train(split.sample)
    except ValueError as error:  # too few even for that
        entry.note = str(error)
        return
    trained = time.perf_counter() - start
    fixed = index.nbytes
    index.add(split.sample)
    took = time.perf_counter() - start
    entry.build = trained * min(ratio, 4) + (took - trained) * ratio
    growing = (index.nbytes - fixed) / len(split.sample)
    lists = _nlist(int(len(split.sample) * ratio)) / _nlist(len(split.sample)) if "IVF" in text else 1
    entry.nbytes = growing + fixed * lists / (len(split.sample) * ratio)
    if entry.nbytes > each:
        entry.note = "too large"
        return
    if entry.build > left:
        entry.note = "building takes too long"
        return
    entry.tuned = Search(index, split.queries, k, truth).best(recall)
    entry.seconds = entry.tuned.seconds * _growth(text, ratio)


# ---- the index of all vectors
def _build(
    native: Any, names: np.ndarray | None, split: _Split, tried: list[Tried], metric: str, k: int,
    recall: float, limit: float, table: Table,
) -> Any:  # fmt: skip
    n = native.shape[0]
    measured = [t for t in tried if t.tuned is not None]
    good = sorted((t for t in measured if t.tuned and t.tuned.reached), key=lambda t: t.seconds)
    rest = sorted((t for t in measured if t not in good), key=lambda t: -t.tuned.recall if t.tuned else 0.0)
    truth = _truth(native, split, k, metric)
    if names is not None:
        split = replace(split, own=None if split.own is None else names[split.own])
        truth = names[truth]
    best: Any = None
    for entry in [*good[:3], *(rest[:1] if not good else [])]:
        index = factory(entry.text, native.shape[1], metric)
        index.train(native)
        index.add(native, names)
        if index.nbytes > limit and index.nbytes > 1.02 * limit:
            entry.note = "too large"
            continue
        tuned = _Excluding(index, split, k, truth).best(recall)
        index.tuned = tuned
        table.final(entry, tuned, index.nbytes)
        if best is None or tuned.recall > best.tuned.recall:
            best = index
        if tuned.reached:
            break
    if best is None:
        raise ValueError(f"nothing that was tried fits into {limit:.0f} bytes with all {n} vectors")
    if not best.tuned.reached:
        warnings.warn(
            f"recall {recall:g} is out of reach within this memory: {best.tuned.recall:.4f} with {best!r}",
            stacklevel=3,
        )
    return best


def _truth(native: Any, split: _Split, k: int, metric: str) -> np.ndarray:
    """Exact neighbours among all vectors; a query that is one of them is not its own."""
    from .flat import Flat
    from .tune import ground_truth

    more = k + (split.own is not None)
    holder = Flat(native.shape[1], metric)
    n = native.shape[0]
    holder._ids.n = holder._ids.next = n  # ids 0 .. n - 1, for the names of the rows
    ids = ground_truth(holder, split.queries, min(more, n), native)
    return ids if split.own is None else _without(ids, split.own)


def _without(ids: np.ndarray, own: np.ndarray) -> np.ndarray:
    keep = ids != own[:, None]
    keep[keep.all(1), -1] = False
    return ids[keep].reshape(len(ids), -1)


class _Excluding(Search):
    """A search for k that asks for one more and leaves the query itself out."""

    def __init__(self, index: Any, split: _Split, k: int, truth: np.ndarray) -> None:
        self.own = split.own
        super().__init__(index, split.queries, truth.shape[1], truth)

    def measure(self, parameters: dict[str, int], timed: bool = False) -> Trial:
        if self.own is None:
            return super().measure(parameters, timed)
        self.k += 1
        try:
            return super().measure(parameters, timed)
        finally:
            self.k -= 1

    def found(self, ids: np.ndarray) -> np.ndarray:
        return ids if self.own is None else _without(ids, self.own)
