"""What each kind of quantizer promises besides: SQ's bytes, RaBitQ's bound, rotations, beams, levels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lutra import _backend, quant
from lutra.quant import rotated
from lutra.quant._rotation import random_rotation

pytestmark = pytest.mark.filterwarnings("ignore:.*advisable")


def skewed(n, d, seed=0):
    """Vectors with a few strong directions, turned at random, and a mean."""
    rng = np.random.default_rng([seed, d])
    scales = np.float32(3) ** -np.linspace(0, 3, d)
    turn = random_rotation(d, 7)
    return ((rng.standard_normal((n, d)) * scales) @ turn + 0.2).astype(np.float32)


def mean_error(quantizer, x):
    return np.square(x - quantizer.decode(quantizer.encode(x)), dtype=np.float64).sum(1).mean()


# ---- SQ
@pytest.mark.parametrize("bits", (8, 6, 4))
@pytest.mark.parametrize("d", (1, 2, 3, 15, 16, 17, 33))
def test_sq_by_its_formula(bits, d):
    x = skewed(60, d)
    quantizer = quant.SQ(d, f"{bits}bit").train(x)
    low, width = x.min(0), x.max(0) - x.min(0)
    other = 2 * skewed(30, d, 1)  # some of it out of range
    steps = (1 << bits) - 1
    scaled = np.clip((other - low) / width, 0, 1) * np.float32(steps)
    expected = low + (np.floor(scaled) + 0.5) / steps * width
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(other)), expected, atol=1e-5)
    assert quantizer.code_size == (d * bits + 7) // 8


@pytest.mark.parametrize("kind", ("8bit", "6bit", "4bit", "fp16", "bf16"))
def test_sq_has_the_bytes_of_faiss(kind):
    faiss = pytest.importorskip("faiss")
    x = skewed(500, 24)
    theirs = faiss.ScalarQuantizer(24, getattr(faiss.ScalarQuantizer, f"QT_{kind}"))
    theirs.train(x)
    ours = quant.SQ(24, kind).train(x)
    codes = theirs.compute_codes(x)
    np.testing.assert_allclose(ours.decode(codes), theirs.decode(codes), atol=1e-5)
    assert (ours.encode(x) == codes).mean() > 0.98  # a value at a step's edge may go either way


def test_sq_short_floats():
    torch = pytest.importorskip("torch")
    edges = np.array([[3.38e38, -3.4e38, 1e-40, -0.0, 1, 2, 3, 65504]], np.float32)
    x = np.concatenate([skewed(200, 8), edges])
    decoded = quant.SQ(8, "bf16").decode(quant.SQ(8, "bf16").encode(x))
    expected = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decoded[:200], expected[:200])
    assert np.isfinite(decoded).all()
    half = quant.SQ(8, "fp16")
    np.testing.assert_array_equal(half.decode(half.encode(x[:200])), x[:200].astype(np.float16))
    with pytest.raises(ValueError, match="beyond float16: take kind='bf16'"):
        half.encode(x)
    with pytest.raises(ValueError, match="kind must be one of '8bit', "):
        quant.SQ(8, "7bit")


# ---- PQ, OPQ, RQ
def test_opq_beats_pq_and_turns():
    x = skewed(3000, 16)
    plain, turned = quant.PQ(16, 4, 4).train(x), quant.OPQ(16, 4, 4).train(x)
    assert mean_error(turned, x) < 0.8 * mean_error(plain, x)
    np.testing.assert_allclose(turned.rotation @ turned.rotation.T, np.eye(16), atol=1e-5)
    only = quant.OPQ(16, 4, 4).train(x, rotations=0)
    assert mean_error(turned, x) < mean_error(only, x)
    with pytest.raises(ValueError, match="rotations must be >= 0, got -1"):
        quant.OPQ(16, 4, 4).train(x, rotations=-1)


def test_rq_beams_and_stages():
    x = skewed(3000 if _backend.core is not None else 600, 16)
    errors = [mean_error(quant.RQ(16, m, 4, beam=5).train(x), x) for m in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.1 * errors[0]
    wide = quant.RQ(16, 6, 4, beam=8).train(x)
    narrow = quant.build("RQ", {**wide._config(), "beam": 1})
    narrow._restore(wide._tensors())
    assert mean_error(wide, x) < 0.95 * mean_error(narrow, x)
    with pytest.raises(ValueError, match=r"beam must be in \[1, 256\], got 0"):
        quant.RQ(16, 2, 4, beam=0)


@pytest.mark.parametrize("bits", (4, 5))
def test_rq_errs_no_more_than_faiss(bits):
    faiss = pytest.importorskip("faiss")
    x, new = skewed(4000, 24), skewed(1000, 24, 1)
    theirs = faiss.ResidualQuantizer(24, 6, bits)
    theirs.max_beam_size = 5
    theirs.train(x)
    ours = quant.RQ(24, 6, bits).train(x)
    for rows in (x, new):
        error = np.square(rows - theirs.decode(theirs.compute_codes(rows))).sum() / np.square(rows).sum()
        assert np.square(rows - ours.decode(ours.encode(rows))).sum() / np.square(rows).sum() < 1.05 * error


@pytest.mark.parametrize("beam", (1, 3))
def test_rq_codes_of_a_file_are_the_same(tmp_path, beam):
    x = skewed(500, 7)
    trained = quant.RQ(7, 3, 4, beam=beam).train(x)
    trained.save(tmp_path / "file")
    loaded = quant.load(tmp_path / "file")
    assert loaded.beam == beam
    np.testing.assert_array_equal(loaded.encode(x), trained.encode(x))


@pytest.mark.parametrize("d", (1, 2, 3, 5))
def test_rq_of_few_dimensions(d):
    x = skewed(200, d)
    errors = [mean_error(quant.RQ(d, 3, 2, beam=beam).train(x, n_iter=5), x) for beam in (1, 4)]
    assert max(errors) < (0.1 if d < 3 else 0.5)
    same = np.repeat(x[:1], 50, axis=0)
    np.testing.assert_allclose(
        quant.RQ(d, 2, 2).train(same).decode(np.zeros((1, 1), np.uint8)), x[:1], atol=1e-5
    )


# ---- RaBitQ
@pytest.mark.parametrize("center", (True, False))
def test_rabitq_has_no_bias_and_keeps_its_bound(center):
    d = 96
    x, q = skewed(400, d), skewed(50, d, 1)
    off, exact = [], q @ x.T
    for seed in range(6):
        quantizer = quant.RaBitQ(d, 1, center=center, seed=seed).train(x)
        codes = quantizer.encode(x)
        lut, bias = quantizer.tables(q)
        entries = quantizer.entries(codes)
        estimate = sum(lut[:, j, entries[:, j]] for j in range(quantizer.m))
        add, mul = quantizer.row_terms(codes)
        estimate = estimate * mul + (0 if add is None else add) + (0 if bias is None else bias[:, None])
        far = np.linalg.norm(q - quantizer.mean, axis=1)[:, None]
        bound = quantizer.error_bound(codes) * far
        assert (np.abs(estimate - exact) <= bound).mean() > 0.92
        assert (np.abs(estimate - exact) <= bound / 10).mean() < 0.3  # and it is not loose
        off.append(estimate - exact)
    spread = np.std(off)
    assert abs(np.mean(off)) < 0.05 * spread
    assert np.abs(np.mean(off, axis=0)).mean() < 0.6 * np.abs(off).mean()  # other rotations, other errors


def test_rabitq_error_falls_by_four_a_bit():
    x = skewed(500, 64)
    errors = [mean_error(quant.RaBitQ(64, bits).train(x), x) for bits in range(1, 9)]
    for before, after in pairwise(errors[1:]):
        assert 0.15 < after / before < 0.4


@pytest.mark.parametrize("bits", (1, 2, 4, 7))
def test_rabitq_first_plane(bits):
    x, q = skewed(300, 61), skewed(20, 61, 1)
    quantizer = quant.RaBitQ(61, bits).train(x)
    codes = quantizer.encode(x)
    first, short = quantizer.first_plane(), quantizer.first_codes(codes)
    assert short.shape == (300, first.code_size)
    np.testing.assert_array_equal(first.entries(short), quantizer.entries(codes)[:, : first.m])
    own = first.encode(x)
    np.testing.assert_array_equal(own[:, :8], short[:, :8])
    np.testing.assert_allclose(first.norms(short), first.norms(own), rtol=1e-5)
    tolerance = {1: 1e-6, 2: 0.3, 4: 0.06, 7: 0.01}[bits]
    np.testing.assert_allclose(first.row_terms(short).mul, first.row_terms(own).mul, rtol=tolerance)
    exact = (q - quantizer.mean) @ (x - quantizer.mean).T
    far = np.linalg.norm(q - quantizer.mean, axis=1)[:, None]
    inner = (q - quantizer.mean) @ (first.decode(short) - quantizer.mean).T
    assert (np.abs(inner - exact) <= first.error_bound(short) * far).mean() > 0.8
    with pytest.raises(ValueError, match="epsilon must be a positive finite number"):
        quantizer.error_bound(codes, epsilon=0)
    with pytest.raises(TypeError, match="center must be True or False"):
        quant.RaBitQ(4, center=1)


# ---- RotatedSQ
def test_levels_of_normal_values_are_max_s():
    values = np.random.default_rng(0).standard_normal(400_000)
    # Max (1960), table I
    np.testing.assert_allclose(rotated.lloyd_max(values, 4), [-1.510, -0.4528, 0.4528, 1.510], atol=0.03)
    np.testing.assert_allclose(rotated.lloyd_max(values, 2), [-0.7979, 0.7979], atol=0.01)


def test_levels_of_few_values():
    np.testing.assert_array_equal(rotated.lloyd_max(np.array([3.0, 3.0, 3.0]), 4), [3, 3, 3, 3])
    assert (np.diff(rotated.lloyd_max(np.zeros(0), 8)) > 0).all()


def test_rotated_codes_suit_any_data():
    d = 64
    x = skewed(2000, d)
    x[:, 5] *= 30  # scalar codes of each dimension would take this well, of a shared range would not
    quantizer = quant.RotatedSQ(d, 4).train(x)
    assert mean_error(quantizer, x) < 0.012 * np.square(x - x.mean(0)).sum(1).mean()
    decoded = quantizer.decode(quantizer.encode(x)) - quantizer._state["mean"]
    norms = np.linalg.norm(x - quantizer._state["mean"], axis=1)
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), norms, rtol=1e-4)
