"""hard_negatives: documents that are near a query, but are not what it asks for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import is_native
from ..index._home import HOST, adopt, check_ids
from ..index._progress import Progress
from ._source import Source, matrix

_SAMPLING = {"top": 0, "random": 1}


class HardNegatives(NamedTuple):
    """What `hard_negatives` found: a row for each query with each of its positives.

    Attributes
    ----------
    queries : array, shape (m,), int64
        Rows of the queries.
    positives : array, shape (m,), int64
        Rows of the documents, or ids of the index.
    negatives : array, shape (m, num_negatives), int64
        Likewise, best first; -1 where there were too few.
    positive_scores : array, shape (m,), float32
    scores : array, shape (m, num_negatives), float32
        Of the negatives; -inf (``'l2'``: +inf) where there is none.
    """

    queries: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    positive_scores: np.ndarray
    scores: np.ndarray

    def triplets(self) -> np.ndarray:
        """(query, positive, negative) for each negative: shape (t, 3), int64."""
        row, column = np.nonzero(self.negatives >= 0)
        return np.stack([self.queries[row], self.positives[row], self.negatives[row, column]], axis=1)


def hard_negatives(
    queries: Any,
    documents: Any,
    positives: Any,
    *,
    num_negatives: int = 3,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    sampling: str = "top",
    metric: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> HardNegatives:
    """Hard negatives for training: documents that rank high for a query and are none of its positives.

    Parameters
    ----------
    queries : array, shape (nq, d), float32, float16, bfloat16, float64, uint8 or int8
    documents : array, shape (n, d), likewise; or an index
    positives : array or list of int, shape (nq,); or a list of lists; or an array (nq, p) filled up with -1
        The right documents of each query: rows, or ids of the index. A query without any is passed over.
    num_negatives : int, default 3
        Negatives of each pair of a query and a positive.
    range_min, range_max : int
        Which ranks count, from 0, among the documents that are no positives of the query: ``range_min <= rank
        < range_max``. The first ranks may be positives that nobody has labelled. Default for ``range_max``:
        range_min + num_negatives, and three times as many negatives where a score or margin may refuse some.
    max_score, min_score : float, optional
        A negative's score must not be above, or below (``'l2'``: its distance not below, or above).
    absolute_margin : float, optional
        A negative must score so much less than the positive at least.
    relative_margin : float, optional
        A negative must score less than the positive by this share of it at least: 0.05 means at most 95 %.
    sampling : {'top', 'random'}, default 'top'
        Which of those that are left: the best, or any.
    metric : {'cosine', 'ip', 'l2'}, optional
        Default: cosine, or that of the index.
    seed : int, default 0
        Of ``sampling='random'``.
    progress : bool or None
        A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

    Returns
    -------
    HardNegatives
        ``(queries, positives, negatives, positive_scores, scores)``, and ``triplets()``.

    Raises
    ------
    TypeError, ValueError
        As `lutra.scan.knn`; positives that do not fit the queries; an empty range of ranks.
    IndexError
        A positive that is no document.

    Notes
    -----
    Parameters mean what they do in ``mine_hard_negatives`` of sentence-transformers; a margin is taken from
    each positive by itself. Cost: a search of all queries, with k = range_max and the largest number of
    positives. Memory: the results, and blocks of 32 MB. Documents on a GPU are searched there; the rest is
    done on the host.

    References
    ----------
    Moreira et al., NV-Retriever: Improving text embedding models with effective hard-negative mining, 2024,
    arXiv 2407.15831 (margins by the positive).
    """
    num_negatives = _checks.integer("num_negatives", num_negatives, 1)
    range_min = _checks.integer("range_min", range_min, 0)
    choosy = any(v is not None for v in (max_score, min_score, absolute_margin, relative_margin))
    if range_max is None:
        range_max = range_min + num_negatives * (3 if choosy else 1)
    range_max = _checks.integer("range_max", range_max, 1)
    if range_max <= range_min:
        raise ValueError(f"range_max must be greater than range_min = {range_min}, got {range_max}")
    _checks.choice("sampling", sampling, _SAMPLING)
    seed = _checks.integer("seed", seed, 0)
    limits = {
        "max_score": _number("max_score", max_score),
        "min_score": _number("min_score", min_score),
        "absolute_margin": _number("absolute_margin", absolute_margin, 0),
        "relative_margin": _number("relative_margin", relative_margin, 0),
    }
    source = Source.of(documents, "documents", metric)
    q = HOST.bring(matrix(queries, "queries", source.d)).astype(np.float32, copy=False)
    right = _padded(positives, len(q))
    right = np.where(right < 0, -1, source.places(np.maximum(right, 0), "positives") if source.n else -1)
    rng = np.random.default_rng(seed)
    out = []
    width = right.shape[1]
    k = min(source.n, range_max + width)
    step = source.block(max(1, k) + 4 * width)
    with Progress(len(q), "hard negatives", progress) as bar:
        for i in range(0, len(q), step):
            part, own = q[i : i + step], right[i : i + step]
            if k:
                found = _block(source, part, own, k, (range_min, range_max), num_negatives, limits,
                               rng if sampling == "random" else None)  # fmt: skip
                out.append((found[0] + i, *found[1:]))
            bar.tick(len(part))
    if not out:
        empty = np.empty(0, np.int64)
        return HardNegatives(
            empty, empty, np.empty((0, num_negatives), np.int64), np.empty(0, np.float32),
            np.empty((0, num_negatives), np.float32),
        )  # fmt: skip
    rows, positive, negative, positive_key, key = (np.concatenate(v) for v in zip(*out))
    return HardNegatives(
        rows, source.named(positive), source.named(negative), positive_key * source.sign, key * source.sign
    )


def _block(source, q, own, k, ranks, wanted, limits, rng):
    """(query, positive, negatives, positive's key, negatives' keys) of a block, positions of the source."""
    scores, found = source.search(q, k)
    keys = scores * np.float32(source.sign)
    other = found >= 0
    for column in own.T:
        other &= found != column[:, None]
    rank = np.cumsum(other, axis=1) - 1
    other &= (rank >= ranks[0]) & (rank < ranks[1])
    row, column = np.nonzero(own >= 0)
    positive = own[row, column]
    positive_key = _keys(source, q[row], source.rows(positive))
    good, key = other[row], keys[row]
    if limits["max_score"] is not None:
        good &= key <= limits["max_score"] * source.sign
    if limits["min_score"] is not None:
        good &= key >= limits["min_score"] * source.sign
    if limits["absolute_margin"] is not None:
        good &= key <= (positive_key - limits["absolute_margin"])[:, None]
    if limits["relative_margin"] is not None:
        good &= key <= (positive_key - np.abs(positive_key) * limits["relative_margin"])[:, None]
    if rng is None:
        order = np.argsort(~good, axis=1, kind="stable")[:, :wanted]
    else:
        order = np.argsort(np.where(good, rng.random(good.shape), 2.0), axis=1)[:, :wanted]
        order = np.sort(np.where(np.take_along_axis(good, order, 1), order, k), axis=1)  # best first again
        order = np.minimum(order, k - 1)
        repeated = np.zeros(order.shape, bool)
        repeated[:, 1:] = order[:, 1:] == order[:, :-1]
        picked = np.take_along_axis(good, order, 1) & ~repeated
    if rng is None:
        picked = np.take_along_axis(good, order, 1)
    negative = np.where(picked, np.take_along_axis(found[row], order, 1), -1)
    negative_key = np.where(picked, np.take_along_axis(key, order, 1), -np.inf).astype(np.float32)
    short = wanted - order.shape[1]
    if short > 0:
        negative = np.pad(negative, ((0, 0), (0, short)), constant_values=-1)
        negative_key = np.pad(negative_key, ((0, 0), (0, short)), constant_values=-np.inf)
    return row, positive, negative, positive_key, negative_key


def _keys(source, q, x):
    """Keys of pairs of rows, float32, summed in float64."""
    q, x = q.astype(np.float64), x.astype(np.float64)
    if source.metric == "l2":
        return -np.square(q - x).sum(1).astype(np.float32)
    products = (q * x).sum(1)
    if source.metric == "cosine":
        norms = np.sqrt(np.square(q).sum(1) * np.square(x).sum(1))
        products = np.divide(products, norms, out=np.zeros(len(q)), where=norms > 0)
    return products.astype(np.float32)


def _number(name: str, value: Any, low: float | None = None) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if np.isnan(number) or (low is not None and number < low):
        raise ValueError(f"{name} must be a number{'' if low is None else f' >= {low}'}, got {value!r}")
    return number


def _padded(positives: Any, nq: int) -> np.ndarray:
    """Positives as (nq, p) int64, filled up with -1."""
    if is_native(positives) or hasattr(positives, "__dlpack__"):
        native = HOST.bring(adopt(positives, "positives"))
        if native.ndim == 2 and native.dtype.kind in "iu":
            if len(native) != nq:
                raise ValueError(f"positives has {len(native)} rows, queries has {nq}; they must be equal")
            return native.astype(np.int64)
    elif any(isinstance(v, (list, tuple, set, frozenset, np.ndarray, range)) for v in positives):
        lists = [
            check_ids(sorted(v) if isinstance(v, (set, frozenset)) else v, f"positives[{i}]").ravel()
            for i, v in enumerate(positives)
        ]
        if len(lists) != nq:
            raise ValueError(f"positives has {len(lists)} entries, queries has {nq} rows; they must be equal")
        out = np.full((nq, max([1, *map(len, lists)])), -1, np.int64)
        for i, v in enumerate(lists):
            out[i, : len(v)] = v
        return out
    flat = check_ids(positives, "positives")
    if flat.shape != (nq,):
        raise ValueError(f"positives has shape {flat.shape}, queries has {nq} rows; one is needed for each")
    return flat[:, None].copy()
