"""`lutra.gather.update_rows` and `update_bags`: kernel against reference, reference against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lutra
from lutra import _backend
from lutra.gather._update import RULES, STATES, _numbers
from lutra.reference import row_update as reference
from lutra.torch_ops.row_update import random_bits, step_rows

needs_kernels = pytest.mark.skipif(_backend.core is None, reason="needs the CPU module")
DTYPES = ("float32", "float16", "bfloat16")
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-12}
ROWS = 40


def wide(t):
    return (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t).numpy().copy()


def case(dim, dtype="float32", grad_dtype="float32", n=60, seed=0):
    rng = np.random.default_rng([seed, dim])
    table = torch.from_numpy(rng.standard_normal((ROWS, dim))).to(getattr(torch, dtype))
    rows = torch.from_numpy(rng.integers(0, ROWS, n))
    grads = torch.from_numpy(rng.standard_normal((n, dim))).to(getattr(torch, grad_dtype))
    return table, rows, grads


def both(state):
    """s0 and s1, as copies in NumPy."""
    values = [v.numpy().copy() for v in state.values()]
    return (*values, None, None)[:2]


def same_state(state, expected, tolerance=2e-6):
    for got, want in zip(state.values(), expected):
        np.testing.assert_allclose(got, want, rtol=tolerance * 4, atol=tolerance)


OPTIONS = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.8, "betas": (0.8, 0.95), "eps": 1e-3}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(simd_level, rule, dtype):
    for dim in SIZES:
        for kind in ("any", "increasing"):
            table, rows, grads = case(dim, dtype, dtype if dim % 2 else "float32")
            if kind == "increasing":
                rows = rows.unique()
                grads = grads[: len(rows)]
            expected, state = wide(table), lutra.gather.row_state(table, rule)
            s0, s1 = both(state)
            for step in (1, 2):
                lutra.gather.update_rows(table, rows, grads, rule, state, step=step, **OPTIONS)
                numbers = _numbers(rule, *OPTIONS.values(), step)
                reference.update_rows(expected, rows.numpy(), wide(grads), s0, s1, rule, numbers)
                expected = wide(torch.from_numpy(expected).to(table.dtype))
            limit = TOLERANCE[dtype]
            np.testing.assert_allclose(wide(table), expected, rtol=limit * 2, atol=limit * 2)
            same_state(state, (s0, s1), 1e-5)


@pytest.mark.parametrize("mode", ("sum", "mean", "max"))
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_bags(simd_level, mode, grad_dtype):
    rng = np.random.default_rng(1)
    for dim in SIZES:
        for layout in ("fixed", "offsets", "last", "weights"):
            if layout == "weights" and mode != "sum":
                continue
            table = torch.from_numpy(rng.standard_normal((ROWS, dim)).astype(np.float32))
            ids, offsets, last, weights = rng.integers(0, ROWS, (23, 5)), None, False, None
            if layout in ("offsets", "last"):
                ids, offsets = ids.reshape(-1), np.sort(rng.integers(0, 100, 23))
                last = layout == "last"
            if layout == "weights":
                weights = torch.from_numpy(rng.standard_normal(ids.shape).astype(np.float32))
            bags = 22 if last else 23
            grad = torch.from_numpy(rng.standard_normal((bags, dim))).to(getattr(torch, grad_dtype))
            for padding in (None, 3):
                rule = "adagrad" if padding else "sgd"
                state, expected = lutra.gather.row_state(table, rule), wide(table)
                s0, s1 = both(state)
                argmax = None
                options = {"padding_idx": padding, "include_last_offset": last}
                if mode == "max":
                    _, argmax = lutra.reference.gather.bag(
                        expected, ids, offsets, mode="max", return_argmax=True, **options
                    )
                got = table.clone()
                lutra.gather.update_bags(
                    got, grad, torch.from_numpy(ids), None if offsets is None else torch.from_numpy(offsets),
                    weights, optimizer=rule, state=state, lr=0.1, eps=0.01, mode=mode, **options,
                )  # fmt: skip
                reference.update_bags(
                    expected, wide(grad), ids, offsets, None if weights is None else weights.numpy(), argmax,
                    s0, s1, rule, _numbers(rule, 0.1, 0, 0, (0, 0), 0.01, 1), mode, **options,
                )  # fmt: skip
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
                same_state(state, (s0, s1), 1e-5)


@pytest.mark.parametrize("dtype", ("float32", "float64"))
@pytest.mark.parametrize(
    "rule, peer",
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.1)),
        ("adam", lambda p: torch.optim.SparseAdam(p, lr=0.1)),
    ],
)
def test_equal_to_torch(rule, peer, dtype):
    table, _, _ = case(17, dtype)
    parameter = torch.nn.Parameter(table.clone())
    optimizer, state = peer([parameter]), lutra.gather.row_state(table, rule)
    for step in range(1, 5):
        _, rows, grads = case(17, dtype, dtype, seed=step)
        parameter.grad = torch.sparse_coo_tensor(rows[None], grads, table.shape)
        optimizer.step()
        lutra.gather.update_rows(table, rows, grads, rule, state, lr=0.1, step=step)
        torch.testing.assert_close(table, parameter.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_torch_composition_is_the_reference(rule):
    """What runs on CUDA and in float64."""
    for dtype in ("float64", "bfloat16"):
        table, rows, grads = case(9, dtype)
        expected, state = wide(table), lutra.gather.row_state(table, rule)
        s0, s1 = both(state)
        values = (*state.values(), None, None)[:2]
        numbers = _numbers(rule, *OPTIONS.values(), 3)
        seed = 5 if dtype == "bfloat16" else None
        step_rows(table, rows, grads, *values, rule, numbers, seed)
        reference.update_rows(expected, rows.numpy(), grads.numpy(), s0, s1, rule, numbers, seed)
        np.testing.assert_allclose(wide(table), expected, rtol=TOLERANCE[dtype], atol=1e-6)


def test_stochastic_rounding(simd_level):
    rows = torch.tensor([0, 5, 2**40, 3])
    np.testing.assert_array_equal(
        random_bits(2**62 + 7, rows, 33), reference.random_bits(2**62 + 7, rows.numpy(), 33)
    )
    for dim in (3, 16, 33, 64):
        table, rows, grads = case(dim, "bfloat16")
        expected = wide(table)
        lutra.gather.update_rows(table, rows, grads, lr=1e-3, seed=9)
        numbers = _numbers("sgd", 1e-3, 0, 0, (0, 0), None, 1)
        reference.update_rows(expected, rows.numpy(), wide(grads), None, None, "sgd", numbers, 9)
        different = (wide(table) != expected).mean()  # the sums' last bits may tip a value
        assert different < 0.01, different
    # The mean survives: 1000 updates of 1 / 100 of the distance between two bfloat16.
    table = torch.ones(64, 64, dtype=torch.bfloat16)
    every = torch.arange(64)
    for step in range(1000):
        lutra.gather.update_rows(table, every, torch.ones(64, 64), lr=2**-7 / 100, seed=step)
    assert abs(float(table.float().mean()) - (1 - 10 * 2**-7)) < 0.005
    nearest = torch.ones(64, 64, dtype=torch.bfloat16)
    for _ in range(10):
        lutra.gather.update_rows(nearest, every, torch.ones(64, 64), lr=2**-7 / 100)
    assert (nearest == 1).all()
    special = torch.tensor([[float("inf"), -float("inf"), float("nan"), 3e38]], dtype=torch.bfloat16)
    lutra.gather.update_rows(special, torch.tensor([0]), torch.zeros(1, 4), lr=1.0, seed=1)
    assert special[0, 0] == float("inf") and special[0, 1] == -float("inf") and special[0, 2].isnan()


@needs_kernels
def test_same_bits_with_any_number_of_threads(simd_level):
    rng = np.random.default_rng(2)
    start = rng.standard_normal((5000, 48)).astype(np.float32)
    ids, grad = rng.integers(0, 5000, (4000, 9)), rng.standard_normal((4000, 48)).astype(np.float32)
    for rule in RULES:
        results = []
        for n in (1, 2, 3):
            _backend.core.set_num_threads(n)
            table, state = start.copy(), lutra.gather.row_state(start, rule)
            lutra.gather.update_bags(table, grad, ids, optimizer=rule, state=state, lr=0.1)
            results.append([a.tobytes() for a in (table, *state.values())])
        _backend.core.set_num_threads(0)
        assert results[0] == results[1] == results[2]


def test_numpy_in_place(simd_level):
    for dtype in (np.float32, np.float16, np.float64):
        table = np.zeros((6, 5), dtype)
        state = lutra.gather.row_state(table, "adam")
        assert state["exp_avg"].dtype == (np.float64 if dtype == np.float64 else np.float32)
        lutra.gather.update_bags(
            table, np.ones((2, 5), dtype), np.array([[1, 1], [1, 4]], np.int32), optimizer="adam",
            state=state, lr=0.5,
        )  # fmt: skip
        assert (table[[0, 2, 3, 5]] == 0).all()
        np.testing.assert_allclose(table[[1, 4]].astype(np.float32), -0.5, rtol=1e-3)
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    table = np.zeros((6, 5), bfloat16)
    lutra.gather.update_rows(table, np.array([2]), np.ones((1, 5), bfloat16), lr=0.5)
    assert (table[2] == bfloat16(-0.5)).all() and (table[3] == 0).all()


def test_empty(simd_level):
    table = torch.ones(4, 3)
    lutra.gather.update_rows(table, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3), lr=1.0)
    none = torch.zeros(0, dtype=torch.int64)
    lutra.gather.update_bags(table, torch.ones(2, 3), none, torch.zeros(2, dtype=torch.int64), lr=1.0)
    lutra.gather.update_bags(table, torch.ones(0, 3), none.reshape(0, 5), lr=1.0)
    lutra.gather.update_bags(table, torch.ones(1, 3), torch.tensor([[2, 2]]), lr=1.0, padding_idx=2)
    lutra.gather.update_rows(table[:, :0].contiguous(), torch.tensor([1, 0]), torch.zeros(2, 0), lr=1.0)
    assert (table == 1).all()


def test_other_layouts(simd_level):
    table, rows, grads = case(33)
    expected = table.clone()
    lutra.gather.update_rows(expected, rows, grads, lr=0.5)
    strided = torch.stack([grads, grads], 2)[..., 0]
    lutra.gather.update_rows(table, torch.stack([rows, rows], 1)[:, 0].int(), strided, lr=0.5)
    torch.testing.assert_close(table, expected, rtol=0, atol=0)


def test_autograd_sees_the_change():
    table = torch.ones(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no_grad"):
        lutra.gather.update_rows(table, torch.tensor([0]), torch.ones(1, 3), lr=1.0)
    loss = (table * table).sum()
    with torch.no_grad():
        lutra.gather.update_rows(table, torch.tensor([0]), torch.ones(1, 3), lr=1.0)
        lutra.gather.update_bags(table, torch.ones(1, 3), torch.tensor([[0]]), lr=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled():
    def train(table, rows, grads):
        lutra.gather.update_rows(table, rows, grads, lr=0.5)
        return table * 2

    torch._dynamo.reset()
    a, b = torch.ones(4, 3), torch.ones(4, 3)
    arguments = torch.tensor([3, 1]), torch.ones(2, 3)
    torch.testing.assert_close(
        torch.compile(train, fullgraph=True, backend="aot_eager")(a, *arguments), train(b, *arguments)
    )
    torch.testing.assert_close(a, b)


def test_errors():
    table, rows, grads = torch.ones(4, 3), torch.tensor([1, 2]), torch.ones(2, 3)
    before = table.clone()

    def fails(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            lutra.gather.update_rows(*arguments, **{"lr": 0.1, **options})
        assert torch.equal(table, before)

    fails(IndexError, r"rows\[1\] is 4", table, torch.tensor([1, 4]), grads)
    fails(IndexError, r"rows\[2\] is -1", table, torch.tensor([1, 1, -1]), torch.ones(3, 3))
    fails(IndexError, r"rows\[0\] is 9", table.numpy(), np.array([9]), np.ones((1, 3), np.float32))
    fails(TypeError, "rows has dtype float32", table, rows.float(), grads)
    fails(ValueError, "grads has shape", table, rows, grads[:, :2])
    fails(ValueError, "lr must be", table, rows, grads, lr=-1)
    fails(TypeError, "lr must be", table, rows, grads, lr="fast")
    fails(ValueError, "optimizer must be one of", table, rows, grads, "adamax")
    fails(ValueError, "row_state makes it", table, rows, grads, "adam")
    fails(ValueError, "must be None", table, rows, grads, "sgd", {"sum": table})
    fails(ValueError, r"state\['sum'\] has shape", table, rows, grads, "adagrad", {"sum": torch.ones(4)})
    fails(TypeError, r"state\['sum'\] has dtype", table, rows, grads, "adagrad", {"sum": table.double()})
    moving = lutra.gather.row_state(table, "momentum")
    fails(ValueError, "momentum must be", table, rows, grads, "momentum", moving,
          momentum=1.0)  # fmt: skip
    fails(ValueError, "bfloat16", table, rows, grads, seed=1)
    fails(
        ValueError, "step must be", table, rows, grads, "adam", lutra.gather.row_state(table, "adam"), step=0
    )
    fails(ValueError, "table must be contiguous", torch.ones(3, 4).t(), rows, grads)
    frozen = np.ones((4, 3), np.float32)
    frozen.flags.writeable = False
    fails(ValueError, "writable", frozen, rows.numpy(), grads.numpy())
    with pytest.raises(IndexError, match=r"ids\[0, 1\] is 7"):
        lutra.gather.update_bags(table, torch.ones(1, 3), torch.tensor([[0, 7]]), lr=1.0)
    with pytest.raises(ValueError, match="grad has shape"):
        lutra.gather.update_bags(table, torch.ones(2, 3), torch.tensor([[0, 1]]), lr=1.0)
    assert torch.equal(table, before)
    assert set(STATES) == set(RULES)
