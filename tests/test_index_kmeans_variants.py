"""k-means with bounded clusters and in batches; the assignment of many dimensions and centroids is exact."""

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.index import balanced_assignment, kmeans

pytestmark = pytest.mark.filterwarnings("ignore:.* points for .* centroids")


def blobs(n, k, d, seed=0, spread=0.1):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((k, d)).astype(np.float32)
    return centers[rng.integers(0, k, n)] + np.float32(spread) * rng.standard_normal(
        (n, d), np.float32
    ), centers


def objective(x, c):
    x, c = x.astype(np.float64), c.astype(np.float64)
    return ((x**2).sum(1)[:, None] - 2 * x @ c.T + (c**2).sum(1)).min(1).mean()


def lloyd(x, c, rounds):
    """Plain Lloyd in float64."""
    c = c.astype(np.float64)
    for _ in range(rounds):
        s = (c**2).sum(1) - 2 * x.astype(np.float64) @ c.T
        codes = s.argmin(1)
        c = np.array([x[codes == i].mean(0, dtype=np.float64) for i in range(len(c))])
    return c


@pytest.mark.skipif(_backend.core is None, reason="takes the reference too long")
@pytest.mark.parametrize("spherical", [False, True])
def test_many_centroids_are_those_of_plain_lloyd(simd_level, monkeypatch, spherical):
    """k and d for which the assignment is screened: the same clusters, round by round."""
    x, _ = blobs(6000, 200, 40, spread=0.5)
    start = np.arange(0, 6000, 40)
    monkeypatch.setattr(lutra.index._kmeans, "_random", lambda *a: start)
    if spherical:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    got, values = kmeans(x, 150, n_iter=4, spherical=spherical)
    if spherical:
        c = x[start].astype(np.float64)
        for _ in range(4):
            codes = (x @ c.T).argmax(1)
            c = np.array([x[codes == i].mean(0, dtype=np.float64) for i in range(150)])
            c /= np.linalg.norm(c, axis=1, keepdims=True)
        np.testing.assert_allclose(got, c, atol=1e-4)
        return
    np.testing.assert_allclose(got, lloyd(x, x[start], 4), atol=1e-4)
    assert values[3] == pytest.approx(objective(x, lloyd(x, x[start], 3)), rel=1e-5)


@pytest.mark.parametrize("slack", [1, 1.1, True])
def test_sizes_are_bounded(slack):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((900, 5)) * 0.1, rng.standard_normal((101, 5)) + 4]).astype(
        np.float32
    )
    plain, _ = kmeans(x, 10, init="k-means++")
    codes = lutra.address.nearest(x, plain).ids[:, 0]
    most = np.ceil((1.25 if slack is True else slack) * 1001 / 10)
    assert np.bincount(codes, minlength=10).max() > most
    centroids, values = kmeans(x, 10, balanced=slack, init="k-means++", n_iter=8)
    codes = balanced_assignment(x, centroids, slack=slack if slack is not True else 1.25)
    assert codes.shape == (1001,) and codes.dtype == np.int64
    assert np.bincount(codes, minlength=10).max() <= most
    assert values[-1] < values[0]


def test_balanced_assignment_is_nearest_where_there_is_room():
    x, centers = blobs(300, 6, 4)
    codes = balanced_assignment(x, centers, slack=6)
    np.testing.assert_array_equal(codes, lutra.address.nearest(x, centers).ids[:, 0])
    for metric, line in (("l2", [0, 1, 2, 3]), ("ip", [3, 2, 1, 0])):
        # all ask for one centroid, which takes the two nearest; the others go on
        x = np.array([[1.0], [2], [3], [4]], np.float32)[line]
        c = np.array([[0.0], [-100]], np.float32) if metric == "l2" else np.array([[1.0], [-1]], np.float32)
        got = balanced_assignment(x, c, slack=1, metric=metric)
        np.testing.assert_array_equal(got, [0, 0, 1, 1])
    equal = balanced_assignment(np.zeros((5, 2), np.float32), np.zeros((5, 2), np.float32), slack=1)
    np.testing.assert_array_equal(equal, np.arange(5))


