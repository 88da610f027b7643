"""torch.ops.lutra under the parts of torch that look inside an op: autograd, torch.func, fakes, tracing."""

from __future__ import annotations

import warnings

import pytest

from lutra import _backend

torch = pytest.importorskip("torch")
import lutra  # noqa: E402
from lutra import nn  # noqa: E402
from lutra.torch_ops import plain  # noqa: E402

ops = torch.ops.lutra
IDS = torch.tensor([[0, 3, 3], [6, 1, 0]])
FLAT, OFFSETS = torch.tensor([5, 0, 2, 2, 6]), torch.tensor([0, 2, 2])


def rand(*shape, grad=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def all_samples(dtype=torch.float32, grad=True):
    """Argument tuples of each op; its differentiable arguments require a gradient."""

    def leaf(*shape):
        return rand(*shape, grad=grad, dtype=dtype)

    def fixed(*shape):
        return rand(*shape, dtype=dtype)

    torch.manual_seed(0)
    codes = torch.tensor([[1, 0, 3], [2, 2, 0]], dtype=torch.int32)
    bytes_ = torch.randint(0, 255, (7, 4), dtype=torch.uint8)
    quantized = (rand(7).abs(), rand(7))
    return {
        "sign_hash": [(leaf(3, 8), 4), (leaf(2, 2, 6), 3, "scaled", 0.5), (leaf(8), 8)],
        "sign_hash_backward": [
            (fixed(3, 2), fixed(3, 8), 4, "prob", 1.0),
            (fixed(2), fixed(8), 4, "scaled", 2.0),
        ],
        "bag": [
            (leaf(7, 4), IDS),
            (leaf(7, 4), IDS, None, leaf(2, 3)),
            (leaf(7, 4), FLAT, OFFSETS, None, None, None, "mean", 2),
            (leaf(7, 4), FLAT.int(), OFFSETS.int(), None, None, None, "max", -1, True),
            (bytes_, IDS, None, rand(2, 3, grad=grad), *quantized),
        ],
        "bag_argmax": [(fixed(7, 4), IDS), (fixed(7, 4), FLAT, OFFSETS, 2, False)],
        "bag_backward": [
            (fixed(2, 4), IDS, None, None, None, 7, "sum", None, False),
            (fixed(3, 4), FLAT, OFFSETS, None, None, 7, "mean", 2, False),
        ],
        "bag_backward_rows": [(fixed(2, 4), IDS, None, fixed(2, 3), None, 7, "sum", 3, False)],
        "bag_weight_grad": [(fixed(2, 4), fixed(7, 4), IDS, None, None, None, None, False)],
        "tables": [(leaf(3, 4, 5), codes), (leaf(3, 4, 5), codes, leaf(2, 3), leaf(5))],
        "tables_backward": [
            (fixed(2, 5), fixed(3, 4, 5), codes, fixed(2, 3), True, True),
            (fixed(2, 5), fixed(3, 4, 5), codes, None, True, False),
        ],
        "memory_linear": [
            (leaf(3, 8), leaf(2, 16, 5), leaf(5), 4),
            (leaf(2, 3, 6), leaf(2, 8, 5), None, 3, "scaled", 0.5),
        ],
        "memory_linear_backward": [
            (fixed(2, 5), fixed(2, 6), fixed(3, 4, 5), codes, rand(2, 3), 2, "prob", 1.0, True, True),
            (fixed(2, 5), fixed(2, 6), fixed(3, 4, 5), codes, rand(2, 3), 2, "prob", 1.0, False, True),
            (fixed(2, 5), fixed(2, 6), fixed(3, 4, 5), codes, rand(2, 3), 2, "scaled", 2.0, True, False),
        ],
        "embedding": [(leaf(7, 4), IDS), (leaf(7, 4), IDS.int(), 3)],
        "embedding_dense_backward": [(leaf(2, 3, 4), IDS, 7, None), (leaf(2, 3, 4), IDS.int(), 7, 3)],
        "knn": [
            (leaf(3, 4), leaf(9, 4), 2),
            (leaf(3, 4), leaf(9, 4), 2, "cosine"),
            (leaf(3, 4), leaf(2, 4), 4, "l2"),
            (leaf(3, 4), leaf(9, 4), 4, "l2", torch.tensor([0b00110100, 1], dtype=torch.uint8)),
        ],
        "range_search": [
            (fixed(3, 4), fixed(9, 4), 0.5),
            (fixed(3, 4), fixed(9, 4), 9.0, "l2", torch.tensor([0b00110100, 1], dtype=torch.uint8)),
        ],
        "nearest": [(leaf(5, 4), leaf(3, 4)), (leaf(5, 4), leaf(3, 4), 2, "ip")],
        "rescore": [(leaf(2, 4), leaf(7, 4), IDS, 2), (leaf(2, 4), leaf(7, 4), IDS, 2, "l2")],
        "quantize_int8": [(rand(9, 4),), (rand(20, 7), True)],
        "knn_screened": [
            (leaf(3, 4), leaf(9, 4), *lutra.scan.quantize_int8(rand(9, 4)), None, 2),
            (leaf(3, 4), leaf(9, 4), *lutra.scan.quantize_int8(rand(9, 4)), bytes_[0, :2].clone(), 2, "l2"),
        ],
        "pq": [(leaf(2, 8), torch.randint(0, 4, (6, 2), dtype=torch.uint8), leaf(2, 4, 4), 3)],
        "binary": [(bytes_[:2], bytes_, None, 3), (bytes_[:2], bytes_, bytes_[0, :1], 9, "jaccard")],
        "pack4": [(bytes_,)],
        "unpack4": [(ops.pack4(bytes_), 3, bytes_.shape[1])],
        "fast_scan": [
            (fixed(2, bytes_.shape[1], 16), ops.pack4(bytes_), None, None, None, None, 5, 3),
            (
                fixed(1, bytes_.shape[1], 16),
                ops.pack4(bytes_),
                fixed(1),
                fixed(5),
                fixed(5),
                None,
                5,
                7,
                "l2",
            ),
        ],
        "rescore_bits": [(fixed(2, 30), bytes_, IDS, 2)],
        "binarize": [(fixed(2, 3, 20),), (fixed(7, 4), fixed(4), 0.0)],
        "quantize_rows": [(fixed(7, 4),), (fixed(7, 4), "int8")],
        "dequantize_rows": [(bytes_, *quantized)],
        "token_ngrams": [(FLAT, OFFSETS, 2, 100), (IDS, None, 3, 50, 7, False)],
    }


def samples(name, dtype=torch.float32, grad=True):
    return all_samples(dtype, grad)[name]


#: Ops that are not here are in test_torch_opcheck.py or in a file of their own (see the rule there).
NAMES = sorted(all_samples())


def takes_gradients(name):
    return any(isinstance(a, torch.Tensor) and a.requires_grad for args in samples(name) for a in args)


#: Ops with a gradient, and their differentiable results.
DIFFERENTIABLE = {
    "sign_hash": 1, "bag": 0, "tables": 0, "memory_linear": 0, "embedding": 0, "knn": 0, "nearest": 0,
    "rescore": 0, "pq": 0, "embedding_dense_backward": 0,
}  # fmt: skip


def result(name, args):
    out = getattr(ops, name)(*args)
    return out[DIFFERENTIABLE[name]] if isinstance(out, tuple) else out


# ---------------------------------------------------------------- schema, fake tensors, autograd registration
@pytest.mark.traces
@pytest.mark.parametrize(
    "grad, name", [(g, n) for n in NAMES for g in (False, True)[: 1 + takes_gradients(n)]]
)
def test_opcheck(grad, name):
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    integers = name in ("sign_hash", "memory_linear", "knn", "nearest", "rescore", "pq")
    # aot_dispatch sums the results and differentiates the sum; where one is of integers, torch cannot; the
    # layers' and ops' compilation is tested below. Sparse gradients have no strides to compare.
    if not (grad and (integers or name == "embedding")):
        utils.append("test_aot_dispatch_dynamic")
    for args in samples(name, grad=grad):
        torch.library.opcheck(getattr(ops, name).default, args, test_utils=utils)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_have_the_real_ones_shapes(name):
    for args in samples(name, grad=False):
        real = getattr(ops, name)(*args)
        if name in ("token_ngrams", "bag_backward_rows", "range_search"):  # the values decide the shape
            continue
        meta = getattr(ops, name)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        pairs = zip(real, meta) if isinstance(real, tuple) else [(real, meta)]
        for a, b in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype and b.device.type == "meta"


def test_fake_tensor_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = nn.MemoryLinear(16, 5)
        out = layer(torch.randn(3, 2, 16))
        assert out.shape == (3, 2, 5) and out.requires_grad
        out.sum().backward()
        assert layer.tables.grad.shape == layer.tables.shape
        assert lutra.address.sign_hash(torch.randn(3, 16)).codes.dtype == torch.int32
        assert nn.EmbeddingBag(7, 4)(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 4)
        assert nn.Embedding(7, 4)(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 4)


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("name", sorted(set(DIFFERENTIABLE) - {"embedding"}))
def test_gradcheck(name):
    for args in samples(name, torch.float64):
        if name == "bag" and args[0].dtype == torch.uint8:
            continue  # its weights are used in float32
        if not torch.isfinite(result(name, args)).all():
            continue  # the padding of k > n
        assert torch.autograd.gradcheck(lambda *a: result(name, a), args)


def test_gradcheck_of_the_sparse_look_up():
    for args in samples("embedding", torch.float64):
        weight, ids, *rest = args
        (got,) = torch.autograd.grad(ops.embedding(weight, ids, *rest).square().sum(), weight)
        assert got.is_coalesced()
        want = torch.zeros_like(weight)
        for i in ids.flatten().tolist():
            if not rest or i != rest[0]:
                want[i] += 2 * weight[i].detach()
        torch.testing.assert_close(got.to_dense(), want)


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_no_grad_and_inference_mode(name):
    for args in samples(name):
        out = result(name, args)
        assert out.requires_grad and out.grad_fn is not None
        with torch.no_grad():
            assert not result(name, args).requires_grad
            assert torch.equal(result(name, args), out)
        with torch.inference_mode():
            assert torch.equal(result(name, args), out)
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        assert not result(name, detached).requires_grad


def test_integer_results_have_no_gradient():
    codes, weights = ops.sign_hash(rand(3, 8, grad=True), 4)
    assert not codes.requires_grad and weights.requires_grad
    scores, ids = ops.knn(rand(3, 4, grad=True), rand(9, 4), 2)
    assert not ids.requires_grad and scores.requires_grad


@pytest.mark.parametrize("name", ["sign_hash", "memory_linear", "tables", "bag", "embedding"])
def test_second_derivatives_raise_and_never_vanish(name):
    for args in samples(name):
        leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        if name == "embedding_dense_backward":
            continue
        scale = torch.ones((), requires_grad=True)
        first = torch.autograd.grad((result(name, args) * scale).sum(), leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match="not differentiable"):
            torch.autograd.grad(sum(f.to_dense().square().sum() for f in first), scale)


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_forward_mode_raises_and_never_vanishes(name):
    from torch.autograd import forward_ad

    for args in samples(name, grad=False):
        first = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point())

        def run(t, args=args, first=first):
            return result(name, (*args[:first], t, *args[first + 1 :]))

        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(run, (args[first],), (torch.ones_like(args[first]),))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            run(forward_ad.make_dual(args[first], torch.ones_like(args[first])))
        with forward_ad.dual_level():  # a level alone is no derivative
            run(args[first])


