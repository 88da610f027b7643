"""lutra.gather.tables and its gradients against the reference."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import gather as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
FLOATS = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 4e-6, "float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-12}


def make(tokens, n_tables, entries, dim, dtype="float32", seed=0):
    """(tables, codes, weights, bias) as torch tensors."""
    g = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    return (
        torch.randn(n_tables, entries, dim, generator=g).to(kind),
        torch.randint(0, entries, (tokens, n_tables), generator=g, dtype=torch.int32),
        torch.rand(tokens, n_tables, generator=g).to(torch.float64 if dtype == "float64" else torch.float32),
        torch.randn(dim, generator=g).to(kind),
    )


def wide(t):
    return None if t is None else (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()


def close(got, expected, dtype, factor=1.0):
    limit = TOLERANCE[dtype] * factor
    np.testing.assert_allclose(
        wide(got), expected, rtol=limit, atol=limit * max(1.0, np.abs(expected).max(initial=0))
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_size(simd_level, dtype):
    for i, dim in enumerate(SIZES):
        for tokens, n_tables, entries in ((5, 3, 4), (1, 7, 16), (40, 2, 1)):
            t, codes, weights, bias = make(tokens, n_tables, entries, dim, dtype, i)
            for w in (weights, None):
                for b in (bias, None):
                    got = lutra.gather.tables(t, codes, w, b)
                    assert got.dtype == t.dtype and got.shape == (tokens, dim)
                    close(got, reference.tables(wide(t), wide(codes), wide(w), wide(b)), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 2, 65, 1100])
def test_many_tokens(simd_level, threads, tokens, dtype):
    t, codes, weights, bias = make(tokens, 9, 256, 300, dtype)
    got = lutra.gather.tables(t, codes, weights, bias)
    close(got, reference.tables(wide(t), wide(codes), wide(weights), wide(bias)), dtype)
    close(lutra.gather.tables(t, codes), reference.tables(wide(t), wide(codes)), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(simd_level, dtype):
    for dim in SIZES:
        for tokens, n_tables, entries in ((5, 3, 4), (1, 7, 16), (90, 2, 3)):
            t, codes, weights, _ = make(tokens, n_tables, entries, dim, dtype, dim)
            grad = make(tokens, n_tables, tokens, dim, dtype, 5)[0][0]
            for w in (weights, None):
                got = torch.ops.lutra.tables_backward(grad, t, codes, w, True, True)
                want = reference.tables_backward(wide(grad), wide(t), wide(codes), wide(w))
                assert got[0].dtype == t.dtype and got[1].dtype == torch.float32
                close(got[0], want[0], dtype, 4)
                close(got[1], want[1], "float32", 1 + dim)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_many_tokens(simd_level, threads, dtype):
    t, codes, weights, _ = make(600, 5, 256, 300, dtype)
    grad = torch.randn(600, 300).to(t.dtype)
    got = torch.ops.lutra.tables_backward(grad, t, codes, weights, True, True)
    want = reference.tables_backward(wide(grad), wide(t), wide(codes), wide(weights))
    close(got[0], want[0], dtype, 4)
    close(got[1], want[1], "float32", 100)


@pytest.mark.skipif(_backend.core is None, reason="the CPU module is missing")
def test_same_bits_with_any_number_of_threads(simd_level):
    t, codes, weights, bias = make(500, 6, 100, 200)
    grad = torch.randn(500, 200)
    results = []
    for n in (1, 2, 3):
        _backend.core.set_num_threads(n)
        out = [lutra.gather.tables(t, codes, weights, bias)]
        out += torch.ops.lutra.tables_backward(grad, t, codes, weights, True, True)
        results.append([a.numpy().tobytes() for a in out])
    _backend.core.set_num_threads(0)
    assert results[0] == results[1] == results[2]


def test_a_token_is_the_same_in_any_batch(simd_level):
    t, codes, weights, bias = make(300, 7, 64, 130)
    together = lutra.gather.tables(t, codes, weights, bias)
    for i in (0, 17, 299):
        alone = lutra.gather.tables(t, codes[i], weights[i], bias)
        torch.testing.assert_close(alone, together[i], rtol=0, atol=0)


def test_shapes_and_kinds(simd_level):
    t, codes, weights, bias = make(24, 3, 8, 20)
    expected = reference.tables(wide(t), wide(codes), wide(weights), wide(bias))
    lead = lutra.gather.tables(t, codes.reshape(2, 3, 4, 3), weights.reshape(2, 3, 4, 3), bias)
    assert lead.shape == (2, 3, 4, 20)
    close(lead.reshape(24, 20), expected, "float32")
    out = lutra.gather.tables(t.numpy(), codes.numpy(), weights.numpy(), bias.numpy())
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, lead.reshape(24, 20))
    assert lutra.gather.tables(t, codes[:0]).shape == (0, 20)
    assert lutra.gather.tables(t[:, :, :0], codes).shape == (24, 0)
    np.testing.assert_array_equal(
        lutra.gather.tables(t[:0], codes[:, :0], None, bias), wide(bias)[None].repeat(24, 0)
    )
    wide_table = make(24, 3, 8, 41)[0]
    views = lutra.gather.tables(wide_table[:, :, 1:41:2], codes.t().contiguous().t(), weights[:, :3], bias)
    close(
        views,
        reference.tables(wide(wide_table)[:, :, 1:41:2], wide(codes), wide(weights), wide(bias)),
        "float32",
    )
    halves = lutra.gather.tables(t, codes, weights.half(), bias)
    close(halves, reference.tables(wide(t), wide(codes), wide(weights.half()), wide(bias)), "float32")


def test_gradcheck():
    t, codes, weights, bias = (
        a.requires_grad_() if a.is_floating_point() else a for a in make(4, 3, 4, 5, "float64")
    )
    assert torch.autograd.gradcheck(lutra.gather.tables, (t, codes, weights, bias))
    assert torch.autograd.gradcheck(lambda t: lutra.gather.tables(t, codes), (t,))


def test_autograd_of_the_kernel(simd_level):
    args = make(30, 3, 8, 33)
    narrow = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
    exact = [a.double().requires_grad_() if a.is_floating_point() else a for a in args]
    grad = torch.randn(30, 33)
    lutra.gather.tables(*narrow).backward(grad)
    lutra.gather.tables(*exact).backward(grad.double())
    for a, b in zip(narrow, exact):
        if a.is_floating_point():
            torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-4, atol=1e-4)


def test_opcheck():
    for dtype in (*FLOATS, "float64"):
        t, codes, weights, bias = make(4, 3, 8, 6, dtype)
        for a in (t, weights, bias):
            a.requires_grad_()
        torch.library.opcheck(torch.ops.lutra.tables.default, (t, codes, weights, bias))
        torch.library.opcheck(torch.ops.lutra.tables.default, (t, codes))
        grad = torch.randn(4, 6).to(t.dtype)
        t, weights = t.detach(), weights.detach()
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(torch.ops.lutra.tables_backward.default, (grad, t, codes, weights, *needs))


def test_compile():
    def f(t, codes, weights, bias):
        return (lutra.gather.tables(t, codes, weights, bias).tanh() ** 2).sum()

    args = [a.requires_grad_() if a.is_floating_point() else a for a in make(4, 3, 8, 6)]
    f(*args).backward()
    want = [a.grad for a in args]
    for a in args:
        a.grad = None
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    compiled(*args).backward()
    for a, b in zip(args, want):
        torch.testing.assert_close(a.grad, b)


@pytest.mark.parametrize("numpy", [True, False])
def test_bad_input(simd_level, numpy):
    def call(t, codes, weights=None, bias=None):
        args = [a.numpy() if numpy and a is not None else a for a in (t, codes, weights, bias)]
        return lutra.gather.tables(*args)

    t, codes, weights, bias = make(4, 3, 8, 6)
    wrong = codes.clone()
    wrong[2, 1], wrong[3, 0] = 8, -1
    with pytest.raises(IndexError, match=r"codes\[2, 1\] is 8; codes must lie in \[0, 8\)"):
        call(t, wrong)
    wrong[0, 0] = -3
    with pytest.raises(IndexError, match=r"codes\[0, 0\] is -3"):
        call(t, wrong, weights)
    with pytest.raises(TypeError, match="codes has dtype int64; it must be one of int32"):
        call(t, codes.long())
    with pytest.raises(TypeError, match="tables has dtype int32"):
        call(t.int(), codes)
    with pytest.raises(ValueError, match="tables must be 3-d"):
        call(t[0], codes)
    with pytest.raises(
        ValueError, match=r"codes has shape \(4, 2\); its last axis must be the number of tables, 3"
    ):
        call(t, codes[:, :2])
    with pytest.raises(ValueError, match=r"weights has shape \(4,\); it must be that of codes, \(4, 3\)"):
        call(t, codes, weights[:, 0])
    with pytest.raises(TypeError, match="weights has dtype int32"):
        call(t, codes, codes)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\); it must be \(6,\)"):
        call(t, codes, weights, bias[:5])
    with pytest.raises(TypeError, match="bias has dtype float16; it must be one of float32"):
        call(t, codes, weights, bias.half())
    grad = torch.randn(4, 6)
    with pytest.raises(IndexError, match=r"codes\[0, 0\] is -3"):
        torch.ops.lutra.tables_backward(grad, t, wrong, weights, True, True)
    with pytest.raises(ValueError, match=r"grad has shape \(4, 5\); it must be \(4, 6\)"):
        torch.ops.lutra.tables_backward(grad[:, :5], t, codes, weights, True, True)


def test_mixed_libraries():
    t, codes, _, _ = make(4, 3, 8, 6)
    with pytest.raises(TypeError, match="codes is a torch tensor on cpu, tables is a NumPy array"):
        lutra.gather.tables(t.numpy(), codes)
    with pytest.raises(TypeError, match="codes must be a torch tensor"):
        lutra.gather.tables(t, codes.numpy())


@pytest.mark.parametrize("dim", [1, 2, 65])
def test_few_columns_and_work_for_several_threads(simd_level, threads, dim):
    """One column cannot be halved among threads."""
    rng = np.random.default_rng(0)
    table, bias = rng.standard_normal((24, 64, dim), np.float32), rng.standard_normal(dim, np.float32)
    codes, weights = rng.integers(0, 64, (256, 24)).astype(np.int32), rng.random((256, 24), np.float32)
    got = lutra.gather.tables(table, codes, weights, bias)
    np.testing.assert_allclose(got, reference.tables(table, codes, weights, bias), rtol=1e-4, atol=1e-4)
