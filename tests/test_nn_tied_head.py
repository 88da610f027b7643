"""lutra.nn.TiedHead on every registered format, and on dense tables."""

from __future__ import annotations

import copy
import io
import pickle

import format_checks as checks
import numpy as np
import pytest

from lutra.compress import FORMATS

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

from lutra import nn  # noqa: E402
from lutra.nn import _lookup_loss, _tied_head, _tiles  # noqa: E402

NAMES = [pytest.param(n, marks=pytest.mark.slow) if FORMATS[n].slow else n for n in sorted(FORMATS)]
SHAPE = checks.SHAPES[0]


def layer(name, dtype=torch.float32, **settings):
    """An embedding layer of a format (or dense), with its gradients on."""
    if name == "dense":
        made = torch.nn.Embedding(*SHAPE, **settings, dtype=dtype)
        with torch.no_grad():
            made.weight.copy_(torch.from_numpy(checks.dense(SHAPE)))
        return made
    found = checks.some_format(name, SHAPE)
    cls = getattr(nn, f"{FORMATS[name].layer}Embedding")
    dense = torch.from_numpy(checks.dense(SHAPE)).to(dtype)
    return cls.from_pretrained(dense, freeze=False, format=found, seed=1, progress=False, **settings)


def composed(embedding):
    """The table by the composition in torch's own ops: what the head must multiply by, differentiable."""
    if type(embedding) is torch.nn.Embedding:
        return embedding.weight
    rows = embedding.format.lookup(embedding._data(), SHAPE, torch.arange(SHAPE[0]))
    if embedding.padding_idx is None:
        return rows
    return torch.where(
        (torch.arange(SHAPE[0]) == embedding.padding_idx).unsqueeze(1), embedding.padding_row, rows
    )


def hidden(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, SHAPE[1], generator=g).to(dtype)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, the last of them short."""
    monkeypatch.setattr(_tiles, "TILE_BYTES", 64 * SHAPE[1] * 4)


def near(got, want, rtol=1e-4):
    assert got.shape == want.shape
    bound = rtol * (1 + float(want.detach().abs().max())) if want.numel() else 1
    assert torch.allclose(got.double(), want.double(), atol=bound, rtol=rtol)


@pytest.mark.parametrize("name", [*NAMES, "dense"])
@pytest.mark.parametrize("pad", (None, 3))
@pytest.mark.parametrize("own", (True, False))
def test_logits_and_gradients(name, pad, own, monkeypatch):
    """Of a format's own logits where it has them, and of decoded tiles."""
    if not own:
        ways = [way for way in ("logits", "lookups") if hasattr(FORMATS.get(name), way)]
        if not ways:
            pytest.skip(f"{name} has no way of its own")
        monkeypatch.setattr(_tied_head, "lookups_pay", lambda *_: False)
        if "logits" in ways:
            monkeypatch.setattr(FORMATS[name], "logits", None)
    embedding = layer(name, padding_idx=pad)
    head = nn.TiedHead(embedding, bias=True)
    with torch.no_grad():
        head.bias.copy_(torch.linspace(-1, 1, SHAPE[0]))
    for shape in ((1,), (2, 5), (33,), (0,), ()):
        x = hidden(*shape).requires_grad_(True)
        got, want = head(x), F.linear(x, composed(embedding), head.bias)
        near(got, want)
        inputs = [x, head.bias, *(p for p in embedding.parameters() if p.requires_grad and p.numel())]
        weight = hidden(*want.shape, seed=1)[..., 0]
        got = torch.autograd.grad((got * weight).sum(), inputs, allow_unused=True)
        want = torch.autograd.grad((want * weight).sum(), inputs, allow_unused=True)
        for a, b in zip(got, want):
            assert (a is None) == (b is None) or not bool((a if b is None else b).any())
            if a is not None and b is not None:
                near(a.to_dense() if a.is_sparse else a, b)


@pytest.mark.parametrize("name", [*NAMES, "dense"])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16))
def test_dtypes(name, dtype):
    head = nn.TiedHead(layer(name, dtype))
    x = hidden(5, dtype=dtype)
    got = head(x)
    assert got.dtype == dtype
    want = F.linear(x.double(), composed(head.embedding).double())
    near(got, want, {torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype])
    with pytest.raises((TypeError, RuntimeError), match="dtype"):
        head(hidden(5, dtype=torch.float32))
    with torch.no_grad():
        values, _ = head.topk(x, 3)
        assert values.dtype == dtype


