"""Screened exact search (csrc/scan/screen.cc): the results of knn, whatever the codes lose."""

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import scan as exact
from lutra.reference import screen as reference
from lutra.scan import _screen, knn_screened, quantize_int8

METRICS = ("ip", "l2", "cosine")
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)


def data(n, d, nq, seed=0, kind="normal"):
    rng = np.random.default_rng([seed, n, d])
    if kind == "integers":  # ties, and exact sums in any order
        return (rng.integers(-3, 4, (m, d)).astype(np.float32) for m in (n, nq))
    if kind == "heavy":
        return (rng.standard_t(2, (m, d)).astype(np.float32) for m in (n, nq))
    return ((rng.standard_normal((m, d)) + 2).astype(np.float32) for m in (n, nq))


def check(q, x, k, metric, screen=None, rtol=1e-5, swaps=0.02, **options):
    screen = quantize_int8(x, metric) if screen is None else screen
    got = knn_screened(q, x, screen, k, metric, **options)
    keep = options.get("filter")
    rows = np.arange(len(x)) if keep is None else np.flatnonzero(keep)
    scores, ids = exact.knn(q, x[rows], k, metric)
    ids = np.where(ids < 0, -1, np.append(rows, -1)[ids])
    size = np.linalg.norm(q, axis=1).max() * np.linalg.norm(x, axis=1).max() if len(x) and len(q) else 1
    np.testing.assert_allclose(got.scores, scores, rtol=rtol, atol=rtol * (1 if metric == "cosine" else size))
    differ = got.ids != ids
    if differ.any():  # only among scores that are one score but for rounding
        np.testing.assert_allclose(
            got.scores[differ], scores[differ], rtol=rtol, atol=1e-6 * (1 if metric == "cosine" else size)
        )
        assert differ.mean() <= swaps
    return got


@pytest.fixture(params=(True, False), ids=("vnni", "no-vnni"))
def vnni(request, monkeypatch):
    monkeypatch.setattr(_screen, "_VNNI", request.param)
    if request.param and _backend.core is not None and not _backend.core.has_vnni():
        pytest.skip("no AVX-512 VNNI here")


@pytest.mark.parametrize("metric", METRICS)
def test_exact_values_and_ties_at_odd_sizes(simd_level, vnni, metric):
    for i, n in enumerate(SIZES):
        d, nq = SIZES[-1 - i], (1, 2, 3, 5, 6, 7, 9, 12, 13, 17, 31)[i]
        x, q = data(n, d, nq, kind="integers")
        for k in (1, 3, n + 2):
            got = knn_screened(q, x, quantize_int8(x, metric), k, metric)
            want = exact.knn(q, x, k, metric)
            if metric == "cosine":
                np.testing.assert_allclose(got.scores, want[0], atol=1e-6)
            else:
                np.testing.assert_array_equal(got.ids, want[1])
                np.testing.assert_array_equal(got.scores, want[0])


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_of_knn(simd_level, vnni, threads, metric, kind):
    for n, d, nq, k in ((3000, 64, 7, 10), (1500, 100, 40, 5), (700, 31, 3, 60)):
        x, q = data(n, d, nq, kind=kind)
        check(q, x, k, metric)


