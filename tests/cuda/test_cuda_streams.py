"""Streams, CUDA graphs, devices and errors: what holds for every op."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import close, same_bits

import lutra
from lutra import _backend


def cases(torch):
    """Every forward op as (function, inputs on the GPU)."""
    make = torch.Generator(device="cuda").manual_seed(0)

    def floats(*shape):
        return torch.randn(*shape, device="cuda", generator=make)

    def ints(high, *shape):
        return torch.randint(0, high, shape, device="cuda", generator=make)

    offsets = torch.arange(0, 640, 10, device="cuda")
    return {
        "sign_hash": (lambda x: lutra.address.sign_hash(x), [floats(33, 64)]),
        "token_ngrams": (
            lambda t: lutra.address.token_ngrams(t, order=3, buckets=999).ids,
            [ints(99, 20, 30)],
        ),
        "nearest": (lambda x, c: lutra.address.nearest(x, c), [floats(500, 16), floats(40, 16)]),
        "bag": (lambda t, i: lutra.gather.bag(t, i, mode="mean"), [floats(100, 24), ints(100, 50, 9)]),
        "bag_max": (
            lambda t, i: lutra.gather.bag(t, i, offsets, mode="max"),
            [floats(100, 24), ints(100, 640)],
        ),
        "bag_grad": (lambda g, i: lutra.gather.bag_grad(g, i, rows=100), [floats(50, 24), ints(100, 50, 9)]),
        "tables": (
            lambda t, c: lutra.gather.tables(t, c),
            [floats(6, 16, 40), ints(16, 30, 6).to(torch.int32)],
        ),
        "knn": (lambda q, x: lutra.scan.knn(q, x, 10), [floats(70, 32), floats(5000, 32)]),
        "knn_one": (lambda q, x: lutra.scan.knn(q, x, 10, "cosine"), [floats(1, 32), floats(5000, 32)]),
        "knn_long": (lambda q, x: lutra.scan.knn(q, x, 200, "l2"), [floats(3, 32), floats(5000, 32)]),
        "rescore": (
            lambda q, x, c: lutra.scan.rescore(q, x, c, 5),
            [floats(20, 16), floats(300, 16), ints(300, 20, 40)],
        ),
        "pq": (
            lambda q, c, b: lutra.scan.pq(q, c, b, 10),
            [floats(7, 16), ints(16, 4000, 8).to(torch.uint8), floats(8, 16, 2)],
        ),
        "knn_poincare": (
            lambda q, x: lutra.scan.knn(q, x, 10, "poincare"),
            [floats(20, 8) / 40, floats(900, 8) / 40],
        ),
        "rescore_long": (
            lambda q, x, c: lutra.scan.rescore(q, x, c, 2100, "l2"),
            [floats(3, 4), floats(5000, 4), ints(5000, 3, 2500)],
        ),
        "packed_logits": (
            lambda h, t: lutra.scan.packed_logits(h, t),
            [floats(9, 40), lutra.gather.pack_rows(floats(300, 40))],
        ),
        "packed_topk": (
            lambda h, t: lutra.scan.packed_topk(h, t, 10),
            [floats(3, 40), lutra.gather.pack_rows(floats(300, 40))],
        ),
        "lookups_backward": (
            lambda g, c: torch.ops.lutra.lookups_backward(g, c, 6, 8),
            [floats(9, 500), ints(256, 500, 6).to(torch.uint8)],
        ),
    }


NAMES = ("sign_hash", "token_ngrams", "nearest", "bag", "bag_max", "bag_grad", "tables", "knn", "knn_one",
         "knn_long", "rescore", "pq", "knn_poincare", "rescore_long", "packed_logits", "packed_topk",
         "lookups_backward")  # fmt: skip


def results(out):
    return [t.cpu().numpy() for t in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("name", NAMES)
def test_ops_run_on_the_current_stream(gpu_torch, name):
    """On a busy side stream the op must wait for its input and for nothing else."""
    torch = gpu_torch.torch
    function, inputs = cases(torch)[name]
    want = results(function(*inputs))
    side = torch.cuda.Stream()
    late = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # some tens of milliseconds
        for a, b in zip(late, inputs):
            a.copy_(b)
        out = function(*late)
        assert not side.query(), "the call waited for its stream"
    side.synchronize()
    for a, b in zip(want, results(out)):
        same_bits(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_ops_in_a_cuda_graph(gpu_torch, name):
    """Capture fails where something synchronises or allocates behind torch's back."""
    torch = gpu_torch.torch
    function, inputs = cases(torch)[name]
    static = [t.clone() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*static)
    for step in range(3):
        fresh = [t.roll(step, 0) for t in inputs]
        for a, b in zip(static, fresh):
            a.copy_(b)
        graph.replay()
        got = results(out)
        for a, b in zip(results(function(*fresh)), got):
            same_bits(a, b)


def tables_step(torch):
    """Forward and backward of sign_hash and tables."""
    x = torch.randn(40, 64, device="cuda", requires_grad=True)
    tables = torch.randn(8, 256, 48, device="cuda", requires_grad=True)

    def step():
        codes, weights = lutra.address.sign_hash(x)
        return torch.autograd.grad(lutra.gather.tables(tables, codes, weights).square().sum(), (x, tables))

    return step, x