def test_batches_come_near_to_all_at_once():
    x = np.random.default_rng(0).standard_normal((8000, 6)).astype(np.float32)
    whole, _ = kmeans(x, 20, init="k-means++", max_points_per_centroid=None)
    some, values = kmeans(x, 20, init="k-means++", batch_size=500, n_iter=40)
    assert len(values) == 40 and some.shape == (20, 6) and some.dtype == np.float32
    assert objective(x, some) < 1.1 * objective(x, whole)
    again, _ = kmeans(x, 20, init="k-means++", batch_size=500, n_iter=40)
    np.testing.assert_array_equal(some, again)


def test_a_centroid_is_the_mean_of_all_that_it_was_given(monkeypatch):
    x, _ = blobs(60, 4, 3)
    start = np.array([0, 1, 2, 3])
    monkeypatch.setattr(lutra.index._kmeans, "_random", lambda *a: start)
    parts = [x[:20], x[20:45], x[45:]]
    got, values = kmeans(iter(parts), 4)
    c, given = x[:4].astype(np.float64), [[] for _ in range(4)]
    for part, value in zip(parts, values):
        s = ((part[:, None] - c) ** 2).sum(-1)
        assert value == pytest.approx(s.min(1).mean(), rel=1e-4)
        for row, code in zip(part, s.argmin(1)):
            given[code].append(row)
        c = np.array([np.mean(g, 0) if g else c[i] for i, g in enumerate(given)])
    np.testing.assert_allclose(got, c, atol=1e-5)


def test_mapped_files_and_streams(tmp_path):
    x, _ = blobs(3000, 8, 5)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    got, _ = kmeans(mapped, 8, batch_size=200, seed=3)
    np.testing.assert_array_equal(got, kmeans(x, 8, batch_size=200, seed=3).centroids)
    stream = kmeans((x[i : i + 500] for i in range(0, 3000, 500)), 8, seed=3)
    assert len(stream.objective) == 6
    listed = kmeans([x[i : i + 500] for i in range(0, 3000, 500)], 8, seed=3, n_iter=4)
    np.testing.assert_array_equal(listed.objective, stream.objective[:4])
    unit, _ = kmeans(x, 8, batch_size=200, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)


def test_centroids_that_get_no_point_begin_again():
    x = np.zeros((1000, 3), np.float32)
    x[:100] = np.random.default_rng(0).standard_normal((100, 3)) + 5
    got, _ = kmeans(x, 30, batch_size=400, n_iter=30)
    assert len(np.unique(lutra.address.nearest(x, got).ids)) >= 25


def test_torch():
    torch = pytest.importorskip("torch")
    x, _ = blobs(500, 5, 4)
    t = torch.from_numpy(x)
    for options in ({"batch_size": 100}, {"balanced": True}):
        got = kmeans(t, 5, **options).centroids
        assert isinstance(got, torch.Tensor)
        np.testing.assert_array_equal(got.numpy(), kmeans(x, 5, **options).centroids)
    codes = balanced_assignment(t, got)
    assert isinstance(codes, torch.Tensor)
    assert lutra.quant.kmeans is kmeans


def test_bad_input():
    x = np.zeros((50, 2), np.float32)
    with pytest.raises(ValueError, match="slack must be at least 1"):
        kmeans(x, 2, balanced=0.5)
    with pytest.raises(ValueError, match="balanced needs all vectors"):
        kmeans(x, 2, balanced=True, batch_size=10)
    with pytest.raises(ValueError, match="batch_size must be >= 5"):
        kmeans(x, 5, batch_size=4)
    with pytest.raises(ValueError, match="x has 50 rows; at least 51"):
        kmeans(x, 51, batch_size=60)
    with pytest.raises(ValueError, match="the first batch has 3 rows"):
        kmeans(iter([x[:3]]), 5)
    with pytest.raises(ValueError, match="gave no batch"):
        kmeans(iter([]), 5)
    with pytest.raises(ValueError, match=r"x\[1\] has 3 columns"):
        kmeans(iter([x, np.zeros((5, 3), np.float32)]), 5)
    bad = x[:5].copy()
    bad[2, 0] = np.nan
    with pytest.raises(ValueError, match=r"x\[1\]\[2, 0\] is nan"):
        kmeans(iter([x, bad]), 5)
    with pytest.raises(ValueError, match="centroids has 3 columns"):
        balanced_assignment(x, np.zeros((5, 3), np.float32))
