"""address.binarize against numpy.packbits."""

import numpy as np
import pytest

import lutra

SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 97, 384)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "uint8"])
@pytest.mark.parametrize("d", SIZES)
def test_is_packbits(simd_level, dtype, d):
    rng = np.random.default_rng(d)
    x = rng.integers(0 if dtype == "uint8" else -5, 6, (37, d)).astype(dtype)
    for threshold in (0, 2.0, -1.5, np.inf):
        want = np.packbits(x > threshold, axis=1, bitorder="little")
        got = lutra.address.binarize(x, threshold)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, want)
    limits = rng.integers(-3, 4, d).astype(np.float32)
    want = np.packbits(x > limits, axis=1, bitorder="little")
    np.testing.assert_array_equal(lutra.address.binarize(x, limits), want)


def test_shapes_and_edges(simd_level):
    x = np.random.default_rng(0).standard_normal((4, 3, 19)).astype(np.float32)
    want = np.packbits(x > 0, axis=-1, bitorder="little")
    np.testing.assert_array_equal(lutra.address.binarize(x), want)
    np.testing.assert_array_equal(lutra.address.binarize(x[0, 0]), want[0, 0])
    np.testing.assert_array_equal(
        lutra.address.binarize(x[:, :, ::2]), np.packbits(x[:, :, ::2] > 0, -1, "little")
    )
    assert lutra.address.binarize(x[:0]).shape == (0, 3, 3)
    assert lutra.address.binarize(np.empty((4, 0), np.float32)).shape == (4, 0)
    edge = np.array([[np.nan, 0.0, -0.0, np.inf, -np.inf, 1e-45, 1, -1] * 3], np.float32)
    np.testing.assert_array_equal(lutra.address.binarize(edge), [[0b01101000] * 3])


def test_torch_and_bfloat16(simd_level):
    torch = pytest.importorskip("torch")
    x = torch.randn(9, 50)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        y = x.to(dtype)
        want = np.packbits((y > 0.5).numpy(), axis=1, bitorder="little")
        got = lutra.address.binarize(y, 0.5)
        assert got.dtype == torch.uint8
        np.testing.assert_array_equal(got.numpy(), want)
    limits = x.median(0).values
    want = np.packbits((x > limits).numpy(), axis=1, bitorder="little")
    np.testing.assert_array_equal(lutra.address.binarize(x, limits).numpy(), want)
    with pytest.raises(TypeError, match="thresholds must be a torch tensor"):
        lutra.address.binarize(x, limits.numpy())


def test_threads(threads):
    x = np.random.default_rng(0).standard_normal((5000, 65)).astype(np.float32)
    np.testing.assert_array_equal(lutra.address.binarize(x), np.packbits(x > 0, 1, "little"))


def test_bad_input():
    x = np.ones((2, 5), np.float32)
    with pytest.raises(TypeError, match="x has dtype int64"):
        lutra.address.binarize(x.astype(np.int64))
    with pytest.raises(ValueError, match="x is 0-d"):
        lutra.address.binarize(np.ones((), np.float32))
    with pytest.raises(ValueError, match=r"threshold has shape \(4,\); it must be a number or \(5,\)"):
        lutra.address.binarize(x, np.ones(4))
    with pytest.raises(ValueError, match=r"threshold\[1\] is NaN"):
        lutra.address.binarize(x, np.array([0, np.nan, 0, 0, 0]))
    with pytest.raises(ValueError, match="threshold is NaN"):
        lutra.address.binarize(x, float("nan"))
    with pytest.raises(TypeError, match="threshold must be a number or an array, got 'zero'"):
        lutra.address.binarize(x, "zero")
