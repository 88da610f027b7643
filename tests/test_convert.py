"""convert on plain torch models, the chooser, load_into."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

import lutra  # noqa: E402
from lutra.compress import _choose, _report  # noqa: E402
from lutra.compress._mixed import mixed  # noqa: E402
from lutra.compress.formats import FORMATS, Format  # noqa: E402
from lutra.nn._compressed import Compressed  # noqa: E402


class Tagger(nn.Module):
    """An embedding, a position table, a tied head with a bias, an untied one."""

    def __init__(self, rows=1200, dim=16):
        super().__init__()
        self.words = nn.Embedding(rows, dim, padding_idx=0)
        self.positions = nn.Embedding(2000, dim)
        self.tags = nn.Linear(dim, 5)
        self.out = nn.Linear(dim, rows)
        self.out.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.out(torch.tanh(x))


class Recommender(nn.Module):
    """Bags of several sizes, as in DLRM (Naumov et al. 2019)."""

    def __init__(self, sizes=(3000, 40, 1500, 1200), dim=8):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, dim, mode="sum") for n in sizes)
        self.top = nn.Linear(dim * len(sizes), 1)

    def forward(self, *ids):
        return self.top(torch.cat([t(i) for t, i in zip(self.tables, ids)], 1))


class Static(nn.Module):
    """As sentence-transformers' StaticEmbedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.EmbeddingBag(1000, 12)

    def forward(self, features):
        features["sentence_embedding"] = self.embedding(features["input_ids"], features["offsets"])
        return features


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tagger()


IDS = torch.randint(1, 1200, (3, 7), generator=torch.Generator().manual_seed(1))


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before, out):
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(model(IDS), out)
    assert not any(isinstance(m, Compressed) for m in model.modules())


# ---------------------------------------------------------------- what is converted
def test_default_leaves_positions_and_untied_heads(model):
    assert lutra.compress.convert(model, "low_rank", rank=4) is model
    report = lutra.compress.report(model)
    assert isinstance(model.words, lutra.nn.LowRankEmbedding) and isinstance(model.out, lutra.nn.TiedHead)
    assert type(model.positions) is nn.Embedding and type(model.tags) is nn.Linear
    assert [e.module for e in report.tables] == ["words"]
    assert "positions" in report.skipped
    assert report.after == model.words.nbytes == report.tables[0].after
    table = model.words.dense()
    want = torch.tanh(table[IDS] + model.positions.weight[:7]) @ table.T + model.out.bias
    torch.testing.assert_close(model(IDS), want, rtol=1e-4, atol=1e-4)
    assert "words" in str(report) and "low_rank:rank=4" in str(report)
    report.show()


