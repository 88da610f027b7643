"""lutra.address on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import FLOATS, SIZES, close, rounded

import lutra
from lutra.reference import address as reference
from lutra.reference import ngrams

LIMIT = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}  # of gradients, rounded to the type


@pytest.mark.parametrize("score", ["prob", "scaled"])
@pytest.mark.parametrize("bits", [1, 3, 4, 8, 10, 16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sign_hash(gpu, dtype, bits, score):
    rng = np.random.default_rng(bits)
    for rows in SIZES:
        for chunks in (1, 7):
            x = rng.standard_normal((rows, chunks * bits)).astype(np.float32) * 3
            x[rng.random(x.shape) < 0.1] = 0
            x = rounded(x, dtype)
            on_gpu = gpu.put(x, dtype)
            with gpu.no_sync():
                codes, weights = lutra.address.sign_hash(on_gpu, bits, score, 0.7)
            want_codes, want_weights = reference.sign_hash(x, bits, score, 0.7)
            assert gpu.owns(codes) and gpu.owns(weights)
            np.testing.assert_array_equal(gpu.get(codes), want_codes)
            np.testing.assert_allclose(gpu.get(weights), want_weights, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("score", ["prob", "scaled"])
@pytest.mark.parametrize("bits", [1, 3, 8, 16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sign_hash_gradient(gpu_torch, dtype, bits, score):
    torch, rng = gpu_torch.torch, np.random.default_rng(bits)
    for rows in (1, 17, 65):
        x = rounded(rng.standard_normal((rows, 5 * bits)).astype(np.float32), dtype)
        g = rng.standard_normal((rows, 5)).astype(np.float32)
        t = gpu_torch.put(x, dtype).requires_grad_()
        _, weights = lutra.address.sign_hash(t, bits, score, 1.3)
        (grad,) = torch.autograd.grad(weights, t, gpu_torch.put(g))
        want = reference.sign_hash_backward(g, x, bits, score, 1.3)
        assert grad.dtype == t.dtype
        np.testing.assert_allclose(
            gpu_torch.get(grad), want, rtol=LIMIT[dtype] * 5, atol=LIMIT[dtype] * np.abs(want).max()
        )


def test_sign_hash_special_values(gpu):
    x = np.array([[0.0, -0.0, np.inf, -np.inf], [np.nan, 1, -1, 0]], np.float32)
    codes, weights = lutra.address.sign_hash(gpu.put(x), 4)
    np.testing.assert_array_equal(gpu.get(codes)[:, 0], [0b0111, 0b1010])
    assert gpu.get(weights)[0, 0] == pytest.approx(0.25) and np.isnan(gpu.get(weights)[1, 0])


def test_sign_hash_layouts(gpu):
    x = np.random.default_rng(0).standard_normal((6, 5, 16)).astype(np.float32)
    for view in (lambda a: a.transpose(1, 0, 2), lambda a: a[::2, 1:], lambda a: a[..., :0], lambda a: a[:0]):
        codes, weights = lutra.address.sign_hash(
            view(gpu.put(x)) if gpu.name == "cupy" else _view(gpu, x, view)
        )
        want = reference.sign_hash(np.ascontiguousarray(view(x)), 8)
        np.testing.assert_array_equal(gpu.get(codes), want[0])
        np.testing.assert_allclose(gpu.get(weights), want[1], rtol=1e-5)


def _view(gpu, x, view):
    """The same view of a torch tensor, whose transpose is called permute."""

    class Like:
        def __init__(self, t):
            self.t = t

        def transpose(self, *axes):
            return self.t.permute(*axes)

        def __getitem__(self, index):
            return self.t[index]

    return view(Like(gpu.put(x)))


@pytest.mark.parametrize("bits", [1, 8])
def test_unaligned_input(gpu, bits):
    x = np.random.default_rng(1).standard_normal(1 + 40 * bits).astype(np.float32)
    codes, _ = lutra.address.sign_hash(gpu.put(x)[1:].reshape(5, 8 * bits), bits)
    np.testing.assert_array_equal(gpu.get(codes), reference.sign_hash(x[1:].reshape(5, 8 * bits), bits)[0])


@pytest.mark.parametrize("unigrams", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_token_ngrams(gpu, dtype, order, unigrams):
    rng = np.random.default_rng(order)
    options = {"order": order, "buckets": 997, "first_bucket": 500, "unigrams": unigrams}
    for length in (0, 1, 2, 5, 33):
        tokens = rng.integers(0, 500, (7, length)).astype(dtype)
        on_gpu = gpu.put(tokens)
        with gpu.no_sync():
            got = lutra.address.token_ngrams(on_gpu, **options)
        want = ngrams.token_ngrams(tokens, None, **options)
        np.testing.assert_array_equal(gpu.get(got.ids), want[0])
        np.testing.assert_array_equal(gpu.get(got.offsets), want[1])
    lengths = rng.integers(0, 9, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    tokens = rng.integers(0, 500, lengths.sum()).astype(dtype)
    got = lutra.address.token_ngrams(gpu.put(tokens), gpu.put(offsets), **options)
    want = ngrams.token_ngrams(tokens, offsets, **options)
    np.testing.assert_array_equal(gpu.get(got.ids), want[0])
    np.testing.assert_array_equal(gpu.get(got.offsets), want[1])


def test_token_ngrams_wrap_at_64_bits(gpu):
    tokens = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (3, 20))
    got = lutra.address.token_ngrams(gpu.put(tokens), order=5, buckets=2**62)
    np.testing.assert_array_equal(
        gpu.get(got.ids), ngrams.token_ngrams(tokens, None, order=5, buckets=2**62)[0]
    )


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("k", [1, 3])
def test_nearest(gpu, metric, k):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1000, 24)).astype(np.float32)
    for c in (1, 2, 100, 256):
        centroids = rng.standard_normal((c, 24)).astype(np.float32)
        a, b = gpu.put(x), gpu.put(centroids)
        with gpu.no_sync():
            scores, ids = lutra.address.nearest(a, b, k, metric)
        want_scores, want_ids = reference.nearest(x, centroids, k, metric)
        assert (gpu.get(ids) == want_ids).mean() > 0.999  # sums in another order may swap near ties
        close(gpu.get(scores), want_scores)
