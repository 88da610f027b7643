"""Bags of packed rows."""

from __future__ import annotations

import numpy as np
import pytest

from lutra import gather
from lutra.reference import packed as reference

KINDS = tuple(reference.KINDS)
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97, 200)


def table_of(rows, dim, kind, group=None, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return gather.pack_rows(x, kind, group)


def bags(rows, dtype=np.int64):
    rng = np.random.default_rng(1)
    ids = rng.integers(0, rows, 60).astype(dtype)
    offsets = np.array([0, 3, 3, 20, 59], dtype)
    weights = rng.standard_normal(60).astype(np.float32)
    for mode in ("sum", "mean", "max"):
        yield (ids.reshape(12, 5), None, None), {"mode": mode}
        yield (ids, offsets, None), {"mode": mode, "padding_idx": int(ids[4])}
    yield (ids, np.append(offsets, 60).astype(dtype), weights), {"include_last_offset": True}
    yield (ids.reshape(6, 10), None, weights.reshape(6, 10)), {"padding_idx": -1}
    yield (ids[:40].reshape(40, 1), None, None), {}
    yield (ids, offsets + dtype(1), weights), {}
    yield (ids[:0], np.zeros(2, dtype), None), {}
    yield (ids[:0].reshape(4, 0), None, None), {"mode": "mean"}


def close(got, want, where=""):
    scale = 1 + np.abs(want).max(initial=0)
    np.testing.assert_allclose(got, want, atol=1e-5 * scale, rtol=0, err_msg=str(where))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 16, 32, 48])
