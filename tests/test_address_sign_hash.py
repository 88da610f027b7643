"""lutra.address.sign_hash against its reference."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lutra
from lutra import _backend
from lutra.reference import address as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
SCORES = ("prob", "scaled")
DTYPES = ("float32", "float16", "bfloat16", "float64")


def values(*shape, dtype="float32", seed=0):
    """Normal values with zeros of both signs among them, as a torch tensor."""
    x = np.random.default_rng(seed).standard_normal(shape)
    if x.size > 3:
        flat = x.reshape(-1)
        flat[1::7] = 0.0
        flat[3::11] = -0.0
    return torch.from_numpy(x).to(getattr(torch, dtype))


def wide(x):
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()


def check(got, x, bits, score, temperature=1.0):
    codes, weights = reference.sign_hash(wide(x), bits, score, temperature)
    np.testing.assert_array_equal(np.asarray(got.codes), codes)
    assert np.asarray(got.codes).dtype == np.int32
    assert np.asarray(got.weights).dtype == (np.float64 if x.dtype == torch.float64 else np.float32)
    np.testing.assert_allclose(
        np.asarray(got.weights), weights, rtol=1e-12 if x.dtype == torch.float64 else 5e-6
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bits", range(1, 17))
def test_equals_the_reference_at_odd_sizes(simd_level, bits, score):
    for tables in SIZES:
        for rows in (1, 3):
            x = values(rows, tables * bits, seed=tables)
            check(lutra.address.sign_hash(x.numpy(), bits, score), x, bits, score)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 3, 8, 16])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.5])
def test_every_dtype(simd_level, dtype, bits, temperature):
    for tables in (1, 17, 65):
        x = values(2, 3, tables * bits, dtype=dtype, seed=tables)
        for score in SCORES:
            got = lutra.address.sign_hash(x, bits, score, temperature)
            assert isinstance(got.codes, torch.Tensor) and got.codes.shape == (2, 3, tables)
            check(got, x, bits, score, temperature)
            if dtype != "bfloat16":
                check(
                    lutra.address.sign_hash(x.numpy(), bits, score, temperature), x, bits, score, temperature
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 11, 16])
def test_gradient_equals_the_reference(simd_level, dtype, score, bits):
    for tables in (1, 3, 16, 33):
        x = values(3, tables * bits, dtype=dtype, seed=bits).requires_grad_()
        grad = values(3, tables, dtype="float64" if dtype == "float64" else "float32", seed=9)
        lutra.address.sign_hash(x, bits, score, 0.7).weights.backward(grad)
        expected = reference.sign_hash_backward(grad.numpy(), wide(x.detach()), bits, score, 0.7)
        tolerance = {"float64": 1e-12, "float32": 5e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
        np.testing.assert_allclose(wide(x.grad), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("score", SCORES)
def test_the_reference_gradient_is_the_derivative(score):
    """The reference is normative: hold it against central differences (away from the kinks at 0)."""
    x = np.random.default_rng(3).uniform(0.1, 2, (2, 12)) * np.random.default_rng(4).choice([-1, 1], (2, 12))
    grad = np.random.default_rng(5).standard_normal((2, 3))
    got = reference.sign_hash_backward(grad, x, 4, score, 1.3)
    eps = 1e-6
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += eps
        down[i] -= eps
        change = reference.sign_hash(up, 4, score, 1.3)[1] - reference.sign_hash(down, 4, score, 1.3)[1]
        assert got[i] == pytest.approx((change * grad).sum() / (2 * eps), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 8])
def test_special_values(simd_level, dtype, bits):
    """NaN: a zero bit and a NaN weight, of its own chunk only. Infinities and -0.0 are ordinary."""
    x = values(1, 40 * bits, dtype=dtype)
    x[0, 5 * bits + 1] = float("nan")
    x[0, 9 * bits] = float("inf")
    x[0, 11 * bits] = -float("inf")
    x[0, 39 * bits : 40 * bits] = -0.0
    got = lutra.address.sign_hash(x, bits)
    codes, weights = got.codes.numpy()[0], got.weights.numpy()[0]
    assert np.isnan(weights[5]) and np.isnan(weights).sum() == 1
    assert not codes[5] >> 1 & 1
    assert codes[9] & 1 and not codes[11] & 1
    assert codes[39] == 2**bits - 1
    assert weights[39] == pytest.approx(0.5**bits)
    check(got, x, bits, "prob")
    scaled = lutra.address.sign_hash(x, bits, "scaled").weights.numpy()[0]
    assert np.isnan(scaled[5]) and np.isinf(scaled[9]) and np.isinf(scaled[11]) and scaled[39] == 0


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_not_contiguous(simd_level, bits):
    base = values(7, 4, 6 * bits)
    for x in (
        base[::2],
        base[:, 1::2],
        base[..., : 3 * bits],
        base.transpose(0, 1),
        base.flip(0),
        base.expand(7, 4, -1),
    ):
        check(lutra.address.sign_hash(x, bits), x, bits, "prob")
        check(lutra.address.sign_hash(x.numpy(), bits), x, bits, "prob")
    backward = base.numpy()[:, :, ::-1]
    check(lutra.address.sign_hash(backward, bits), torch.from_numpy(backward.copy()), bits, "prob")
    big_endian = base.numpy().astype(">f4")
    check(lutra.address.sign_hash(big_endian, bits), base, bits, "prob")
    readonly = base.numpy().copy()
    readonly.flags.writeable = False
    check(lutra.address.sign_hash(readonly, bits), base, bits, "prob")


def test_the_gradient_of_a_view_reaches_the_base(simd_level):
    base = values(6, 16).requires_grad_()
    lutra.address.sign_hash(base[::2, :8], 4).weights.sum().backward()
    expected = reference.sign_hash_backward(np.ones((3, 2), np.float32), base.detach().numpy()[::2, :8], 4)
    np.testing.assert_allclose(base.grad.numpy()[::2, :8], expected, rtol=1e-5, atol=1e-7)
    assert not base.grad.numpy()[1::2].any() and not base.grad.numpy()[:, 8:].any()


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 16), (0, 0)])
def test_empty(simd_level, shape):
    got = lutra.address.sign_hash(np.zeros(shape, np.float32), 8)
    assert got.codes.shape == got.weights.shape == (*shape[:-1], shape[-1] // 8)
    x = torch.zeros(shape, requires_grad=True)
    lutra.address.sign_hash(x, 8).weights.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")
def test_threads_do_not_change_a_bit():
    x = values(700, 96)
    grad = values(700, 12, dtype="float32", seed=2)
    results = []
    for threads in (1, 2, 5):
        lutra.set_num_threads(threads)
        try:
            codes, weights = lutra.address.sign_hash(x, 8)
            back = torch.ops.lutra.sign_hash_backward(grad, x, 8, "scaled", 1.0)
            results.append((codes, weights, back))
        finally:
            lutra.set_num_threads(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 16), st.integers(0, 40), st.lists(st.integers(0, 4), max_size=3), st.sampled_from(SCORES),
    st.sampled_from(DTYPES), st.floats(0.05, 20),
)  # fmt: skip
def test_any_shape(bits, tables, leading, score, dtype, temperature):
    x = values(*leading, tables * bits, dtype=dtype)
    check(lutra.address.sign_hash(x, bits, score, temperature), x, bits, score, temperature)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": [[1.0] * 8]}, TypeError, ["x must be", "list", "numpy.asarray"]),
        ({"x": "text"}, TypeError, ["x must be", "str"]),
        ({"x": np.zeros((1, 8), np.int32)}, TypeError, ["x has dtype int32", "float32"]),
        ({"x": torch.zeros(1, 8, dtype=torch.int64)}, TypeError, ["x has dtype int64", "float32"]),
        ({"x": torch.zeros(1, 8, dtype=torch.complex64)}, TypeError, ["x has dtype complex64"]),
        ({"x": np.zeros((), np.float32)}, ValueError, ["x has shape ()", "bits = 8"]),
        ({"x": np.zeros((2, 12), np.float32)}, ValueError, ["x has shape (2, 12)", "bits = 8"]),
        ({"bits": 0}, ValueError, ["bits must be in [1, 16], got 0"]),
        ({"bits": 17}, ValueError, ["bits must be in [1, 16], got 17"]),
        ({"bits": 8.0}, TypeError, ["bits must be an integer", "8.0"]),
        ({"bits": True}, TypeError, ["bits must be an integer"]),
        ({"score": "sum"}, ValueError, ["score must be one of 'prob', 'scaled'", "'sum'"]),
        ({"score": None}, ValueError, ["score must be one of"]),
        ({"score": ["prob"]}, ValueError, ["score must be one of"]),
        ({"temperature": 0.0}, ValueError, ["temperature must be a positive", "0.0"]),
        ({"temperature": -1}, ValueError, ["temperature must be a positive"]),
        ({"temperature": float("nan")}, ValueError, ["temperature must be a positive"]),
        ({"temperature": float("inf")}, ValueError, ["temperature must be a positive"]),
        ({"temperature": "hot"}, TypeError, ["temperature must be a number", "hot"]),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"x": np.zeros((2, 8), np.float32), **change}
    with pytest.raises(error) as caught:
        lutra.address.sign_hash(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_numbers_of_other_types_are_taken():
    x = values(3, 16)
    expected = lutra.address.sign_hash(x, 8, "prob", 2.0)
    for got in (
        lutra.address.sign_hash(x, np.int64(8), "prob", 2),
        lutra.address.sign_hash(x, 8, "prob", np.float32(2)),
        lutra.address.sign_hash(x.clone().requires_grad_(), np.int64(8), "prob", 2),
    ):
        assert torch.equal(got.codes, expected.codes) and torch.equal(got.weights.detach(), expected.weights)


def test_tensors_without_ordinary_memory():
    """Meta tensors have shapes only; a negative view's memory holds other values than the tensor."""
    got = lutra.address.sign_hash(torch.zeros(2, 16, device="meta"), 8)
    assert (
        got.codes.device.type == "meta" and got.codes.shape == (2, 2) and got.weights.dtype == torch.float32
    )
    negative = torch.imag(torch.complex(torch.zeros(1), torch.ones(1)).conj())
    assert negative.is_neg() and negative.is_contiguous() and negative.item() == -1
    assert lutra.address.sign_hash(negative, 1).codes.item() == 0
    with pytest.raises(TypeError, match="sparse_coo"):
        lutra.address.sign_hash(torch.eye(8).to_sparse(), 8)


def test_other_dlpack_arrays():
    class Foreign:
        def __init__(self, a):
            self.a = a

        def __dlpack__(self, **options):
            return self.a.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.a.__dlpack_device__()

    x = values(3, 16)
    got = lutra.address.sign_hash(Foreign(x.numpy()), 4)
    np.testing.assert_array_equal(np.asarray(got.codes), lutra.address.sign_hash(x.numpy(), 4).codes)


def test_the_reference_backend_alone():
    code = (
        "import numpy as np, lutra\n"
        "from lutra import _backend\n"
        "assert _backend.core is None\n"
        "got = lutra.address.sign_hash(np.array([[1., -1., 2., 3.]], np.float32), 2)\n"
        "assert got.codes.tolist() == [[1, 3]], got\n"
        "import torch\n"
        "x = torch.randn(3, 8, requires_grad=True)\n"
        "lutra.address.sign_hash(x, 4).weights.sum().backward()\n"
        "assert x.grad.abs().sum() > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LUTRA_BACKEND": "reference"})
