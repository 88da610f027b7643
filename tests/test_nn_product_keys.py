"""lutra.gather.row_dots, and the layers on product keys: ProductKeyMemory and PEER."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

import lutra
from lutra.reference import gather as reference

torch = pytest.importorskip("torch")

import lutra.nn  # noqa: E402
import lutra.optim  # noqa: E402
from lutra.torch_ops.product_keys import compose  # noqa: E402

F = torch.nn.functional


# ---------------------------------------------------------------- row_dots
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 33, 65, 97])
def test_row_dots(simd_level, dim, dtype):
    rng = np.random.default_rng(dim)
    table, x = rng.standard_normal((40, dim)), rng.standard_normal((5, dim))
    table, x = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in (table, x))
    ids = rng.integers(0, 40, (5, 7))
    want = reference.row_dots(table.float().numpy(), ids, x.float().numpy())
    got = lutra.gather.row_dots(table, torch.from_numpy(ids), x)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if dtype != "bfloat16":
        half = lutra.gather.row_dots(table.numpy(), ids.astype(np.int32), x.numpy())
        np.testing.assert_array_equal(half, got)


@pytest.mark.parametrize("sparse", [False, True])
def test_row_dots_gradients(simd_level, sparse):
    torch.manual_seed(0)
    table, x = torch.randn(30, 20, requires_grad=True), torch.randn(6, 20, requires_grad=True)
    ids = torch.randint(30, (6, 4))
    grad = torch.randn(6, 4)
    lutra.gather.row_dots(table, ids, x, sparse_grad=sparse).backward(grad)
    a, b = table.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    (a[ids] * b.unsqueeze(1)).sum(-1).backward(grad)
    assert table.grad.is_sparse == sparse
    torch.testing.assert_close(table.grad.to_dense() if sparse else table.grad, a.grad)
    torch.testing.assert_close(x.grad, b.grad)
    if sparse:
        assert table.grad._indices()[0].tolist() == sorted(set(ids.flatten().tolist()))


def test_row_dots_opcheck_and_gradcheck():
    torch.manual_seed(1)
    table, x = torch.randn(9, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    ids = torch.randint(9, (3, 5))
    torch.library.opcheck(torch.ops.lutra.row_dots, (table, ids, x))
    wide = [t.detach().double().requires_grad_() for t in (table, x)]
    assert torch.autograd.gradcheck(lambda t, y: lutra.gather.row_dots(t, ids, y), wide)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": np.ones(3, np.float32)}, ValueError, "table must be 2-d"),
        ({"ids": np.array([0, 1])}, ValueError, "ids must be 2-d"),
        ({"x": np.ones((2, 3), np.float32)}, ValueError, r"x has shape \(2, 3\); it must be \(2, 4\)"),
        ({"x": np.ones((2, 4), np.int64)}, TypeError, "x has dtype int64"),
        ({"ids": np.array([[0], [7]])}, IndexError, "7"),
    ],
)
def test_row_dots_bad_input(change, error, message):
    given = {
        "table": np.ones((5, 4), np.float32),
        "ids": np.array([[0], [1]]),
        "x": np.ones((2, 4), np.float32),
    }
    with pytest.raises(error, match=message):
        lutra.gather.row_dots(**{**given, **change})


# ---------------------------------------------------------------- the layers in torch's own ops
def choose(chooser, flat):
    q = chooser.query(flat)
    if chooser.query_norm == "batch":
        q = chooser.norm(q)
    q = q.view(-1, chooser.heads, chooser.key_dim)
    if chooser.query_norm == "layer":
        q = chooser.norm(q)
    return compose(q, chooser.keys, chooser.k)


def memory(layer, x):
    scores, ids = choose(layer.chooser, x.reshape(-1, x.shape[-1]))
    rows = F.embedding(ids, layer.values.weight)
    out = (rows * scores.softmax(-1).unsqueeze(-1)).sum((1, 2))
    if layer.gate is not None:
        out = out * F.silu(layer.gate(x.reshape(-1, x.shape[-1])))
    if layer.output is not None:
        out = layer.output(out)
    return out.reshape(*x.shape[:-1], -1)


def peer(layer, x):
    flat = x.reshape(-1, x.shape[-1])
    scores, ids = choose(layer.chooser, flat)
    gates = scores.softmax(-1) if layer.gates == "softmax" else scores.sigmoid()
    hidden = layer.activation((F.embedding(ids, layer.down) * flat[:, None, None]).sum(-1))
    out = (F.embedding(ids, layer.up) * (gates * hidden).unsqueeze(-1)).sum((1, 2))
    return out.reshape(*x.shape[:-1], -1)


SMALL = {"num_sub_keys": 12, "heads": 2, "k": 5, "key_dim": 8}
LAYERS = {
    "memory": (lambda **o: lutra.nn.ProductKeyMemory(16, 10, **SMALL, **o), memory),
    "memory+": (lambda **o: lutra.nn.ProductKeyMemory(16, 10, value_dim=6, gated=True, **SMALL, **o), memory),
    "narrow": (lambda **o: lutra.nn.ProductKeyMemory(16, value_dim=6, query_norm=None, **SMALL, **o), memory),
    "peer": (lambda **o: lutra.nn.PEER(16, 10, **SMALL, **o), peer),
    "peer sigmoid": (lambda **o: lutra.nn.PEER(16, gates="sigmoid", query_norm="layer", **SMALL, **o), peer),
}


def gradients(layer, function, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = function(x)
    out.square().sum().backward()
    found = {n: p.grad.to_dense() if p.grad.is_sparse else p.grad for n, p in layer.named_parameters()}
    return out.detach(), {"x": x.grad, **{n: g.clone() for n, g in found.items()}}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_torch_ops(name, sparse):
    torch.manual_seed(2)
    make, composed = LAYERS[name]
    layer = make(sparse=sparse)
    x = torch.randn(3, 5, 16)
    got, ours = gradients(layer, layer, x)
    want, theirs = gradients(layer, lambda y: composed(layer, y), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=key)
    layer.zero_grad()
    layer(x).sum().backward()
    table = layer.values.weight if name in ("memory", "memory+", "narrow") else layer.up
    assert table.grad.is_sparse == sparse


@pytest.mark.parametrize("name", LAYERS)
def test_manners(name):
    torch.manual_seed(3)
    make, _ = LAYERS[name]
    layer = make().eval()
    x = torch.randn(4, 16)
    want = layer(x)
    assert "num_sub_keys=12" in repr(layer)
    for other in (copy.deepcopy(layer), make().eval()):
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), want)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), want)
    assert layer(x[:0]).shape == (0, want.shape[1])
    assert layer(x[0]).shape == want.shape[1:] and layer(x.view(2, 2, 16)).shape == (2, 2, want.shape[1])
    for dtype in (torch.bfloat16, torch.float16):
        other = copy.deepcopy(layer).to(dtype)
        out = other(x.to(dtype))
        assert out.dtype == dtype and out.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert copy.deepcopy(layer).double()(x.double()).dtype == torch.float64
    checkpointed = torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    assert torch.equal(checkpointed, want)
    assert make(device="meta")(x.to("meta")).shape == want.shape


@pytest.mark.parametrize("name", ["memory+", "peer"])
def test_compile_without_graph_breaks(name):
    torch.manual_seed(4)
    layer = LAYERS[name][0]().eval()
    x = torch.randn(6, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.chooser.keys.grad.abs().sum() > 0


def test_a_table_is_shared_between_layers():
    torch.manual_seed(5)
    first = lutra.nn.ProductKeyMemory(16, gated=True, **SMALL)
    model = torch.nn.Sequential(
        first,
        lutra.nn.ProductKeyMemory(16, values=first, gated=True, **SMALL),
        lutra.nn.ProductKeyMemory(16, values=first.values.weight, **SMALL),
    )
    assert len({id(layer.values.weight) for layer in model}) == 1
    assert sum(p.shape == (144, 16) for p in model.parameters()) == 1
    x = torch.randn(9, 16)
    _, ours = gradients(model, model, x)

    def composed(y):
        for layer in model:
            y = memory(layer, y)
        return y

    _, theirs = gradients(model, composed, x)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=key)
    with pytest.raises(ValueError, match=r"values has shape \(144, 16\).*it must be \(100, 16\)"):
        lutra.nn.ProductKeyMemory(16, values=first, **{**SMALL, "num_sub_keys": 10})
    with pytest.raises(TypeError, match="values must be"):
        lutra.nn.ProductKeyMemory(16, values=torch.zeros(144, 16), **SMALL)


@pytest.mark.parametrize("when", ["step", "backward"])
def test_attached_values(when):
    """A table that `lutra.optim` updates in place ends where the sparse gradient ends."""
    ends = []
    for attach in (True, False):
        torch.manual_seed(6)
        layer = lutra.nn.ProductKeyMemory(16, sparse=not attach, **SMALL)
        optimizer = lutra.optim.Adam(layer.parameters(), lr=0.01)
        if attach:
            optimizer.attach(layer.values, when=when)
        before = layer.values.weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(4, 16)).square().sum().backward()
            assert attach == (layer.values.weight.grad is None)
            optimizer.step()
        ends.append(layer.values.weight.detach().clone())
        assert 0 < (ends[-1] != before).any(1).sum() < 144
    torch.testing.assert_close(*ends)


def test_a_layer_learns():
    torch.manual_seed(7)
    x, target = torch.randn(64, 16), torch.randn(64, 10)
    for name in ("memory", "peer"):
        layer = LAYERS[name][0]()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.mse_loss(layer(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], (name, losses[::20])


@pytest.mark.parametrize("layer", [lutra.nn.ProductKeyMemory, lutra.nn.PEER])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 13}, ValueError, "k is 13; it must be at most num_sub_keys = 12"),
        ({"key_dim": 7}, ValueError, "key_dim is 7; it must be even"),
        ({"heads": 0}, ValueError, "heads must be >= 1"),
        ({"num_sub_keys": 70000}, ValueError, "num_sub_keys must be in"),
        ({"query_norm": "group"}, ValueError, "query_norm must be one of 'batch', 'layer', None"),
    ],
)
def test_bad_arguments(layer, options, error, message):
    with pytest.raises(error, match=message):
        layer(16, **{**SMALL, **options})


def test_bad_inputs():
    for name in ("memory", "peer"):
        layer = LAYERS[name][0]()
        with pytest.raises(ValueError, match="last axis must be in_features = 16"):
            layer(torch.zeros(2, 15))
        with pytest.raises(TypeError, match="x must be a torch tensor"):
            layer([1.0])
        with pytest.raises(ValueError, match="NaN"):
            layer.eval()(torch.full((2, 16), float("nan")))
    with pytest.raises(ValueError, match="gates must be one of"):
        lutra.nn.PEER(16, gates="relu")
