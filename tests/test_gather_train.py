"""lutra.gather.tensor_train and its gradients against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from test_gather_csr import TOLERANCE, bags, tensors, wide

import lutra
from lutra.reference import train as reference

torch = pytest.importorskip("torch")

# (i1, i2, i3), (d1, d2, d3), (r1, r2): every path of the kernel's blocks, odd numbers everywhere
SIZES = [
    ((1, 1, 11), (1, 1, 1), (1, 1)),
    ((2, 2, 3), (1, 2, 3), (2, 3)),
    ((2, 3, 2), (4, 4, 4), (16, 16)),
    ((3, 2, 2), (5, 3, 7), (15, 17)),
    ((3, 2, 2), (7, 1, 5), (9, 31)),
    ((2, 3, 2), (2, 4, 8), (33, 32)),
    ((2, 2, 3), (3, 5, 2), (63, 65)),
    ((11, 1, 1), (6, 2, 97), (3, 4)),
]


def make(ids, dims, ranks, dtype="float32", seed=0):
    g = torch.Generator().manual_seed(seed)
    (i1, i2, i3), (d1, d2, d3), (r1, r2) = ids, dims, ranks
    shapes = ((i1, d1, r1), (i2, r1, d2, r2), (i3, d3, r2))
    scale = (r1 * r2) ** (-1 / 6)
    return [(torch.randn(s, generator=g) * scale).to(getattr(torch, dtype)) for s in shapes]


def close(got, want, dtype="float32", scale=4.0):
    bound = scale * TOLERANCE[dtype] * (1 + np.abs(want).max(initial=0))
    assert got.shape == want.shape
    assert np.abs(wide(got.detach()) - want).max(initial=0) <= bound


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_forward_and_gradients(simd_level, dtype):
    for sizes in SIZES:
        cores = make(*sizes, dtype=dtype)
        arrays = [wide(c) for c in cores]
        for ids, offsets, weights, mode, pad, last in bags(11):
            inputs = [c.clone().requires_grad_() for c in cores]
            i, o, w = tensors(ids, offsets, weights)
            options = {"rows": 11, "mode": mode, "padding_idx": pad, "include_last_offset": last}
            if w is not None:
                w.requires_grad_()
            out = lutra.gather.tensor_train(*inputs, i, o, w, **options)
            want = reference.tensor_train(*arrays, ids, offsets, weights, 11, mode, pad, last)
            assert out.dtype == cores[0].dtype
            close(out, want, dtype)
            g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
            got = torch.autograd.grad(out, inputs if w is None else [*inputs, w], g)
            wants = reference.tensor_train_grad(wide(g), *arrays, ids, offsets, weights, 11, mode, pad, last)
            for a, b in zip(got, wants):
                close(a, b, dtype)
            if w is not None:
                want = reference.tensor_train_weight_grad(wide(g), *arrays, ids, offsets, 11, pad, last)
                close(got[3], want, "float32")


def test_reference_is_the_product_of_matrices():
    a, b, c = (core.numpy() for core in make((2, 3, 4), (2, 3, 2), (3, 5)))
    rows = reference.rows(a, b, c, np.arange(24))
    for i in (0, 7, 23):
        x, y, z = a[i // 12], b[i // 4 % 3], c[i % 4]
        want = (x @ y.reshape(3, -1)).reshape(-1, 5) @ z.T
        np.testing.assert_allclose(rows[i], want.reshape(-1), rtol=1e-5, atol=1e-6)


def test_float64_gradients():
    cores = [c.double().requires_grad_() for c in make((2, 2, 3), (1, 2, 2), (2, 3))]
    ids = torch.tensor([[0, 1, 1], [10, 2, 0]])
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def function(a, b, c, w):
        return lutra.gather.tensor_train(a, b, c, ids, None, w, rows=11, padding_idx=2)

    assert torch.autograd.gradcheck(function, (*cores, w))


def test_threads_change_nothing(threads):
    cores = [c.requires_grad_() for c in make((30, 30, 30), (4, 4, 4), (16, 16))]
    ids = torch.randint(0, 27_000, (1000, 20), generator=torch.Generator().manual_seed(0))
    w = torch.rand(1000, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = lutra.gather.tensor_train(*cores, ids, None, w)
    got = [out.detach(), *torch.autograd.grad(out.sin().sum(), [*cores, w])]
    first = _first.setdefault("first", got)
    assert all(torch.equal(a, b) for a, b in zip(first, got))


_first: dict = {}


def test_operator():
    cores = [c.requires_grad_() for c in make(*SIZES[1])]
    ids = torch.randint(0, 11, (4, 3))
    torch.library.opcheck(
        torch.ops.lutra.tensor_train.default, (*cores, ids, None, None, 11, "sum", None, False)
    )


def test_bad_input():
    a, b, c = make(*SIZES[1])
    ids = torch.tensor([[0, 1]])
    call = lutra.gather.tensor_train
    with pytest.raises(IndexError, match=r"ids\[0, 0\] is 12"):
        call(a, b, c, torch.tensor([[12, 0]]))
    with pytest.raises(IndexError, match=r"ids\[0, 0\] is 11"):
        call(a, b, c, torch.tensor([[11, 0]]), rows=11)
    with pytest.raises(ValueError, match="rows is 13"):
        call(a, b, c, ids, rows=13)
    with pytest.raises(ValueError, match="core1's rank"):
        call(a[..., :1], b, c, ids)
    with pytest.raises(ValueError, match="core2's rank"):
        call(a, b, c[..., :1], ids)
    with pytest.raises(TypeError, match="core2"):
        call(a, b.half(), c, ids)
    with pytest.raises(ValueError, match="mode"):
        call(a, b, c, ids, mode="max")
    with pytest.raises(TypeError, match="ids"):
        call(a, b, c, ids.float())
