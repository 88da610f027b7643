"""evaluate: several measures of one set of results, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from ._measures import Judged, depth

MEASURES: dict[str, Callable[[Judged, int], Any]] = {
    "recall": Judged.recall,
    "precision": Judged.precision,
    "success": Judged.success,
    "mrr": Judged.reciprocal_rank,
    "map": Judged.average_precision,
    "ndcg": lambda judged, k: judged.ndcg(k, "linear"),
    "ndcg_exp": lambda judged, k: judged.ndcg(k, "exponential"),
}
ALIASES = {"r": "recall", "p": "precision", "hit_rate": "success", "hits": "success", "ap": "map"}
DEFAULT = ("ndcg@10", "mrr@10", "recall@100", "success@10")


def evaluate(
    ids: Any, relevant: Any, metrics: str | Iterable[str] = DEFAULT, *, per_query: bool = False,
    empty: str = "skip",
) -> dict[str, Any]:  # fmt: skip
    """Several measures of the results of a search.

    Parameters
    ----------
    ids, relevant, per_query, empty
        As for `recall_at_k`.
    metrics : str or iterable of str
        Names, each with ``@k`` or without (then of all results): 'recall', 'precision', 'success' (also
        'hit_rate' or 'hits'), 'mrr', 'map' (also 'ap'), 'ndcg', and 'ndcg_exp' with exponential gain.

    Returns
    -------
    dict
        The value of each, under its name as given: floats, or arrays (nq,) with ``per_query``.

    Raises
    ------
    TypeError, ValueError
        As `recall_at_k`; a name that is not known.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> found = np.array([[3, 1, 2], [7, 8, 9]])
    >>> lutra.metrics.evaluate(found, [[1], [9]], ["mrr@2", "success@3"])
    {'mrr@2': 0.25, 'success@3': 1.0}
    """
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    read = [parse(name) for name in names]
    judged = Judged(ids, relevant, empty)
    return {
        name: judged.result(measure(judged, depth(judged, k)), per_query)
        for name, (measure, k) in zip(names, read)
    }


def parse(name: Any) -> tuple[Callable[[Judged, int], Any], int | None]:
    """The measure and the k of a name such as 'ndcg@10'."""
    if not isinstance(name, str):
        raise TypeError(f"metrics must be names such as 'ndcg@10', got {name!r}")
    match = re.fullmatch(r"\s*([a-z_]+)\s*(?:@\s*(\d{1,9}))?\s*", name.lower())
    word = ALIASES.get(match[1], match[1]) if match else None
    if match is None or word not in MEASURES or (match[2] is not None and int(match[2]) < 1):
        known = ", ".join(MEASURES)
        raise ValueError(f"metrics: {name!r} is not known; one of {known}, with @k (k >= 1) or without")
    return MEASURES[word], None if match[2] is None else int(match[2])