@pytest.mark.parametrize("name", [*NAMES, "dense"])
def test_autocast(name):
    head = nn.TiedHead(layer(name), bias=True)
    x = hidden(4).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(x)
        loss = head.cross_entropy(x, torch.tensor([1, 2, 3, 4]))
    assert out.dtype == torch.bfloat16 and loss.dtype == torch.float32
    near(out.float(), F.linear(x, composed(head.embedding)), 5e-2)
    (out.float().square().mean() + loss).backward()
    assert x.grad.dtype == torch.float32 and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("name", [*NAMES, "dense"])
@pytest.mark.parametrize("pad", (None, 5))
def test_topk(name, pad):
    if name == "dense" and pad is not None:
        pytest.skip("a dense table keeps its padding row itself")
    head = nn.TiedHead(layer(name, padding_idx=pad), bias=True)
    with torch.no_grad():
        head.bias.copy_(torch.linspace(2, -2, SHAPE[0]))
        for shape in ((3, 4), (1,), (0,), ()):
            x = hidden(*shape)
            if pad is not None:  # the padding row's logit is the largest, then the smallest
                head.embedding.padding_row.copy_(x.reshape(-1, SHAPE[1]).sum(0) * 3)
            for k in (1, 70, SHAPE[0]):
                values, ids = head.topk(x, k)
                want = torch.sort(head(x), dim=-1, descending=True, stable=True)
                near(values, want.values[..., :k])
                assert ids.shape == values.shape and ids.dtype == torch.int64
                near(head(x).gather(-1, ids), want.values[..., :k])
                assert all(len(set(row)) == k for row in ids.reshape(-1, k).tolist())


def test_topk_ties_go_to_the_lowest_id():
    embedding = torch.nn.Embedding(500, 4)
    with torch.no_grad():
        embedding.weight.copy_(torch.arange(500).remainder(7).unsqueeze(1).expand(500, 4))
        values, ids = nn.TiedHead(embedding).topk(torch.ones(2, 4), 90)
    best = [i for r in (6, 5) for i in range(r, 500, 7)][:90]
    assert ids.tolist() == [best, best] and values[0, 0] == 24


@pytest.mark.parametrize("name", [*NAMES, "dense"])
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_cross_entropy(name, smoothing, monkeypatch):
    monkeypatch.setattr(_lookup_loss, "TOKENS", 7)
    monkeypatch.setattr(_lookup_loss, "ROWS", 40)
    monkeypatch.setattr(_lookup_loss, "LOGITS", 1)
    embedding = layer(name, padding_idx=0)
    head = nn.TiedHead(embedding, bias=True)
    x = hidden(2, 9).requires_grad_(True)
    targets = torch.randint(0, SHAPE[0], (2, 9), generator=torch.Generator().manual_seed(3))
    targets[0, 3] = -100
    inputs = [x, head.bias, *(p for p in embedding.parameters() if p.requires_grad and p.numel())]
    for reduction in ("mean", "sum", "none"):
        got = head.cross_entropy(x, targets, reduction=reduction, label_smoothing=smoothing)
        logits = F.linear(x, composed(embedding), head.bias)
        want = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction=reduction, label_smoothing=smoothing
        )
        near(got.flatten(), want.flatten())
        got = torch.autograd.grad(got.sum(), inputs, allow_unused=True)
        want = torch.autograd.grad(want.sum(), inputs, allow_unused=True)
        for a, b in zip(got, want):
            if a is not None and b is not None:
                near(a.to_dense() if a.is_sparse else a, b)


# ---------------------------------------------------------------- sampled softmax
def test_sampling_everything_is_the_full_softmax():
    head = nn.TiedHead(layer("low_rank"), bias=True)
    x, targets = hidden(6), torch.arange(6)
    loss = head.sampled_softmax(x, targets, SHAPE[0], distribution="uniform")
    near(loss, F.cross_entropy(head(x), targets), 1e-3)


