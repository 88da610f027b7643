"""k-means on `lutra.address.nearest` and `lutra.gather.bag`: Lloyd's iterations, and batches."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from .. import _checks, address, gather
from .._arrays import F32, F64, I64
from ._home import HOST, Home, check_matrix, deliver, home_of, to_float32
from ._kmeans_variants import batches, bounded, check_slack, is_stream
from ._progress import Progress

_PIECE = 256  # points that are summed one after another
INITS = {"random": 0, "k-means++": 1}


class KMeans(NamedTuple):
    """Result of `kmeans`.

    Attributes
    ----------
    centroids : array, shape (k, d), float32
    objective : numpy.ndarray, shape (iterations,), float64
        Mean squared distance of the points to their centroids (spherical: mean cosine) before each update.
    """

    centroids: Any
    objective: np.ndarray


def kmeans(
    x: Any,
    k: int,
    *,
    n_iter: int = 25,
    init: str = "random",
    spherical: bool = False,
    max_points_per_centroid: int | None = 256,
    seed: int = 0,
    progress: bool | None = None,
    balanced: bool | float = False,
    batch_size: int | None = None,
) -> KMeans:
    """Cluster vectors around k centroids.

    Parameters
    ----------
    x : array, shape (n, d), float32, float16, bfloat16, float64, uint8 or int8
        At least k vectors. Computed where ``x`` lies, in float32. Or an iterator, or a list, of such arrays,
        for what does not fit in memory: each is one batch, the first of at least k vectors.
    k : int
    n_iter : int, default 25
        Iterations; fewer where no assignment changes any more. With batches: how many of them at most.
    init : {'random', 'k-means++'}, default 'random'
        ``'random'``: k different points, each equally likely; ``'k-means++'``: each drawn with a probability
        in proportion to its squared distance from those before. k-means++ costs k passes over the points.
    spherical : bool, default False
        Centroids of unit norm, assignment by inner product (for vectors of unit norm).
    max_points_per_centroid : int or None, default 256
        Where there are more than k times as many points, a random sample of that size is clustered.
    seed : int, default 0
        The same seed, input and backend give the same bits, whatever the number of threads.
    progress : bool or None
        A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.
    balanced : bool or float, default False
        Bound the size of clusters: True, at most 1.25 times the mean size (rounded up); a number >= 1: so
        many times. Each iteration assigns as `balanced_assignment` does, which gives the bounded clusters of
        the centroids, too.
    batch_size : int or None, default None
        Mini-batches: each iteration takes so many vectors at random (at least k), and moves each centroid to
        the mean of all vectors that it was ever given. ``x`` may be a mapped file: only the rows of a batch
        are read. `max_points_per_centroid` has no meaning then.

    Returns
    -------
    centroids : array, shape (k, d), float32, of the kind of ``x``
    objective : numpy.ndarray, float64

    Raises
    ------
    TypeError
        ``x`` is no array or has another dtype.
    ValueError
        Fewer than k vectors, NaN or infinities (the row is named), or an argument out of range.

    Warns
    -----
    UserWarning
        Fewer than 39 points per centroid.

    Notes
    -----
    Cost: 2 n k d flops an iteration, on 8-bit integers where k >= 128 and d >= 32 (see
    `lutra.address.nearest`; the assignment is exact); no (n, k) matrix is written. A cluster that loses all
    points starts again at the point of the largest cluster that is farthest from its centroid.

    References
    ----------
    Lloyd, Least squares quantization in PCM, 1982. Arthur, Vassilvitskii, k-means++, SODA 2007. Sculley,
    Web-scale k-means clustering, WWW 2010 (mini-batches).
    """
    stream = is_stream(x)
    native = x if stream else check_matrix(x, "x")
    k = _checks.integer("k", k, 1)
    n_iter = _checks.integer("n_iter", n_iter, 1)
    _checks.choice("init", init, INITS)
    rng = np.random.default_rng(seed)
    slack = check_slack(balanced) if balanced is not False else None
    if stream or batch_size is not None:
        if slack is not None:
            raise ValueError("balanced needs all vectors at once: leave batch_size and streams, or balanced")
        size = None if stream else _checks.integer("batch_size", batch_size, k)
        if not stream and native.shape[0] < k:
            raise ValueError(f"x has {native.shape[0]} rows; at least {k} are needed, one for each centroid")
        with Progress(n_iter, "k-means", progress) as bar:
            parts = batches(native, size, n_iter, rng)
            return _in_batches(parts, x, k, init, bool(spherical), rng, bar)
    home = home_of(native)
    points = sample(home, native, k, max_points_per_centroid, rng)
    with Progress(n_iter, "k-means", progress) as bar:
        centroids, objective = lloyd(home, points, k, n_iter, init, bool(spherical), rng, bar, slack)
    return KMeans(deliver(home, (centroids,), x)[0], objective)


def sample(home: Home, native: Any, k: int, per_centroid: int | None, rng: np.random.Generator) -> Any:
    """The float32 points to train k centroids on: all, or so many per centroid at random."""
    n = native.shape[0]
    if n < k:
        raise ValueError(f"x has {n} rows; at least {k} are needed, one for each centroid")
    if per_centroid is not None:
        per_centroid = _checks.integer("max_points_per_centroid", per_centroid, 1)
        if n > k * per_centroid:
            rows = np.sort(rng.choice(n, k * per_centroid, replace=False))
            return to_float32(home, home.bring(native)[home.positions(rows)], "x", rows)
    if n < 39 * k:
        warnings.warn(
            f"{n} points for {k} centroids; at least {39 * k} are advisable (39 for each)", stacklevel=3
        )
    return to_float32(home, native, "x")


def lloyd(
    home: Home,
    points: Any,
    k: int,
    n_iter: int,
    init: str,
    spherical: bool,
    rng: np.random.Generator,
    bar: Progress,
    slack: float | None = None,
    start: Any = None,
) -> tuple[Any, np.ndarray]:
    """Centroids and the objective of each iteration; with ``slack``, of clusters of bounded size.

    They start from ``start`` where that is given, and not as ``init`` says.
    """
    metric = "ip" if spherical else "l2"
    centroids = _start(home, points, k, init, spherical, rng) if start is None else start
    objective: list[float] = []
    before = None
    for i in range(n_iter):
        if slack is None:
            scores, ids = address.nearest(points, centroids, 1, metric)
            codes, scores = ids[:, 0], scores[:, 0]
        else:
            codes, scores = (home.bring(a) for a in bounded(home, points, centroids, slack, metric))
        # On a GPU the update is under way before anything is read back.
        ahead = _launch_means(home, points, codes, k) if _on_gpu(home) else None
        objective.append(float(scores.mean(dtype=home.xp.float64)))
        if before is not None and bool((codes == before).all()):
            bar.tick(n_iter - i)
            break
        before = codes
        centroids, order, first, counts = _clusters(home, points, codes, k, ahead)
        if spherical:
            centroids = home.normalise(centroids)
        if not counts.all():
            _reseed(points, centroids, order, first, counts, scores if metric == "l2" else -scores)
        bar.tick()
    return centroids, np.array(objective)


def _start(home: Home, points: Any, k: int, init: str, spherical: bool, rng: np.random.Generator) -> Any:
    """The first centroids: k of the points."""
    chosen = (_plus_plus if init == "k-means++" else _random)(home, points, k, rng)
    centroids = points[home.positions(chosen)]
    return home.normalise(centroids) if spherical else centroids


def _in_batches(
    parts: Any, like: Any, k: int, init: str, spherical: bool, rng: np.random.Generator, bar: Progress
) -> KMeans:
    """Mini-batch k-means: a centroid is the mean of all points that it was ever given."""
    metric = "ip" if spherical else "l2"
    centroids: Any = None
    sums: Any = None  # of all points of each centroid so far; a unit vector does not tell for spherical ones
    seen = np.zeros(k, np.int64)
    objective: list[float] = []
    home = HOST
    for home, points in parts:
        if centroids is None:
            if points.shape[0] < k:
                raise ValueError(f"the first batch has {points.shape[0]} rows; at least {k} are needed")
            centroids = _start(home, points, k, init, spherical, rng)
            sums = centroids
        scores, ids = address.nearest(points, centroids, 1, metric)
        codes, scores = ids[:, 0], scores[:, 0]
        objective.append(float(scores.mean(dtype=home.xp.float64)) if points.shape[0] else 0.0)
        means, order, first, counts = _clusters(home, points, codes, k)
        seen += counts
        share = home.kind.cast(home.bring(counts / np.maximum(seen, 1)), F32)[:, None]
        sums = sums + (means - sums) * share
        centroids = home.normalise(sums) if spherical else sums
        if not seen.all():  # never given a point: begin again elsewhere
            centroids = centroids.clone() if home.kind.name == "torch" else centroids.copy()
            lonely = np.where((counts == 0) & (seen > 0), 1, counts)
            _reseed(points, centroids, order, first, lonely, scores if metric == "l2" else -scores)
            sums = centroids
        bar.tick()
    if centroids is None:
        raise ValueError("x gave no batch")
    native = like[0] if isinstance(like, (list, tuple)) else like
    result = deliver(home, (centroids,), native)[0] if not hasattr(like, "__next__") else centroids
    return KMeans(result, np.array(objective))


def _on_gpu(home: Home) -> bool:
    return home.kind.cuda and home.kind.kernels is not None


def _launch_means(home: Home, points: Any, codes: Any, k: int) -> tuple[Any, Any, Any]:
    """Means of the clusters, the points sorted by cluster, and where each begins, on a GPU: no waiting."""
    kind, (n, d) = home.kind, points.shape
    points, codes = kind.dense(points), kind.dense(codes)
    means, order, first = home.empty((k, d), F32), home.empty((n,), I64), home.empty((k + 1,), I64)
    scratch = kind.scratch("cluster_means", points, n, d, k)
    kind.kernels.cluster_means(
        kind.ptr(points), n, d, kind.ptr(codes), k, kind.ptr(means), kind.ptr(order), kind.ptr(first),
        *kind.launch(points, scratch),
    )  # fmt: skip
    return means, order, first


def _clusters(home: Home, points: Any, codes: Any, k: int, ahead: Any = None) -> tuple[Any, Any, Any, Any]:
    """Means, the points sorted by cluster (stable), and on the host where each cluster begins and its size.

    ``ahead``: what `_launch_means` gave, where it was called already.
    """
    if _on_gpu(home):
        means, order, first = ahead or _launch_means(home, points, codes, k)
        first = HOST.bring(first)
        return means, order, first[:-1], np.diff(first)
    order = home.argsort(codes, k)
    first = HOST.bring(home.xp.searchsorted(codes[order], home.positions(np.arange(k))))
    counts = np.diff(first, append=len(points))
    return _means(home, points, order, first, counts), order, first, counts


def _means(home: Home, points: Any, order: Any, first: np.ndarray, counts: np.ndarray) -> Any:
    """Means of the clusters, whose members begin at ``first`` in ``order``; zeros for an empty one.

    float32 sums of many terms lose digits (of a million points all of them, where the mean is large beside
    the spread), so large clusters are summed in pieces, and the pieces in turn.
    """
    if counts.max() <= 4 * _PIECE:
        return gather.bag(points, order, home.positions(first), mode="mean")
    rows, lengths = points, counts
    while lengths.max() > _PIECE:
        n = int(lengths.sum())
        pieces = np.union1d(first[first < n], np.arange(0, n, _PIECE))
        rows = gather.bag(rows, order, home.positions(pieces), mode="sum")
        first = np.searchsorted(pieces, first)
        order = home.arange(len(pieces))
        lengths = np.diff(first, append=len(pieces))
    sums = gather.bag(rows, order, home.positions(first), mode="sum")
    return sums / home.kind.cast(home.positions(np.maximum(counts, 1)), F32)[:, None]


def _reseed(
    points: Any, centroids: Any, order: Any, first: np.ndarray, counts: np.ndarray, distances: Any
) -> None:
    """Give each empty cluster the farthest point of the cluster that is the largest at its turn."""
    shares = counts.copy()  # what is left of each cluster after those that were split off
    members: dict[int, list[int]] = {}  # points that are left to choose, the farthest last
    for cluster in np.flatnonzero(counts == 0).tolist():
        largest = int(shares.argmax())
        if shares[largest] < 2:
            break
        if largest not in members:
            inside = order[int(first[largest]) : int(first[largest] + counts[largest])]
            by_distance = np.argsort(HOST.bring(distances[inside]), kind="stable")
            members[largest] = HOST.bring(inside)[by_distance].tolist()
        centroids[cluster] = points[members[largest].pop()]
        shares[cluster] = shares[largest] // 2
        shares[largest] -= shares[cluster]
        members[cluster] = members[largest]  # its points are among those of the one it was split from


def _random(home: Home, points: Any, k: int, rng: np.random.Generator) -> np.ndarray:
    """k points at random, different ones as far as a few draws can find them."""
    draws = rng.permutation(len(points))
    pool = k
    while True:
        rows = HOST.bring(points[home.positions(draws[:pool])]) + np.float32(0)  # -0.0 becomes 0.0
        _, first = np.unique(rows.view(np.dtype((np.void, rows.shape[1] * 4))), return_index=True)
        if len(first) >= k or pool >= len(points):
            break
        pool *= 4
    first.sort()
    again = np.setdiff1d(np.arange(k), first[:k])[
        : k - min(k, len(first))
    ]  # where all the different are too few
    return draws[np.concatenate([first[:k], again])]


def _plus_plus(home: Home, points: Any, k: int, rng: np.random.Generator) -> np.ndarray:
    """k points, each with a probability in proportion to its squared distance from those before."""
    if home.kind.cuda:
        return _plus_plus_on_gpu(home, points, k, rng)
    xp = home.xp
    chosen = [int(rng.integers(len(points)))]
    distances = None
    for _ in range(k - 1):
        new = ((points - points[chosen[-1]]) ** 2).sum(1)
        distances = new if distances is None else xp.minimum(distances, new)
        cumulative = HOST.bring(distances).cumsum(dtype=np.float64)
        total = cumulative[-1]
        if total > 0:
            slot = int(np.searchsorted(cumulative, rng.random() * total, side="right"))
            chosen.append(min(slot, len(points) - 1))
        else:  # every point is a centroid already
            chosen.append(int(rng.integers(len(points))))
    return np.array(chosen)


def _plus_plus_on_gpu(home: Home, points: Any, k: int, rng: np.random.Generator) -> np.ndarray:
    """The same without a word to the host before the end.

    Distances are added as integers, a share of the largest each: floating-point sums of a GPU's cumulative
    sum depend on which block comes first.
    """
    xp, n = home.xp, len(points)
    scale = float(2 ** min(40, 62 - n.bit_length()))
    draws = home.bring(rng.random(k))
    chosen = home.kind.cast(draws * n, I64).clip(0, n - 1)  # where all distances are 0
    distances: Any = None
    for i in range(1, k):
        new = address.nearest(points, points[chosen[i - 1 : i]], 1, "l2").scores[:, 0]
        distances = new if distances is None else xp.minimum(distances, new)
        largest = distances.max()
        shares = home.kind.cast(distances, F64) * (scale / xp.where(largest > 0, largest, 1))
        cumulative = home.kind.cast(shares, I64).cumsum(0)
        wanted = home.kind.cast(draws[i : i + 1] * home.kind.cast(cumulative[-1:], F64), I64)
        slot = home.after(cumulative, wanted).clip(0, n - 1)
        chosen[i : i + 1] = xp.where(cumulative[-1:] > 0, slot, chosen[i : i + 1])
    return HOST.bring(chosen)
