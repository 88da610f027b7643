"""The layers of every registered format: in the place of torch's Embedding and EmbeddingBag."""

from __future__ import annotations

import copy
import pickle

import format_checks as checks
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lutra  # noqa: E402
import lutra.nn  # noqa: E402
from lutra.compress import FORMATS  # noqa: E402

NAMES = sorted(FORMATS)
SHAPE = (97, 16)
IDS = torch.tensor([[0, 5, 96], [5, 5, 1]])


def layer_of(name, bag=False, **options):
    found = checks.some_format(name, SHAPE)
    cls = getattr(lutra.nn, f"{FORMATS[name].layer}Embedding{'Bag' if bag else ''}")
    weight = torch.from_numpy(checks.dense(SHAPE))
    return cls.from_pretrained(weight, freeze=False, format=found, **options)


def decoded(layer):
    return layer.dense()


@pytest.mark.parametrize("name", NAMES)
def test_embedding(name):
    layer = layer_of(name)
    assert isinstance(layer, torch.nn.Embedding)
    assert layer.weight.shape == (97, 0) and layer.weight.dtype == torch.float32
    out = layer(IDS)
    assert out.shape == (2, 3, 16)
    assert torch.allclose(out, decoded(layer)[IDS], atol=1e-5)
    assert layer(torch.zeros((0, 4), dtype=torch.long)).shape == (0, 4, 16)
    assert torch.allclose(layer(torch.tensor(3, dtype=torch.int32)), decoded(layer)[3], atol=1e-5)
    assert str(layer.format.describe()) in repr(layer)
    assert layer.nbytes == layer.to_table().nbytes


