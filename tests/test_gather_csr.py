"""lutra.gather.bag_csr and its gradients against the reference."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import csr as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97, 300)
FLOATS = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def make(rows, dim, density=0.3, dtype="float32", columns="int16", indptr="int32", seed=0):
    """(values, indptr, columns) as torch tensors; row 0 is empty, row 1 full."""
    rng = np.random.default_rng(seed)
    kept = rng.random((rows, dim)) < density
    kept[0], kept[1 % rows] = False, True
    at = np.nonzero(kept)
    return (
        torch.from_numpy(rng.standard_normal(len(at[0])).astype(np.float32)).to(getattr(torch, dtype)),
        torch.from_numpy(np.append(0, np.cumsum(kept.sum(1))).astype(indptr)),
        torch.from_numpy(at[1].astype(columns)),
    )


def wide(t):
    return None if t is None else (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t).numpy()


def close(got, want, dtype="float32"):
    bound = TOLERANCE[dtype] * (1 + np.abs(want).max(initial=0))
    assert np.abs(wide(got.detach()) - want).max(initial=0) <= bound


def bags(rows, seed=0):
    """(ids, offsets, weights, mode, padding_idx, include_last_offset)."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rows, 40)
    weights = rng.standard_normal(40).astype(np.float32)
    offsets = np.array([2, 2, 10, 35])
    yield ids.reshape(8, 5), None, None, "sum", None, False
    yield ids.reshape(8, 5).astype(np.int32), None, weights.reshape(8, 5), "sum", int(ids[0]), False
    yield ids, offsets, weights, "sum", None, True
    yield ids.astype(np.int32), offsets.astype(np.int32), None, "mean", int(ids[3]), False
    yield ids[:0].reshape(0, 5), None, None, "sum", None, False
    yield ids[:0], np.zeros(3, np.int64), None, "mean", None, False


def tensors(*arrays):
    return [None if a is None else torch.from_numpy(a) for a in arrays]


@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradients(simd_level, dtype):
    for dim in SIZES:
        for columns, indptr in (("uint8", "int32"), ("int16", "int64"), ("int32", "int32")):
            if columns == "uint8" and dim > 256:
                continue
            values, starts, places = make(11, dim, dtype=dtype, columns=columns, indptr=indptr)
            for ids, offsets, weights, mode, pad, last in bags(11):
                v = values.clone().requires_grad_()
                i, o, w = tensors(ids, offsets, weights)
                if w is not None:
                    w.requires_grad_()
                out = lutra.gather.bag_csr(
                    v, starts, places, i, o, w, dim=dim, mode=mode, padding_idx=pad, include_last_offset=last
                )
                table = (wide(values), starts.numpy(), places.numpy())
                want = reference.bag_csr(*table, ids, offsets, weights, dim, mode, pad, last)
                assert out.dtype == values.dtype and out.shape == want.shape
                close(out, want, dtype)
                g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
                inputs = [v] if w is None else [v, w]
                got = torch.autograd.grad(out, inputs, g)
                want = reference.bag_csr_grad(wide(g), *table[1:], ids, offsets, weights, mode, pad, last)
                close(got[0], want, dtype)
                if w is not None:
                    want = reference.bag_csr_weight_grad(wide(g), *table, ids, offsets, pad, last)
                    close(got[1], want, "float32")


def test_reference_is_the_dense_bag():
    values, indptr, columns = (t.numpy() for t in make(9, 7))
    dense = reference.rows(indptr, columns, values, np.arange(9), 7)
    assert (dense[0] == 0).all() and (dense[1] != 0).all()
    for ids, offsets, weights, mode, pad, last in bags(9):
        options = {"mode": mode, "padding_idx": pad, "include_last_offset": last}
        want = lutra.gather.bag(dense, ids, offsets, weights, **options)
        got = lutra.gather.bag_csr(values, indptr, columns, ids, offsets, weights, dim=7, **options)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_float64_gradients():
    values, indptr, columns = make(6, 5)
    ids = torch.tensor([[0, 1, 1], [5, 2, 0]])

    def function(v, w):
        return lutra.gather.bag_csr(v, indptr, columns, ids, None, w, dim=5, padding_idx=2)

    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (values.double().requires_grad_(), w))