@pytest.mark.parametrize("distribution", ("log_uniform", "uniform", "weights"))
@pytest.mark.parametrize("unique", (True, False))
def test_sampled_softmax_estimates_the_full_one(distribution, unique):
    head = nn.TiedHead(layer("dense"))
    x = 0.3 * hidden(64)
    targets = torch.arange(64)
    kind = torch.linspace(1, 3, SHAPE[0]) if distribution == "weights" else distribution
    g = torch.Generator().manual_seed(0)
    losses = [
        head.sampled_softmax(x, targets, 60, distribution=kind, unique=unique, generator=g).detach()
        for _ in range(40)
    ]
    # The target is counted beside the samples, and hits are removed: the sums agree to some per cent.
    full = F.cross_entropy(head(x), targets).detach()
    logits = [
        head.sampled_softmax(x, targets, 60, distribution=kind, unique=unique, generator=g, reduction="none")
        for _ in range(2)
    ]
    assert logits[0].shape == (64,) and not torch.equal(*logits)
    assert abs(float(torch.stack(losses).mean()) - float(full)) < 1.2
    same = [
        head.sampled_softmax(x, targets, 9, distribution=kind, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    ]
    assert torch.equal(*same)


def test_sampled_softmax_by_hand():
    """Given samples and expected counts: the loss is that of Jean et al., term by term."""
    from lutra.nn import _sampled

    head = nn.TiedHead(layer("dense"), bias=True)
    with torch.no_grad():
        head.bias.copy_(torch.linspace(-1, 1, SHAPE[0]))
    x, targets = hidden(5), torch.tensor([0, 1, 2, 3, 50])
    for unique in (True, False):
        got = head.sampled_softmax(
            x, targets, 20, unique=unique, reduction="none", generator=torch.Generator().manual_seed(1)
        ).detach()
        source = _sampled.Distribution("log_uniform", SHAPE[0], x.device)
        samples, drawn = source.sample(20, unique, torch.Generator().manual_seed(1))
        p = np.log((np.arange(SHAPE[0]) + 2) / (np.arange(SHAPE[0]) + 1)) / np.log(SHAPE[0] + 1)
        assert abs(p.sum() - 1) < 1e-12
        expected = 1 - (1 - p) ** drawn if unique else drawn * p
        logits = (head(x).detach().double().numpy()) - np.log(expected)
        for t in range(5):
            target = int(targets[t])
            others = [logits[t, s] for s in samples.tolist() if s != target]
            want = np.log(np.exp([logits[t, target], *others]).sum()) - logits[t, target]
            assert abs(float(got[t]) - want) < 1e-4
        if unique:
            assert len(set(samples.tolist())) == 20 and drawn >= 20


def test_sampled_softmax_has_gradients_of_sampled_rows_only():
    embedding = layer("dense", sparse=True)
    head = nn.TiedHead(embedding)
    targets = torch.tensor([90, 91])
    g = torch.Generator().manual_seed(0)
    head.sampled_softmax(hidden(2), targets, 5, generator=g).backward()
    rows = embedding.weight.grad.coalesce().indices()[0].tolist()
    assert {90, 91} <= set(rows) and len(rows) <= 7


def test_all_ids_of_a_skewed_distribution():
    weights = torch.full((50,), 1e-9)
    weights[7] = 1.0
    from lutra.nn import _sampled

    ids, drawn = _sampled.Distribution(weights, 50, torch.device("cpu")).sample(
        49, True, torch.Generator().manual_seed(0)
    )
    assert len(set(ids.tolist())) == 49 and 7 in ids.tolist() and drawn > 49


# ---------------------------------------------------------------- tied
class Model(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.embed = layer(name)
        self.head = nn.TiedHead(self.embed, bias=True)

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("name", [*NAMES, "dense"])
def test_stays_tied(name):
    model = Model(name)
    ids = torch.tensor([1, 2, 3])
    want = model(ids)
    assert isinstance(model.head, torch.nn.Linear)
    assert (model.head.in_features, model.head.out_features) == (SHAPE[1], SHAPE[0])
    assert model.head.weight is model.embed.weight
    names = [n for n, _ in model.named_parameters()]
    assert len(names) == len(set(names)) and "head.bias" in names
    state = model.state_dict()
    assert {k for k in state if k.startswith("head.")} == {"head.weight", "head.bias"}

    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    for other in copies:
        assert other.head.embedding is other.embed and other.embed is not model.embed
        assert torch.equal(other(ids), want)

    other = copies[0]
    with torch.no_grad():
        for key, value in other.state_dict().items():
            if not key.endswith("format_json"):  # codes too: rows of zeros in every format
                value.zero_()
    near(other.head(hidden(2)), torch.zeros(2, SHAPE[0]))
    other.load_state_dict(state)
    near(other(ids), want, 1e-6)

    half = copies[1].to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16
    near(half(ids), want, 5e-2)
    model.head.weight = model.embed.weight  # what Hugging Face's tie_weights does
    assert torch.equal(model(ids), want)
    meta = copies[2].to("meta")
    assert meta.head(torch.empty(2, SHAPE[1], device="meta")).shape == (2, SHAPE[0])


@pytest.mark.parametrize("name", [*NAMES, "dense"])
def test_training_moves_both(name):
    model = Model(name)
    if not any(p.requires_grad and p.numel() for p in model.embed.parameters()):
        pytest.skip(f"{name} has no trainable array")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    ids, losses = torch.arange(32), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids), (ids * 7) % 97)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.traces
