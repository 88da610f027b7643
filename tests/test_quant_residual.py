"""ResidualQuantizer: what its codes stand for, what they lose, files and bad input."""

import numpy as np
import pytest

import lutra
from lutra import quant
from lutra.quant import ResidualQuantizer
from lutra.scan import ResidualTokens


def tokens_of(n, d, seed=0, unit=True):
    """Vectors around 8 directions."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((8, d))
    x = centers[rng.integers(8, size=n)] + 0.5 * rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True) if unit else 3 * x).astype(np.float32)


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def quantizer(request):
    return ResidualQuantizer(19, request.param, 12).train(tokens_of(600, 19))


def by_hand(tokens: ResidualTokens):
    """The interface's words: bits [j b, (j + 1) b) of a row, lowest first."""
    d, b = tokens.centroids.shape[1], len(tokens.values).bit_length() - 1
    rows = []
    for code, centroid in zip(tokens.codes, tokens.centroid_ids):
        number = int.from_bytes(code.tobytes(), "little")
        row = [tokens.values[number >> (j * b) & ((1 << b) - 1)] for j in range(d)]
        assert number >> (d * b) == 0
        rows.append(tokens.centroids[centroid] + np.array(row))
    rows = np.array(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if tokens.normalize else rows


def test_what_codes_stand_for(quantizer):
    x = tokens_of(33, 19, 1)
    coded = quantizer.encode(x)
    assert isinstance(coded, ResidualTokens) and coded.normalize is True
    assert coded.codes.dtype == np.uint8 and coded.codes.shape == (33, (19 * quantizer.bits + 7) // 8)
    assert coded.centroid_ids.dtype == np.int32 and coded.values.shape == (1 << quantizer.bits,)
    assert quantizer.code_size == 4 + coded.codes.shape[1]
    decoded = quantizer.decode(coded)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, by_hand(coded), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(quantizer.centroids, axis=1), 1, rtol=1e-5)


def test_nearest_centroid_and_value(quantizer):
    x = tokens_of(40, 19, 2)
    coded = quantizer.encode(x)
    distances = np.square(x[:, None] - quantizer.centroids).sum(-1)
    np.testing.assert_array_equal(coded.centroid_ids, distances.argmin(1))
    residual = x - quantizer.centroids[coded.centroid_ids]
    chosen = np.abs(residual[:, :, None] - quantizer.values).min(-1)
    plain = ResidualQuantizer.of(quantizer.centroids, quantizer.values, quantizer.bits, False)
    got = np.abs(plain.decode(plain.encode(x)) - x)
    np.testing.assert_allclose(got, chosen, atol=1e-5)


def error(quantizer, x):
    return float(np.square(quantizer.decode(quantizer.encode(x)) - x).sum(1).mean())


@pytest.mark.parametrize("unit", [True, False])
def test_more_bits_lose_less(unit):
    x, new = tokens_of(3000, 16, unit=unit), tokens_of(500, 16, 5, unit=unit)
    errors = [error(ResidualQuantizer(16, bits, 32).train(x), new) for bits in (1, 2, 4, 8)]
    assert errors[0] > 1.5 * errors[1] > 4 * errors[2] > 10 * errors[3] > 0
    scale = 1 if unit else float(np.square(new).sum(1).mean())
    assert errors[1] < 0.1 * scale
    quantiles = ResidualQuantizer(16, 4, 32).train(x, levels="quantiles")
    assert errors[2] < 0.7 * error(quantiles, new)
    assert quantiles.normalize is unit


def test_quantiles_are_medians_of_equal_parts():
    x = tokens_of(500, 8)
    q = ResidualQuantizer(8, 2, 1, normalize=False).train(x, levels="quantiles")
    rows = np.sort(np.random.default_rng(0).permutation(500)[:256])  # the sample: 25 are too few to hold out
    residuals = x[rows] - x[rows].mean(0)
    np.testing.assert_allclose(q.values, np.quantile(residuals, [0.125, 0.375, 0.625, 0.875]), atol=1e-5)


def test_values_come_from_tokens_that_were_held_out():
    x = tokens_of(3000, 6)
    q = ResidualQuantizer(6, 2, 8, normalize=False).train(x, levels="quantiles")
    rows = np.random.default_rng(0).permutation(3000)[:150]  # a twentieth
    residuals = x[rows] - q.centroids[np.square(x[rows, None] - q.centroids).sum(-1).argmin(1)]
    np.testing.assert_allclose(q.values, np.quantile(residuals, [0.125, 0.375, 0.625, 0.875]), atol=1e-6)


def test_number_of_centroids():
    x = tokens_of(4200, 4)
    for n, total, expected in [(1, None, 1), (7, None, 1), (8, None, 2), (100, None, 16), (4200, None, 1024),
                               (4200, 100, 128), (4200, 10**9, 1024)]:  # fmt: skip
        q = ResidualQuantizer(4)
        assert q.num_centroids is None
        assert q.train(x[:n], total=total, n_iter=1).num_centroids == expected
    assert ResidualQuantizer._rule(58949, None) == 2048  # of 3885
    with pytest.warns(UserWarning, match="points for 100 centroids"):
        assert ResidualQuantizer(4, num_centroids=100).train(x[:200], n_iter=1).num_centroids == 100


def test_normalize_follows_the_tokens():
    x = tokens_of(300, 8)
    assert ResidualQuantizer(8).train(x).normalize is True
    assert ResidualQuantizer(8).train(x.astype(np.float16)).normalize is True
    assert ResidualQuantizer(8).train(1.5 * x).normalize is False
    q = ResidualQuantizer(8, 8, normalize=True).train(3 * x)
    assert np.square(q.decode(q.encode(5 * x)) - x).sum(1).mean() < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "bfloat16"])
