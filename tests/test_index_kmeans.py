"""lutra.index.kmeans: against a plain Lloyd in float64, empty clusters, sampling, determinism, bad input."""

import numpy as np
import pytest

import lutra
from lutra.index import kmeans
from lutra.index._home import HOST, Home
from lutra.index._kmeans import _means, _plus_plus, _random, _reseed

pytestmark = pytest.mark.filterwarnings("ignore:.* points for .* centroids")


def blobs(n, k, d, seed=0, spread=0.05):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((k, d))
    return (centers[np.arange(n) % k] + spread * rng.standard_normal((n, d))).astype(np.float32), centers


def distances(x, c):
    return ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(-1)


def objective(x, c):
    return distances(x, c).min(1).mean()


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("n,k,d", [(1, 1, 1), (5, 5, 3), (64, 3, 1), (300, 17, 5), (1000, 16, 33)])
def test_each_centroid_is_the_mean_of_its_points(init, n, k, d):
    """At convergence, and in few iterations here: Lloyd's fixed point."""
    x, _ = blobs(n, k, d)
    centroids, objectives = kmeans(x, k, n_iter=100, init=init)
    assert centroids.shape == (k, d) and centroids.dtype == np.float32
    assert len(objectives) < 100, "converges before"
    nearest = distances(x, centroids).argmin(1)
    for c in np.unique(nearest):
        np.testing.assert_allclose(centroids[c], x[nearest == c].mean(0, dtype=np.float64), atol=1e-5)
    assert objectives[-1] == pytest.approx(objective(x, centroids), rel=1e-4, abs=1e-6)


def test_one_iteration_is_lloyds(monkeypatch):
    x = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32)
    start = np.arange(0, 500, 50)
    monkeypatch.setattr(lutra.index._kmeans, "_random", lambda *a: start)
    centroids, (first,) = kmeans(x, 10, n_iter=1)
    nearest = distances(x, x[start]).argmin(1)
    want = np.array([x[nearest == c].mean(0, dtype=np.float64) for c in range(10)])
    np.testing.assert_allclose(centroids, want, atol=1e-5)
    assert first == pytest.approx(objective(x, x[start]), rel=1e-5)


def test_objective_falls_and_is_near_the_best_of_many():
    x = np.random.default_rng(3).standard_normal((2000, 6)).astype(np.float32)
    for init in ("random", "k-means++"):
        centroids, objectives = kmeans(x, 32, init=init)
        assert (np.diff(objectives) <= 1e-6).all()
        assert objective(x, centroids) <= objectives[-1] + 1e-6
        assert objectives[-1] < 0.9 * objectives[0]


def test_plus_plus_finds_separate_clusters():
    x, centers = blobs(400, 20, 8, spread=0.01)
    for seed in range(5):
        centroids, _ = kmeans(x, 20, init="k-means++", seed=seed)
        assert distances(centers, centroids).min(1).max() < 0.01


def test_empty_clusters_are_given_points():
    """9 of 10 points are one point: a random start has it several times, and clusters fall empty."""
    rng = np.random.default_rng(0)
    x = np.zeros((1000, 3), np.float32)
    x[:100] = rng.standard_normal((100, 3)) + 5
    for seed in range(5):
        centroids, _ = kmeans(x, 50, seed=seed)
        used = np.unique(distances(x, centroids).argmin(1))
        assert len(used) == 50


def test_reseed_takes_the_farthest_points_of_the_largest():
    x = np.arange(12, dtype=np.float32)[:, None]
    codes = np.array([0] * 8 + [2] * 3 + [4])
    order = np.argsort(codes, kind="stable")
    first = np.searchsorted(codes[order], np.arange(5))
    centroids = np.array([[3.5], [0], [9], [0], [11]], np.float32)
    gap = np.abs(x - centroids[codes])[:, 0]
    _reseed(x, centroids, order, first, np.bincount(codes, minlength=5), gap)
    # cluster 0 (0..7) is the largest and gives its farthest, the later of two equals first; then it counts 4,
    # as much as the new cluster, and still is the first of the largest
    np.testing.assert_array_equal(centroids[:, 0], [3.5, 7, 9, 0, 11])


def test_fewer_distinct_points_than_centroids():
    x = np.repeat(np.eye(3, dtype=np.float32), 20, 0)
    centroids, objectives = kmeans(x, 10, seed=1)
    assert np.isfinite(centroids).all() and objectives[-1] == 0
    assert distances(x, centroids).min(1).max() == 0


def test_starts():
    rng = np.random.default_rng(0)
    x = np.zeros((500, 2), np.float32)
    x[::10] = rng.standard_normal((50, 2))
    chosen = _random(HOST, x, 30, rng)
    assert len(np.unique(x[chosen], axis=0)) >= 25  # 4.6 would be expected of a blind choice
    chosen = _plus_plus(HOST, x, 51, rng)
    assert len(np.unique(x[chosen], axis=0)) == 51
    assert len(_plus_plus(HOST, np.zeros((5, 2), np.float32), 4, rng)) == 4


@pytest.mark.parametrize("home", ["numpy", "torch"])
def test_means_of_large_clusters_keep_their_digits(home):
    """A running float32 sum of 300,000 values near 100 is off by more than their whole spread."""
    where = HOST
    if home == "torch":
        torch = pytest.importorskip("torch")
        where = Home(lutra._arrays.torch_kind(False), torch.empty(0))
    rng = np.random.default_rng(0)
    x = rng.random((300_000, 3), dtype=np.float32) * np.float32(0.1) + 100
    counts = np.array([0, 5, 250_000, 0, 0, 256, 257, 0, 1025, 300_000 - 251_543, 0, 0])
    order = rng.permutation(len(x))
    first = np.cumsum(counts) - counts
    got = np.asarray(_means(where, where.bring(x), where.bring(order), first, counts))
    for c, count in enumerate(counts):
        want = x[order[first[c] : first[c] + count]].mean(0, dtype=np.float64) if count else 0
        np.testing.assert_allclose(got[c], want, atol=1e-4)


