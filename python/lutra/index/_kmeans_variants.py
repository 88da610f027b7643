"""k-means in batches, for what does not fit in memory, and assignment with a largest size of cluster."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import numpy as np

from .. import _checks, address
from .._arrays import I64, is_native
from ._home import HOST, Home, check_matrix, deliver, home_of, to_float32


def is_stream(x: Any) -> bool:
    """Whether ``x`` is an iterator or a list of arrays rather than one array."""
    return (
        not is_native(x)
        and not hasattr(x, "__dlpack__")
        and (hasattr(x, "__next__") or (isinstance(x, (list, tuple)) and len(x) > 0 and is_native(x[0])))
    )


def batches(x: Any, batch_size: int | None, n_iter: int, rng: np.random.Generator) -> Iterator[Any]:
    """float32 batches of vectors with their home: those of a stream, or ``n_iter`` random ones of an array.

    The rows of a batch differ, and come in increasing order, as a mapped file likes to be read.
    """
    if is_stream(x):
        d = None
        for number, part in enumerate(x):
            if number == n_iter:
                return
            native = check_matrix(part, f"x[{number}]", d)
            d = native.shape[1]
            home = home_of(native)
            yield home, to_float32(home, native, f"x[{number}]")
        return
    assert batch_size is not None
    native = check_matrix(x, "x")
    home, n = home_of(native), native.shape[0]
    for _ in range(n_iter):
        rows = np.sort(rng.choice(n, min(batch_size, n), replace=False))
        part = native[rows] if home is HOST else native[home.positions(rows)]
        yield home, to_float32(home, part, "x", rows)


def balanced_assignment(x: Any, centroids: Any, *, slack: float = 1.25, metric: str = "l2") -> Any:
    """Assign vectors to centroids so that no cluster is larger than ``slack`` times the mean size.

    Every vector asks for the nearest centroid that has room. A centroid that is asked by more than it has
    room for takes the nearest of them and is full; the others ask again, until all have a place.

    Parameters
    ----------
    x : array, shape (n, d), float32, float16, bfloat16, float64, uint8 or int8
    centroids : array, shape (k, d)
    slack : float, default 1.25
        At least 1; the largest size is ``ceil(slack * n / k)``.
    metric : {'l2', 'ip'}, default 'l2'

    Returns
    -------
    array, shape (n,), int64, of the kind of ``x``
        The centroid of each vector. Among equal ones the lowest centroid, and the lowest vector, come first.

    Raises
    ------
    TypeError, ValueError
        As `kmeans`; a slack below 1.

    Notes
    -----
    Cost: that of `lutra.address.nearest`, and again for the vectors that were turned away: some rounds, of
    ever fewer vectors. Greedy: the sum of distances is not the least that one can have.
    """
    native, middle = check_matrix(x, "x"), check_matrix(centroids, "centroids")
    if native.shape[1] != middle.shape[1]:
        raise ValueError(
            f"centroids has {middle.shape[1]} columns, x has {native.shape[1]}; they must be equal"
        )
    _checks.choice("metric", metric, {"l2": 1, "ip": 0})
    home = home_of(native)
    points, middle = to_float32(home, native, "x"), to_float32(home, middle, "centroids")
    codes, _ = bounded(home, points, middle, check_slack(slack), metric)
    return deliver(home, (home.kind.cast(home.bring(codes), I64),), x)[0]


def check_slack(slack: Any) -> float:
    slack = 1.25 if slack is True else _checks.positive("slack", slack)
    if slack < 1:
        raise ValueError(f"slack must be at least 1, got {slack}: the clusters have to hold all vectors")
    return slack


def bounded(
    home: Home, points: Any, centroids: Any, slack: float, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scores (on the host) of points with at most ceil(slack n / k) points a centroid."""
    n, k = points.shape[0], centroids.shape[0]
    room = np.full(k, ceil(slack * n / k), np.int64)
    codes, scores = np.empty(n, np.int64), np.empty(n, np.float32)
    left, some = np.arange(n), points
    while len(left):
        free = np.flatnonzero(room)
        found = address.nearest(
            some, centroids if len(free) == k else centroids[home.positions(free)], 1, metric
        )
        score, code = HOST.bring(found.scores)[:, 0], free[HOST.bring(found.ids)[:, 0]]
        # Those that ask for one centroid side by side, the nearest first, then the lowest.
        order = np.lexsort((score if metric == "l2" else -score, code))
        asked = np.bincount(code, minlength=k)
        place = np.arange(len(left)) - (np.cumsum(asked) - asked)[code[order]]
        taken = order[place < room[code[order]]]
        codes[left[taken]], scores[left[taken]] = code[taken], score[taken]
        room -= np.minimum(asked, room)
        stay = np.ones(len(left), bool)
        stay[taken] = False
        left = left[stay]
        if len(left):
            some = points[home.positions(left)]
    return codes, scores
