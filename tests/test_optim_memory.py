"""`lutra.optim` with MemoryLinear: sparse gradients and attached layers against dense ones."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

import lutra.nn
import lutra.optim
from lutra import _backend

RULES = {
    "sgd": lambda p, **o: lutra.optim.SGD(p, lr=0.1, **o),
    "momentum": lambda p, **o: lutra.optim.SGD(p, lr=0.1, momentum=0.9, **o),
    "adagrad": lambda p, **o: lutra.optim.Adagrad(p, lr=0.1, **o),
    "rowwise": lambda p, **o: lutra.optim.RowwiseAdagrad(p, lr=0.1, **o),
    "adam": lambda p, **o: lutra.optim.Adam(p, lr=0.1, **o),
}
compiled = pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")


def layer(dim=33, dtype=torch.float32, seed=0, bits=4, chunks=3, **options):
    torch.manual_seed(seed)
    return lutra.nn.MemoryLinear(chunks * bits, dim, bits, dtype=dtype, init_std=0.5, **options)


def inputs(i, tokens=9, width=12):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(i))


def train(model, optimizer, steps=3, tokens=9, loss=lambda m, x: m(x).float().square().sum()):
    for i in range(steps):
        optimizer.zero_grad()
        loss(model, inputs(i, tokens)).backward()
        optimizer.step()


def flat_peer(model, rule, steps=3, tokens=9):
    """The same training by `lutra.optim` on a sparse gradient made of the dense one, row by row."""
    peer = copy.deepcopy(model)
    peer.sparse = False
    k, e, d = peer.tables.shape
    rows = torch.nn.Parameter(peer.tables.detach().view(k * e, d).clone())
    optimizer = RULES[rule]([rows, *(p for n, p in peer.named_parameters() if n != "tables")])
    for i in range(steps):
        peer.tables.data.copy_(rows.detach().view(k, e, d))
        peer.zero_grad()
        peer(inputs(i, tokens)).float().square().sum().backward()
        dense = peer.tables.grad.view(k * e, d)
        rows.grad = dense.to_sparse(1)
        optimizer.step()
    return rows.detach().view(k, e, d)


@pytest.mark.parametrize("how", ["sparse", "step", "backward"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_equals_a_step_on_touched_rows(how, rule, tokens):
    a = layer(sparse=how == "sparse")
    want = flat_peer(a, rule, tokens=tokens)
    optimizer = RULES[rule](a.parameters())
    if how != "sparse":
        optimizer.attach(a, when=how)
    train(a, optimizer, tokens=tokens)
    torch.testing.assert_close(a.tables.detach(), want, rtol=2e-4, atol=2e-5)
    if how != "sparse":
        assert a.tables.grad is None and a.bias.grad is not None


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 15, 64, 97, 130, 300])
def test_the_kernel_at_every_level(simd_level, dim, dtype):
    """Against float64, which is composed of torch's operations."""
    limit = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for rule in ("rowwise", "adam"):
        for tokens in (2, 40, 1500):
            a, b = layer(dim, dtype), layer(dim, torch.float64)
            b.load_state_dict(a.state_dict())
            for m in (a, b):
                optimizer = RULES[rule](m.parameters())
                optimizer.attach(m)
                train(m, optimizer, 1, tokens, lambda m, x: m(x).sum() / len(x))
            torch.testing.assert_close(a.tables.double(), b.tables, rtol=limit, atol=limit)


@compiled
def test_threads_do_not_change_a_bit(simd_level):
    found = []
    for threads in (1, 2, 3):
        _backend.core.set_num_threads(threads)
        a = layer(200, chunks=5)
        optimizer = RULES["adam"](a.parameters())
        optimizer.attach(a)
        train(a, optimizer, 2, 300, lambda m, x: m(x.repeat(1, 2)[:, :20]).square().sum())
        found.append(a.tables.detach())
    _backend.core.set_num_threads(0)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_accumulation_and_zero_grad():
    a, b = layer(), layer()
    x, y = inputs(0), inputs(1)
    for m, parts in ((a, (x, y)), (b, (torch.cat([x, y]),))):
        optimizer = RULES["adam"](m.parameters())
        optimizer.attach(m)
        m(inputs(2)).sum().backward()
        optimizer.zero_grad()
        for part in parts:
            m(part).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(a.tables, b.tables, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(autocast):
    a = layer()
    optimizer = RULES["sgd"](a.parameters())
    optimizer.attach(a)
    before = a.tables.detach().clone()
    with torch.autocast("cpu", autocast):
        loss = a(inputs(0)).float().square().mean()
    loss.backward()
    optimizer.step()
    assert a.tables.dtype == torch.float32 and not torch.equal(a.tables, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    found = []
    for again in (False, True):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(12, 12), layer())
        optimizer = RULES["adam"](model.parameters())
        optimizer.attach(model)
        x = inputs(0).requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        out.square().sum().backward()
        optimizer.step()
        found.append(model[1].tables.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("how", ["dense", "sparse", "attached"])
def test_clipping(how):
    a, b = layer(sparse=how == "sparse"), layer()
    optimizer = RULES["sgd"](a.parameters())
    if how == "attached":
        optimizer.attach(a)
    peer = torch.optim.SGD(b.parameters(), lr=0.1)
    for m in (a, b):
        m(inputs(0)).square().sum().backward()
    norm, want = optimizer.clip_grad_norm_(1.0), torch.nn.utils.clip_grad_norm_(b.parameters(), 1.0)
    torch.testing.assert_close(norm, want, rtol=1e-4, atol=1e-5)
    assert norm > 1
    optimizer.step(), peer.step()
    torch.testing.assert_close(a.tables, b.tables, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.bias, b.bias, rtol=1e-5, atol=1e-6)


def test_attach_finds_the_layers_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), layer(), torch.nn.Linear(33, 12), layer(seed=1))
    optimizer = RULES["sgd"](model.parameters())
    optimizer.attach(model)
    assert model[1]._attachment is not None and model[3]._attachment is not None
    copy_of = pickle.loads(pickle.dumps(model))
    assert copy_of[1]._attachment is None and copy.deepcopy(model)[1]._attachment is None
    train(model, optimizer, 2)
    optimizer.detach(model[1], model[3])
    model(inputs(0)).sum().backward()
    assert model[1].tables.grad is not None
    with pytest.raises(TypeError, match="MemoryLinear"):
        optimizer.attach(torch.nn.Linear(3, 3))
    small = layer()
    small.quantize_()
    with pytest.raises(TypeError, match="not quantized"):
        RULES["sgd"](small.parameters()).attach(small)