@pytest.mark.parametrize(
    "name", ["dense", "pq", "int4", "low_rank", "tt"]
)  # each way; formats are in the ops
def test_compile(name):
    torch._dynamo.reset()
    head = nn.TiedHead(layer(name, padding_idx=2), bias=True)
    x, targets = hidden(5).requires_grad_(True), torch.arange(5)

    def step(x):
        return head(x).square().mean() + head.cross_entropy(x, targets)

    want = torch.autograd.grad(step(x), x)[0]
    got = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(x), x)[0]
    near(got, want)


# ---------------------------------------------------------------- errors
def test_bad_input():
    embedding = layer("low_rank")
    head = nn.TiedHead(embedding)
    with pytest.raises(TypeError, match="embedding must be"):
        nn.TiedHead(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        nn.TiedHead(embedding, torch.zeros(3))
    with pytest.raises(TypeError, match="bias"):
        nn.TiedHead(embedding, "yes")
    with pytest.raises(ValueError, match="last dimension must be 16"):
        head(torch.randn(2, 15))
    with pytest.raises(ValueError, match="k must be in"):
        head.topk(hidden(2), SHAPE[0] + 1)
    targets = torch.tensor([1, SHAPE[0]])
    for call in (head.cross_entropy, lambda x, t: head.sampled_softmax(x, t, 5)):
        with pytest.raises(IndexError, match=r"targets\[1\] is 97"):
            call(hidden(2), targets)
        with pytest.raises(ValueError, match="targets has shape"):
            call(hidden(3), targets)
        with pytest.raises(TypeError, match="int64"):
            call(hidden(2), targets.float())
    with pytest.raises(ValueError, match="reduction"):
        head.cross_entropy(hidden(2), targets, reduction="all")
    with pytest.raises(ValueError, match="label_smoothing"):
        head.cross_entropy(hidden(2), targets, label_smoothing=2)
    good = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="num_samples"):
        head.sampled_softmax(hidden(2), good, SHAPE[0] + 1)
    with pytest.raises(ValueError, match="distribution"):
        head.sampled_softmax(hidden(2), good, 3, distribution="zipf")
    few = torch.zeros(SHAPE[0])
    few[:2] = 1
    with pytest.raises(ValueError, match="only 2 ids"):
        head.sampled_softmax(hidden(2), good, 3, distribution=few)


def test_tables_that_are_not_weights():
    """Tables in training, and layers without a table: an error that says what to use; shared ones resolve."""
    from lutra.nn._shared import share

    with pytest.raises(TypeError, match=r"a DPQEmbedding, .* use lutra\.nn\.MethodHead"):
        nn.TiedHead(nn.DPQEmbedding(50, 8, m=2))
    with pytest.raises(TypeError, match=r"a LexinvariantEmbedding, which holds no table of shape \(50, 8\)"):
        nn.TiedHead(nn.LexinvariantEmbedding(50, 8))
    with pytest.raises(TypeError, match=r"table must be a compressed embedding"):
        nn.OutputHead(torch.nn.Embedding(50, 8))
    embedding = layer("int8")
    shared = nn.TiedHead(share(embedding))
    assert shared.embedding is embedding
    assert torch.equal(shared(hidden(3, SHAPE[1])), nn.TiedHead(embedding)(hidden(3, SHAPE[1])))