def test_keeps_bias_hooks_modes_and_what_is_frozen(model):
    bias, calls = model.out.bias, []
    handle = model.words.register_forward_hook(lambda *a: calls.append(1))
    model.words.weight.requires_grad_(False)
    model.words.eval()
    model.words.note = "mine"
    lutra.compress.convert(model, "low_rank", rank=4)
    assert model.out.bias is bias and model.words.note == "mine"
    assert not model.words.training and model.training
    assert not any(p.requires_grad for p in model.words.parameters())
    assert not calls  # converting calls nobody
    model(IDS)
    assert calls == [1]
    handle.remove()
    model(IDS)
    assert calls == [1]
    assert torch.equal(model.words(torch.tensor([0])), torch.zeros(1, 16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(model, dtype):
    model.to(dtype)
    lutra.compress.convert(model, "low_rank", rank=4)
    assert model.words.factor.dtype == model(IDS).dtype == dtype


def test_modules_by_name_and_predicate(model):
    lutra.compress.convert(model, "low_rank", modules="positions", rank=4)
    assert isinstance(model.positions, Compressed) and not isinstance(model.words, Compressed)
    lutra.compress.convert(model, "low_rank", modules=lambda name, m: m.padding_idx == 0, rank=4)
    assert isinstance(model.words, Compressed)


def test_an_untied_head_by_name(model, tmp_path):
    """``modules`` may name a linear layer: it keeps its bias, has gradients, and is loaded again."""
    bias, want = model.tags.bias, model.tags(torch.ones(2, 16))
    lutra.compress.convert(
        model, {"words": "low_rank:rank=4", "tags": "int8"}, modules=["words", "tags"], inplace=True
    )
    head = model.tags
    assert type(head) is lutra.nn.OutputHead and head.bias is bias and head.out_features == 5
    assert [e.module for e in lutra.compress.report(model).tables] == ["words", "tags"]
    torch.testing.assert_close(head(torch.ones(2, 16)), want, rtol=0, atol=0.02)
    x = torch.ones(2, 16, requires_grad=True)
    head(x).sum().backward()
    torch.testing.assert_close(x.grad[0], head.table.dense().sum(0))
    assert torch.equal(bias.grad, torch.full((5,), 2.0))
    assert head.weight is head.table.weight and "tags.weight" not in model.state_dict()
    head.weight = torch.nn.Parameter(torch.zeros(5, 16))  # as tie_weights would: not taken
    assert head.weight.shape == (5, 0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.tags(x), head(x)) and other.tags.table is not head.table
        assert other.tags.embedding is other.tags.table
    fresh = lutra.compress.load_into(Tagger(), model.state_dict())
    assert type(fresh.tags) is lutra.nn.OutputHead and torch.equal(fresh.tags(x), head(x))
    with pytest.raises(ValueError, match=r"modules names 'out', which is no embedding or untied"):
        lutra.compress.convert(Tagger(), "int8", modules="out")
    frozen = Tagger()
    frozen.tags.weight.requires_grad_(False)
    lutra.compress.convert(frozen, "low_rank", modules="tags", rank=2)
    assert not frozen.tags.table.factor.requires_grad and frozen.tags.bias.requires_grad
    assert type(frozen.words) is nn.Embedding


def test_formats_by_name(model):
    lutra.compress.convert(
        model, {"words": "low_rank:rank=4", "positions": "low_rank:rank=2"}, modules=["words", "positions"]
    )
    assert model.words.format.rank == 4 and model.positions.format.rank == 2


def test_report_of_a_model_that_was_not_converted(model):
    with pytest.raises(ValueError, match="not converted"):
        lutra.compress.report(model)


def test_a_copy(model):
    before, out = state(model), model(IDS)
    made = lutra.compress.convert(model, "low_rank", rank=4, inplace=False)
    assert made is not model and isinstance(made.words, Compressed)
    same(model, before, out)


def test_one_module_at_two_places_and_a_second_embedding():
    torch.manual_seed(0)
    inner = nn.Embedding(1100, 8)
    other = nn.Embedding(1100, 8)
    other.weight = inner.weight
    model = nn.ModuleDict({"a": inner, "b": inner, "c": other})
    lutra.compress.convert(model, "low_rank", rank=3)
    ids = torch.arange(9)
    assert torch.equal(model["a"](ids), model["b"](ids)) and torch.equal(model["a"](ids), model["c"](ids))
    assert sum(p.numel() for p in model.parameters()) == 3 * (1100 + 8)
    assert [k for k in model.state_dict() if k.endswith("factor")] == ["a.factor"]
    clone = copy.deepcopy(model)
    clone["a"].factor.data.zero_()
    assert not clone["c"](ids).any() and model["c"](ids).any()
    assert model["c"].num_embeddings == 1100 and isinstance(model["c"], nn.Embedding)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again["c"](ids), model["a"](ids))


class Scaled(nn.Embedding):
    def __init__(self, *args, scale, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.scale


class Reader(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids] + 1


def test_subclasses():
    model = nn.Sequential(Scaled(1000, 8, scale=3.0))
    lutra.compress.convert(model, "low_rank", rank=8)
    assert isinstance(model[0], Scaled) and isinstance(model[0], Compressed)
    ids = torch.arange(5)
    torch.testing.assert_close(model(ids), model[0].dense()[ids] * 3)
    again = pickle.loads(pickle.dumps(model))
    assert type(again[0]) is type(model[0]) is mixed(*type(model[0])._lutra_parts)
    assert torch.equal(again(ids), model(ids))
    model = nn.Sequential(Reader(1000, 8))
    with pytest.raises(TypeError, match="Reader, whose forward"):
        lutra.compress.convert(model, "low_rank", rank=8)
    assert type(model[0]) is Reader


# ---------------------------------------------------------------- all or nothing
def test_errors_leave_the_model_as_it_was(model, monkeypatch):
    before, out = state(model), model(IDS)

    def refuses(error, message, *args, **kwargs):
        with pytest.raises(error, match=message):
            lutra.compress.convert(model, *args, **kwargs)
        same(model, before, out)

    refuses(ValueError, "give a format or a budget")
    refuses(ValueError, "format must be one of", "nonsense")
    refuses(ValueError, "has no parameter", "low_rank", runk=3)
    refuses(ValueError, "rank is 17; it must be at most", "low_rank", rank=17)
    refuses(
        ValueError,
        "no embedding or untied linear layer with a dense table; embeddings are: words",
        "low_rank",
        modules="x",
    )
    refuses(ValueError, "min_rows = 5000", "low_rank", min_rows=5000)
    refuses(ValueError, "modules is empty", "low_rank", modules=[])
    refuses(ValueError, "head must be", "low_rank", head="no")
    refuses(ValueError, "names no format for words", {"positions": "low_rank"})
    refuses(ValueError, "counts has shape", "low_rank", counts=np.ones(3))
    refuses(ValueError, "counts names 'z'", "low_rank", counts={"z": np.ones(3)})
    refuses(IndexError, "calibration holds the id 1200", "low_rank", calibration=torch.tensor([[1200]]))
    refuses(TypeError, "must hold token ids", "low_rank", calibration=torch.ones(2, 2))
    refuses(ValueError, "calibration is empty", "low_rank", calibration=[])
    refuses(ValueError, "smallest that can be met is", budget=3)
    refuses(TypeError, "budget must be", budget=[1])
    refuses(ValueError, r"lie in \(0, 1\]", budget=1.5)
    refuses(ValueError, "must read as", budget="8 percent")
    monkeypatch.setattr(lutra.nn.TiedHead, "__init__", lambda *a, **k: 1 / 0)  # fails in the middle
    refuses(ZeroDivisionError, "zero", "low_rank", rank=4)
    with pytest.raises(TypeError, match="model must be"):
        lutra.compress.convert(3, "low_rank")


def test_nan_names_module_and_row(model):
    model.words.weight.data[17, 3] = float("nan")
    with pytest.raises(ValueError, match="words: row 17 of its table holds NaN"):
        lutra.compress.convert(model, "low_rank")


def test_a_weight_that_others_use(model):
    model.extra = nn.ParameterList([model.words.weight])
    with pytest.raises(ValueError, match=r"also used as extra\.0"):
        lutra.compress.convert(model, "low_rank")


# ---------------------------------------------------------------- the chooser
def test_budgets_as_text_and_numbers():
    for given, want in [
        ("8%", 80), (0.08, 80), ("0.08", 80), (12, 12), ("12", 12), ("1.5kB", 1500), ("2 MiB", 2 << 20),
        ("1%", 10),
    ]:  # fmt: skip
        assert _choose.parse_budget(given, 1000) == want
    for bad in ("", "x", "-3", "0%", 0, 0.0, "8%%"):
        with pytest.raises(ValueError, match="budget"):
            _choose.parse_budget(bad, 1000)
    with pytest.raises(TypeError, match="bool"):
        _choose.parse_budget(True, 10)


@pytest.mark.parametrize("budget", ["30%", "9%"])
def test_every_format_takes_part_and_keeps_the_budget(model, budget):
    report = lutra.compress.report(lutra.compress.convert(model, budget=budget, progress=False))
    assert report.after <= report.budget == _choose.parse_budget(budget, 1200 * 16 * 4)
    assert report.after == model.words.nbytes
    tried = {e.format.split(":")[0] for e in report.tried}
    assert tried <= set(FORMATS) and "low_rank" in tried
    assert not [e for e in report.tried if e.note], str(report)
    errors = [e.error for e in report.tried]
    assert errors == sorted(errors) and report.tried[0].chosen and report.tables[0].error == errors[0]
    rows = model.words.dense()
    assert torch.isfinite(rows).all()


def test_the_smallest_budget_that_is_named_can_be_met(model):
    with pytest.raises(ValueError, match="smallest that can be met is") as error:
        lutra.compress.convert(model, budget=80, formats=["low_rank"])
    least = int(str(error.value).split("met is ")[1].split()[0])
    assert least == 4 * (1200 + 16) + 16 * 4  # rank 1 and the padding row
    with pytest.raises(ValueError, match="smallest"):
        lutra.compress.convert(model, budget=least - 1, formats=["low_rank"])
    made = lutra.compress.convert(model, budget=least, formats=["low_rank"])
    assert lutra.compress.report(made).after == least


def test_calibration_weighs_rows_and_compares_predictions():
    torch.manual_seed(0)
    model = Tagger()
    with torch.no_grad():  # the rows that are used lie in a plane
        model.words.weight[1:100] = torch.randn(99, 2) @ torch.randn(2, 16)
        model.words.weight[100:] *= 3
    ids = torch.randint(1, 100, (8, 16))
    plain = lutra.compress.convert(model, "low_rank", rank=2, inplace=False)
    seen = lutra.compress.convert(model, "low_rank", rank=2, calibration=ids, inplace=False)
    entry = lutra.compress.report(seen).tables[0]
    assert entry.error < 0.7 * lutra.compress.report(plain).tables[0].error
    assert entry.divergence > 0
    lost = (seen.words.dense() - model.words.weight)[1:100].norm()
    assert lost < 0.7 * (plain.words.dense() - model.words.weight)[1:100].norm()
    exact = lutra.compress.convert(model, "low_rank", rank=16, calibration=ids, inplace=False)
    assert abs(lutra.compress.report(exact).tables[0].divergence) < 1e-5
    assert model.training and type(model.words) is nn.Embedding


def test_a_failing_format_is_noted(model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no luck")

    monkeypatch.setattr(FORMATS["low_rank"], "encode", fail)
    with pytest.raises(ValueError, match="no luck"):
        lutra.compress.convert(model, budget="50%", formats=["low_rank"])
    assert type(model.words) is nn.Embedding


def test_recommender_shares_a_budget():
    torch.manual_seed(0)
    model = Recommender()
    with torch.no_grad():  # the first lies in a plane, the third is full
        model.tables[0].weight.copy_(torch.randn(3000, 2) @ torch.randn(2, 8))
    batch = tuple(torch.randint(0, n, (64, 5)) for n in (3000, 40, 1500, 1200))
    lutra.compress.convert(model, budget="50%", calibration=[batch], formats=["low_rank"], progress=False)
    report = lutra.compress.report(model)
    assert report.after <= report.budget
    assert [e.module for e in report.tables] == ["tables.0", "tables.2", "tables.3"]
    assert report.tables[0].error < 1e-4 and report.tables[0].share < 0.3
    assert max(e.share for e in report.tables) > 0.5  # what that saved goes to the others
    assert torch.isfinite(model(*batch)).all()
    model(*batch).sum().backward()
    even = lutra.compress.report(lutra.compress.convert(Recommender(), "low_rank", rank=4))
    assert sum(e.error**2 for e in report.tables) < sum(e.error**2 for e in even.tables)


def test_distribution_is_the_best_there_is():
    """Against all combinations, of random options."""
    import itertools

    rng = np.random.default_rng(0)
    jobs = [_choose.Job(str(i), np.zeros((10, 10), np.float32)) for i in range(3)]
    for _ in range(20):
        options = [
            [_choose.Option(None, int(rng.integers(5, 50)), error=float(rng.random())) for _ in range(6)]
            for _ in jobs
        ]
        budget = sum(min(o.nbytes for o in each) for each in options) + int(rng.integers(0, 60))
        taken = _choose.distribute(jobs, options, budget)
        assert sum(o.nbytes for o in taken) <= budget
        loss = sum(o.error**2 for o in taken)
        best = min(
            sum(o.error**2 for o in each)
            for each in itertools.product(*options)
            if sum(o.nbytes for o in each) <= budget
        )
        assert loss <= best + max(max(o.error**2 for o in each) for each in options)


def test_static_embedding():
    model = Static()
    features = {"input_ids": torch.arange(20), "offsets": torch.tensor([0, 3, 11])}
    lutra.compress.convert(model, "low_rank", rank=12, calibration=[{"features": features}])
    rows = model.embedding.dense()
    want = torch.stack([rows[:3].mean(0), rows[3:11].mean(0), rows[11:20].mean(0)])
    torch.testing.assert_close(model(dict(features))["sentence_embedding"], want)


#: Formats that resize in their own way; DHE trains on, which takes a minute.
SOON = sorted(n for n, f in FORMATS.items() if f.resize is not Format.resize and not f.slow)


@pytest.mark.parametrize("name", SOON)
def test_layers_change_their_length(name):
    from lutra.compress import _layers

    torch.manual_seed(0)
    embedding = nn.Embedding(1040, 32, padding_idx=1035)
    format = FORMATS[name].fit((1040, 32), 40_000 if name != "int8" else 80_000, "float32")
    model = nn.Sequential(embedding)
    lutra.compress.convert(model, format)
    layer, before = model[0], model[0].dense()
    values = before[:30].numpy()
    kept = {k: v.numpy() for k, v in layer.to_table().data.items()}
    found, data = layer.format.resize(kept, (1040, 32), values, 1040)
    _layers.resize(layer, 1070, values)
    assert layer.num_embeddings == len(layer.weight) == 1070 and layer.padding_idx == 1035
    want = lutra.compress.Table(found, (1070, 32), data).decode()
    want[1035] = before[1035]
    np.testing.assert_allclose(layer.dense().numpy(), want, rtol=1e-4, atol=1e-5)
    if name not in ("dhe", "mixed", "tt"):  # which train on, divide groups anew, fit a slice anew
        torch.testing.assert_close(layer.dense()[:1040], before)
    _layers.resize(layer, 1000, values[:0])
    assert layer(torch.arange(1000)).shape == (1000, 32) and layer.padding_idx is None


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("how", ["safetensors", "torch", "dict"])
def test_load_into(model, tmp_path, how):
    lutra.compress.convert(model, "low_rank", rank=4)
    fresh = Tagger()
    source = model.state_dict()
    if how == "safetensors":
        source = tmp_path / "m.safetensors"
        save_file({k: v.contiguous() for k, v in model.state_dict().items() if k != "out.weight"}, source)
    elif how == "torch":
        torch.save(model.state_dict(), tmp_path / "m.pt")
        source = tmp_path / "m.pt"
    assert lutra.compress.load_into(fresh, source) is fresh
    assert isinstance(fresh.out, lutra.nn.TiedHead)
    assert torch.equal(fresh(IDS), model(IDS))
    fresh(IDS).sum().backward()
    assert fresh.words.factor.grad is not None
    assert lutra.compress.load_into(fresh, source) is fresh  # again


def test_load_into_refuses_what_does_not_fit(model, tmp_path):
    lutra.compress.convert(model, "low_rank", rank=4)
    good = state(model)
    fresh = Tagger()
    before, out = state(fresh), fresh(IDS)

    def refuses(source, message, error=ValueError):
        with pytest.raises(error, match=message):
            lutra.compress.load_into(fresh, source)
        same(fresh, before, out)

    refuses({k: v for k, v in good.items() if k != "words.basis"}, r"words\.basis is missing")
    refuses({k: v for k, v in good.items() if k != "tags.bias"}, r"tags\.bias is missing")
    refuses({**good, "more": torch.ones(1)}, "more is left over")
    refuses({**good, "words.factor": good["words.factor"][:, :3]}, r"words\.factor has shape \(1200, 3\)")
    refuses({**good, "words.format_json": torch.tensor([1, 2], dtype=torch.uint8)}, "does not hold a format")
    refuses({**good, "z.format_json": good["words.format_json"]}, "the model has no such embedding")
    refuses(tmp_path / "nothing", "no file", FileNotFoundError)
    (tmp_path / "bad").write_bytes(b"nonsense")
    refuses(tmp_path / "bad", "damaged or no safetensors")
    refuses(5, "source must be", TypeError)
    with pytest.raises(ValueError, match="does not fit"):
        lutra.compress.load_into(Tagger(rows=1300), good)


def test_report_text():
    entry = _report.Entry("a", "pq:m=4", 1000, 80, 0.5, 0.9, None, 0.1)
    text = str(_report.Report(tables=[entry], budget=80))
    assert "8.00%" in text and "1 kB -> 80 B (8.00%), budget 80 B" in text and "KL" not in text
    assert [_report.size_text(n) for n in (5, 1000, 123456, 2 * 10**9)] == ["5 B", "1 kB", "123 kB", "2 GB"]