def test_codes_are_those_of_the_reference(simd_level):
    for normalize in (False, True):
        for n, d in ((2, 3), (33, 5), (100, 64), (47, 97)):
            x, _ = data(n, d, 1)
            metric = "cosine" if normalize else "ip"
            got, want = quantize_int8(x, metric), _screen.Screen(*reference.quantize_int8(x, normalize))
            assert [a.shape for a in got] == [a.shape for a in want]
            difference = np.abs(got.codes.astype(int) - want.codes)
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # halves round either way
            np.testing.assert_allclose(got.mean, want.mean, atol=1e-6)
            np.testing.assert_allclose(got.inverse, want.inverse, rtol=1e-4)
            np.testing.assert_allclose(got.half, want.half, rtol=1e-3, atol=1e-3)
            assert (got.bounds >= want.bounds * np.float32(0.99)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_bounds_hold_where_codes_are_worst(metric):
    """One huge value a row makes its codes coarse: all that matters is lost, and nothing may be missed."""
    rng = np.random.default_rng(0)
    x, q = (
        rng.standard_normal((2000, 32)).astype(np.float32),
        rng.standard_normal((20, 32)).astype(np.float32),
    )
    x[np.arange(2000), rng.integers(0, 32, 2000)] = 3e4
    check(q, x, 10, metric, rtol=1e-4, swaps=1)
    q[:, 0] = 1e5
    check(q, x, 10, metric, rtol=1e-4, swaps=1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("far", [10, 1e3])
def test_a_common_offset(metric, far):
    """Codes are of differences from the mean; scores are not."""
    x, q = data(2000, 24, 9)
    check(
        q + np.float32(far), x + np.float32(far), 10, metric, rtol=1e-4, swaps=0.02 if metric == "l2" else 1
    )


def test_zero_rows_and_queries(simd_level):
    x, q = data(100, 8, 4)
    x[::3], q[1] = 0, 0
    for metric in METRICS:
        check(q, x, 5, metric)
    check(q, np.zeros((50, 8), np.float32), 5, "l2")


def test_tiny_and_large_values(simd_level):
    x, q = data(500, 16, 5)
    for scale in (1e-18, 1e-10, 1e6, 1e12):
        for metric in ("ip", "cosine"):
            got = check(q, x * np.float32(scale), 5, metric)
            assert (got.ids == exact.knn(q, x * np.float32(scale), 5, metric)[1]).mean() > 0.98
    q[2] = 1e18  # scores beyond what the bounds are made for: knn
    check(q, x * np.float32(1e12), 5, "ip")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "uint8"])
