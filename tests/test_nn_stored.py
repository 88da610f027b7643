"""Layers of `lutra.nn` whose table is made of less: AdaptEmb, CAFE, CCE; LPT and ALPT train packed."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import lutra
import lutra.optim
from lutra import nn
from lutra.nn.training._stored import hashed

ROWS, DIM, PAD = 61, 16, 3
METHODS = {
    "AdaptEmb": ("AdaptEmbedding", {"own": 8, "shared": 10}),
    "CAFE": ("CAFEEmbedding", {"hot": 8, "shared": 10, "every": 2}),
    "CCE": ("CCEEmbedding", {"k": 6, "chunks": 2, "every": 3}),
    "LPT": ("LPTEmbedding", {}),
    "LPT 4": ("LPTEmbedding", {"bits": 4}),
    "LPT 2": ("LPTEmbedding", {"bits": 2}),
    "ALPT": ("ALPTEmbedding", {}),
    "ALPT 4": ("ALPTEmbedding", {"bits": 4}),
}
PACKED = [name for name in METHODS if "LPT" in name]
FLOATS = [name for name in METHODS if "LPT" not in name]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def made(name, bag=False, dtype=None, seed=0, **options):
    torch.manual_seed(seed)
    cls, method = METHODS[name]
    return getattr(nn, cls + "Bag" * bag)(ROWS, DIM, dtype=dtype, **options, **method)


def optimizer_of(layer, lr=0.05, cls=lutra.optim.RowwiseAdagrad):
    optimizer = cls(layer.parameters(), lr=lr)
    for m in layer.modules():
        if hasattr(m, "_write"):
            optimizer.attach(m)
    return optimizer


def ids_of(*shape, dtype=torch.int64):
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def trained(name, steps=6, **options):
    """A layer that has seen some steps: hot rows, new clusters, other codes."""
    layer = made(name, **options)
    optimizer = optimizer_of(layer)
    for i in range(steps):
        optimizer.zero_grad()
        ids = torch.randint(0, ROWS, (30, 4), generator=torch.Generator().manual_seed(i))
        layer(ids).square().sum().backward()
        optimizer.step()
        layer.step()
    return layer


# ---------------------------------------------------------------- layers
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_rows_in_every_dtype(name, dtype):
    layer = made(name, dtype=dtype)
    optimizer = optimizer_of(layer)
    assert isinstance(layer, torch.nn.Embedding) and layer.weight.shape == (ROWS, 0)
    out = layer(ids_of(5, 7, dtype=torch.int32))
    assert out.shape == (5, 7, DIM) and out.dtype == dtype
    torch.testing.assert_close(out, layer.dense()[ids_of(5, 7)], rtol=0, atol=0)
    before = layer.dense()
    assert 0.5 < before.double().std() < 1.5
    out.square().sum().backward()
    optimizer.step()
    after = layer.dense()
    assert after.isfinite().all() and not torch.equal(before, after)
    assert layer(ids_of(0, 2)).shape == (0, 2, DIM)


@pytest.mark.parametrize("mode", ("sum", "mean", "max"))
@pytest.mark.parametrize("name", METHODS)
def test_bags_are_bags_of_the_rows(name, mode):
    close = {"rtol": 1e-4, "atol": 1e-4}
    for dtype in (torch.float32, torch.float64):
        layer = trained(name, bag=True, mode=mode, padding_idx=PAD, dtype=dtype)
        plain = torch.nn.EmbeddingBag(
            ROWS, DIM, mode=mode, padding_idx=PAD, dtype=dtype, _weight=layer.dense()
        )
        ids, offsets = ids_of(40), torch.tensor([0, 3, 3, 30])
        ids[[4, 20]] = PAD
        torch.testing.assert_close(layer(ids, offsets), plain(ids, offsets), **close)
        torch.testing.assert_close(layer(ids.view(4, 10)), plain(ids.view(4, 10)), **close)
        if mode == "sum":
            w = torch.rand(40, dtype=dtype, requires_grad=True)
            out = layer(ids, offsets, w)
            torch.testing.assert_close(out, plain(ids, offsets, w), **close)
            out.sum().backward()
            torch.testing.assert_close(w.grad, layer.dense()[ids].sum(1).where(ids != PAD, 0))
        layer.include_last_offset = plain.include_last_offset = True
        ends = torch.tensor([0, 3, 3, 40])
        torch.testing.assert_close(layer(ids, ends), plain(ids, ends), **close)


@pytest.mark.parametrize("name", METHODS)
def test_padding_stays(name):
    for bag in (False, True):
        layer = made(name, bag=bag, padding_idx=PAD)
        assert (layer.dense()[PAD] == 0).all()
        optimizer = optimizer_of(layer)
        layer(torch.full((4, 2), PAD)).sum().backward()
        optimizer.step()
        assert (layer.dense()[PAD] == 0).all()
    layer = trained(name, padding_idx=PAD)
    assert (layer.dense()[PAD] == 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_casts(name):
    layer = trained(name)
    before = layer.dense()
    kept = {n: b.clone() for n, b in layer.named_buffers()}
    layer.bfloat16()
    for n, b in layer.named_buffers():
        if n != "padding_row":
            assert torch.equal(b, kept[n]) and b.dtype == kept[n].dtype, n
    assert layer(ids_of(3)).dtype == torch.bfloat16
    torch.testing.assert_close(layer.dense().float(), before, rtol=1e-2, atol=1e-2)
    optimizer = optimizer_of(layer) if name in FLOATS else layer._attachment.optimizer
    layer(ids_of(30)).square().sum().backward()
    optimizer.step()
    layer.step()
    assert layer.dense().isfinite().all()


@pytest.mark.traces
@pytest.mark.parametrize("name", METHODS)
def test_compiled(name):
    torch._dynamo.reset()
    layer = trained(name).eval().requires_grad_(False)
    compiled = torch.compile(lambda i: layer(i) * 2, backend="aot_eager")
    torch.testing.assert_close(compiled(ids_of(5, 3)), layer(ids_of(5, 3)) * 2)


@pytest.mark.parametrize("name", METHODS)
def test_nbytes_counts_everything(name):
    layer = made(name)
    assert layer.nbytes == sum(t.nbytes for t in layer.state_dict().values())
    if name == "LPT":
        assert layer.nbytes == ROWS * (DIM + 8) + 8  # and the seed
    if name == "ALPT 4":
        assert layer.nbytes == ROWS * (DIM // 2 + 4 + 4) + 8
    if name == "AdaptEmb":
        assert layer.nbytes == 18 * DIM * 4 + ROWS * 4 + 8
    if name == "CAFE":
        assert layer.nbytes == 18 * DIM * 4 + 32 * 16 + 16
    if name == "CCE":
        assert layer.nbytes == 2 * 12 * DIM // 2 * 4 + ROWS * 2 * 2 + 24


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_and_copies(name):
    layer = trained(name)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = made(name, seed=9)
    assert not torch.equal(other.dense(), layer.dense())
    other.load_state_dict(torch.load(file, weights_only=True))
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again.dense(), layer.dense())
    assert torch.equal(trained(name).dense(), layer.dense())  # deterministic
    assert torch.equal(layer.eval()(ids_of(9)), layer.dense()[ids_of(9)])


@pytest.mark.parametrize("name", METHODS)
def test_from_pretrained(name):
    dense = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))
    cls, method = METHODS[name]
    layer = getattr(nn, cls).from_pretrained(dense, padding_idx=PAD, **method)
    assert not any(p.requires_grad for p in layer.parameters())
    error = (layer.dense() - dense).square().mean() / dense.square().mean()
    limit = {"LPT": 1e-4, "ALPT": 1e-4, "LPT 4": 0.02, "ALPT 4": 0.03, "LPT 2": 0.4}.get(name, 1.01)
    assert error < limit
    torch.testing.assert_close(
        layer.dense()[PAD], dense[PAD], rtol=0, atol=0.01 if name in ("LPT", "ALPT") else 2
    )
    bag = getattr(nn, cls + "Bag").from_pretrained(dense, freeze=False, mode="sum", **method)
    assert any(p.requires_grad for p in bag.parameters()) and bag.mode == "sum"


@pytest.mark.parametrize("name", METHODS)
def test_errors(name):
    cls, method = METHODS[name]
    layer = getattr(nn, cls)(ROWS, DIM, **method)
    optimizer_of(layer)
    with pytest.raises(IndexError, match=r"ids\[1\] is 61"):
        layer(torch.tensor([0, ROWS]))
    with pytest.raises(TypeError, match="dtype float32"):
        layer(torch.ones(2))
    with pytest.raises(TypeError, match="unknown argument 'wrong'"):
        getattr(nn, cls)(ROWS, DIM, wrong=1)
    for wrong in (
        {"bits": 5},
        {"own": -1},
        {"hot": 0},
        {"k": 0},
        {"chunks": 3},
        {"decay": 1.5},
        {"counts": [1]},
    ):
        (key,) = wrong
        if key in nn.__dict__[cls].__signature__.parameters:
            with pytest.raises(ValueError, match=key):
                getattr(nn, cls)(ROWS, DIM, **wrong)


@pytest.mark.parametrize("name", FLOATS)
def test_sparse_gradients_and_max_norm(name):
    ids = ids_of(20)
    if name != "CCE":
        dense, sparse = made(name), made(name, sparse=True)
        for m in (dense, sparse):
            m(ids).square().sum().backward()
        assert sparse.table.grad.is_sparse
        torch.testing.assert_close(sparse.table.grad.to_dense(), dense.table.grad)
    assert (made(name, max_norm=1.0)(ids).norm(dim=1) <= 1.001).all()


def gradients(name, bag, **options):
    """Gradients of the rows in one call, one for each id: what SGD of rate 1 does to a table, or the table's
    gradient.
    """
    layer = made(name, bag, **options)
    if name in PACKED:
        seen = {}
        layer._write = lambda ids, rows, grads, batch, seed: seen.update(zip(ids.tolist(), grads))
        lutra.optim.SGD(layer.parameters(), lr=1.0).attach(layer)
    ids = ids_of(8, 5) % 9
    ids[3, :2] = PAD
    calls = [(ids,)]
    if bag:
        calls = [(ids,), (ids.reshape(-1), torch.tensor([0, 4, 4, 13]))]
        if layer.mode == "sum":
            calls.append((ids, None, torch.rand(8, 5, generator=torch.Generator().manual_seed(1))))
    out = []
    for call in calls:
        layer.zero_grad()
        y = layer(*call)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
        if name in PACKED:
            seen.clear()
            layer._attachment.optimizer.step()
            out.append(torch.stack([seen.get(i, torch.zeros(DIM)) for i in range(9)]))
        else:
            out.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    return layer, calls, out


@pytest.mark.parametrize("mode", (None, "sum", "mean"))
@pytest.mark.parametrize("name", METHODS)
def test_scale_grad_by_freq(name, mode):
    """Packed rows get torch's gradients. The others, whose ids share what they are made of, get those of a
    call of which each id's gradient was divided by hand.
    """
    options = {"padding_idx": PAD} | ({} if mode is None else {"mode": mode})
    layer, calls, got = gradients(name, mode is not None, scale_grad_by_freq=True, **options)
    cls = torch.nn.Embedding if mode is None else torch.nn.EmbeddingBag
    for call, mine in zip(calls, got):
        # torch's EmbeddingBag divides by the wrong counts (test_nn_embedding_bag.py): its gradient unscaled
        scaled = {"scale_grad_by_freq": True} if mode is None else {}
        theirs = cls.from_pretrained(layer.dense(), freeze=False, **scaled, **options)
        y = theirs(*call)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
        want = theirs.weight.grad[:9]
        if mode is not None:
            want = want / torch.bincount(call[0].reshape(-1), minlength=9).clamp(min=1).unsqueeze(1)
        if name in PACKED:
            torch.testing.assert_close(mine, want)
            continue
        plain = made(name, padding_idx=PAD)
        plain.load_state_dict(layer.state_dict())
        plain(torch.arange(9)).backward(want)
        for a, b in zip(mine, [p.grad for p in plain.parameters() if p.grad is not None], strict=True):
            torch.testing.assert_close(a, b)
    if mode is not None:
        layer.mode = "max"
        with pytest.raises(ValueError, match="scale_grad_by_freq"):
            layer(*calls[0])


@pytest.mark.parametrize("bag", (False, True))
@pytest.mark.parametrize("name", PACKED)
def test_packed_max_norm(name, bag):
    """As torch: the rows that a call reads are shortened where they are stored, no others."""
    layer = made(name, bag, max_norm=3.0, norm_type=2.5)
    before, ids = layer.dense(), torch.tensor([[5, 7, 5, 9]])
    theirs = torch.nn.Embedding.from_pretrained(before.clone(), max_norm=3.0, norm_type=2.5)
    want = theirs(ids) if not bag else theirs(ids).mean(1)
    close = {"rtol": 1e-5, "atol": 1e-5} if layer.bits == 8 else {"rtol": 2e-3, "atol": 5e-3}
    optimizer_of(layer)
    for _ in range(2):
        torch.testing.assert_close(layer(ids), want, **close)
        torch.testing.assert_close(layer.dense(), theirs.weight, **close)
    others = [i for i in range(ROWS) if i not in (5, 7, 9)]
    assert torch.equal(layer.dense()[others], before[others])
    stored = layer.packed.clone()
    layer(ids)
    assert torch.equal(layer.packed, stored)
    layer(torch.zeros(0, 2, dtype=torch.int64))


def test_hash_is_even():
    counts = torch.bincount(hashed(torch.arange(100_000), 7, 64), minlength=64)
    assert counts.min() > 1300 and counts.max() < 1800
    assert not torch.equal(hashed(torch.arange(100), 1, 64), hashed(torch.arange(100), 2, 64))


# ---------------------------------------------------------------- the methods
def test_adaptemb_gives_the_frequent_their_own():
    counts = np.arange(ROWS)
    layer = nn.AdaptEmbedding(ROWS, DIM, counts=counts, own=8, shared=10)
    top = np.argsort(-counts)[:8]
    assert layer.remap[top].tolist() == list(range(8))
    assert (np.delete(layer.remap.numpy(), top) >= 8).all()
    dense = torch.randn(ROWS, DIM)
    layer = nn.AdaptEmbedding.from_pretrained(dense, counts=counts, own=8, shared=10)
    torch.testing.assert_close(layer.dense()[top], dense[top])
    group = (layer.remap == 12).nonzero().reshape(-1)
    torch.testing.assert_close(layer.dense()[group[0]], dense[group].mean(0))


def test_cafe_sketch():
    layer = nn.CAFEEmbedding(10_000, 8, hot=16, shared=20, slots=64, importance="frequency", seed=0)
    rng = np.random.default_rng(0)
    heavy = torch.from_numpy(rng.choice(10_000, 12, replace=False))
    for _ in range(30):
        light = torch.from_numpy(rng.integers(0, 10_000, 100))
        layer.observe(torch.cat([heavy.repeat(20), light]))
    before = layer(heavy).detach()
    assert layer.migrate() > 0
    torch.testing.assert_close(layer(heavy).detach(), before)  # hot rows begin as their shared ones
    hot = layer.hot_ids()
    assert len(hot) == 16 and torch.isin(heavy, hot).all()
    with torch.no_grad():
        layer.table[:16] = 7  # own rows and shared rows are different ones now
    assert (layer(heavy) == 7).all()
    cold = torch.tensor([i for i in range(200) if i not in set(hot.tolist())])
    assert (layer(cold) != 7).any(1).all()
    news = torch.arange(100, 116)  # others become heavy: the old ones fall out, with their rows
    for _ in range(40):
        layer.observe(news.repeat(200))
        layer.migrate()
    assert layer.hot_ids().tolist() == sorted(layer.keys[layer.rows >= 0].tolist())
    assert torch.isin(layer.hot_ids(), news).float().mean() > 0.9  # but those that share a bucket of 4
    rows = layer.rows[layer.rows >= 0]
    assert len(rows.unique()) == len(rows) <= 16


def test_step_schedules_reach_every_layer():
    model = torch.nn.ModuleList([made("CAFE"), made("CCE"), made("LPT")])
    for _ in range(3):
        nn.step_schedules(model)
    assert int(model[0].steps) == 3 and int(model[1].clusterings) == 1


def test_cafe_scores_are_gradient_norms():
    layer = nn.CAFEEmbeddingBag(50, 4, mode="sum", hot=8, shared=5, seed=0)
    weights = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    out = layer(torch.tensor([[1, 2], [2, 7]]), None, weights)
    out.backward(torch.tensor([[3.0, 4, 0, 0], [0, 0, 1, 0]]))
    scores = dict(zip(layer.keys[layer.keys >= 0].tolist(), layer.scores[layer.keys >= 0].tolist()))
    assert scores == pytest.approx({1: 5.0, 2: 13.0, 7: 0.5})
    layer.eval()(torch.tensor([[9]])).sum().backward()
    assert 9 not in layer.keys


def test_cce_clusters_what_belongs_together():
    layer = nn.CCEEmbedding(60, 8, k=3, chunks=2, seed=0)
    groups = torch.arange(60) % 3
    dense = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))[groups] * 3
    with torch.no_grad():
        layer._fill(dense)
    torch.testing.assert_close(layer.dense(), dense, rtol=1e-4, atol=1e-4)
    before = layer.dense()
    layer.cluster()
    torch.testing.assert_close(layer.dense(), before, rtol=1e-4, atol=1e-4)
    assert int(layer.clusterings) == 2


@pytest.mark.parametrize("name", PACKED)
def test_packed_layers_train_only_attached(name):
    layer = made(name)
    with pytest.raises(RuntimeError, match="trains only attached"):
        layer(ids_of(3))
    with torch.no_grad():
        layer(ids_of(3))
    assert not layer.eval()(ids_of(3)).requires_grad
    layer.train().requires_grad_(False)
    layer(ids_of(3))
    layer.requires_grad_(True)
    lutra.optim.SGD(layer.parameters(), lr=0.1).attach(layer)
    assert layer(ids_of(3)).requires_grad
    with pytest.raises(RuntimeError, match="trains only attached"):
        copy.deepcopy(layer)(ids_of(3))
    cls, method = METHODS[name]
    with pytest.raises(ValueError, match="sparse"):
        getattr(nn, cls)(ROWS, DIM, sparse=True, **method)


@pytest.mark.parametrize("when", ("step", "backward"))
@pytest.mark.parametrize("name", ["LPT", "ALPT"])
@pytest.mark.parametrize("optimizer", ("SGD", "RowwiseAdagrad", "Adagrad", "Adam"))
def test_packed_layers_follow_dense_ones(name, optimizer, when):
    """Eight bits and a few steps: within some steps of a code of what a dense table does."""
    layer = made(name, bag=True, mode="sum")
    dense = nn.EmbeddingBag.from_pretrained(layer.dense(), freeze=False, mode="sum")
    for m in (layer, dense):
        rule = getattr(lutra.optim, optimizer)(m.parameters(), lr=0.02)
        rule.attach(m, when=when)
        for i in range(5):
            rule.zero_grad()
            ids = torch.randint(0, ROWS, (12, 4), generator=torch.Generator().manual_seed(i))
            m(ids).square().sum().backward()
            rule.step()
    moved = (dense.weight - layer.dense()).abs()
    assert moved.max() < 0.2 and moved.mean() < 0.03


@pytest.mark.parametrize("name", ["LPT", "ALPT"])
def test_packed_layers_accumulate(name):
    """Two calls of different layouts and two backward passes in a step."""
    layer = made(name, bag=True, mode="sum")
    dense = nn.EmbeddingBag.from_pretrained(layer.dense(), freeze=False, mode="sum")
    for m in (layer, dense):
        rule = lutra.optim.Adam(m.parameters(), lr=0.02)
        rule.attach(m)
        for _ in range(3):
            (m(ids_of(6, 4)).square().sum() + m(ids_of(9), torch.tensor([0, 4])).sum()).backward()
            m(ids_of(3, 4)).sum().backward()
            rule.step()
    moved = (dense.weight - layer.dense()).abs()
    assert moved.max() < 0.1 and moved.mean() < 0.02


def test_packed_layers_refuse_nan():
    layer = made("LPT")
    optimizer = optimizer_of(layer)
    before = layer.dense()
    layer(ids_of(3)).backward(torch.full((3, DIM), float("nan")))
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        optimizer.step()
    assert torch.equal(layer.dense(), before)
    with pytest.raises(TypeError, match="LPTEmbedding"):  # a layer that is not one of ours in its forward
        other = nn.DPQEmbedding(ROWS, DIM, m=4, k=8)
        lutra.optim.SGD(other.parameters(), lr=0.1).attach(other)


def test_stochastic_rounding_keeps_the_mean():
    """Updates of 1 / 20 of a code: rounding to nearest would lose every one of them."""
    rows = torch.linspace(-1, 1, 64).repeat(200, 1)
    for cls in (nn.LPTEmbedding, nn.ALPTEmbedding):
        options = {} if cls is nn.LPTEmbedding else {"step_lr": 0.0}
        layer = cls.from_pretrained(rows, freeze=False, seed=1, **options)
        optimizer = lutra.optim.SGD(layer.parameters(), lr=2 / 255 / 20)
        optimizer.attach(layer)
        middle = layer.dense()[:, 20:40].clone()
        grad = torch.zeros(200, 64)
        grad[:, 20:40] = 1
        for _ in range(40):
            layer(torch.arange(200)).backward(grad)
            optimizer.step()
        moved = (middle - layer.dense()[:, 20:40]).mean()
        assert float(moved) == pytest.approx(40 * 2 / 255 / 20, rel=0.06)


def test_alpt_steps_go_down_their_gradient():
    layer = nn.ALPTEmbedding.from_pretrained(torch.randn(ROWS, DIM), freeze=False, seed=1, step_lr=0.5)
    optimizer = lutra.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.attach(layer)
    ids, grad = torch.tensor([[4], [9]]), torch.randn(2, 1, DIM)
    every = torch.arange(ROWS)
    steps, rows = layer.row_steps(every).clone(), layer.dense()
    layer(ids).backward(grad)
    optimizer.step()
    w = rows[[4, 9]] - 0.1 * grad[:, 0]
    code = w / steps[[4, 9], None]
    slope = torch.where(code <= -128, -128.0, torch.where(code >= 127, 127.0, code.round() - code))
    expected = steps.clone()
    change = 0.5 * (grad[:, 0] * slope).sum(1) / (2 * DIM * 127) ** 0.5
    expected[[4, 9]] = torch.maximum(expected[[4, 9]] - change, expected[[4, 9]] / 2)
    torch.testing.assert_close(layer.row_steps(every), expected)
    assert (
        (layer.dense()[[4, 9]] - w).abs()
        <= expected[[4, 9], None] * 1.001 + (w.abs() - 127 * expected[[4, 9], None]).clamp(min=0)
    ).all()


@pytest.mark.parametrize("name", PACKED)
def test_packed_layers_become_formats(name):
    if "int8" not in lutra.compress.FORMATS:
        pytest.skip("the packed formats are not there")
    layer = trained(name)
    table = layer.compressed()
    assert table.format.name == layer.kind
    got = lutra.gather.bag(table, torch.arange(ROWS).view(-1, 1))
    torch.testing.assert_close(got, layer.dense())


# ---------------------------------------------------------------- training
def losses(layer, optimizer_cls, steps=250, lr=0.05):
    """A linear model of bags whose ids are drawn from a Zipf distribution."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(400, generator=generator)
    chance = 1 / torch.arange(1, 401).float()
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 1)
    model = torch.nn.ModuleList([layer, head])
    optimizer = optimizer_cls(model.parameters(), lr=lr)
    if hasattr(layer, "_write"):
        optimizer.attach(layer)
    out = []
    for _ in range(steps):
        ids = torch.multinomial(chance, 32 * 6, True, generator=generator).view(32, 6)
        wanted = target[ids].sum(1)
        loss = (head(layer(ids))[:, 0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(layer, "step"):
            layer.step()
        out.append(float(loss.detach()))
    return np.mean(out[:10]), np.mean(out[-40:])


@pytest.mark.slow
def test_training_reaches_what_it_should():
    torch.manual_seed(0)
    start, dense = losses(torch.nn.EmbeddingBag(400, 8, mode="sum"), lutra.optim.Adam)
    assert dense < start / 20

    def final(cls, **method):
        torch.manual_seed(0)
        layer = getattr(nn, cls)(400, 8, mode="sum", seed=0, **method)
        return losses(layer, lutra.optim.Adam)[1]

    for bits in (8, 4):
        assert final("LPTEmbeddingBag", bits=bits) < start / 20, bits
    fixed, learned = (final("ALPTEmbeddingBag", step_lr=lr) for lr in (0, 0.01))
    assert learned < fixed < start / 20
    assert final("ALPTEmbeddingBag", bits=4) < start / 20
    hashing = final("AdaptEmbeddingBag", own=0, shared=80)
    adapt = final("AdaptEmbeddingBag", own=60, shared=20)
    cafe = final("CAFEEmbeddingBag", hot=60, shared=20, every=20)
    assert max(adapt, cafe) < hashing * 0.8  # the same number of rows, and CAFE had to find the frequent ones
    plain = final("CCEEmbeddingBag", k=10, chunks=4)
    clustered = final("CCEEmbeddingBag", k=10, chunks=4, every=50, until=200)
    assert clustered < plain * 0.9 and plain < start
