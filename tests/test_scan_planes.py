"""Codes in bit planes: their layout, and the scan that looks at the highest plane first."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import _backend, quant, scan
from lutra.reference import planes as reference
from lutra.scan import _planes

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
compiled = pytest.mark.skipif(_backend.core is None, reason="needs the compiled module")


def data(nq, n, d, bits, seed=0):
    rng = np.random.default_rng([seed, nq, n, d, bits])
    u = rng.integers(0, 1 << bits, (n, d), dtype=np.uint8)
    entries, low = reference.split(u, bits)
    return rng.standard_normal((nq, d), dtype=np.float32), scan.pack4(entries), low, u


def same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)
    differ = got[1] != want[1]
    assert differ.mean() < 0.02  # sums in another order may swap near ties


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("d", (*SIZES, 128))
def test_split_and_join(d, bits):
    u = np.random.default_rng(d).integers(0, 1 << bits, (7, d), dtype=np.uint8)
    entries, low = reference.split(u, bits)
    assert entries.shape == (7, (d + 3) // 4) and low.shape == (7, reference.low_size(d, bits))
    np.testing.assert_array_equal(reference.join(entries, low, d, bits), u)


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 8))
@pytest.mark.parametrize("d", (*SIZES, 128))
def test_against_full_scores(simd_level, monkeypatch, d, bits):
    """With a screen that lets every row pass the result is exact."""
    monkeypatch.setattr(_planes, "_SCREEN", (1, 400))
    for nq, n, k in ((1, 97, 5), (2, 16, 3), (3, 65, 70), (9, 333, 10)):
        q, codes, low, _ = data(nq, n, d, bits)
        rng = np.random.default_rng(n)
        levels = np.sort(rng.standard_normal(1 << bits)).astype(np.float32) if bits <= 4 else None
        mul = rng.random(n, np.float32) + 0.5
        add = rng.standard_normal(n).astype(np.float32)
        bias = rng.standard_normal(nq).astype(np.float32)
        keep = np.packbits(rng.random(n) < 0.6, bitorder="little")
        for metric in ("ip", "l2"):
            for terms in ((None, None, None, None), (bias, add, mul, None), (None, None, mul, keep)):
                got = _planes.plane_scan(q, codes, low, n, bits, k, metric, 1.0, levels, *terms)
                want = reference.plane_scan(q, codes, low, n, bits, k, metric, levels, *terms)
                same(got, want)


@compiled
@pytest.mark.parametrize("screen", [(1, 1), (2, 16), (16, 128)])
@pytest.mark.parametrize("make", [lambda d: quant.RotatedSQ(d, 4), lambda d: quant.RaBitQ(d, 3)])
def test_few_candidates_are_noticed(simd_level, monkeypatch, make, screen):
    """A screen that is far too small finds the same as a full one: it notices, and looks at more."""
    rng = np.random.default_rng(0)
    d = 64
    centers = rng.standard_normal((40, d)).astype(np.float32)
    x = centers[rng.integers(0, 40, 20_000)] + 0.4 * rng.standard_normal((20_000, d)).astype(np.float32)
    q = centers[:20] + 0.4 * rng.standard_normal((20, d)).astype(np.float32)
    index = lutra.index.Codes(make(d), "ip")
    index.train(x)
    index.add(x)
    monkeypatch.setattr(_planes, "_SCREEN", screen)
    found = index.search(q, 10)
    rotated, bias = index.quantizer._rotated(q)
    levels, _ = index.quantizer._plane_values()
    arrays, low = index._lists.arrays, index._lists.arrays["low"]
    terms = (None if name not in arrays else arrays[name].reshape(-1)[:20_000] for name in ("add", "mul"))
    scores, ids = reference.plane_scan(
        rotated, arrays["codes"], low.reshape(-1, low.shape[3]), 20_000, index.quantizer._planes, 10, "ip",
        levels, bias, *terms,
    )  # fmt: skip
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.ids.tolist(), ids.tolist())])
    assert hits > 0.985
    np.testing.assert_allclose(found.scores[:, 0], scores[:, 0], rtol=1e-4)


@compiled
def test_batches_threads_and_the_screen_leave_results_alone(simd_level):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((30_000, 48)).astype(np.float32)
    q = rng.standard_normal((150, 48)).astype(np.float32)
    index = lutra.index.Codes(quant.RotatedSQ(48, 4), "l2")
    index.train(x)
    index.add(x)
    want = index.search(q, 7)
    threads = lutra.get_num_threads()
    try:
        for count in (1, 2, 3):
            lutra.set_num_threads(count)
            for part in (1, 5, 64, 150):
                scores, ids = zip(*(index.search(q[i : i + part], 7) for i in range(0, 150, part)))
                np.testing.assert_array_equal(np.concatenate(ids), want.ids)
                np.testing.assert_array_equal(np.concatenate(scores), want.scores)
    finally:
        lutra.set_num_threads(threads)


@compiled
def test_values_that_are_not_finite_are_refused(simd_level):
    q, codes, low, _ = data(2, 400, 16, 4)
    mul = np.ones(400, np.float32)
    mul[7] = np.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        _planes.plane_scan(q, codes, low, 400, 4, 300, "ip", 1.0, None, None, None, mul)
    q[1, 3] = np.inf
    with pytest.raises(ValueError, match="queries are too large"):
        _planes.plane_scan(q, codes, low, 400, 4, 3, "ip", 1.0)


@pytest.mark.parametrize("make", [lambda d: quant.RotatedSQ(d, 4), lambda d: quant.RaBitQ(d, 2)])
@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("d", [17, 64])
def test_index_in_planes(tmp_path, make, metric, d):
    """Added in parts, removed, saved, opened again: the same as the codes that the quantizer makes."""
    rng = np.random.default_rng(d)
    x = rng.standard_normal((700, d)).astype(np.float32)
    index = lutra.index.Codes(make(d), metric, refine="float16")
    index.train(x)
    for part in (x[:300], x[300:301], x[301:]):
        index.add(part)
    assert index._coder.form == "planes"
    terms = 4 if metric == "l2" else 0  # squared norms
    if d == 64:  # else planes end with whole words
        assert index._arena.nbytes <= 704 * (1.1 * index.quantizer.code_size + terms) + 100
    index.remove_ids(np.arange(0, 700, 7))
    left = np.setdiff1d(np.arange(700), np.arange(0, 700, 7))
    q = x[left[:9]]
    assert (index.search(q, 1, refine_factor=4).ids[:, 0] == left[:9]).all()
    path = tmp_path / "planes.safetensors"
    index.save(path)
    for mmap in (True, False):
        again = lutra.index.load(path, mmap=mmap)
        for factor in (0, 3):
            want, got = (i.search(q, 5, refine_factor=factor) for i in (index, again))
            np.testing.assert_array_equal(got.ids, want.ids)
            np.testing.assert_array_equal(got.scores, want.scores)
    alone = lutra.index.Codes(index.quantizer, metric)
    alone.add(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x
    codes = index.quantizer.encode(unit)
    same = np.abs(alone.reconstruct(np.arange(700)) - index.quantizer.decode(codes)).max(1) < 1e-5
    assert same.mean() > 0.99  # a value at the border of two levels may go either way


def test_files_from_before_planes(tmp_path):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((500, 24)).astype(np.float32)
    old = lutra.index.Codes(quant.RotatedSQ(24, 4), "ip")
    old._in_planes = False
    old.train(x)
    old.add(x)
    assert old._coder.form == "lut4"
    old.save(tmp_path / "old.safetensors")
    again = lutra.index.load(tmp_path / "old.safetensors")
    again.add(x[:50])
    again.save(tmp_path / "old.safetensors")
    again = lutra.index.load(tmp_path / "old.safetensors")
    assert again._coder.form == "lut4" and len(again) == 550
    new = lutra.index.Codes(again.quantizer, "ip")
    new.add(x)
    new.add(x[:50])
    got, want = again.search(x[:20], 3), new.search(x[:20], 3)
    np.testing.assert_allclose(got.scores, want.scores, rtol=0.02)  # tables of 8 bits, and sums in float32
