"""lutra.scan.lookups, lookups_topk and pq_logits against the reference."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import scan
from lutra.reference import scan as reference

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)


def case(tokens, m, n, bits, seed=0):
    rng = np.random.default_rng([tokens, m, n, bits, seed])
    tables = rng.standard_normal((m, tokens, 1 << bits), dtype=np.float32)
    codes = rng.integers(0, 256, (n, (m * bits + 7) // 8), dtype=np.uint8)
    return tables, codes, rng.standard_normal(n, dtype=np.float32)


def exact(tables, codes, bits, bias=None):
    return reference.lookups(tables.astype(np.float64), codes, bits, bias)


@pytest.mark.parametrize("bits", range(1, 9))
def test_odd_sizes(bits, simd_level, features):
    for i, n in enumerate(SIZES):
        m, tokens = SIZES[(i * 4 + bits) % 11], SIZES[(i * 7 + bits) % 8]
        tables, codes, bias = case(tokens, m, n, bits)
        for b in (None, bias):
            want = exact(tables, codes, bits, b)
            got = scan.lookups(tables, codes, b, bits=bits)
            assert got.dtype == np.float32 and got.shape == (tokens, n)
            assert np.abs(got - want).max() < 3e-6 * (1 + m**0.5)


@pytest.mark.parametrize("bits", (4, 8))
def test_many_lookups_and_rows(bits, simd_level, features):
    for tokens, m, n in ((3, 300, 1100), (2, 520, 70), (70, 9, 513), (1, 32, 9000)):
        tables, codes, bias = case(tokens, m, n, bits)
        got = scan.lookups(tables, codes, bias, bits=bits)
        assert np.abs(got - exact(tables, codes, bits, bias)).max() < 5e-6 * (1 + m**0.5)


def test_wide_and_narrow_tables(simd_level, features):
    """Equal entries, ranges that differ by much, large offsets: the error is a part of the widest."""
    tables, codes, _ = case(4, 24, 200, 8)
    tables[:, 1] = 3
    tables[:, 2] *= 10.0 ** np.linspace(-6, 6, 24)[:, None].astype(np.float32)
    tables[:, 3] = np.abs(tables[:, 3]) * 1e-30 + 1e-30
    got, want = scan.lookups(tables, codes), exact(tables, codes, 8)
    for t in range(4):
        size = np.abs(tables[:, t]).max(1).sum()
        assert np.abs(got[t] - want[t]).max() <= 1e-6 * size


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_results_of_16_bits(dtype, simd_level, features):
    torch = pytest.importorskip("torch")
    tables, codes, bias = case(17, 33, 300, 8)
    want = exact(tables, codes, 8, bias)
    got = scan.lookups(*map(torch.from_numpy, (tables, codes, bias)), dtype=dtype)
    assert got.dtype == getattr(torch, dtype)
    size = np.abs(want).max()
    assert (
        np.abs(got.double().numpy() - want).max() < size * (2**-8 if dtype == "bfloat16" else 2**-11) + 1e-3
    )


def test_not_finite(simd_level, features):
    """NaN and infinities go where arithmetic takes them; the other tokens are as they were."""
    tables, codes, _ = case(3, 20, 100, 8)
    tables[4, 0, 7], tables[5, 2, 9] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        want = exact(tables, codes, 8)
    got = scan.lookups(tables, codes)
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.array_equal(np.isinf(got), np.isinf(want))
    here = np.isfinite(want)
    assert here[1].all() and np.abs(got[here] - want[here]).max() < 1e-4
    codes[50, 4] = 7
    with pytest.raises(ValueError, match="of codes is NaN"):
        scan.lookups_topk(tables, codes, 3)


@pytest.mark.parametrize("bits", (3, 4, 8))
def test_topk(bits, simd_level, features, threads):
    for tokens, m, n in ((1, 16, 5000), (5, 33, 97), (40, 3, 1025)):
        tables, codes, bias = case(tokens, m, n, bits)
        scores = scan.lookups(tables, codes, bias, bits=bits)
        for k in (1, 10, 70):
            got, ids = scan.lookups_topk(tables, codes, k, bias, bits=bits)
            want, rows = reference.select(scores, np.broadcast_to(np.arange(n), scores.shape), k)
            assert np.array_equal(got, want) and np.array_equal(ids, rows)
    tables, codes, _ = case(2, 4, 300, bits)
    codes[:] = codes[0]  # all equal: the lowest rows
    assert scan.lookups_topk(tables, codes, 5, bits=bits).ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    few = scan.lookups_topk(tables, codes[:2], 4, bits=bits)
    assert few.ids[0].tolist() == [0, 1, -1, -1] and few.scores[0, 2] == -np.inf


_first: dict = {}


def test_threads_change_nothing(threads):
    tables, codes, bias = case(20, 33, 20000, 8)
    got = [scan.lookups(tables, codes, bias), *scan.lookups_topk(tables, codes, 9, bias)]
    torch = pytest.importorskip("torch")
    import lutra.torch_ops  # noqa: F401

    grad = torch.randn(20, 20000, generator=torch.Generator().manual_seed(0))
    got.append(torch.ops.lutra.lookups_backward(grad, torch.from_numpy(codes), 33, 8).numpy())
    assert all(np.array_equal(a, b) for a, b in zip(got, _first.setdefault("got", got)))


def test_empty():
    tables, codes, _ = case(2, 4, 10, 8)
    assert scan.lookups(tables, codes[:0]).shape == (2, 0)
    assert scan.lookups(tables[:, :0], codes).shape == (0, 10)
    assert scan.lookups_topk(tables[:, :0], codes, 3).ids.shape == (0, 3)
    assert (scan.lookups_topk(tables, codes[:0], 3).ids == -1).all()


def test_not_contiguous():
    tables, codes, bias = case(6, 8, 50, 8)
    want = scan.lookups(tables, codes, bias)
    assert np.array_equal(scan.lookups(np.asfortranarray(tables), codes, bias), want)
    assert np.array_equal(scan.lookups(tables, np.asfortranarray(codes), bias.repeat(2)[::2]), want)
    torch = pytest.importorskip("torch")
    t = torch.from_numpy(tables).transpose(0, 1).contiguous().transpose(0, 1)  # tokens first: read as it is
    c = torch.from_numpy(codes)
    assert np.array_equal(scan.lookups(t, c, torch.from_numpy(bias)).numpy(), want)
    odd = torch.from_numpy(tables).transpose(1, 2).contiguous().transpose(1, 2)
    assert np.array_equal(scan.lookups(odd, c, torch.from_numpy(bias)).numpy(), want)


def test_float64():
    tables, codes, bias = case(3, 9, 40, 5)
    got = scan.lookups(tables.astype(np.float64), codes, bias, bits=5)
    assert got.dtype == np.float64 and np.allclose(got, exact(tables, codes, 5, bias), atol=1e-13)
    torch = pytest.importorskip("torch")
    t = scan.lookups(torch.from_numpy(tables).double(), torch.from_numpy(codes), bits=5)
    assert t.dtype == torch.float64 and np.allclose(t.numpy(), exact(tables, codes, 5), atol=1e-13)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("bits", (2, 5, 8))
def test_gradient(bits, dtype, simd_level):
    torch = pytest.importorskip("torch")
    for tokens, m, n in ((1, 17, 300), (33, 5, 97), (16, 16, 64), (3, 1, 1)):
        tables, codes, bias = (torch.from_numpy(a) for a in case(tokens, m, n, bits))
        tables.requires_grad_(True)
        bias.requires_grad_(True)
        out = scan.lookups(tables, codes, bias, bits=bits, dtype=dtype)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
        out.backward(weight)
        want = reference.lookups_backward(weight.double().numpy(), codes.numpy(), m, bits)
        assert np.abs(tables.grad.numpy() - want).max() < 1e-5 * (1 + np.abs(want).max())
        assert torch.allclose(bias.grad.double(), weight.double().sum(0), atol=1e-4)


def test_gradcheck_and_opcheck():
    torch = pytest.importorskip("torch")
    import lutra.torch_ops  # noqa: F401

    tables, codes, bias = (torch.from_numpy(a) for a in case(2, 3, 7, 2))
    wide = tables.double().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda t, b: scan.lookups(t, codes, b, bits=2), (wide, bias.double().requires_grad_(True))
    )
    torch.library.opcheck(torch.ops.lutra.lookups, (tables.requires_grad_(True), codes, bias, 2, "float32"))
    torch.library.opcheck(torch.ops.lutra.lookups_topk, (tables.detach(), codes, bias, 3, 2))
    compiled = torch.compile(
        lambda t: scan.lookups(t, codes, bias, bits=2), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(tables), scan.lookups(tables, codes, bias, bits=2))


@pytest.mark.parametrize("kind", ("numpy", "float32", "bfloat16", "float64"))
def test_pq_logits(kind):
    rng = np.random.default_rng(0)
    hidden, books = rng.standard_normal((5, 24), np.float32), rng.standard_normal((6, 16, 4), np.float32)
    codes, bias = rng.integers(0, 256, (70, 3), dtype=np.uint8), rng.standard_normal(70, np.float32)
    entries = reference.unpack(codes, 6, 4)
    table = np.concatenate([books[j][entries[:, j]] for j in range(6)], 1)
    want = hidden.astype(np.float64) @ table.T + bias
    if kind == "numpy":
        got = scan.pq_logits(hidden, codes, books, bias, bits=4)
        assert got.dtype == np.float32
    else:
        torch = pytest.importorskip("torch")
        dtype = getattr(torch, kind)
        arrays = [
            torch.from_numpy(hidden).to(dtype),
            torch.from_numpy(codes),
            torch.from_numpy(books).to(dtype),
        ]
        arrays[0].requires_grad_(True)
        out = scan.pq_logits(*arrays, torch.from_numpy(bias), bits=4)
        assert out.dtype == dtype
        out.sum().backward()
        assert np.abs(arrays[0].grad.double().numpy() - table.sum(0)).max() < (
            0.3 if kind == "bfloat16" else 1e-3
        )
        got = out.detach().double().numpy()
    assert np.abs(got - want).max() < {"bfloat16": 0.15, "float64": 1e-5}.get(kind, 1e-4)


def test_errors():
    tables, codes, bias = case(2, 4, 10, 8)
    for bad in ((tables[:, :, :5], codes), (tables, codes[:, :3]), (tables[:0], codes[:, :0])):
        with pytest.raises(ValueError, match="must have shapes"):
            scan.lookups(*bad)
    with pytest.raises(ValueError, match="bits must be in"):
        scan.lookups(tables, codes, bits=9)
    with pytest.raises(ValueError, match="bias has shape"):
        scan.lookups(tables, codes, bias[:3])
    with pytest.raises(TypeError, match="codes has dtype"):
        scan.lookups(tables, codes.astype(np.int64))
    with pytest.raises(TypeError, match="tables has dtype"):
        scan.lookups(tables.astype(np.float16), codes)
    with pytest.raises(ValueError, match="dtype must be"):
        scan.lookups(tables, codes, dtype="int8")
    with pytest.raises(ValueError, match="k must be"):
        scan.lookups_topk(tables, codes, 0)
    with pytest.raises(ValueError, match="must have m"):
        scan.pq_logits(np.zeros((2, 7), np.float32), codes, np.zeros((4, 256, 2), np.float32))
    assert lutra.scan.lookups is scan.lookups
