"""The op behind lutra.nn.MemoryLinear: int8 tables, gradients of touched rows."""

from __future__ import annotations

import pytest

import lutra

torch = pytest.importorskip("torch")
pytest.importorskip("lutra.nn")
from lutra.nn._memory_ops import TouchedRows  # noqa: E402

ops = torch.ops.lutra


def make(tokens=7, chunks=3, bits=4, dim=17, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, chunks * bits, generator=g).to(dtype)
    tables = torch.randn(chunks, 2**bits, dim, generator=g).to(dtype)
    return x, tables, torch.randn(dim, generator=g).to(dtype)


def composed(x, tables, bias, bits, score, temperature):
    """The layer in torch's operations, with a temperature that has a gradient."""
    n_tables, entries, dim = tables.shape
    z = x.reshape(-1, n_tables, bits)
    codes = ((z >= 0).long() << torch.arange(bits)).sum(-1) + torch.arange(n_tables) * entries
    weights = torch.sigmoid(2 * z.abs() / temperature).prod(-1)
    if score == "scaled":
        weights = weights * z.abs().sum(-1)
    flat = tables.reshape(n_tables * entries, dim)
    out = (flat[codes] * weights[..., None]).sum(1) + bias
    return out.reshape(*x.shape[:-1], dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_sparse_gradient(tokens, dtype):
    x, tables, bias = make(tokens, dtype=dtype)
    a, b = tables.clone().requires_grad_(), tables.clone().requires_grad_()
    g = torch.randn(tokens, 17).to(dtype)
    found = []
    for t, hashed in ((a, lutra.address.sign_hash(x, 4)), (b, None)):
        c = bias.clone().requires_grad_()
        if hashed is None:
            out, codes, weights = ops.memory_linear(x, t, c, 4)
        else:
            codes, weights = hashed.codes, hashed.weights
            out = TouchedRows.apply(t, None, codes, weights, c)
        out.backward(g)
        found.append((out.detach(), c.grad))
    torch.testing.assert_close(*found)
    assert a.grad.is_sparse and a.grad.sparse_dim() == 2
    assert a.grad._indices().unique(dim=1).shape == a.grad._indices().shape
    assert a.grad._nnz() <= tokens * 3
    torch.testing.assert_close(a.grad.to_dense(), b.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 40])
def test_int8_tables(tokens, dtype, bias):
    x, tables, b = make(tokens, dim=130)
    t, scale, minimum = (
        a.view(3, 16, *a.shape[1:]) for a in lutra.gather.quantize_rows(tables.view(-1, 130), "int8")
    )
    rows = minimum[..., None] + scale[..., None] * t
    b = torch.zeros(130) if bias is None else b
    x = x.to(dtype).requires_grad_()
    given = None if bias is None else b.to(bias)
    out = ops.memory_linear(x, t, given, 4, "prob", 1.0, scale, minimum)[0]
    assert out.dtype == (dtype if bias is None else bias)
    want = composed(x.double(), rows.double(), b.double(), 4, "prob", 1.0)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)
    got = torch.autograd.grad(out.sum(), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), x)[0].to(dtype), rtol=4e-2, atol=4e-2)


def test_opcheck():
    x, tables, bias = (a.requires_grad_() for a in make(5))
    torch.library.opcheck(ops.memory_linear.default, (x, tables, bias, 4, "scaled", 1.0))
    codes, weights = ops.memory_linear(x, tables, bias, 4)[1:]
    args = (torch.randn(5, 17), x.detach(), tables.detach(), codes, weights, 4, "prob", 1.0)
    torch.library.opcheck(ops.memory_linear_backward.default, (*args, True, True))
    torch.library.opcheck(ops.memory_linear_backward.default, (*args, True, False))
