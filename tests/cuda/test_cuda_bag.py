"""lutra.gather.bag on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from bag_data import DTYPES, MODES, make_ids, make_table, put_all
from gpu_arrays import FLOATS, SIZES, TOLERANCE, close

import lutra
from lutra.reference import gather as reference


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
