"""rescore against the reference."""

import numpy as np
import pytest

import lutra
from lutra.reference import scan as reference


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("d", [1, 2, 3, 15, 16, 17, 33, 97])
def test_against_the_reference(simd_level, metric, d):
    rng = np.random.default_rng(d)
    x = rng.integers(-3, 4, (500, d)).astype(np.float32)
    for nq, c in ((1, 1), (2, 0), (3, 17), (65, 33), (5, 200)):
        q = rng.integers(-3, 4, (nq, d)).astype(np.float32)
        candidates = rng.integers(-1, 500, (nq, c))
        candidates[:, : c // 2] %= 20  # duplicates
        for k in (1, 10, 100):
            scores, ids = lutra.scan.rescore(q, x, candidates, k, metric)
            want_scores, want_ids = reference.rescore(q, x, candidates, k, metric)
            np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-6)
            if metric != "cosine":  # integer scores: exact, so the order of ties is defined
                np.testing.assert_array_equal(ids, want_ids)


def test_all_candidates_is_knn():
    rng = np.random.default_rng(0)
    q, x = (rng.standard_normal((n, 20)).astype(np.float32) for n in (6, 80))
    every = np.tile(np.arange(80, dtype=np.int32)[::-1], (6, 1))
    got, want = lutra.scan.rescore(q, x, every, 7), lutra.scan.knn(q, x, 7)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5)


def test_bad_input(simd_level):
    q, x = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    with pytest.raises(IndexError, match=r"candidates holds 4 at position 3; ids must lie in \[0, 4\)"):
        lutra.scan.rescore(q, x, np.array([[0, 1], [2, 4]]), 1)
    with pytest.raises(IndexError, match="candidates holds -2 at position 0"):
        lutra.scan.rescore(q, x, np.array([[-2], [0]]), 1)
    with pytest.raises(ValueError, match="candidates has 1 rows, queries has 2"):
        lutra.scan.rescore(q, x, np.array([[0]]), 1)
    with pytest.raises(TypeError, match="candidates has dtype float32"):
        lutra.scan.rescore(q, x, q, 1)
    x[2] = np.nan
    with pytest.raises(ValueError, match="row 2 of database is NaN"):
        lutra.scan.rescore(q, x, np.array([[0, 2], [1, 3]]), 1)
    np.testing.assert_array_equal(lutra.scan.rescore(q, x, np.array([[0, 1], [1, 3]]), 1).ids, [[0], [1]])
