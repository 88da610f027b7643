"""The scans on torch tensors: the same results, and gradients of the scores."""

import numpy as np
import pytest

import lutra

torch = pytest.importorskip("torch")

METRICS = ("ip", "l2", "cosine")


@pytest.mark.parametrize("metric", METRICS)
def test_same_as_numpy(metric):
    rng = np.random.default_rng(0)
    q, x = (rng.standard_normal((n, 21)).astype(np.float32) for n in (7, 50))
    got, want = lutra.scan.knn(torch.tensor(q), torch.tensor(x), 60, metric), lutra.scan.knn(q, x, 60, metric)
    assert got.ids.dtype == torch.int64 and got.scores.dtype == torch.float32
    np.testing.assert_array_equal(got.ids.numpy(), want.ids)
    np.testing.assert_array_equal(got.scores.numpy(), want.scores)
    strided = torch.tensor(np.repeat(x, 2, 1))[:, ::2]
    np.testing.assert_array_equal(lutra.scan.knn(torch.tensor(q), strided, 60, metric).ids.numpy(), want.ids)
    with pytest.raises(TypeError, match="database must be a torch tensor, as queries is"):
        lutra.scan.knn(torch.tensor(q), x)


def finite(scores):
    return torch.where(torch.isfinite(scores), scores, 0)


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("metric", METRICS)
def test_gradients(metric, dtype):
    """float64 is the reference; float32 is the kernel, with what fp32 allows for."""
    torch.manual_seed(0)
    q, x = (
        torch.randn(3, 6, dtype=dtype, requires_grad=True),
        torch.randn(9, 6, dtype=dtype, requires_grad=True),
    )
    candidates = torch.randint(-1, 9, (3, 5))
    options = {} if dtype == torch.float64 else {"eps": 1e-2, "atol": 2e-2, "rtol": 2e-2, "nondet_tol": 1e-6}
    # k = 12 > 9: the padding has no gradient; every row is taken, so that no selection flips in a small step
    assert torch.autograd.gradcheck(
        lambda a, b: finite(lutra.scan.knn(a, b, 12, metric).scores).sum(1), (q, x), **options
    )
    assert torch.autograd.gradcheck(
        lambda a, b: finite(lutra.scan.rescore(a, b, candidates, 6, metric).scores).sum(1), (q, x), **options
    )
    if metric != "cosine":
        codes, books = (
            torch.randint(0, 5, (8, 3), dtype=torch.uint8),
            torch.randn(3, 5, 2, dtype=dtype, requires_grad=True),
        )
        assert torch.autograd.gradcheck(
            lambda a, b: finite(lutra.scan.pq(a, codes, b, 9, metric).scores).sum(1), (q, books), **options
        )
        assert torch.autograd.gradcheck(
            lambda a, b: lutra.address.nearest(a, b, 9, metric).scores.sum(1), (q, x), **options
        )


def test_cosine_of_a_zero_vector_has_no_gradient():
    q = torch.zeros(2, 4, requires_grad=True)
    x = torch.randn(5, 4, requires_grad=True)
    lutra.scan.knn(q, x, 5, "cosine").scores.sum().backward()
    assert q.grad.abs().sum() == 0 and torch.isfinite(x.grad).all()


def test_compiles():
    q, x = torch.randn(3, 6, requires_grad=True), torch.randn(9, 6)

    def loss(q, x):
        return lutra.scan.knn(q, x, 2).scores.sum() + lutra.address.nearest(q, x).scores.sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(q, x).backward()
    compiled, q.grad = q.grad, None
    loss(q, x).backward()
    torch.testing.assert_close(compiled, q.grad)


def test_default_device_does_not_matter():
    q, x = torch.randn(3, 6), torch.randn(9, 6)
    with torch.device("meta"):
        assert lutra.scan.knn(q, x, 2).ids.device.type == "cpu"
    assert lutra.scan.knn(q.T.contiguous().T, x, 2).ids.device.type == "cpu"
