"""lutra.nn.EmbeddingBag against torch.nn.EmbeddingBag."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest

from lutra import _backend

torch = pytest.importorskip("torch")
nn = pytest.importorskip("lutra.nn")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Sums in float32 here, in the table's type in torch.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-2, torch.bfloat16: 2e-1, torch.float64: 1e-12}
MODES = ("sum", "mean", "max")
ROWS, DIM = 13, 17


def pair(dtype=torch.float32, **options):
    torch.manual_seed(0)
    ours = nn.EmbeddingBag(ROWS, DIM, dtype=dtype, **options)
    theirs = torch.nn.EmbeddingBag(ROWS, DIM, dtype=dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def ids_of(*shape, dtype=torch.int64, seed=0):
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(ours, theirs, ids, offsets=None, weights=None):
    """Equal outputs, tables (max_norm) and gradients of table and weights."""
    torch.manual_seed(1)
    tolerance = TOLERANCE[ours.weight.dtype]
    results = []
    grad = None
    for layer in (ours, theirs):
        layer.zero_grad()
        w = None if weights is None else weights.detach().clone().requires_grad_()
        out = layer(ids, offsets, w)
        if grad is None:
            grad = torch.randn(out.shape).to(out.dtype)
        out.backward(grad)
        table = layer.weight.grad
        if layer is ours and ours.sparse and ours.weight.dtype != torch.float64:
            rows = table._indices()[0]
            assert torch.equal(rows, rows.unique())  # each once, in increasing order
        results.append((out.detach(), layer.weight.detach(), table.to_dense(), None if w is None else w.grad))
        assert table.is_sparse == ours.sparse
    for name, a, b in zip(("out", "table", "grad", "weights"), *results):
        if b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_signatures_are_torchs():
    for name in ("__init__", "from_pretrained"):
        assert inspect.signature(getattr(nn.EmbeddingBag, name)) == inspect.signature(
            getattr(torch.nn.EmbeddingBag, name)
        )
    ours, theirs = (inspect.signature(c.forward).parameters for c in (nn.EmbeddingBag, torch.nn.EmbeddingBag))
    assert list(ours) == list(theirs)
    assert issubclass(nn.EmbeddingBag, torch.nn.EmbeddingBag)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_every_dtype(mode, dtype, id_dtype):
    ours, theirs = pair(dtype, mode=mode)
    assert_same(ours, theirs, ids_of(4, 5, dtype=id_dtype))
    assert_same(ours, theirs, ids_of(9, dtype=id_dtype), torch.tensor([0, 3, 3, 8], dtype=id_dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 0, 5, -1])
@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_offsets_and_padding(mode, padding_idx, include_last_offset, sparse):
    options = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": include_last_offset}
    if mode == "max" and sparse:
        ours, theirs = pair(sparse=True, **options)
        for layer in (ours, theirs):
            with pytest.raises(ValueError, match="max"):
                layer(ids_of(2, 3))
        return
    ours, theirs = pair(sparse=sparse, **options)
    ids = ids_of(20)
    ids[2:6] = 5
    last = [20] if include_last_offset else []
    for starts in ([0, 4, 4, 11], [0], [0, 0, 20], list(range(20))):
        assert_same(ours, theirs, ids, torch.tensor(starts + last))
    assert_same(ours, theirs, ids.reshape(4, 5))
    assert_same(ours, theirs, ids_of(5, 8)[:, ::2])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_per_sample_weights(sparse, dtype, padding_idx):
    ours, theirs = pair(dtype, mode="sum", sparse=sparse, padding_idx=padding_idx)
    assert_same(ours, theirs, ids_of(4, 5), weights=torch.randn(4, 5).to(dtype))
    assert_same(ours, theirs, ids_of(20), torch.tensor([0, 0, 7]), torch.randn(20).to(dtype))


@pytest.mark.parametrize("mode", MODES)
def test_empty(mode):
    ours, theirs = pair(mode=mode)
    for shape in ((0, 4), (0, 0)):
        out = ours(torch.zeros(shape, dtype=torch.int64))
        assert out.shape == (0, DIM)
        out.sum().backward()
        assert not ours.weight.grad.any()
    assert not ours(torch.zeros(3, 0, dtype=torch.int64)).any()
    assert_same(ours, theirs, torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_norm, norm_type", [(1.0, 2.0), (2.0, 1.0), (0.5, float("inf"))])
def test_max_norm(mode, max_norm, norm_type):
    ours, theirs = pair(mode=mode, max_norm=max_norm, norm_type=norm_type)
    before = ours.weight.detach().clone()
    ids = torch.tensor([[1, 4], [4, 7]])
    assert_same(ours, theirs, ids)
    changed = (ours.weight != before).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= {1, 4, 7} and len(changed)
    assert_same(ours, theirs, ids_of(12), torch.tensor([0, 5]))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_scale_grad_by_freq(mode, sparse, id_dtype):
    """Against torch.nn.Embedding: torch 2.13's EmbeddingBag takes another row's count on the CPU."""
    ours, _ = pair(mode=mode, scale_grad_by_freq=True, sparse=sparse)
    ids = ids_of(6, 7, dtype=id_dtype)
    for offsets, lengths in ((None, [7] * 6), (torch.tensor([0, 9, 9, 20]), [9, 0, 11, 22])):
        for weights in (None, torch.randn(42)) if mode == "sum" else (None,):
            rows = torch.nn.Embedding(ROWS, DIM, scale_grad_by_freq=True)
            rows.load_state_dict(ours.state_dict())
            parts = rows(ids.flatten()) * (1 if weights is None else weights[:, None])
            expected = torch.stack(
                [getattr(p, mode)(0) if len(p) else p.sum(0) for p in parts.split(lengths)]
            )
            if offsets is None:
                out = ours(ids, None, None if weights is None else weights.reshape(6, 7))
            else:
                out = ours(ids.flatten(), offsets.to(id_dtype), weights)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            ours.zero_grad()
            grad = torch.randn_like(out)
            out.backward(grad)
            expected.backward(grad)
            assert ours.weight.grad.is_sparse == sparse
            torch.testing.assert_close(ours.weight.grad.to_dense(), rows.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_gradient_of_a_large_table(mode, dtype):
    """Few rows of many: only they are written."""
    torch.manual_seed(0)
    ours = nn.EmbeddingBag(40_000, 64, mode=mode, dtype=dtype)
    theirs = torch.nn.EmbeddingBag(40_000, 64, mode=mode, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    for n in (0, 1, 50, 3_000):
        assert_same(ours, theirs, torch.randint(0, 40_000, (n, 3)))


@pytest.mark.parametrize("optimizer", ["SGD", "SparseAdam", "Adagrad"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_optimizers_take_the_sparse_gradient(optimizer, mode):
    ours, theirs = pair(mode=mode, sparse=True)
    steps = [getattr(torch.optim, optimizer)(layer.parameters(), lr=0.1) for layer in (ours, theirs)]
    for i in range(5):
        for layer, step in zip((ours, theirs), steps):
            step.zero_grad()
            layer(ids_of(3, 7, seed=i)).square().sum().backward()
            step.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    ours, _ = pair(torch.float64, mode="sum")
    weights = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ids = ids_of(3, 4)
    assert torch.autograd.gradcheck(lambda w: ours(ids, None, w), (weights,))
    assert torch.autograd.gradcheck(
        lambda table: torch.func.functional_call(ours, {"weight": table}, (ids,)), (ours.weight,)
    )


def test_from_pretrained():
    table = torch.randn(6, 4)
    layer = nn.EmbeddingBag.from_pretrained(table)
    assert type(layer) is nn.EmbeddingBag and not layer.weight.requires_grad and layer.mode == "mean"
    torch.testing.assert_close(layer(torch.tensor([[5, 0]])), table[[5, 0]].mean(0, keepdim=True))
    layer = nn.EmbeddingBag.from_pretrained(
        table, freeze=False, max_norm=2.0, norm_type=1.0, scale_grad_by_freq=True, mode="sum", sparse=True,
        include_last_offset=True, padding_idx=-2,
    )  # fmt: skip
    assert layer.weight.requires_grad and layer.padding_idx == 4 and layer.max_norm == 2.0 and layer.sparse
    assert (
        layer.norm_type == 1.0
        and layer.scale_grad_by_freq
        and layer.include_last_offset
        and layer.mode == "sum"
    )
    assert layer(torch.tensor([1, 2]), torch.tensor([0, 1, 2])).shape == (2, 4)


def test_state_repr_and_copies():
    ours, theirs = pair(mode="sum", padding_idx=1, max_norm=2.0)
    assert repr(ours) == repr(theirs)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer, weights_only=True))
    ids = ids_of(2, 4)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is nn.EmbeddingBag and twin.padding_idx == 1
        torch.testing.assert_close(twin(ids), ours(ids))


def test_nested_input():
    ours, theirs = pair(mode="sum")
    ids = torch.nested.nested_tensor([torch.tensor([1, 2, 3]), torch.tensor([4])], layout=torch.jagged)
    torch.testing.assert_close(ours(ids), theirs(ids))


def test_modes_of_use():
    ours, theirs = pair(mode="mean")
    ids = ids_of(4, 5)
    expected = ours(ids)
    with torch.no_grad():
        assert torch.equal(ours(ids), expected) and not ours(ids).requires_grad
    with torch.inference_mode():
        assert torch.equal(ours(ids), expected) and ours(ids).is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(ids).dtype == theirs(ids).dtype
    meta = nn.EmbeddingBag(ROWS, DIM, device="meta")
    assert meta(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, DIM)


@pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparse", [False, True])
def test_threads_do_not_change_a_bit(mode, sparse):
    if mode == "max" and sparse:
        pytest.skip("torch forbids it")
    ids, grad, results = ids_of(500, 9), torch.randn(500, DIM), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            ours, _ = pair(mode=mode, sparse=sparse)
            out = ours(ids)
            out.backward(grad)
            results.append((out.detach(), ours.weight.grad.to_dense()))
        finally:
            torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize(
    "options, call, error",
    [
        ({}, lambda m: m(torch.tensor([1, 2])), ValueError),
        ({}, lambda m: m(torch.tensor([[1, 2]]), torch.tensor([0])), ValueError),
        ({}, lambda m: m(torch.tensor([[[1]]])), ValueError),
        ({}, lambda m: m(torch.tensor([1, 2]), torch.tensor([[0]])), ValueError),
        ({"mode": "min"}, lambda m: m(torch.tensor([[1, 2]])), ValueError),
        ({"mode": "max", "scale_grad_by_freq": True}, lambda m: m(torch.tensor([[1, 2]])), ValueError),
        ({"mode": "max", "sparse": True}, lambda m: m(torch.tensor([[1, 2]])), ValueError),
        ({"mode": "sum"}, lambda m: m(torch.tensor([[1, 2]]), None, torch.ones(1, 3)), ValueError),
        ({"mode": "mean"}, lambda m: m(torch.tensor([[1, 2]]), None, torch.ones(1, 2)), NotImplementedError),
        ({"mode": "max"}, lambda m: m(torch.tensor([[1, 2]]), None, torch.ones(1, 2)), NotImplementedError),
    ],
)
def test_errors_are_of_torchs_kind(options, call, error):
    for layer in pair(**options):
        with pytest.raises(error):
            call(layer)


def test_bad_ids_are_named():
    ours, _ = pair()
    with pytest.raises(IndexError, match=r"ids\[1, 0\] is 13"):
        ours(torch.tensor([[1], [13]]))
    with pytest.raises(IndexError, match=r"ids\[0\] is -1"):
        ours(torch.tensor([-1, 2]), torch.tensor([0]))
    with pytest.raises(IndexError, match=r"offsets\[1\] is 9"):
        ours(torch.tensor([1, 2]), torch.tensor([0, 9]))
    with pytest.raises(TypeError, match="input has dtype"):
        ours(torch.tensor([[0.5]]))