def layer_step(torch, name):
    """Forward and backward of a layer."""
    import lutra.nn

    layer = {
        "MemoryLinear": lambda: lutra.nn.MemoryLinear(64, 48),
        "LookupFFN": lambda: lutra.nn.LookupFFN(64),
        "EmbeddingBag": lambda: lutra.nn.EmbeddingBag(1000, 48),
    }[name]().to("cuda")
    bag = name == "EmbeddingBag"
    x = torch.randint(0, 1000, (40, 6), device="cuda") if bag else torch.randn(40, 64, device="cuda")
    leaves = [p for p in layer.parameters() if p.requires_grad]

    def step():
        return torch.autograd.grad(layer(x).square().sum(), leaves)

    return step, x


@pytest.mark.parametrize("name", ["ops", "MemoryLinear", "LookupFFN", "EmbeddingBag"])
def test_training_step_in_a_cuda_graph(gpu_torch, name):
    """Gradients are written whole at every replay."""
    torch = gpu_torch.torch
    step, x = tables_step(torch) if name == "ops" else layer_step(torch, name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    with torch.no_grad():
        x.copy_(x.roll(1, 0) if name == "EmbeddingBag" else torch.randn_like(x))
    graph.replay()
    for a, b in zip(grads, step()):
        same_bits(a.cpu().numpy(), b.cpu().numpy())


def test_cupy_stream():
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    table = rng.standard_normal((100, 16)).astype(np.float32)
    ids = rng.integers(0, 100, (30, 4))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out = lutra.gather.bag(cupy.asarray(table), cupy.asarray(ids))
        stream.synchronize()
    close(cupy.asnumpy(out), table[ids].sum(1))


def test_a_dlpack_array_comes_back_in_its_library(gpu_torch):
    torch, cupy = gpu_torch.torch, pytest.importorskip("cupy")
    a = cupy.from_dlpack(torch.ones(4, 16, device="cuda"))
    assert isinstance(lutra.address.sign_hash(a).codes, cupy.ndarray)
    with pytest.raises(TypeError, match="one library"):
        lutra.scan.knn(a, torch.ones(4, 16, device="cuda"))


def test_cpu_and_gpu_do_not_mix(gpu_torch):
    torch = gpu_torch.torch
    with pytest.raises((TypeError, ValueError), match="database"):
        lutra.scan.knn(torch.ones(2, 3, device="cuda"), torch.ones(2, 3))


def test_float64_is_refused_with_a_reason(gpu):
    with pytest.raises(TypeError, match="no float64 kernel on CUDA"):
        lutra.scan.knn(gpu.put(np.ones((2, 3))), gpu.put(np.ones((2, 3))))


def test_a_device_that_is_not_there_is_a_runtime_error(gpu_torch):
    torch = gpu_torch.torch
    x = torch.zeros(8, device="cuda")
    with pytest.raises(RuntimeError, match="cudaSetDevice"):
        _backend.cuda.sign_hash(
            x.data_ptr(), 0, 1, 1, 8, 0, 1.0, x.data_ptr(), x.data_ptr(), _backend.cuda.device_count()[0], 0
        )
    torch.cuda.synchronize()
    assert torch.cuda.current_device() == 0 and float(x.sum()) == 0


def test_workspaces_are_asked_of_the_arrays_device(gpu_torch):
    nowhere = _backend.cuda.device_count()[0]
    for ask, sizes in (
        ("bag_grad_workspace", (100, None, 10, -1, 0, 8, 0, None, True)),
        ("bag_update_workspace", (100, None, 10, -1, 0, 0, 8, None)),
    ):
        assert getattr(_backend.cuda, ask)(*sizes, 0, 0) > 0
        with pytest.raises(RuntimeError, match="cudaSetDevice"):
            getattr(_backend.cuda, ask)(*sizes, nowhere, 0)


def test_other_devices(gpu_torch):
    torch = gpu_torch.torch
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = torch.randn(9, 16, device="cuda:1")
    codes = lutra.address.sign_hash(x).codes
    assert codes.device == x.device and torch.cuda.current_device() == 0
    np.testing.assert_array_equal(codes.cpu().numpy(), lutra.address.sign_hash(x.cpu().numpy()).codes)


def test_names_of_the_devices():
    count, message = _backend.cuda.device_count()
    assert count >= 1 and message == ""
    assert _backend.cuda.device_name(0)
    assert _backend.cuda_status() == (True, _backend.cuda.device_name(0))


# ---------------------------------------------------------------- through torch's machinery
def test_torch_compile(gpu_torch):
    torch = gpu_torch.torch

    def f(x, tables):
        codes, weights = lutra.address.sign_hash(x)
        return lutra.gather.tables(tables, codes, weights).relu()

    x = torch.randn(10, 32, device="cuda", requires_grad=True)
    tables = torch.randn(4, 256, 24, device="cuda")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    want, got = f(x, tables), compiled(x, tables)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x))


@pytest.mark.parametrize("layer", ["MemoryLinear", "Embedding", "EmbeddingBag"])
def test_layers_are_the_same_as_on_the_cpu(gpu_torch, layer):
    torch, nn = gpu_torch.torch, pytest.importorskip("lutra.nn")
    torch.manual_seed(0)
    options = {"Embedding": {"padding_idx": 3}, "EmbeddingBag": {"mode": "mean"}}.get(layer, {})
    module = getattr(nn, layer)(32 if layer == "MemoryLinear" else 50, 24, **options)
    x = torch.randn(7, 32) if layer == "MemoryLinear" else torch.randint(0, 50, (7, 5))
    outputs = []
    for device in ("cpu", "cuda"):
        module = module.to(device)
        module.zero_grad()
        out = module(x.to(device))
        out.square().sum().backward()
        # copies: moving the module moves the gradients that its parameters hold
        outputs.append([t.detach().cpu().clone() for t in (out, *(p.grad for p in module.parameters()))])
    for a, b in zip(*outputs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
