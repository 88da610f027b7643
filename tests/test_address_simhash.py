"""lutra.address.simhash and ball_carving against their reference and their definitions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import fde as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)


def integers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


# ---------------------------------------------------------------- simhash
@pytest.mark.parametrize("d", SIZES)
def test_equals_the_reference(simd_level, d):
    for n in SIZES:
        x = integers(n, d, seed=n)
        for shape in ((d, 3), (5, d, 4), (1, d, 1), (20, d, 5)):
            planes = integers(*shape, seed=d)  # many products are 0: those bits are 0
            got = lutra.address.simhash(x, planes)
            assert got.dtype == np.int32
            assert np.array_equal(got, reference.simhash(x, planes))


def test_the_gray_code(simd_level):
    """g ^ (g >> 1) are the signs, the first plane's the highest, up to 31 of them."""
    for k in (1, 7, 16, 31):
        x, planes = integers(50, k, seed=k), np.eye(k, dtype=np.float32)
        got = lutra.address.simhash(x, planes).astype(np.int64)
        bits = ((x > 0) * (1 << np.arange(k)[::-1])).sum(1)
        assert np.array_equal(got ^ (got >> 1), bits)
    x = np.array([[0.0, -0.0, 1e-30, -1e-30]], np.float32)
    assert lutra.address.simhash(x, np.eye(4, dtype=np.float32))[0] == 3  # bits 0010


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(simd_level, dtype):
    x, planes = integers(37, 21), integers(3, 21, 5)
    want = reference.simhash(x, planes)
    for of in (torch.float32, torch.float64):
        got = lutra.address.simhash(
            torch.from_numpy(x).to(getattr(torch, dtype)), torch.from_numpy(planes).to(of)
        )
        assert got.dtype == torch.int32 and np.array_equal(got.numpy(), want)


@pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")
def test_neighbours_and_threads_change_nothing(simd_level):
    rng = np.random.default_rng(1)
    x, planes = rng.normal(size=(3000, 40)).astype(np.float32), rng.normal(size=(9, 40, 6)).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        lutra.set_num_threads(threads)
        try:
            results.append(lutra.address.simhash(x, planes))
        finally:
            lutra.set_num_threads(0)
    assert all(np.array_equal(results[0], r) for r in results)
    for begin, end in ((0, 1), (5, 38), (2999, 3000)):
        assert np.array_equal(lutra.address.simhash(x[begin:end], planes), results[0][begin:end])
    assert np.array_equal(lutra.address.simhash(x, planes[4]), results[0][:, 4])


def test_empty_and_not_contiguous(simd_level):
    planes = integers(4, 3)
    assert lutra.address.simhash(np.zeros((0, 4), np.float32), planes).shape == (0,)
    assert lutra.address.simhash(integers(5, 4), np.zeros((0, 4, 3), np.float32)).shape == (5, 0)
    assert not lutra.address.simhash(integers(5, 4), np.zeros((2, 4, 0), np.float32)).any()
    assert not lutra.address.simhash(np.zeros((5, 0), np.float32), np.zeros((0, 3), np.float32)).any()
    wide, spread = integers(10, 8), integers(8, 6)
    got = lutra.address.simhash(wide[::2, 1::2], spread[::2, ::2])
    assert np.array_equal(got, reference.simhash(wide[::2, 1::2], spread[::2, ::2]))


@pytest.mark.parametrize(
    "x, planes, error, text",
    [
        (integers(3, 4), integers(5, 2), ValueError, "its last axis but one must be 4"),
        (integers(3, 4), integers(4, 32), ValueError, "at most 31 planes"),
        (integers(4), integers(4, 2), ValueError, "x must be 2-d"),
        (integers(3, 4), integers(4), ValueError, "planes must be 2-d or 3-d"),
        (integers(3, 4).astype(int), integers(4, 2), TypeError, "x has dtype int64"),
        (integers(3, 4), integers(4, 2).astype(np.float16), TypeError, "planes has dtype float16"),
        (integers(3, 4), torch.zeros(4, 2), TypeError, "planes is a torch tensor"),
        (
            np.array([[1, 1], [1, np.nan]], np.float32),
            integers(2, 2),
            ValueError,
            "x[1] holds NaN or infinity",
        ),
    ],
)
def test_bad_arguments_are_named(x, planes, error, text):
    with pytest.raises(error) as caught:
        lutra.address.simhash(x, planes)
    assert text in str(caught.value)