def test_rows_of_other_types(simd_level, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 100, (300, 33)).astype(np.float32)
    q = rng.integers(-5, 5, (7, 33)).astype(np.float32)
    if dtype == "bfloat16":
        kind = pytest.importorskip("ml_dtypes").bfloat16
    else:
        kind = np.dtype(dtype)
    rows = x.astype(kind)
    for metric in METRICS:
        got = knn_screened(q, rows, quantize_int8(rows, metric), 5, metric)
        want = knn_screened(q, x, quantize_int8(x, metric), 5, metric)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_allclose(got.scores, want.scores, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_filters(simd_level, metric):
    x, q = data(900, 40, 8)
    mask = np.random.default_rng(1).random(900) < 0.1
    got = check(q, x, 10, metric, filter=mask)
    assert mask[got.ids].all()
    few = np.zeros(900, bool)
    few[[5, 7]] = True
    got = check(q, x, 4, metric, filter=few)
    assert (np.sort(got.ids[:, :2]) == [5, 7]).all() and (got.ids[:, 2:] == -1).all()
    same = knn_screened(q, x, quantize_int8(x, metric), 10, metric, filter=lambda ids: ids % 3 == 0)
    assert (same.ids % 3 == 0).all()


def test_same_results_whatever_the_batch_and_the_threads(simd_level, threads):
    x, q = data(5000, 48, 41)
    screen = quantize_int8(x, "l2")
    whole = knn_screened(q, x, screen, 10, "l2")
    for i in range(0, 41, 7):
        part = knn_screened(q[i : i + 7], x, screen, 10, "l2")
        np.testing.assert_array_equal(part.scores, whole.scores[i : i + 7])
        np.testing.assert_array_equal(part.ids, whole.ids[i : i + 7])


@pytest.mark.skipif(_backend.core is None, reason="the reference scans every row")
def test_few_rows_are_scored_exactly():
    rng = np.random.default_rng(0)
    x, q = (rng.standard_normal((m, 64)).astype(np.float32) for m in (50_000, 10))
    for metric in METRICS:
        counts = []
        _screen._knn_screened(
            lutra._arrays.NUMPY, q, x, *quantize_int8(x, metric), counts=counts, metric=metric
        )
        assert counts[0] / 10 < 500


def test_codes_in_parts_are_the_codes_at_once(simd_level):
    if _backend.core is None:
        pytest.skip("parts are the kernel's")
    x, _ = data(100, 20, 1)
    whole = quantize_int8(x)
    parts = list(_screen.empty(lutra._arrays.NUMPY, x, 100, 20))
    parts[3] = whole.mean
    for a, b in ((0, 7), (7, 16), (16, 47), (47, 100)):
        _screen.encode(lutra._arrays.NUMPY, x[a:b], a, False, parts)
    for got, want in zip(parts, whole):
        np.testing.assert_array_equal(got, want)


def test_empty():
    x = np.zeros((0, 4), np.float32)
    got = knn_screened(np.ones((2, 4), np.float32), x, quantize_int8(x), 3)
    assert (got.ids == -1).all() and (got.scores == -np.inf).all()
    y = np.ones((5, 4), np.float32)
    assert knn_screened(x, y, quantize_int8(y), 3).ids.shape == (0, 3)
    y = np.ones((5, 0), np.float32)
    got = knn_screened(np.ones((2, 0), np.float32), y, quantize_int8(y, "l2"), 2, "l2")
    np.testing.assert_array_equal(got.ids, [[0, 1], [0, 1]])


def test_bad_input():
    x, q = data(20, 4, 2)
    screen = quantize_int8(x)
    bad = x.copy()
    bad[7, 1] = np.nan
    with pytest.raises(ValueError, match="row 7 of x"):
        quantize_int8(bad)
    with pytest.raises(ValueError, match="row 7 of database is NaN"):
        knn_screened(q, np.where(np.arange(20)[:, None] == 7, np.float32(np.nan), x), screen, 20)
    with pytest.raises(ValueError, match="NaN"):
        knn_screened(np.full((1, 4), np.nan, np.float32), x, screen)
    with pytest.raises(TypeError, match=r"quantize_int8"):
        knn_screened(q, x, x)
    with pytest.raises(ValueError, match=r"screen.codes has shape"):
        knn_screened(q, x[:3], screen)
    with pytest.raises(ValueError, match="metric must be one of"):
        knn_screened(q, x, screen, metric="l1")
    with pytest.raises(ValueError, match="metric must be one of"):
        quantize_int8(x, "l1")
    with pytest.raises(ValueError, match="k must be"):
        knn_screened(q, x, screen, 0)
    with pytest.raises(ValueError, match="columns"):
        knn_screened(q[:, :3], x, screen)
    with pytest.raises(TypeError, match="dtype"):
        knn_screened(q, x.astype(np.int32), screen)


def test_float64_by_the_reference():
    x, q = data(50, 6, 3)
    got = knn_screened(q.astype(np.float64), x.astype(np.float64), quantize_int8(x), 4)
    assert got.scores.dtype == np.float64
    np.testing.assert_array_equal(got.ids, exact.knn(q, x, 4)[1])


def test_torch_and_its_gradient():
    torch = pytest.importorskip("torch")
    x, q = (torch.from_numpy(a) for a in data(60, 8, 5))
    screen = quantize_int8(x, "l2")
    assert all(isinstance(a, torch.Tensor) for a in screen)
    got = knn_screened(q, x, screen, 4, "l2", filter=torch.arange(60) % 2 == 0)
    assert isinstance(got.ids, torch.Tensor) and (got.ids % 2 == 0).all()
    one, two = q.clone().requires_grad_(), q.clone().requires_grad_()
    knn_screened(one, x, screen, 4, "l2").scores.sum().backward()
    lutra.scan.knn(two, x, 4, "l2").scores.sum().backward()
    torch.testing.assert_close(one.grad, two.grad)
    torch.library.opcheck(torch.ops.lutra.knn_screened.default, (q, x, *screen, None, 4, "ip"))
    torch.library.opcheck(torch.ops.lutra.quantize_int8.default, (x, False))


def test_real_data(data_folder):
    x = np.load(data_folder / "sift5k_5000x128_u8.npy")
    q = x[:200].astype(np.float32)
    for metric in METRICS:
        screen = quantize_int8(x[200:], metric)
        got = knn_screened(q, x[200:], screen, 10, metric)
        want = lutra.scan.knn(q, x[200:].astype(np.float32), 10, metric)
        same = [len(set(a) & set(b)) for a, b in zip(got.ids.tolist(), want.ids.tolist())]
        assert np.mean(same) >= 9.99
