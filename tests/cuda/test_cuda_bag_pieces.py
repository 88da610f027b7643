"""Rows put together from pieces on CUDA: against the reference, gradients against float64 in torch."""

from __future__ import annotations

import numpy as np
import pytest
from bag_data import make_ids
from gpu_arrays import FLOATS, close, rounded

import lutra
from lutra.gather._pieces import _by_reference

Pieces = lutra.gather.Pieces
ROWS = 60
CASES = {
    "codes 8 bits": Pieces("codes", (5, 8), 4),
    "codes 4 bits": Pieces("codes", (3, 4), 6),
    "codes 6 bits": Pieces("codes", (4, 6), 1),
    "codes 12 bits": Pieces("codes", (2, 12), 3),
    "residual codes": Pieces("codes", (5, 4), 24, "sum"),
    "digits": Pieces("digits", (3, 4, 4), 8),
    "digits added": Pieces("digits", (3, 4, 4), 33, "sum"),
    "quotient and remainder": Pieces("qr", (7, 9), 16, "sum"),
    "their product": Pieces("qr", (7, 9), 20, "product"),
    "hash": Pieces("hash", (2, 31, 1103515, 69069, 12345, 2038074742), 12, "sum"),
    "robe": Pieces("robe", (4, 100, 1103515, 69069, 12345, 77, 2038074742, 5), 5),
    "modulo": Pieces("modulo", (13,), 17, "sum"),
    "blocks": Pieces("blocks", (4, 20), 64, "sum"),
}


def make(pieces, dtype, seed):
    rng = np.random.default_rng(seed)
    size = pieces.table_rows * (1 if pieces.kind == "robe" else pieces.width)
    table = rounded(rng.standard_normal(size).astype(np.float32), dtype)
    stored = None
    if pieces.kind == "codes":
        m, bits = pieces.numbers
        stored = rng.integers(0, 256, (ROWS, (m * bits + 7) // 8)).astype(np.uint8)
    elif pieces.kind == "blocks":
        stored = rng.permutation(20)[:15].astype(np.int32)
    weighted = pieces.combine == "sum" and seed % 2 == 0
    own = rounded(rng.standard_normal((ROWS, pieces.m)).astype(np.float32), dtype) if weighted else None
    return table, stored, own


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bag_pieces(gpu, dtype, name):
    pieces = CASES[name]
    for seed, (layout, mode) in enumerate((("fixed", "sum"), ("offsets", "mean"), ("last", "sum"))):
        table, stored, own = make(pieces, dtype, seed)
        ids, offsets, last = make_ids(ROWS, layout, "int32" if seed else "int64", seed)
        w = np.random.default_rng(seed).standard_normal(ids.shape).astype(np.float32)
        w, padding = (w if layout == "last" else None), (3 if seed else None)
        arrays = [gpu.put(table, dtype), *map(gpu.put, (ids, offsets, w))]
        more = {"stored": gpu.put(stored), "piece_weights": gpu.put(own, dtype)}
        with gpu.no_sync():
            out = lutra.gather.bag_pieces(
                *arrays, pieces=pieces, rows=ROWS, mode=mode, padding_idx=padding, include_last_offset=last,
                **more,
            )  # fmt: skip
        given = (table, ids, offsets, w, stored, own)
        close(gpu.get(out), _by_reference(pieces, given, ROWS, mode, padding, last), dtype, 4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients(gpu_torch, dtype, name):
    torch, pieces = gpu_torch.torch, CASES[name]
    for seed, (layout, mode) in enumerate((("fixed", "sum"), ("offsets", "mean"), ("last", "sum"))):
        table, stored, own = make(pieces, dtype, seed)
        ids, offsets, last = make_ids(ROWS, layout, seed=seed)
        w = np.random.default_rng(seed).standard_normal(ids.shape).astype(np.float32)
        w = w if layout == "last" else None
        grads = []
        for wide in (True, False):

            def leaf(a, wide=wide, dtype=dtype):
                if a is None:
                    return None
                t = torch.from_numpy(a).double() if wide else gpu_torch.put(a, dtype)
                return t.requires_grad_()

            def there(a, wide=wide):
                return None if a is None else torch.from_numpy(a) if wide else gpu_torch.put(a)

            t, p = leaf(table), leaf(own)
            v = None if w is None else there(w).to(torch.float64 if wide else torch.float32).requires_grad_()
            out = lutra.gather.bag_pieces(
                t, there(ids), there(offsets), v, pieces=pieces, rows=ROWS, stored=there(stored),
                piece_weights=p, mode=mode, padding_idx=3, include_last_offset=last,
            )  # fmt: skip
            up = torch.from_numpy(
                rounded(np.random.default_rng(9).standard_normal(tuple(out.shape)).astype(np.float32), dtype)
            )
            leaves = [a for a in (t, p, v) if a is not None]
            got = torch.autograd.grad(out, leaves, up.to(out))
            grads.append([g.detach().cpu().double().numpy() for g in got])
        for got, want in zip(grads[1], grads[0]):
            close(got.reshape(want.shape), want, dtype, 8)


def test_what_is_out_of_range_is_nan(gpu):
    pieces = CASES["blocks"]
    table, stored, _ = make(pieces, "float32", 1)
    stored[2] = 20
    ids = np.array([[0, 1], [60, 1], [8, 1], [-1, 5]])
    out = lutra.gather.bag_pieces(
        gpu.put(table), gpu.put(ids), pieces=pieces, rows=ROWS, stored=gpu.put(stored)
    )
    np.testing.assert_array_equal(np.isnan(gpu.get(out)).all(1), [False, True, True, True])


@pytest.mark.sanitize
@pytest.mark.parametrize("name", ["codes 12 bits", "robe", "their product"])
def test_small(gpu_torch, name):
    torch, pieces = gpu_torch.torch, CASES[name]
    table, stored, _ = make(pieces, "float32", 1)
    t = gpu_torch.put(table).requires_grad_()
    ids = gpu_torch.put(np.arange(ROWS).reshape(-1, 2))
    out = lutra.gather.bag_pieces(t, ids, pieces=pieces, rows=ROWS, stored=gpu_torch.put(stored))
    (grad,) = torch.autograd.grad(out.sum(), t)
    assert bool(grad.isfinite().all())
