"""lutra.nn.BackpackEmbedding, SenseDict and LexinvariantEmbedding."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import lutra

torch = pytest.importorskip("torch")
nn = lutra.nn

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def layers():
    return {
        "backpack": (nn.BackpackEmbedding(20, 6, senses=3), (ids(),)),
        "dict": (nn.SenseDict(20, 6, 3), (ids(), torch.randn(2, 5, 6))),
        "ragged": (nn.SenseDict(20, 6, [1, 2, 3, 4] * 5), (ids(), torch.randn(2, 5, 6))),
        "padded": (nn.SenseDict(20, 6, [1, 2, 3, 4] * 5, padding_idx=3), (ids(), torch.randn(2, 5, 6))),
        "lexinvariant": (nn.LexinvariantEmbedding(20, 6, seed=4), (ids(), torch.tensor([3, 9]))),
        "mixed": (
            nn.LexinvariantEmbedding(20, 6, seed=4, learned=[1, 5], random_fraction=0.5),
            (ids(), torch.tensor([3, 9])),
        ),
    }


def ids(shape=(2, 5), seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 20, shape))


# ---------------------------------------------------------------- all
@pytest.mark.parametrize("name", sorted(layers()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_files_and_types(name, dtype, tmp_path):
    torch.manual_seed(0)
    layer, inputs = layers()[name]
    layer = layer.to(dtype)
    want = layer(*inputs)
    assert want.dtype == dtype and want.shape == (2, 5, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(*inputs), want)
    torch.manual_seed(1)
    fresh = layers()[name][0].to(dtype)
    torch.save(layer.state_dict(), tmp_path / "file.pt")
    fresh.load_state_dict(torch.load(tmp_path / "file.pt"))
    assert torch.equal(fresh(*inputs), want)


@pytest.mark.traces
@pytest.mark.parametrize("name", sorted(layers()))
def test_compile(name):
    layer, inputs = layers()[name]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))
    if name != "lexinvariant":
        compiled(*inputs).square().sum().backward()
        trained = layer.learned_rows if name == "mixed" else layer.weight
        got = trained.grad.clone()
        layer.zero_grad()
        layer(*inputs).square().sum().backward()
        torch.testing.assert_close(got, trained.grad)


@pytest.mark.parametrize("name", sorted(layers()))
def test_ids_out_of_range(name):
    layer, (_, *others) = layers()[name]
    for bad in (20, -1):
        wrong = ids()
        wrong[1, 2] = bad
        with pytest.raises(IndexError):
            layer(wrong, *others)


# ---------------------------------------------------------------- Backpack
def test_backpack_is_the_formula():
    torch.manual_seed(0)
    layer, x = nn.BackpackEmbedding(20, 6, senses=3), ids()
    alpha = torch.rand(2, 3, 5, 5).requires_grad_()
    own = torch.rand(2, 5, 3).requires_grad_()
    table = layer.weight
    want = torch.zeros(2, 5, 6)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                for sense in range(3):
                    want[b, i] += alpha[b, sense, i, j] * table[x[b, j], sense]
    torch.testing.assert_close(layer(x, alpha), want)
    each = (own[..., None] * table[x]).sum(-2)
    torch.testing.assert_close(layer(x, own), each)
    torch.testing.assert_close(layer(x), table[x].sum(-2))
    torch.testing.assert_close(layer(x[0], alpha[0]), want[0])
    torch.testing.assert_close(layer.senses(x), table[x])
    for got, reference, weights in ((layer(x, alpha), want, alpha), (layer(x, own), each, own)):
        g = torch.randn(2, 5, 6)
        a = torch.autograd.grad(got, (table, weights), g)
        b = torch.autograd.grad(reference, (table, weights), g, retain_graph=True)
        for left, right in zip(a, b):
            torch.testing.assert_close(left, right)


def test_backpack_refuses():
    layer = nn.BackpackEmbedding(20, 6, senses=3)
    with pytest.raises(ValueError, match=r"it must be \(2, 3, 5, 5\) or \(2, 5, 3\)"):
        layer(ids(), torch.rand(2, 5, 4))
    with pytest.raises(ValueError, match="at least one axis"):
        layer(torch.tensor(3))
    with pytest.raises(TypeError, match="weights has dtype"):
        layer(ids(), torch.ones(2, 5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="senses must be >= 1"):
        nn.BackpackEmbedding(20, 6, 0)
    table = torch.randn(4, 2, 3)
    layer = nn.BackpackEmbedding.from_pretrained(table)
    assert not layer.weight.requires_grad and torch.equal(layer.senses(torch.tensor([3])), table[3:])
    with pytest.raises(ValueError, match="table must be floating point"):
        nn.BackpackEmbedding.from_pretrained(table[0])


# ---------------------------------------------------------------- SenseDict
def test_sense_dict_trains():
    """Tokens with two meanings, told apart by the context: from near them, each sense goes to its meaning."""
    torch.manual_seed(0)
    meanings = torch.nn.functional.normalize(torch.randn(10, 2, 8), dim=-1)
    x, which = torch.arange(10).repeat_interleave(2), torch.arange(2).repeat(10)
    target = meanings[x, which]
    for gradient in ("hard", "straight_through", "softmax"):
        layer = nn.SenseDict(10, 8, 2, gradient=gradient)
        with torch.no_grad():
            layer.weight.copy_(meanings + 0.15 * torch.randn(10, 2, 8))
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        first = None
        for _ in range(60):
            loss = (layer(x, target) - target).square().sum(-1).mean()
            first = loss.item() if first is None else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert first > 0.1 and loss < 0.02, gradient  # one row for both meanings is at 0.5


def test_sense_dict_ragged_and_pretrained():
    table, offsets = torch.randn(9, 4), torch.tensor([0, 2, 3, 9])
    layer = nn.SenseDict.from_pretrained(table, offsets, gradient="hard")
    got = layer.choose(torch.tensor([2, 0]), torch.stack([table[7] * 100, table[1] * 100]))
    assert got.senses.tolist() == [(table[3:] @ table[7]).argmax().item(), (table[:2] @ table[1]).argmax()]
    assert "9 in all" in repr(layer) and not layer.weight.requires_grad
    whole = nn.SenseDict.from_pretrained(table.reshape(3, 3, 4), freeze=False)
    assert whole.weight.requires_grad and whole(torch.tensor([1]), torch.randn(1, 4)).shape == (1, 4)
    with pytest.raises(ValueError, match="offsets must begin with 0 and end with 9"):
        nn.SenseDict.from_pretrained(table, torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match="senses must be one positive integer, or 3"):
        nn.SenseDict(3, 4, [1, 0, 2])
    with pytest.raises(ValueError, match="gradient must be one of"):
        nn.SenseDict(3, 4, gradient="soft")


@pytest.mark.parametrize("gradient", ("hard", "straight_through", "softmax"))
@pytest.mark.parametrize("senses", (3, [1, 2, 3, 4] * 5))
def test_sense_dict_padding(senses, gradient):
    """Of the padding nothing learns; what the other tokens learn is as without it."""
    torch.manual_seed(0)
    layer = nn.SenseDict(20, 6, senses, gradient=gradient, padding_idx=-17)
    assert layer.padding_idx == 3 and "padding_idx=3" in repr(layer)
    rows = layer.weight[3:4] if layer.offsets is None else layer.weight[6:10]
    assert not rows.any() and (layer.weight.flatten(0, -2) != 0).any(-1).sum() == len(
        layer.weight.flatten(0, -2)
    ) - len(rows.flatten(0, -2))
    with torch.no_grad():
        rows.normal_()
    plain = nn.SenseDict.from_pretrained(
        layer.weight.detach().clone(), layer.offsets, freeze=False, gradient=gradient
    )
    again = nn.SenseDict.from_pretrained(layer.weight.detach().clone(), layer.offsets, padding_idx=3)
    assert torch.equal(again.weight, layer.weight)
    x, context = torch.tensor([[3, 5, 7, 5], [1, 3, 3, 5]]), torch.randn(2, 4, 6)
    real = (x != 3).unsqueeze(-1)
    grads = []
    for m, mask in ((layer, torch.ones_like(real)), (plain, real)):
        c = context.clone().requires_grad_()
        out = m(x, c)
        assert torch.equal(out, plain(x, context))
        loss = (out.square() * mask).sum()
        grads.append(torch.autograd.grad(loss, (m.weight, c), materialize_grads=True))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want)
    assert grads[0][0].any()


def test_padding_is_torchs():
    """With one sense a token both layers are torch's Embedding."""
    theirs = torch.nn.Embedding(20, 6, padding_idx=4)
    x, g = torch.tensor([[4, 5, 4], [0, 5, 19]]), torch.randn(2, 3, 6)
    theirs(x).backward(g)
    table = theirs.weight.detach()[:, None].clone()
    for layer, others in (
        (nn.SenseDict.from_pretrained(table, freeze=False, padding_idx=4), (torch.randn(2, 3, 6),)),
        (nn.BackpackEmbedding.from_pretrained(table, False, 4), ()),
        (nn.BackpackEmbedding.from_pretrained(table, False, 4), (torch.eye(3).expand(2, 1, 3, 3),)),
    ):
        torch.testing.assert_close(layer(x, *others), theirs(x))
        layer(x, *others).backward(g)
        torch.testing.assert_close(layer.weight.grad[:, 0], theirs.weight.grad)
    assert not nn.BackpackEmbedding(20, 6, 2, padding_idx=4).weight[4].any()
    for cls in (nn.SenseDict, nn.BackpackEmbedding):
        with pytest.raises(ValueError, match="padding_idx is 20"):
            cls(20, 6, padding_idx=20)