def test_forward_mode_through_the_public_functions():
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: lutra.address.sign_hash(x, 4).weights, (rand(8),), (rand(8),))
    layer = nn.MemoryLinear(8, 3)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jacfwd(layer)(rand(8))


# ---------------------------------------------------------------- torch.func
@pytest.mark.parametrize("name", sorted(set(DIFFERENTIABLE) - {"embedding"}))
def test_torch_func_grad_and_vjp(name):
    for args in samples(name):
        first = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad)
        expected = torch.autograd.grad(result(name, args).square().sum(), args[first])[0]

        def run(t, args=args, first=first):
            return result(name, (*args[:first], t, *args[first + 1 :]))

        got = torch.func.grad(lambda t, run=run: run(t).square().sum())(args[first].detach())
        torch.testing.assert_close(got, expected)
        out, pull = torch.func.vjp(run, args[first].detach())
        torch.testing.assert_close(pull(2 * out)[0], expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_per_sample_gradients():
    """vmap works, by a loop over the samples."""
    layer = nn.MemoryLinear(16, 3, 4)
    x = rand(5, 16)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    got = torch.func.vmap(lambda row: lutra.address.sign_hash(row, 4).weights)(x)
    torch.testing.assert_close(got, lutra.address.sign_hash(x, 4).weights)
    table = rand(7, 4)
    got = torch.func.vmap(lambda ids: lutra.gather.bag(table, ids))(torch.stack([IDS, IDS + 0]))
    torch.testing.assert_close(got[0], lutra.gather.bag(table, IDS))

    parameters = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(p, row):
        return torch.func.functional_call(layer, p, (row,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        layer.zero_grad()
        layer(x[i]).square().sum().backward()
        for k, v in layer.named_parameters():
            torch.testing.assert_close(grads[k][i], v.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_jacrev():
    layer = nn.MemoryLinear(8, 3, 4)
    x = rand(8)
    got = torch.func.jacrev(layer)(x)
    want = torch.stack(
        [
            torch.autograd.grad(layer(leaf)[i], leaf)[0]
            for i, leaf in ((i, x.clone().requires_grad_()) for i in range(3))
        ]
    )
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------- tracing and compilation
def bags(n, length=3):
    return torch.arange(length * n).reshape(n, length) % 7


LAYERS = {
    "MemoryLinear": (lambda: nn.MemoryLinear(16, 5), lambda n: rand(n, 16)),
    "MemoryLinear scaled": (lambda: nn.MemoryLinear(16, 5, 4, False, "scaled"), lambda n: rand(n, 2, 16)),
    "Embedding": (lambda: nn.Embedding(7, 4, padding_idx=1), bags),
    "Embedding sparse": (lambda: nn.Embedding(7, 4, sparse=True), lambda n: torch.arange(3 * n) % 7),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(7, 4), bags),
    "EmbeddingBag max": (lambda: nn.EmbeddingBag(7, 4, mode="max"), lambda n: bags(n, 2)),
    "EmbeddingBag sparse": (
        lambda: nn.EmbeddingBag(7, 4, mode="sum", sparse=True), bags,
    ),
    "EmbeddingBag by frequency": (
        lambda: nn.EmbeddingBag(7, 4, mode="sum", scale_grad_by_freq=True, padding_idx=0),
        bags,
    ),
}  # fmt: skip


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters_grad(layer):
    return [None if p.grad is None else p.grad.to_dense() for p in layer.parameters()]


@pytest.mark.traces
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
# None: the first size is compiled for itself, the second as any size
@pytest.mark.parametrize(
    "name, dynamic", [(n, None) for n in LAYERS] + [("MemoryLinear", d) for d in (False, True)]
)
def test_compile_fullgraph(name, dynamic, backend):
    torch.manual_seed(0)
    make, data = LAYERS[name]
    layer = make()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for n in (2, 3, 5):
        results = []
        for f in (layer, compiled):
            layer.zero_grad()
            x = data(n)
            if x.is_floating_point():
                x.requires_grad_()
            out = f(x)
            out.square().sum().backward()
            results.append([out.detach(), *parameters_grad(layer), x.grad])
        torch.testing.assert_close(results[0], results[1])
        with torch.no_grad():
            torch.testing.assert_close(compiled(data(n)), results[0][0])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("sparse", [True])
def test_compile_the_sparse_look_up_above_its_threshold(monkeypatch, sparse):
    from lutra.nn import _embedding

    monkeypatch.setattr(_embedding, "ENOUGH_IDS", 0)
    test_compile_fullgraph("Embedding sparse", None, "aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_the_functions():
    def f(x, table):
        codes, weights = lutra.address.sign_hash(x, 4)
        near = lutra.scan.knn(x, table, 2)
        return (weights * codes).sum(1) + near.scores.sum(1) + lutra.gather.bag(table, near.ids).sum(1)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for n in (2, 3):
        x, table = rand(n, 8, grad=True), rand(9, 8, grad=True)
        want = torch.autograd.grad(f(x, table).sum(), (x, table))
        got = torch.autograd.grad(compiled(x, table).sum(), (x, table))
        torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_under_autocast():
    layer = nn.MemoryLinear(16, 5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(rand(3, 16))
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, layer(rand(3, 16)))


@pytest.mark.traces
@pytest.mark.parametrize("name", list(LAYERS))
def test_export(name):
    make, data = LAYERS[name]
    layer = make()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (data(3),), dynamic_shapes=({0: batch},)).module()
    for n in (2, 3, 7):
        torch.testing.assert_close(exported(data(n)), layer(data(n)))


def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = nn.MemoryLinear(16, 5)
    x = rand(3, 16)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        assert any(n.target is ops.memory_linear.default for n in graph.graph.nodes)
        torch.testing.assert_close(graph(x), layer(x))
    graph = make_fx(torch.func.grad(lambda x: lutra.address.sign_hash(x, 4).weights.square().sum()))(x)
    assert any(n.target is ops.sign_hash_backward.default for n in graph.graph.nodes)
    leaf = x.clone().requires_grad_()
    lutra.address.sign_hash(leaf, 4).weights.square().sum().backward()
    torch.testing.assert_close(graph(x), leaf.grad)


def test_jit_trace_keeps_the_op():
    layer = nn.MemoryLinear(16, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, rand(3, 16))
    assert "lutra::memory_linear" in str(traced.graph)
    torch.testing.assert_close(traced(rand(4, 16)), layer(rand(4, 16)))


# ---------------------------------------------------------------- what may bypass the dispatcher
def test_plain():
    x = rand(3)
    assert plain(x, None, torch.nn.Parameter(x, requires_grad=False))
    assert not plain(x, rand(3, grad=True))
    with torch.no_grad():
        assert plain(rand(3, grad=True))

    class Sub(torch.Tensor):
        pass

    assert not plain(x.as_subclass(Sub))
    assert not plain(x.to("meta"))
    assert not plain(torch._neg_view(x))
    with torch.overrides.TorchFunctionMode():
        pass
    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Log():
        lutra.address.sign_hash(rand(2, 8))
        nn.MemoryLinear(8, 2).requires_grad_(False)(rand(2, 8))
    assert "lutra.sign_hash.default" in seen and "lutra.memory_linear.default" in seen


def test_tensor_subclasses_see_the_op():
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = rand(2, 16).as_subclass(Logged)
    out = nn.MemoryLinear(16, 3)(x)
    assert isinstance(out, Logged) and any("memory_linear" in s for s in seen)


@pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")
@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_gradients_do_not_depend_on_the_number_of_threads(name):
    results = []
    for threads in (1, 2, 4):
        _backend.core.set_num_threads(threads)
        try:
            found = []
            for args in samples(name):
                leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
                out = result(name, args)
                found += [out, *(g.to_dense() for g in torch.autograd.grad(out.square().sum(), leaves))]
            results.append(found)
        finally:
            _backend.core.set_num_threads(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
