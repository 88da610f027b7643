"""lutra.nn.Embedding against torch.nn.Embedding."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest

from lutra import _backend

torch = pytest.importorskip("torch")
nn = pytest.importorskip("lutra.nn")
from lutra.nn import _embedding  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Sums in float32 here, in the table's type in torch.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-12}


@pytest.fixture(autouse=True, params=["lutra", "torch"])
def path(request, monkeypatch):
    """Every test with lutra's gradient whatever the number of ids, and with the threshold as it is."""
    if request.param == "lutra":
        monkeypatch.setattr(_embedding, "ENOUGH_IDS", 0)
    return request.param


def pair(rows=13, dim=5, dtype=torch.float32, **options):
    """The same layer twice: lutra's and torch's."""
    torch.manual_seed(0)
    ours = nn.Embedding(rows, dim, dtype=dtype, **options)
    theirs = torch.nn.Embedding(rows, dim, dtype=dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same(ours, theirs, ids):
    """Equal outputs, equal tables afterwards (max_norm), equal gradients."""
    torch.manual_seed(1)
    ours.zero_grad()
    theirs.zero_grad()
    tolerance = TOLERANCE[ours.weight.dtype]
    a, b = ours(ids), theirs(ids)
    assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(ours.weight, theirs.weight)
    grad = torch.randn(a.shape).to(a.dtype)
    a.backward(grad)
    b.backward(grad)
    ga, gb = ours.weight.grad, theirs.weight.grad
    assert ga.layout == gb.layout and ga.dtype == gb.dtype and ga.shape == gb.shape
    if ours.sparse and ours.weight.dtype != torch.float64 and _embedding.ENOUGH_IDS == 0:
        rows = ga._indices()[0]
        padding = ours.padding_idx
        expected = ids[ids != (-1 if padding is None else padding)].long().unique()
        assert torch.equal(rows, expected)  # sorted, each once
        torch.sparse_coo_tensor(ga._indices(), ga._values(), ga.shape, check_invariants=True)
    torch.testing.assert_close(ga.to_dense(), gb.to_dense(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_dense_gradient_of_a_large_table(dtype, padding_idx, by_frequency):
    """Few rows of many: only they are written."""
    options = {"dtype": dtype, "padding_idx": padding_idx, "scale_grad_by_freq": by_frequency}
    ours, theirs = pair(40_000, 64, **options)
    for n in (0, 1, 50, 9_999, 10_001):  # the last one writes the whole gradient
        ids = ids_of(n, rows=40_000 if n > 50 else 9)
        assert_same(ours, theirs, ids)
        assert ours.weight.grad.is_contiguous()
    assert_same(ours, theirs, ids_of(3, 4, rows=9))
    ours(ids_of(5)).sum().backward()  # added to what is there
    theirs(ids_of(5)).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    step = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    step.step()
    ours.weight.grad.zero_()
    assert not ours.weight.grad.any()


def test_second_derivative_of_a_large_table():
    ours, theirs = pair(40_000, 64, padding_idx=3)
    found = []
    for layer in (ours, theirs):
        scale = torch.ones(6, 1, requires_grad=True)
        (g,) = torch.autograd.grad(
            (layer(torch.tensor([1, 3, 1, 5, 2, 9])) * scale).sum(), layer.weight, create_graph=True
        )
        found.append(torch.autograd.grad(g.square().sum(), scale)[0])
    torch.testing.assert_close(*found)


def ids_of(*shape, rows=13, dtype=torch.int64, seed=0):
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_signatures_are_torchs():
    for name in ("__init__", "from_pretrained"):
        assert inspect.signature(getattr(nn.Embedding, name)) == inspect.signature(
            getattr(torch.nn.Embedding, name)
        )
    assert issubclass(nn.Embedding, torch.nn.Embedding)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4), (0,), (3, 0)])
def test_every_shape_and_dtype(sparse, dtype, id_dtype, shape):
    assert_same(*pair(dtype=dtype, sparse=sparse), ids_of(*shape, dtype=id_dtype))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 0, 4, -1])
@pytest.mark.parametrize(
    "max_norm, norm_type", [(None, 2.0), (1.0, 2.0), (1.5, 1.0), (0.7, 3.5), (1.0, float("inf"))]
)
def test_padding_and_max_norm(sparse, padding_idx, max_norm, norm_type):
    ours, theirs = pair(sparse=sparse, padding_idx=padding_idx, max_norm=max_norm, norm_type=norm_type)
    assert_same(ours, theirs, ids_of(4, 6))
    assert_same(ours, theirs, ids_of(4, 6, seed=3)[:, ::2])
    if padding_idx is not None:
        assert not ours.weight.grad.to_dense()[padding_idx].any()


