"""The exact scans: every metric and storage, filters, ranges, and the same bits whatever the batch."""

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import scan as reference

METRICS = ("ip", "l2", "cosine", "l1", "linf", "poincare")
STORAGE = ("float32", "float16", "bfloat16", "int8", "uint8")
compiled = pytest.mark.skipif(_backend.core is None, reason="of the kernels")


def stored(x, dtype):
    """Vectors in a storage type, and what they then are in float32."""
    if dtype == "bfloat16":
        bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
        x = x.astype(bfloat16)
    elif dtype == "uint8":
        x = np.clip(x * 4 + 100, 0, 255).astype(np.uint8)
    elif dtype == "int8":
        x = np.clip(x * 4, -128, 127).astype(np.int8)
    else:
        x = x.astype(dtype)
    return x, x.astype(np.float32)


def vectors(rng, metric, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    if metric == "poincare":
        x *= (rng.random((shape[0], 1)) ** 0.2 * 0.99 / np.linalg.norm(x, axis=1, keepdims=True)).astype(
            np.float32
        )
    return x


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 2, 15, 17, 64, 97])
def test_every_metric_against_float64(simd_level, metric, d):
    rng = np.random.default_rng(d)
    for nq, n in ((1, 300), (3, 70), (6, 401), (11, 64), (19, 333), (50, 500)):
        q, x = vectors(rng, metric, nq, d), vectors(rng, metric, n, d)
        got = lutra.scan.knn(q, x, 12, metric)
        want = reference.knn(q.astype(np.float64), x.astype(np.float64), 12, metric)
        np.testing.assert_allclose(got.scores, want[0], rtol=2e-5, atol=1e-5)
        every = reference.pairwise(q.astype(np.float64), x.astype(np.float64), metric)
        np.testing.assert_allclose(np.take_along_axis(every, got.ids, 1), want[0], rtol=2e-5, atol=1e-5)
        order = np.diff(got.scores, axis=1)
        assert (order >= 0).all() if metric in reference.DISTANCES else (order <= 0).all()


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("metric", METRICS[:5])
def test_every_storage_is_its_float32(simd_level, metric, dtype):
    """Values are exact in float32, so results are those of the converted database, to the bit."""
    rng = np.random.default_rng(1)
    for nq, d in ((1, 5), (4, 33), (9, 128), (20, 31), (49, 64)):
        x, wide = stored(vectors(rng, metric, 777, d), dtype)
        q = vectors(rng, metric, nq, d)
        got, want = lutra.scan.knn(q, x, 9, metric), lutra.scan.knn(q, wide, 9, metric)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.scores, want.scores)
        assert got.scores.dtype == np.float32
        q, wide_q = stored(q, dtype)  # queries in the database's type
        got, want = lutra.scan.knn(q, x, 9, metric), lutra.scan.knn(wide_q, wide, 9, metric)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.scores, want.scores)
        candidates = rng.integers(-1, 777, (nq, 40))
        got = lutra.scan.rescore(q, x, candidates, 9, metric)
        want = lutra.scan.rescore(wide_q, wide, candidates, 9, metric)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.scores, want.scores)


