"""lutra.gather.tables of int8 tables against the reference, and against the rows they stand for."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import gather as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97, 130)


def make(tokens, n_tables, entries, dim, seed=0):
    """(codes of the tables, scale, minimum), (codes, weights, bias)."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_tables * entries, dim, generator=g) + torch.randn(n_tables * entries, 1, generator=g)
    packed = [a.view(n_tables, entries, *a.shape[1:]) for a in lutra.gather.quantize_rows(rows, "int8")]
    codes = torch.randint(0, entries, (tokens, n_tables), generator=g, dtype=torch.int32)
    return packed, (codes, torch.rand(tokens, n_tables, generator=g), torch.randn(dim, generator=g))


def close(got, want, limit):
    scale = max(1.0, np.abs(want).max(initial=0))
    np.testing.assert_allclose(got.float().numpy(), want, rtol=limit, atol=limit * scale)


@pytest.mark.parametrize("bias", [None, "float32", "bfloat16", "float16"])
def test_every_size(simd_level, bias):
    limit = {"bfloat16": 1e-2, "float16": 2e-3}.get(bias, 4e-5)
    for i, dim in enumerate(SIZES):
        for tokens, n_tables, entries in ((5, 3, 4), (1, 17, 16), (40, 2, 1)):
            (t, scale, minimum), (codes, weights, b) = make(tokens, n_tables, entries, dim, i)
            b = None if bias is None else b.to(getattr(torch, bias))
            for w in (weights, None):
                got = lutra.gather.tables(t, codes, w, b, scale, minimum)
                assert got.dtype == (torch.float32 if b is None else b.dtype) and got.shape == (tokens, dim)
                args = [None if a is None else a.float().numpy() for a in (w, b, scale, minimum)]
                close(got, reference.tables(t.numpy(), codes.numpy(), *args), limit)


@pytest.mark.parametrize("tokens", [1, 65, 500])
def test_many_tokens(simd_level, threads, tokens):
    (t, scale, minimum), (codes, weights, bias) = make(tokens, 19, 100, 300)
    rows = minimum[..., None] + scale[..., None] * t
    got = lutra.gather.tables(t, codes, weights, bias, scale, minimum)
    close(got, lutra.gather.tables(rows, codes, weights, bias).numpy(), 1e-5)
    for i in (0, tokens // 2, tokens - 1):
        assert torch.equal(lutra.gather.tables(t, codes[i], weights[i], bias, scale, minimum), got[i])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradient_of_the_weights(simd_level, dtype):
    for dim in (1, 17, 64, 300):
        (t, scale, minimum), (codes, weights, _) = make(70, 3, 8, dim, dim)
        grad = torch.randn(70, dim).to(getattr(torch, dtype))
        none, got = torch.ops.lutra.tables_backward(grad, t, codes, weights, False, True, scale, minimum)
        want = reference.tables_backward(
            grad.float().numpy(), t.numpy(), codes.numpy(), None, False, True, scale.numpy(), minimum.numpy()
        )[1]
        assert none.numel() == 0
        close(got, want, 1e-4)


def test_autograd_and_opcheck():
    (t, scale, minimum), (codes, weights, bias) = make(9, 3, 8, 20)
    rows = minimum[..., None] + scale[..., None] * t
    found = []
    for args in ((t, codes, None, None, scale, minimum), (rows, codes, None, None)):
        w, b = weights.clone().requires_grad_(), bias.clone().requires_grad_()
        lutra.gather.tables(args[0], args[1], w, b, *args[4:]).square().sum().backward()
        found.append((w.grad, b.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)
    torch.library.opcheck(
        torch.ops.lutra.tables.default,
        (t, codes, weights.requires_grad_(), bias.requires_grad_(), scale, minimum),
    )


@pytest.mark.skipif(_backend.core is None, reason="the CPU module is missing")
def test_numpy_and_threads(simd_level):
    (t, scale, minimum), (codes, weights, bias) = make(450, 6, 100, 200)
    results = []
    for n in (1, 2, 3):
        _backend.core.set_num_threads(n)
        arrays = (a.numpy() for a in (t, codes, weights, bias, scale, minimum))
        results.append(lutra.gather.tables(*arrays).tobytes())
    _backend.core.set_num_threads(0)
    assert results[0] == results[1] == results[2]


def test_bad_input():
    (t, scale, minimum), (codes, weights, bias) = make(4, 3, 8, 6)
    with pytest.raises(ValueError, match="int8 tables need scale"):
        lutra.gather.tables(t, codes)
    with pytest.raises(ValueError, match="int8 tables need minimum"):
        lutra.gather.tables(t, codes, scale=scale)
    with pytest.raises(ValueError, match=r"minimum has shape \(3, 7\); it must be \(3, 8\)"):
        lutra.gather.tables(t, codes, scale=scale, minimum=minimum[:, :7])
    with pytest.raises(ValueError, match="scale and minimum are for int8 tables"):
        lutra.gather.tables(t.float(), codes, scale=scale, minimum=minimum)
    with pytest.raises(TypeError, match="scale has dtype float64; it must be one of float32"):
        lutra.gather.tables(t, codes, scale=scale.double(), minimum=minimum)
    with pytest.raises(TypeError, match="bias has dtype int32"):
        lutra.gather.tables(t, codes, weights, bias.int(), scale, minimum)
    with pytest.raises(IndexError, match=r"codes\[0, 0\] is 8"):
        lutra.gather.tables(t, codes * 0 + 8, weights, bias, scale, minimum)
    with pytest.raises(TypeError, match="int8 tables have no gradient"):
        torch.ops.lutra.tables_backward(torch.zeros(4, 6), t, codes, None, True, False, scale, minimum)
