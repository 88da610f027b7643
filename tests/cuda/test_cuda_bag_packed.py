"""Packed rows on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from bag_data import make_ids
from gpu_arrays import DEVICE, close

import lutra
from lutra.reference import packed as reference

KINDS = tuple(reference.KINDS)
DTYPES = ("float32", "float16", "bfloat16")


def packed_table(kind, rows, dim, group=None, seed=0):
    table = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return reference.pack_rows(table, kind, group)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("kind", KINDS)
def test_bag_packed(gpu, kind, mode):
    for n, (dim, group) in enumerate(
        [(1, None), (2, None), (3, None), (7, None), (8, None), (15, None), (16, None), (17, 16), (31, None),
         (33, 16), (63, 32), (64, None), (64, 32), (65, None), (97, 48), (100, None), (128, None),
         (130, None), (264, 64), (320, None)]
    ):  # fmt: skip
        table = packed_table(kind, 23, dim, group, dim)
        layout = ("fixed", "offsets", "last")[n % 3]
        ids, offsets, last = make_ids(23, layout, "int32" if n % 2 else "int64", dim)
        weights = np.random.default_rng(n).standard_normal(ids.shape).astype(np.float32)
        w = weights if mode == "sum" and n % 4 else None
        padding = 2 if n % 5 else None
        arrays = [gpu.put(a) for a in (table, ids, offsets, w)]
        with gpu.no_sync():
            out = lutra.gather.bag_packed(
                *arrays, dim=dim, kind=kind, group=group, mode=mode, padding_idx=padding,
                include_last_offset=last,
            )  # fmt: skip
        want = reference.bag_packed(
            table, ids, offsets, w, dim=dim, kind=kind, group=group, mode=mode, padding_idx=padding,
            include_last_offset=last,
        )  # fmt: skip
        assert gpu.owns(out)
        close(gpu.get(out), want, factor=4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_any_address(gpu_torch, kind):
    """A table that begins at an odd address; results in every type."""
    torch = gpu_torch.torch
    for dim in (24, 64):
        table = packed_table(kind, 11, dim)
        for shift in (0, 1, 2, 4):
            memory = torch.zeros(table.size + shift, dtype=torch.uint8, device=DEVICE)
            moved = memory[shift:].view(table.shape)
            moved.copy_(gpu_torch.put(table))
            ids = np.arange(11).reshape(-1, 1)
            for dtype in DTYPES:
                out = lutra.gather.bag_packed(moved, gpu_torch.put(ids), dim=dim, kind=kind, dtype=dtype)
                assert str(out.dtype) == f"torch.{dtype}"
                close(gpu_torch.get(out), reference.unpack_rows(table, dim, kind), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_unpack_rows(gpu, kind):
    for dim, group in ((1, None), (16, None), (33, 16), (64, None), (130, 32)):
        table = packed_table(kind, 19, dim, group)
        want = reference.unpack_rows(table, dim, kind, group)
        t = gpu.put(table)
        close(gpu.get(lutra.gather.unpack_rows(t, dim, kind, group)), want)
        ids = np.array([3, 18, 0, -1, 3, 19], np.int32)
        some = gpu.get(lutra.gather.unpack_rows(t, dim, kind, group, gpu.put(ids), dtype="float16"))
        assert np.isnan(some[[3, 5]]).all() and some.dtype == np.float16
        close(some[[0, 1, 2, 4]], want[[3, 18, 0, 3]], "float16")


def test_every_code_of_8_bit_floats(gpu):
    """Subnormals, infinity and NaN too."""
    codes = np.arange(256, dtype=np.uint8)
    for kind in ("fp8_e4m3", "fp8_e5m2"):
        table = np.concatenate([codes, np.array([0.5], np.float32).view(np.uint8)])[None]
        got = gpu.get(lutra.gather.unpack_rows(gpu.put(table), 256, kind))
        np.testing.assert_array_equal(got, reference.unpack_rows(table, 256, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_weights(gpu_torch, kind):
    torch = gpu_torch.torch
    for dim, group in ((5, None), (64, None), (300, 32)):
        table = packed_table(kind, 23, dim, group)
        ids, offsets, _ = make_ids(23, "offsets")
        t, i, o = gpu_torch.put(table), gpu_torch.put(ids), gpu_torch.put(offsets)
        w = torch.ones(len(ids), device=DEVICE, requires_grad=True)
        out = lutra.gather.bag_packed(t, i, o, w, dim=dim, kind=kind, group=group, padding_idx=1)
        g = np.random.default_rng(0).standard_normal(tuple(out.shape)).astype(np.float32)
        (got,) = torch.autograd.grad(out, w, gpu_torch.put(g))
        want = reference.bag_packed_weight_grad(
            g, table, ids, offsets, dim=dim, kind=kind, group=group, padding_idx=1
        )
        close(gpu_torch.get(got), want, factor=10)


def test_bad_ids_and_long_bags(gpu):
    table = packed_table("int4", 10, 40)
    ids = np.random.default_rng(0).integers(0, 10, (3, 3000))
    want = reference.bag_packed(table, ids, dim=40, kind="int4")
    bad = ids.copy()
    bad[1, 7] = 10
    out = gpu.get(lutra.gather.bag_packed(gpu.put(table), gpu.put(bad), dim=40, kind="int4"))
    assert np.isnan(out[1]).all()
    close(out[[0, 2]], want[[0, 2]], factor=10)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_bytes_of_a_table(gpu_torch, kind):
    """The last row is read to its end and no further."""
    for dim in (1, 5, 31):
        table = packed_table(kind, 3, dim)
        out = lutra.gather.bag_packed(
            gpu_torch.put(table), gpu_torch.put(np.array([[2]])), dim=dim, kind=kind
        )
        close(gpu_torch.get(out), reference.unpack_rows(table, dim, kind)[2:])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", KINDS)
def test_pack_rows(gpu, kind, rounding):
    """The same bytes as the reference."""
    rng = np.random.default_rng(0)
    for dim, group in ((1, None), (7, None), (33, 16), (64, None), (130, 32)):
        table = rng.standard_normal((40, dim)).astype(np.float32) * 10 ** rng.uniform(-3, 3, (40, 1)).astype(
            np.float32
        )
        table[3], table[4] = 0, 1.5
        got = gpu.get(lutra.gather.pack_rows(gpu.put(table), kind, group, rounding=rounding, seed=7))
        np.testing.assert_array_equal(got, reference.pack_rows(table, kind, group, rounding, 7))
        half = gpu.get(lutra.gather.pack_rows(gpu.put(table, "float16"), kind, group))
        want = reference.pack_rows(table.astype(np.float16).astype(np.float32), kind, group)
        np.testing.assert_array_equal(half, want)


@pytest.mark.parametrize("kind", KINDS)
def test_pack_rows_in_place(gpu, kind):
    """Rows named in any order and twice; given scales."""
    rng = np.random.default_rng(1)
    table = rng.standard_normal((9, 33)).astype(np.float32)
    ids = np.array([5, 2, 5, 0, 11, 2, 7, 5, 1])
    scale = (rng.random((9, 3)) + 0.1).astype(np.float32)
    outs = []
    for put, get in ((lambda a: a, lambda a: a), (gpu.put, gpu.get)):
        out = put(reference.pack_rows(np.ones((12, 33), np.float32), kind, 16))
        lutra.gather.pack_rows(put(table), kind, 16, out=out, ids=put(ids), rounding="stochastic", seed=3)
        lutra.gather.pack_rows(put(table[:4]), kind, 16, out=out, scale=put(scale[:4]))
        outs.append(get(out))
    np.testing.assert_array_equal(outs[1], outs[0])


def test_pack_rows_names_the_row_that_is_not_finite(gpu):
    table = np.ones((50, 20), np.float32)
    table[31, 7], table[12, 3] = np.nan, 1e5
    with pytest.raises(ValueError, match=r"table\[31\] holds NaN"):
        lutra.gather.pack_rows(gpu.put(table), "int4")
    table[31] = 1
    with pytest.raises(ValueError, match=r"table\[12\] holds a value above 65504"):
        lutra.gather.pack_rows(gpu.put(table), "int4")
    lutra.gather.pack_rows(gpu.put(table), "int8")
