"""Training methods of lutra.nn: what every one has to do."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import numpy as np
import pytest

import lutra

torch = pytest.importorskip("torch")
nn = pytest.importorskip("lutra.nn")

ROWS, DIM, PAD = 61, 16, 3
FIELDS = np.arange(ROWS) % 3

#: Layer, parameters, and what makes its table worth compressing.
METHODS = {
    "DPQ": ("DPQEmbedding", {"m": 4, "k": 16}),
    "DPQ shared, odd k": ("DPQEmbedding", {"m": 4, "k": 11, "shared": True}),
    "DPQ softmax": ("DPQEmbedding", {"m": 4, "k": 16, "variant": "softmax"}),
    "MGQE": ("MGQEEmbedding", {"m": 8, "k": 16, "tail_k": 4, "head": 0.3}),
    "PEP": ("PEPEmbedding", {"init": 1.0}),
    "PEP both": ("PEPEmbedding", {"init": 0.5, "granularity": "both"}),
    "DeepLight": ("DeepLightEmbedding", {"rate": 0.7, "damping": 0.1, "interval": 1}),
    "AutoSrh": ("AutoSrhEmbedding", {"groups": 4}),
    "AutoSrh fields": ("AutoSrhEmbedding", {"groups": FIELDS}),
    "OptEmbed": ("OptEmbedding", {"fields": FIELDS}),
    "AutoDim": ("AutoDimEmbedding", {"candidates": (2, 4, 16)}),
    "AutoDim fields": ("AutoDimEmbedding", {"fields": FIELDS}),
    "VTrans": ("VTransEmbedding", {}),
    "VTrans rows": ("VTransEmbedding", {"granularity": "row"}),
    "QLAE": ("QLAEEmbedding", {"levels": 6}),
}
BECOMES = {
    "DPQ": "pq", "MGQE": "pq", "QLAE": "pq", "PEP": "csr", "DeepLight": "csr", "OptEmbed": "csr",
    "AutoSrh": "mixed", "AutoDim": "mixed", "VTrans": "columns",
}  # fmt: skip


def layer_of(name, bag=False, dtype=None, seed=0, **options):
    torch.manual_seed(seed)
    cls, method = METHODS[name]
    return getattr(nn, cls + "Bag" * bag)(ROWS, DIM, dtype=dtype, **options, **method)


def settle(layer):
    """What ends a training: prune, choose, cut; with parameters that are not their first ones."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name in ("alpha", "mu", "log_var"):
                p.normal_()
            if name == "threshold" and isinstance(layer, (nn.OptEmbedding, nn.OptEmbeddingBag)):
                p.fill_(float(layer.weight.norm(1, 1).float().median()))
    for _ in range(50):
        layer.step()
    if hasattr(layer, "prune"):
        layer.prune(0.6)
    if hasattr(layer, "choose"):
        layer.choose()
    if hasattr(layer, "set_dims"):
        layer.set_dims([16, 3, 8])
    return layer.eval()


def ids_of(*shape, dtype=torch.int64):
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(2)).to(dtype)


