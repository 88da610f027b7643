"""Tables and the memory layer's fused op on the GPU, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import FLOATS, close, rounded, same_bits

import lutra
from lutra.reference import address as address_reference
from lutra.reference import gather as reference

TYPES = (*FLOATS, "int8")


class Problem:
    """Tables of any type with codes and weights; the reference's result, of some columns."""

    def __init__(self, tokens, n_tables, entries, dim, dtype, seed=0):
        rng = np.random.default_rng(seed)
        self.dtype, self.result = dtype, "float32" if dtype == "int8" else dtype
        shape = (n_tables, entries, dim)
        self.scale = self.minimum = None
        if dtype == "int8":
            self.tables = rng.integers(-128, 128, shape).astype(np.int8)
            self.scale = (rng.random(shape[:2]) / 64).astype(np.float32)
            self.minimum = rng.standard_normal(shape[:2]).astype(np.float32)
        else:
            self.tables = rounded(rng.standard_normal(shape).astype(np.float32), dtype)
        self.codes = rng.integers(0, entries, (tokens, n_tables)).astype(np.int32)
        self.weights = rng.standard_normal((tokens, n_tables)).astype(np.float32)
        self.bias = rounded(rng.standard_normal(dim).astype(np.float32), self.result)
        if dim > 80:
            self.columns = np.unique(np.r_[:33, dim - 33 : dim, rng.integers(0, dim, 14)])
        else:
            self.columns = np.arange(dim)

    def put(self, gpu, codes=None, weights=True, bias=True):
        return [
            gpu.put(self.tables, None if self.dtype == "int8" else self.dtype),
            gpu.put(self.codes if codes is None else codes),
            gpu.put(self.weights) if weights else None,
            gpu.put(self.bias, self.result) if bias else None,
            gpu.put(self.scale),
            gpu.put(self.minimum),
        ]

    def want(self, weights=True, bias=True, tokens=slice(None)):
        return reference.tables(
            self.tables[:, :, self.columns],
            self.codes[tokens],
            self.weights[tokens] if weights else None,
            self.bias[self.columns] if bias else None,
            self.scale,
            self.minimum,
        )


# (tokens, tables, entries, dim): around the 32 tables of a warp, its tiles of columns, tokens of a block
SHAPES = (
    (1, 1, 2, 1),
    (1, 512, 16, 96),
    (2, 33, 16, 33),
    (3, 31, 256, 64),
    (17, 65, 8, 48),
    (33, 5, 16, 17),
    (63, 32, 4, 136),
    (300, 7, 256, 97),
)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", TYPES)
def test_few_tokens(gpu, dtype):
    for i, shape in enumerate(SHAPES):
        p = Problem(*shape, dtype, seed=i)
        all_of_them, some = p.put(gpu), p.put(gpu, weights=False, bias=False)
        with gpu.no_sync():
            full, plain = lutra.gather.tables(*all_of_them), lutra.gather.tables(*some)
        close(gpu.get(full)[:, p.columns], p.want(), p.result, 4)
        close(gpu.get(plain)[:, p.columns], p.want(False, False), p.result, 4)


# Enough tokens and columns that tables go through shared memory; ragged at both ends; an odd and an even
# number of tables; one, several and many tokens to a group.
SLABS = (
    (256, 1, 16, 3208),
    (300, 5, 16, 6464),
    (600, 8, 256, 6416),
    (1100, 9, 64, 4112),
    (2100, 3, 200, 3216),
)


@pytest.mark.parametrize("shape", SLABS)
@pytest.mark.parametrize("dtype", TYPES)
def test_many_tokens(gpu, dtype, shape):
    p = Problem(*shape, dtype, seed=sum(shape))
    tokens, _, entries, _ = shape
    codes = p.codes.copy()
    codes[5, -1], codes[tokens - 1, 0] = entries, -1
    rest = np.setdiff1d(np.arange(tokens), [5, tokens - 1])
    for given in (True, False):
        out = gpu.get(lutra.gather.tables(*p.put(gpu, codes, given, given)))
        assert np.isnan(out[[5, tokens - 1]]).all()
        close(out[rest][:, p.columns], p.want(given, given, rest), p.result, 4)
    again = gpu.get(lutra.gather.tables(*p.put(gpu, codes, False, False)))
    same_bits(again, out)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_nan_in_a_table_reaches_the_tokens_that_read_it_alone(gpu_torch, dtype):
    if dtype == "int8":
        pytest.skip("bytes are numbers")
    for tokens, dim in ((7, 40), (600, 6416)):
        p = Problem(tokens, 5, 64, dim, dtype)
        p.tables[3, 9] = np.nan
        out = gpu_torch.get(lutra.gather.tables(*p.put(gpu_torch)))
        np.testing.assert_array_equal(np.isnan(out).all(1), p.codes[:, 3] == 9)
        np.testing.assert_array_equal(np.isnan(out).any(1), p.codes[:, 3] == 9)


