"""lutra.nn.MemoryLinear against the same layer written with torch's ops."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lutra

torch = pytest.importorskip("torch")
F = torch.nn.functional
nn = pytest.importorskip("lutra.nn")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-11}


def plain_torch(x, tables, bias, bits, score="prob", temperature=1.0):
    """The layer with torch's ops only: the definition to compare with."""
    n_tables, entries, dim = tables.shape
    wide = torch.float64 if tables.dtype == torch.float64 else torch.float32
    z = x.reshape(-1, n_tables, bits).to(wide)
    codes = ((z >= 0).long() << torch.arange(bits)).sum(-1)
    weights = torch.sigmoid(2 * z.abs() / temperature).prod(-1)
    if score == "scaled":
        weights = weights * z.abs().sum(-1)
    flat = tables.reshape(n_tables * entries, dim).to(wide)
    ids = codes + torch.arange(n_tables) * entries
    out = F.embedding_bag(ids, flat, per_sample_weights=weights, mode="sum")
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(tables.dtype).reshape(*x.shape[:-1], dim)


def both(layer, x, grad=None):
    """(output, gradients of x, tables, bias) of the layer and of plain torch."""
    results = []
    for run in (
        layer,
        lambda x: plain_torch(x, layer.tables, layer.bias, layer.bits, layer.score, layer.temperature),
    ):
        layer.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        out = run(leaf)
        out.backward(torch.ones_like(out) if grad is None else grad)
        bias = None if layer.bias is None else layer.bias.grad
        results.append([out.detach(), leaf.grad, layer.tables.grad, bias])
    return results


def assert_same(layer, x, grad=None):
    tolerance = TOLERANCE[layer.tables.dtype]
    for name, a, b in zip(("out", "x", "tables", "bias"), *both(layer, x, grad)):
        if b is None:
            assert a is None
            continue
        assert a.dtype == b.dtype and a.shape == b.shape, name
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("score", ["prob", "scaled"])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_plain_torch(bits, score, bias):
    torch.manual_seed(bits)
    for chunks, out_features, tokens in ((1, 1, 1), (3, 17, 5), (16, 33, 2), (5, 64, 31)):
        layer = nn.MemoryLinear(chunks * bits, out_features, bits, bias, score, temperature=1.7)
        if bias:
            torch.nn.init.normal_(layer.bias)
        x = torch.randn(tokens, chunks * bits)
        assert_same(layer, x, torch.randn(tokens, out_features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 3, 64, 65])
def test_gradient_of_large_tables(tokens, dtype):
    """Few tokens: only the touched rows of the gradient are written."""
    torch.manual_seed(0)
    layer = nn.MemoryLinear(16, 4096, 8, dtype=dtype)
    assert_same(layer, torch.randn(tokens, 16).to(dtype), torch.randn(tokens, 4096).to(dtype))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 3, 24), (2, 1, 3, 24)])
def test_every_dtype_and_leading_shape(dtype, shape):
    torch.manual_seed(0)
    layer = nn.MemoryLinear(24, 19, 8, dtype=dtype)
    assert_same(layer, torch.randn(shape).to(dtype))
    out = layer(torch.randn(shape).to(dtype))
    assert out.shape == (*shape[:-1], 19) and out.dtype == dtype


@pytest.mark.parametrize("x_dtype", list(TOLERANCE))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_input_of_another_dtype(x_dtype, dtype):
    torch.manual_seed(0)
    layer = nn.MemoryLinear(16, 9, 4, dtype=dtype)
    x = torch.randn(5, 16).to(x_dtype).requires_grad_()
    out = layer(x)
    assert out.dtype == dtype
    expected = plain_torch(x, layer.tables, layer.bias, 4)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    out.float().sum().backward()
    assert x.grad.dtype == x_dtype and x.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(layer(x), out)


