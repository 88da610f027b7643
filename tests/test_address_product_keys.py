"""lutra.address.product_keys against its reference, and against all n * n keys."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import address as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
DTYPES = ("float32", "float16", "bfloat16")


def integers(rng, *shape, top=4):
    """Small whole numbers: sums are exact in any order, and many are equal."""
    return rng.integers(-top, top, shape).astype(np.float32)


def check(queries, keys, k):
    got, want = lutra.address.product_keys(queries, keys, k), reference.product_keys(queries, keys, k)
    np.testing.assert_array_equal(got.ids, want[1])
    np.testing.assert_array_equal(got.scores, want[0])
    assert got.ids.dtype == np.int64 and got.scores.dtype == np.float32


@pytest.mark.parametrize("n", SIZES)
def test_equals_the_reference_at_odd_sizes(simd_level, n):
    rng = np.random.default_rng(n)
    for tokens in (1, 3, 40, 73):
        for half in (1, 5, 17):
            for k in {1, min(n, 2), min(n, 7), (n + 1) // 2, n}:
                for keys in (integers(rng, 2, n, half), np.zeros((2, n, half), np.float32)):
                    check(integers(rng, tokens, 2 * half), keys, k)


@pytest.mark.parametrize("tokens", [2, 43])
@pytest.mark.parametrize("k", [8, 33, 64, 256, 700])
def test_many_keys(simd_level, k, tokens):
    rng = np.random.default_rng(k)
    check(integers(rng, tokens, 3, 16, top=50), integers(rng, 3, 2, 701, 8, top=50), k)
    rising = np.sort(integers(rng, 2, 701, 8, top=1000), 1)  # groups of equal places are no sample
    check(np.abs(integers(rng, tokens, 16)), rising, k)


def test_the_reference_is_the_best_of_all_keys():
    rng = np.random.default_rng(0)
    for n, k in ((1, 1), (5, 5), (9, 4), (12, 11)):
        q, keys = integers(rng, 30, 6), integers(rng, 2, n, 3)
        scores, ids = reference.product_keys(q, keys, k)
        both = (q[:, :3] @ keys[0].T)[:, :, None] + (q[:, 3:] @ keys[1].T)[:, None, :]
        every = both.reshape(30, n * n)
        want = np.argsort(-every, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(ids, want)
        np.testing.assert_array_equal(scores, np.take_along_axis(every, want, 1))


@pytest.mark.parametrize("q_dtype", DTYPES)
@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 45])
def test_every_dtype(simd_level, q_dtype, key_dtype, tokens):
    rng = np.random.default_rng(0)
    q, keys = integers(rng, tokens, 2, 50), integers(rng, 2, 2, 65, 25)
    got = lutra.address.product_keys(
        torch.from_numpy(q).to(getattr(torch, q_dtype)), torch.from_numpy(keys).to(getattr(torch, key_dtype)),
        9,
    )  # fmt: skip
    want = reference.product_keys(q, keys, 9)
    np.testing.assert_array_equal(got.ids, want[1])
    np.testing.assert_array_equal(got.scores, want[0])
    assert got.scores.dtype == torch.float32


@pytest.mark.parametrize("tokens", [5, 64])
def test_real_numbers(simd_level, tokens):
    rng = np.random.default_rng(1)
    q, keys = rng.standard_normal((tokens, 4, 64)), rng.standard_normal((4, 2, 130, 32))
    want = reference.product_keys(q, keys, 16)
    got = lutra.address.product_keys(q.astype(np.float32), keys.astype(np.float32), 16)
    np.testing.assert_allclose(got.scores, want[0], rtol=1e-5, atol=1e-5)
    assert (got.ids == want[1]).mean() > 0.99
    wide = lutra.address.product_keys(q, keys, 16)
    np.testing.assert_array_equal(wide.ids, want[1])
    assert wide.scores.dtype == np.float64


@pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")
def test_threads_do_not_change_a_bit():
    rng = np.random.default_rng(2)
    q = rng.standard_normal((333, 3, 32), dtype=np.float32)
    keys = rng.standard_normal((3, 2, 200, 16), dtype=np.float32)
    results = []
    for threads in (1, 2, 5):
        lutra.set_num_threads(threads)
        try:
            results.append(lutra.address.product_keys(q, keys, 20))
        finally:
            lutra.set_num_threads(0)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("tokens", [2, 41])
def test_special_values(simd_level, tokens):
    rng = np.random.default_rng(3)
    q, keys = np.ones((tokens, 2), np.float32), rng.standard_normal((2, 50, 1)).astype(np.float32)
    for values in ([np.inf], [-np.inf], [-np.inf] * 45):
        some = keys.copy()
        some[0, : len(values), 0] = values
        check(q, some, 10)
    check(np.full((tokens, 2), -0.0, np.float32), keys, 10)  # zeros of both signs are equal
    bad = np.tile(q, (1, 1))
    bad[1, 1] = np.nan
    with pytest.raises(ValueError, match=r"query at \[1\] is NaN"):
        lutra.address.product_keys(bad, keys, 3)
    both = keys.copy()
    both[0, 7], both[1] = np.inf, -np.inf
    with pytest.raises(ValueError, match=r"query at \[0\] is NaN"):
        lutra.address.product_keys(q, both, 3)
    nan = keys.copy()
    nan[1, 49] = np.nan
    with pytest.raises(ValueError, match=r"query at \[0, 0\] is NaN"):
        lutra.address.product_keys(q[:, None], nan[None], 3)


def test_empty_and_not_contiguous(simd_level):
    rng = np.random.default_rng(4)
    keys = integers(rng, 3, 2, 40, 8)
    assert lutra.address.product_keys(np.zeros((0, 3, 16), np.float32), keys, 4).ids.shape == (0, 3, 4)
    q = integers(rng, 30, 3, 32)
    view, strided = q[::2, :, ::2], np.asfortranarray(keys)
    for lead in (view, view[:, None].repeat(2, 1), view[0]):
        got = lutra.address.product_keys(lead, strided, 4)
        want = reference.product_keys(np.ascontiguousarray(lead), keys, 4)
        np.testing.assert_array_equal(got.ids, want[1])
    one = lutra.address.product_keys(q[0, 0, :16], keys[0], 4)
    np.testing.assert_array_equal(one.ids, reference.product_keys(q[0, 0, :16], keys[0], 4)[1])
    flat = lutra.address.product_keys(np.zeros((2, 0), np.float32), np.zeros((2, 5, 0), np.float32), 3)
    np.testing.assert_array_equal(flat.ids, [[0, 1, 2]] * 2)


# ---------------------------------------------------------------- torch
def composed(q, keys, k):
    from lutra.torch_ops.product_keys import compose

    return compose(q, keys, k)


@pytest.mark.parametrize("heads", [None, 3])
def test_gradients_equal_those_of_torch_ops(simd_level, heads):
    torch.manual_seed(0)
    lead = () if heads is None else (heads,)
    q = torch.randn(4, 6, *lead, 20, requires_grad=True)
    keys = torch.randn(*lead, 2, 30, 10, requires_grad=True)
    ours, theirs = lutra.address.product_keys(q, keys, 7), composed(q, keys, 7)
    assert torch.equal(ours.ids, theirs[1])
    weight = torch.randn_like(theirs[0])
    got = torch.autograd.grad((ours.scores * weight).sum(), (q, keys))
    want = torch.autograd.grad((theirs[0] * weight).sum(), (q, keys))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradcheck_and_opcheck():
    torch.manual_seed(1)
    q = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: lutra.address.product_keys(a, b, 4).scores, (q, keys))
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (t.detach().to(dtype).requires_grad_() for t in (q, keys))
        torch.library.opcheck(torch.ops.lutra.product_keys, (a, b, 4))
    grad, ids = torch.randn(3, 2, 4), torch.randint(36, (3, 2, 4))
    sample = (grad, q.detach().float(), keys.detach().float(), ids, True, True)
    torch.library.opcheck(torch.ops.lutra.product_keys_backward, sample)


def test_half_precision_gradients():
    torch.manual_seed(2)
    q, keys = torch.randn(9, 16).bfloat16().requires_grad_(), torch.randn(2, 20, 8).half().requires_grad_()
    lutra.address.product_keys(q, keys, 5).scores.sum().backward()
    assert q.grad.dtype == torch.bfloat16 and keys.grad.dtype == torch.float16
    wide = [t.detach().float().requires_grad_() for t in (q, keys)]
    composed(*wide, 5)[0].sum().backward()
    torch.testing.assert_close(q.grad.float(), wide[0].grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(keys.grad.float(), wide[1].grad, rtol=1e-2, atol=1e-2)


Q, K = np.ones((2, 6), np.float32), np.ones((2, 5, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], K, 1), TypeError, "queries must be a NumPy"),
        ((Q.astype(np.int32), K, 1), TypeError, "queries has dtype int32"),
        ((Q, K.astype(np.int8), 1), TypeError, "keys has dtype int8"),
        ((Q.astype(np.float64), K, 1), TypeError, "float64 goes with float64"),
        ((Q, K[0], 1), ValueError, r"keys has shape \(5, 3\); it must be \(2, n, d / 2\)"),
        ((Q, K[:1], 1), ValueError, r"keys has shape \(1, 5, 3\)"),
        ((Q[:, :5], K, 1), ValueError, r"queries has shape \(2, 5\).*must be \(..., 6\)"),
        ((Q, K[None].repeat(3, 0), 1), ValueError, r"must be \(..., 3, 6\)"),
        ((Q, K, 6), ValueError, "k is 6; it must be at most n, of which keys has 5"),
        ((Q, K, 0), ValueError, "k must be >= 1"),
        ((Q, K, 1.5), TypeError, "k must be an integer"),
        ((Q, np.zeros((2, 65536, 3), np.float32), 1), ValueError, "at most 65535"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        lutra.address.product_keys(*arguments)
