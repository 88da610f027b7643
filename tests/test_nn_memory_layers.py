"""What MemoryLinear offers beside one output and a fixed temperature, and LookupFFN."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional
nn = pytest.importorskip("lutra.nn")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-11}


def plain_weights(z, score, t):
    """Weights of chunks z (..., K, bits) in torch's operations."""
    weights = torch.sigmoid(2 * z.abs() / t).prod(-1)
    return weights * z.abs().sum(-1) if score == "scaled" else weights


def plain(layer, x):
    """The layer in torch's operations, its projection aside."""
    tables = layer.tables
    wide = torch.float64 if tables.dtype == torch.float64 else torch.float32
    z = x if layer.projection is None else layer.projection(x)
    z = z.to(wide).unflatten(-1, (layer.num_tables, layer.bits))
    codes = ((z >= 0).long() << torch.arange(layer.bits)).sum(-1)
    if layer.score == "none":
        weights = torch.ones_like(codes, dtype=wide)
    else:
        weights = plain_weights(z, layer.score, layer.temperature)
    rows = tables[torch.arange(layer.num_tables), codes].to(wide)
    out = (weights.unsqueeze(-1) * rows).sum(-2)
    if layer.bias is not None:
        out = out + layer.bias.to(wide)
    out = out.to(tables.dtype)
    return out if isinstance(layer.out_features, int) else out.split(layer.out_features, -1)


def cat(out):
    return torch.cat(out, -1) if isinstance(out, tuple) else out


def assert_same(layer, x):
    """Output and all gradients equal those of torch's operations."""
    results = []
    for run in (layer, lambda x: plain(layer, x)):
        layer.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        out = cat(run(leaf))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        out.backward(grad)
        grads = {n: p.grad for n, p in layer.named_parameters()}
        results.append({"out": out.detach(), "x": leaf.grad, **grads})
    tolerance = TOLERANCE[layer.tables.dtype]
    for name, b in results[1].items():
        a = results[0][name]
        if layer.score == "none" and (name == "x" or name.startswith("projection")):
            assert a is None or not a.any()
            continue
        assert a is not None and a.dtype == b.dtype and a.shape == b.shape, name
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


VARIANTS = [
    {"learn_temperature": True},
    {"learn_temperature": "table"},
    {"projection": "dense", "num_tables": 7},
    {"projection": "hadamard", "num_tables": 5},
    {"projection": "hadamard", "num_tables": 3, "learn_temperature": "table"},
    {"out_features": (5, 3, 9)},
    {"out_features": (5,), "projection": "dense", "learn_temperature": "layer"},
]


@pytest.mark.parametrize("score", ["prob", "scaled", "none"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_plain_torch(options, score):
    if score == "none" and "learn_temperature" in options:
        pytest.skip("no temperature to learn")
    for bits, tokens in ((1, (3,)), (4, (2, 5)), (9, (1,)), (4, (0,))):
        torch.manual_seed(bits)
        arguments = {"out_features": 17, "temperature": 1.3, **options}
        layer = nn.MemoryLinear(bits * 4, arguments.pop("out_features"), bits, score=score, **arguments)
        torch.nn.init.normal_(layer.bias)
        torch.nn.init.normal_(layer.tables)
        if layer.learn_temperature:
            with torch.no_grad():
                layer.log_temperature += 0.3 * torch.randn(layer.log_temperature.shape)
        assert_same(layer, torch.randn(*tokens, bits * 4))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_dtype(options, dtype):
    torch.manual_seed(0)
    arguments = {"out_features": 17, **options}
    layer = nn.MemoryLinear(16, arguments.pop("out_features"), 4, score="scaled", dtype=dtype, **arguments)
    x = torch.randn(3, 16).to(dtype)
    if layer.projection is None:
        assert_same(layer, x)
    out = cat(layer(x.requires_grad_()))
    assert out.dtype == dtype and torch.isfinite(out).all()
    out.float().sum().backward()
    assert x.grad.dtype == dtype
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.dtype == p.dtype, name
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = torch.float64 if dtype == torch.float64 else torch.bfloat16
        assert cat(layer(x)).dtype == wanted


@pytest.mark.parametrize("score", ["prob", "scaled"])
@pytest.mark.parametrize("learn", ["layer", "table"])
def test_gradcheck_of_the_temperature(score, learn):
    torch.manual_seed(0)
    options = {"score": score, "learn_temperature": learn, "temperature": 0.7, "dtype": torch.float64}
    layer = nn.MemoryLinear(9, 4, 3, **options)
    x = torch.randn(5, 9, dtype=torch.float64)
    x = (x + 0.05 * x.sign()).requires_grad_()  # away from the kinks at 0

    def run(x, log_t, tables):
        return torch.func.functional_call(
            layer, {"log_temperature": log_t, "tables": tables, "bias": layer.bias}, (x,)
        )

    log_t = layer.log_temperature.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, log_t, layer.tables.detach().clone().requires_grad_()))


