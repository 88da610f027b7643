"""lutra.gather.bag and its gradients against the reference, and the torch op against torch itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lutra
from lutra import _backend
from lutra.reference import gather as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
FLOATS = ("float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "uint8", "int8")
MODES = ("sum", "mean", "max")
TOLERANCE = {
    "float32": 2e-6,
    "float16": 2e-3,
    "bfloat16": 1.6e-2,
    "uint8": 2e-5,
    "int8": 2e-5,
    "float64": 1e-12,
}

needs_kernels = pytest.mark.skipif(_backend.core is None, reason="the CPU module is missing")


def make_table(rows, dim, dtype="float32", seed=0):
    """A torch table, its scale and its minimum (None for floats)."""
    rng = np.random.default_rng(seed)
    if dtype in ("uint8", "int8"):
        info = np.iinfo(dtype)
        codes = rng.integers(info.min, info.max + 1, (rows, dim)).astype(dtype)
        scale = rng.random(rows, np.float32) + 0.1
        return (
            torch.from_numpy(codes),
            torch.from_numpy(scale),
            torch.from_numpy(-rng.random(rows, np.float32)),
        )
    table = torch.from_numpy(rng.standard_normal((rows, dim)))
    return table.to(getattr(torch, dtype)), None, None


def make_ids(rows, layout, seed=0, dtype="int64"):
    """Ids with repetitions and empty bags: (ids, offsets, include_last_offset), NumPy."""
    rng = np.random.default_rng(seed)
    if layout == "fixed":
        return rng.integers(0, rows, (23, 5)).astype(dtype), None, False
    length = rng.integers(0, 9, 40)
    length[[0, 7, 8, -1]] = 0
    length[3] = 61  # more than one group of prefetches
    ids = rng.integers(0, rows, length.sum()).astype(dtype)
    last = layout == "last"
    offsets = np.concatenate([[0], np.cumsum(length)])[: None if last else -1].astype(dtype)
    return ids, offsets, last


def wide(t):
    """A NumPy array of a torch tensor for the reference."""
    return None if t is None else (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()


def tensor(a):
    return None if a is None else torch.from_numpy(a)


def close(got, expected, dtype, factor=1.0):
    got = wide(got) if torch.is_tensor(got) else got
    limit = TOLERANCE[dtype] * factor
    np.testing.assert_allclose(
        got, expected, rtol=limit, atol=limit * max(1.0, np.nanmax(np.abs(expected), initial=0))
    )


# ---------------------------------------------------------------- forward
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_size(simd_level, dtype, mode):
    for dim in SIZES:
        table, scale, minimum = make_table(30, dim, dtype, dim)
        for layout, id_dtype in (
            ("fixed", "int64"),
            ("offsets", "int32"),
            ("last", "int64"),
            ("fixed", "int32"),
        ):
            ids, offsets, last = make_ids(30, layout, dim, id_dtype)
            for padding in (None, -7):
                options = {"mode": mode, "padding_idx": padding, "include_last_offset": last}
                got = lutra.gather.bag(
                    table, tensor(ids), tensor(offsets), scale=scale, minimum=minimum, **options
                )
                expected = reference.bag(
                    wide(table), ids, offsets, scale=wide(scale), minimum=wide(minimum), **options
                )
                assert got.dtype == (table.dtype if dtype in FLOATS else torch.float32)
                close(got, expected, dtype)


@pytest.mark.parametrize("dtype", (*DTYPES, "float64"))
def test_weights(simd_level, dtype):
    rng = np.random.default_rng(3)
    for dim in SIZES:
        table, scale, minimum = make_table(30, dim, dtype, dim)
        for layout in ("fixed", "offsets", "last"):
            ids, offsets, last = make_ids(30, layout, dim)
            weights = rng.standard_normal(ids.shape).astype(np.float64 if dtype == "float64" else np.float32)
            for padding in (None, 4):
                options = {"padding_idx": padding, "include_last_offset": last}
                got = lutra.gather.bag(
                    table,
                    tensor(ids),
                    tensor(offsets),
                    tensor(weights),
                    scale=scale,
                    minimum=minimum,
                    **options,
                )
                expected = reference.bag(
                    wide(table), ids, offsets, weights, wide(scale), wide(minimum), **options
                )
                close(got, expected, dtype, 4)


@pytest.mark.parametrize("mode", MODES)
def test_reference_is_torch(mode):
    table, _, _ = make_table(50, 7, "float64")
    for layout in ("fixed", "offsets", "last"):
        ids, offsets, last = make_ids(50, layout)
        for padding in (None, 3, -1):
            got = reference.bag(
                table.numpy(), ids, offsets, mode=mode, padding_idx=padding, include_last_offset=last
            )
            expected = torch.nn.functional.embedding_bag(
                torch.from_numpy(ids),
                table,
                tensor(offsets),
                mode=mode,
                padding_idx=padding,
                include_last_offset=last,
            )
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_numpy_gives_numpy(simd_level):
    table, ids = (
        np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32),
        np.array([[0, 8], [3, 3]]),
    )
    out = lutra.gather.bag(table, ids)
    assert type(out) is np.ndarray and out.dtype == np.float32
    np.testing.assert_allclose(out, table[ids].sum(1), rtol=1e-6)
    half = lutra.gather.bag(table.astype(np.float16), ids.astype(np.int32))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, table[ids].sum(1), rtol=1e-2, atol=1e-2)


def test_numpy_bfloat16(simd_level):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    table = np.random.default_rng(0).standard_normal((9, 33)).astype(bfloat16)
    out = lutra.gather.bag(table, np.array([[0, 8, 1]]))
    assert out.dtype == bfloat16
    close(out.astype(np.float32), table.astype(np.float32)[[0, 8, 1]].sum(0)[None], "bfloat16")


def test_maximum_with_nan_and_infinity(simd_level):
    table = np.random.default_rng(0).standard_normal((20, 35)).astype(np.float32)
    table[3, 4] = table[4, 34] = np.nan
    table[5, :7] = -np.inf
    table[6, 8:20] = np.inf
    ids = np.random.default_rng(1).integers(0, 20, (200, 3))
    np.testing.assert_array_equal(lutra.gather.bag(table, ids, mode="max"), table[ids].max(1))
    np.testing.assert_array_equal(lutra.gather.bag(table, np.array([[5]]), mode="max"), table[5:6])


def test_long_bag_and_many_rows(simd_level, threads):
    rng = np.random.default_rng(5)
    table = rng.standard_normal((3000, 64)).astype(np.float32)
    ids = rng.integers(0, 3000, 70_000)
    offsets = np.array([0, 30_000, 30_001])
    for mode in MODES:
        expected = reference.bag(table.astype(np.float64), ids, offsets, mode=mode)
        np.testing.assert_allclose(
            lutra.gather.bag(table, ids, offsets, mode=mode),
            expected,
            rtol=1e-4,
            atol=1e-4 * np.abs(expected).max(),
        )


@needs_kernels
def test_same_bits_with_any_number_of_threads(simd_level):
    rng = np.random.default_rng(6)
    table, ids = rng.standard_normal((5000, 48)).astype(np.float32), rng.integers(0, 5000, (4000, 9))
    weights = rng.random(ids.shape, np.float32)
    results = []
    for n in (1, 2, 3):
        _backend.core.set_num_threads(n)
        out = lutra.gather.bag(table, ids, None, weights)
        grads = lutra.gather.bag_grad(out, ids, None, weights, rows=5000, sparse=True)
        dense = lutra.gather.bag_grad(out, ids, None, weights, rows=5000)
        results.append([a.tobytes() for a in (out, *grads, dense)])
    _backend.core.set_num_threads(0)
    assert results[0] == results[1] == results[2]


def test_no_entries():
    table = np.ones((4, 3), np.float32)
    no_ids = np.zeros(0, np.int64)
    assert lutra.gather.bag(table, np.zeros((0, 5), np.int64)).shape == (0, 3)
    np.testing.assert_array_equal(lutra.gather.bag(table, np.zeros((2, 0), np.int64)), np.zeros((2, 3)))
    for mode in MODES:
        out = lutra.gather.bag(table, no_ids, np.array([0, 0]), mode=mode)
        np.testing.assert_array_equal(out, np.zeros((2, 3)))
    assert lutra.gather.bag(table, no_ids, no_ids).shape == (0, 3)
    assert lutra.gather.bag(table, no_ids, np.array([0]), include_last_offset=True).shape == (0, 3)
    assert lutra.gather.bag(table[:, :0], np.array([[1]])).shape == (1, 0)
    np.testing.assert_array_equal(lutra.gather.bag(table[:0], np.zeros((2, 0), np.int64)), np.zeros((2, 3)))
    np.testing.assert_array_equal(
        lutra.gather.bag(table, np.array([[2, 2]]), padding_idx=2, mode="max"), np.zeros((1, 3))
    )
    empty = torch.zeros(0, dtype=torch.int64)
    assert lutra.gather.bag(torch.ones(4, 3), empty, empty).shape == (0, 3)
    grads = lutra.gather.bag_grad(np.ones((2, 3), np.float32), no_ids, np.array([0, 0]), rows=4, sparse=True)
    assert grads.rows.shape == (0,) and grads.values.shape == (0, 3)


def test_ids_outside_every_bag_are_ignored(simd_level):
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    ids, offsets = np.array([99, 1, 2, 3, -5]), np.array([1, 2, 4])
    np.testing.assert_array_equal(
        lutra.gather.bag(table, ids, offsets, include_last_offset=True), [table[1], table[2] + table[3]]
    )
    grads = lutra.gather.bag_grad(
        np.ones((2, 2), np.float32), ids, offsets, rows=6, include_last_offset=True, sparse=True
    )
    np.testing.assert_array_equal(grads.rows, [1, 2, 3])
    weights = torch.ones(5, requires_grad=True)
    lutra.gather.bag(
        torch.from_numpy(table),
        torch.from_numpy(ids),
        torch.from_numpy(offsets),
        weights,
        include_last_offset=True,
    ).sum().backward()
    np.testing.assert_array_equal(weights.grad, [0, 5, 9, 13, 0])


def test_views(simd_level):
    rng = np.random.default_rng(0)
    big = rng.standard_normal((40, 50)).astype(np.float32)
    ids, weights = rng.integers(0, 20, (6, 8)), rng.random((6, 8), np.float32)
    expected = reference.bag(big[::2, 5:38].copy(), ids[:, ::2].copy(), None, weights[:, ::2].copy())
    got = lutra.gather.bag(big[::2, 5:38], ids[:, ::2], None, weights[:, ::2])
    close(got, expected, "float32")
    t = torch.from_numpy
    got = lutra.gather.bag(t(big)[::2, 5:38], t(ids)[:, ::2], None, t(weights)[:, ::2])
    close(got, expected, "float32")
    swapped = big.astype(">f4")
    close(lutra.gather.bag(swapped, ids.astype(">i8")), reference.bag(big, ids), "float32")


@given(
    rows=st.integers(1, 40), dim=st.integers(1, 70), lengths=st.lists(st.integers(0, 12), max_size=12),
    mode=st.sampled_from(MODES), last=st.booleans(), padding=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, dim, lengths, mode, last, padding, seed):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((rows, dim)).astype(np.float32)
    ids = rng.integers(0, rows, sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])[: None if last else -1].astype(np.int64)
    options = {
        "mode": mode,
        "padding_idx": int(ids[0]) if padding and ids.size else None,
        "include_last_offset": last,
    }
    close(
        lutra.gather.bag(table, ids, offsets, **options),
        reference.bag(table, ids, offsets, **options),
        "float32",
    )


# ---------------------------------------------------------------- 8-bit rows
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16", "float64"])
def test_quantize(dtype, source):
    table = make_table(37, 19, source)[0]
    table[5] = 2.5
    table[6] = 0
    codes, scale, minimum = lutra.gather.quantize_rows(table, dtype)
    assert (str(codes.dtype), scale.dtype, minimum.dtype) == (f"torch.{dtype}", torch.float32, torch.float32)
    back = lutra.gather.dequantize_rows(codes, scale, minimum)
    assert (back - table.float()).abs().max() <= (scale.max() * 0.501)
    close(back[5:7], wide(table[5:7]), "float32", 50)
    assert torch.isfinite(back).all() and (scale > 0).all()
    expected = reference.quantize_rows(wide(table), dtype)
    for got, want in zip((codes, scale, minimum), expected):
        np.testing.assert_array_equal(got, want)
    if source != "bfloat16":
        for got, want in zip(lutra.gather.quantize_rows(table.numpy(), dtype), expected):
            assert type(got) is np.ndarray
            np.testing.assert_array_equal(got, want)
    ids = torch.arange(37).reshape(37, 1)
    out = lutra.gather.bag(codes, ids, scale=scale, minimum=minimum)
    close(out, wide(back), "uint8")
    np.testing.assert_array_equal(
        lutra.gather.dequantize_rows(codes.numpy(), wide(scale), wide(minimum)), back
    )


def test_quantize_extremes():
    table = np.array([[-1.6e38, 1.6e38, 0], [1e-40, 2e-40, 0], [7, 7, 7]], np.float32)
    codes, scale, minimum = lutra.gather.quantize_rows(table)
    back = lutra.gather.dequantize_rows(codes, scale, minimum)
    assert np.isfinite(back).all()
    assert np.abs(back - table).max() <= 0.51 * scale.max()
    assert back[2].tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match=r"table\[1\] holds NaN or infinity"):
        lutra.gather.quantize_rows(np.array([[1, 2], [np.nan, 0]], np.float32))
    with pytest.raises(ValueError, match=r"table\[0\] holds NaN or infinity"):
        lutra.gather.quantize_rows(torch.tensor([[1, -torch.inf], [0, 1]]))
    with pytest.raises(ValueError, match="dtype must be one of"):
        lutra.gather.quantize_rows(table, "int4")
    with pytest.raises(ValueError, match="table must be 2-d"):
        lutra.gather.quantize_rows(table[0])


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
def test_table_gradient(simd_level, dtype, mode):
    for dim in SIZES:
        table = make_table(30, dim, dtype, dim)[0]
        for layout, id_dtype in (("fixed", "int32"), ("offsets", "int64"), ("last", "int32")):
            ids, offsets, last = make_ids(30, layout, dim, id_dtype)
            bags = ids.shape[0] if offsets is None else offsets.size - last
            grad = make_table(bags, dim, dtype, 9)[0]
            for padding in (None, 2):
                options = {"mode": mode, "padding_idx": padding, "include_last_offset": last}
                argmax = None
                if mode == "max":
                    argmax = reference.bag(wide(table), ids, offsets, **options, return_argmax=True)[1]
                expected = reference.bag_grad(wide(grad), ids, offsets, argmax=argmax, rows=30, **options)
                arrays = (grad, tensor(ids), tensor(offsets))
                dense = lutra.gather.bag_grad(*arrays, rows=30, table=table, **options)
                assert dense.dtype == table.dtype
                close(dense, expected, dtype, 4)
                rows, values = lutra.gather.bag_grad(*arrays, rows=30, table=table, sparse=True, **options)
                touched = np.unique(reference._entries(ids, offsets, last, padding, 30)[1])
                np.testing.assert_array_equal(rows, touched)
                np.testing.assert_array_equal(wide(values), wide(dense[rows]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient(simd_level, dtype):
    for dim in SIZES:
        table, scale, minimum = make_table(30, dim, dtype, dim)
        for layout, id_dtype in (("fixed", "int32"), ("offsets", "int64"), ("last", "int32")):
            ids, offsets, last = make_ids(30, layout, dim, id_dtype)
            weights = torch.rand(ids.shape, requires_grad=True)
            for padding in (None, 5):
                options = {"padding_idx": padding, "include_last_offset": last}
                out = lutra.gather.bag(
                    table, tensor(ids), tensor(offsets), weights, scale=scale, minimum=minimum, **options
                )
                grad = make_table(*out.shape, "float32" if scale is not None else dtype, 11)[0]
                (got,) = torch.autograd.grad(out, weights, grad)
                expected = reference.bag_weight_grad(
                    wide(grad), wide(table), ids, offsets, wide(scale), wide(minimum), **options
                )
                close(got, expected, "uint8", 1 + dim)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 2047, 2049, 70_000, 5_000_000])
def test_sorted_gradient_of_many_rows(simd_level, threads, rows):
    rng = np.random.default_rng(rows)
    ids = rng.integers(0, rows, (2500, 8))
    ids[::3] %= 50  # some rows are met often
    grad = rng.standard_normal((2500, 5)).astype(np.float32)
    for padding in (None, int(ids[0, 0])):
        got = lutra.gather.bag_grad(grad, ids, rows=rows, padding_idx=padding, sparse=True)
        touched, expected = reference.bag_grad(grad, ids, rows=rows, padding_idx=padding, sparse=True)
        np.testing.assert_array_equal(got.rows, touched)
        np.testing.assert_allclose(got.values, expected, rtol=1e-4, atol=1e-4)


def test_maximum_gives_its_gradient_to_the_first(simd_level):
    table = np.zeros((4, 17), np.float32)
    table[1, 0] = table[2, 0] = np.nan
    ids, grad = np.array([[3, 1, 2, 3], [0, 2, 2, 0]]), np.ones((2, 17), np.float32)
    dense = lutra.gather.bag_grad(grad, ids, rows=4, mode="max", table=table)
    expected = np.zeros((4, 17))
    expected[3, 1:] = expected[0, 1:] = expected[1, 0] = expected[2, 0] = 1
    np.testing.assert_array_equal(dense, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparse", [False, True])
def test_gradient_is_torchs(simd_level, mode, sparse):
    torch.manual_seed(0)
    for layout in ("fixed", "offsets", "last"):
        ids, offsets, last = (tensor(a) if not isinstance(a, bool) else a for a in make_ids(40, layout))
        weights = (
            [torch.rand(ids.shape, requires_grad=True) for _ in range(2)] if mode == "sum" else [None, None]
        )
        tables = [
            torch.randn(40, 33, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)
        ]
        if weights[0] is not None:
            weights[1].data.copy_(weights[0].data)
        options = {"mode": mode, "padding_idx": 7, "include_last_offset": last}
        got = lutra.gather.bag(tables[0], ids, offsets, weights[0], sparse_grad=sparse, **options)
        want = torch.nn.functional.embedding_bag(
            ids, tables[1], offsets, per_sample_weights=weights[1], **options
        )
        grad = torch.randn_like(want)
        assert not sparse or torch.autograd.grad(got, tables[0], grad, retain_graph=True)[0].is_coalesced()
        got.backward(grad)
        want.backward(grad)
        torch.testing.assert_close(got, want)
        assert tables[0].grad.is_sparse == sparse
        if sparse:
            # torch forgets the mark when it fills .grad; the rows are still sorted, each once
            rows = tables[0].grad._indices()[0]
            assert (rows[1:] > rows[:-1]).all()
        torch.testing.assert_close(tables[0].grad.to_dense(), tables[1].grad)
        if weights[0] is not None:
            torch.testing.assert_close(weights[0].grad, weights[1].grad)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    for layout in ("fixed", "offsets", "last"):
        ids, offsets, last = (tensor(a) if not isinstance(a, bool) else a for a in make_ids(12, layout))
        table = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(ids.shape, dtype=torch.float64, requires_grad=True) if mode == "sum" else None

        def f(table, weights, ids=ids, offsets=offsets, last=last):
            return lutra.gather.bag(
                table, ids, offsets, weights, mode=mode, padding_idx=1, include_last_offset=last
            )

        assert torch.autograd.gradcheck(f, (table, weights))


# ---------------------------------------------------------------- torch
def samples():
    table = torch.randn(20, 9)
    ids, offsets = torch.randint(0, 20, (4, 3)), torch.tensor([0, 2, 2])
    flat, weights = torch.randint(0, 20, (7,)), torch.rand(7)
    codes, scale, minimum = lutra.gather.quantize_rows(table)
    for t in (table, table.half(), table.bfloat16(), table.double()):
        for mode in MODES:
            yield (t.requires_grad_(), ids, None, None, None, None, mode)
            yield (t, flat, offsets, None, None, None, mode, -1, True)
        yield (t, flat, offsets, weights.clone().requires_grad_())
    yield (codes, flat, offsets, weights.clone().requires_grad_(), scale, minimum)
    yield (codes, ids, None, None, scale, minimum, "max")


def test_opcheck():
    for args in samples():
        torch.library.opcheck(torch.ops.lutra.bag.default, args)
    grad, ids, flat = torch.randn(4, 9), torch.randint(0, 20, (4, 3)), torch.randint(0, 20, (7,))
    offsets, argmax = torch.tensor([0, 2, 2, 7]), torch.randint(0, 20, (4, 9))
    plans = (
        (grad, ids, None, None, None, 20, "sum", None, False),
        (grad, flat, offsets, torch.rand(7), None, 20, "sum", 3, False),
        (grad[:3], flat, offsets, None, None, 20, "mean", -1, True),
    )
    for args in plans:
        torch.library.opcheck(torch.ops.lutra.bag_backward.default, args)
        torch.library.opcheck(torch.ops.lutra.bag_backward_rows.default, args)
    torch.library.opcheck(
        torch.ops.lutra.bag_backward.default, (grad, ids, None, None, argmax, 20, "max", None, False)
    )
    table = torch.randn(20, 9)
    torch.library.opcheck(torch.ops.lutra.bag_argmax.default, (table, flat, offsets, None, False))
    torch.library.opcheck(
        torch.ops.lutra.bag_weight_grad.default, (grad, table, flat, offsets, None, None, None, False)
    )
    torch.library.opcheck(torch.ops.lutra.quantize_rows.default, (table, "int8"))
    torch.library.opcheck(torch.ops.lutra.dequantize_rows.default, lutra.gather.quantize_rows(table))


@pytest.mark.traces
@pytest.mark.parametrize("mode", MODES)
def test_compile(mode):
    def f(table, ids, weights):
        out = lutra.gather.bag(table, ids, None, weights if mode == "sum" else None, mode=mode)
        return (out.tanh() ** 2).sum()

    table, weights = torch.randn(20, 9, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    ids = torch.randint(0, 20, (4, 3))
    f(table, ids, weights).backward()
    want = [table.grad, weights.grad]
    table.grad = weights.grad = None
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(table, ids, weights), f(table, ids, weights))
    compiled(table, ids, weights).backward()
    torch.testing.assert_close([table.grad, weights.grad], want)


def test_table_may_change_before_the_backward():
    table = torch.randn(9, 4, requires_grad=True)
    out = lutra.gather.bag(table, torch.tensor([[1, 2]]))
    with torch.no_grad():
        table += 1
    out.sum().backward()
    assert table.grad.sum() == 8
    out = lutra.gather.bag(table, torch.tensor([[1, 2]]), mode="max")
    with torch.no_grad():
        table += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_meta_and_fake():
    table, ids = torch.empty(5, 3, device="meta"), torch.empty(2, 4, dtype=torch.int64, device="meta")
    assert torch.ops.lutra.bag(table, ids).shape == (2, 3)


# ---------------------------------------------------------------- bad input
TABLE, IDS, FLAT = np.ones((5, 3), np.float32), np.array([[0, 1], [2, 3]]), np.array([0, 1, 2])


@pytest.mark.parametrize("convert", [lambda a: a, tensor], ids=["numpy", "torch"])
def test_bad_ids(simd_level, convert):
    def bag(ids, offsets=None, **options):
        offsets = None if offsets is None else convert(np.asarray(offsets))
        return lutra.gather.bag(convert(TABLE), convert(np.asarray(ids)), offsets, **options)

    for mode in MODES:
        with pytest.raises(IndexError, match=r"ids\[1, 0\] is 5; ids must lie in \[0, 5\)"):
            bag([[0, 1], [5, -1]], mode=mode)
        with pytest.raises(IndexError, match=r"ids\[1\] is -1;"):
            bag([0, -1, 7], [0, 2], mode=mode)
    with pytest.raises(IndexError, match=r"ids\[0, 0\] is 9"):
        bag(np.full((4000, 40), 9, np.int32))
    with pytest.raises(IndexError, match=r"ids\[2\] is 4294967296"):
        bag([0, 1, 1 << 32], [0], padding_idx=0)
    with pytest.raises(
        IndexError, match=r"offsets\[1\] is 4; offsets must not decrease and must lie in \[0, 3\]"
    ):
        bag(FLAT, [0, 4])
    with pytest.raises(IndexError, match=r"offsets\[2\] is 1"):
        bag(FLAT, [0, 2, 1])
    with pytest.raises(IndexError, match=r"offsets\[0\] is -1"):
        bag(FLAT, [-1, 2])
    grad = convert(np.ones((2, 3), np.float32))
    for sparse in (False, True):
        with pytest.raises(IndexError, match=r"ids\[0, 1\] is 5"):
            lutra.gather.bag_grad(grad, convert(np.array([[0, 5], [1, 1]])), rows=5, sparse=sparse)
        with pytest.raises(IndexError, match=r"offsets\[1\] is -2"):
            lutra.gather.bag_grad(grad, convert(FLAT), convert(np.array([0, -2])), rows=5, sparse=sparse)
    with pytest.raises(IndexError, match=r"ids\[0\] is 0; ids must lie in \[0, 0\)"):
        lutra.gather.bag(convert(TABLE[:0]), convert(FLAT), convert(np.array([0])))


def test_bad_arguments():
    bag = lutra.gather.bag
    with pytest.raises(TypeError, match=r"table must be a NumPy, torch or CuPy array.*list"):
        bag([[1.0]], IDS)
    with pytest.raises(TypeError, match=r"ids must be a NumPy, torch or CuPy array.*list"):
        bag(TABLE, [[1]])
    with pytest.raises(TypeError, match="ids is a torch tensor on cpu, table is a NumPy array"):
        bag(TABLE, torch.tensor(IDS))
    with pytest.raises(TypeError, match="ids must be a torch tensor, as table is"):
        bag(torch.tensor(TABLE), IDS)
    with pytest.raises(TypeError, match="ids has dtype float64; it must be one of int32, int64"):
        bag(TABLE, IDS * 1.0)
    with pytest.raises(TypeError, match="table has dtype int64"):
        bag(TABLE.astype(np.int64), IDS)
    with pytest.raises(ValueError, match="table must be 2-d"):
        bag(TABLE[0], IDS)
    with pytest.raises(ValueError, match="1-d ids need offsets"):
        bag(TABLE, FLAT)
    with pytest.raises(ValueError, match="ids must be 2-d, or 1-d with offsets"):
        bag(TABLE, IDS[None])
    with pytest.raises(ValueError, match="ids must be 1-d where offsets are given"):
        bag(TABLE, IDS, FLAT)
    with pytest.raises(ValueError, match="offsets must be 1-d"):
        bag(TABLE, FLAT, IDS)
    with pytest.raises(TypeError, match="offsets has dtype float32"):
        bag(TABLE, FLAT, FLAT.astype(np.float32))
    with pytest.raises(ValueError, match="offsets is empty"):
        bag(TABLE, FLAT, FLAT[:0], include_last_offset=True)
    with pytest.raises(ValueError, match="include_last_offset is True, but there are no offsets"):
        bag(TABLE, IDS, include_last_offset=True)
    with pytest.raises(ValueError, match="mode must be one of 'sum', 'mean', 'max'; got 'min'"):
        bag(TABLE, IDS, mode="min")
    with pytest.raises(ValueError, match="weights go with mode 'sum' only"):
        bag(TABLE, IDS, None, IDS * 1.0, mode="mean")
    with pytest.raises(ValueError, match=r"weights has shape \(2,\); it must be that of ids, \(2, 2\)"):
        bag(TABLE, IDS, None, np.ones(2, np.float32))
    with pytest.raises(TypeError, match="weights has dtype int64"):
        bag(TABLE, IDS, None, IDS)
    with pytest.raises(ValueError, match=r"padding_idx is 5; it must lie in \[-5, 5\)"):
        bag(TABLE, IDS, padding_idx=5)
    with pytest.raises(TypeError, match="padding_idx must be an integer"):
        bag(TABLE, IDS, padding_idx="a")
    codes = TABLE.astype(np.uint8)
    with pytest.raises(ValueError, match="scale is missing"):
        bag(codes, IDS)
    with pytest.raises(ValueError, match=r"minimum has shape \(2,\); it must be \(5,\)"):
        bag(codes, IDS, scale=TABLE[:, 0], minimum=TABLE[:2, 0])
    with pytest.raises(TypeError, match="scale has dtype float64"):
        bag(codes, IDS, scale=TABLE[:, 0].astype(np.float64), minimum=TABLE[:, 0])
    with pytest.raises(ValueError, match="scale and minimum are for tables of uint8 or int8 codes"):
        bag(TABLE, IDS, scale=TABLE[:, 0], minimum=TABLE[:, 0])
    grad = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="table is needed for mode 'max'"):
        lutra.gather.bag_grad(grad, IDS, rows=5, mode="max")
    with pytest.raises(ValueError, match=r"grad has shape \(2, 3\); it must be \(bags, dim\) with 1 bags"):
        lutra.gather.bag_grad(grad, IDS[:1], rows=5)


def test_gradients_in_memory_of_freed_ones():
    """Pages are used again only once their gradient is dead, and whatever it was left with is overwritten."""
    n, dim = 200_000, 7
    kept = []
    for seed in range(4):
        ids = torch.randint(0, n, (1000, 20), generator=torch.Generator().manual_seed(seed))
        grad = lutra.gather.bag_grad(torch.ones(1000, dim), ids, rows=n)
        counts = torch.bincount(ids.reshape(-1), minlength=n).float()
        assert torch.equal(grad, counts[:, None].expand(n, dim))
        kept.append((grad[1:].numpy() if seed % 2 else grad.view(-1), counts))
        for view, wanted in kept:  # views keep the pages
            assert view.sum() == dim * (wanted.sum() if len(view) == n * dim else wanted[1:].sum())
        if seed == 2:
            kept[0][0].fill_(3.0)
            del kept[0]


def test_gradients_in_memory_of_freed_ones_numpy():
    n, dim = 200_000, 7
    ids = np.random.default_rng(0).integers(0, n, (1000, 20))
    first = lutra.gather.bag_grad(np.ones((1000, dim), np.float32), ids, rows=n)
    part = first[5:]
    del first
    second = lutra.gather.bag_grad(np.full((1000, dim), 2, np.float32), ids, rows=n)
    np.testing.assert_array_equal(second[5:], 2 * part)
    del part
    third = lutra.gather.bag_grad(np.full((1000, dim), 3, np.float32), ids, rows=n)
    np.testing.assert_array_equal(2 * third, 3 * second)