def test_spherical():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    centroids, objectives = kmeans(x, 12, spherical=True, n_iter=50)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    assert (np.diff(objectives) >= -1e-6).all()
    nearest = (x @ centroids.T).argmax(1)
    for c in range(12):
        mean = x[nearest == c].mean(0, dtype=np.float64)
        np.testing.assert_allclose(centroids[c], mean / np.linalg.norm(mean), atol=1e-3)


def test_same_bits_for_a_seed_whatever_the_threads(threads):
    x = np.random.default_rng(0).standard_normal((5000, 7)).astype(np.float32)
    centroids, _ = kmeans(x, 64, seed=5, n_iter=8)
    lutra.set_num_threads(1)
    again, _ = kmeans(x, 64, seed=5, n_iter=8)
    np.testing.assert_array_equal(centroids, again)
    other, _ = kmeans(x, 64, seed=6, n_iter=8)
    assert not np.array_equal(centroids, other)


def test_sampling():
    x = np.random.default_rng(0).standard_normal((5000, 3)).astype(np.float32)
    x[0] = np.nan  # looked at only where it is in the sample
    some, _ = kmeans(x, 4, max_points_per_centroid=10, n_iter=3)
    assert np.isfinite(some).all()
    with pytest.raises(ValueError, match=r"x\[0, 0\] is nan"):
        kmeans(x, 4, max_points_per_centroid=None)
    x[0], x[4321, 2] = 0, np.inf
    with pytest.raises(ValueError, match=r"x\[4321, 2\] is inf"):
        kmeans(x, 4, max_points_per_centroid=1249)


def test_kinds_and_dtypes():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(-20, 20, (300, 4)).astype(np.float32)
    want, objectives = kmeans(x, 8)
    for same in (x.astype(np.float64), x.astype(np.float16), x.astype(np.int8), np.asfortranarray(x)):
        np.testing.assert_array_equal(kmeans(same, 8).centroids, want)
    tensor = kmeans(torch.from_numpy(x), 8)
    assert isinstance(tensor.centroids, torch.Tensor) and isinstance(tensor.objective, np.ndarray)
    np.testing.assert_array_equal(tensor.centroids.numpy(), want)
    np.testing.assert_array_equal(tensor.objective, objectives)


@pytest.mark.parametrize("options", [{}, {"init": "k-means++"}, {"spherical": True}], ids=str)
def test_homes_other_than_numpy(monkeypatch, options):
    """The way of arrays on a GPU, with torch's CPU tensors in their place."""
    torch = pytest.importorskip("torch")
    from lutra._arrays import torch_kind

    rng = np.random.default_rng(0)
    x = np.concatenate([np.zeros((500, 4)), rng.integers(-9, 9, (100, 4))]).astype(np.float32)
    want, objectives = kmeans(x, 30, **options)
    monkeypatch.setattr(lutra.index._kmeans, "home_of", lambda a: Home(torch_kind(False), torch.empty(0)))
    got = kmeans(torch.from_numpy(x), 30, **options)
    np.testing.assert_allclose(got.centroids.numpy(), want, atol=1e-5)
    np.testing.assert_allclose(got.objective, objectives, rtol=1e-5)


def test_progress(capsys):
    pytest.importorskip("tqdm")
    x = np.random.default_rng(0).standard_normal((100, 2)).astype(np.float32)
    kmeans(x, 2, progress=None)
    kmeans(x, 2, progress=False)
    assert capsys.readouterr().err == ""
    kmeans(x, 2, progress=True, n_iter=7)
    assert "7/7" in capsys.readouterr().err
    with pytest.raises(TypeError, match="progress must be"):
        kmeans(x, 2, progress="yes")


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    x = np.random.default_rng(0).standard_normal((100, 2)).astype(np.float32)
    kmeans(x, 2)
    with pytest.raises(ImportError, match="pip install tqdm"):
        kmeans(x, 2, progress=True)


def test_few_points_are_warned_of():
    x = np.random.default_rng(0).standard_normal((77, 2)).astype(np.float32)
    with pytest.warns(UserWarning, match="77 points for 2 centroids; at least 78 are advisable") as seen:
        kmeans(x, 2)
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    "error,match,args,options",
    [
        (TypeError, "x must be", ([[1.0]], 1), {}),
        (ValueError, "x must be 2-d", (np.zeros(3, np.float32), 1), {}),
        (TypeError, "x has dtype int64", (np.zeros((3, 1), np.int64), 1), {}),
        (ValueError, "x has 3 rows; at least 4", (np.zeros((3, 1), np.float32), 4), {}),
        (ValueError, "k must be >= 1", (np.zeros((3, 1), np.float32), 0), {}),
        (TypeError, "k must be an integer", (np.zeros((3, 1), np.float32), 1.5), {}),
        (ValueError, "n_iter must be >= 1", (np.zeros((3, 1), np.float32), 1), {"n_iter": 0}),
        (ValueError, "init must be one of", (np.zeros((3, 1), np.float32), 1), {"init": "best"}),
        (
            ValueError,
            "max_points_per_centroid must be >= 1",
            (np.zeros((3, 1), np.float32), 1),
            {"max_points_per_centroid": 0},
        ),
    ],
)
def test_bad_input(error, match, args, options):
    with pytest.raises(error, match=match):
        kmeans(*args, **options)