def test_the_temperature_stays_positive_and_is_a_parameter():
    layer = nn.MemoryLinear(16, 4, 4, temperature=0.5, learn_temperature="table")
    assert layer.temperature.shape == (4, 1) and torch.allclose(layer.temperature, torch.tensor(0.5))
    assert "log_temperature" in layer.state_dict() and "learn_temperature='table'" in repr(layer)
    optimizer = torch.optim.SGD([layer.log_temperature], lr=1.0)
    torch.nn.init.normal_(layer.tables)
    for _ in range(20):
        layer(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.temperature > 0).all()


def test_several_outputs_share_one_hash():
    torch.manual_seed(0)
    layer = nn.MemoryLinear(32, (8, 16, 24), 8)
    parts = [nn.MemoryLinear(32, n, 8) for n in (8, 16, 24)]
    with torch.no_grad():
        layer.tables.copy_(torch.cat([p.tables for p in parts], 2))
    x = torch.randn(2, 3, 32)
    out = layer(x)
    assert isinstance(out, tuple) and [o.shape for o in out] == [(2, 3, 8), (2, 3, 16), (2, 3, 24)]
    for a, p in zip(out, parts):
        torch.testing.assert_close(a, p(x))
    with torch.no_grad():
        for a, b in zip(layer(x), out):
            assert torch.equal(a, b)


