"""knn and nearest against the reference: odd sizes, every SIMD level, ties, NaN, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lutra
from lutra.reference import scan as reference

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
METRICS = ("ip", "l2", "cosine")


def integers(rng, *shape):
    """Small integers as float32: their scores are exact and full of ties."""
    return rng.integers(-2, 3, shape).astype(np.float32)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("d", SIZES)
def test_exact_values_and_ties(simd_level, d, metric):
    rng = np.random.default_rng(d)
    for nq in (*SIZES, 4, 5, 48, 49):
        n = int(rng.choice([0, 1, 5, 6, 7, 8, 9, 47, 48, 200, 700]))
        q, x = integers(rng, nq, d), integers(rng, n, d)
        for k in (1, 10, 60):
            scores, ids = lutra.scan.knn(q, x, k, metric)
            want_scores, want_ids = reference.knn(q, x, k, metric)
            np.testing.assert_array_equal(ids, want_ids)
            np.testing.assert_array_equal(scores, want_scores)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [1, 3, 4, 5, 17, 50])
def test_real_values(simd_level, nq, metric):
    rng = np.random.default_rng(nq)
    for d in (1, 17, 128, 300):
        q, x = (rng.standard_normal((m, d)).astype(np.float32) for m in (nq, 611))
        scores, ids = lutra.scan.knn(q, x, 20, metric)
        want = reference.knn(q.astype(np.float64), x.astype(np.float64), 20, metric)
        np.testing.assert_allclose(scores, want[0], rtol=1e-5, atol=1e-5)
        every = reference.pairwise(q.astype(np.float64), x.astype(np.float64), metric)
        np.testing.assert_allclose(np.take_along_axis(every, ids, 1), scores, rtol=1e-5, atol=1e-5)
        assert (np.diff(scores, axis=1) * (-1 if metric == "l2" else 1) <= 0).all()


@pytest.mark.parametrize("nq", [1, 4, 40])
def test_equal_rows_have_equal_scores_wherever_they_lie(simd_level, nq):
    """Rows at the edges of tiles are summed as those in the middle: ties go to the lowest id."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, 100)).astype(np.float32)
    x = np.repeat(row, 555, 0)
    for metric in METRICS:
        scores, ids = lutra.scan.knn(rng.standard_normal((nq, 100)).astype(np.float32), x, 555, metric)
        np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(555), ids.shape))
        assert (scores == scores[:, :1]).all()


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("k", [1, 47, 48, 49, 500, 3000])
def test_sorted_input_and_large_k(simd_level, order, k):
    """Scores that rise along the collection replace the whole selection again and again."""
    x = np.arange(3000, dtype=np.float32)[:, None]
    x = x if order == "rising" else x[::-1].copy()
    for nq in (1, 6):
        q = np.ones((nq, 1), np.float32)
        scores, ids = lutra.scan.knn(q, x, k, "ip")
        np.testing.assert_array_equal(scores, np.broadcast_to(np.arange(2999, 2999 - k, -1), (nq, k)))
        np.testing.assert_array_equal(x[ids, 0], scores)


def test_threads_do_not_change_a_bit():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20000, 40)).astype(np.float32)
    before = lutra.get_num_threads()
    try:
        for nq in (1, 7, 60):
            q = x[:nq] + 1
            results = []
            for threads in (1, 2, 3):
                lutra.set_num_threads(threads)
                results.append(lutra.scan.knn(q, x, 100, "l2"))
            for other in results[1:]:
                np.testing.assert_array_equal(results[0].scores, other.scores)
                np.testing.assert_array_equal(results[0].ids, other.ids)
    finally:
        lutra.set_num_threads(before)


def test_padding_and_empty():
    q, x = np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)
    for metric, worst in (("ip", -np.inf), ("cosine", -np.inf), ("l2", np.inf)):
        scores, ids = lutra.scan.knn(q, x, 3, metric)
        np.testing.assert_array_equal(ids, [[0, -1, -1]] * 2)
        assert (scores[:, 1:] == worst).all()
        assert lutra.scan.knn(q[:0], x, 3, metric).ids.shape == (0, 3)
        np.testing.assert_array_equal(lutra.scan.knn(q, x[:0], 2, metric).ids, np.full((2, 2), -1))
    assert lutra.scan.knn(q[:, :0], x[:, :0], 1).scores[0, 0] == 0