def test_dtypes(dtype):
    x = tokens_of(200, 8, unit=False)
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    narrow = (np.abs(10 * x) if dtype == "uint8" else 10 * x).astype(dtype)
    wide = narrow.astype(np.float32)
    q, r = (ResidualQuantizer(8, 4, 4).train(a) for a in (narrow, wide))
    np.testing.assert_array_equal(q.centroids, r.centroids)
    np.testing.assert_array_equal(q.encode(narrow).codes, r.encode(wide).codes)


def test_batches_threads_and_seeds(quantizer, threads):
    x = tokens_of(97, 19, 4)
    coded = quantizer.encode(x)
    for rows in (slice(0, 1), slice(1, 20), slice(20, 97)):
        part = quantizer.encode(x[rows])
        np.testing.assert_array_equal(part.codes, coded.codes[rows])
        np.testing.assert_array_equal(part.centroid_ids, coded.centroid_ids[rows])
    again = ResidualQuantizer(19, quantizer.bits, 12).train(tokens_of(600, 19))
    np.testing.assert_array_equal(again.centroids, quantizer.centroids)
    np.testing.assert_array_equal(again.values, quantizer.values)
    other = ResidualQuantizer(19, quantizer.bits, 12).train(tokens_of(600, 19), seed=1)
    assert not np.array_equal(other.centroids, quantizer.centroids)


def test_no_tokens_and_other_orders(quantizer):
    none = quantizer.encode(np.empty((0, 19), np.float32))
    assert none.codes.shape[0] == none.centroid_ids.shape[0] == 0
    assert quantizer.decode(none).shape == (0, 19)
    x = tokens_of(20, 19, 3)
    coded = quantizer.encode(np.asfortranarray(x))
    np.testing.assert_array_equal(coded.codes, quantizer.encode(x).codes)
    odd = ResidualTokens(coded.codes[::2], coded.centroid_ids[::2], *coded[2:])
    np.testing.assert_array_equal(quantizer.decode(odd), quantizer.decode(coded)[::2])
    zero = quantizer.encode(np.zeros((1, 19), np.float32))
    assert np.isfinite(quantizer.decode(zero)).all()


def test_torch():
    torch = pytest.importorskip("torch")
    x = tokens_of(200, 8)
    q = ResidualQuantizer(8, 2, 4).train(torch.from_numpy(x).bfloat16())
    coded = q.encode(torch.from_numpy(x))
    assert all(isinstance(a, torch.Tensor) for a in coded[:4])
    assert coded.centroid_ids.dtype == torch.int32
    np.testing.assert_array_equal(coded.codes.numpy(), q.encode(x).codes)
    decoded = q.decode(coded)
    assert isinstance(decoded, torch.Tensor)
    np.testing.assert_array_equal(decoded.numpy(), q.decode(q.encode(x)))


