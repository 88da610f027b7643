"""tune: the fastest search parameters that reach a recall, measured."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _checks, scan
from ._home import HOST, adopt, check_matrix, to_float32

_PART = 1 << 26  # bytes of vectors that ground truth is computed with at a time
_FACTORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100)
_REPEAT = 0.05  # seconds that a setting is timed for, at least
_DESCENDING = ("ip", "cosine")


@dataclass(frozen=True)
class Trial:
    """One setting: its parameters, the recall, and the seconds for a query."""

    parameters: dict[str, int]
    recall: float
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """Result of `tune`.

    Attributes
    ----------
    parameters : dict
        What was set: ``nprobe``, ``ef_search``, ``refine_factor``, as the index has them.
    recall : float
        The share of the true k nearest that was found.
    seconds : float
        For a query, in batches of all queries.
    reached : bool
        Whether the recall that was asked for is reached; else the parameters are those of the highest.
    trials : list of Trial
        All that was measured.
    """

    parameters: dict[str, int]
    recall: float
    seconds: float
    reached: bool
    trials: list[Trial] = field(repr=False)


def tune(
    index: Any,
    queries: Any,
    recall: float = 0.95,
    k: int = 10,
    *,
    vectors: Any = None,
    truth: Any = None,
) -> Tuned:
    """Find the fastest search parameters that reach a recall, and set them on the index.

    Parameters
    ----------
    index : Index
        Filled. Its ``nprobe``, ``ef_search`` and ``refine_factor`` are tuned, those that it has, behind
        transforms too.
    queries : array, shape (nq, d)
        Like those to come, some hundreds.
    recall : float in (0, 1], default 0.95
        Share of the true k nearest neighbours that are to be found, on average over the queries.
    k : int, default 10
    vectors : array, shape (len(index), d), optional
        The vectors in the order of ``index.ids``, for the ground truth. Needed where the index keeps codes
        only; else it is computed with what the index keeps.
    truth : array of int64, shape (nq, k or more), optional
        The ids of the true neighbours, where they are known already.

    Returns
    -------
    Tuned
        The parameters, recall and time; ``trials`` has everything that was measured.

    Raises
    ------
    ValueError
        An argument out of range; an index that is empty, or keeps codes only where neither ``vectors`` nor
        ``truth`` is given.

    Warns
    -----
    UserWarning
        The recall is out of reach; the parameters are then those of the highest.

    Notes
    -----
    Recall grows with each parameter, so for each refine factor the least ``nprobe`` or ``ef_search`` is found
    by bisection: some dozens of searches of all queries, and one exact search.
    """
    recall = _checks.positive("recall", recall)
    if recall > 1:
        raise ValueError(f"recall must be in (0, 1], got {recall}")
    k = _checks.integer("k", k, 1)
    q = np.array(to_float32(HOST, HOST.bring(check_matrix(queries, "queries")), "queries"))
    if not len(q):
        raise ValueError("queries has no rows")
    if not index.ntotal:
        raise ValueError(f"this {type(index).__name__} is empty: add(x) first")
    if truth is None:
        truth = ground_truth(index, q, k, vectors)
    else:
        truth = np.asarray(truth) if isinstance(truth, (list, tuple)) else HOST.bring(adopt(truth, "truth"))
        if truth.ndim != 2 or truth.shape[0] != len(q) or truth.shape[1] < k or truth.dtype.kind != "i":
            raise ValueError(
                f"truth must be int64 of shape ({len(q)}, >= {k}), got {truth.dtype} {truth.shape}"
            )
    found = Search(index, q, k, truth[:, :k]).best(recall)
    if not found.reached:
        warnings.warn(
            f"recall {recall:g} is out of reach: {found.recall:.4f} with {found.parameters}",
            stacklevel=2,
        )
    return found


# ---- ground truth
def keeps_vectors(index: Any) -> bool:
    """Whether the index can give its vectors back as they were, up to the type that they are kept in."""
    name = type(index).__name__
    if name == "Flat":
        return True
    if name == "HNSW":
        return index.refine is not None or index.storage in ("float32", "float16", "bfloat16")
    if name == "Store":
        return keeps_vectors(index.parts[0])
    if getattr(index, "refine", None) is not None:
        return True
    return name == "IVF" and isinstance(index.quantizer, str)


def ground_truth(index: Any, q: np.ndarray, k: int, vectors: Any = None) -> np.ndarray:
    """Ids of the exact k nearest of each query, of ``vectors`` or what the index keeps."""
    ids = index.ids
    if vectors is None and not keeps_vectors(index):
        raise ValueError(
            f"this {type(index).__name__} keeps codes only, so there is nothing to measure recall against: "
            "pass vectors= (in the order of index.ids) or truth="
        )
    d = q.shape[1]
    if vectors is not None:
        vectors = HOST.bring(check_matrix(vectors, "vectors", d))
        if len(vectors) != len(ids):
            raise ValueError(f"vectors has {len(vectors)} rows; the index holds {len(ids)}")
    step = max(1, _PART // (4 * d))
    scores = np.empty((len(q), 0), np.float32)
    best = np.empty((len(q), 0), np.int64)
    for i in range(0, len(ids), step):
        if vectors is None:
            part = index.reconstruct(ids[i : i + step])
        else:
            part = np.ascontiguousarray(to_float32(HOST, vectors[i : i + step], "vectors", i))
        s, rows = scan.knn(q, part, min(k, len(part)), index.metric)
        scores = np.concatenate([scores, s], 1)
        best = np.concatenate([best, ids[i + rows]], 1)
        order = np.argsort(-scores if index.metric in _DESCENDING else scores, 1, kind="stable")[:, :k]
        scores, best = np.take_along_axis(scores, order, 1), np.take_along_axis(best, order, 1)
    return best


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    """The mean share of ``truth`` (nq, k) that is in ``found`` (nq, k')."""
    k = truth.shape[1]
    both = np.sort(np.concatenate([np.where(found < 0, -2 - np.arange(found.shape[1]), found), truth], 1), 1)
    return float((both[:, 1:] == both[:, :-1]).sum() / (len(truth) * k))


# ---- searching the settings
def owner(index: Any, name: str) -> Any:
    """The index behind wrappers that has a search parameter, or None."""
    while index is not None:
        if hasattr(index, name):
            return index
        index = getattr(index, "index", None)
    return None


class Search:
    """Settings of one index, measured against the truth."""

    def __init__(
        self,
        index: Any,
        q: np.ndarray,
        k: int,
        truth: np.ndarray,
    ) -> None:
        self.index, self.q, self.k, self.truth = index, q, k, truth
        self.width = owner(index, "nprobe") or owner(index, "ef_search")
        self.name = "nprobe" if owner(index, "nprobe") is not None else "ef_search"
        refiner = owner(index, "refine_factor")
        self.refiner = refiner if getattr(refiner, "refine", None) is not None else None
        self.trials: list[Trial] = []

    def _widths(self) -> list[int]:
        """The values of ``nprobe`` or ``ef_search`` that are tried, increasing."""
        if self.width is None:
            return []
        most = self.width.nlist if self.name == "nprobe" else max(2 * self.k, min(4096, self.index.ntotal))
        low = 1 if self.name == "nprobe" else self.k
        values = {low, most}
        value = float(low)
        while value < most:
            values.add(int(value))
            value *= 1.19  # four steps to double
        return sorted(values)

    def _set(self, parameters: dict[str, int]) -> None:
        for name, value in parameters.items():
            setattr(self.refiner if name == "refine_factor" else self.width, name, value)

    def found(self, ids: np.ndarray) -> np.ndarray:
        """What counts of the ids that a search has given."""
        return ids

    def measure(self, parameters: dict[str, int], timed: bool = False) -> Trial:
        """The recall, and the time of the fastest of a few searches."""
        self._set(parameters)
        start = time.perf_counter()
        ids = self.index.search(self.q, self.k).ids
        best = time.perf_counter() - start
        if timed:
            end = start + _REPEAT + 2 * best
            while time.perf_counter() < end:
                start = time.perf_counter()
                self.index.search(self.q, self.k)
                best = min(best, time.perf_counter() - start)
        trial = Trial(dict(parameters), recall_of(self.found(ids), self.truth), best / len(self.q))
        if timed:
            self.trials.append(trial)
        return trial

    def _least(self, widths: list[int], fixed: dict[str, int], recall: float) -> int | None:
        """The first width that reaches the recall, by bisection; None where the last does not."""
        if self.measure({self.name: widths[-1], **fixed}).recall < recall:
            return None
        low, high = 0, len(widths) - 1
        # Small ones are cheap to measure: gallop up before halving.
        step = 1
        while low + step < high and self.measure({self.name: widths[low + step], **fixed}).recall < recall:
            low += step
            step *= 2
        high = min(high, low + step)
        if low == 0 and self.measure({self.name: widths[0], **fixed}).recall >= recall:
            return widths[0]
        while high - low > 1:
            middle = (low + high) // 2
            if self.measure({self.name: widths[middle], **fixed}).recall >= recall:
                high = middle
            else:
                low = middle
        return widths[high]

    def best(self, recall: float) -> Tuned:
        """The fastest setting that reaches the recall is set and returned, else the one with the highest."""
        widths = self._widths()
        slower = 0
        for factor in _FACTORS if self.refiner is not None else (None,):
            fixed = {} if factor is None else {"refine_factor": factor}
            if not widths:
                trial = self.measure(fixed, timed=True)
                if trial.recall >= recall:
                    break  # a larger factor is only slower
                continue
            width = self._least(widths, fixed, recall)
            if width is None:
                if factor in (None, _FACTORS[-1]):
                    self.measure({self.name: widths[-1], **fixed}, timed=True)
                continue
            before = min((t.seconds for t in self.trials if t.recall >= recall), default=np.inf)
            trial = self.measure({self.name: width, **fixed}, timed=True)
            slower = slower + 1 if trial.seconds > before else 0
            if slower == 2 or width == widths[0]:
                break  # from here on refining costs more than it saves
        good = [t for t in self.trials if t.recall >= recall]
        chosen = min(good, key=lambda t: t.seconds) if good else max(self.trials, key=lambda t: t.recall)
        self._set(chosen.parameters)
        return Tuned(chosen.parameters, chosen.recall, chosen.seconds, bool(good), self.trials)
