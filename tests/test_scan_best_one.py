"""k = 1 with many queries has a kernel of its own (csrc/scan/best_one.h): the same results, bit for bit."""

import numpy as np
import pytest

import lutra
from lutra.reference import scan as reference

MANY = 200  # queries: enough for that kernel at every SIMD level


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("d", [0, 1, 2, 3, 8, 16, 31, 33, 97])
def test_exact_values_and_ties(simd_level, threads, metric, d):
    rng = np.random.default_rng(d)
    for n in (1, 5, 6, 7, 8, 9, 48, 49, 257):
        nq = MANY + int(rng.integers(0, 300))
        q, x = (rng.integers(-2, 3, (m, d)).astype(np.float32) for m in (nq, n))
        scores, ids = lutra.scan.knn(q, x, 1, metric)
        want_scores, want_ids = reference.knn(q, x, 1, metric)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_array_equal(scores, want_scores)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("n,d", [(1000, 7), (3000, 64), (70_000, 3)])
def test_bits_of_the_general_way(simd_level, metric, n, d):
    """Collections beyond one block of rows too."""
    rng = np.random.default_rng(0)
    q, x = (rng.standard_normal((m, d)).astype(np.float32) for m in (MANY + 37, n))
    one, two = lutra.scan.knn(q, x, 1, metric), lutra.scan.knn(q, x, 2, metric)
    np.testing.assert_array_equal(one.ids, two.ids[:, :1])
    np.testing.assert_array_equal(one.scores, two.scores[:, :1])


def test_strided_queries_and_rows(simd_level):
    rng = np.random.default_rng(0)
    q, x = (
        rng.standard_normal((2 * MANY, 24)).astype(np.float32),
        rng.standard_normal((99, 24)).astype(np.float32),
    )
    part, rows = q[::2, 8:16], x[::3, 8:16]
    got = lutra.address.nearest(part, rows)
    want = reference.knn(part, rows, 1, "l2")
    np.testing.assert_array_equal(got.ids, want[1])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_nan_is_found(simd_level, metric):
    rng = np.random.default_rng(0)
    q, x = (rng.standard_normal((m, 5)).astype(np.float32) for m in (MANY, 60))
    bad = x.copy()
    bad[[41, 50], 2] = np.nan
    with pytest.raises(ValueError, match="41"):
        lutra.scan.knn(q, bad, 1, metric)
    bad = q.copy()
    bad[-1, 4] = np.nan
    with pytest.raises(ValueError):
        lutra.scan.knn(bad, x, 1, metric)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_infinite_scores(simd_level, metric):
    """They are no NaN, though their sum may be one."""
    rng = np.random.default_rng(0)
    q, x = (rng.choice(np.float32([-1e30, 0, 1e30]), (m, 1)) for m in (MANY, 60))
    q[0], x[0] = 0, 1e30
    with np.errstate(over="ignore"):
        want = reference.knn(q, x, 1, metric)
    got = lutra.scan.knn(q, x, 1, metric)
    np.testing.assert_array_equal(got.ids, want[1])
    np.testing.assert_array_equal(got.scores, want[0])
    far = lutra.scan.knn(q, np.full((9, 1), 3e38, np.float32), 1, "l2")  # all scores are infinite
    assert (far.ids == 0).all() and np.isinf(far.scores).all()