@compiled
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_bits_do_not_depend_on_the_batch(simd_level, metric, dtype):
    """Alone, in any batch, by rescore and by range_search: the same scores and ids."""
    rng = np.random.default_rng(2)
    if (metric, dtype) == ("poincare", "int8"):
        pytest.skip("nothing but zero lies in the unit ball")
    for d, n, k in ((33, 1500, 10), (128, 900, 100)):
        # clusters of near-equal rows, some of them equal: the order of sums decides who is among the k
        centres = vectors(rng, metric, n // 30, d)
        noise = 2e-7 * rng.standard_normal((n, d)).astype(np.float32) * (rng.random((n, 1)) < 0.8)
        x, wide = stored(np.repeat(centres, 30, 0) + noise.astype(np.float32), dtype)
        q = (wide[rng.integers(0, n, 70)] * np.float32(0.93)).astype(np.float32)
        alone = [lutra.scan.knn(q[i : i + 1], x, k, metric) for i in range(70)]
        scores = np.concatenate([a.scores for a in alone])
        ids = np.concatenate([a.ids for a in alone])
        for batch in (2, 3, 5, 7, 12, 13, 16, 17, 31, 48, 50, 70):
            got = lutra.scan.knn(q[:batch], x, k, metric)
            np.testing.assert_array_equal(got.scores, scores[:batch])
            np.testing.assert_array_equal(got.ids, ids[:batch])
        every = np.tile(np.arange(n), (70, 1))
        got = lutra.scan.rescore(q, x, every, k, metric)
        np.testing.assert_array_equal(got.scores, scores)
        np.testing.assert_array_equal(got.ids, ids)
        for batch in (1, 8, 33, 70):
            radius = float(scores[0, k // 2])
            found = lutra.scan.range_search(q[:batch], x, radius, metric)
            all_scores = lutra.scan.knn(q[:batch], x, n, metric)
            better = (
                all_scores.scores <= radius if metric in reference.DISTANCES else all_scores.scores >= radius
            )
            np.testing.assert_array_equal(found.scores, all_scores.scores[better])
            np.testing.assert_array_equal(found.ids, all_scores.ids[better])
            np.testing.assert_array_equal(np.diff(found.offsets), better.sum(1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.0, 0.002, 0.1, 0.6, 1.0])
def test_filters(simd_level, metric, share):
    rng = np.random.default_rng(3)
    n = 1003
    for dtype in ("float32", "float16", "uint8") if metric != "poincare" else ("float32",):
        x, wide = stored(vectors(rng, metric, n, 24), dtype)
        mask = rng.random(n) < share
        rows = np.flatnonzero(mask)
        for nq in (1, 6, 40):
            q = vectors(rng, metric, nq, 24)
            for k in (1, 10, 60):
                want = lutra.scan.knn(q, wide[rows], k, metric)
                want_ids = np.where(want.ids < 0, -1, rows[want.ids] if len(rows) else -1)
                for filter in (mask, np.packbits(mask, bitorder="little"), rows, lambda ids, m=mask: m[ids]):
                    got = lutra.scan.knn(q, x, k, metric, filter=filter)
                    np.testing.assert_array_equal(got.ids, want_ids)
                    np.testing.assert_array_equal(got.scores, want.scores)
            got = lutra.scan.range_search(q, x, 3.0, metric, filter=mask)
            want = lutra.scan.range_search(q, wide[rows], 3.0, metric)
            np.testing.assert_array_equal(got.offsets, want.offsets)
            np.testing.assert_array_equal(got.ids, rows[want.ids])


def test_a_filter_hides_rows_that_are_not_finite(simd_level):
    x = np.ones((300, 5), np.float32)
    x[100] = np.nan
    for nq in (1, 20):
        q = np.ones((nq, 5), np.float32)
        with pytest.raises(ValueError, match="row 100 of database is NaN"):
            lutra.scan.knn(q, x, 1, filter=np.arange(300) > 50)
        assert (lutra.scan.knn(q, x, 1, filter=np.arange(300) > 100).ids == 101).all()


@pytest.mark.parametrize("metric", METRICS)
def test_range_search_against_the_reference(simd_level, metric):
    rng = np.random.default_rng(4)
    x = rng.integers(-2, 3, (400, 9)).astype(np.float32)  # exact scores, many on the radius
    if metric == "poincare":
        x /= 16
    for nq in (0, 1, 5, 30):
        q = x[:nq] if metric == "poincare" else rng.integers(-2, 3, (nq, 9)).astype(np.float32)
        # a cosine of 0 is a matter of rounding
        for radius in (0.01 if metric == "cosine" else 0.0, 1.0, 6.0, -3.0, 1e30, np.inf, -np.inf):
            got = lutra.scan.range_search(q, x, radius, metric)
            want = reference.range_search(q, x, radius, metric)
            np.testing.assert_array_equal(got.offsets, want[0])
            np.testing.assert_allclose(got.scores, want[1], rtol=1e-5, atol=1e-6)
            if metric in ("ip", "l2", "l1", "linf"):
                np.testing.assert_array_equal(got.ids, want[2])
    assert got.offsets.dtype == np.int64 == got.ids.dtype
    empty = lutra.scan.range_search(q, x[:0], 1.0, metric)
    assert len(empty.ids) == 0 and (empty.offsets == 0).all()


def test_range_search_threads_and_float64():
    rng = np.random.default_rng(5)
    q, x = (
        rng.standard_normal((40, 16)).astype(np.float32),
        rng.standard_normal((9000, 16)).astype(np.float32),
    )
    before, results = lutra.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            lutra.set_num_threads(threads)
            results.append(lutra.scan.range_search(q, x, 12.0, "l2"))
    finally:
        lutra.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)
    assert (
        lutra.scan.range_search(q.astype(np.float64), x.astype(np.float64), 12.0, "l2").scores.dtype == "f8"
    )


def test_poincare_needs_the_open_unit_ball(simd_level):
    rng = np.random.default_rng(6)
    x = vectors(rng, "poincare", 100, 6)
    for nq in (1, 30):
        q = np.full((nq, 6), 0.1, np.float32)
        for bad in (1.0, 2.0, np.inf, np.nan):
            y = x.copy()
            y[57] = 0
            y[57, 0] = bad
            with pytest.raises(ValueError, match=r"row 57 of database is NaN.*open unit ball"):
                lutra.scan.knn(q, y, 3, "poincare")
            with pytest.raises(ValueError, match="open unit ball"):
                lutra.scan.rescore(q, y, np.full((nq, 1), 57), 1, "poincare")
        with pytest.raises(ValueError, match="open unit ball"):
            lutra.scan.knn(q * 10, x, 3, "poincare")


def test_linf_does_not_lose_a_nan(simd_level):
    x = np.zeros((50, 33), np.float32)
    for column in (0, 16, 32):
        y = x.copy()
        y[20, column] = -np.nan
        for nq in (1, 20):
            with pytest.raises(ValueError, match="row 20 of database is NaN"):
                lutra.scan.knn(x[:nq] + 3, y, 2, "linf")


def test_huge_values_are_scored_as_alone(simd_level):
    """Where sums may overflow the margins say nothing: every pair is scored in the one order."""
    rng = np.random.default_rng(7)
    x = (rng.random((200, 40)) * 10 ** rng.uniform(-3, 19, (200, 1))).astype(np.float32)
    q = (rng.random((33, 40)) * 1e19).astype(np.float32)
    for metric in ("ip", "cosine", "l1", "linf"):
        got = lutra.scan.knn(q, x, 20, metric)
        for i in range(33):
            alone = lutra.scan.knn(q[i : i + 1], x, 20, metric)
            np.testing.assert_array_equal(got.ids[i], alone.ids[0])
            np.testing.assert_array_equal(got.scores[i], alone.scores[0])


def test_torch_tensors_of_every_storage():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    q = torch.from_numpy(rng.standard_normal((5, 20)).astype(np.float32))
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8):
        x = (torch.randn(60, 20) * 3 + 10).to(dtype)
        want = lutra.scan.knn(q.numpy(), x.float().numpy(), 4, "l2")
        got = lutra.scan.knn(q, x, 4, "l2")
        np.testing.assert_array_equal(got.ids.numpy(), want.ids)
        assert got.scores.dtype == torch.float32
        got = lutra.scan.knn(q, x, 4, "l2", filter=torch.arange(0, 60, 2))
        assert (got.ids % 2 == 0).all()
        found = lutra.scan.range_search(q, x, 1000.0, "l2", filter=list(range(30)))
        assert isinstance(found.ids, torch.Tensor) and found.offsets.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 3), np.float32), np.ones((4, 3), np.float32), "wide"), TypeError, "radius must be"),
        ((np.ones((2, 3), np.float32), np.ones((4, 3), np.float32), np.nan), ValueError, "radius is NaN"),
        ((np.ones((2, 3), np.float32), np.ones((4, 2), np.float32), 1), ValueError, "database has 2 columns"),
        ((np.ones((2, 3), np.float32), np.ones((4, 3), np.int16), 1), TypeError, "database has dtype int16"),
    ],
)  # fmt: skip
def test_bad_ranges(arguments, error, message):
    with pytest.raises(error, match=message):
        lutra.scan.range_search(*arguments)
