"""address.nearest with k = 1 and many centroids: exact behind a screen (csrc/address/assign.cc)."""

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra._arrays import NUMPY
from lutra.address import _nearest, nearest
from lutra.reference import scan as reference

pytestmark = pytest.mark.skipif(_backend.core is None, reason="the reference has one way only")


@pytest.fixture(params=(True, False), ids=("vnni", "no-vnni"))
def vnni(request, monkeypatch):
    monkeypatch.setattr(_nearest, "_VNNI", request.param)
    if request.param and not _backend.core.has_vnni():
        pytest.skip("no AVX-512 VNNI here")


def same(x, c, metric, got=None, rtol=1e-5):
    """The best by exact scores, but for rounding; 1 in 100 may be another one that is as good."""
    scores, ids = nearest(x, c, 1, metric) if got is None else got
    d = np.float64
    s = x.astype(d) @ c.astype(d).T
    if metric == "l2":
        s = s * -2 + np.square(x.astype(d)).sum(1)[:, None] + np.square(c.astype(d)).sum(1)
    best = s.min(1) if metric == "l2" else s.max(1)
    size = np.square(np.linalg.norm(x, axis=1).max() + np.linalg.norm(c, axis=1).max())
    np.testing.assert_allclose(np.take_along_axis(s, ids, 1)[:, 0], best, rtol=rtol, atol=rtol * size * 0.1)
    np.testing.assert_allclose(scores[:, 0], best, rtol=rtol, atol=rtol * size)
    return ids[:, 0]


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_exact_values_and_ties(simd_level, vnni, metric):
    rng = np.random.default_rng(0)
    for n, k, d in ((1, 128, 32), (15, 129, 33), (16, 130, 35), (17, 133, 63), (63, 257, 64), (65, 131, 97)):
        x, c = (rng.integers(-2, 3, (m, d)).astype(np.float32) for m in (n, k))
        c[k // 2 :] = c[: k - k // 2]  # every centroid twice: the first is the one
        got, want = nearest(x, c, 1, metric), reference.knn(x, c, 1, metric)
        np.testing.assert_array_equal(got.ids, want[1])
        np.testing.assert_array_equal(got.scores, want[0])


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["normal", "clusters", "heavy", "far", "one huge", "equal"])
def test_best_of_all(simd_level, vnni, metric, kind):
    rng = np.random.default_rng(1)
    x, c = (rng.standard_normal((m, 48)).astype(np.float32) for m in (500, 300))
    if kind == "clusters":
        x = c[rng.integers(0, 300, 500)] + np.float32(0.1) * x
    elif kind == "heavy":
        x, c = (rng.standard_t(2, (m, 48)).astype(np.float32) for m in (500, 300))
    elif kind == "far":
        x, c = x + np.float32(100), c + np.float32(100)
    elif kind == "one huge":
        c[7] *= 1e4
        x[:, 3] *= 100
    elif kind == "equal":  # more candidates than are remembered
        c[:] = c[0]
    ids = same(x, c, metric)
    if kind == "equal":
        assert (ids == 0).all()
    elif kind in ("normal", "clusters", "heavy"):
        assert (ids == reference.knn(x, c, 1, metric)[1][:, 0]).mean() > 0.99


def test_more_centroids_than_are_kept_at_once(simd_level):
    rng = np.random.default_rng(2)
    x, c = (rng.standard_normal((m, 32)).astype(np.float32) for m in (100, 5000))
    np.testing.assert_array_equal(same(x, c, "l2"), reference.knn(x, c, 1, "l2")[1][:, 0])


def test_same_bits_whatever_the_batch_and_the_threads(simd_level, threads):
    rng = np.random.default_rng(3)
    x, c = (rng.standard_normal((m, 40)).astype(np.float32) for m in (300, 200))
    whole = nearest(x, c)
    for a, b in ((0, 1), (1, 12), (12, 40), (40, 300)):
        part = nearest(x[a:b], c)
        np.testing.assert_array_equal(part.ids, whole.ids[a:b])
        np.testing.assert_array_equal(part.scores, whole.scores[a:b])


def test_some_rows():
    rng = np.random.default_rng(4)
    x, c = (rng.standard_normal((m, 40)).astype(np.float32) for m in (300, 200))
    whole = nearest(x, c)
    rows = np.sort(rng.choice(300, 77, replace=False))
    scores, ids = np.full((300, 1), -1, np.float32), np.full((300, 1), -1)
    _nearest.assign(NUMPY, x, c, "l2", rows, (scores, ids))
    np.testing.assert_array_equal(ids[rows], whole.ids[rows])
    np.testing.assert_array_equal(scores[rows], whole.scores[rows])
    assert (np.delete(ids, rows) == -1).all()


def test_few_scores_are_exact():
    rng = np.random.default_rng(5)
    x, c = (rng.standard_normal((m, 64)).astype(np.float32) for m in (5000, 512))
    counts = []
    _nearest.assign(NUMPY, x, c, "l2", counts=counts)
    assert 5000 <= counts[0] < 5000 * 8


@pytest.mark.parametrize("n", [3, 100])
def test_nan_and_huge_values(simd_level, n):
    rng = np.random.default_rng(6)
    x, c = (rng.standard_normal((m, 32)).astype(np.float32) for m in (n, 200))
    bad = c.copy()
    bad[77, 3] = np.nan
    with pytest.raises(ValueError, match="row 77 of centroids"):
        nearest(x, bad)
    bad = x.copy()
    bad[-1, 31] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        nearest(bad, c)
    big = x.copy()
    big[0] = 1e18
    same(big, c, "l2")
    far = nearest(big, c * np.float32(1e17))
    assert np.isfinite(far.scores).all() and (far.ids[:, 0] >= 0).all()


def test_torch_strided_and_gradient():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    x, c = (rng.standard_normal((m, 40)).astype(np.float32) for m in (60, 200))
    want = nearest(x, c)
    got = nearest(torch.from_numpy(x), torch.from_numpy(c))
    np.testing.assert_array_equal(got.ids.numpy(), want.ids)
    wide = np.zeros((60, 80), np.float32)
    wide[:, ::2] = x
    np.testing.assert_array_equal(nearest(wide[:, ::2], c).ids, want.ids)
    one = torch.from_numpy(x).requires_grad_()
    nearest(one, torch.from_numpy(c)).scores.sum().backward()
    np.testing.assert_allclose(one.grad.numpy(), 2 * (x - c[want.ids[:, 0]]), rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="centroids has dtype"):
        nearest(x, c.astype(np.float64))


def test_through_kmeans():
    """Each point is with its nearest centroid, as in any Lloyd iteration."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((6000, 32)).astype(np.float32)
    centroids, objective = lutra.index.kmeans(x, 128, n_iter=3)
    assert (np.diff(objective) < 0).all()
    same(x, centroids, "l2")