def test_other_hashes():
    for options in ({"learn_temperature": True}, {"projection": "hadamard"}, {"score": "scaled"}):
        found = []
        for how in ("dense", "attached", "sparse"):
            a = layer(sparse=how == "sparse", **options)
            optimizer = RULES["sgd"](a.parameters())
            if how == "attached":
                optimizer.attach(a)
            train(a, optimizer, 2, loss=lambda m, x: m(x).square().mean())
            found.append([p.detach() for p in a.parameters()])
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


def test_compiled_with_full_graph():
    a = layer()
    x = inputs(0)
    a(x).square().sum().backward()
    want = a.tables.grad.clone()
    a.zero_grad()
    torch.compile(a, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(a.tables.grad, want)


def test_state_round_trip():
    a, b = layer(), layer()
    optimizers = []
    for m in (a, b):
        optimizer = RULES["rowwise"](m.parameters())
        optimizer.attach(m)
        optimizers.append(optimizer)
    train(a, optimizers[0], 2)
    b.load_state_dict(a.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    train(a, optimizers[0], 2)
    train(b, optimizers[1], 2)
    assert torch.equal(a.tables, b.tables)
    assert optimizers[0].state[a.tables]["sum"].shape == (3, 16)


STEP = """
    import torch, lutra.nn, lutra.optim
    torch.set_num_threads(1)
    layer = lutra.nn.MemoryLinear(512, 512)  # 33.5 MB of tables
    optimizer = lutra.optim.{rule}(layer.parameters(), lr=0.1)
    {attach}
    def peak():  # not getrusage's, which begins with that of the process before exec
        lines = open("/proc/self/status").read().splitlines()
        return next(int(n.split()[1]) for n in lines if n.startswith("VmHWM")) / 1024
    def step(tokens):
        optimizer.zero_grad()
        layer(torch.ones(tokens, 512)).square().sum().backward()
        optimizer.step()
    step(1)
    before = peak()
    for tokens in (1, 16, 1, 300):
        step(tokens)
    print(peak() - before)
"""


def growth(rule, attach):
    code = textwrap.dedent(STEP.format(rule=rule, attach=attach))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(out.stdout)


@compiled
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_no_allocation_of_the_size_of_a_table():
    """The high-water mark of the process, in MB: a dense gradient shows there, the fused update does not."""
    for rule in ("SGD", "RowwiseAdagrad", "Adam"):
        assert growth(rule, "optimizer.attach(layer)") < 8
    assert growth("SGD", "") > 24


RANK = """
    import os, sys, torch, torch.distributed as dist, lutra.nn, lutra.optim
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = lutra.nn.MemoryLinear(12, 33, 4, init_std=0.5)
    model = torch.nn.parallel.DistributedDataParallel(layer)
    optimizer = lutra.optim.SGD(model.parameters(), lr=0.1)
    for i in range(2):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
        optimizer.step()
    torch.save(layer.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    """Two gloo processes of half a batch each, with bucketed gradients, are one process of all of it."""
    command = [sys.executable, "-c", textwrap.dedent(RANK)]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path)]) for r in range(2)]
    assert [p.wait(timeout=200) for p in ranks] == [0, 0]
    torch.manual_seed(0)
    alone = lutra.nn.MemoryLinear(12, 33, 4, init_std=0.5)
    train(alone, lutra.optim.SGD(alone.parameters(), lr=0.1), 2, 8, lambda m, x: m(x).square().mean())
    for r in range(2):
        state = torch.load(tmp_path / f"{r}.pt")
        torch.testing.assert_close(state["tables"], alone.tables.detach(), rtol=1e-4, atol=1e-6)
