"""lutra.scan.packed_logits and packed_topk against decoded rows."""

from __future__ import annotations

import numpy as np
import pytest

from lutra import _backend, gather, scan
from lutra.gather._packed import KINDS
from lutra.reference import packed as reference_packed
from lutra.reference import scan as reference
from lutra.scan import _packed_logits

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)


def case(tokens, rows, dim, kind, group=None):
    rng = np.random.default_rng([tokens, rows, dim])
    table = (rng.standard_normal((rows, dim)) * np.exp(rng.standard_normal((rows, 1)))).astype(np.float32)
    hidden = rng.standard_normal((tokens, dim), dtype=np.float32)
    packed = gather.pack_rows(table, kind, group)
    decoded = reference_packed.unpack_rows(packed, dim, kind, group)
    return hidden, packed, decoded, rng.standard_normal(rows, dtype=np.float32)


def close(got, hidden, decoded, bias=None, share=3e-6, unit=2.0**-24):
    """``share`` of the sizes of the terms, and ``unit`` of a token's largest magnitude in each column."""
    want = hidden.astype(np.float64) @ decoded.T
    size = np.abs(hidden).astype(np.float64) @ np.abs(decoded).T + 1e-6
    lost = np.abs(hidden).max(1, keepdims=True) * np.abs(decoded).sum(1) if hidden.size else 0
    size = size + lost * (unit / share)
    if bias is not None:
        want, size = want + bias, size + np.abs(bias)
    assert got.shape == want.shape and (np.abs(got - want) <= share * size + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes(kind, simd_level, features):
    if not features and (simd_level != "avx512" or kind not in ("int8", "int4", "int2")):
        pytest.skip("tested with features")
    for i, dim in enumerate(SIZES):
        tokens, rows = (1, 2, 3, 5, 8, 9, 17)[i % 7], SIZES[(i * 5 + 3) % 11]
        for group in (None, 16, 48):
            hidden, packed, decoded, bias = case(tokens, rows, dim, kind, group)
            got = scan.packed_logits(hidden, packed, kind=kind, group=group)
            assert got.dtype == np.float32
            close(got, hidden, decoded)
            close(scan.packed_logits(hidden, packed, bias, kind=kind, group=group), hidden, decoded, bias)


@pytest.mark.parametrize("kind", ("int8", "int4", "int2"))
@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_integers(kind, dtype):
    """All widths of a pass in either type; tokens with one large element; a table that needs many tiles."""
    unit, share = (2.0**-24, 3e-7) if dtype == "float32" else (2.0**-16, 2.0**-11)
    for tokens in (*range(1, 14), 65):
        for rows, dim, group in ((33, 130, None), (17, 200, 64)):
            hidden, packed, decoded, bias = case(tokens, rows, dim, kind, group)
            hidden[:, 7] *= 100
            hidden = hidden.astype(dtype)
            got = scan.packed_logits(hidden, packed, bias, kind=kind, group=group)
            close(got.astype(np.float64), hidden.astype(np.float64), decoded, bias, share, 1.01 * unit)
            alone = scan.packed_logits(hidden[-1:], packed, bias, kind=kind, group=group)
            if _backend.core is not None:  # NumPy's product promises no such thing
                assert np.array_equal(alone[0], got[-1])  # a token's bits do not depend on its neighbours


def test_outside_integers():
    """Tokens that no fixed point holds: tiny, zero, infinite, not a number."""
    hidden, packed, decoded, _ = case(5, 50, 64, "int8")
    hidden[1] *= 1e-36
    hidden[2] = 0
    got = scan.packed_logits(hidden, packed)
    close(got[[0, 3, 4]], hidden[[0, 3, 4]], decoded)
    assert (got[2] == 0).all() and np.allclose(got[1] * 1e36, hidden[1] * 1e36 @ decoded.T, rtol=1e-4)
    hidden[3, 5] = np.inf
    got = scan.packed_logits(hidden, packed)
    close(got[[0, 4]], hidden[[0, 4]], decoded)
    assert not np.isfinite(got[3]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_topk(kind, simd_level, threads):
    for tokens, rows in ((1, 3000), (11, 97)):
        hidden, packed, decoded, bias = case(tokens, rows, 33, kind)
        for k in (1, 20):
            got, ids = scan.packed_topk(hidden, packed, k, bias, kind=kind)
            scores = scan.packed_logits(hidden[:8], packed, bias, kind=kind)
            assert np.allclose(got[:8], -np.sort(-scores, 1)[:, :k], atol=1e-4)
            full = hidden @ decoded.T + bias
            assert np.allclose(np.take_along_axis(full, ids, 1), got, atol=1e-4)
    same = np.repeat(packed[:1], 50, 0)
    assert scan.packed_topk(hidden, same, 4, kind=kind).ids[0].tolist() == [0, 1, 2, 3]
    assert scan.packed_topk(hidden, same[:2], 4, kind=kind).ids[0].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16", "float64"))
def test_torch(dtype):
    """Few tokens and many, forward and backward, in every type."""
    torch = pytest.importorskip("torch")
    for tokens in (1, 5, 40):
        hidden, packed, decoded, bias = case(tokens, 1100, 24, "int4", 16)
        h = torch.from_numpy(hidden).to(getattr(torch, dtype)).requires_grad_(True)
        b = torch.from_numpy(bias).to(h.dtype).requires_grad_(True)
        out = scan.packed_logits(h, torch.from_numpy(packed), b, kind="int4", group=16)
        assert out.dtype == h.dtype
        share = {"float16": 2e-3, "bfloat16": 1.6e-2}.get(dtype, 3e-6)
        close(
            out.detach().double().numpy(),
            h.detach().double().numpy(),
            decoded,
            b.detach().double().numpy(),
            share,
        )
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
        out.backward(weight)
        want = weight.double().numpy() @ decoded
        assert np.abs(h.grad.double().numpy() - want).max() < 30 * share * np.abs(want).max()
        assert torch.allclose(b.grad.double(), weight.double().sum(0), atol=0.1 if share > 1e-5 else 1e-4)


_first: dict = {}


def test_threads_change_nothing(threads):
    hidden, packed, _, bias = case(13, 20000, 48, "int8")
    half = scan.packed_logits(hidden.astype(np.float16), packed, bias)
    got = [half, scan.packed_logits(hidden, packed, bias), *scan.packed_topk(hidden, packed, 9)]
    assert all(np.array_equal(a, b) for a, b in zip(got, _first.setdefault("got", got)))


def test_empty_and_not_contiguous():
    hidden, packed, _, bias = case(4, 60, 32, "int8")
    want = scan.packed_logits(hidden, packed, bias)
    got = scan.packed_logits(np.asfortranarray(hidden), np.asfortranarray(packed), bias)
    assert np.allclose(got, want, atol=1e-5)
    assert scan.packed_logits(hidden[:0], packed).shape == (0, 60)
    assert scan.packed_logits(hidden, packed[:0]).shape == (4, 0)
    assert (scan.packed_topk(hidden, packed[:0], 2).ids == -1).all()


def test_nan():
    hidden, packed, _, _ = case(2, 30, 32, "int8")
    hidden[1, 3] = np.nan
    got = scan.packed_logits(hidden, packed)
    assert np.isnan(got[1]).all() and np.isfinite(got[0]).all()
    with pytest.raises(ValueError, match="of packed is NaN"):
        scan.packed_topk(hidden, packed, 3)


def test_opcheck_and_compile():
    torch = pytest.importorskip("torch")
    import lutra.torch_ops  # noqa: F401

    hidden, packed, _, bias = (torch.from_numpy(a) for a in case(2, 30, 32, "nf4"))
    torch.library.opcheck(
        torch.ops.lutra.packed_logits, (hidden.clone().requires_grad_(True), packed, bias, "nf4", None)
    )
    torch.library.opcheck(torch.ops.lutra.packed_topk, (hidden, packed, bias, 3, "nf4", None))
    compiled = torch.compile(
        lambda h: scan.packed_logits(h, packed, kind="nf4"), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(hidden), scan.packed_logits(hidden, packed, kind="nf4"))


def test_errors():
    hidden, packed, _, bias = case(2, 30, 32, "int8")
    with pytest.raises(ValueError, match="packed has rows of"):
        scan.packed_logits(hidden[:, :31], packed)
    with pytest.raises(ValueError, match="kind must be"):
        scan.packed_logits(hidden, packed, kind="int3")
    with pytest.raises(ValueError, match="bias has shape"):
        scan.packed_logits(hidden, packed, bias[:3])
    with pytest.raises(TypeError, match="packed has dtype"):
        scan.packed_logits(hidden, packed.astype(np.int32))
    with pytest.raises(ValueError, match="k must be"):
        scan.packed_topk(hidden, packed, 0)
    assert _packed_logits.FUSED_HALF <= _packed_logits.FUSED_FLOAT
    assert reference.packed_logits(hidden, hidden).shape == (2, 2)