# ---------------------------------------------------------------- lexinvariant
@pytest.mark.parametrize("training", [True, False])
def test_rows_are_fresh_for_every_sequence(training):
    layer = nn.LexinvariantEmbedding(50, 64, padding_idx=0, seed=5).train(training)
    x = torch.tensor([[7, 3, 7, 0], [7, 3, 7, 0]])
    first, second = layer(x), layer(x)
    assert int(layer.next_sequence) == 4
    for out in (first, second):
        assert torch.equal(out[:, 0], out[:, 2]) and not out[:, 3].any()
    rows = torch.stack([first[0, 0], first[1, 0], second[0, 0], second[1, 0]])
    cosine = torch.corrcoef(rows) - torch.eye(4)
    assert cosine.abs().max() < 0.6
    assert torch.equal(layer(x, torch.tensor([0, 3]))[0], first[0])
    assert torch.equal(layer(x, torch.tensor([0, 3]))[1], second[1])
    assert int(layer.next_sequence) == 4
    assert torch.equal(layer(x[0], torch.tensor(1)), first[1])  # one sequence, without a batch
    with layer.hold():
        a, b = layer(x), layer(x[:, :2])
        assert torch.equal(a[:, :2], b)
        with pytest.raises(RuntimeError, match="in force"), layer.hold():
            pass
    assert int(layer.next_sequence) == 6
    assert not torch.equal(layer(x), a)