def test_threads_change_nothing(threads):
    values, indptr, columns = make(5000, 64, columns="uint8")
    values.requires_grad_()
    ids = torch.randint(0, 5000, (2000, 20), generator=torch.Generator().manual_seed(0))
    w = torch.rand(2000, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = lutra.gather.bag_csr(values, indptr, columns, ids, None, w, dim=64)
    got = [out.detach(), *torch.autograd.grad(out.sin().sum(), [values, w])]
    first = _first.setdefault("first", got)
    assert all(torch.equal(a, b) for a, b in zip(first, got))


_first: dict = {}


def test_a_large_gradient_is_zero_where_nothing_was_touched():
    values, indptr, columns = make(40_000, 64, density=0.5, columns="uint8")
    values.requires_grad_()
    out = lutra.gather.bag_csr(values, indptr, columns, torch.tensor([[1, 39_999]]), dim=64)
    out.sum().backward()
    want = torch.zeros_like(values)
    for r in (1, 39_999):
        want[indptr[r] : indptr[r + 1]] = 1
    assert values.nbytes > 1 << 22 and torch.equal(values.grad, want)


@pytest.mark.parametrize("entries", [2, 30_000])
def test_memory_of_freed_gradients(entries):
    """A gradient that gets the pages of one that was freed is zero where nothing was touched, too."""
    values, indptr, columns = make(40_000, 64, density=0.5, columns="uint8")
    values.requires_grad_()
    for seed in range(3):
        ids = torch.randint(0, 40_000, (1, entries), generator=torch.Generator().manual_seed(seed))
        lutra.gather.bag_csr(values, indptr, columns, ids, dim=64).sum().backward()
        counts = torch.bincount(ids[0], minlength=40_000).float()
        want = counts.repeat_interleave(torch.as_tensor(indptr).diff().long())
        assert torch.equal(values.grad[: len(want)], want)
        values.grad.fill_(7.0)  # what an optimizer may leave behind
        values.grad = None


def test_operator():
    values, indptr, columns = make(11, 16)
    ids = torch.randint(0, 11, (4, 3))
    values.requires_grad_()
    arguments = (values, indptr, columns, ids, None, None, 16, "sum", None, False)
    torch.library.opcheck(torch.ops.lutra.bag_csr.default, arguments)
    grad, rest = torch.rand(4, 16), (indptr, columns, ids, None)
    torch.library.opcheck(torch.ops.lutra.bag_csr_backward.default, (grad, *rest, None, "sum", None, False))
    given = (grad, values.detach(), *rest, None, False)
    torch.library.opcheck(torch.ops.lutra.bag_csr_weight_grad.default, given)


def test_non_contiguous():
    values, indptr, columns = make(11, 16)
    ids = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))
    want = lutra.gather.bag_csr(values, indptr, columns, ids.T.contiguous(), dim=16)
    double = torch.stack([values, values], 1)[:, 0]
    assert torch.equal(lutra.gather.bag_csr(double, indptr, columns, ids.T, dim=16), want)


def test_bad_input():
    values, indptr, columns = make(11, 16)
    ids = torch.tensor([[0, 1]])

    def call(v=values, p=indptr, c=columns, i=ids, dim=16, **options):
        return lutra.gather.bag_csr(v, p, c, i, dim=dim, **options)

    with pytest.raises(IndexError, match=r"ids\[0, 1\] is 11"):
        call(i=torch.tensor([[0, 11]]))
    with pytest.raises(ValueError, match="columns has length"):
        call(c=columns[1:])
    with pytest.raises(TypeError, match="columns has dtype int64"):
        call(c=columns.long())
    with pytest.raises(TypeError, match="values"):
        call(v=values.int())
    with pytest.raises(ValueError, match="mode"):
        call(mode="max")
    with pytest.raises(ValueError, match="indptr must not decrease"):
        call(p=indptr.flip(0).contiguous())
    with pytest.raises(ValueError, match="indptr must not decrease"):
        call(p=indptr + 1000)


@pytest.mark.skipif(_backend.core is None, reason="the reference indexes with NumPy")
@pytest.mark.parametrize("columns", ("uint8", "int16", "int32"))
def test_columns_out_of_range_touch_nothing_else(columns):
    values, indptr, places = make(11, 16, columns=columns)
    places = torch.full_like(places, 200 if columns == "uint8" else -1)
    values.requires_grad_()
    out = lutra.gather.bag_csr(values, indptr, places, torch.arange(11).view(1, -1), dim=16)
    out.sum().backward()
    assert not out.any() and not values.grad.any()