def test_a_code_outside_its_table_makes_the_token_nan(gpu):
    t, codes = np.ones((3, 4, 9), np.float32), np.zeros((5, 3), np.int32)
    codes[1, 2], codes[3, 0] = 4, -1
    out = gpu.get(lutra.gather.tables(gpu.put(t), gpu.put(codes)))
    assert np.isnan(out[[1, 3]]).all() and (out[[0, 2, 4]] == 3).all()


def test_empty(gpu):
    t, codes = np.ones((3, 4, 8), np.float32), np.zeros((5, 3), np.int32)
    assert lutra.gather.tables(gpu.put(t), gpu.put(codes[:0])).shape == (0, 8)
    assert lutra.gather.tables(gpu.put(t[..., :0]), gpu.put(codes)).shape == (5, 0)
    out = lutra.gather.tables(
        gpu.put(t[:0]), gpu.put(codes[:, :0]), None, gpu.put(np.arange(8.0, dtype=np.float32))
    )
    np.testing.assert_array_equal(gpu.get(out), np.tile(np.arange(8.0), (5, 1)))


# ---------------------------------------------------------------- hash and tables in one
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_memory_linear(gpu_torch, x_dtype, dtype):
    torch, rng = gpu_torch.torch, np.random.default_rng(1)
    pytest.importorskip("lutra.nn")  # defines the op
    for tokens, n_tables, bits, dim in (
        (1, 1, 8, 1),
        (1, 128, 8, 1024),
        (2, 3, 10, 17),
        (3, 33, 8, 40),
        (4, 513, 3, 96),
        (15, 31, 4, 64),
        (64, 65, 8, 33),
        (65, 3, 8, 40),
        (17, 5, 16 if dtype == "int8" else 11, 8),
        (600, 4, 8, 6416),
    ):
        p = Problem(tokens, n_tables, 1 << bits, dim, dtype, seed=tokens)
        x = rounded(rng.standard_normal((tokens, n_tables * bits)).astype(np.float32), x_dtype)
        if tokens > 1:
            x[1, -1] = np.nan
        score, temperature = ("scaled", 0.7) if tokens % 2 else ("prob", 1.5)
        p.codes, p.weights = address_reference.sign_hash(x, bits, score, temperature)
        tables, _, _, bias, scale, minimum = p.put(gpu_torch)
        on_gpu = gpu_torch.put(x, x_dtype)
        with gpu_torch.no_sync():
            arguments = on_gpu, tables, bias, bits, score, temperature, scale, minimum
            out, codes, weights = torch.ops.lutra.memory_linear(*arguments)
            hashed = lutra.address.sign_hash(on_gpu, bits, score, temperature)
        np.testing.assert_array_equal(gpu_torch.get(codes), p.codes)
        same_bits(gpu_torch.get(weights), gpu_torch.get(hashed.weights))
        got = gpu_torch.get(out)
        rest = np.setdiff1d(np.arange(tokens), [1])
        assert tokens == 1 or np.isnan(got[1]).all()
        close(got[rest][:, p.columns], p.want(tokens=rest), p.result, 8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layers_without_gradients_are_the_op(gpu_torch, dtype):
    """Inference keeps no codes; the result has the same bits."""
    torch, nn = gpu_torch.torch, pytest.importorskip("lutra.nn")
    layer = nn.MemoryLinear(64, 48, device="cuda", dtype=getattr(torch, dtype))
    for tokens in (1, 16, 17, 70):
        x = torch.randn(tokens, 64, device="cuda")
        want = layer(x)
        assert want.requires_grad
        with torch.no_grad():
            same_bits(gpu_torch.get(layer(x)), gpu_torch.get(want))


# ---------------------------------------------------------------- gradients
# The tables' gradient by chunks of 4096 tokens and in 256 stretches; the weights' by slabs (from 2 tokens a
# row and 64 blocks on), with 2, 4 and 8 tokens to a group.
GRADIENTS = (
    (1, 1, 2, 1),
    (33, 5, 16, 33),
    (64, 3, 2, 8),
    (257, 9, 16, 72),
    (300, 4, 256, 64),
    (600, 101, 256, 24),
    (1100, 130, 16, 40),
    (2000, 3, 1000, 24),
    (4200, 71, 4, 8),
    (8193, 2, 16, 16),
)


@pytest.mark.parametrize("shape", GRADIENTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(gpu_torch, dtype, shape):
    torch, rng = gpu_torch.torch, np.random.default_rng(sum(shape))
    tokens, _, entries, dim = shape
    p = Problem(*shape, dtype, seed=sum(shape))
    p.codes[:, -1] = np.where(rng.random(tokens) < 0.9, entries - 1, p.codes[:, -1])  # a popular row
    g = rounded(rng.standard_normal((tokens, dim)).astype(np.float32), dtype)
    tables, codes, weights, *_ = p.put(gpu_torch)
    tables.requires_grad_(), weights.requires_grad_()
    up = gpu_torch.put(g, dtype)
    with gpu_torch.no_sync():
        out = lutra.gather.tables(tables, codes, weights)
        to_tables, to_weights = torch.autograd.grad(out, (tables, weights), up)
    want_tables, want_weights = reference.tables_backward(g, p.tables, p.codes, p.weights)
    close(gpu_torch.get(to_tables), want_tables, dtype, 4)
    close(gpu_torch.get(to_weights), want_weights, "float32", 4)
    again = torch.autograd.grad(lutra.gather.tables(tables, codes, weights), (tables, weights), up)
    same_bits(gpu_torch.get(to_tables), gpu_torch.get(again[0]))
    same_bits(gpu_torch.get(to_weights), gpu_torch.get(again[1]))
    (alone,) = torch.autograd.grad(lutra.gather.tables(tables, codes, weights.detach()), tables, up)
    same_bits(gpu_torch.get(to_tables), gpu_torch.get(alone))


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(9, 3, 4, 8), (1100, 65, 16, 24), (5000, 2, 16, 8)])
def test_gradients_of_bad_codes(gpu_torch, shape):
    """Left out of the tables' gradient; NaN where their weights' stands."""
    torch = gpu_torch.torch
    tokens, _, entries, dim = shape
    p = Problem(*shape, "float32")
    bad = np.random.default_rng(0).random(p.codes.shape) < 0.1
    bad[:, 1] = True  # a table that nobody reads
    codes = np.where(bad, np.where(p.codes % 2, -1 - p.codes, entries + p.codes), p.codes).astype(np.int32)
    tables, codes, weights, *_ = p.put(gpu_torch, codes)
    g = np.random.default_rng(1).standard_normal((tokens, dim)).astype(np.float32)
    tables.requires_grad_(), weights.requires_grad_()
    out = lutra.gather.tables(tables, codes, weights)
    to_tables, to_weights = torch.autograd.grad(out, (tables, weights), gpu_torch.put(g))
    _, want_weights = reference.tables_backward(g, p.tables, p.codes, p.weights, need_tables=False)
    want_tables, _ = reference.tables_backward(
        g, p.tables, p.codes, np.where(bad, 0, p.weights), need_weights=False
    )
    close(gpu_torch.get(to_tables), want_tables, "float32", 4)
    got = gpu_torch.get(to_weights)
    np.testing.assert_array_equal(np.isnan(got), bad)
    close(got[~bad], want_weights[~bad], "float32", 4)


