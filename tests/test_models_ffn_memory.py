"""lutra.models.ffn_memory: the strongest triggers of feed-forward keys, against all coefficients at once."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lutra  # noqa: E402
import lutra.models.ffn_memory as ffn  # noqa: E402
from lutra.reference import triggers as reference  # noqa: E402


class Model(torch.nn.Module):
    """Two feed-forward blocks, a gated one and one of ReLU, and a layer that mixes the tokens."""

    def __init__(self, vocabulary=20, d=6, hidden=(17, 33)):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(vocabulary, d)
        self.gate, self.up = torch.nn.Linear(d, hidden[0]), torch.nn.Linear(d, hidden[0])
        self.first = torch.nn.ModuleDict({"fc2": torch.nn.Linear(hidden[0], d)})
        self.fc1, self.fc2 = torch.nn.Linear(d, hidden[1]), torch.nn.Linear(hidden[1], d)
        self.dropout = torch.nn.Dropout(0.5)
        self.seen: list = []

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).cumsum(1)
        a = torch.nn.functional.silu(self.gate(x)) * self.up(x)
        x = x + self.dropout(self.first["fc2"](a))
        b = torch.relu(self.fc1(x)).round(decimals=1)  # ties
        self.seen.append((a.detach(), b.detach()))
        return self.fc2(b)


def batches(seed=0, count=7):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(int(n), int(m)) for n, m in torch.randint(1, 9, (count, 2), generator=generator)]
    return [torch.randint(0, 20, s, generator=generator) for s in shapes]


def by_hand(model, corpus, layer, top, context):
    """Scores, sequences, positions, next tokens and contexts from all coefficients."""
    scores = np.concatenate([s[layer].flatten(0, 1).numpy() for s in model.seen])
    where = [
        (b, i, j) for b, ids in enumerate(corpus) for i in range(ids.shape[0]) for j in range(ids.shape[1])
    ]
    first = np.cumsum([0] + [len(ids) for ids in corpus])
    values, rows = reference.column_top(scores, top)
    found = []
    for row in rows.reshape(-1):
        if row < 0:
            found.append((-1, -1, -1, [-1] * context))
            continue
        b, i, j = where[row]
        line = corpus[b][i].tolist()
        prefix = line[max(0, j + 1 - context) : j + 1]
        after = line[j + 1] if j + 1 < len(line) else -1
        found.append((first[b] + i, j, after, [-1] * (context - len(prefix)) + prefix))
    parts = [np.array(p).reshape(*rows.shape, *np.shape(p)[1:]) for p in zip(*found)]
    return values, *parts


@pytest.mark.parametrize(("top", "context"), [(1, 1), (3, 4), (25, 3), (300, 9)])
def test_equals_all_coefficients_at_once(top, context):
    model, corpus = Model(), batches()
    found = ffn.top_triggers(model, corpus, top=top, context=context)
    assert list(found) == ["first.fc2", "fc2"] and found.sequences == sum(len(b) for b in corpus)
    for i, layer in enumerate(found.values()):
        want = by_hand(model, corpus, i, top, context)
        for got, right in zip(
            (layer.scores, layer.sequences, layer.positions, layer.next_tokens, layer.contexts), want
        ):
            np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize(
    ("columns", "k", "n", "step"),
    [
        (1, 1, 1, 1),
        (2, 3, 2, 1),
        (15, 2, 97, 5),
        (16, 5, 65, 63),
        (17, 31, 33, 2),
        (33, 3, 2000, 16),
        (3, 2, 0, 1),
    ],
)
def test_column_top(columns, k, n, step):
    torch.manual_seed(0)
    scores = torch.randn(n, columns).mul(4).round() / 4 * torch.tensor([1.0, -1.0])[torch.arange(n) % 2, None]
    top = ffn.ColumnTop(columns, k)
    for part in scores.split(step):
        top.update(part)
    values, rows = reference.column_top(scores.numpy(), k)
    np.testing.assert_array_equal(top.scores.numpy(), values)
    np.testing.assert_array_equal(top.rows.numpy(), rows)
    # non-contiguous, half precision, rows that do not count
    turned = scores.half().t().contiguous().t()
    keep = torch.arange(n) % 3 > 0
    top = ffn.ColumnTop(columns, k)
    for part, kept in zip(turned.split(step), keep.split(step)):
        top.update(part, kept)
    values, rows = reference.column_top(scores[keep].numpy(), k)
    np.testing.assert_array_equal(top.scores.numpy(), values)
    numbers = keep.nonzero()[:, 0].numpy()
    np.testing.assert_array_equal(
        top.rows.numpy(), np.where(rows >= 0, numbers[rows], -1) if len(numbers) else rows
    )


def test_column_top_in_parts(monkeypatch):
    from lutra.models import _column_top

    torch.manual_seed(0)
    scores = torch.randn(3000, 40)
    whole, parts = ffn.ColumnTop(40, 6), ffn.ColumnTop(40, 6)
    whole.update(scores)
    monkeypatch.setattr(_column_top, "_PART", 777)
    parts.update(scores)
    assert torch.equal(whole.scores, parts.scores) and torch.equal(whole.rows, parts.rows)
    inf = torch.tensor([[torch.inf], [-torch.inf], [torch.inf]])
    top = ffn.ColumnTop(1, 2)
    top.update(inf)
    assert top.rows.tolist() == [[0, 2]]
    top.update(inf)
    assert top.rows.tolist() == [[0, 2]]


def test_padding_and_layers():
    model = Model()
    ids = torch.randint(0, 20, (3, 8))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[2, :2] = 0
    found = ffn.top_triggers(model, [{"input_ids": ids, "attention_mask": mask}], top=40, layers="fc2")
    layer = found["fc2"]
    assert found.tokens == 19 and (layer.sequences >= 0).sum(1).tolist() == [19] * 33
    assert not ((layer.sequences == 0) & (layer.positions >= 5)).any()
    at = (layer.sequences == 0) & (layer.positions == 4)
    assert (layer.next_tokens[at] == -1).all()
    begin = (layer.sequences == 2) & (layer.positions == 2)
    assert ((layer.contexts[begin] >= 0).sum(1) == 1).all()
    for given in (model.fc1, [model.fc1]):  # before the activation, which keeps the order
        other = ffn.top_triggers(model, [{"input_ids": ids}], top=3, layers=given, of="output")
        assert list(other) == ["fc1"] and other["fc1"].scores.shape == (33, 3)
    assert len(ffn.top_triggers(model, [[[1, 2], [3, 4]]], top=1)["fc2"].prefixes(0)) == 1


def test_the_model_is_left_as_it_was():
    model = Model().train()
    model.fc1.eval()
    modes = [m.training for m in model.modules()]
    one = ffn.top_triggers(model, batches())
    assert [m.training for m in model.modules()] == modes
    two = ffn.top_triggers(model.eval(), batches())
    assert np.array_equal(one["fc2"].scores, two["fc2"].scores)  # no dropout
    model.train()

    def broken():
        yield from batches()[:2]
        raise RuntimeError("the corpus ends here")

    with pytest.raises(RuntimeError, match="ends here"):
        ffn.top_triggers(model, broken())
    assert model.training and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_bad_input():
    model = Model()
    with torch.no_grad():
        model.fc1.bias[4] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'fc2': the score of row 0 in column 4 is NaN"):
        ffn.top_triggers(model, batches())
    for layers, message in (("nope", "nope"), ([torch.nn.Linear(2, 2)], "no module of model")):
        with pytest.raises(ValueError, match=message):
            ffn.top_triggers(model, batches(), layers=layers)
    with pytest.raises(ValueError, match="under known names"):
        ffn.top_triggers(torch.nn.Linear(2, 2), batches())
    unused = Model()
    unused.linear2 = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'linear2' ran 0 times"):
        ffn.top_triggers(unused, batches())
    for corpus, message in (
        ([], "no batches"), ([torch.zeros(3).long()], "must be token ids"),
        ([torch.zeros(2, 3)], "must be token"),
        ([[[1, 2], [3]]], "differ in length"), ([{"ids": torch.zeros(1)}], "needs 'input_ids'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ffn.top_triggers(Model(), corpus)
    with pytest.raises(TypeError, match="model must be"):
        ffn.top_triggers(len, batches())
    with pytest.raises(ValueError, match="top"):
        ffn.top_triggers(Model(), batches(), top=0)
    with pytest.raises(ValueError, match="of must be"):
        ffn.top_triggers(Model(), batches(), of="middle")


def test_files_dicts_and_tables(tmp_path):
    model = Model()
    found = ffn.top_triggers(model, batches(), top=4, context=5)
    path = tmp_path / "triggers.safetensors"
    found.save(path)
    for mmap in (True, False):
        again = ffn.Triggers.load(path, mmap=mmap)
        assert repr(again) == repr(found) and again.keys() == found.keys()
        assert again.to_dict() == found.to_dict()
    lutra.index.Flat(3).save(tmp_path / "other")
    with pytest.raises(ValueError, match="not Triggers"):
        ffn.Triggers.load(tmp_path / "other")
    strongest = found["fc2"].prefixes(3)[0]
    assert strongest.tokens.dtype == np.int32 and found.to_dict()["fc2"][3][0]["score"] == strongest.score
    assert len(list(found.rows())) == (17 + 33) * 4
    with pytest.raises(ValueError, match="key must be"):
        found["fc2"].prefixes(33)
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=100, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    console.print(found.table("fc2", [3, 0], count=2, promotes=np.arange(66).reshape(33, 2)))
    text = console.export_text()
    assert " ".join(map(str, strongest.tokens)) in text and "6, 7" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values(simd_level, dtype):
    torch.manual_seed(0)
    values, embedding = torch.randn(33, 15), torch.randn(97, 15).to(dtype)
    scores, ids = ffn.value_tokens(values, embedding, 5, probabilities=True)
    want = reference.value_tokens(values.numpy(), embedding.float().numpy(), 5)
    np.testing.assert_array_equal(ids.numpy(), want[0])
    np.testing.assert_allclose(scores.numpy(), want[1], rtol=1e-4)
    logits, same = ffn.value_tokens(values, embedding, 5)
    assert torch.equal(same, ids)
    torch.testing.assert_close(
        logits, (values @ embedding.float().T).gather(1, ids).to(logits), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="one width"):
        ffn.value_tokens(values, embedding[:, :3])


def test_a_value_that_agrees_with_its_key():
    model = Model()
    found = ffn.top_triggers(model, batches(), top=2)
    layer = found["fc2"]
    values = ffn.ffn_values(model.fc2)
    assert values.shape == (33, 6)
    _, ids = ffn.value_tokens(values, model.embed, 3)
    known = layer.next_tokens[:, 0] >= 0
    assert layer.agreement(ids) == pytest.approx((ids[:, 0].numpy() == layer.next_tokens[:, 0])[known].mean())
    made = torch.from_numpy(layer.next_tokens[:, :1])
    assert layer.agreement(made) == 1.0
    with pytest.raises(ValueError, match="33 keys"):
        layer.agreement(ids[:4])


def test_transformers():
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **options
        )
    )
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **options))
    ids = torch.randint(0, 30, (3, 10))
    for model, name in ((llama, "model.layers.1.mlp.down_proj"), (gpt2, "transformer.h.1.mlp.c_proj")):
        assert name in ffn.ffn_layers(model) and len(ffn.ffn_layers(model)) == 2
        seen = []
        module = model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        found = ffn.top_triggers(model, [ids], top=2, layers=name)
        handle.remove()
        values, rows = reference.column_top(seen[0].flatten(0, 1).detach().numpy(), 2)
        np.testing.assert_array_equal(found[name].scores, values)
        np.testing.assert_array_equal(found[name].sequences, rows // 10)
        tokens = ffn.value_tokens(ffn.ffn_values(module), model.get_output_embeddings(), 1)[1]
        assert len(tokens) == len(values) and 0 <= found[name].agreement(tokens) <= 1
        # a value moves the logits by what value_tokens says
        out = ffn.ffn_values(module)[3] @ model.get_output_embeddings().weight.T
        assert tokens[3, 0] == out.argmax()
