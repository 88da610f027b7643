"""Rows of other formats on CUDA: compressed sparse rows and senses, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from bag_data import make_ids
from gpu_arrays import FLOATS, close, rounded

import lutra
from lutra.reference import csr as reference
from lutra.reference import gather as gather_reference
from lutra.reference import train as train_reference


def pruned(rows, dim, dtype, seed, most=9):
    """values, indptr, columns: rows of 0 to ``most`` values."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, min(most, dim) + 1, rows)
    columns = np.concatenate([np.empty(0, int), *[np.sort(rng.permutation(dim)[:n]) for n in lengths]])
    values = rounded(rng.standard_normal(len(columns)).astype(np.float32), dtype)
    return values, np.concatenate([[0], np.cumsum(lengths)]), columns


@pytest.mark.parametrize("dtype", FLOATS)
def test_bag_csr(gpu, dtype):
    for n, (dim, column_type) in enumerate(
        [(1, "uint8"), (33, "uint8"), (100, "int16"), (300, "int16"), (13000, "int32")]
    ):
        values, indptr, columns = pruned(21, dim, dtype, n, 70)
        wide = "int64" if n % 2 else "int32"
        table = [gpu.put(values, dtype), gpu.put(indptr.astype(wide)), gpu.put(columns.astype(column_type))]
        for layout, mode in (("fixed", "sum"), ("offsets", "mean"), ("last", "sum")):
            ids, offsets, last = make_ids(21, layout, wide, n)
            w = np.random.default_rng(n).standard_normal(ids.shape).astype(np.float32)
            w = w if layout == "last" else None
            arrays = [gpu.put(a) for a in (ids, offsets, w)]
            with gpu.no_sync():
                out = lutra.gather.bag_csr(
                    *table, *arrays, dim=dim, mode=mode, padding_idx=2, include_last_offset=last
                )
            want = reference.bag_csr(values, indptr, columns, ids, offsets, w, dim, mode, 2, last)
            close(gpu.get(out), want, dtype, 4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_csr(gpu_torch, dtype):
    torch = gpu_torch.torch
    for dim in (5, 40, 200):
        values, indptr, columns = pruned(21, dim, dtype, dim, 70)
        for layout, mode in (("fixed", "sum"), ("offsets", "mean"), ("last", "sum")):
            ids, offsets, last = make_ids(21, layout, "int64", dim)
            w = np.random.default_rng(dim).standard_normal(ids.shape).astype(np.float32)
            w = w if mode == "sum" else None
            t = gpu_torch.put(values, dtype).requires_grad_()
            v = None if w is None else gpu_torch.put(w).requires_grad_()
            out = lutra.gather.bag_csr(
                t, gpu_torch.put(indptr), gpu_torch.put(columns.astype(np.int32)), gpu_torch.put(ids),
                gpu_torch.put(offsets), v, dim=dim, mode=mode, padding_idx=2, include_last_offset=last,
            )  # fmt: skip
            g = rounded(np.random.default_rng(1).standard_normal(tuple(out.shape)).astype(np.float32), dtype)
            got = torch.autograd.grad(out, [a for a in (t, v) if a is not None], gpu_torch.put(g, dtype))
            want = reference.bag_csr_grad(g, indptr, columns, ids, offsets, w, mode, 2, last)
            close(gpu_torch.get(got[0]), want, dtype, 8)
            if w is not None:
                want = reference.bag_csr_weight_grad(g, values, indptr, columns, ids, offsets, 2, last)
                close(gpu_torch.get(got[1]), want, dtype, 8)


@pytest.mark.sanitize
def test_csr_out_of_range(gpu):
    """An id outside gives NaN; a wrong indptr counts as empty rows, a column beyond dim is dropped."""
    values, columns = np.ones(6, np.float32), np.array([0, 1, 9, 2, 0, 3], np.int32)
    indptr = np.array([0, 3, 2, 4, 99])
    ids = np.array([[0], [1], [2], [3], [4], [-1]])
    out = lutra.gather.bag_csr(*map(gpu.put, (values, indptr, columns, ids)), dim=4)
    out = gpu.get(out)
    np.testing.assert_array_equal(out[:4], [[1, 1, 0, 0], [0] * 4, [0, 0, 1, 0], [0] * 4])
    assert np.isnan(out[4:]).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_senses(gpu, dtype):
    rng = np.random.default_rng(0)
    for dim in (1, 3, 16, 33, 64, 300):
        for n in (1, 9, 200):
            counts = rng.integers(1, 6, 12)
            offsets = np.concatenate([[0], np.cumsum(counts)])
            flat = rounded(rng.integers(-3, 4, (offsets[-1], dim)).astype(np.float32), dtype)  # with ties
            ids = rng.integers(0, 12, n).astype(np.int32 if n == 9 else np.int64)
            context = rounded(rng.integers(-3, 4, (n, dim)).astype(np.float32), dtype)
            on_gpu = [gpu.put(flat, dtype), gpu.put(ids), gpu.put(context, dtype), gpu.put(offsets)]
            with gpu.no_sync():
                got = lutra.gather.senses(*on_gpu)
            vectors, rows, scores = gather_reference.senses(flat, ids, context, offsets)
            np.testing.assert_array_equal(gpu.get(got.senses), rows - offsets[ids])
            np.testing.assert_array_equal(gpu.get(got.vectors).astype(np.float32), vectors)
            np.testing.assert_array_equal(gpu.get(got.scores), scores)
            table = flat[:12].reshape(4, 3, dim)
            got = lutra.gather.senses(gpu.put(table, dtype), gpu.put(ids % 4), gpu.put(context, dtype))
            vectors, rows, scores = gather_reference.senses(table, ids % 4, context)
            np.testing.assert_array_equal(gpu.get(got.senses), rows - (ids % 4) * 3)
            np.testing.assert_array_equal(gpu.get(got.vectors).astype(np.float32), vectors)


@pytest.mark.sanitize
def test_senses_out_of_range(gpu):
    table = np.ones((6, 8), np.float32)
    table[2] = np.nan
    offsets = np.array([0, 2, 5, 5, 9])
    got = lutra.gather.senses(
        gpu.put(table), gpu.put(np.array([0, 1, 2, 3, 7, -1])), gpu.put(np.ones((6, 8), np.float32)),
        gpu.put(offsets),
    )  # fmt: skip
    scores = gpu.get(got.scores)
    assert scores[0] == 8 and np.isnan(scores[1:]).all()
    assert np.isnan(gpu.get(got.vectors)[1:]).all() and gpu.get(got.senses)[1] == 0


@pytest.mark.parametrize("gradient", ["hard", "straight_through", "softmax"])
def test_gradients_of_senses(gpu_torch, gradient):
    torch, rng = gpu_torch.torch, np.random.default_rng(0)
    table = rng.standard_normal((20, 3, 12)).astype(np.float32)
    ids, context = rng.integers(0, 20, 50), rng.standard_normal((50, 12)).astype(np.float32)
    grads = []
    for there in ("cpu", "cuda"):
        t, c = (torch.from_numpy(a).to(there).requires_grad_() for a in (table, context))
        out = lutra.gather.senses(t, torch.from_numpy(ids).to(there), c, gradient=gradient).vectors
        wanted = (t,) if gradient == "hard" else (t, c)
        grads.append(torch.autograd.grad(out.square().sum(), wanted))
    for got, want in zip(grads[1], grads[0]):
        close(gpu_torch.get(got), gpu_torch.get(want), factor=10)


TRAINS = [
    (3, 4, 5, 2, 2, 3, 4, 8),
    (2, 3, 4, 1, 1, 1, 1, 1),
    (4, 3, 5, 4, 4, 4, 16, 17),
    (2, 2, 9, 3, 5, 8, 5, 32),
]


def train_cores(sizes, dtype):
    i1, i2, i3, d1, d2, d3, r1, r2 = sizes
    rng = np.random.default_rng(sum(sizes))
    shapes = (i1, d1, r1), (i2, r1, d2, r2), (i3, d3, r2)
    return [rounded(rng.standard_normal(shape).astype(np.float32), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", TRAINS)
def test_tensor_train(gpu, sizes, dtype):
    cores = train_cores(sizes, dtype)
    rows = sizes[0] * sizes[1] * sizes[2] - 1
    on_gpu = [gpu.put(core, dtype) for core in cores]
    for layout, mode in (("fixed", "sum"), ("offsets", "mean"), ("last", "sum")):
        ids, offsets, last = make_ids(rows, layout)
        w = np.random.default_rng(1).standard_normal(ids.shape).astype(np.float32)
        w = w if layout == "last" else None
        arrays = [gpu.put(a) for a in (ids, offsets, w)]
        with gpu.no_sync():
            out = lutra.gather.tensor_train(
                *on_gpu, *arrays, rows=rows, mode=mode, padding_idx=2, include_last_offset=last
            )
        want = train_reference.tensor_train(*cores, ids, offsets, w, rows, mode, 2, last)
        close(gpu.get(out), want, dtype, 20)
    bad = gpu.get(lutra.gather.tensor_train(*on_gpu, gpu.put(np.array([[rows], [-1], [0]])), rows=rows))
    np.testing.assert_array_equal(np.isnan(bad).all(1), [True, True, False])


@pytest.mark.parametrize("sizes", TRAINS)
def test_gradients_of_tensor_train(gpu_torch, sizes):
    torch, cores = gpu_torch.torch, train_cores(sizes, "float32")
    rows = sizes[0] * sizes[1] * sizes[2]
    for layout, mode in (("fixed", "sum"), ("offsets", "mean"), ("last", "sum")):
        ids, offsets, last = make_ids(rows, layout)
        w = np.random.default_rng(1).standard_normal(ids.shape).astype(np.float32)
        w = w if mode == "sum" else None
        leaves = [gpu_torch.put(a).requires_grad_() for a in (*cores, *([] if w is None else [w]))]
        out = lutra.gather.tensor_train(
            *leaves[:3], gpu_torch.put(ids), gpu_torch.put(offsets), leaves[3] if w is not None else None,
            mode=mode, padding_idx=2, include_last_offset=last,
        )  # fmt: skip
        g = np.random.default_rng(2).standard_normal(tuple(out.shape)).astype(np.float32)
        got = torch.autograd.grad(out, leaves, gpu_torch.put(g))
        want = list(train_reference.tensor_train_grad(g, *cores, ids, offsets, w, rows, mode, 2, last))
        if w is not None:
            want.append(train_reference.tensor_train_weight_grad(g, *cores, ids, offsets, rows, 2, last))
        for a, b in zip(got, want):
            close(gpu_torch.get(a), b, factor=200)  # torch's products may round to TF32 in another setting
