"""k-means on CUDA: means of clusters, whole runs, training of indexes and quantizers."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import SIZES, close, same_bits

import lutra
from lutra.index import _kmeans, kmeans
from lutra.index._home import HOST, home_of

pytestmark = pytest.mark.filterwarnings("ignore:.* points for .* centroids")


def means_of(x, codes, k):
    out = np.zeros((k, x.shape[1]))
    for c in range(k):
        if (codes == c).any():
            out[c] = x[codes == c].mean(0, dtype=np.float64)
    return out


def clusters(gpu, x, codes, k):
    points = gpu.put(x)
    return _kmeans._clusters(home_of(points), points, gpu.put(codes), k)


def check(gpu, x, codes, k):
    means, order, first, counts = clusters(gpu, x, codes, k)
    inside = np.where((codes >= 0) & (codes < k), codes, k)
    np.testing.assert_array_equal(gpu.get(order), np.argsort(inside, kind="stable"))
    np.testing.assert_array_equal(counts, np.bincount(inside, minlength=k + 1)[:k])
    np.testing.assert_array_equal(first, np.cumsum(counts) - counts)
    close(gpu.get(means), means_of(x, codes, k), factor=0.2)
    return gpu.get(means)


@pytest.mark.parametrize("d", [*SIZES, 4, 8, 128, 132, 300])
def test_means(gpu, d):
    rng = np.random.default_rng(d)
    for n, k in ((1, 1), (63, 1), (64, 2), (65, 3), (129, 7), (1000, 5), (3000, 1500)):
        x = rng.standard_normal((n, d)).astype(np.float32)
        check(gpu, x, rng.integers(0, k, n), k)


@pytest.mark.sanitize
def test_clusters_at_the_borders_of_tiles(gpu):
    rng = np.random.default_rng(0)
    for sizes in ([64, 64], [63, 1, 64], [1, 127, 0, 64, 200], [0, 0, 300, 0], [640, 1], [10, 54, 10]):
        codes = np.repeat(np.arange(len(sizes)), sizes)
        x = rng.integers(-9, 10, (len(codes), 5)).astype(np.float32)
        order = rng.permutation(len(codes))
        got = check(gpu, x[order], codes[order], len(sizes))
        assert (got[np.array(sizes) == 0] == 0).all()


def test_codes_that_are_none_are_left_out(gpu):
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    check(gpu, x, np.array([1, -1, 0, 2, 2**40, 1]), 2)


def test_no_points(gpu):
    means, order, _, counts = clusters(gpu, np.empty((0, 3), np.float32), np.empty(0, np.int64), 4)
    assert gpu.get(order).shape == (0,) and (counts == 0).all() and (gpu.get(means) == 0).all()


def test_many_points_in_one_cluster_keep_their_digits(gpu):
    rng = np.random.default_rng(1)
    x = (1000 + rng.standard_normal((200_000, 3))).astype(np.float32)
    means = gpu.get(clusters(gpu, x, np.zeros(len(x), np.int64), 1)[0])
    np.testing.assert_allclose(means, x.mean(0, dtype=np.float64)[None], rtol=2e-7)


def test_same_bits(gpu):
    rng = np.random.default_rng(2)
    x, codes = rng.standard_normal((20_000, 24)).astype(np.float32), rng.integers(0, 30, 20_000)
    first = gpu.get(clusters(gpu, x, codes, 30)[0])
    for _ in range(5):
        same_bits(gpu.get(clusters(gpu, x, codes, 30)[0]), first)


def blobs(n, d, seed=0, centers=40):
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(9).standard_normal((centers, d)) * 3
    return (middle[rng.integers(0, centers, n)] + 0.2 * rng.standard_normal((n, d))).astype(np.float32)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_runs_as_on_the_cpu(gpu, init, spherical):
    x = blobs(4000, 16)
    if spherical:
        x = HOST.normalise(x)
    got = kmeans(gpu.put(x), 40, n_iter=8, init=init, spherical=spherical, seed=1)
    want = kmeans(x, 40, n_iter=8, init=init, spherical=spherical, seed=1)
    assert gpu.owns(got.centroids)
    if init == "random":  # the same draws: the same run, but for rounding
        np.testing.assert_allclose(got.objective[:2], want.objective[:2], rtol=1e-3)
    else:
        start = kmeans(x, 40, n_iter=1, spherical=spherical, seed=1).objective[0]
        assert got.objective[0] > start if spherical else got.objective[0] < start
    better = np.diff(got.objective)
    assert (better >= -1e-4).all() if spherical else (better <= 1e-3).all()
    again = kmeans(gpu.put(x), 40, n_iter=8, init=init, spherical=spherical, seed=1)
    same_bits(gpu.get(again.centroids), gpu.get(got.centroids))


def test_empty_clusters_begin_again(gpu):
    x = np.repeat(np.eye(6, dtype=np.float32), [200, 1, 1, 1, 1, 1], 0)
    got = kmeans(gpu.put(x), 6, n_iter=20, seed=0)
    assert got.objective[-1] < 1e-6  # every different point has a centroid in the end


def test_batches_and_balance(gpu):
    x = blobs(3000, 8)
    parts = [gpu.put(x[i : i + 500]) for i in range(0, 3000, 500)]
    assert gpu.owns(kmeans(parts, 10).centroids)
    assert gpu.owns(kmeans(gpu.put(x), 10, batch_size=400, n_iter=4).centroids)
    codes = gpu.get(lutra.index.balanced_assignment(gpu.put(x), gpu.put(x[:10])))
    np.testing.assert_array_equal(codes, lutra.index.balanced_assignment(x, x[:10]))


def test_plus_plus_spreads(gpu):
    x = blobs(2000, 4, centers=12)
    found = kmeans(gpu.put(x), 12, n_iter=1, init="k-means++", seed=3)
    assert found.objective[0] < kmeans(x, 12, n_iter=1, init="random", seed=3).objective[0]
    same = np.ones((50, 3), np.float32)
    assert kmeans(gpu.put(same), 4, init="k-means++").objective[-1] == 0