# ---------------------------------------------------------------- the layers are torch's
@pytest.mark.parametrize("cls", sorted({m[0] for m in METHODS.values()}))
def test_signatures_are_torchs_and_the_methods(cls):
    for suffix, theirs in (("", torch.nn.Embedding), ("Bag", torch.nn.EmbeddingBag)):
        ours = getattr(nn, cls + suffix)
        assert issubclass(ours, theirs) and cls + suffix in nn.__all__
        names = list(inspect.signature(ours).parameters)
        wanted = list(inspect.signature(theirs).parameters)
        assert names[: len(wanted)] == wanted and len(names) > len(wanted)
        assert "Parameters" in ours.__doc__ and "Becomes:" in ours.__doc__ and "Cost" in ours.__doc__
        assert list(inspect.signature(ours.forward).parameters) == list(
            inspect.signature(theirs.forward).parameters
        )
        assert set(inspect.signature(theirs.from_pretrained).parameters) <= set(
            inspect.signature(ours.from_pretrained).parameters
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_rows_and_gradients_in_every_dtype(name, dtype):
    layer = layer_of(name, dtype=dtype)
    ids = ids_of(5, 9)
    out = layer(ids)
    assert out.shape == (5, 9, DIM) and out.dtype == dtype and out.isfinite().all()
    (out.float().square().sum() + nn.regularization(layer).float()).backward()
    for key, p in layer.named_parameters():
        assert p.dtype == dtype and p.grad is not None and p.grad.isfinite().all(), key
    layer.eval()
    torch.testing.assert_close(layer(ids.int()), layer.table()[ids])
    assert layer(ids[:0]).shape == (0, 9, DIM)
    layer.train()(ids[:0]).sum().backward()


@pytest.mark.parametrize("name", METHODS)
def test_autocast(name):
    layer, ids = layer_of(name), ids_of(30)
    torch.manual_seed(0)
    want = layer(ids).detach()
    layer = layer_of(name)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(ids)
        loss = out.square().sum() + nn.regularization(layer)
    assert out.dtype == torch.float32  # as torch.nn.Embedding's
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    if "softmax" not in name:  # where a rounded product may choose another entry
        torch.testing.assert_close(out.detach(), want, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", METHODS)
def test_bags_are_bags_of_the_rows(name, mode):
    for dtype in (torch.float32, torch.float64):
        layer = layer_of(name, bag=True, mode=mode, padding_idx=PAD, dtype=dtype)
        settle(layer)
        plain = torch.nn.EmbeddingBag(
            ROWS, DIM, mode=mode, padding_idx=PAD, dtype=dtype, _weight=layer.table()
        )
        ids, offsets = ids_of(40), torch.tensor([0, 3, 3, 30])
        ids[[4, 20]] = PAD
        torch.testing.assert_close(layer(ids, offsets), plain(ids, offsets))
        torch.testing.assert_close(layer(ids.view(4, 10)), plain(ids.view(4, 10)))
        if mode == "sum":
            w = torch.rand(40, dtype=dtype, requires_grad=True)
            out = layer(ids, offsets, w)
            torch.testing.assert_close(out, plain(ids, offsets, w))
            out.sum().backward()
            torch.testing.assert_close(w.grad, layer.table()[ids].sum(1).where(ids != PAD, 0))
        layer.include_last_offset = plain.include_last_offset = True
        ends = torch.tensor([0, 3, 3, 40])
        torch.testing.assert_close(layer(ids, ends), plain(ids, ends))


@pytest.mark.parametrize("name", METHODS)
def test_options_of_torch(name):
    ids = ids_of(64)
    ids[5] = PAD
    layer = layer_of(name, padding_idx=PAD)
    layer(ids).square().sum().backward()
    assert layer.weight.grad[PAD].abs().sum() == 0
    alone = layer_of(name, padding_idx=PAD)
    out = alone(torch.full((4,), PAD))
    out.sum().backward() if out.requires_grad else None
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in alone.parameters())

    dense, sparse = layer_of(name), layer_of(name, sparse=True)
    for other in (dense, sparse):
        torch.manual_seed(1)
        other(ids).sum().backward()
    assert sparse.weight.grad.is_sparse
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    for options in ({}, {"sparse": True}):
        scaled = layer_of(name, scale_grad_by_freq=True, **options)
        torch.manual_seed(1)
        scaled(ids).sum().backward()
        counts = torch.bincount(ids, minlength=ROWS).clamp(min=1).unsqueeze(1)
        torch.testing.assert_close(scaled.weight.grad.to_dense(), dense.weight.grad / counts)

    normed = layer_of(name, max_norm=1.0)
    normed(ids)
    assert normed.weight[ids].norm(2, 1).max() <= 1.0 + 1e-5
    frozen = layer_of(name)
    frozen.requires_grad_(False)
    assert not frozen(ids).requires_grad
    plain = torch.nn.Embedding(ROWS, DIM, padding_idx=PAD, max_norm=2.0, sparse=True)
    cls, method = METHODS[name]
    taken = getattr(nn, cls).from_embedding(plain, **method)
    assert torch.equal(taken.weight, plain.weight) and taken.weight is not plain.weight
    assert (taken.padding_idx, taken.max_norm, taken.sparse) == (PAD, 2.0, True)
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Embedding, got Linear"):
        getattr(nn, cls).from_embedding(torch.nn.Linear(2, 2))
    assert not getattr(nn, cls).from_pretrained(plain.weight.detach(), **method).weight.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_copies_and_checkpoints(name):
    layer, ids = layer_of(name), ids_of(20)
    layer(ids)  # a loss that is part of a graph is there
    settle(layer)
    layer.train()(ids)
    layer.eval()
    want = layer(ids)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = layer_of(name, seed=9)
    fresh.load_state_dict(torch.load(file))
    if hasattr(fresh, "supernet"):
        fresh.supernet = False
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh.eval()]
    for other in copies:
        assert torch.equal(other(ids), want)
    half = copy.deepcopy(layer).half()
    assert half(ids).dtype == torch.float16
    torch.testing.assert_close(half(ids).float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.traces
@pytest.mark.parametrize("name", [n for n in METHODS if n != "AutoDim fields"])  # its sizes depend on the ids
def test_compiles(name):
    torch._dynamo.reset()
    ids = ids_of(4, 5)
    for training in (True, False):
        layer = layer_of(name)
        if not training:
            settle(layer)
        compiled = torch.compile(layer.train(training), backend="aot_eager", fullgraph=True)
        other = copy.deepcopy(layer)
        results = []
        for call, owner in ((compiled, layer), (other, other)):
            torch.manual_seed(4)
            out = call(ids)
            loss = out.square().sum() + owner.regularization()
            loss.backward()
            results.append([out, loss, *(p.grad for p in owner.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1]) > 2
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- what it becomes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_compressed_gives_the_same_rows(name, dtype, tmp_path):
    wanted = "csr" if name == "VTrans rows" else BECOMES[name.split(" ")[0]]
    layer = settle(layer_of(name, dtype=dtype))
    table = layer.compressed()
    assert table.format.name == wanted and table.shape == (ROWS, DIM)
    assert table.nbytes == layer.nbytes_compressed() < ROWS * DIM * layer.weight.element_size()
    rows = layer.table()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(table.decode(), rows, atol=tolerance, rtol=tolerance)
    assert layer.sparsity() == pytest.approx(float((rows == 0).float().mean()))
    prefix = table.format.layer
    ids = ids_of(6, 5)
    inference = getattr(nn, f"{prefix}Embedding").from_table(table, dtype=dtype)
    torch.testing.assert_close(inference(ids), layer(ids), atol=tolerance, rtol=tolerance)
    if dtype == torch.float32:
        bags = getattr(nn, f"{prefix}EmbeddingBag").from_table(table, mode="sum")
        torch.testing.assert_close(bags(ids), layer(ids).sum(1), atol=1e-5, rtol=1e-5)
        table.save(tmp_path / "t.safetensors")


@pytest.mark.parametrize("name", ["PEP", "AutoSrh", "VTrans", "VTrans rows", "OptEmbed"])
def test_nothing_left_is_a_table_too(name):
    layer = layer_of(name).eval()
    with torch.no_grad():
        layer.weight.zero_()
    assert layer.sparsity() == 1.0
    assert layer.compressed().decode().abs().sum() == 0
    if name == "VTrans":
        with torch.no_grad():
            layer.mu.zero_()
        assert layer.compressed().format.keep == 1 and layer.compressed().nbytes == layer.nbytes_compressed()
    if name == "AutoSrh":
        layer.kept.zero_()
        assert layer.compressed().nbytes == layer.nbytes_compressed()
        assert layer.compressed().decode().abs().sum() == 0


# ---------------------------------------------------------------- losses and schedules of a model
def test_regularization_sums_over_a_model():
    torch.manual_seed(0)
    a, b, vq = (
        nn.AutoSrhEmbedding(9, 4, groups=2, l1=0.5),
        nn.DPQEmbedding(9, 4, m=2, k=3),
        nn.ResidualVQ(4, 2, 3),
    )
    model = torch.nn.ModuleDict(
        {"a": a, "again": a, "b": torch.nn.Sequential(b), "vq": vq, "x": torch.nn.Linear(2, 2)}
    )
    assert float(nn.regularization(model).detach()) == 4.0
    b(torch.arange(9)), vq(torch.randn(5, 4))
    parts = [b.regularization(), *(layer.regularization() for layer in vq.layers)]
    assert all(p > 0 for p in parts)
    torch.testing.assert_close(nn.regularization(model), 4.0 + sum(parts))
    b.eval()(torch.arange(9))  # no loss of calls that are not training
    assert float(b.regularization().detach()) == 0
    assert float(nn.regularization(torch.nn.Linear(2, 2))) == 0
    deep = nn.DeepLightEmbedding(4, 4)
    nn.step_schedules(torch.nn.Sequential(torch.nn.Linear(2, 2), deep, nn.CCEEmbedding(30, 8)))
    assert int(deep.steps) == 1


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize("name", METHODS)
def test_bad_ids(name):
    layer = layer_of(name)
    for bad in (ROWS, -1):
        with pytest.raises(IndexError, match=rf"ids\[1\] is {bad}; it must be in \[0, {ROWS}\)"):
            layer(torch.tensor([0, bad]))
    with pytest.raises(TypeError, match="float32"):
        layer(torch.tensor([0.0]))
    bag = layer_of(name, bag=True)
    with pytest.raises(IndexError):
        bag(torch.tensor([[0, ROWS]]))
    with pytest.raises(ValueError, match="offsets is missing"):
        bag(torch.tensor([0, 1]))


@pytest.mark.parametrize("cls, method, error", [
    ("PEPEmbedding", {"granularity": "cell"}, "granularity must be one of"),
    ("PEPEmbedding", {"decay": -1}, r"decay is -1\.0; it must lie in"),
    ("DeepLightEmbedding", {"rate": 1.0}, r"rate is 1\.0; it must be below 1"),
    ("DeepLightEmbedding", {"damping": 1.0}, r"damping is 1\.0; it must lie in"),
    ("DeepLightEmbedding", {"interval": 0}, "interval must be >= 1, got 0"),
    ("AutoSrhEmbedding", {"groups": 0}, "groups must be in"),
    ("AutoSrhEmbedding", {"groups": [0, 1]}, "groups must be an integer or an integer array of shape"),
    ("AutoSrhEmbedding", {"groups": np.arange(ROWS) * 2}, "groups must be numbered from 0 without gaps"),
    ("AutoSrhEmbedding", {"counts": [1, 2]}, r"counts has shape \(2,\)"),
    ("AutoSrhEmbedding", {"counts": np.full(ROWS, np.nan)}, "counts must be finite"),
    ("AutoSrhEmbedding", {"groups": FIELDS, "counts": np.ones(ROWS)}, "counts has no use"),
    ("OptEmbedding", {"norm": 3}, "norm must be in"),
    ("OptEmbedding", {"granularity": "dimension"}, "granularity must be one of"),
    ("AutoDimEmbedding", {"candidates": (4, 2)}, "candidates must increase"),
    ("AutoDimEmbedding", {"candidates": (4, 32)}, "candidates must be in"),
    ("VTransEmbedding", {"kl": float("nan")}, "kl is nan"),
    ("DPQEmbedding", {"m": 5}, "m is 5; it must divide embedding_dim, 16"),
    ("DPQEmbedding", {"k": 0}, "k must be in"),
    ("DPQEmbedding", {"variant": "ema"}, "variant must be one of 'vq', 'softmax'"),
    ("MGQEEmbedding", {"tail_k": 300}, "tail_k must be in"),
    ("MGQEEmbedding", {"head": 1.5}, r"head is 1\.5"),
    ("QLAEEmbedding", {"levels": 257}, "levels must be in"),
])  # fmt: skip
def test_bad_parameters(cls, method, error):
    with pytest.raises(ValueError, match=error):
        getattr(nn, cls)(ROWS, DIM, **method)


def test_other_errors():
    with pytest.raises(
        TypeError, match="PEPEmbedding got an unknown argument 'sharpness'; its method has granularity"
    ):
        nn.PEPEmbedding(ROWS, DIM, sharpness=3)
    with pytest.raises(ValueError, match="embeddings must be 2-d"):
        nn.PEPEmbedding.from_pretrained(torch.zeros(3))
    opt = layer_of("OptEmbed")
    for bad, error in (([1, 2], "3 integers"), ([0, 1, 1], r"\[1, 16\]"), ([1.0, 2.0, 3.0], "3 integers")):
        with pytest.raises(ValueError, match=error):
            opt.set_dims(bad)
    with pytest.raises(ValueError, match="one dimension of every field"):
        opt.search(lambda: 0.0, budget=0.01)
    with pytest.raises(ValueError, match="of the candidates"):
        layer_of("AutoDim").choose([5])
    for layer in (layer_of("AutoSrh"), layer_of("DeepLight")):
        with pytest.raises(ValueError, match=r"it must (lie in|be below)"):
            layer.prune(1.2)


# ---------------------------------------------------------------- whole models
def test_finish_puts_inference_layers_into_a_model():
    a, bag = layer_of("AutoSrh", padding_idx=PAD), layer_of("VTrans", bag=True, mode="sum", max_norm=1.5)
    head = nn.MethodHead(a, bias=True)
    model = torch.nn.ModuleDict({"a": a, "again": torch.nn.Sequential(a), "bag": bag, "head": head})
    settle(a), settle(bag)
    ids, hidden = ids_of(4, 5), torch.randn(7, DIM)
    want = [a(ids), bag(ids), model.eval()["head"](hidden)]
    torch.testing.assert_close(want[2], hidden @ a.table().T)
    want[2].sum().backward()
    assert a.alpha.grad is not None
    assert nn.finish(model) is model
    assert isinstance(model["a"], nn.MixedDimEmbedding) and model["again"][0] is model["a"]
    assert isinstance(model["bag"], nn.ColumnPrunedEmbeddingBag) and model["bag"].mode == "sum"
    assert isinstance(model["head"], nn.TiedHead) and model["head"].embedding is model["a"]
    assert model["a"].padding_idx == PAD and not model["a"].training
    for got, w in zip((model["a"](ids), model["bag"](ids), model["head"](hidden)), want):
        torch.testing.assert_close(got, w)
    assert model["head"].bias is head.bias
    alone = settle(layer_of("AutoSrh"))
    assert isinstance(nn.finish(alone), nn.MixedDimEmbedding)


def test_finish_is_all_or_nothing():
    model = torch.nn.Sequential(layer_of("AutoSrh"), torch.nn.Sequential(layer_of("AutoDim")))
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"1\.0: the dimensions are still searched for"):
        nn.finish(model)
    assert list(model.modules()) == before


def test_methods_are_left_alone_by_convert():
    model = torch.nn.Sequential(layer_of("AutoSrh"))
    with pytest.raises(ValueError):
        lutra.compress.convert(model, format="low_rank", rank=2)
    with pytest.raises(TypeError, match="embedding must be a training method"):
        nn.MethodHead(torch.nn.Embedding(3, 4))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); it must be \(61,\)"):
        nn.MethodHead(model[0], torch.nn.Parameter(torch.zeros(3)))


