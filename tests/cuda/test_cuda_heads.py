"""Logits of packed rows and of codes on CUDA, and their gradients, against the reference."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from gpu_arrays import SIZES

import lutra
from lutra import _arrays, _backend, gather, scan
from lutra.gather._packed import KINDS
from lutra.reference import packed as packed_reference
from lutra.reference import scan as scan_reference
from lutra.scan import _lookups

UNIT = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- packed rows
def packed_case(rng, tokens, rows, dim, kind, group=None):
    table = (rng.standard_normal((rows, dim)) * np.exp(rng.standard_normal((rows, 1)))).astype(np.float32)
    hidden = rng.standard_normal((tokens, dim), dtype=np.float32)
    packed = gather.pack_rows(table, kind, group)
    decoded = packed_reference.unpack_rows(packed, dim, kind, group)
    return hidden, packed, decoded, rng.standard_normal(rows, dtype=np.float32)


def close_logits(got, hidden, decoded, bias=None, dtype="float32"):
    """Within some roundings of the terms' sizes: of the result's type once, of fp32 for the sum."""
    hidden, decoded = hidden.astype(np.float64), decoded.astype(np.float64)
    want = hidden @ decoded.T
    size = np.abs(hidden) @ np.abs(decoded).T + np.abs(hidden).sum(1, keepdims=True) * np.abs(decoded).max(1)
    if bias is not None:
        want, size = want + bias, size + np.abs(bias)
    limit = 4e-6 * size + (UNIT[dtype] * np.abs(want) if dtype != "float32" else 0) + 1e-6
    assert got.shape == want.shape
    assert (np.abs(got - want) <= limit).all()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits(gpu, rng, kind):
    for i, dim in enumerate((*SIZES, 130, 256, 300, 520)):
        tokens, rows = (1, 2, 7, 8, 9, 16, 17, 33)[i % 8], (*SIZES, 130)[(i * 5 + 3) % 12]
        for group in (None, 16, 48):
            hidden, packed, decoded, bias = packed_case(rng, tokens, rows, dim, kind, group)
            on_gpu = gpu.put(hidden), gpu.put(packed)
            offsets = gpu.put(bias)
            with gpu.no_sync():
                plain = scan.packed_logits(*on_gpu, kind=kind, group=group)
                moved = scan.packed_logits(*on_gpu, offsets, kind=kind, group=group)
            assert gpu.owns(plain)
            close_logits(gpu.get(plain), hidden, decoded)
            close_logits(gpu.get(moved), hidden, decoded, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_packed_logits_groups(gpu_torch, rng, kind, group):
    """Groups that end with 16 bytes of codes and ones that do not, in rows of some chunks."""
    for dim in (group + 1, 1040, 2200):
        hidden, packed, decoded, _ = packed_case(rng, 5, 19, dim, kind, group)
        got = scan.packed_logits(gpu_torch.put(hidden), gpu_torch.put(packed), kind=kind, group=group)
        close_logits(gpu_torch.get(got), hidden, decoded)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_logits_of_16_bits(gpu, rng, dtype):
    for kind, tokens in (("int8", 3), ("int4", 12), ("nf4", 40), ("fp8_e4m3", 200)):
        hidden, packed, decoded, bias = packed_case(rng, tokens, 70, 90, kind)
        h = gpu.put(hidden, dtype)
        got = scan.packed_logits(h, gpu.put(packed), gpu.put(bias), kind=kind)
        assert got.dtype == h.dtype
        share = "float32" if tokens <= 192 else dtype  # beyond, rows are rounded too
        values = gpu.get(h).astype(np.float64)
        size = np.abs(values) @ np.abs(decoded.T) + 1
        want = values @ decoded.T.astype(np.float64) + bias
        limit = UNIT[dtype] * (np.abs(want) + (0 if share == "float32" else size)) + 4e-6 * size
        assert (np.abs(gpu.get(got).astype(np.float64) - want) <= 1.1 * limit).all()


def test_packed_logits_does_not_depend_on_the_batch(gpu, rng):
    hidden, packed, _, bias = packed_case(rng, 40, 150, 100, "int4")
    all_of_them = gpu.get(scan.packed_logits(gpu.put(hidden), gpu.put(packed), gpu.put(bias), kind="int4"))
    for count in (1, 8, 9, 33):
        part = scan.packed_logits(gpu.put(hidden[:count]), gpu.put(packed), gpu.put(bias), kind="int4")
        assert gpu.get(part).tobytes() == all_of_them[:count].tobytes()


def test_packed_logits_scales_infinity_and_nan(gpu, rng):
    hidden, packed, decoded, _ = packed_case(rng, 6, 50, 64, "int8")
    hidden[1] *= 1e-36
    hidden[2] = 0
    hidden[3] *= 1e30
    hidden[4, 5] = np.nan
    hidden[5, 3] = np.inf
    got = gpu.get(scan.packed_logits(gpu.put(hidden), gpu.put(packed)))
    close_logits(got[:1], hidden[:1], decoded)
    close_logits(got[1:2] * 1e36, hidden[1:2] * np.float32(1e36), decoded)
    close_logits(got[3:4] / np.float32(1e30), hidden[3:4] / np.float32(1e30), decoded)
    assert (got[2] == 0).all() and np.isnan(got[4]).all() and not np.isfinite(got[5]).any()
    scores, ids = scan.packed_topk(gpu.put(hidden[4:5]), gpu.put(packed), 3)
    assert np.isnan(gpu.get(scores)).all() and gpu.get(ids).tolist() == [[0, 1, 2]]


def test_packed_rows_of_special_floats(gpu, rng):
    """Every code of the 8-bit floats, and what lies behind a row's codes is not read as one."""
    for kind in ("fp8_e4m3", "fp8_e5m2"):
        for dim in (1, 5, 18):
            codes = rng.integers(0, 256, (256, dim)).astype(np.uint8)
            codes[:, 0] = np.arange(256)
            scale = np.full((256, 1), -np.inf, np.float32)
            packed = np.concatenate([codes, scale.view(np.uint8)], 1)
            packed[:, -4:] = np.ones((256, 1), np.float32).view(np.uint8)
            decoded = packed_reference.unpack_rows(packed, dim, kind)
            finite = np.isfinite(decoded).all(1)
            hidden = rng.standard_normal((2, dim), dtype=np.float32)
            got = gpu.get(scan.packed_logits(gpu.put(hidden), gpu.put(packed), kind=kind))
            close_logits(got[:, finite], hidden, decoded[finite])
            assert not np.isfinite(got[:, ~finite]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_topk(gpu, rng, kind):
    for tokens, rows, k in ((1, 300, 1), (3, 97, 20), (17, 200, 200), (2, 40, 60)):
        hidden, packed, _, bias = packed_case(rng, tokens, rows, 33, kind)
        on_gpu = gpu.put(hidden), gpu.put(packed)
        offsets = gpu.put(bias)
        with gpu.no_sync():
            scores, ids = scan.packed_topk(*on_gpu, k, offsets, kind=kind)
        logits = gpu.get(scan.packed_logits(*on_gpu, offsets, kind=kind))
        order = np.argsort(-logits, 1, kind="stable")[:, :k]
        found = order.shape[1]
        np.testing.assert_array_equal(gpu.get(ids)[:, :found], order)
        np.testing.assert_array_equal(gpu.get(scores)[:, :found], np.take_along_axis(logits, order, 1))
        assert (gpu.get(ids)[:, found:] == -1).all() and (gpu.get(scores)[:, found:] == -np.inf).all()
    same = np.repeat(packed[:1], 50, 0)
    assert gpu.get(scan.packed_topk(on_gpu[0], gpu.put(same), 4, kind=kind).ids)[0].tolist() == [0, 1, 2, 3]


def test_packed_topk_any_k(gpu, rng):
    hidden, packed, _, _ = packed_case(rng, 2, 2300, 16, "int4")
    for k in (2048, 2049, 2300, 2400):
        ids = gpu.get(scan.packed_topk(gpu.put(hidden), gpu.put(packed), k, kind="int4").ids)
        logits = gpu.get(scan.packed_logits(gpu.put(hidden), gpu.put(packed), kind="int4"))
        order = np.argsort(-logits, 1, kind="stable")[:, :k]
        np.testing.assert_array_equal(ids[:, : order.shape[1]], order)
        assert (ids[:, order.shape[1] :] == -1).all()


def test_packed_logits_unaligned_and_empty(gpu, rng):
    for kind in ("int8", "int4", "nf4"):
        hidden, packed, decoded, _ = packed_case(rng, 3, 40, 50, kind)
        for skip in (1, 2, 4, 8):
            flat = np.concatenate([np.zeros(skip, np.uint8), packed.ravel()])
            moved = gpu.put(flat)[skip:].reshape(packed.shape)
            got = gpu.get(scan.packed_logits(gpu.put(hidden), moved, kind=kind))
            want = gpu.get(scan.packed_logits(gpu.put(hidden), gpu.put(packed), kind=kind))
            assert got.tobytes() == want.tobytes()
        close_logits(want, hidden, decoded)
    assert scan.packed_logits(gpu.put(hidden[:0]), gpu.put(packed), kind=kind).shape == (0, 40)
    assert scan.packed_logits(gpu.put(hidden), gpu.put(packed[:0]), kind=kind).shape == (3, 0)
    assert (gpu.get(scan.packed_topk(gpu.put(hidden), gpu.put(packed[:0]), 2, kind=kind).ids) == -1).all()
    assert scan.packed_topk(gpu.put(hidden[:0]), gpu.put(packed), 2, kind=kind).ids.shape == (0, 2)


@pytest.mark.sanitize
@pytest.mark.parametrize("tokens", [1, 12, 33])
def test_packed_small_cases(gpu_torch, rng, tokens):
    for kind in KINDS:
        for group in (None, 16):
            hidden, packed, decoded, bias = packed_case(rng, tokens, 35, 70, kind, group)
            on_gpu = [gpu_torch.put(a) for a in (hidden, packed, bias)]
            got = scan.packed_logits(*on_gpu, kind=kind, group=group)
            close_logits(gpu_torch.get(got), hidden, decoded, bias)
    scan.packed_topk(*on_gpu[:2], 5, on_gpu[2], kind=kind, group=group)


@pytest.mark.sanitize
def test_packed_rows_that_begin_anywhere(gpu_torch, rng):
    """A group that does not end with 16 bytes: words are read past the end of what is of use."""
    hidden, packed, decoded, _ = packed_case(rng, 1, 256, 1554, "int4", 16)
    got = scan.packed_logits(gpu_torch.put(hidden), gpu_torch.put(packed), kind="int4", group=16)
    close_logits(gpu_torch.get(got), hidden, decoded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_packed_logits(gpu_torch, rng, dtype):
    torch = gpu_torch.torch
    hidden, packed, decoded, bias = packed_case(rng, 5, 60, 48, "int4", 16)
    h = gpu_torch.put(hidden, dtype).requires_grad_(True)
    b = gpu_torch.put(bias).requires_grad_(True)
    out = scan.packed_logits(h, gpu_torch.put(packed), b, kind="int4", group=16)
    weight = torch.randn_like(out)
    out.backward(weight)
    want = gpu_torch.get(weight).astype(np.float64) @ decoded
    share = 1e-5 if dtype == "float32" else 1.6e-2
    assert np.abs(gpu_torch.get(h.grad) - want).max() <= share * np.abs(want).max()
    assert np.allclose(gpu_torch.get(b.grad), gpu_torch.get(weight).sum(0), atol=1e-4)


def test_errors(gpu):
    packed = gather.pack_rows(np.ones((3, 16), np.float32))
    with pytest.raises(TypeError, match="no float64 kernel"):
        lutra.scan.packed_topk(gpu.put(np.ones((1, 16))), gpu.put(packed), 2)


# ---------------------------------------------------------------- gradients of look-ups
@pytest.mark.parametrize("bits", range(1, 9))
def test_lookups_backward(gpu, rng, bits):
    for m, n, tokens in (
        (1, 1, 1), (3, 63, 2), (4, 65, 8), (5, 200, 9), (8, 33, 24), (13, 700, 25), (2, 97, 33), (9, 64, 65),
    ):  # fmt: skip
        codes = rng.integers(0, 256, (n, (m * bits + 7) // 8)).astype(np.uint8)
        grad = rng.standard_normal((tokens, n)).astype(np.float32)
        want = scan_reference.lookups_backward(grad.astype(np.float64), codes, m, bits)
        size = scan_reference.lookups_backward(np.abs(grad).astype(np.float64), codes, m, bits)
        on_gpu = gpu.put(grad), gpu.put(codes)
        with gpu.no_sync():
            got = lookups_backward(gpu, *on_gpu, m, bits)
        assert gpu.owns(got)
        assert (np.abs(gpu.get(got) - want) <= 1e-6 * size + 1e-12).all()
        again = lookups_backward(gpu, *on_gpu, m, bits)
        assert gpu.get(again).tobytes() == gpu.get(got).tobytes()


def lookups_backward(gpu, grad, codes, m, bits=8, into=None):
    return _lookups._lookups_backward(_arrays.kind_of(grad, "grad"), grad, codes, m, bits, into)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lookups_backward_of_16_bits_strides_and_sums(gpu_torch, rng, dtype):
    codes = rng.integers(0, 256, (300, 5)).astype(np.uint8)
    wide = gpu_torch.put(rng.standard_normal((40, 333)).astype(np.float32), dtype)
    grad = wide[:, 7:307]  # rows lie apart
    want = scan_reference.lookups_backward(gpu_torch.get(grad).astype(np.float64), codes, 5)
    got = lookups_backward(gpu_torch, grad, gpu_torch.put(codes), 5)
    np.testing.assert_allclose(gpu_torch.get(got), want, rtol=1e-5, atol=1e-4)
    total = gpu_torch.put(np.ones((5, 40, 256), np.float32))
    assert lookups_backward(gpu_torch, grad.T.contiguous().T, gpu_torch.put(codes), 5, 8, total) is total
    np.testing.assert_allclose(gpu_torch.get(total), want + 1, rtol=1e-5, atol=1e-4)


def test_lookups_backward_of_equal_codes_nan_and_empty(gpu, rng):
    """All rows add to one entry, in the order of their rows; a NaN stays where it belongs."""
    for tokens in (3, 40):
        grad = rng.standard_normal((tokens, 130)).astype(np.float32)
        codes = np.full((130, 4), 7, np.uint8)
        got = gpu.get(lookups_backward(gpu, gpu.put(grad), gpu.put(codes), 4))
        np.testing.assert_allclose(got[:, :, 7], np.tile(grad.sum(1, dtype=np.float64), (4, 1)), atol=1e-4)
        assert (np.delete(got, 7, 2) == 0).all()
        codes[5] = 200
        grad[1, 5] = np.nan
        got = gpu.get(lookups_backward(gpu, gpu.put(grad), gpu.put(codes), 4))
        assert np.isnan(got[:, 1, 200]).all() and np.isfinite(np.delete(got[:, 1], 200, 1)).all()
        assert np.isfinite(np.delete(got, 1, 1)).all()
    assert lookups_backward(gpu, gpu.put(grad[:0]), gpu.put(codes), 4).shape == (4, 0, 256)
    assert (gpu.get(lookups_backward(gpu, gpu.put(grad[:, :0]), gpu.put(codes[:0]), 4)) == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("tokens", [2, 30])
def test_gradients_of_lookups(gpu_torch, rng, tokens):
    torch = gpu_torch.torch
    for bits, m in ((8, 6), (4, 7)):
        codes = gpu_torch.put(rng.integers(0, 256, (150, (m * bits + 7) // 8)).astype(np.uint8))
        tables = gpu_torch.put(rng.standard_normal((m, tokens, 1 << bits)).astype(np.float32))
        bias = gpu_torch.put(rng.standard_normal(150).astype(np.float32))
        leaves = [a.clone().requires_grad_(True) for a in (tables, bias)]
        there = [a.cpu().clone().requires_grad_(True) for a in (tables, bias)]
        weight = torch.randn(tokens, 150)
        (scan.lookups(leaves[0], codes, leaves[1], bits=bits) * weight.to(codes.device)).sum().backward()
        (scan.lookups(there[0], codes.cpu(), there[1], bits=bits) * weight).sum().backward()
        for a, b in zip(leaves, there):
            torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [2048, 2049, 2300, 2500])
def test_lookups_topk_any_k(gpu, rng, k):
    codes = rng.integers(0, 256, (2300, 5)).astype(np.uint8)
    tables = rng.integers(-9, 9, (5, 3, 256)).astype(np.float32)  # sums are exact, and many are equal
    scores, ids = scan.lookups_topk(gpu.put(tables), gpu.put(codes), k)
    want_scores, want_ids = scan_reference.lookups_topk(tables, codes, k, 8)
    np.testing.assert_array_equal(gpu.get(ids), want_ids)
    np.testing.assert_array_equal(gpu.get(scores), want_scores)


# ---------------------------------------------------------------- heads
def test_look_ups_of_a_head_are_those_that_shared_memory_has_room_for(gpu_torch):
    torch = gpu_torch.torch
    from lutra import nn
    from lutra.compress import FORMATS

    longest = _backend.cuda.lookups_row_bytes(0)
    assert longest % 32 == 0
    for m in (longest, longest + 1):
        layer = nn.PQEmbedding.from_pretrained(
            torch.randn(300, 2 * m), format=FORMATS["pq"](m=m), progress=False
        )
        head, hidden = nn.TiedHead(layer), torch.randn(5, 2 * m)
        want = head(hidden)
        head, hidden = nn.TiedHead(layer.to("cuda")), hidden.to("cuda")
        assert (head._lookups(hidden) is not None) == (m == longest)
        torch.testing.assert_close(head(hidden).cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["pq", "rq", "int8", "int4"])
def test_tied_heads(gpu_torch, format, dtype):
    """Logits, the largest of them, the loss and its gradients: as on the CPU."""
    torch = gpu_torch.torch
    from lutra import nn
    from lutra.compress import FORMATS

    torch.manual_seed(0)
    options = {"pq": {"m": 4}, "rq": {"m": 2}}.get(format, {})
    cls = getattr(nn, f"{FORMATS[format].layer}Embedding")
    chosen = FORMATS[format](**options)
    layer = cls.from_pretrained(
        torch.randn(300, 32).to(getattr(torch, dtype)), format=chosen, padding_idx=3, progress=False
    )
    bias = torch.randn(300).to(getattr(torch, dtype))
    x, targets = torch.randn(6, 32), torch.randint(0, 300, (6,))
    targets[2] = -100
    found = []
    for where in ("cpu", "cuda"):
        there = copy.deepcopy(layer).to(where)
        own = nn.TiedHead(there, bias=bias.to(where))
        h = x.to(where, getattr(torch, dtype)).detach().requires_grad_(True)
        loss = own.cross_entropy(h, targets.to(where), label_smoothing=0.1)
        loss.backward()
        values, ids = own.topk(h.detach(), 7)
        found.append([own(h).detach(), values, loss.detach(), h.grad, ids])
    limit = 1e-4 if dtype == "float32" else 3e-2
    for a, b in zip(found[0][:4], found[1][:4]):
        torch.testing.assert_close(b.cpu().float(), a.float(), rtol=limit, atol=limit)
    if dtype == "float32":
        assert torch.equal(found[0][4], found[1][4].cpu())


@pytest.mark.parametrize(
    ("bits", "m"), [(8, 300), (3, 11), (5, 7), (6, 20), (7, 33), (4, 500), (3, 1), (3, 128), (5, 127)]
)
def test_lookups_in_memory(gpu, rng, bits, m):
    """Codes whose tables have no place in shared memory: any bits, any length."""
    codes = rng.integers(0, 256, (300, (m * bits + 7) // 8)).astype(np.uint8)
    bias = rng.integers(-9, 9, 300).astype(np.float32)
    for tokens in (1, 5):
        tables = rng.integers(-9, 9, (m, tokens, 1 << bits)).astype(np.float32)  # sums are exact
        on_gpu = gpu.put(tables), gpu.put(codes), gpu.put(bias)
        with gpu.no_sync():
            got = scan.lookups(*on_gpu, bits=bits)
            scores, ids = scan.lookups_topk(on_gpu[0], on_gpu[1], 40, on_gpu[2], bits=bits)
        np.testing.assert_array_equal(gpu.get(got), scan_reference.lookups(tables, codes, bits, bias))
        want_scores, want_ids = scan_reference.lookups_topk(tables, codes, 40, bits, bias)
        np.testing.assert_array_equal(gpu.get(ids), want_ids)
        np.testing.assert_array_equal(gpu.get(scores), want_scores)
        half = scan.lookups(*on_gpu, bits=bits, dtype="float16")
        np.testing.assert_allclose(gpu.get(half), gpu.get(got), rtol=1e-3)
