"""Training methods of lutra.nn: each against its formula, written down again in NumPy or plain torch."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = pytest.importorskip("lutra.nn")
F = torch.nn.functional

ROWS, DIM = 23, 12
IDS = torch.tensor([[0, 5, 5], [22, 1, 7]])


def weight(seed=0, scale=1.0, dtype=torch.float64):
    return (
        torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        * scale
    )


def made(name, bag=False, **method):
    cls = getattr(nn, name)
    return cls.from_pretrained(weight(), freeze=False, **method)


# ---------------------------------------------------------------- PEP
@pytest.mark.parametrize("granularity, shape", [
    ("global", (1,)), ("dimension", (DIM,)), ("row", (ROWS, 1)), ("both", (ROWS, DIM)),
])  # fmt: skip
def test_pep_is_its_formula(granularity, shape):
    layer = made("PEPEmbedding", granularity=granularity, decay=0.5)
    assert layer.threshold.shape == shape
    with torch.no_grad():
        layer.threshold.copy_(torch.randn(shape))
    w, s = layer.weight.detach().numpy(), layer.threshold.detach().numpy()
    want = np.sign(w) * np.maximum(np.abs(w) - 1 / (1 + np.exp(-s)), 0)
    assert 0.1 < (want == 0).mean() < 0.9
    np.testing.assert_allclose(layer(IDS).detach().numpy(), want[IDS.numpy()], atol=1e-12)
    np.testing.assert_allclose(layer.table().numpy(), want, atol=1e-12)
    assert float(layer.regularization().detach()) == pytest.approx(0.25 * (s**2).sum())
    assert layer.sparsity() == pytest.approx((want == 0).mean())


@pytest.mark.parametrize("granularity", ["global", "dimension", "row", "both"])
def test_pep_gradcheck(granularity):
    layer = made("PEPEmbedding", granularity=granularity, init=-0.5)

    def rows(w, s):
        return torch.func.functional_call(layer, {"weight": w, "threshold": s}, IDS)

    assert torch.autograd.gradcheck(rows, (layer.weight, layer.threshold))


def test_pep_touches_only_the_rows_of_the_call():
    layer = nn.PEPEmbedding(ROWS, DIM, sparse=True)
    layer(IDS).sum().backward()
    touched = set(IDS.reshape(-1).tolist())
    for p in (layer.weight, layer.threshold):
        assert p.grad.is_sparse
        assert set(p.grad.coalesce().indices()[0].tolist()) == touched


def test_pep_trains_again_with_its_zeros():
    layer = made("PEPEmbedding", init=0.0)
    zeros = layer.table() == 0
    first = weight(7)
    layer.keep_zeros(first)
    torch.testing.assert_close(layer.table(), first.masked_fill(zeros, 0))
    layer(torch.arange(ROWS)).sum().backward()
    assert torch.equal(layer.weight.grad != 0, ~zeros) and layer.threshold.grad is None
    fresh = made("PEPEmbedding", init=0.0)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.table(), layer.table())
    with pytest.raises(ValueError, match="weight has shape"):
        layer.keep_zeros(first[1:])


# ---------------------------------------------------------------- DeepLight
def test_deeplight_prunes_at_its_rate():
    layer = made("DeepLightEmbedding", rate=0.8, damping=0.5, interval=5, warmup=20)
    w = layer.weight.detach().clone()
    for t in range(1, 61):
        layer.step()
        n = max(0, t - 20)
        assert layer.current_rate == pytest.approx(0.8 * (1 - 0.5 ** (n / 100)))
        if n and n % 5 == 0:
            k = math.floor(layer.current_rate * w.numel())
            threshold = w.abs().reshape(-1).sort().values[k - 1] if k else -1
            torch.testing.assert_close(layer.weight.detach(), w.masked_fill(w.abs() <= threshold, 0))
    assert 0.15 < layer.sparsity() < 0.2
    layer.prune(0.5)
    assert layer.sparsity() == pytest.approx(math.floor(0.5 * w.numel()) / w.numel())
    layer(IDS).sum().backward()  # what is pruned goes on being trained
    assert (layer.weight.grad[5] == 2).all()


def test_deeplight_samples_large_tables(monkeypatch):
    monkeypatch.setattr("lutra.nn.training.deeplight.SAMPLE", 2000)
    torch.manual_seed(0)
    layer = nn.DeepLightEmbedding(400, 50, rate=0.9, damping=1e-9, interval=1)
    for _ in range(50):
        layer.step()
    assert layer.sparsity() == pytest.approx(layer.current_rate, abs=0.05)
    layer.prune()
    assert layer.sparsity() >= math.floor(layer.current_rate * 20000) / 20000


# ---------------------------------------------------------------- AutoSrh
def test_autosrh_is_its_formula():
    layer = made("AutoSrhEmbedding", groups=3, l1=0.1)
    group = np.arange(ROWS) * 3 // ROWS
    assert layer.group.tolist() == group.tolist()
    with torch.no_grad():
        layer.alpha.copy_(torch.randn(3, DIM))
    want = layer.weight.detach().numpy() * layer.alpha.detach().numpy()[group]
    np.testing.assert_allclose(layer(IDS).detach().numpy(), want[IDS.numpy()], atol=1e-12)
    assert float(layer.regularization().detach()) == pytest.approx(0.1 * float(layer.alpha.abs().sum()))

    def rows(w, a):
        return torch.func.functional_call(layer, {"weight": w, "alpha": a}, IDS)

    assert torch.autograd.gradcheck(rows, (layer.weight, layer.alpha))


def test_autosrh_prunes_the_smallest():
    sizes = [2, 5, 16]
    layer = made("AutoSrhEmbedding", groups=np.repeat([0, 1, 2], sizes))
    with torch.no_grad():
        layer.alpha.copy_(torch.randn(3, DIM))
    layer.prune(0.6)
    a = layer.alpha.detach().abs().reshape(-1).numpy()
    dropped = ~layer.kept.reshape(-1).numpy()
    assert a[dropped].max() < a[~dropped].min()
    share = np.repeat(sizes, DIM) / (ROWS * DIM)
    assert share[dropped].sum() >= 0.6 > share[dropped].sum() - share[dropped][a[dropped].argmax()]
    assert layer.sparsity() == pytest.approx(share[dropped].sum())
    layer(torch.arange(ROWS)).sum().backward()
    assert torch.equal(layer.alpha.grad != 0, layer.kept)


def test_groups_by_frequency():
    counts = np.random.default_rng(0).integers(0, 1000, ROWS)
    layer = nn.AutoSrhEmbedding(ROWS, DIM, groups=4, counts=torch.from_numpy(counts))
    group = layer.group.numpy()
    for g in range(3):
        assert counts[group == g].min() >= counts[group == g + 1].max()


# ---------------------------------------------------------------- OptEmbed
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("granularity", ["field", "row"])
def test_optembed_is_its_formula(norm, granularity):
    field = np.arange(ROWS) % 3
    layer = made("OptEmbedding", fields=field, norm=norm, granularity=granularity, alpha=0.1)
    layer.set_dims([12, 3, 7])
    t = (
        torch.rand(layer.threshold.shape, dtype=torch.float64)
        * 2
        * layer.weight.detach().norm(norm, 1).mean()
    )
    with torch.no_grad():
        layer.threshold.copy_(t)
    w, t = layer.weight.detach().numpy(), t.numpy()
    length = np.abs(w).sum(1) if norm == 1 else np.sqrt((w**2).sum(1))
    mask = length > (t[:, 0] if granularity == "row" else t[field, 0])
    assert 0 < mask.mean() < 1
    want = w * mask[:, None] * (np.arange(DIM) < np.array([12, 3, 7])[field][:, None])
    np.testing.assert_allclose(layer(IDS).detach().numpy(), want[IDS.numpy()])
    assert float(layer.regularization().detach()) == pytest.approx(0.1 * np.exp(-t).sum())


def test_optembed_gradient_is_the_long_tailed_estimator():
    layer = made("OptEmbedding", supernet=False)
    w = layer.weight.detach()
    ids = torch.arange(ROWS)
    t = float(w.norm(1, 1).median())
    with torch.no_grad():
        layer.threshold.fill_(t)
        layer.weight.mul_(1 + 0.1 * torch.randn(ROWS, 1, dtype=torch.float64))
    g = torch.randn(ROWS, DIM, dtype=torch.float64)
    layer(ids).backward(g)
    w = layer.weight.detach()
    x = w.norm(1, 1) - t
    slope = torch.where(x.abs() <= 0.4, 2 - 4 * x.abs(), (x.abs() <= 1).double() * 0.4)
    assert (slope == 0).any() and (slope == 0.4).any() and (slope > 0.4).any()
    per_row = (g * w).sum(1) * slope
    torch.testing.assert_close(layer.threshold.grad, -per_row.sum().reshape(1, 1))
    torch.testing.assert_close(layer.weight.grad, g * (x > 0)[:, None] + per_row[:, None] * w.sign())


def test_optembed_supernet_draws_every_width():
    layer = made("OptEmbedding")
    torch.manual_seed(0)
    out = layer(torch.full((4000,), 5)).detach()
    widths = (out != 0).sum(1)
    assert torch.equal(out != 0, torch.arange(DIM) < widths[:, None])
    counts = torch.bincount(widths, minlength=DIM + 1)
    assert counts[0] == 0 and counts[1:].min() > 230 and counts.max() < 440
    assert torch.equal(layer.eval()(IDS), layer.weight.detach()[IDS])


def test_optembed_search_finds_the_best_widths():
    field = np.arange(ROWS) % 3
    layer = made("OptEmbedding", fields=field)
    target = torch.tensor([9, 2, 5])
    calls = []

    def score():
        calls.append(layer.dims.tolist())
        assert not layer.supernet
        return float((layer.dims - target).abs().sum())

    assert layer.search(score, generations=30, population=30, mutation=0.3, seed=1) == target.tolist()
    assert layer.dims.tolist() == target.tolist() and len(calls) == len({tuple(c) for c in calls})
    sizes = np.bincount(field)
    layer.search(lambda: -float(layer.dims.sum()), generations=10, budget=0.5)
    kept = (layer.dims.numpy() * sizes).sum()
    assert 0.4 * ROWS * DIM < kept <= 0.5 * ROWS * DIM
    before = layer.dims.tolist()
    with pytest.raises(ZeroDivisionError):
        layer.search(lambda: 1 / 0)
    assert layer.dims.tolist() == before


# ---------------------------------------------------------------- AutoDim
def test_autodim_is_its_formula():
    field = np.arange(ROWS) % 2
    layer = made("AutoDimEmbedding", candidates=(3, 12), fields=field)
    for _ in range(2000):
        layer.step()
    assert layer.temperature == pytest.approx(0.9)
    with torch.no_grad():
        layer.alpha.normal_()
    ids = torch.arange(ROWS)
    torch.manual_seed(3)
    out = layer(ids)
    torch.manual_seed(3)
    gumbel = -torch.empty(2, 2, dtype=torch.float64).exponential_().log()
    p = F.softmax((F.log_softmax(layer.alpha, 1) + gumbel) / 0.9, 1)
    want = torch.zeros(ROWS, DIM, dtype=torch.float64)
    for f in range(2):
        here = torch.from_numpy(field == f)
        for n, d in enumerate((3, 12)):
            x = layer.weight[here][:, :d] @ getattr(layer, f"projection_{n}")[f]
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
            want[here] = want[here] + p[f, n] * x
    torch.testing.assert_close(out, want)
    # and eval mode gives the likeliest candidate, normalised by the running statistics
    layer.eval()
    f, n = 1, int(layer.alpha[1].argmax())
    x = layer.weight[1, : (3, 12)[n]] @ getattr(layer, f"projection_{n}")[f]
    x = (x - layer.running_mean[f, n]) / (layer.running_var[f, n] + 1e-5).sqrt()
    torch.testing.assert_close(layer(torch.tensor([1]))[0], x)


def test_autodim_gradcheck_and_choice():
    layer = made("AutoDimEmbedding", candidates=(3, 12), fields=np.arange(ROWS) % 2)
    names = ["weight", "alpha", "projection_0", "projection_1"]

    def rows(*values):
        torch.manual_seed(0)
        return torch.func.functional_call(layer, dict(zip(names, values)), torch.arange(8))

    assert torch.autograd.gradcheck(rows, [getattr(layer, n) for n in names], fast_mode=True)
    with pytest.raises(ValueError, match=r"call choose\(\) first"):
        layer.compressed()
    assert layer.choose([12, 3]) == [12, 3]
    got = layer(IDS[:1, 1:])  # row 5, of field 1
    torch.testing.assert_close(got[0, 0], layer.weight[5, :3] @ layer.projection_0[1])
    again = made("AutoDimEmbedding", candidates=(3, 12), fields=np.arange(ROWS) % 2)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.table(), layer.table()) and not again.alpha.requires_grad


# ---------------------------------------------------------------- VTrans
@pytest.mark.parametrize("granularity", ["dimension", "row"])
def test_vtrans_is_its_formula(granularity):
    layer = made("VTransEmbedding", granularity=granularity, kl=0.2)
    shape = layer.mu.shape
    with torch.no_grad():
        layer.mu.normal_()
        layer.log_var.normal_()
    w, mu, log_var = (p.detach() for p in (layer.weight, layer.mu, layer.log_var))
    torch.manual_seed(1)
    out = layer(torch.arange(ROWS))
    torch.manual_seed(1)
    noise = torch.randn(ROWS, 1 if granularity == "row" else DIM, dtype=torch.float64)
    torch.testing.assert_close(out, w * (mu + (log_var / 2).exp() * noise))
    keep = log_var.exp() / (mu**2 + 1e-8) < 1
    assert 0 < keep.double().mean() < 1
    torch.testing.assert_close(layer.table(), w * mu * keep)
    assert torch.equal(layer.kept(), keep.reshape(-1)) and keep.shape == shape
    assert float(layer.regularization().detach()) == pytest.approx(
        0.1 * float(torch.log(1 + mu**2 / log_var.exp()).sum())
    )

    def rows(w, mu, log_var):
        torch.manual_seed(0)
        return torch.func.functional_call(layer, {"weight": w, "mu": mu, "log_var": log_var}, IDS)

    assert torch.autograd.gradcheck(rows, (layer.weight, layer.mu, layer.log_var))


# ---------------------------------------------------------------- DPQ, MGQE, QLAE
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("m, k", [(1, 5), (3, 7), (12, 4)])
def test_dpq_vq_is_its_formula(m, k, shared):
    layer = made("DPQEmbedding", m=m, k=k, shared=shared, commitment=0.3)
    assert layer.codebook.shape == (1 if shared else m, k, DIM // m)
    q = layer.weight.detach().numpy().reshape(ROWS, m, -1)
    books = np.broadcast_to(layer.codebook.detach().numpy(), (m, k, DIM // m))
    codes = ((q[:, :, None] - books[None]) ** 2).sum(-1).argmin(-1)
    entries = books[np.arange(m), codes]
    assert np.array_equal(layer.codes().numpy(), codes)
    out = layer(IDS)
    flat = IDS.reshape(-1).numpy()
    assert np.array_equal(out.detach().numpy().reshape(6, m, -1), entries[flat])
    loss = ((entries[flat] - q[flat]) ** 2).mean()
    assert float(layer.regularization().detach()) == pytest.approx(1.3 * loss)
    g = torch.randn(
        out.shape, dtype=torch.float64
    )  # straight through to the queries, and nothing to codebooks
    out.backward(g, retain_graph=True)
    want = torch.zeros(ROWS, DIM, dtype=torch.float64).index_add_(0, IDS.reshape(-1), g.reshape(6, DIM))
    torch.testing.assert_close(layer.weight.grad, want)
    assert layer.codebook.grad is None
    layer.regularization().backward()
    dist = 2 * (entries[flat] - q[flat]) / q[flat].size
    own = np.zeros(layer.codebook.shape)
    np.add.at(own, (0 if shared else np.arange(m)[None], codes[flat]), dist)
    np.testing.assert_allclose(layer.codebook.grad.numpy(), own, atol=1e-12)
    commit = torch.zeros(ROWS, m, DIM // m, dtype=torch.float64)
    commit.index_add_(0, IDS.reshape(-1), torch.from_numpy(-0.3 * dist))
    torch.testing.assert_close(layer.weight.grad - want, commit.reshape(ROWS, DIM))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_dpq_softmax_is_its_formula(shared, normalize):
    m, k = 3, 7
    layer = made(
        "DPQEmbedding", m=m, k=k, variant="softmax", shared=shared, normalize=normalize, temperature=0.7
    )
    names = ["weight", "codebook", "keys"]
    start = [getattr(layer, n).detach().clone() for n in names]
    g = torch.randn(2, 3, DIM, dtype=torch.float64)
    out = layer(IDS)
    out.backward(g)

    w, values, keys = (t.clone().requires_grad_() for t in start)
    x = w[IDS.reshape(-1)].reshape(6, m, 4)
    r = torch.einsum("nmd,mkd->nmk", x, keys.expand(m, -1, -1))
    if normalize:
        r = (r - r.mean(0)) / (r.var(0, unbiased=False) + 1e-5).sqrt()
    p = F.softmax(r / 0.7, 2)
    codes = r.argmax(2)
    hard = F.one_hot(codes, k).double()
    plain = torch.einsum("nmk,mkd->nmd", p + (hard - p).detach(), values.expand(m, -1, -1))
    plain.reshape(2, 3, DIM).backward(g)
    torch.testing.assert_close(out, plain.reshape(2, 3, DIM))
    for name, t in zip(names, (w, values, keys)):
        torch.testing.assert_close(getattr(layer, name).grad, t.grad, msg=lambda s, n=name: f"{n}: {s}")
    taken = torch.log(p).gather(2, codes.unsqueeze(2))
    assert float(layer.regularization().detach()) == pytest.approx(float(-0.25 * taken.mean()))

    # eval: the running statistics, folded into the keys
    layer.eval()
    r = torch.einsum("nmd,mkd->nmk", start[0].reshape(ROWS, m, 4), start[2].expand(m, -1, -1))
    if normalize:
        r = (r - layer.running_mean.reshape(m, k)) / (layer.running_var.reshape(m, k) + 1e-5).sqrt()
    assert torch.equal(layer.codes(), r.argmax(2))
    entries = start[1].expand(m, -1, -1)[torch.arange(m), layer.codes()]
    assert torch.equal(layer(torch.arange(ROWS)), entries.reshape(ROWS, DIM))


@pytest.mark.parametrize("shared", [False, True])
def test_mgqe_shows_rare_rows_the_first_entries(shared):
    counts = np.random.default_rng(1).permutation(ROWS)
    layer = made("MGQEEmbedding", m=4, k=9, tail_k=3, head=0.5, counts=counts, shared=shared)
    frequent = counts >= ROWS - round(0.5 * ROWS)
    q = layer.weight.detach().numpy().reshape(ROWS, 4, 3)
    books = np.broadcast_to(layer.codebook.detach().numpy(), (4, 9, 3))
    distance = ((q[:, :, None] - books[None]) ** 2).sum(-1)
    codes = np.where(frequent[:, None], distance.argmin(-1), distance[:, :, :3].argmin(-1))
    assert codes[frequent].max() > 2
    assert np.array_equal(layer.codes().numpy(), codes)
    want = books[np.arange(4), codes].reshape(ROWS, DIM)
    np.testing.assert_array_equal(layer(IDS).detach().numpy(), want[IDS.numpy()])


def test_fit_codebooks_lowers_the_error():
    torch.manual_seed(0)
    layer = nn.DPQEmbedding(500, 8, m=2, k=16)
    errors = []
    for iterations in (0, 1, 20):
        torch.manual_seed(1)
        layer.fit_codebooks(iterations)
        errors.append(float((layer.table() - layer.weight).square().mean().detach()))
    assert errors[0] > errors[1] > errors[2]
    small = nn.DPQEmbedding(3, 8, m=2, k=16)  # fewer rows than entries
    assert (small.table() - small.weight).abs().max() < 1e-6


def test_qlae_is_its_formula():
    layer = made("QLAEEmbedding", levels=5, quantization=0.3, commitment=0.7)
    w, v = layer.weight.detach().numpy(), layer.values.detach().numpy()
    codes = np.abs(w[:, :, None] - v[None]).argmin(-1)
    want = v[np.arange(DIM), codes]
    assert np.array_equal(layer.codes().numpy(), codes)
    out = layer(IDS)
    flat = IDS.reshape(-1).numpy()
    np.testing.assert_array_equal(out.detach().numpy(), want[IDS.numpy()])
    error = want[flat] - w[flat]
    assert float(layer.regularization().detach()) == pytest.approx((error**2).mean())
    out.sum().backward(retain_graph=True)
    assert layer.values.grad is None and layer.weight.grad[5].tolist() == [2.0] * DIM
    layer.regularization().backward()
    own = np.zeros(v.shape)
    np.add.at(own, (np.arange(DIM)[None], codes[flat]), 0.3 * 2 * error / error.size)
    np.testing.assert_allclose(layer.values.grad.numpy(), own, atol=1e-12)