def test_max_norm_touches_the_visited_rows_only():
    ours, _ = pair(max_norm=0.1, sparse=True)
    before = ours.weight.detach().clone()
    ours(torch.tensor([2, 5]))
    changed = (ours.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [2, 5]
    assert ours.weight[[2, 5]].norm(dim=1).max() <= 0.1 + 1e-5
    with torch.no_grad():
        ours(torch.tensor([7]))
    assert ours.weight[7].norm() <= 0.1 + 1e-5


def test_scale_grad_by_freq():
    assert_same(*pair(scale_grad_by_freq=True), ids_of(40))
    assert_same(*pair(scale_grad_by_freq=True, padding_idx=2), ids_of(40))
    ours, _ = pair(scale_grad_by_freq=True, sparse=True)  # torch refuses this pair: compare with dense
    dense, _ = pair(scale_grad_by_freq=True)
    ids = ids_of(40)
    ours(ids).square().sum().backward()
    dense(ids).square().sum().backward()
    assert ours.weight.grad.is_sparse and ours.weight.grad._nnz() == ids.unique().numel()
    torch.testing.assert_close(ours.weight.grad.to_dense(), dense.weight.grad)


@pytest.mark.parametrize("optimizer", ["SGD", "SparseAdam", "Adagrad"])
def test_optimizers_take_the_sparse_gradient(optimizer):
    ours, theirs = pair(sparse=True, padding_idx=3)
    steps = [getattr(torch.optim, optimizer)(layer.parameters(), lr=0.1) for layer in (ours, theirs)]
    for i in range(5):
        for layer, step in zip((ours, theirs), steps):
            step.zero_grad()
            layer(ids_of(3, 7, seed=i)).square().sum().backward()
            step.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_gradients_add_up_over_calls():
    ours, theirs = pair(sparse=True)
    for layer in (ours, theirs):
        layer(ids_of(5, seed=1)).square().sum().backward()
        (layer(ids_of(6, seed=2)) * layer(ids_of(6, seed=3))).sum().backward()
    torch.testing.assert_close(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())


def test_from_pretrained():
    table = torch.randn(6, 4)
    layer = nn.Embedding.from_pretrained(table)
    assert type(layer) is nn.Embedding and not layer.weight.requires_grad
    assert torch.equal(layer(torch.tensor([5, 0])), table[[5, 0]])
    layer = nn.Embedding.from_pretrained(
        table, freeze=False, padding_idx=-2, max_norm=2.0, norm_type=1.0, scale_grad_by_freq=True, sparse=True
    )
    assert layer.weight.requires_grad and layer.padding_idx == 4 and layer.max_norm == 2.0
    assert layer.norm_type == 1.0 and layer.scale_grad_by_freq and layer.sparse
    assert nn.Embedding(6, 4, _weight=table, _freeze=True).weight.requires_grad is False


def test_state_repr_and_copies():
    ours, theirs = pair(padding_idx=1, max_norm=2.0, sparse=True)
    assert repr(ours) == repr(theirs)
    theirs.weight.data.mul_(2)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    torch.nn.Embedding(13, 5).load_state_dict(torch.load(buffer, weights_only=True))
    ids = ids_of(4)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is nn.Embedding and torch.equal(twin(ids), ours(ids))
        twin(ids).sum().backward()
        assert twin.weight.grad.is_sparse and ours.weight.grad is None


@pytest.mark.parametrize("sparse", [False, True])
def test_bad_ids(sparse):
    ours, _ = pair(sparse=sparse)
    for ids in ([13], [-1], [0, 99]):
        with pytest.raises(IndexError):
            ours(torch.tensor(ids))
    with pytest.raises((TypeError, RuntimeError)):
        ours(torch.tensor([0.5]))


@pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")
def test_threads_do_not_change_a_bit():
    grads = []
    ids, grad = ids_of(5000), torch.randn(5000, 5)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            ours, _ = pair(sparse=True)
            ours(ids).backward(grad)
            grads.append(ours.weight.grad)
            assert ours.weight.grad._nnz() == 13  # above the threshold: each row once
        finally:
            torch.set_num_threads(2)
    for other in grads[1:]:
        assert torch.equal(grads[0]._indices(), other._indices())
        assert torch.equal(grads[0]._values(), other._values())


def test_frozen_table_and_no_grad():
    ours, theirs = pair(sparse=True)
    with torch.no_grad():
        assert not ours(ids_of(3)).requires_grad
    with torch.inference_mode():
        assert torch.equal(ours(ids_of(3)), theirs(ids_of(3)))
    ours.weight.requires_grad_(False)
    assert not ours(ids_of(3)).requires_grad


def test_second_derivatives(path):
    """The touched rows' gradient has none; what counts is that nothing vanishes in silence."""
    for sparse in (True, False):
        ours, _ = pair(sparse=sparse)
        scale = torch.ones((), requires_grad=True)
        (g,) = torch.autograd.grad((ours(ids_of(4)) * scale).sum(), ours.weight, create_graph=True)
        if sparse and path == "lutra":
            with pytest.raises(NotImplementedError, match="second derivatives"):
                torch.autograd.grad(g.to_dense().sum(), scale)
        else:
            assert torch.autograd.grad(g.to_dense().sum(), scale)[0].item() == 4 * 5