def test_infinite_and_extreme_scores(simd_level):
    x = np.array([[1.0, 0.0], [np.inf, 0.0], [-np.inf, 0.0]], np.float32)
    scores, ids = lutra.scan.knn(np.array([[1.0, 1.0]], np.float32), x, 3)
    np.testing.assert_array_equal(ids, [[1, 0, 2]])
    np.testing.assert_array_equal(scores, [[np.inf, 1, -np.inf]])
    big = np.array([[3e20, 0, 4e20], [0, 0, 0], [-1e-25, 0, 0]], np.float32)
    for nq in (1, 9):
        q = np.tile(np.array([[6e20, 0, 8e20]], np.float32), (nq, 1))
        scores, _ = lutra.scan.knn(q, big, 3, "cosine")
        np.testing.assert_allclose(scores, [[1, 0, -0.6]] * nq, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nq", [1, 2, 20])
@pytest.mark.parametrize("metric", METRICS)
def test_nan_is_an_error_that_names_the_row(simd_level, metric, nq):
    q, x = np.ones((nq, 5), np.float32), np.ones((300, 5), np.float32)
    x[[150, 299], 4] = np.nan
    with pytest.raises(ValueError, match="row 150 of database is NaN"):
        lutra.scan.knn(q, x, 2, metric)
    with pytest.raises(ValueError, match="row 0 of database is NaN: that row or a query"):
        lutra.scan.knn(np.full_like(q, np.nan), np.ones_like(x), 2, metric)
    with pytest.raises(ValueError, match="row 150 of centroids"):
        lutra.address.nearest(q, x, 2, "ip")


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_nearest_is_knn(metric):
    rng = np.random.default_rng(0)
    x, c = integers(rng, 50, 6), integers(rng, 20, 6)
    got, want = lutra.address.nearest(x, c, 3, metric), lutra.scan.knn(x, c, 3, metric)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.scores, want.scores)
    assert lutra.address.nearest(x, c).ids.shape == (50, 1)
    with pytest.raises(ValueError, match="metric must be one of 'l2', 'ip'"):
        lutra.address.nearest(x, c, metric="cosine")


def test_float64_is_computed_in_float64():
    x = np.array([[1.0 + 1e-12], [1.0]])
    scores, ids = lutra.scan.knn(np.array([[1.0]]), x, 1)
    assert scores.dtype == np.float64 and ids[0, 0] == 0 and scores[0, 0] > 1


def test_non_contiguous_and_big_endian():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 12)).astype(np.float32)
    want = lutra.scan.knn(np.ascontiguousarray(x[::2, ::3]), np.ascontiguousarray(x[:, ::3]), 3)
    for q, y in ((x[::2, ::3], x[:, ::3]), (x[::2, ::3].astype(">f4"), np.asfortranarray(x[:, ::3]))):
        got = lutra.scan.knn(q, y, 3)
        np.testing.assert_array_equal(got.ids, want.ids)
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(lutra.scan.knn(read_only, read_only, 3).ids, lutra.scan.knn(x, x, 3).ids)


Q, X = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], X), TypeError, "queries must be a NumPy, torch or CuPy array.*got list"),
        ((Q, None), TypeError, "database must be a NumPy"),
        ((Q.astype(np.int64), X), TypeError, "queries has dtype int64; it must be one of float32, float16"),
        ((Q.astype(np.float16), X), TypeError, "database has dtype float32, queries has float16"),
        ((Q, X.astype(np.int32)), TypeError, "database has dtype int32; it must be one of"),
        ((Q, X.astype(np.float64)), TypeError, "database has dtype float64, queries has float32"),
        ((Q[0], X), ValueError, r"queries must be 2-d, got shape \(3,\)"),
        ((Q, X[:, :2]), ValueError, "database has 2 columns, queries has 3"),
        ((Q, X, 0), ValueError, "k must be >= 1, got 0"),
        ((Q, X, 1.5), TypeError, "k must be an integer, got 1.5"),
        ((Q, X, True), TypeError, "k must be an integer"),
        ((Q, X, 1, "L2"), ValueError, "one of 'ip', 'l2', 'cosine', 'l1', 'linf', 'poincare'; got 'L2'"),
        ((Q, X, 1, ["ip"]), ValueError, "metric must be one of"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        lutra.scan.knn(*arguments)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 40), st.integers(0, 70), st.integers(0, 40), st.integers(1, 90),
    st.sampled_from(METRICS[:2]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_shape(nq, n, d, k, metric, seed):
    rng = np.random.default_rng(seed)
    q, x = integers(rng, nq, d), integers(rng, n, d)
    got, want = lutra.scan.knn(q, x, k, metric), reference.knn(q, x, k, metric)
    np.testing.assert_array_equal(got.ids, want[1])
    np.testing.assert_array_equal(got.scores, want[0])