def test_bags(simd_level, kind, group):
    for dim in SIZES:
        packed = table_of(40, dim, kind, group)
        options = {"dim": dim, "kind": kind, "group": group}
        for i, (arrays, more) in enumerate(bags(40, np.int64 if dim % 2 else np.int32)):
            want = reference.bag_packed(packed, *arrays, **options, **more)
            got = gather.bag_packed(packed, *arrays, **options, **more)
            assert got.dtype == np.float32
            close(got, want, (dim, i))


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_and_long_bags(simd_level, kind):
    """Rows of several walks, lists beyond the second-level cache, and a table that is prefetched."""
    for rows, dim, group, n in ((3000, 700, 64, 40), (2000, 4100, None, 300)):
        packed = table_of(rows, dim, kind, group)
        ids = np.random.default_rng(0).integers(0, rows, (3, n))
        want = reference.bag_packed(packed, ids, dim=dim, kind=kind, group=group)
        got = gather.bag_packed(packed, ids, dim=dim, kind=kind, group=group)
        np.testing.assert_allclose(got, want, atol=2e-4 * abs(want).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_result_types(simd_level, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for mode in ("sum", "max"):
        packed = table_of(50, 37, "int4")
        ids = np.arange(48).reshape(12, 4)
        wide = gather.bag_packed(packed, ids, dim=37, kind="int4", mode=mode)
        got = gather.bag_packed(packed, ids, dim=37, kind="int4", mode=mode, dtype=dtype)
        want = wide.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_nan_goes_where_arithmetic_takes_it(simd_level, kind):
    packed = table_of(3, 20, kind)
    packed[1, 4] = 127
    for mode in ("sum", "max"):
        for order in ([0, 1], [1, 0]):
            got = gather.bag_packed(packed, np.array([order]), dim=20, kind=kind, mode=mode)
            assert np.isnan(got[0]).tolist() == [j == 4 for j in range(20)]


@pytest.mark.parametrize("kind, name", [("int8", "byte_rowwise"), ("int4", "4bit_rowwise")])
def test_rows_that_torch_packed(kind, name):
    torch = pytest.importorskip("torch")
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    prepack = {"int8": "embedding_bag_byte_prepack", "int4": "embedding_bag_4bit_prepack"}[kind]
    theirs = getattr(torch.ops.quantized, prepack)(x)
    ids = torch.arange(60) % 40
    offsets = torch.tensor([0, 7, 7, 30])
    want = getattr(torch.ops.quantized, f"embedding_bag_{name}_offsets")(theirs, ids, offsets)
    got = gather.bag_packed(theirs, ids, offsets, dim=64, kind=kind)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_bits(kind, threads):
    packed = table_of(20_000, 64, kind)
    ids = np.random.default_rng(0).integers(0, 20_000, (3000, 20))
    weights = np.random.default_rng(1).standard_normal(ids.shape).astype(np.float32)
    got = gather.bag_packed(packed, ids, weights=weights, dim=64, kind=kind)
    assert np.array_equal(got, _first.setdefault(kind, got))


_first: dict = {}


# ---------------------------------------------------------------- torch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 16])
def test_gradient_of_the_weights(simd_level, kind, group):
    torch = pytest.importorskip("torch")
    for dim in (1, 17, 33, 64, 97, 130):
        packed = table_of(40, dim, kind, group)
        rows = torch.from_numpy(reference.unpack_rows(packed, dim, kind, group)).double()
        for arrays, options in bags(40):
            if arrays[2] is None:
                continue
            ids, offsets, weights = (None if a is None else torch.from_numpy(a) for a in arrays)
            fast, slow = weights.clone().requires_grad_(), weights.double().requires_grad_()
            out = gather.bag_packed(
                torch.from_numpy(packed), ids, offsets, fast, dim=dim, kind=kind, group=group, **options
            )
            want = gather.bag(rows, ids, offsets, slow, **options)
            g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            (got,) = torch.autograd.grad(out, fast, g)
            (expected,) = torch.autograd.grad(want, slow, g.double())
            close(got.numpy(), expected.numpy(), (dim, options))
            again = reference.bag_packed_weight_grad(
                g.numpy(), packed, *arrays[:2], dim=dim, kind=kind, group=group, **options
            )
            close(again, expected.numpy())


def test_half_gradients_and_float64_weights():
    torch = pytest.importorskip("torch")
    packed = torch.from_numpy(table_of(10, 33, "int8"))
    ids = torch.tensor([[1, 2], [3, 3]])
    for dtype in ("float16", "bfloat16"):
        w = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
        out = gather.bag_packed(packed, ids, weights=w, dim=33, kind="int8", dtype=dtype)
        out.sum().backward()
        assert w.grad.dtype == torch.float64
        want = gather.unpack_rows(packed, 33, "int8", ids=ids).sum(-1).double()
        torch.testing.assert_close(w.grad, want, atol=1e-4, rtol=1e-4)


def test_torch_ops():
    torch = pytest.importorskip("torch")
    import lutra.torch_ops  # noqa: F401

    packed = torch.from_numpy(table_of(10, 33, "int4"))
    ids, offsets = torch.tensor([1, 2, 3, 9, 9]), torch.tensor([0, 2])
    weights = torch.randn(5, requires_grad=True)
    args = (packed, ids, offsets, weights, 33, "int4", None, "sum", None, False, "float32")
    torch.library.opcheck(torch.ops.lutra.bag_packed, args)
    grad = torch.randn(2, 33)
    args = (grad, packed, ids, offsets, 33, "int4", None, 9, False)
    torch.library.opcheck(torch.ops.lutra.bag_packed_weight_grad, args)

    @torch.compile(fullgraph=True, backend="eager")
    def run(ids, offsets, weights):
        return gather.bag_packed(packed, ids, offsets, weights, dim=33, kind="int4")

    torch.testing.assert_close(
        run(ids, offsets, weights), gather.bag_packed(packed, ids, offsets, weights, dim=33, kind="int4")
    )


# ---------------------------------------------------------------- bad input
def test_bad_input():
    packed = table_of(10, 33, "int4")
    ids = np.array([[0, 1]])
    with pytest.raises(IndexError, match=r"ids\[0, 1\] is 10"):
        gather.bag_packed(packed, np.array([[0, 10]]), dim=33, kind="int4")
    with pytest.raises(IndexError, match=r"ids\[1, 0\] is -1"):
        gather.bag_packed(packed, np.array([[0], [-1]]), dim=33, kind="int4")
    with pytest.raises(IndexError, match=r"offsets\[1\] is 3"):
        gather.bag_packed(packed, ids[0], np.array([0, 3]), dim=33, kind="int4")
    with pytest.raises(ValueError, match="rows of 21 bytes; dim, kind and group need 20"):
        gather.bag_packed(packed, ids, dim=31, kind="int4")
    with pytest.raises(TypeError, match="ids has dtype float32"):
        gather.bag_packed(packed, ids.astype(np.float32), dim=33, kind="int4")
    with pytest.raises(ValueError, match="weights go with mode 'sum' only"):
        gather.bag_packed(packed, ids, weights=np.ones((1, 2)), dim=33, kind="int4", mode="mean")
    with pytest.raises(ValueError, match="dtype must be one of"):
        gather.bag_packed(packed, ids, dim=33, kind="int4", dtype="float64")
    with pytest.raises(ValueError, match="padding_idx is 10"):
        gather.bag_packed(packed, ids, dim=33, kind="int4", padding_idx=10)
    with pytest.raises(TypeError, match="dim must be an integer"):
        gather.bag_packed(packed, ids, dim=33.0, kind="int4")
