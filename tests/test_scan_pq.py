"""pq against the reference and against knn on the decoded vectors."""

import numpy as np
import pytest

import lutra
from lutra.reference import scan as reference


def problem(rng, nq, n, m, ksub, dsub):
    """Integers: scores are exact and full of ties."""
    return (
        rng.integers(-3, 4, (nq, m * dsub)).astype(np.float32),
        rng.integers(0, ksub, (n, m)).astype(np.uint8),
        rng.integers(-3, 4, (m, ksub, dsub)).astype(np.float32),
    )


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    ("m", "ksub", "dsub"),
    [(1, 256, 1), (2, 16, 3), (3, 1, 2), (8, 256, 2), (17, 100, 1), (33, 3, 3), (97, 20, 1)],
)
def test_against_the_reference(simd_level, m, ksub, dsub, metric):
    rng = np.random.default_rng(m)
    for nq in (1, 2, 3, 15, 16, 17, 33):
        for n in (0, 1, 3, 17, 600):
            q, codes, books = problem(rng, nq, n, m, ksub, dsub)
            scores, ids = lutra.scan.pq(q, codes, books, 60, metric)
            want_scores, want_ids = reference.pq(q, codes, books, 60, metric)
            np.testing.assert_array_equal(ids, want_ids)
            np.testing.assert_array_equal(scores, want_scores)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_equals_knn_on_the_decoded_vectors(metric):
    q, codes, books = problem(np.random.default_rng(0), 9, 300, 5, 30, 4)
    decoded = books[np.arange(5), codes].reshape(300, 20)
    got, want = lutra.scan.pq(q, codes, books, 12, metric), lutra.scan.knn(q, decoded, 12, metric)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.scores, want.scores)


def test_threads_do_not_change_a_bit():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((20, 24)).astype(np.float32)
    codes, books = (
        rng.integers(0, 256, (30000, 8), dtype=np.uint8),
        rng.standard_normal((8, 256, 3)).astype(np.float32),
    )
    before, results = lutra.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            lutra.set_num_threads(threads)
            results += [lutra.scan.pq(q, codes, books), lutra.scan.pq(q[:1], codes, books)]
    finally:
        lutra.set_num_threads(before)
    for other in results[2::2]:
        np.testing.assert_array_equal(results[0].scores, other.scores)
    # one query and many sum in the same order
    np.testing.assert_array_equal(results[0].scores[:1], results[1].scores)
    np.testing.assert_array_equal(results[0].ids[:1], results[1].ids)


def test_bad_input(simd_level):
    q, codes, books = problem(np.random.default_rng(0), 2, 10, 4, 8, 2)
    with pytest.raises(
        ValueError, match=r"must have shapes \(nq, m \* dsub\), \(n, m\) and \(m, ksub, dsub\)"
    ):
        lutra.scan.pq(q[:, :6], codes, books)
    with pytest.raises(TypeError, match="codes has dtype int64; it must be one of uint8"):
        lutra.scan.pq(q, codes.astype(np.int64), books)
    with pytest.raises(ValueError, match="metric must be one of 'ip', 'l2'"):
        lutra.scan.pq(q, codes, books, metric="cosine")
    with pytest.raises(TypeError, match="codebooks has dtype float64, queries has float32"):
        lutra.scan.pq(q, codes, books.astype(np.float64))
    codes[7, 2] = 8
    for queries in (q[:1], q):
        with pytest.raises(IndexError, match=r"codes\[7, 2\] is 8; codes must be < 8"):
            lutra.scan.pq(queries, codes, books)
    codes[7, 2] = 0
    books[1, 0] = np.nan
    codes[:, 1] = 1
    codes[3, 1] = 0
    for queries in (q[:1], q):
        with pytest.raises(ValueError, match="row 3 of codes is NaN"):
            lutra.scan.pq(queries, codes, books)
