"""Small trainings with each method: the loss comes near the dense table's, in few bytes."""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow
nn = pytest.importorskip("lutra.nn")
F = torch.nn.functional

ROWS, DIM, CLASSES = 400, 16, 6


@functools.cache
def task():
    """Hidden scores of each id, one of ten kinds; a pair's label is where their sum is largest."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((10, CLASSES))[rng.integers(0, 10, ROWS)])


def batch(generator, n=512):
    ids = torch.randint(0, ROWS, (n, 2), generator=generator)
    return ids, task()[ids].sum(1).argmax(1)


class Model(torch.nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.rest = torch.nn.Sequential(
            torch.nn.Linear(2 * DIM, 64), torch.nn.ReLU(), torch.nn.Linear(64, CLASSES)
        )

    def forward(self, ids):
        return self.rest(self.embedding(ids).flatten(1))


def train(model, steps, seed=1, rates=None):
    """Adam; ``rates``: learning rates of parameters by the ends of their names, .01 of the others."""
    rates = rates or {}
    groups = [
        {"params": [p], "lr": next((r for end, r in rates.items() if name.endswith(end)), 0.01)}
        for name, p in model.named_parameters() if p.requires_grad
    ]  # fmt: skip
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        ids, labels = batch(generator)
        loss = F.cross_entropy(model(ids), labels) + nn.regularization(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nn.step_schedules(model)


def held_out(model):
    generator = torch.Generator().manual_seed(99)
    model.eval()
    with torch.no_grad():
        ids, labels = batch(generator, 8000)
        return float(F.cross_entropy(model(ids), labels))


def fresh(embedding):
    torch.manual_seed(0)
    return Model(embedding)


@functools.cache
def dense_loss():
    torch.manual_seed(0)
    model = fresh(torch.nn.Embedding(ROWS, DIM))
    train(model, 300)
    return held_out(model)


#: Tables begin at N(0, 1), far from what 0.01 a step changes soon.
FAST = {"embedding.weight": 0.03}


def run(name, steps=500, rates=None, **method):
    model = fresh(getattr(nn, name)(ROWS, DIM, **method))
    train(model, steps, rates=FAST if rates is None else rates)
    return model


def run_pep():
    first = 0.4 * torch.randn(ROWS, DIM)
    layer = nn.PEPEmbedding.from_pretrained(first.clone(), freeze=False, init=-3.0, decay=1e-3)
    model = fresh(layer)
    train(model, 300, rates={"threshold": 0.03})
    zeros = layer.table() == 0
    layer.keep_zeros(first)  # and once more with the zeros found, as the paper does
    train(model, 300, seed=2, rates=FAST)
    assert torch.equal(layer.table() == 0, zeros)
    return model


def run_deeplight():
    model = run("DeepLightEmbedding", 600, rate=0.8, damping=0.2)
    model.embedding.prune()
    return model


def run_autosrh():
    model = run("AutoSrhEmbedding", 200, rates={}, groups=4, l1=1e-3)
    model.embedding.prune(0.7)
    train(model, 300, seed=2, rates=FAST)
    return model


def run_optembed():
    useless = 200  # rows of ids that never occur
    first = 0.02 * torch.randn(ROWS + useless, DIM)
    layer = nn.OptEmbedding.from_pretrained(first, freeze=False, fields=2)
    model = fresh(layer)
    train(model, 300)
    assert torch.equal((layer.table() != 0).any(1), torch.arange(ROWS + useless) < ROWS)
    ids, labels = batch(torch.Generator().manual_seed(7), 1000)

    @torch.no_grad()
    def score():
        return float(F.cross_entropy(model.eval()(ids), labels))

    dims = layer.search(score, generations=4, population=8, budget=0.5)
    assert layer.dims.tolist() == dims
    train(model, 200, seed=2)
    return model


def run_autodim():
    model = run("AutoDimEmbedding", 200, candidates=(4, 8), fields=2)
    model.embedding.choose()
    train(model, 200, seed=2)
    return model


#: Method: the run, and the share of the dense table's bytes that it may end with.
RUNS = {
    "DPQ": (functools.partial(run, "DPQEmbedding", m=4, k=16), 0.08),
    "DPQ softmax": (functools.partial(run, "DPQEmbedding", 600, m=4, k=16, variant="softmax"), 0.08),
    "DPQ shared": (functools.partial(run, "DPQEmbedding", m=4, k=16, shared=True), 0.08),
    "MGQE": (functools.partial(run, "MGQEEmbedding", m=4, k=16, tail_k=8, head=0.2), 0.08),
    "QLAE": (functools.partial(run, "QLAEEmbedding", levels=4), 0.08),
    "PEP": (run_pep, 0.55),
    "DeepLight": (run_deeplight, 0.32),
    "AutoSrh": (run_autosrh, 0.35),
    "OptEmbed": (run_optembed, 0.5),
    "AutoDim": (run_autodim, 0.55),
    "VTrans": (functools.partial(run, "VTransEmbedding", kl=0.02, rates={"mu": 0.03, "log_var": 0.1}), 0.5),
}


@pytest.mark.parametrize("name", RUNS)
def test_learns(name):
    begin, share = RUNS[name]
    torch.manual_seed(0)
    model = begin()
    loss, layer = held_out(model), model.embedding
    bytes_ = layer.nbytes_compressed() / (layer.num_embeddings * DIM * 4)
    print(f"{name}: loss {loss:.4f}, dense {dense_loss():.4f}; {bytes_:.1%} of the bytes")
    assert dense_loss() < 0.02
    assert loss < dense_loss() + 0.02, "a guess among the classes has a loss of 1.8"
    assert bytes_ <= share
    table = layer.compressed()
    assert table.nbytes == layer.nbytes_compressed()
    model.embedding = getattr(nn, f"{table.format.layer}Embedding").from_table(table)
    assert held_out(model) == pytest.approx(loss, abs=1e-4)
