"""The measures, each for a batch of queries at once."""

from __future__ import annotations

from typing import Any

from .. import _checks
from .._arrays import F64, I64
from .._results import Neighbors
from ..index._home import Home, adopt, deliver, home_of
from ._relevance import integers, lexsort, relevance

EMPTY = {"skip": 0, "zero": 1}
GAINS = {"linear": 0, "exponential": 1}


class Judged:
    """The results of queries with the grade of each, and what there was to find.

    Attributes
    ----------
    grades : array, shape (nq, k), float64
        0 for what is not relevant, and for what was found before by the same query.
    counts : array, shape (nq,), int64
        Relevant ids of each query.
    """

    def __init__(self, ids: Any, relevant: Any, empty: str = "skip", home: Home | None = None) -> None:
        _checks.choice("empty", empty, EMPTY)
        self.zero = empty == "zero"
        self.like = ids.ids if isinstance(ids, Neighbors) else ids
        native = adopt(self.like, "ids")
        self.home = home = home or home_of(native, "ids")
        found = integers(home, native, "ids")
        if len(found.shape) != 2:
            hint = "; ids[:, None] for one result a query" if len(found.shape) == 1 else ""
            raise ValueError(f"ids must be (nq, k), got shape {tuple(found.shape)}{hint}")
        self.nq, self.k = (int(size) for size in found.shape)
        self.relevance = relevance(home, relevant, self.nq)
        xp = home.xp
        starts = home.arange(self.nq + 1)
        self.ptr = xp.searchsorted(self.relevance.query, starts)
        self.counts = self.ptr[1:] - self.ptr[:-1]
        self.grades = self._grades(found)
        self._ideal: Any = None

    def _grades(self, found: Any) -> Any:
        """Grades of (nq, k) ids: each query's ids are looked up among those relevant to it."""
        home, xp, rel = self.home, self.home.xp, self.relevance
        grades = home.empty((self.nq, self.k), F64)  # dense, whatever the order of the ids in memory
        grades[:] = 0
        total = int(rel.id.shape[0])
        if not total or not self.k or not self.nq:
            return grades
        names = xp.unique(rel.id)
        count = int(names.shape[0])
        # a pair of a query and the number of an id among all relevant ones, as one integer
        keys = rel.query * count + xp.searchsorted(names, rel.id)
        flat = found.reshape(-1)
        number = xp.searchsorted(names, flat)
        number = number - home.kind.cast(number >= count, I64)
        row = home.arange(self.nq * self.k) // self.k
        key = row * count + number
        place = xp.searchsorted(keys, key)
        place = place - home.kind.cast(place >= total, I64)
        match = (names[number] == flat) & (keys[place] == key)
        # of an id that was found twice the first counts: places and ranks as one integer, sorted
        at = xp.nonzero(match)
        at = at[0] if isinstance(at, tuple) else at[:, 0]
        pairs = home.sort(place[at] * self.k + at % self.k)
        place, rank = pairs // self.k, pairs % self.k
        first = xp.ones_like(place) > 0
        first[1:] = place[1:] != place[:-1]
        place, rank = place[first], rank[first]
        values = home.kind.cast(xp.ones_like(place), F64) if rel.grade is None else rel.grade[place]
        grades.reshape(-1)[rel.query[place] * self.k + rank] = values
        return grades

    # ---- the measures: (nq,) float64, unset where a query has nothing to find
    def relevant_in(self, k: int) -> Any:
        """How many relevant ids are among the first k."""
        return self.home.kind.cast((self.grades[:, :k] > 0).sum(1), F64)

    def recall(self, k: int) -> Any:
        return self.relevant_in(k) / self._at_least_one(self.counts)

    def precision(self, k: int) -> Any:
        return self.relevant_in(k) / k

    def success(self, k: int) -> Any:
        return self.home.kind.cast(self.relevant_in(k) > 0, F64)

    def reciprocal_rank(self, k: int) -> Any:
        ranks = self._ranks(min(k, self.k))
        hit = self.home.kind.cast(self.grades[:, :k] > 0, F64)
        return self._max(hit / ranks)

    def average_precision(self, k: int) -> Any:
        hit = self.home.kind.cast(self.grades[:, :k] > 0, F64)
        precisions = hit.cumsum(1) / self._ranks(min(k, self.k))
        return (precisions * hit).sum(1) / self._at_least_one(self.counts)

    def ndcg(self, k: int, gain: str) -> Any:
        got = self._discounted(self.grades[:, :k], gain)
        best = self._discounted(self._ideal_grades(k), gain)
        return got / self.home.xp.where(best > 0, best, self.home.xp.ones_like(best))

    def _discounted(self, grades: Any, gain: str) -> Any:
        xp = self.home.xp
        gains = grades if gain == "linear" else 2.0**grades - 1
        return (gains / xp.log2(1 + self._ranks(int(grades.shape[1])))).sum(1)

    def _ideal_grades(self, k: int) -> Any:
        """Grades (nq, at most k) of the best possible results."""
        home, rel = self.home, self.relevance
        most = int(self.counts.max()) if self.nq else 0
        width = min(k, most)
        ideal = home.empty((self.nq, width), F64)
        ideal[:] = 0
        if not width:
            return ideal
        grade = home.kind.cast(home.xp.ones_like(rel.id), F64)
        if rel.grade is not None:
            grade = rel.grade[lexsort(home, [rel.query, -rel.grade])]
        rank = home.arange(int(rel.id.shape[0])) - self.ptr[rel.query]
        near = rank < width
        ideal.reshape(-1)[rel.query[near] * width + rank[near]] = grade[near]
        return ideal

    def _ranks(self, k: int) -> Any:
        return self.home.kind.cast(self.home.arange(k) + 1, F64)

    def _at_least_one(self, counts: Any) -> Any:
        return self.home.kind.cast(counts + self.home.kind.cast(counts == 0, I64), F64)

    def _max(self, a: Any) -> Any:
        if not a.shape[1]:
            return a.sum(1)
        return self.home.xp.amax(a, 1)

    # ---- results
    def result(self, values: Any, per_query: bool) -> Any:
        """The mean over queries that have something to find, or each query's value."""
        home, xp = self.home, self.home.xp
        nothing = self.counts == 0
        if per_query:
            fill = 0.0 if self.zero else float("nan")
            values = xp.where(nothing, xp.full_like(values, fill), values)
            return deliver(home, (values,), self.like)[0]
        values = xp.where(nothing, xp.zeros_like(values), values)
        count = self.nq if self.zero else self.nq - int(nothing.sum())
        if not count:
            raise ValueError(
                "ids has no queries"
                if not self.nq
                else "no query has a relevant id: there is nothing to average"
            )
        return float(values.sum()) / count


