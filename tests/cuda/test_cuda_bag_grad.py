"""Gradients of lutra.gather.bag on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from bag_data import MODES, make_ids, make_table, put_all
from gpu_arrays import FLOATS, close, rounded, same_bits

import lutra
from lutra.reference import gather as reference


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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("of_x", FLOATS)
def test_row_dots(gpu, dtype, of_x):
    """Vectors of another type than the table's are not rounded to it."""
    rng = np.random.default_rng(4)
    for dim in (1, 8, 33, 100):
        table = rounded(rng.standard_normal((40, dim)).astype(np.float32), dtype)
        x = rounded(rng.standard_normal((7, dim)).astype(np.float32), of_x)
        ids = rng.integers(0, 40, (7, 5))
        got = lutra.gather.row_dots(gpu.put(table, dtype), gpu.put(ids), gpu.put(x, of_x))
        close(gpu.get(got), np.einsum("bid,bd->bi", table[ids], x))


def test_weight_gradient_of_a_bad_id_is_nan(gpu_torch):
    torch = gpu_torch.torch
    t = gpu_torch.put(np.ones((4, 8), np.float32))
    w = torch.ones((2, 3), device=t.device, requires_grad=True)
    out = lutra.gather.bag(t, gpu_torch.put(np.array([[0, 9, 1], [2, 2, 2]])), None, w)
    (grad,) = torch.autograd.grad(out, w, torch.ones_like(out))
    np.testing.assert_array_equal(gpu_torch.get(grad), [[8, np.nan, 8], [8, 8, 8]])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "rows,n", [(3, 1), (255, 31), (256, 32), (257, 33), (70_000, 4097), (5, 30_000), (1, 9000)]
)
def test_borders_of_tiles_and_chunks(gpu, rows, n, sparse):
    """Numbers of ids around tiles and chunks, few and many rows, rows that cross many tiles."""
    rng = np.random.default_rng(rows)
    ids = rng.integers(0, rows, (n, 1))
    ids[n // 3 : n // 2] = rows // 2
    g = rng.standard_normal((n, 12)).astype(np.float32)
    for dim in (12, 5):
        got = lutra.gather.bag_grad(gpu.put(g[:, :dim]), gpu.put(ids), rows=rows, sparse=sparse)
        want = reference.bag_grad(g[:, :dim].astype(np.float64), ids, rows=rows, sparse=sparse)
        if sparse:
            np.testing.assert_array_equal(gpu.get(got.rows), want[0])
            got, want = got.values, want[1]
        close(gpu.get(got), want, factor=10)


def test_bags_of_no_offsets_take_no_ids(gpu):
    """Ids that belong to no bag: without bags, before the first offset, behind the last."""
    ids = gpu.put(np.array([1, 2, 3, 4]))
    for offsets, last, touched in (([], False, []), ([2], False, [3, 4]), ([1, 3], True, [2, 3])):
        bags = len(offsets) - last
        g = gpu.put(np.ones((bags, 4), np.float32))
        o = gpu.put(np.array(offsets, np.int64))
        got = lutra.gather.bag_grad(g, ids, o, rows=6, include_last_offset=last, sparse=True)
        np.testing.assert_array_equal(gpu.get(got.rows), touched)
        assert (gpu.get(got.values) == 1).all()


@pytest.mark.sanitize
def test_small_gradient(gpu_torch):
    ids = gpu_torch.put(np.random.default_rng(0).integers(0, 50, (40, 7)))
    g = gpu_torch.put(np.ones((40, 20), np.float32))
    rows = lutra.gather.bag_grad(g, ids, rows=50, sparse=True)
    dense = lutra.gather.bag_grad(g, ids, rows=50)
    np.testing.assert_array_equal(gpu_torch.get(dense)[gpu_torch.get(rows.rows)], gpu_torch.get(rows.values))
    assert gpu_torch.get(dense).sum() == 40 * 7 * 20