def test_sixteen_bits_and_codes_in_half_precision():
    """Codes built in bf16 are wrong from 9 bits on; here they are integers."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        layer = nn.MemoryLinear(32, 3, 16, dtype=dtype)
        assert_same(layer, torch.randn(9, 32).to(dtype))


def test_nan_reaches_the_output_whatever_the_score():
    for options in ({"score": "prob"}, {"score": "scaled"}, {"score": "none"}, {"learn_temperature": True}):
        layer = nn.MemoryLinear(16, 5, 4, **options)
        x = torch.randn(3, 16)
        x[1, 7] = float("nan")
        out = layer(x)
        assert out[1].isnan().all() and torch.isfinite(out[[0, 2]]).all(), options
    layer = nn.MemoryLinear(16, 5, 4, hash="tree")
    out = layer(x)
    assert out[1].isnan().all() and torch.isfinite(out[[0, 2]]).all()


def test_hadamard_projection():
    torch.manual_seed(0)
    p = nn.HadamardProjection(64, 64, bias=False)
    x = torch.randn(5, 64)
    torch.testing.assert_close(p(x).norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
    wide = nn.HadamardProjection(48, 150)
    assert wide.diagonals.shape == (3, 3, 64)
    z = wide(torch.randn(2000, 48))
    assert z.shape == (2000, 150) and z.std().item() == pytest.approx(1, abs=0.05)
    matrix = wide(torch.eye(48)).t()  # the dense matrix that it stands for
    y = torch.randn(4, 48)
    torch.testing.assert_close(wide(y), y @ matrix.t(), rtol=1e-4, atol=1e-4)
    p = nn.HadamardProjection(3, 6, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, d, b: torch.func.functional_call(p, {"diagonals": d, "bias": b}, (x,)),
        (x, p.diagonals, p.bias),
    )
    assert "factors=3" in repr(p) and nn.HadamardProjection(8, 8, bias=False).bias is None
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(y).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [*VARIANTS[1::2], {"hash": "tree"}], ids=str)
def test_copies_compile_and_state(options):
    torch.manual_seed(0)
    arguments = {"out_features": 6, **options}
    out_features = arguments.pop("out_features")

    def make():
        return nn.MemoryLinear(16, out_features, 4, **arguments)

    layer, x = make(), torch.randn(3, 16)
    expected = cat(layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(cat(twin(x)), expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out = cat(compiled(x))
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert layer.tables.grad is not None
    again = torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    torch.testing.assert_close(cat(again), expected)
    cat(again).sum().backward()
    layer.zero_grad()
    assert layer.to(torch.bfloat16)(x.bfloat16()) is not None


def test_a_checkpoint_of_another_shape_is_named():
    with pytest.raises(RuntimeError, match=r"size mismatch for tables.*\[2, 256, 5\].*\[4, 16, 5\]"):
        nn.MemoryLinear(16, 5, 4).load_state_dict(nn.MemoryLinear(16, 5, 8).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*log_temperature"):
        nn.MemoryLinear(16, 5, 4, learn_temperature=True).load_state_dict(
            nn.MemoryLinear(16, 5, 4).state_dict()
        )


def test_quantized_tables():
    torch.manual_seed(0)
    for options in (
        {},
        {"projection": "dense", "num_tables": 6},
        {"learn_temperature": "table"},
        {"score": "none"},
    ):
        layer = nn.MemoryLinear(32, (64, 32), 8, **{"score": "scaled", **options})
        x = torch.randn(3, 7, 32)
        want = cat(layer(x)).detach()
        small = copy.deepcopy(layer)
        assert small.quantize_() is small and small.quantize_() is small
        assert small.tables.dtype == torch.int8 and "quantized" in repr(small)
        assert "tables" not in dict(small.named_parameters())
        got = small(x)
        assert isinstance(got, tuple)
        error = (cat(got) - want).norm() / want.norm()
        assert 0 < error < 0.01, options
        fresh = nn.MemoryLinear(32, (64, 32), 8, **{"score": "scaled", **options}).quantize_()
        fresh.load_state_dict(small.state_dict())
        assert torch.equal(cat(fresh(x)), cat(got))
        assert small.to(torch.bfloat16).scale.dtype == torch.float32
        assert small.to(torch.bfloat16).tables.dtype == torch.int8
    with pytest.raises(TypeError, match="quantized"):
        small.reset_parameters()


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (
            {"in_features": 18},
            ValueError,
            ["in_features is 18", "multiple of bits = 4", "16 or 20", "projection"],
        ),
        ({"bits": 20}, ValueError, ["bits must be in [1, 16], got 20", "2**20 rows of 4 values", "GB"]),
        ({"num_tables": 3}, ValueError, ["num_tables is 3", "in_features / bits = 4"]),
        ({"num_tables": 0, "projection": "dense"}, ValueError, ["num_tables must be >= 1"]),
        ({"projection": "fft"}, ValueError, ["projection must be None, 'dense' or 'hadamard'"]),
        ({"learn_temperature": "all"}, ValueError, ["learn_temperature must be", "'all'"]),
        ({"learn_temperature": True, "score": "none"}, ValueError, ["learn_temperature needs a score"]),
        ({"out_features": ()}, ValueError, ["out_features is empty"]),
        ({"out_features": (3, -1)}, ValueError, ["out_features must be >= 0"]),
        ({"hash": "md5"}, ValueError, ["hash must be one of 'sign', 'tree'"]),
        ({"hash": "tree", "num_tables": 5}, ValueError, ["multiple of num_tables = 5"]),
        ({"hash": "tree", "projection": "dense"}, ValueError, ["projection must be None"]),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error) as caught:
        nn.MemoryLinear(**{"in_features": 16, "out_features": 4, "bits": 4, **arguments})
    for word in words:
        assert word in str(caught.value)


def test_bad_input_is_named():
    layer = nn.MemoryLinear(16, 4, 4, projection="dense")
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\); its last axis must be in_features = 16"):
        layer(torch.zeros(3, 8))
    with pytest.raises(TypeError, match="x has dtype int64"):
        layer(torch.zeros(3, 16, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must be a torch tensor"):
        layer([1.0])
