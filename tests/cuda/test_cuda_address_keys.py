"""Product keys, random rows, n-grams and longest matches on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import FLOATS, SIZES, rounded

import lutra
from lutra.reference import address as reference
from lutra.reference import fgrams, ngrams


# ---------------------------------------------------------------- product keys
def product_problem(seed, n, half, lead, heads=None, whole=True):
    rng = np.random.default_rng(seed)
    shape = (*lead, 2 * half) if heads is None else (*lead, heads, 2 * half)
    of_keys = (2, n, half) if heads is None else (heads, 2, n, half)
    if whole:
        return tuple(rng.integers(-3, 4, s).astype(np.float32) for s in (shape, of_keys))
    return tuple(rng.standard_normal(s).astype(np.float32) for s in (shape, of_keys))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", (1, 2, 31, 33, 127, 128, 129, 300, 1000))
def test_product_keys(gpu, n, dtype):
    """Whole numbers: sums are exact, and there are many ties."""
    for heads, lead in ((None, (9,)), (3, (5,)), (None, (2, 3)), (1, ())):
        q, keys = product_problem(n, n, 5, lead, heads)
        for k in sorted({1, 2, 7, 16, 17, 32, 33, 100, n}):
            if k > n or (k > 300 and lead != (9,)):
                continue
            scores, ids = lutra.address.product_keys(gpu.put(q, dtype), gpu.put(keys, dtype), k)
            want_scores, want_ids = reference.product_keys(q, keys, k)
            assert gpu.owns(scores) and gpu.owns(ids)
            np.testing.assert_array_equal(gpu.get(scores), want_scores)
            np.testing.assert_array_equal(gpu.get(ids), want_ids)


@pytest.mark.sanitize
def test_product_keys_small(gpu_torch):
    q, keys = product_problem(1, 200, 4, (5,), whole=False)
    for k in (1, 20, 90):
        scores, ids = lutra.address.product_keys(gpu_torch.put(q), gpu_torch.put(keys), k)
        want = reference.product_keys(q, keys, k)
        np.testing.assert_allclose(gpu_torch.get(scores), want[0], rtol=1e-5, atol=1e-5)
        assert (gpu_torch.get(ids) == want[1]).mean() > 0.98


def test_product_keys_of_bad_values(gpu):
    q, keys = product_problem(2, 50, 4, (3,), whole=False)
    q[1, 2] = np.nan
    scores = gpu.get(lutra.address.product_keys(gpu.put(q), gpu.put(keys), 5).scores)
    assert np.isnan(scores[1]).all() and not np.isnan(scores[[0, 2]]).any()
    empty = lutra.address.product_keys(gpu.put(q[:0]), gpu.put(keys), 5)
    assert empty.scores.shape == (0, 5)


def test_product_keys_gradient(gpu_torch):
    torch = gpu_torch.torch
    for heads in (None, 2):
        q, keys = (gpu_torch.put(a) for a in product_problem(3, 40, 6, (7,), heads, whole=False))
        q.requires_grad_(), keys.requires_grad_()
        scores, ids = lutra.address.product_keys(q, keys, 9)
        g = torch.randn_like(scores)
        got = torch.autograd.grad(scores, (q, keys), g)
        host = [a.detach().double().cpu().requires_grad_() for a in (q, keys)]
        halves = host[0].reshape(*host[0].shape[:-1], 2, -1)
        products = torch.einsum("...ed,...end->...en", halves, host[1])
        i = ids.cpu()
        again = products[..., 0, :].gather(-1, i // 40) + products[..., 1, :].gather(-1, i % 40)
        for a, b in zip(got, torch.autograd.grad(again, host, g.double().cpu())):
            torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- random rows
@pytest.mark.parametrize("dtype", ("int32", "int64"))
@pytest.mark.parametrize("dim", (0, 1, 3, 15, 16, 17, 63, 64, 65, 128, 190, 192))
def test_random_words(gpu, dim, dtype):
    rng = np.random.default_rng(dim)
    for shape, of in (((33,), None), ((5, 7), (5,)), ((5, 7), (5, 7)), ((0,), None)):
        ids = rng.integers(0, 2**31, shape).astype(dtype)
        if dtype == "int64" and ids.size:
            ids.flat[0] = 2**32 - 1
        sequences = None if of is None else rng.integers(-(2**62), 2**62, of)
        for seed in (0, 2**64 - 3):
            got = lutra.address.random_rows(gpu.put(ids), dim, gpu.put(sequences), seed=seed, output="words")
            want = reference.random_rows(ids, dim, sequences, seed=seed, output="words")
            assert gpu.owns(got)
            np.testing.assert_array_equal(gpu.get(got), want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", (1, 16, 65, 200))
def test_random_normals(gpu, dim, dtype):
    if gpu.name == "cupy" and dtype == "bfloat16":
        pytest.skip("CuPy has no bfloat16")
    ids = np.random.default_rng(dim).integers(0, 2**32, (40, 3))
    got = lutra.address.random_rows(gpu.put(ids), dim, seed=5, scale=0.5, dtype=dtype)
    want = reference.random_rows(ids, dim, seed=5, scale=0.5)
    if dtype == "float32":
        np.testing.assert_allclose(gpu.get(got), want, rtol=0, atol=1e-6)
    else:
        np.testing.assert_allclose(gpu.get(got), rounded(want, dtype), rtol=2**-7, atol=1e-6)


@pytest.mark.sanitize
def test_random_rows_of_bad_tokens(gpu):
    ids = gpu.put(np.array([3, -1, 2**32, 4]))
    rows = gpu.get(lutra.address.random_rows(ids, 20))
    assert np.isnan(rows[1:3]).all() and np.isfinite(rows[[0, 3]]).all()
    assert (gpu.get(lutra.address.random_rows(ids, 20, output="words"))[1:3] == -1).all()


# ---------------------------------------------------------------- n-grams
@pytest.mark.parametrize("dtype", ("int32", "int64"))
@pytest.mark.parametrize("orders", ((2,), (1, 2, 3), (3, 5)), ids=str)
def test_xor_ngrams(gpu, orders, dtype):
    rng = np.random.default_rng(len(orders))
    for shape in ((1,), (2,), (7,), (3, 33), (2, 5, 65), (4, 0), (0, 3)):
        for heads in (1, 3, 8):
            tokens = rng.integers(0, 2**31, shape).astype(dtype)
            multipliers = (rng.integers(0, 2**62, 5) | 1).tolist()
            moduli = rng.integers(1, 2**40, heads * len(orders)).tolist()
            got = lutra.address.xor_ngrams(gpu.put(tokens), multipliers, moduli, orders, pad=9)
            assert gpu.owns(got)
            want = ngrams.xor_ngrams(tokens, multipliers, moduli, orders, 9)
            np.testing.assert_array_equal(gpu.get(got), want)


def test_xor_ngrams_of_more_heads_than_a_launch_takes(gpu_torch):
    tokens = np.random.default_rng(0).integers(0, 1000, (3, 9))
    moduli = list(range(1000, 1100))
    got = lutra.address.xor_ngrams(gpu_torch.put(tokens), [3, 5], moduli, [2])
    np.testing.assert_array_equal(gpu_torch.get(got), ngrams.xor_ngrams(tokens, [3, 5], moduli, [2]))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", ("int32", "int64"))
def test_ragged_token_ngrams(gpu, dtype):
    rng = np.random.default_rng(1)
    for order in (2, 3, 7):
        for lengths in ([0], [1, 0, 0, 2], [300] * 9, rng.integers(0, 5, 2000).tolist(), [0, 0, 4000, 1]):
            tokens = rng.integers(0, 500, sum(lengths)).astype(dtype)
            offsets = np.cumsum([0, *lengths[:-1]])
            options = {"order": order, "buckets": 997, "first_bucket": 500}
            got = lutra.address.token_ngrams(gpu.put(tokens), gpu.put(offsets), **options)
            want = ngrams.token_ngrams(tokens, offsets, **options)
            np.testing.assert_array_equal(gpu.get(got.ids), want[0])
            np.testing.assert_array_equal(gpu.get(got.offsets), want[1])


# ---------------------------------------------------------------- longest matches
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", ("int32", "int64"))
def test_longest_match(gpu, dtype):
    rng = np.random.default_rng(3)
    for alphabet, count in ((2, 8), (5, 300), (40, 3000)):
        known = {tuple(rng.integers(0, alphabet, rng.integers(2, 6)).tolist()): None for _ in range(count)}
        vocabulary = lutra.vocab.FGrams(list(known))
        for shape in (*SIZES[:3], 257, (5, 33), (2, 3, 100)):
            tokens = rng.integers(0, alphabet, shape).astype(dtype)
            on_gpu = gpu.put(tokens)
            lutra.address.longest_match(on_gpu, vocabulary)  # copies the table
            with gpu.no_sync():
                got = lutra.address.longest_match(on_gpu, vocabulary)
            want = fgrams.longest_match(tokens, list(known))
            np.testing.assert_array_equal(gpu.get(got.ids), want[0])
            np.testing.assert_array_equal(gpu.get(got.lengths), want[1])
        for lengths in ([5], [0, 1, 0, 2], [40] * 9, rng.integers(0, 5, 500).tolist()):
            tokens = rng.integers(0, alphabet, sum(lengths)).astype(dtype)
            offsets = np.cumsum([0, *lengths[:-1]]).astype(dtype)
            got = lutra.address.longest_match(gpu.put(tokens), vocabulary, gpu.put(offsets))
            want = fgrams.longest_match(tokens, list(known), offsets)
            np.testing.assert_array_equal(gpu.get(got.ids), want[0])
            np.testing.assert_array_equal(gpu.get(got.lengths), want[1])


def test_longest_match_of_bad_tokens(gpu):
    vocabulary = lutra.vocab.FGrams([(5, 6), (5, 6, 7)])
    tokens = np.array([5, 6, 7, -1, 6, 2**30, 5, 6], np.int64)
    got = lutra.address.longest_match(gpu.put(tokens), vocabulary)
    assert gpu.get(got.ids).tolist() == [-1, 0, 1, -1, -1, -1, -1, 0]
    nothing = lutra.address.longest_match(gpu.put(np.zeros((4, 0), np.int64)), vocabulary)
    assert nothing.ids.shape == nothing.lengths.shape == (4, 0)
