"""lutra.gather on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import FLOATS, SIZES, TOLERANCE, close, rounded, same_bits

import lutra
from lutra.reference import gather as reference

DTYPES = (*FLOATS, "uint8", "int8")
MODES = ("sum", "mean", "max")


def make_table(rows, dim, dtype, seed=0):
    """(what the kernel gets, what the reference gets, scale, minimum)."""
    rng = np.random.default_rng(seed)
    if dtype in ("uint8", "int8"):
        low = np.iinfo(dtype).min
        codes = rng.integers(low, low + 256, (rows, dim)).astype(dtype)
        return codes, codes, rng.random(rows, np.float32) + 0.1, -rng.random(rows, np.float32)
    table = rounded(rng.standard_normal((rows, dim)).astype(np.float32), dtype)
    return table, table, None, None


def make_ids(rows, layout, dtype="int64", seed=0, longest=9):
    """Ids with repetitions and empty bags: (ids, offsets, include_last_offset)."""
    rng = np.random.default_rng(seed)
    if layout == "fixed":
        return rng.integers(0, rows, (23, 5)).astype(dtype), None, False
    length = rng.integers(0, longest, 40)
    length[[0, 7, 8, -1]] = 0
    length[3] = 61
    ids = rng.integers(0, rows, length.sum()).astype(dtype)
    last = layout == "last"
    return ids, np.concatenate([[0], np.cumsum(length)])[: None if last else -1].astype(dtype), last


def put_all(gpu, dtype, table, scale, minimum):
    on_gpu = gpu.put(table, dtype)
    return on_gpu, {} if scale is None else {"scale": gpu.put(scale), "minimum": gpu.put(minimum)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bag(gpu, dtype, mode):
    for dim in (*SIZES, 8, 64, 100, 300):
        for layout in ("fixed", "offsets", "last"):
            for id_type in ("int32", "int64"):
                for padding in (None, 2):
                    table, exact, scale, minimum = make_table(13, dim, dtype, dim)
                    ids, offsets, last = make_ids(13, layout, id_type, dim)
                    t, quantized = put_all(gpu, dtype, table, scale, minimum)
                    i, o = gpu.put(ids), gpu.put(offsets)
                    with gpu.no_sync():
                        out = lutra.gather.bag(
                            t, i, o, mode=mode, padding_idx=padding, include_last_offset=last, **quantized
                        )
                    want = reference.bag(exact, ids, offsets, None, scale, minimum, mode, padding, last)
                    assert gpu.owns(out)
                    close(gpu.get(out), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bag_with_weights(gpu, dtype):
    rng = np.random.default_rng(0)
    for dim in (1, 16, 33):
        for layout in ("fixed", "offsets"):
            table, exact, scale, minimum = make_table(29, dim, dtype)
            ids, offsets, _ = make_ids(29, layout)
            weights = rng.standard_normal(ids.shape).astype(np.float32)
            t, quantized = put_all(gpu, dtype, table, scale, minimum)
            out = lutra.gather.bag(t, gpu.put(ids), gpu.put(offsets), gpu.put(weights), **quantized)
            close(gpu.get(out), reference.bag(exact, ids, offsets, weights, scale, minimum), dtype, 4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bags,length", [(1, 100_000), (3, 5000), (2, 700), (40, 129)])
def test_few_long_bags(gpu, mode, bags, length):
    """Here several groups of threads share a bag."""
    table, exact, _, _ = make_table(1000, 40, "float32")
    ids = np.random.default_rng(1).integers(0, 1000, (bags, length))
    for padding in (None, 5):
        out = lutra.gather.bag(gpu.put(table), gpu.put(ids), mode=mode, padding_idx=padding)
        close(
            gpu.get(out),
            reference.bag(exact.astype(np.float64), ids, mode=mode, padding_idx=padding),
            factor=3,
        )


def test_max_keeps_nan_and_the_first_of_equals(gpu):
    table = np.array([[1, np.nan, -np.inf], [1, 2, -np.inf], [0, 5, -np.inf]], np.float32)
    for repeat in (1, 400):  # one group of threads, and several
        ids = np.tile(np.array([[2, 1, 0, 1]]), (1, repeat))
        t, i = gpu.put(table), gpu.put(ids)
        np.testing.assert_array_equal(gpu.get(lutra.gather.bag(t, i, mode="max")), [[1, np.nan, -np.inf]])
        grad = lutra.gather.bag_grad(gpu.put(np.ones((1, 3), np.float32)), i, rows=3, mode="max", table=t)
        want = np.zeros((3, 3), np.float32)
        want[[1, 0, 2], [0, 1, 2]] = 1
        np.testing.assert_array_equal(gpu.get(grad), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_id_outside_the_table_makes_its_bag_nan(gpu, dtype, mode):
    table, exact, _, _ = make_table(10, 24, dtype)
    ids = np.random.default_rng(0).integers(0, 10, (6, 50))
    good = reference.bag(exact, ids, mode=mode)
    bad = ids.copy()
    bad[1, 3], bad[4, 49], bad[5, 0] = 10, -1, 2**40
    out = gpu.get(lutra.gather.bag(gpu.put(table, dtype), gpu.put(bad), mode=mode))
    assert np.isnan(out[[1, 4, 5]]).all()
    close(out[[0, 2, 3]], good[[0, 2, 3]], dtype, 4)


def test_offsets_out_of_order_make_their_bags_nan(gpu):
    table = np.ones((4, 8), np.float32)
    ids = np.zeros(10, np.int64)
    out = gpu.get(lutra.gather.bag(gpu.put(table), gpu.put(ids), gpu.put(np.array([0, 5, 3, 99]))))
    assert np.isnan(out[[1, 2, 3]]).all() and (out[0] == 5).all()
    grad = lutra.gather.bag_grad(
        gpu.put(np.ones((4, 8), np.float32)), gpu.put(ids), gpu.put(np.array([0, 5, 3, 99])), rows=4
    )
    assert np.isfinite(gpu.get(grad)).all()


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bag_grad(gpu, dtype, mode, sparse):
    for dim in (1, 3, 8, 33, 64, 200):
        for layout in ("fixed", "offsets", "last"):
            for padding in (None, 2):
                table, exact, _, _ = make_table(13, dim, dtype, dim)
                ids, offsets, last = make_ids(13, layout, "int32" if dim == 8 else "int64", dim)
                bags = len(ids) if offsets is None else len(offsets) - last
                rng = np.random.default_rng(dim)
                g = rounded(rng.standard_normal((bags, dim)).astype(np.float32), dtype)
                weights = rng.standard_normal(ids.shape).astype(np.float32) if mode == "sum" else None
                argmax = None
                if mode == "max":
                    argmax = reference.bag(exact, ids, offsets, None, None, None, mode, padding, last, True)[
                        1
                    ]
                want = reference.bag_grad(g, ids, offsets, weights, argmax, 13, mode, padding, last, sparse)
                arrays = [gpu.put(a) for a in (ids, offsets, weights)]
                got = lutra.gather.bag_grad(
                    gpu.put(g, dtype), *arrays, rows=13, mode=mode, padding_idx=padding,
                    include_last_offset=last, table=gpu.put(table, dtype), sparse=sparse,
                )  # fmt: skip
                if sparse:
                    np.testing.assert_array_equal(gpu.get(got.rows), want[0])
                    got, want = got.values, want[1]
                close(gpu.get(got), want, dtype, 4)


@pytest.mark.parametrize("popular", [0.0, 0.5, 1.0])
def test_gradient_of_popular_rows(gpu, popular):
    """Long runs of one id cross many tiles of the sorted positions."""
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 5000, 20_000)
    ids[rng.random(20_000) < popular] = 77
    g = rng.standard_normal((1000, 20)).astype(np.float32)
    ids = ids.reshape(1000, 20)
    for dim in (4, 20):
        got = lutra.gather.bag_grad(gpu.put(g[:, :dim]), gpu.put(ids), rows=5000)
        want = reference.bag_grad(g[:, :dim].astype(np.float64), ids, rows=5000)
        close(gpu.get(got), want, factor=10)


def test_gradients_have_the_same_bits_every_time(gpu):
    rng = np.random.default_rng(5)
    ids = gpu.put(rng.zipf(1.2, (4096, 20)) % 1000)
    g = gpu.put(rng.standard_normal((4096, 64)).astype(np.float32))
    first = gpu.get(lutra.gather.bag_grad(g, ids, rows=1000))
    for _ in range(5):
        same_bits(first, gpu.get(lutra.gather.bag_grad(g, ids, rows=1000)))


def test_nothing_touched(gpu):
    ids = np.full((3, 2), 4)
    g = np.ones((3, 5), np.float32)
    dense = lutra.gather.bag_grad(gpu.put(g), gpu.put(ids), rows=6, padding_idx=4)
    assert (gpu.get(dense) == 0).all()
    touched = lutra.gather.bag_grad(gpu.put(g), gpu.put(ids), rows=6, padding_idx=4, sparse=True)
    assert gpu.get(touched.rows).shape == (0,) and gpu.get(touched.values).shape == (0, 5)
    empty = lutra.gather.bag_grad(gpu.put(g[:0]), gpu.put(ids[:0]), rows=6)
    assert (gpu.get(empty) == 0).all() and gpu.get(empty).shape == (6, 5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_autograd(gpu_torch, dtype):
    """Dense gradients of table and weights through torch, without waiting for the device."""
    torch, rng = gpu_torch.torch, np.random.default_rng(0)
    for dim in (1, 17, 64):
        table = rounded(rng.standard_normal((50, dim)).astype(np.float32), dtype)
        ids, offsets, _ = make_ids(50, "offsets")
        weights = rng.standard_normal(ids.shape).astype(np.float32)
        g = rounded(rng.standard_normal((len(offsets), dim)).astype(np.float32), dtype)
        t, w = gpu_torch.put(table, dtype).requires_grad_(), gpu_torch.put(weights).requires_grad_()
        i, o, up = gpu_torch.put(ids), gpu_torch.put(offsets), gpu_torch.put(g, dtype)
        with gpu_torch.no_sync():
            out = lutra.gather.bag(t, i, o, w, padding_idx=3)
            to_table, to_weights = torch.autograd.grad(out, (t, w), up)
        close(
            gpu_torch.get(to_table),
            reference.bag_grad(g, ids, offsets, weights, None, 50, "sum", 3),
            dtype,
            4,
        )
        close(
            gpu_torch.get(to_weights),
            reference.bag_weight_grad(g, table, ids, offsets, None, None, 3),
            dtype,
            4,
        )


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_weight_gradient_of_8_bit_rows(gpu_torch, dtype):
    torch, rng = gpu_torch.torch, np.random.default_rng(0)
    for dim in (1, 12, 33):
        table, exact, scale, minimum = make_table(50, dim, dtype)
        ids, offsets, _ = make_ids(50, "offsets")
        t, quantized = put_all(gpu_torch, dtype, table, scale, minimum)
        w = torch.ones(ids.shape, device=t.device, requires_grad=True)
        out = lutra.gather.bag(t, gpu_torch.put(ids), gpu_torch.put(offsets), w, **quantized)
        g = rng.standard_normal(tuple(out.shape)).astype(np.float32)
        (to_weights,) = torch.autograd.grad(out, w, gpu_torch.put(g))
        close(
            gpu_torch.get(to_weights),
            reference.bag_weight_grad(g, exact, ids, offsets, scale, minimum),
            dtype,
        )


def test_weight_gradient_of_a_bad_id_is_nan(gpu_torch):
    torch = gpu_torch.torch
    t = gpu_torch.put(np.ones((4, 8), np.float32))
    w = torch.ones((2, 3), device=t.device, requires_grad=True)
    out = lutra.gather.bag(t, gpu_torch.put(np.array([[0, 9, 1], [2, 2, 2]])), None, w)
    (grad,) = torch.autograd.grad(out, w, torch.ones_like(out))
    np.testing.assert_array_equal(gpu_torch.get(grad), [[8, np.nan, 8], [8, 8, 8]])


# ---------------------------------------------------------------- tables
@pytest.mark.parametrize("dtype", FLOATS)
def test_tables(gpu, dtype):
    rng = np.random.default_rng(0)
    for tokens in (1, 3, 33, 1100):
        for n_tables, entries, dim in ((1, 2, 1), (5, 16, 33), (64, 8, 24), (7, 256, 100)):
            t = rounded(rng.standard_normal((n_tables, entries, dim)).astype(np.float32), dtype)
            codes = rng.integers(0, entries, (tokens, n_tables)).astype(np.int32)
            weights = rng.standard_normal((tokens, n_tables)).astype(np.float32)
            bias = rounded(rng.standard_normal(dim).astype(np.float32), dtype)
            on_gpu = [gpu.put(t, dtype), gpu.put(codes), gpu.put(weights), gpu.put(bias, dtype)]
            with gpu.no_sync():
                full, plain = lutra.gather.tables(*on_gpu), lutra.gather.tables(*on_gpu[:2])
            close(gpu.get(full), reference.tables(t, codes, weights, bias), dtype, 4)
            close(gpu.get(plain), reference.tables(t, codes), dtype, 4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tables_with_many_tokens(gpu, dtype):
    """Enough tokens and columns that tables go through shared memory; ragged at both ends."""
    rng = np.random.default_rng(0)
    for tokens, n_tables, entries, dim in ((1100, 9, 16, 4104), (2100, 17, 256, 3208), (600, 3, 200, 8200)):
        t = rounded(rng.standard_normal((n_tables, entries, dim)).astype(np.float32), dtype)
        codes = rng.integers(0, entries, (tokens, n_tables)).astype(np.int32)
        weights = rng.standard_normal((tokens, n_tables)).astype(np.float32)
        bias = rounded(rng.standard_normal(dim).astype(np.float32), dtype)
        bad = codes.copy()
        bad[5, 2], bad[tokens - 1, 0] = entries, -1
        for w, b in ((weights, bias), (None, None)):
            arrays = (gpu.put(bad), gpu.put(w), gpu.put(b, dtype))
            out = gpu.get(lutra.gather.tables(gpu.put(t, dtype), *arrays))
            assert np.isnan(out[[5, tokens - 1]]).all()
            rest = np.setdiff1d(np.arange(tokens), [5, tokens - 1])
            want = reference.tables(t, codes[rest], None if w is None else w[rest], b)
            close(out[rest], want, dtype, 4)


def test_a_code_outside_its_table_makes_the_token_nan(gpu):
    t, codes = np.ones((3, 4, 9), np.float32), np.zeros((5, 3), np.int32)
    codes[1, 2], codes[3, 0] = 4, -1
    out = gpu.get(lutra.gather.tables(gpu.put(t), gpu.put(codes)))
    assert np.isnan(out[[1, 3]]).all() and (out[[0, 2, 4]] == 3).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_tables_gradients(gpu_torch, dtype):
    torch, rng = gpu_torch.torch, np.random.default_rng(0)
    for tokens, n_tables, entries, dim in ((1, 1, 2, 1), (33, 5, 16, 33), (300, 4, 256, 64), (2000, 3, 2, 8)):
        t = rounded(rng.standard_normal((n_tables, entries, dim)).astype(np.float32), dtype)
        codes = rng.integers(0, entries, (tokens, n_tables)).astype(np.int32)
        weights = rng.standard_normal((tokens, n_tables)).astype(np.float32)
        g = rounded(rng.standard_normal((tokens, dim)).astype(np.float32), dtype)
        a, w = gpu_torch.put(t, dtype).requires_grad_(), gpu_torch.put(weights).requires_grad_()
        c, up = gpu_torch.put(codes), gpu_torch.put(g, dtype)
        with gpu_torch.no_sync():
            out = lutra.gather.tables(a, c, w)
            to_tables, to_weights = torch.autograd.grad(out, (a, w), up)
        want_tables, want_weights = reference.tables_backward(g, t, codes, weights)
        close(gpu_torch.get(to_tables), want_tables, dtype, 4)
        close(gpu_torch.get(to_weights), want_weights, "float32", 4)
        again = torch.autograd.grad(lutra.gather.tables(a, c, w), (a, w), up)
        same_bits(gpu_torch.get(to_tables), gpu_torch.get(again[0]))
        same_bits(gpu_torch.get(to_weights), gpu_torch.get(again[1]))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_quantized_rows(gpu, dtype):
    table = np.random.default_rng(0).standard_normal((40, 33)).astype(np.float32)
    rows = lutra.gather.quantize_rows(gpu.put(table), dtype)
    back = gpu.get(lutra.gather.dequantize_rows(*rows))
    step = gpu.get(rows.scale)[:, None]
    assert (np.abs(back - table) <= 0.51 * step).all() and gpu.owns(rows.codes)
    ids = np.arange(40).reshape(8, 5)
    out = lutra.gather.bag(rows.codes, gpu.put(ids), scale=rows.scale, minimum=rows.minimum)
    close(gpu.get(out), back[ids].sum(1), "float32", 4)
    assert TOLERANCE[dtype] < 1e-3
