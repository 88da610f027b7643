"""lutra.quant.PQ: codes against a plain definition, tables against the vectors that codes stand for."""

from __future__ import annotations

import numpy as np
import pytest

from lutra import quant
from lutra.quant import _bits

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)


def cloud(n, d, seed=0):
    """Vectors around a few centres, as quantizers are meant for."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((8, d))
    return (centres[rng.integers(0, 8, n)] + 0.4 * rng.standard_normal((n, d))).astype(np.float32)


def trained(d=12, m=4, bits=4, n=700, **options):
    return quant.PQ(d, m, bits, **options).train(cloud(n, d), max_points_per_centroid=None)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("m", (1, 2, 5, 8, 13))
def test_packed_bits_are_those_of_a_big_integer(bits, m):
    entries = np.random.default_rng(m).integers(0, 1 << bits, (9, m)).astype(np.uint8)
    size = (m * bits + 7) // 8
    expected = [
        list(sum(int(e) << (j * bits) for j, e in enumerate(row)).to_bytes(size, "little")) for row in entries
    ]
    packed = _bits.pack(entries, bits)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(_bits.unpack(packed, m, bits), entries)


@pytest.mark.parametrize("bits", (1, 3, 4, 6, 8))
@pytest.mark.filterwarnings("ignore:.*advisable")
def test_codes_are_the_nearest_centroids(bits, simd_level):
    quantizer = trained(bits=bits)
    for n in SIZES:
        x = cloud(n, 12, seed=n)
        entries = quantizer.entries(quantizer.encode(x))
        for j in range(4):
            sub = x[:, 3 * j : 3 * j + 3].astype(np.float64)
            distances = np.square(sub[:, None] - quantizer.codebooks[j]).sum(-1)
            chosen = distances[np.arange(n), entries[:, j]]
            np.testing.assert_allclose(chosen, distances.min(1), atol=1e-5)  # a tie may go either way
        np.testing.assert_array_equal(
            quantizer.decode(quantizer.encode(x)),
            np.concatenate([quantizer.codebooks[j][entries[:, j]] for j in range(4)], axis=1),
        )


@pytest.mark.parametrize("bits", (2, 4, 6, 8))
@pytest.mark.filterwarnings("ignore:.*advisable")
def test_sums_of_tables_are_scores(bits):
    quantizer = trained(bits=bits)
    x, q = cloud(50, 12, 1), cloud(7, 12, 2)
    codes = quantizer.encode(x)
    entries, decoded = quantizer.entries(codes), quantizer.decode(codes)
    assert quantizer.row_terms(codes) == (None, None)
    for metric, expected in (("ip", q @ decoded.T), ("l2", np.square(q[:, None] - decoded).sum(-1))):
        lut, bias = quantizer.tables(q, metric)
        assert bias is None
        assert lut.shape == (7, 4, max(16, quantizer.ksub))
        sums = sum(lut[:, j, entries[:, j]] for j in range(4))
        np.testing.assert_allclose(sums, expected, atol=2e-5)
        np.testing.assert_array_equal(quantizer.tables(q[2:3], metric).lut[0], lut[2])


@pytest.mark.filterwarnings("ignore:.*advisable")
def test_error_falls_with_bits_and_sub_vectors():
    x = cloud(3000, 16)
    errors = []
    for m, bits in ((2, 2), (2, 4), (4, 4), (4, 6), (8, 6), (8, 8)):
        quantizer = quant.PQ(16, m, bits).train(x)
        errors.append(np.square(x - quantizer.decode(quantizer.encode(x))).sum(1).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.filterwarnings("ignore:.*advisable")
def test_pack_is_the_inverse_of_entries():
    quantizer = trained(bits=3)
    codes = quantizer.encode(cloud(33, 12))
    np.testing.assert_array_equal(quantizer.pack(quantizer.entries(codes)), codes)
    with pytest.raises(IndexError, match=r"entries\[1, 2\] is 8; with 3 bits they are < 8"):
        quantizer.pack(np.array([[0, 0, 0, 0], [0, 0, 8, 0]], np.uint8))
    with pytest.raises(ValueError, match=r"entries must have shape \(n, 4\)"):
        quantizer.pack(np.zeros((2, 5), np.uint8))


@pytest.mark.filterwarnings("ignore:.*advisable")
def test_same_seed_same_codes(threads):
    x = cloud(700, 12)
    first = trained(seed=3)
    again = trained(seed=3)
    np.testing.assert_array_equal(first.codebooks, again.codebooks)
    assert not np.array_equal(first.codebooks, trained(seed=4).codebooks)
    whole = first.encode(x)
    np.testing.assert_array_equal(
        whole, np.concatenate([first.encode(x[i : i + 97]) for i in range(0, 700, 97)])
    )


def test_errors():
    with pytest.raises(ValueError, match="m must divide d = 12, got 5"):
        quant.PQ(12, 5)
    with pytest.raises(ValueError, match=r"bits must be in \[1, 8\], got 9"):
        quant.PQ(12, 4, 9)
    quantizer = quant.PQ(12, 4, 4)
    with pytest.raises(ValueError, match="not trained"):
        quantizer.encode(np.zeros((1, 12), np.float32))
    with pytest.raises(ValueError, match="x has 3 rows; at least 16 are needed"):
        quantizer.train(np.zeros((3, 12), np.float32))
    with pytest.warns(UserWarning, match="at least 624 are advisable"):
        quantizer.train(cloud(100, 12))
    with pytest.raises(ValueError, match="x has 11 columns; the quantizer has d = 12"):
        quantizer.encode(np.zeros((1, 11), np.float32))
    bad = np.zeros((3, 12), np.float32)
    bad[2, 5] = np.nan
    with pytest.raises(ValueError, match=r"x\[2, 5\] is nan"):
        quantizer.encode(bad)
    with pytest.raises(ValueError, match=r"codes must have shape \(n, 2\)"):
        quantizer.decode(np.zeros((3, 4), np.uint8))
    with pytest.raises(TypeError, match="codes has dtype int64"):
        quantizer.decode(np.zeros((3, 2), np.int64))
    with pytest.raises(ValueError, match="metric must be one of"):
        quantizer.tables(np.zeros((3, 12), np.float32), "cosine")