def test_state_goes_on():
    layer = nn.LexinvariantEmbedding(50, 8, seed=5)
    x = torch.tensor([[1, 2]])
    layer(x)
    other = nn.LexinvariantEmbedding(50, 8, seed=5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x)) and int(other.next_sequence) == 2
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x)) and torch.equal(compiled(x), layer(x))


def test_learned_tokens():
    torch.manual_seed(0)
    mask = torch.zeros(30, dtype=torch.bool)
    mask[[2, 9]] = True
    for learned in ([9, 2], mask):
        layer = nn.LexinvariantEmbedding(30, 16, learned=learned)
        x = torch.tensor([[2, 3, 9], [9, 3, 2]])
        out = layer(x)
        assert torch.equal(out[0, 0], layer.learned_rows[0]) and torch.equal(out[1, 0], layer.learned_rows[1])
        assert not torch.equal(out[0, 1], out[1, 1])
        out.sum().backward()
        assert torch.equal(layer.learned_rows.grad, torch.full((2, 16), 2.0))
    table = torch.randn(30, 16)
    layer = nn.LexinvariantEmbedding.from_pretrained(table, learned=[4])
    assert torch.equal(layer(torch.tensor([[4]]))[0, 0], table[4]) and layer.learned_rows.shape == (1, 16)
    assert nn.LexinvariantEmbedding(30, 16, learned=[])(x).shape == (2, 3, 16)


def test_random_fraction():
    table = torch.full((1000, 4), 50.0)
    layer = nn.LexinvariantEmbedding.from_pretrained(table, learned=[3], random_fraction=0.25, seed=2)
    x = torch.arange(1000).repeat(20, 2)
    out = layer(x)
    share = (out[..., 0] != 50).float().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 20000) ** 0.5
    assert torch.equal(out[:, :1000], out[:, 1000:])  # the choice is the sequence's and the token's
    assert (out[:, 3] == 50).all()
    layer.random_fraction = 0.0
    assert (layer(x) == 50).all()
    layer.random_fraction = 1.0
    out = layer(x)
    assert (out[:, 3] == 50).all() and (out[:, 4:999, 0] != 50).all()
    with pytest.raises(ValueError, match="random_fraction must lie in"):
        layer.random_fraction = 1.5
    with pytest.raises(ValueError, match="every token needs a learned row"):
        nn.LexinvariantEmbedding(10, 4, learned=[1]).random_fraction = 0.5


def test_tied_logits():
    layer = nn.LexinvariantEmbedding(11, 8, padding_idx=0, seed=1)
    keys = layer.draw(3)
    hidden = torch.randn(3, 5, 8)
    want = torch.stack([hidden[b] @ layer(torch.arange(11)[None], keys[b : b + 1])[0].T for b in range(3)])
    torch.testing.assert_close(layer.logits(hidden, keys), want)


def test_lexinvariant_looks_like_an_embedding():
    layer = nn.LexinvariantEmbedding(11, 8, dtype=torch.bfloat16)
    assert isinstance(layer, torch.nn.Embedding) and layer.weight.shape == (11, 0)
    assert sum(p.numel() for p in layer.parameters()) == 0
    assert layer(torch.tensor([[1]])).dtype == torch.bfloat16
    assert "seed=0" in repr(layer)
    with pytest.raises(ValueError, match="padding_idx"):
        nn.LexinvariantEmbedding(11, 8, padding_idx=11)
    with pytest.raises(TypeError, match="seed must be an integer"):
        nn.LexinvariantEmbedding(11, 8, seed=None)
    with pytest.raises(ValueError, match=r"a mask must be \(11,\)"):
        nn.LexinvariantEmbedding(11, 8, learned=torch.ones(3, dtype=torch.bool))
    with pytest.raises(IndexError):
        nn.LexinvariantEmbedding(11, 8, learned=[11])
