"""maxsim against the reference, and the reference against its definition."""

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import maxsim as reference

maxsim = lutra.scan.maxsim
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)


def tokens(rng, lengths, d, whole=True):
    """Tokens of documents, and their offsets; whole numbers, so that sums are exact in any order."""
    n = int(np.sum(lengths))
    x = rng.integers(-4, 5, (n, d)) if whole else rng.standard_normal((n, d))
    return x.astype(np.float32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def plain(q, qp, x, xp):
    """The definition, a pair at a time."""
    out = np.empty((len(qp) - 1, len(xp) - 1), np.float64)
    for i in range(len(qp) - 1):
        for j in range(len(xp) - 1):
            sums = 0.0
            for t in q[qp[i] : qp[i + 1]]:
                sums += max((float(t @ p) for p in x[xp[j] : xp[j + 1]]), default=-np.inf)
            out[i, j] = sums
    return out


def problem(seed, d, queries=(5, 0, 33, 1, 17), docs=(7, 0, 65, 1, 16, 3, 100, 12, 13)):
    rng = np.random.default_rng(seed)
    return rng, *tokens(rng, queries, d), *tokens(rng, docs, d)


def test_the_reference_is_the_definition():
    _, q, qp, x, xp = problem(0, 5)
    scores, argmax = reference.maxsim(q, qp, x, xp)
    np.testing.assert_array_equal(scores, plain(q, qp, x, xp))
    assert (scores[1] == 0).all() and (scores[0, 1] == -np.inf)
    similarity = q @ x.T
    for j in range(len(xp) - 1):
        for t in range(len(q)):
            mine = similarity[t, xp[j] : xp[j + 1]]
            assert argmax[j, t] == (-1 if not len(mine) else xp[j] + np.argmax(mine))


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_against_the_reference(simd_level, d, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    _, q, qp, x, xp = problem(d, d)
    want, _ = reference.maxsim(q, qp, x, xp)
    got = maxsim(q, qp, x.astype(dtype), xp)
    assert got.dtype == np.float32
    # int8 docs: queries are rounded to 4 / 65260 at most, times codes of 4 at most, for 33 tokens
    tolerance = d * 33 * 4 * 4 / 65260 if dtype == "int8" else 0
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(maxsim(q.astype(dtype), qp, x.astype(dtype), xp), want)


@pytest.mark.parametrize("length", SIZES)
def test_lengths(simd_level, length):
    rng = np.random.default_rng(length)
    q, qp = tokens(rng, (length, 3, length), 19)
    x, xp = tokens(rng, (length, 1, length, length, 2), 19)
    np.testing.assert_array_equal(maxsim(q, qp, x, xp), reference.maxsim(q, qp, x, xp)[0])
    y = x.astype(np.int8)
    np.testing.assert_array_equal(maxsim(q.astype(np.int8), qp, y, xp), reference.maxsim(q, qp, x, xp)[0])


def test_real_numbers(simd_level, features):
    rng = np.random.default_rng(1)
    q, qp = tokens(rng, (32, 32, 5), 128, whole=False)
    x, xp = tokens(rng, rng.integers(0, 60, 40), 128, whole=False)
    want, _ = reference.maxsim(q, qp, x, xp)
    np.testing.assert_allclose(maxsim(q, qp, x, xp), want, rtol=1e-5)
    half = x.astype(np.float16)
    np.testing.assert_allclose(maxsim(q, qp, half, xp), reference.maxsim(q, qp, half, xp)[0], rtol=1e-5)
    scale = (rng.random(len(x)) * 0.1).astype(np.float32)
    codes = rng.integers(-128, 128, x.shape).astype(np.int8)
    want, _ = reference.maxsim(q, qp, codes, xp, doc_scale=scale)
    np.testing.assert_allclose(maxsim(q, qp, codes, xp, doc_scale=scale), want, rtol=1e-4, atol=0.01)
    small = q * np.float32(1e-36)  # no digits: converted to float
    got = maxsim(small, qp, codes, xp, doc_scale=scale)
    np.testing.assert_allclose(got, reference.maxsim(small, qp, codes, xp, doc_scale=scale)[0], rtol=1e-4)


def test_bfloat16(simd_level, features):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(1)
    for d in (7, 64, 129):
        q, qp = tokens(rng, (32, 3), d, whole=False)
        x, xp = tokens(rng, rng.integers(0, 60, 40), d, whole=False)
        q, x = q.astype(bfloat16), x.astype(bfloat16)
        want, _ = reference.maxsim(q.astype(np.float32), qp, x.astype(np.float32), xp)
        np.testing.assert_allclose(maxsim(q, qp, x, xp), want, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("normalize", [True, False])
def test_residual_tokens(simd_level, bits, normalize):
    rng = np.random.default_rng(bits)
    for d in (1, 8, 17, 33, 128):
        q, qp = tokens(rng, (17, 5), d, whole=False)
        xp = np.concatenate([[0], np.cumsum(rng.integers(0, 40, 30))])
        n = xp[-1]
        codes = rng.integers(0, 256, (n, (d * bits + 7) // 8)).astype(np.uint8)
        docs = lutra.scan.ResidualTokens(
            codes, rng.integers(0, 9, n).astype(np.int32), rng.standard_normal((9, d)).astype(np.float32),
            np.sort(rng.standard_normal(2**bits)).astype(np.float32), normalize,
        )  # fmt: skip
        rows = reference.decode_residual(*docs)
        if normalize:
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
        want, _ = reference.maxsim(q, qp, rows, xp)
        np.testing.assert_allclose(maxsim(q, qp, docs, xp), want, rtol=2e-5, atol=1e-5)
        want = want + reference.maxsim(rows, xp, q, qp)[0].T
        np.testing.assert_allclose(maxsim(q, qp, docs, xp, symmetric=True), want, rtol=2e-5, atol=1e-4)
    docs.centroid_ids[3] = 9
    with pytest.raises(IndexError, match=r"centroid_ids\[3\] is 9; ids must lie in \[0, 9\)"):
        maxsim(q, qp, docs, xp)


def test_masks(simd_level):
    rng, q, qp, x, xp = problem(3, 21)
    q_mask, x_mask = rng.random(len(q)) < 0.7, rng.random(len(x)) < 0.5
    x_mask[: xp[1]] = False
    q_mask[-17:] = False
    keep = [np.flatnonzero(m) for m in (q_mask, x_mask)]
    ptrs = [np.concatenate([[0], np.cumsum(m)])[p] for m, p in ((q_mask, qp), (x_mask, xp))]
    want = maxsim(q[keep[0]], ptrs[0], x[keep[1]], ptrs[1])
    np.testing.assert_array_equal(maxsim(q, qp, x, xp, query_mask=q_mask, doc_mask=x_mask), want)
    hidden = np.where(x_mask[:, None], x, np.nan)  # what is masked may be anything
    np.testing.assert_array_equal(maxsim(q, qp, hidden, xp, query_mask=q_mask, doc_mask=x_mask), want)
    symmetric = want + reference.maxsim(x, xp, q, qp, doc_mask=q_mask, query_mask=x_mask)[0].T
    got = maxsim(q, qp, x, xp, query_mask=q_mask, doc_mask=x_mask, symmetric=True)
    np.testing.assert_array_equal(got, symmetric)


def test_padded(simd_level):
    rng = np.random.default_rng(0)
    q = rng.integers(-3, 4, (3, 9, 20)).astype(np.float32)
    x = rng.integers(-3, 4, (11, 33, 20)).astype(np.float32)
    q_mask, x_mask = rng.random((3, 9)) < 0.7, np.arange(33) < rng.integers(0, 34, (11, 1))
    similarity = np.einsum("qtd,npd->qntp", q, x)
    similarity[:, ~x_mask[:, None].repeat(9, 1)] = -np.inf
    best = similarity.max(-1)
    want = np.where(q_mask[:, None], best, 0).sum(-1)
    np.testing.assert_array_equal(lutra.scan.maxsim_padded(q, x, q_mask, x_mask), want)
    means = lutra.scan.maxsim_padded(q, x, q_mask, x_mask, normalize=True)
    np.testing.assert_allclose(means, want / np.maximum(q_mask.sum(1), 1)[:, None], rtol=1e-6)
    best = lutra.scan.maxsim_padded(q, x, q_mask, x_mask, k=4)
    np.testing.assert_array_equal(best.ids, np.argsort(-want, axis=1, kind="stable")[:, :4])
    with pytest.raises(ValueError, match=r"doc_mask has shape \(11, 32\); it must be \(11, 33\)"):
        lutra.scan.maxsim_padded(q, x, q_mask, x_mask[:, 1:])
    with pytest.raises(ValueError, match="docs must be 3-d"):
        lutra.scan.maxsim_padded(q, x[0])


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_candidates(simd_level, dtype):
    rng, q, qp, x, xp = problem(4, 21)
    q, x = q.astype(dtype), x.astype(dtype)
    every = maxsim(q, qp, x, xp)
    cand = rng.integers(-1, 9, (5, 40))
    want = np.where(cand < 0, -np.inf, np.take_along_axis(every, cand % 9, 1))
    np.testing.assert_array_equal(maxsim(q, qp, x, xp, candidates=cand), want)
    np.testing.assert_array_equal(maxsim(q, qp, x, xp, candidates=cand.astype(np.int32)), want)
    full = maxsim(q, qp, x, xp, symmetric=True, normalize=True)
    got = maxsim(q, qp, x, xp, candidates=cand, symmetric=True, normalize=True)
    wanted = np.where(cand < 0, -np.inf, np.take_along_axis(full, cand % 9, 1))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    for k in (1, 3, 60):
        best = maxsim(q, qp, x, xp, candidates=cand, k=k)
        scores, ids = reference.top(want, k, cand)
        np.testing.assert_array_equal(best.ids, ids)
        np.testing.assert_array_equal(best.scores, scores)
    assert maxsim(q, qp, x, xp, candidates=cand[:, :0]).shape == (5, 0)
    assert (maxsim(q, qp, x, xp, candidates=cand[:, :0], k=2).ids == -1).all()


def test_best(simd_level, threads):
    rng = np.random.default_rng(5)
    q, qp = tokens(rng, (3, 0, 20, 7), 6)
    x, xp = tokens(rng, rng.integers(0, 9, 500), 6)  # many ties
    every = maxsim(q, qp, x, xp)
    for k in (1, 10, 100, 600):
        best = maxsim(q, qp, x, xp, k=k)
        scores, ids = reference.top(every, k)
        np.testing.assert_array_equal(best.ids, ids)
        np.testing.assert_array_equal(best.scores, scores)
    both = maxsim(q, qp, x, xp, symmetric=True)
    best = maxsim(q, qp, x, xp, symmetric=True, k=5)
    np.testing.assert_array_equal(best.ids, np.argsort(-both, axis=1, kind="stable")[:, :5])


@pytest.mark.skipif(_backend.core is None, reason="about the kernel's order of sums")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_same_bits_in_any_company(simd_level, dtype):
    rng = np.random.default_rng(6)
    q, qp = tokens(rng, rng.integers(1, 70, 20), 128, whole=False)
    x, xp = tokens(rng, rng.integers(1, 300, 60), 128, whole=False)
    x = (x * 30).clip(-127, 127).astype(dtype)
    want = maxsim(q, qp, x, xp)
    for n in (1, 3):
        _backend.core.set_num_threads(n)
        np.testing.assert_array_equal(maxsim(q, qp, x, xp), want)
    _backend.core.set_num_threads(0)
    for i in (0, 7):
        for j in (0, 13):
            one = maxsim(
                q[qp[i] : qp[i + 1]], qp[i : i + 2] - qp[i], x[xp[j] : xp[j + 1]], xp[j : j + 2] - xp[j]
            )
            assert one[0, 0] == want[i, j]
    ids = np.tile(np.arange(60)[::-1], (20, 1))
    np.testing.assert_array_equal(maxsim(q, qp, x, xp, candidates=ids), want[:, ::-1])


def test_large_documents_and_many_queries(simd_level):
    rng = np.random.default_rng(7)
    q, qp = tokens(rng, rng.integers(0, 90, 40), 40)
    x, xp = tokens(rng, (0, 5000, 2, 0, 3001, 0), 40)
    mask = rng.random(len(x)) < 0.9
    for dtype in (np.float32, np.float16, np.int8):
        y = x.astype(dtype)
        got = maxsim(q.astype(dtype), qp, y, xp, doc_mask=mask)
        np.testing.assert_array_equal(got, reference.maxsim(q, qp, x, xp, doc_mask=mask)[0])


@pytest.mark.skipif(_backend.core is None, reason="the reference has no passes")
def test_queries_of_several_passes():
    rng = np.random.default_rng(8)
    q, qp = tokens(rng, (300, 9000, 20, 0, 9000, 5), 2000)  # 73 and 72 MB, packed
    x, xp = tokens(rng, (3, 1, 9), 2000)
    for k in (None, 2):
        got = maxsim(q, qp, x, xp, k=k)
        one = [maxsim(q[qp[i] : qp[i + 1]], qp[i : i + 2] - qp[i], x, xp, k=k) for i in range(6)]
        for a, b in zip((got,) if k is None else got, zip(*([o] if k is None else o for o in one))):
            np.testing.assert_array_equal(a, np.concatenate(b))


def test_infinities(simd_level):
    ptr = np.array([0, 2])
    q = np.array([[1, 0], [1, 0]], np.float32)
    x = np.array([[3e38, 0], [-np.inf, 1], [2, 2]], np.float32)
    np.testing.assert_array_equal(maxsim(q * 10, ptr, x, np.array([0, 1, 2, 3])), [[np.inf, -np.inf, 40]])
    q[1] = -1, 0
    with pytest.raises(ValueError, match="the score of document 1 is NaN"):  # inf - inf, of two tokens
        maxsim(q * 10, ptr, x[[2, 0]], np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="the score of document 1 is NaN"):  # 0 * inf
        maxsim(q[:, ::-1], ptr, x[[2, 1]], np.array([0, 1, 2]))


def test_nan_is_noticed(simd_level):
    rng = np.random.default_rng(8)
    q, qp = tokens(rng, (5, 17), 33)
    x, xp = tokens(rng, (40, 0, 30, 20), 33)
    for row in (0, 39, 40, 55, 89):
        y = x.copy()
        y[row, 30] = np.nan
        document = int(np.searchsorted(xp, row, side="right")) - 1
        for options in ({}, {"k": 2}, {"candidates": np.array([[3, 2, 0], [0, 2, 3]])}):
            with pytest.raises(ValueError, match=f"the score of document {document} is NaN"):
                maxsim(q, qp, y, xp, **options)
    bad = q.copy()
    bad[6, 1] = np.nan
    for y in (x, x.astype(np.int8)):
        with pytest.raises(ValueError, match="the score of document 0 is NaN"):
            maxsim(bad, qp, y, xp)
    scale = np.ones(len(x), np.float32)
    scale[45] = np.nan
    with pytest.raises(ValueError, match="the score of document 2 is NaN"):
        maxsim(q, qp, x.astype(np.int8), xp, doc_scale=scale)
    assert np.isfinite(maxsim(q, qp, y, xp, candidates=np.array([[0, 3], [3, 3]]))).all()


def test_nothing():
    _, q, qp, x, xp = problem(9, 6)
    zero = np.array([0])
    assert maxsim(q[:0], zero, x, xp).shape == (0, 9)
    assert maxsim(q, qp, x[:0], zero).shape == (5, 0)
    best = maxsim(q, qp, x[:0], zero, k=3)
    assert best.ids.shape == (5, 3) and (best.ids == -1).all() and (best.scores == -np.inf).all()
    assert maxsim(q[:0], zero, x, xp, k=3).ids.shape == (0, 3)
    empty = maxsim(q, qp, x[:0], np.array([0, 0, 0]))
    np.testing.assert_array_equal(empty, np.where(np.diff(qp)[:, None] > 0, -np.inf, 0) + np.zeros((5, 2)))
    np.testing.assert_array_equal(
        maxsim(q[:, :0], qp, x[:, :0], xp)[0], np.where(np.diff(xp) > 0, 0, -np.inf)
    )
    # both sides: a document without tokens adds nothing of its own, a query without tokens has no match
    both = maxsim(q, qp, x, xp, symmetric=True)
    assert both[0, 1] == -np.inf and both[1, 1] == 0 and both[1, 0] == -np.inf


def test_strides_and_types():
    _, q, qp, x, xp = problem(10, 6)
    want = maxsim(q, qp, x, xp)
    np.testing.assert_array_equal(maxsim(q.repeat(2, 1)[:, ::2], qp, x.repeat(3, 0)[::3], xp), want)
    np.testing.assert_array_equal(
        maxsim(q, qp.astype(np.int32), np.asfortranarray(x), xp.astype(np.int32)), want
    )
    wide = maxsim(q.astype(np.float64), qp, x.astype(np.float64), xp)
    assert wide.dtype == np.float64
    np.testing.assert_array_equal(wide, want)
    np.testing.assert_array_equal(maxsim(q.astype(np.float16), qp, x, xp), want)


def test_bad_input():
    _, q, qp, x, xp = problem(11, 6)
    cases = [
        (ValueError, "query_ptr begins with 1", (q, qp + 1, x, xp), {}),
        (ValueError, "doc_ptr ends with 217; it must end with 216", (q, qp, x[1:], xp), {}),
        (ValueError, "doc_ptr falls from 72 to 7 at position 4", (q, qp, x, np.r_[xp[:3], 72, xp[1:3],
        xp[6:]]), {}),
        (ValueError, "query_ptr falls from 38 to 5", (q, np.r_[0, 38, 5, 56], x, xp), {}),
        (ValueError, "doc_ptr is empty", (q, qp, x, xp[:0]), {}),
        (ValueError, "docs has 5 columns, queries has 6", (q, qp, x[:, 1:], xp), {}),
        (ValueError, "queries must be 2-d", (q[0], qp, x, xp), {}),
        (TypeError, "query_ptr has dtype float32", (q, qp.astype(np.float32), x, xp), {}),
        (TypeError, "float64 goes with float64", (q.astype(float), qp, x, xp), {}),
        (TypeError, "int8 queries with int8 docs", (q.astype(np.int8), qp, x, xp), {}),
        (TypeError, "ResidualTokens", (q, qp, x.astype(np.uint8), xp), {}),
        (ValueError, r"doc_mask has shape \(3,\); it must be \(217,\)", (q, qp, x, xp), {"doc_mask":
        np.ones(3, bool)}),
        (TypeError, "query_mask has dtype float32", (q, qp, x, xp), {"query_mask": np.ones(56, np.float32)}),
        (ValueError, "doc_scale goes with int8 docs", (q, qp, x, xp), {"doc_scale": np.ones(217,
        np.float32)}),
        (IndexError, "candidates holds 9 at position 1", (q, qp, x, xp), {"candidates": np.array([[0,
        9]] * 5)}),
        (IndexError, "candidates holds -2 at position 0", (q, qp, x, xp), {"candidates": np.array([[-2,
        9]] * 5)}),
        (ValueError, "candidates has 1 rows; it must have 5", (q, qp, x, xp),
        {"candidates": np.array([[0]])}),
        (ValueError, "k must be >= 1", (q, qp, x, xp), {"k": 0}),
    ]  # fmt: skip
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=message):
            maxsim(*arguments, **options)
    codes = lutra.scan.ResidualTokens(
        np.zeros((217, 2), np.uint8),
        np.zeros(217, np.int32),
        np.zeros((3, 6), np.float32),
        np.zeros(4, np.float32),
        True,
    )
    maxsim(q, qp, codes, xp)
    with pytest.raises(ValueError, match="codes has 2 columns; it must have 3, 6 dimensions of 4 bits"):
        maxsim(q, qp, codes._replace(values=np.zeros(16, np.float32)), xp)
    with pytest.raises(ValueError, match="values has 5 entries"):
        maxsim(q, qp, codes._replace(values=np.zeros(5, np.float32)), xp)
    with pytest.raises(ValueError, match="centroids has 5 columns, queries has 6"):
        maxsim(q, qp, codes._replace(centroids=np.zeros((3, 5), np.float32)), xp)
    with pytest.raises(ValueError, match="offsets must not fall"):
        maxsim(q, qp, x, np.r_[0, 300, xp[2:]], candidates=np.array([[0]] * 5))
