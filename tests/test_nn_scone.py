"""lutra.nn.SconeEmbedding."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lutra.nn import SconeEmbedding  # noqa: E402
from lutra.reference import fgrams as reference  # noqa: E402
from lutra.vocab import FGrams, count_fgrams  # noqa: E402

rng = np.random.default_rng(0)
TOKENS = torch.from_numpy(rng.integers(0, 8, (3, 40)))
FGRAMS = count_fgrams(rng.integers(0, 8, 3_000), 200, 4)


def expected(layer, tokens, rows):
    ids, _ = reference.longest_match(tokens.numpy(), list(FGRAMS))
    out = layer.tokens.weight.detach()[tokens].clone()
    for at in np.ndindex(ids.shape):
        if ids[at] >= 0:
            row = rows[ids[at]].to(out.dtype)
            out[at] = row if layer.combine == "replace" else out[at] + row
    return out


@pytest.mark.parametrize("combine", ["replace", "add"])
def test_forward_and_gradient(combine):
    layer = SconeEmbedding(8, 5, FGRAMS, combine=combine)
    out = layer(TOKENS)
    assert torch.equal(out, expected(layer, TOKENS, layer.memory.table.detach()))
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    ids, _ = reference.longest_match(TOKENS.numpy(), list(FGRAMS))
    want_table, want_tokens = torch.zeros(len(FGRAMS), 5), torch.zeros(8, 5)
    for at in np.ndindex(ids.shape):
        if ids[at] >= 0:
            want_table[ids[at]] += weight[at]
        if ids[at] < 0 or combine == "add":
            want_tokens[TOKENS[at]] += weight[at]
    grad = layer.memory.table.grad
    assert grad.is_sparse and set(grad.coalesce().indices()[0].tolist()) == set(ids[ids >= 0].tolist())
    torch.testing.assert_close(grad.to_dense(), want_table)
    torch.testing.assert_close(layer.tokens.weight.grad, want_tokens)


class Mean(torch.nn.Module):
    """A model of n-grams: (n-grams, length) to (n-grams, length, dim)."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Embedding(8, 5)

    def forward(self, tokens):
        return self.rows(tokens).cumsum(1) / tokens.shape[1]


def test_model_and_file(tmp_path):
    model = Mean()
    layer = SconeEmbedding(8, 5, FGRAMS, model=model)
    direct = torch.stack([model(torch.tensor([g]))[0, -1] for g in FGRAMS]).detach()
    out = layer(TOKENS)
    torch.testing.assert_close(out.detach(), expected(layer, TOKENS, direct))
    out.sum().backward()
    assert model.rows.weight.grad.abs().sum() > 0
    path = tmp_path / "rows.safetensors"
    layer.offload(path, batch_size=17, dtype=torch.float32)
    assert layer.model is None and layer.memory.mapped
    torch.testing.assert_close(layer(TOKENS), out)
    assert "memory.table" not in layer.state_dict()
    other_path = tmp_path / "half.safetensors"
    SconeEmbedding.build_table(model, FGRAMS, other_path, dtype=torch.float16, progress=False)
    half = SconeEmbedding(8, 5, FGRAMS, path=other_path)
    torch.testing.assert_close(half.memory.table, direct.half())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(TOKENS), layer(TOKENS))
    assert layer.to(torch.bfloat16)(TOKENS).dtype == torch.bfloat16


def test_prefetch(tmp_path):
    path = tmp_path / "rows.safetensors"
    SconeEmbedding.build_table(Mean(), FGRAMS, path)
    for layer in (SconeEmbedding(8, 5, FGRAMS, path=path), SconeEmbedding(8, 5, FGRAMS)):
        want = layer(TOKENS)
        layer.prefetch(TOKENS)
        assert torch.equal(layer(TOKENS), want) and layer._next is None
        layer.prefetch(TOKENS[:1])
        assert torch.equal(layer(TOKENS), want)  # another input: no effect
        layer.prefetch(TOKENS.clone())
        got = layer(TOKENS)
        assert torch.equal(got, want) and got.requires_grad


def test_training_learns_what_tokens_cannot():
    torch.manual_seed(0)
    tokens = torch.randint(0, 8, (64, 30))
    target = ((tokens.roll(1, 1) + tokens)[:, 1:] % 2).float()  # of pairs; no token knows it
    layer = SconeEmbedding(8, 4, count_fgrams(tokens, 64, 2))
    head = torch.nn.Linear(4, 1)
    dense = torch.optim.Adam([*layer.tokens.parameters(), *head.parameters()], 0.05)
    rows = torch.optim.SparseAdam([layer.memory.table], 0.05)
    for _ in range(60):
        dense.zero_grad(), rows.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(layer(tokens))[:, 1:, 0], target)
        loss.backward()
        dense.step(), rows.step()
    assert loss < 0.1


def test_compile():
    layer = SconeEmbedding(8, 5, FGRAMS)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS), layer(TOKENS))


def test_state_dict_and_errors(tmp_path):
    a, b = SconeEmbedding(8, 5, FGRAMS), SconeEmbedding(8, 5, FGRAMS)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(TOKENS), b(TOKENS))
    assert "combine='replace'" in repr(a)
    with pytest.raises(TypeError, match="fgrams must be"):
        SconeEmbedding(8, 5, [(1, 2)])
    with pytest.raises(ValueError, match="combine must be one of"):
        SconeEmbedding(8, 5, FGRAMS, combine="mean")
    path = tmp_path / "rows.safetensors"
    SconeEmbedding.build_table(Mean(), FGRAMS, path)
    with pytest.raises(ValueError, match="the layer was asked for"):
        SconeEmbedding(8, 6, FGRAMS, path=path)
    with pytest.raises(ValueError, match="not finite"):
        SconeEmbedding.build_table(lambda t: torch.full((len(t), 3), 1e9), FGRAMS, path)
    with pytest.raises(ValueError, match="model gave"):
        SconeEmbedding.build_table(lambda t: torch.zeros(1, 1, 1, 1), FGRAMS, path)
    assert SconeEmbedding(8, 5, FGrams([]))(TOKENS).shape == (3, 40, 5)
    assert torch.isfinite(SconeEmbedding(8, 5, FGRAMS, path=path)(TOKENS)).all()  # the old file is whole