def test_a_language_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=90, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    table = nn.DPQEmbedding.from_embedding(model.get_input_embeddings(), m=4, k=16)
    model.set_input_embeddings(table)
    model.lm_head = nn.MethodHead(table)
    model.tie_weights()
    assert model.lm_head.weight is table.weight
    ids = torch.randint(0, 90, (4, 12))
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(30):
        loss = model(ids, labels=ids).loss + nn.regularization(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    want = model.eval()(ids).logits
    nn.finish(model)
    assert isinstance(model.get_input_embeddings(), nn.PQEmbedding) and isinstance(model.lm_head, nn.TiedHead)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
    model.generate(ids[:, :3], max_new_tokens=2, do_sample=False, pad_token_id=0)


# ---------------------------------------------------------------- 'mixed' with groups that were searched for
def test_mixed_dimensions_of_given_sizes():
    x = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    chosen = lutra.compress.format("mixed", sizes=(10, 0, 20, 30), widths=(8, 4, 3, 1))
    assert "sizes=10/0/20/30,widths=8/4/3/1" in chosen.describe()
    assert lutra.compress.format(chosen.describe()) == chosen == lutra.compress.format(chosen.config())
    one = lutra.compress.format("mixed", sizes=(60,), widths=(2,))
    assert lutra.compress.format(one.describe()) == one
    assert "sizes" not in lutra.compress.format("mixed").describe()
    counts = np.random.default_rng(1).random(60)
    data = chosen.encode(x, counts)
    rows = lutra.compress.Table(chosen, x.shape, data).decode()
    frequent = np.argsort(-counts)[:10]
    np.testing.assert_allclose(rows[frequent], x[frequent], rtol=1e-6)  # all their columns are kept
    grown, new = chosen.resize(data, x.shape, x[:5], 50)
    kept = frequent[frequent < 50]
    assert grown.sizes[0] == len(kept) and sum(grown.sizes) == 55 and grown.widths == chosen.widths
    np.testing.assert_allclose(lutra.compress.Table(grown, (55, 8), new).decode()[kept], x[kept], rtol=1e-5)


@pytest.mark.parametrize("sizes, widths, error", [
    ((60,), None, "must both be tuples"), ((30, 30), (1,), "of one length"),
    ((60,), (9,), "at most the dimension"),
    ((59,), (2,), "the table has 60 rows"), ((60,), (0,), "widths must be >= 1"),
])  # fmt: skip
def test_mixed_dimensions_refuse_other_sizes(sizes, widths, error):
    with pytest.raises(ValueError, match=error):
        lutra.compress.encode(np.zeros((60, 8), np.float32), "mixed", sizes=sizes, widths=widths)