@pytest.mark.parametrize("name", NAMES)
def test_embedding_bag(name):
    for mode in ("sum", "mean", "max"):
        layer = layer_of(name, True, mode=mode, padding_idx=5)
        assert isinstance(layer, torch.nn.EmbeddingBag)
        twin = torch.nn.EmbeddingBag(97, 16, mode=mode, padding_idx=5, _weight=decoded(layer))
        assert torch.allclose(layer(IDS), twin(IDS), atol=1e-4)
        flat, offsets = IDS.reshape(-1), torch.tensor([0, 1, 4])
        assert torch.allclose(layer(flat, offsets), twin(flat, offsets), atol=1e-4)
    layer = layer_of(name, True, mode="sum", include_last_offset=True)
    twin = torch.nn.EmbeddingBag(97, 16, mode="sum", include_last_offset=True, _weight=decoded(layer))
    weights = torch.randn(6)
    offsets = torch.tensor([0, 2, 2, 6])
    assert torch.allclose(layer(flat, offsets, weights), twin(flat, offsets, weights), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_padding_row_is_kept_and_gets_no_gradient(name):
    dense = torch.from_numpy(checks.dense(SHAPE))
    layer = layer_of(name, padding_idx=-92)
    assert layer.padding_idx == 5
    out = layer(IDS)
    assert torch.equal(out[0, 1], dense[5])
    assert torch.equal(layer.dense()[5], dense[5])
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if out.requires_grad:
        for g in torch.autograd.grad(out[IDS == 5].sum(), parameters, allow_unused=True):
            assert g is None or not g.to_dense().any(), g.shape
    fresh = getattr(lutra.nn, f"{FORMATS[name].layer}Embedding")(
        97, 16, padding_idx=2, format=checks.some_format(name, SHAPE)
    )
    assert not fresh(torch.tensor([2])).any()


@pytest.mark.parametrize("name", NAMES)
def test_max_norm(name):
    layer = layer_of(name, max_norm=1.0)
    out, rows = layer(IDS), decoded(layer)[IDS]
    norm = rows.norm(dim=-1, keepdim=True)
    assert torch.allclose(out, rows * torch.where(norm > 1, 1 / (norm + 1e-7), 1), atol=1e-5)
    bags = layer_of(name, True, max_norm=1.0, mode="sum")
    assert torch.allclose(bags(IDS), out.sum(1), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_scale_grad_by_freq(name):
    plain, scaled = layer_of(name), layer_of(name, scale_grad_by_freq=True)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    if not parameters:
        pytest.skip(f"{name} has no trainable array")
    counts = torch.tensor([1.0, 3, 1, 3, 3, 1]).unsqueeze(1)
    want = torch.autograd.grad((plain(IDS.reshape(-1)) / counts).sum(), parameters)
    others = [p for p in scaled.parameters() if p.requires_grad]
    got = torch.autograd.grad(scaled(IDS).sum(), others)
    bags = layer_of(name, True, scale_grad_by_freq=True, mode="sum")
    third = torch.autograd.grad(bags(IDS).sum(), [p for p in bags.parameters() if p.requires_grad])
    for a, b, c in zip(got, want, third):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)
        assert torch.allclose(c, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict(name):
    layer = layer_of(name, padding_idx=5)
    state = layer.state_dict()
    cls, found = type(layer), layer.format
    other = cls(97, 16, padding_idx=5, format=found)
    other.load_state_dict(state)
    assert torch.equal(other(IDS), layer(IDS))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(IDS), layer(IDS)) and type(twin) is cls
    wrong = dict(state)
    text = bytes(state["format_json"].numpy().tobytes()).replace(b'"format"', b'"former"')
    wrong["format_json"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with pytest.raises((RuntimeError, ValueError)):
        other.load_state_dict(wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_dtypes(name, dtype):
    layer = layer_of(name)
    want = layer(IDS).detach()
    layer = layer.to(dtype)
    out = layer(IDS)
    assert out.dtype == dtype
    assert torch.allclose(out.float(), want, atol=0.1, rtol=0.05)
    if out.requires_grad:
        out.float().sum().backward()
        assert all(p.grad.dtype == dtype for p in layer.parameters() if p.requires_grad)
    bags = layer_of(name, True, mode="mean").to(dtype)
    assert bags(IDS).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_autocast_keeps_the_dtype_of_the_layer(name):
    layer = layer_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(IDS).dtype == torch.float32


@pytest.mark.traces
@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    layer, bags = layer_of(name), layer_of(name, True, mode="sum")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(IDS), layer(IDS), atol=1e-5)
    compiled = torch.compile(bags, fullgraph=True, backend="aot_eager")
    out = compiled(IDS)
    assert torch.allclose(out, bags(IDS), atol=1e-5)
    if out.requires_grad:
        out.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_fresh_layers(name):
    cls, found = getattr(lutra.nn, f"{FORMATS[name].layer}Embedding"), checks.some_format(name, SHAPE)
    torch.manual_seed(0)
    a = cls(97, 16, format=found)
    torch.manual_seed(0)
    b = cls(97, 16, format=found)
    assert torch.equal(a(IDS), b(IDS))
    a.reset_parameters()
    meta = cls(97, 16, format=found, device="meta", dtype=torch.bfloat16)
    assert meta.weight.is_meta and meta(IDS.to("meta")).shape == (2, 3, 16)


@pytest.mark.parametrize("name", NAMES)
def test_from_embedding_and_table(name):
    found = checks.some_format(name, SHAPE)
    layer = getattr(lutra.nn, f"{FORMATS[name].layer}Embedding")
    source = torch.nn.Embedding(97, 16, padding_idx=3, max_norm=2.0).eval()
    made = layer.from_embedding(source, format=found)
    assert made.padding_idx == 3 and made.max_norm == 2.0 and not made.training
    table = checks.table(name, SHAPE)
    again = layer.from_table(table, padding_idx=1)
    assert torch.allclose(again(torch.tensor([7])), torch.from_numpy(np.array(table[7]))[None], atol=1e-5)
    bags = getattr(lutra.nn, f"{FORMATS[name].layer}EmbeddingBag")
    source = torch.nn.EmbeddingBag(97, 16, mode="sum", padding_idx=3)
    made = bags.from_embedding(source, format=found)
    assert made.mode == "sum" and made.padding_idx == 3
    assert bags.from_table(table, mode="max").mode == "max"


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name):
    layer = layer_of(name)
    with pytest.raises(IndexError):
        layer(torch.tensor([97]))
    with pytest.raises(IndexError):
        layer(torch.tensor([-1]))
    with pytest.raises(TypeError):
        layer(torch.tensor([1.0]))
    cls = type(layer)
    with pytest.raises(ValueError, match="padding_idx"):
        cls(97, 16, padding_idx=97, format=layer.format)
    bad = torch.from_numpy(checks.dense(SHAPE))
    bad[4, 4] = float("inf")
    with pytest.raises(ValueError, match=r"table\[4\]"):
        cls.from_pretrained(bad, format=layer.format)


def test_another_format_is_refused():
    others = [n for n in NAMES if n != "low_rank"]
    if others:
        with pytest.raises(ValueError, match="stores 'low_rank'"):
            lutra.nn.LowRankEmbedding(97, 16, format=checks.some_format(others[0], SHAPE))
    a = lutra.nn.LowRankEmbedding(97, 16, rank=4)
    b = lutra.nn.LowRankEmbedding(97, 16, rank=5)
    with pytest.raises(RuntimeError, match="is stored as"):
        b.load_state_dict(a.state_dict())