def depth(judged: Judged, k: Any) -> int:
    """The k of a measure; None is all that was found."""
    return max(1, judged.k) if k is None else _checks.integer("k", k, 1)


def hits(ids: Any, relevant: Any) -> Any:
    """Which of the found are relevant.

    Parameters
    ----------
    ids, relevant
        As for `recall_at_k`.

    Returns
    -------
    array, shape (nq, k), bool, of the kind of ``ids``
        False for -1, and for an id that the same query has found before.

    Raises
    ------
    TypeError, ValueError
        As `recall_at_k`.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.metrics.hits(np.array([[3, 1, 3], [7, -1, -1]]), [[3, 4], [8]])
    array([[ True, False, False],
           [False, False, False]])
    """
    judged = Judged(ids, relevant)
    return deliver(judged.home, (judged.grades > 0,), judged.like)[0]


def recall_at_k(
    ids: Any, relevant: Any, k: int | None = None, *, per_query: bool = False, empty: str = "skip"
) -> Any:
    """Recall: the share of a query's relevant ids that are among its first k results.

    Parameters
    ----------
    ids : array, shape (nq, n), integers, or Neighbors
        What was found, best first, -1 where nothing was; the result of any search of lutra.
    relevant : array, list or tuple
        What is relevant to each query:

        - an array (nq,): one id a query; (nq, r): several, padded with -1 (the ids of an exact search, too);
        - a list with, for each query: an id; or its ids as a list, set or array; or a dict of grades by id;
        - a tuple of 1-d arrays (ids, ptr) or (ids, ptr, grades): those of query i at ``ptr[i] : ptr[i + 1]``.

        Negative ids are passed over, and so are grades of 0 and below: judged, and not relevant. Without
        grades all are 1. An id that a query has twice counts once (with its highest grade).
    k : int, optional
        How many results are looked at; default all. Where it exceeds their number the rest count as not
        relevant.
    per_query : bool, default False
        Each query's value instead of the mean.
    empty : {'skip', 'zero'}, default 'skip'
        Queries without any relevant id: left out of the mean (NaN in the single values), or 0. trec_eval
        leaves out queries without judgements, and gives 0 to those whose judgements are all 0.

    Returns
    -------
    float, or array, shape (nq,), float64, of the kind of ``ids``

    Raises
    ------
    TypeError
        ``ids`` or ``relevant`` of another type, or ids that are no integers.
    ValueError
        Shapes that do not fit, NaN grades, k < 1; a mean where no query has anything relevant.

    Notes
    -----
    An id that is found again by the same query takes a rank and is no hit. Definitions are trec_eval's
    (recall_k: of all relevant ids, so with more than k of them it stays below 1). Computed in float64 where
    ``ids`` lies. Cost: sorting the relevant ids, and a binary search for each found one.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> found = np.array([[3, 1, 2], [7, 8, 9]])
    >>> lutra.metrics.recall_at_k(found, [[1, 5], [9]], 3)
    0.75
    """
    judged = Judged(ids, relevant, empty)
    return judged.result(judged.recall(depth(judged, k)), per_query)