@pytest.mark.parametrize("result", FLOATS)
def test_weight_gradient_of_8_bit_tables(gpu_torch, result):
    torch = gpu_torch.torch
    for shape in ((5, 3, 16, 33), (300, 9, 16, 64)):
        p = Problem(*shape, "int8")
        p.result, p.bias = result, rounded(p.bias, result)
        tables, codes, weights, bias, scale, minimum = p.put(gpu_torch)
        weights.requires_grad_()
        out = lutra.gather.tables(tables, codes, weights, bias, scale, minimum)
        close(gpu_torch.get(out), p.want(), result, 8)
        g = rounded(np.random.default_rng(1).standard_normal(out.shape).astype(np.float32), result)
        (got,) = torch.autograd.grad(out, weights, gpu_torch.put(g, result))
        want = reference.tables_backward(
            g, p.tables, p.codes, p.weights, need_tables=False, scale=p.scale, minimum=p.minimum
        )[1]
        close(gpu_torch.get(got), want, "float32", 8)


# ---------------------------------------------------------------- layers
@pytest.mark.parametrize("dtype", FLOATS)
def test_layers_as_on_the_cpu(gpu_torch, dtype):
    torch, nn = gpu_torch.torch, pytest.importorskip("lutra.nn")
    torch.manual_seed(0)
    layer = nn.MemoryLinear(48, (40, 24), dtype=getattr(torch, dtype))
    for tokens in (1, 16, 70, 600):
        x = torch.randn(tokens, 48, dtype=layer.tables.dtype)
        results = []
        for device in ("cpu", "cuda"):
            layer = layer.to(device).requires_grad_()
            layer.zero_grad()
            leaf = x.to(device, copy=True).requires_grad_()
            a, b = layer(leaf)
            (a.float().square().sum() + b.float().sum()).backward()
            results.append(
                [
                    t.detach().cpu().float().clone()
                    for t in (a, b, leaf.grad, layer.tables.grad, layer.bias.grad)
                ]
            )
        for want, got in zip(*results):
            close(got.numpy(), want.numpy(), dtype, 8)


