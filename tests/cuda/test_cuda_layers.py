"""lutra's layers on CUDA: the CPU's results, autocast, torch.compile without graph breaks, CUDA graphs."""

from __future__ import annotations

import copy
import inspect

import pytest

torch = pytest.importorskip("torch")
from lutra import nn  # noqa: E402

ROWS = 300
#: Constructors of layers of vectors, and the width of their input.
OF_VECTORS = {
    "MemoryLinear": (lambda: nn.MemoryLinear(64, 48), 64),
    "MemoryLinear int bits 4": (lambda: nn.MemoryLinear(64, 48, bits=4, score="scaled"), 64),
    "MemoryLinear projected": (lambda: nn.MemoryLinear(48, 24, projection="hadamard", num_tables=6), 48),
    "LookupFFN": (lambda: nn.LookupFFN(64), 64),
    "HadamardProjection": (lambda: nn.HadamardProjection(48, 40), 48),
    "MemoryFormerBlock": (lambda: nn.MemoryFormerBlock(64, num_heads=4), 64),
    "ProductKeyMemory": (lambda: nn.ProductKeyMemory(32, num_sub_keys=16, heads=2, k=4), 32),
    "PEER": (lambda: nn.PEER(32, num_sub_keys=16, heads=2, k=4), 32),
    "LatentQuantize": (lambda: nn.LatentQuantize(24, 5), 24),
}
#: What is not made by two numbers alone, or lives on the host; what draws anew in every call.
NOT_TABLES = {"SconeEmbedding", "HostEmbedding", "MethodEmbedding", "CompressedEmbedding", "SharedEmbedding"}
RANDOM = {
    "AutoDimEmbedding",
    "LPTEmbedding",
    "ALPTEmbedding",
    "AutoSrhEmbedding",
    "VTransEmbedding",
    "OptEmbedding",
    "CAFEEmbedding",
}


def _tables():
    """The embeddings that two numbers make."""
    found = {}
    for name in nn.__all__:
        cls = getattr(nn, name)
        if not (inspect.isclass(cls) and name.endswith("Embedding") and name not in NOT_TABLES):
            continue
        needed = [
            p
            for p in list(inspect.signature(cls).parameters.values())[2:]
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        if not needed:
            found[name] = lambda cls=cls: cls(ROWS, 64)
    return found


TABLES = _tables()


def case(name):
    torch.manual_seed(0)
    if name in OF_VECTORS:
        make, width = OF_VECTORS[name]
        x = torch.randn(3, 7, width) if name == "MemoryFormerBlock" else torch.randn(7, width)
        return make(), x
    return TABLES[name](), torch.randint(0, ROWS, (7, 5))


def result(out):
    return out if isinstance(out, torch.Tensor) else next(t for t in out if isinstance(t, torch.Tensor))


def forward(module, x):
    """The output of a call; layers that draw anew for every sequence begin with the same one."""
    if hasattr(module, "next_sequence"):
        module.next_sequence.zero_()
    return result(module(x))


def step(module, x):
    """The output and the gradients of the parameters and of a float input."""
    x = x.detach().requires_grad_(x.is_floating_point())
    out = forward(module, x)
    leaves = [p for p in (x, *module.parameters()) if p.requires_grad]
    grads = torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True) if leaves else ()
    return [out, *(g.to_dense() for g in grads if g is not None)]


NAMES = [*OF_VECTORS, *TABLES]


def on_both(name):
    module, x = case(name)
    return module, copy.deepcopy(module).cuda(), x


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RANDOM])
def test_the_same_as_on_the_cpu(gpu_torch, name):
    here, there, x = on_both(name)
    want = step(here, x)
    got = step(there, x.cuda())
    assert len(want) == len(got)
    for a, b in zip(want, got):
        assert b.is_cuda and a.dtype == b.dtype
        torch.testing.assert_close(b.detach().cpu(), a.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "AutoDimEmbedding"])  # picks columns by data
def test_compiles_without_a_graph_break(gpu_torch, name):
    _, module, x = on_both(name)
    module.eval()
    x = x.cuda()
    want = forward(module, x)
    torch._dynamo.reset()
    if hasattr(module, "next_sequence"):
        module.next_sequence.zero_()
    got = result(torch.compile(module, fullgraph=True, backend="aot_eager")(x))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(gpu_torch, name):
    _, module, x = on_both(name)
    module.eval()
    x = x.cuda()
    want = forward(module, x)
    with torch.autocast("cuda", torch.bfloat16):
        got = forward(module, x)
    assert got.is_floating_point() and bool(got.isfinite().all())
    if name in ("ProductKeyMemory", "PEER"):
        return  # bf16 scores choose other keys
    torch.testing.assert_close(got.float(), want.float(), rtol=0.1, atol=0.1 * float(want.abs().max() + 1e-3))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "AutoDimEmbedding"])
def test_forward_in_a_cuda_graph(gpu_torch, name):
    _, module, x = on_both(name)
    module.eval()
    x = x.cuda()
    with torch.no_grad():
        want = forward(module, x).clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward(module, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = result(module(x))
        out.zero_()
        if hasattr(module, "next_sequence"):
            module.next_sequence.zero_()
        graph.replay()
    torch.testing.assert_close(out, want)
