"""lutra.gather.senses against its reference; its gradients against the composition in torch's ops."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import gather as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
DTYPES = ("float32", "float16", "bfloat16", "float64")


def problem(dim, each=3, tokens=7, shape=(2, 5), dtype="float32", seed=0, ragged=False):
    rng = np.random.default_rng(seed + dim)
    offsets = None
    if ragged:
        offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 7, tokens))])
        table = rng.standard_normal((offsets[-1], dim))
    else:
        table = rng.standard_normal((tokens, each, dim))
    ids = rng.integers(0, tokens, shape)
    context = rng.standard_normal((*shape, dim))
    to = getattr(torch, dtype)
    return (
        torch.from_numpy(table).to(to), torch.from_numpy(ids), torch.from_numpy(context).to(to),
        None if offsets is None else torch.from_numpy(offsets),
    )  # fmt: skip


def as_numpy(arrays):
    return [None if a is None else (a.float() if a.dtype == torch.bfloat16 else a).numpy() for a in arrays]


def check(given, tolerance=1e-5):
    table, ids, _, offsets = given
    got = lutra.gather.senses(*given)
    vectors, rows, scores = reference.senses(*as_numpy(given))
    where = rows - (ids.numpy() * table.shape[1] if offsets is None else offsets.numpy()[ids.numpy()])
    assert got.senses.dtype == torch.int64
    np.testing.assert_array_equal(got.senses.numpy(), where)
    assert got.vectors.dtype == table.dtype
    np.testing.assert_array_equal(got.vectors.float().numpy(), vectors.astype(np.float32))
    np.testing.assert_allclose(got.scores.numpy(), scores, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("each", [1, 2, 3, 4, 5, 8, 9])
def test_equals_the_reference_at_odd_sizes(simd_level, each):
    for dim in SIZES:
        check(problem(dim, each))
        check(problem(dim, each, ragged=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_every_dtype(simd_level, dtype, ragged):
    for dim in (1, 17, 64, 100):
        given = problem(dim, 5, dtype=dtype, ragged=ragged)
        check(given)
        check((given[0], given[1].int(), *given[2:]))
        if dtype != "bfloat16":
            mine = lutra.gather.senses(*as_numpy(given))
            assert isinstance(mine.vectors, np.ndarray)
            np.testing.assert_array_equal(mine.senses, lutra.gather.senses(*given).senses.numpy())


def test_ties_go_to_the_lowest_and_nan_wins(simd_level):
    table = torch.zeros(2, 9, 20)
    table[0, 3] = table[0, 6] = 1
    context = torch.ones(3, 20)
    got = lutra.gather.senses(table, torch.tensor([0, 1, 0]), context)
    assert got.senses.tolist() == [3, 0, 3] and got.scores.tolist() == [20, 0, 20]
    table[0, 5, 7] = float("nan")
    table[0, 8, 0] = float("nan")
    got = lutra.gather.senses(table, torch.tensor([0, 1, 0]), context)
    assert got.senses.tolist() == [5, 0, 5] and torch.isnan(got.scores[0])
    assert np.array_equal(
        reference.senses(table.numpy(), np.array([0]), np.ones((1, 20), np.float32))[1], [5]
    )


@pytest.mark.skipif(_backend.core is None, reason="NumPy's products depend on their shape in the last bits")
def test_a_score_does_not_depend_on_its_neighbours(simd_level):
    table, ids, context, _ = problem(97, 7)
    full = lutra.gather.senses(table, ids, context)
    alone = lutra.gather.senses(table.reshape(-1, 1, 97), ids * 7 + full.senses, context)
    assert torch.equal(alone.scores, full.scores) and torch.equal(alone.vectors, full.vectors)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("gradient", ["hard", "straight_through", "softmax"])
def test_gradients_equal_the_composition(simd_level, gradient, ragged):
    from lutra.torch_ops.senses import compose

    for dtype, tolerance in (("float64", 1e-10), ("float32", 2e-5), ("float16", 2e-2), ("bfloat16", 0.15)):
        for dim in (3, 33):
            given = problem(dim, 4, shape=(11,), dtype=dtype, ragged=ragged)
            weight = torch.from_numpy(np.random.default_rng(4).standard_normal((11, dim)))
            results = []
            for call in (lambda *a, **k: lutra.gather.senses(*a, **k).vectors, compose):
                table, context = given[0].clone().requires_grad_(), given[2].clone().requires_grad_()
                if dtype in ("float16", "bfloat16") and call is compose:
                    table, context = (v.detach().float().requires_grad_() for v in (table, context))
                out = call(table, given[1], context, given[3], gradient=gradient, temperature=0.8)
                (out * weight.to(out.dtype)).sum().backward()
                results.append((out.detach(), table.grad, context.grad))
            for a, b in zip(*results):
                b = torch.zeros_like(a) if b is None else b
                np.testing.assert_allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_gradcheck_of_the_table():
    table, ids, context, _ = problem(5, 3, shape=(6,), dtype="float64")
    table.requires_grad_()
    torch.autograd.gradcheck(lambda t: lutra.gather.senses(t, ids, context).vectors, (table,))


def test_softmax_gradient_is_that_of_the_soft_choice():
    """To context: the derivative of sum_l softmax(scores / t)_l table_l."""
    table, ids, context, _ = problem(6, 4, shape=(5,), dtype="float64")
    grads = []
    for soft in (True, False):
        c = context.clone().requires_grad_()
        if soft:
            rows = table[ids]
            p = torch.softmax((rows * c[:, None]).sum(-1) / 0.7, -1)
            out = (p[..., None] * rows).sum(1)
        else:
            out = lutra.gather.senses(table, ids, c, gradient="softmax", temperature=0.7).vectors
        (out * context.flip(0)).sum().backward()
        grads.append(c.grad)
    np.testing.assert_allclose(grads[0], grads[1], atol=1e-12)


def test_only_what_needs_a_gradient_gets_one():
    table, ids, context, _ = problem(8)
    for gradient in ("hard", "straight_through", "softmax"):
        t = table.clone().requires_grad_()
        lutra.gather.senses(t, ids, context, gradient=gradient).vectors.sum().backward()
        assert t.grad.abs().sum() > 0 and context.grad is None
        c = context.clone().requires_grad_()
        lutra.gather.senses(table, ids, c, gradient=gradient).vectors.sum().backward()
        assert (c.grad.abs().sum() > 0) == (gradient != "hard")


@pytest.mark.parametrize("gradient", ["hard", "straight_through", "softmax"])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_operator(gradient, ragged):
    table, ids, context, offsets = problem(9, ragged=ragged)
    args = table.requires_grad_(), ids, context.requires_grad_(), offsets, gradient, 1.0
    torch.library.opcheck(
        torch.ops.lutra.senses.default, args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip

    def loss(t, c):
        return (lutra.gather.senses(t, ids, c, offsets, gradient=gradient).vectors ** 2).sum()

    want = torch.autograd.grad(loss(table, context), (table, context))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(table, context), (table, context))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")
def test_threads_do_not_change_a_bit():
    given = problem(97, 5, shape=(3000,))
    results = []
    for threads in (1, 2, 5):
        lutra.set_num_threads(threads)
        try:
            results.append(lutra.gather.senses(*given))
        finally:
            lutra.set_num_threads(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_empty_and_not_contiguous(simd_level):
    table, _, context, _ = problem(12, 4, tokens=6, shape=(6,))
    none = lutra.gather.senses(table, torch.zeros(0, dtype=torch.int64), context[:0])
    assert none.vectors.shape == (0, 12) and none.senses.shape == (0,)
    wide = torch.stack([table, table], -1)[..., 0]
    assert not wide.is_contiguous()
    ids = torch.arange(12)[::2] % 6
    strided = torch.stack([context, context], -1)[..., 0]
    a, b = lutra.gather.senses(wide, ids, strided), lutra.gather.senses(table, ids.clone(), context)
    assert torch.equal(a.vectors, b.vectors) and torch.equal(a.scores, b.scores)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"ids": np.array([0, 7])}, IndexError, "ids[1] is 7; ids must lie in [0, 7)"),
        ({"ids": np.array([-1, 0])}, IndexError, "ids[0] is -1"),
        ({"ids": np.array([0.0, 1.0])}, TypeError, "ids has dtype float64"),
        ({"table": np.zeros((7, 8), np.float32)}, ValueError, "(tokens, senses, dim)"),
        ({"table": np.zeros((7, 0, 8), np.float32)}, ValueError, "at least one sense"),
        ({"table": np.zeros((7, 2, 8), np.int32)}, TypeError, "table has dtype int32"),
        (
            {"context": np.zeros((2, 9), np.float32)},
            ValueError,
            "context has shape (2, 9); it must be (2, 8)",
        ),
        ({"context": np.zeros((2, 8), np.int32)}, TypeError, "context has dtype int32"),
        ({"gradient": "soft"}, ValueError, "gradient must be one of"),
        ({"temperature": 0}, ValueError, "temperature must be a positive"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    given = {
        "table": np.zeros((7, 3, 8), np.float32), "ids": np.array([0, 1]),
        "context": np.zeros((2, 8), np.float32), **change,
    }  # fmt: skip
    with pytest.raises(error) as caught:
        lutra.gather.senses(**given)
    assert text in str(caught.value)


@pytest.mark.parametrize("offsets", [[0, 2, 2, 5], [0, 2, 9, 5], [0, 3, -1, 5], [0, 3, 2, 5]])
def test_bad_offsets(simd_level, offsets):
    table, context = np.zeros((5, 4), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"ids\[1\] is 1, whose senses are the rows"):
        lutra.gather.senses(table, np.array([0, 1]), context, np.array(offsets))
    good = lutra.gather.senses(table, np.array([0, 2]), context, np.array([0, 2, 2, 5]))
    assert good.senses.tolist() == [0, 0]


def test_the_reference_backend_alone():
    code = (
        "import numpy as np, lutra, torch\n"
        "t = torch.randn(5, 3, 8, requires_grad=True)\n"
        "c = torch.randn(4, 8, requires_grad=True)\n"
        "lutra.gather.senses(t, torch.arange(4), c, gradient='softmax').vectors.sum().backward()\n"
        "assert t.grad.abs().sum() > 0 and c.grad.abs().sum() > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LUTRA_BACKEND": "reference"})