# ---------------------------------------------------------------- ball carving
def carved(tokens, ptr, threshold):
    """The paper's way: take the first vector that is left and all that it matches."""
    rows, bounds = [], [0]
    for begin, end in pairwise(ptr):
        left = list(range(begin, end))
        while left:
            ball = [i for i in left if i == left[0] or tokens[left[0]] @ tokens[i] >= threshold]
            rows.append(tokens[ball].sum(0))
            left = [i for i in left if i not in ball]
        bounds.append(len(rows))
    return np.array(rows), np.array(bounds)


@pytest.mark.parametrize("d", SIZES)
def test_balls(simd_level, d):
    ptr = np.array([0, 7, 7, 8, 40, 60])
    tokens = integers(60, d, seed=d)
    for threshold in (0, 5, -3, 1e30, -1e30):
        got, bounds = lutra.address.ball_carving(tokens, ptr, threshold)
        want, where = carved(tokens.astype(float), ptr, threshold)
        assert got.dtype == np.float32 and bounds.dtype == np.int64
        assert np.array_equal(bounds, where) and np.array_equal(got, want)  # small integers: exact
        for t in (torch.float16, torch.bfloat16, torch.float64):
            mine, same = lutra.address.ball_carving(
                torch.from_numpy(tokens).to(t), torch.from_numpy(ptr), threshold
            )
            assert torch.equal(same, torch.from_numpy(where)) and np.array_equal(mine.numpy(), want)
            assert mine.dtype == (torch.float64 if t == torch.float64 else torch.float32)


def test_balls_of_many_queries(threads):
    rng = np.random.default_rng(5)
    ptr = np.concatenate([[0], np.cumsum(rng.integers(0, 33, 400))])
    tokens = rng.normal(size=(ptr[-1], 16)).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    got, bounds = lutra.address.ball_carving(tokens, ptr, 0.5)
    want, where = reference.ball_carving(tokens, ptr, 0.5)
    assert np.array_equal(bounds, where)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(got.sum(0), tokens.sum(0), atol=1e-3)  # no vector is lost


def test_balls_of_nothing(simd_level):
    for ptr in ([0], [0, 0, 0]):
        got, bounds = lutra.address.ball_carving(np.zeros((0, 5), np.float32), np.array(ptr), 0.7)
        assert got.shape == (0, 5) and bounds.tolist() == ptr
    got, bounds = lutra.address.ball_carving(np.zeros((3, 0), np.float32), np.array([0, 3]), 0.7)
    assert got.shape == (3, 0) and bounds.tolist() == [0, 3]


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"threshold": "a"}, TypeError, "threshold must be a number"),
        ({"threshold": float("nan")}, ValueError, "threshold must be finite"),
        ({"tokens": np.full((3, 2), np.inf, np.float32)}, ValueError, "tokens[0] holds NaN or infinity"),
        ({"ptr": np.array([0, 2])}, ValueError, "ptr goes from 0 to 2"),
        ({"ptr": np.array([0, 3, 1, 3])}, ValueError, "ptr must not fall"),
    ],
)
def test_bad_balls_are_named(change, error, text):
    given = {"tokens": integers(3, 2), "ptr": np.array([0, 3]), **change}
    with pytest.raises(error) as caught:
        lutra.address.ball_carving(**given)
    assert text in str(caught.value)


@pytest.mark.traces
def test_the_operators():
    x, planes = torch.from_numpy(integers(5, 4)), torch.from_numpy(integers(2, 4, 3))
    torch.library.opcheck(torch.ops.lutra.simhash.default, (x, planes))
    torch.library.opcheck(torch.ops.lutra.simhash.default, (x.bfloat16(), planes[0]))
    torch.library.opcheck(torch.ops.lutra.ball_carving.default, (x, torch.tensor([0, 2, 5]), 0.5))
    from lutra.torch_ops.fde import compose_simhash

    assert torch.equal(compose_simhash(x, planes), lutra.address.simhash(x, planes))
    assert torch.equal(compose_simhash(x, planes[1]), lutra.address.simhash(x, planes[1]))
    out, _ = lutra.address.ball_carving(x.requires_grad_(), torch.tensor([0, 5]), 0.5)
    with pytest.raises(NotImplementedError, match="not differentiable"):
        out.sum().backward()