def test_autocast(gpu_torch):
    torch, nn = gpu_torch.torch, pytest.importorskip("lutra.nn")
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), nn.MemoryLinear(64, 48), torch.nn.Linear(48, 8)
    ).cuda()
    x = torch.randn(20, 32, device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            out = model(x)
            assert out.dtype is dtype and model[1](x.new_zeros(3, 64)).dtype is dtype
        out.float().square().sum().backward()
        assert model[1].tables.grad.dtype is torch.float32 and bool(model[1].tables.grad.any())


@pytest.mark.parametrize("tokens", [1, 40])
def test_compiled_layers_are_whole_graphs(gpu_torch, tokens):
    torch, nn = gpu_torch.torch, pytest.importorskip("lutra.nn")
    layer = nn.MemoryLinear(64, 48, score="scaled", device="cuda")
    x = torch.randn(tokens, 64, device="cuda", requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = (x, *layer.parameters())
    want = layer(x), *torch.autograd.grad(layer(x).square().sum(), leaves)
    got = compiled(x), *torch.autograd.grad(compiled(x).square().sum(), leaves)
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_training_steps_in_a_cuda_graph(gpu_torch, tokens):
    """Forward, backward and SGD: three replays are three steps."""
    torch, nn = gpu_torch.torch, pytest.importorskip("lutra.nn")
    torch.manual_seed(0)
    layers = [nn.MemoryLinear(64, 48).cuda() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    inputs = torch.randn(4, tokens, 64, device="cuda")
    x = inputs[0].clone()

    def step(layer):
        for p in layer.parameters():
            p.grad = None
        loss = (layer(x) - 1).square().sum()
        loss.backward()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 1e-3 * p.grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(layers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layers[0])
    step(layers[1])
    for i in (1, 2, 3):
        x.copy_(inputs[i])
        graph.replay()
        step(layers[1])
    for a, b in zip(layers[0].parameters(), layers[1].parameters()):
        same_bits(gpu_torch.get(a), gpu_torch.get(b))


def test_quantized_layer(gpu_torch):
    torch, nn = gpu_torch.torch, pytest.importorskip("lutra.nn")
    layer = nn.MemoryLinear(64, 80).quantize_()
    for tokens in (1, 70):
        x = torch.randn(tokens, 64)
        want = layer.cpu()(x)
        for dtype in (torch.float32, torch.bfloat16):
            got = layer.cuda()(x.cuda().to(dtype))
            if dtype is torch.float32:
                close(gpu_torch.get(got), want.detach().numpy(), "float32", 8)
        leaf = x.cuda().requires_grad_()
        layer(leaf).sum().backward()
        other = x.clone().requires_grad_()
        layer.cpu()(other).sum().backward()
        close(gpu_torch.get(leaf.grad), other.grad.numpy(), "float32", 16)