def test_not_contiguous_and_empty():
    torch.manual_seed(0)
    layer = nn.MemoryLinear(16, 6, 8)
    base = torch.randn(16, 10)
    assert_same(layer, base.t())
    assert_same(layer, torch.randn(6, 32)[::2, 16:])
    grad = torch.randn(6, 10).t()
    assert_same(layer, torch.randn(10, 16), grad)
    assert_same(layer, torch.randn(10, 16), torch.randn(1, 6).expand(10, 6))
    layer.zero_grad()
    for shape in ((0, 16), (3, 0, 16)):
        x = torch.zeros(shape, requires_grad=True)
        out = layer(x)
        assert out.shape == (*shape[:-1], 6)
        out.sum().backward()
        assert x.grad.shape == shape
    assert not layer.tables.grad.any() and not layer.bias.grad.any()
    assert nn.MemoryLinear(0, 4)(torch.zeros(3, 0)).tolist() == [[0.0] * 4] * 3


def test_only_the_needed_gradients():
    layer = nn.MemoryLinear(16, 6, 8)
    x = torch.randn(3, 16)
    layer(x).sum().backward()
    assert layer.tables.grad is not None and layer.bias.grad is not None
    layer.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    expected = torch.autograd.grad(plain_torch(x, layer.tables, layer.bias, 8).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)
    assert not layer(x.detach()).requires_grad
    layer.bias.requires_grad_()
    layer.bias.grad = None
    layer(x.detach()).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 3.0))


def test_no_grad_and_inference_mode_give_the_same_bits():
    layer = nn.MemoryLinear(64, 33, 8)
    x = torch.randn(9, 64, requires_grad=True)
    out = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), out) and not layer(x).requires_grad
    with torch.inference_mode():
        inferred = layer(x)
        assert torch.equal(inferred, out) and inferred.is_inference()


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(param_dtype, autocast):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(12, 16, dtype=param_dtype),
        nn.MemoryLinear(16, 16, 8, dtype=param_dtype),
        nn.MemoryLinear(16, 4, 4, dtype=param_dtype),
        torch.nn.Linear(4, 2, dtype=param_dtype),
    )
    x = torch.randn(5, 12)
    with torch.autocast("cpu", autocast):
        hidden = model[1](model[0](x))
        assert hidden.dtype == autocast
        out = model(x)
        assert out.dtype == autocast
        out.float().square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == param_dtype and torch.isfinite(p.grad).all(), name
    with torch.no_grad(), torch.autocast("cpu", autocast):
        torch.testing.assert_close(model(x), out)


def test_reset_parameters_and_repr():
    torch.manual_seed(0)
    layer = nn.MemoryLinear(64, 100, 8, score="scaled", temperature=0.5)
    assert layer.tables.shape == (8, 256, 100) and layer.bias.shape == (100,)
    assert layer.tables.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(layer.tables.mean().item()) < 1e-3 and not layer.bias.any()
    before = layer.tables.detach().clone()
    torch.nn.init.ones_(layer.bias)
    layer.reset_parameters()
    assert not torch.equal(before, layer.tables) and not layer.bias.any()
    text = repr(layer)
    for part in (
        "in_features=64",
        "out_features=100",
        "bits=8",
        "bias=True",
        "score='scaled'",
        "temperature=0.5",
    ):
        assert part in text
    assert nn.MemoryLinear(8, 8, bias=False).bias is None
    assert "bias=False" in repr(nn.MemoryLinear(8, 8, bias=False))


def test_meta_device_then_materialised():
    layer = nn.MemoryLinear(16, 4, device="meta")
    assert layer(torch.zeros(3, 16, device="meta")).shape == (3, 4)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(3, 16))).all()


def test_copies_and_state():
    layer = nn.MemoryLinear(16, 5, 4, score="scaled")
    x = torch.randn(3, 16)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = nn.MemoryLinear(16, 5, 4, score="scaled")
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), expected)
        assert twin.tables.data_ptr() != layer.tables.data_ptr()
    assert set(layer.state_dict()) == {"tables", "bias"}
    assert layer.half()(x.half()).dtype == torch.float16
    assert layer.double()(x).dtype == torch.float64