def precision_at_k(
    ids: Any, relevant: Any, k: int | None = None, *, per_query: bool = False, empty: str = "skip"
) -> Any:
    """Precision: the share of the first k results that are relevant.

    Parameters, results and errors are those of `recall_at_k`. The divisor is k, also where fewer results
    were found, as in trec_eval (P_k).
    """
    judged = Judged(ids, relevant, empty)
    return judged.result(judged.precision(depth(judged, k)), per_query)


def success_at_k(
    ids: Any, relevant: Any, k: int | None = None, *, per_query: bool = False, empty: str = "skip"
) -> Any:
    """Success, or hit rate: whether anything relevant is among the first k results.

    Parameters, results and errors are those of `recall_at_k`; trec_eval's success_k.
    """
    judged = Judged(ids, relevant, empty)
    return judged.result(judged.success(depth(judged, k)), per_query)


def mrr(
    ids: Any, relevant: Any, k: int | None = None, *, per_query: bool = False, empty: str = "skip"
) -> Any:
    """Mean reciprocal rank: 1 / the rank of the first relevant result, 0 where none is among the first k.

    Parameters, results and errors are those of `recall_at_k`; trec_eval's recip_rank, cut at k.
    """
    judged = Judged(ids, relevant, empty)
    return judged.result(judged.reciprocal_rank(depth(judged, k)), per_query)


def average_precision(
    ids: Any, relevant: Any, k: int | None = None, *, per_query: bool = False, empty: str = "skip"
) -> Any:
    """Average precision (its mean is MAP): the precisions at the ranks of the hits, over all relevant ids.

    Parameters, results and errors are those of `recall_at_k`; trec_eval's map and map_cut_k.
    """
    judged = Judged(ids, relevant, empty)
    return judged.result(judged.average_precision(depth(judged, k)), per_query)


def ndcg_at_k(
    ids: Any, relevant: Any, k: int | None = None, *, gain: str = "linear", per_query: bool = False,
    empty: str = "skip",
) -> Any:  # fmt: skip
    """Normalized discounted cumulative gain of the first k results.

    Parameters, results and errors are those of `recall_at_k`, and:

    Parameters
    ----------
    gain : {'linear', 'exponential'}, default 'linear'
        A result with grade g counts g (Järvelin and Kekäläinen; trec_eval's ndcg_cut_k) or 2^g - 1 (Burges).

    Notes
    -----
    ``sum_i gain(i) / log2(i + 1)`` over ranks i = 1 ... k, divided by the same sum for the query's relevant
    ids in the best order.

    References
    ----------
    Järvelin, Kekäläinen, Cumulated gain-based evaluation of IR techniques, 2002. Burges et al., Learning to
    rank using gradient descent, ICML 2005.
    """
    _checks.choice("gain", gain, GAINS)
    judged = Judged(ids, relevant, empty)
    return judged.result(judged.ndcg(depth(judged, k), gain), per_query)
