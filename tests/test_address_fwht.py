"""lutra.address.fwht against its reference and against scipy's matrix."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra.reference import address as reference

torch = pytest.importorskip("torch")

LENGTHS = [1 << i for i in range(15)]
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2, "float64": 1e-14}


def values(*shape, dtype="float32", seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(getattr(torch, dtype))


def wide(x):
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()


def check(x, scale=1.0):
    got = lutra.address.fwht(x, scale)
    assert isinstance(got, torch.Tensor) and got.dtype == x.dtype and got.shape == x.shape
    want = reference.fwht(wide(x), scale)
    size = float(np.abs(want).max()) if want.size else 1.0
    tolerance = TOLERANCE[str(x.dtype).removeprefix("torch.")]
    np.testing.assert_allclose(wide(got), want, rtol=tolerance, atol=tolerance * size)


def matrix(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize("n", LENGTHS[:8])
def test_the_reference_is_the_matrix(n):
    x = values(3, n, dtype="float64").numpy()
    np.testing.assert_allclose(reference.fwht(x, 0.5), 0.5 * x @ matrix(n), atol=1e-12)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_equals_the_reference(simd_level, dtype):
    for n in LENGTHS:
        for rows in (1, 2, 3, 15, 17, 33) if n < 256 else (1, 3):
            check(values(rows, n, dtype=dtype, seed=n), 1.0 if rows < 3 else n**-0.5)


def test_shapes(simd_level):
    for shape in ((0, 8), (3, 0, 16), (8,), (2, 1, 3, 64)):
        check(values(*shape))
    base = values(64, 6)
    check(base.t())
    check(values(5, 32)[::2, 16:])
    x = values(7, 32).numpy()
    got = lutra.address.fwht(x)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, x @ matrix(32), rtol=1e-5, atol=1e-5)


def test_orthogonal_and_its_own_inverse(simd_level):
    for n in (2, 64, 1024, 8192):
        x = values(3, n)
        y = lutra.address.fwht(x, n**-0.5)
        torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
        torch.testing.assert_close(lutra.address.fwht(y, n**-0.5), x, rtol=1e-5, atol=1e-5)


def test_threads_do_not_change_a_bit(threads):
    x = values(300, 1024)
    want = torch.cat([lutra.address.fwht(row[None]) for row in x])
    assert torch.equal(lutra.address.fwht(x), want)


def test_nan_and_infinity_stay_in_their_row(simd_level):
    x = values(3, 256)
    x[1, 77] = float("nan")
    y = lutra.address.fwht(x)
    assert y[1].isnan().all() and torch.isfinite(y[[0, 2]]).all()
    x[1, 77] = float("inf")
    assert not torch.isfinite(lutra.address.fwht(x)[1]).any()


def test_torch_composition_that_cuda_tensors_take():
    from lutra.address._fwht import _levels

    for dtype in ("float32", "bfloat16", "float64"):
        x = values(2, 3, 64, dtype=dtype)
        torch.testing.assert_close(_levels(torch, x, 64, 0.3), lutra.address.fwht(x, 0.3))


def test_gradient():
    x = values(2, 3, 16, dtype="float64").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lutra.address.fwht(x, 0.7), x)
    assert torch.autograd.gradgradcheck(lambda x: lutra.address.fwht(x, 0.7).square(), x)
    x, grad = values(3, 128).requires_grad_(), values(3, 128, seed=1)
    lutra.address.fwht(x, 0.5).backward(grad)
    torch.testing.assert_close(
        x.grad, 0.5 * grad @ torch.from_numpy(matrix(128)).float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opcheck_and_compile(dtype):
    x = values(3, 64, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.lutra.fwht.default, (x, 0.125))
    compiled = torch.compile(
        lambda x: lutra.address.fwht(x * 2, 0.125).sum(), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), lutra.address.fwht(x * 2, 0.125).sum())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"x has shape \(2, 12\); its last axis must be a power of two"):
        lutra.address.fwht(np.zeros((2, 12), np.float32))
    with pytest.raises(ValueError, match="power of two"):
        lutra.address.fwht(np.zeros((2, 0), np.float32))
    with pytest.raises(ValueError, match="power of two"):
        lutra.address.fwht(np.zeros((), np.float32))
    with pytest.raises(TypeError, match="x has dtype int64"):
        lutra.address.fwht(torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="scale must be finite"):
        lutra.address.fwht(np.zeros(8, np.float32), float("nan"))
    with pytest.raises(TypeError, match="scale must be a number"):
        lutra.address.fwht(np.zeros(8, np.float32), "x")
    with pytest.raises(TypeError):
        lutra.address.fwht([1.0, 2.0])