def test_replicas_as_data_parallel_makes_them():
    layer = nn.MemoryLinear(16, 5, 4)
    x = torch.randn(6, 16)
    replicas = []
    for _ in range(2):  # as torch.nn.parallel.replicate: parameters become plain attributes of a shallow copy
        replica = layer._replicate_for_data_parallel()
        for name, p in layer.named_parameters():
            setattr(replica, name, p.view_as(p))
        replicas.append(replica)
    with ThreadPoolExecutor(2) as pool:
        out = torch.cat(list(pool.map(lambda replica, part: replica(part), replicas, (x[:3], x[3:]))))
    assert torch.equal(out, layer(x))
    out.sum().backward()
    grad = layer.tables.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(grad, layer.tables.grad)


def test_parametrizations_and_functional_call():
    layer = nn.MemoryLinear(16, 5, 4)
    x = torch.randn(3, 16)
    doubled = torch.func.functional_call(layer, {"tables": layer.tables * 2, "bias": layer.bias}, (x,))
    torch.testing.assert_close(doubled, 2 * layer(x))

    class Twice(torch.nn.Module):
        def forward(self, t):
            return 2 * t

    torch.nn.utils.parametrize.register_parametrization(layer, "tables", Twice())
    torch.testing.assert_close(layer(x), doubled)


def test_it_learns():
    """A function of signs and magnitudes that a dense layer cannot fit: the loss falls to a tenth."""
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    y = torch.stack([x[:, 0].sign() * x[:, 1].sign(), (x[:, 8] > 0).float() * x[:, 9].sign()], 1)
    layer = nn.MemoryLinear(16, 2, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    dense = torch.linalg.lstsq(torch.cat([x, torch.ones(512, 1)], 1), y).solution
    assert losses[-1] < F.mse_loss(torch.cat([x, torch.ones(512, 1)], 1) @ dense, y).item() / 5


def test_the_gradient_of_the_input_leads_downhill():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), nn.MemoryLinear(16, 16, 8), torch.nn.Linear(16, 1))
    for p in (*net[1].parameters(), *net[2].parameters()):
        p.requires_grad_(False)
    torch.nn.init.normal_(net[1].tables)
    x, y = torch.randn(256, 8), torch.randn(256, 1)
    optimizer = torch.optim.Adam(net[0].parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.skipif(lutra._backend.core is None, reason="the CPU module was not built")
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_threads_do_not_change_a_bit(tokens):
    torch.manual_seed(0)
    layer = nn.MemoryLinear(256, 130, 8)
    x, grad = torch.randn(tokens, 256), torch.randn(tokens, 130)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            out.backward(grad)
            results.append((out.detach(), leaf.grad, layer.tables.grad, layer.bias.grad))
        finally:
            torch.set_num_threads(2)
    for other in results[1:]:
        for name, a, b in zip(("out", "x", "tables", "bias"), results[0], other):
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"in_features": 12}, ValueError, ["in_features is 12", "multiple of bits = 8"]),
        ({"in_features": -8}, ValueError, ["in_features must be >= 0"]),
        ({"in_features": 8.0}, TypeError, ["in_features must be an integer"]),
        ({"out_features": "4"}, TypeError, ["out_features must be an integer"]),
        ({"bits": 0}, ValueError, ["bits must be in [1, 16]"]),
        ({"bits": 17, "in_features": 17}, ValueError, ["bits must be in [1, 16]"]),
        ({"score": "softmax"}, ValueError, ["score must be one of", "softmax"]),
        ({"temperature": 0}, ValueError, ["temperature must be a positive"]),
        ({"dtype": torch.int32}, TypeError, ["dtype is torch.int32"]),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error) as caught:
        nn.MemoryLinear(**{"in_features": 16, "out_features": 4, **arguments})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(grad):
    layer = nn.MemoryLinear(16, 4).requires_grad_(grad)
    with pytest.raises(ValueError, match=r"x of shape \(3, 8\) and bits = 8 it must be \(1, 256"):
        layer(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"x has shape \(3, 15\)"):
        layer(torch.zeros(3, 15))
    with pytest.raises(TypeError, match="x has dtype int64"):
        layer(torch.zeros(3, 16, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must be a torch tensor, got numpy\.ndarray"):
        layer(np.zeros((3, 16), np.float32))