# ---------------------------------------------------------------- files
def test_save_and_load(quantizer, tmp_path):
    path = tmp_path / "quantizer"
    quantizer.save(path)
    loaded = quant.load(path)
    assert repr(loaded) == repr(quantizer) and type(loaded) is ResidualQuantizer
    x = tokens_of(50, 19, 5)
    for mine, its in zip(loaded.encode(x), quantizer.encode(x)):
        np.testing.assert_array_equal(mine, its)
    with pytest.raises(ValueError, match="quantizer"):
        lutra.index.load(path)
    data = path.read_bytes()
    for end in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=str(path)):
            quant.load(path)


def test_untrained(tmp_path):
    q = ResidualQuantizer(6, 4, 3)
    q.save(tmp_path / "untrained")
    loaded = quant.load(tmp_path / "untrained")
    assert not loaded.is_trained and repr(loaded) == repr(q)
    with pytest.raises(ValueError, match="is not trained: call train"):
        loaded.encode(np.zeros((1, 6), np.float32))
    assert loaded.train(tokens_of(200, 6)).num_centroids == 3


def test_files_that_lie(tmp_path):
    q = ResidualQuantizer(6, 2, 4).train(tokens_of(200, 6))
    q.values = q.values[::-1].copy()
    q.save(tmp_path / "falling")
    with pytest.raises(ValueError, match="'values' do not increase"):
        quant.load(tmp_path / "falling")
    q.values = np.full(4, np.nan, np.float32)
    q.save(tmp_path / "nan")
    with pytest.raises(ValueError, match="'values' holds NaN"):
        quant.load(tmp_path / "nan")


# ---------------------------------------------------------------- bad input
X = tokens_of(100, 6)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "bits must be 1, 2, 4 or 8; got 3", lambda q: ResidualQuantizer(6, 3)),
        (ValueError, "bits must be 1, 2, 4 or 8; got True", lambda q: ResidualQuantizer(6, True)),
        (ValueError, "num_centroids", lambda q: ResidualQuantizer(6, num_centroids=0)),
        (TypeError, "normalize", lambda q: ResidualQuantizer(6, normalize="yes")),
        (ValueError, "5 rows; at least 8", lambda q: ResidualQuantizer(6, num_centroids=8).train(X[:5])),
        (ValueError, "0 rows; at least 1", lambda q: ResidualQuantizer(6).train(X[:0])),
        (ValueError, "levels", lambda q: q.train(X, levels="median")),
        (ValueError, "5 columns", lambda q: q.train(X[:, :5])),
        (TypeError, "tokens", lambda q: q.train([[1.0]])),
        (ValueError, r"tokens\[7, 2\] is nan",
         lambda q: q.train(np.where(np.arange(600).reshape(100, 6) == 44, np.nan, X))),
        (ValueError, r"tokens\[3\] is zero", lambda q: q.train(X * (np.arange(100) != 3)[:, None])),
        (ValueError, r"tokens\[0, 1\] is inf", lambda q: q.encode(np.full((1, 6), [0, np.inf, 0, 0, 0, 0]))),
        (TypeError, "ResidualTokens", lambda q: q.decode(q.encode(X).codes)),
        (ValueError, "codes", lambda q: q.decode(q.encode(X)._replace(codes=np.zeros((100, 9), np.uint8)))),
        (TypeError, "centroid_ids", lambda q: q.decode(q.encode(X)._replace(centroid_ids=np.zeros(100)))),
        (IndexError, r"centroid_ids\[0\] is 4; there are 2",
         lambda q: q.decode(q.encode(X)._replace(centroid_ids=np.full(100, 4, np.int32)))),
        (ValueError, "'values' must be F32", lambda q: ResidualQuantizer.of(q.centroids, q.values, 4, True)),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    q = ResidualQuantizer(6, 2, 2, normalize=True).train(X)
    before = q.centroids.copy(), q.values.copy()
    with pytest.raises(error, match=message):
        call(q)
    np.testing.assert_array_equal(q.centroids, before[0])
    np.testing.assert_array_equal(q.values, before[1])


def test_indexes_of_single_vectors_refuse_it():
    with pytest.raises(TypeError, match="quantizer"):
        lutra.index.Codes(6, ResidualQuantizer(6))
