"""Packed rows: codes of 8, 4 and 2 bits with their scales in the row."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import gather
from lutra.reference import packed as reference

KINDS = tuple(reference.KINDS)
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
TOP = {"int8": 255, "int4": 15, "int2": 3}


def rows_of(n, dim, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, dim)) * rng.uniform(0.01, 3, (n, 1)) + rng.normal(size=(n, 1))).astype(
        np.float32
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_pack_is_the_reference_bit_for_bit(simd_level, kind, rounding):
    for dim in SIZES:
        for group in (None, 16, 32):
            x = rows_of(7, dim, dim)
            x[3] = 0
            x[4] = 0.3
            x[5] *= 1e-6
            got = gather.pack_rows(x, kind, group, rounding=rounding, seed=5)
            want = reference.pack_rows(x, kind, group, rounding, 5)
            assert got.dtype == np.uint8
            np.testing.assert_array_equal(got, want, err_msg=f"dim {dim} group {group}")


@pytest.mark.parametrize("kind", KINDS)
def test_unpack_is_the_reference(simd_level, kind):
    for dim in SIZES:
        for group in (None, 16, 48):
            packed = gather.pack_rows(rows_of(9, dim), kind, group)
            want = reference.unpack_rows(packed, dim, kind, group)
            np.testing.assert_allclose(
                gather.unpack_rows(packed, dim, kind, group), want, rtol=1e-6, atol=1e-6
            )
            ids = np.array([3, 8, 0, 3], np.int32)
            got = gather.unpack_rows(packed, dim, kind, group, ids)
            np.testing.assert_allclose(got, want[ids], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_decoded_right(simd_level, kind):
    """All 256 bytes, NaN and infinity of the 8-bit floats too."""
    k = reference.KINDS[kind]
    dim = 256 * 8 // k.bits
    tail = np.array([0.5, -3.0][: 1 + k.minimum], k.scale).view(np.uint8)
    packed = np.concatenate([np.arange(256, dtype=np.uint8), tail])[None]
    np.testing.assert_array_equal(
        gather.unpack_rows(packed, dim, kind), reference.unpack_rows(packed, dim, kind)
    )


@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_codes_are_those_of_ml_dtypes(kind):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = getattr(ml_dtypes, {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}[kind])
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(reference.KINDS[kind].levels, values)
    top = float(np.nanmax(values[np.isfinite(values)]))
    x = np.random.default_rng(0).normal(size=(1, 4096)).astype(np.float32) ** 5
    x[0, :256] = np.where(np.isfinite(values), values, 0)  # exact values and the ties between them
    x[0, 256:511] = np.where(np.isfinite(x[0, :255] + x[0, 1:256]), (x[0, :255] + x[0, 1:256]) / 2, 0)
    x = x.clip(-top, top) + 0.0  # no -0, whose sign is dropped here
    x[0, -1] = top  # the scale is 1
    np.testing.assert_array_equal(gather.pack_rows(x, kind)[0, :4096], x[0].astype(dtype).view(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 16])
def test_errors_stay_within_half_a_step(kind, group):
    x = rows_of(50, 70, 3)
    packed = gather.pack_rows(x, kind, group)
    back = gather.unpack_rows(packed, 70, kind, group)
    _, scale, _ = reference.split(packed, 70, kind, group)
    scale = np.repeat(scale, reference.layout(70, kind, group).group, 1)[:, :70]
    if kind in TOP:
        limit = scale * 0.5
    elif kind == "nf4":
        limit = scale * 0.152
    else:
        mantissa = 3 if kind == "fp8_e4m3" else 2
        limit = np.maximum(abs(x) * 2.0 ** -(mantissa + 1), scale * 2.0**-9)
    assert (abs(back - x) <= limit * 1.001 + 1e-6).all()


@pytest.mark.parametrize("kind", ["int4", "int2", "nf4"])
def test_half_scales_clip_nothing(kind):
    """The extremes of a row are reached by what is stored, however the scale was rounded."""
    x = rows_of(2000, 16, 1) * 0.01
    _, scale, minimum = reference.split(gather.pack_rows(x, kind), 16, kind)
    if kind == "nf4":
        assert (scale[:, 0] >= abs(x).max(1)).all()
        assert (scale[:, 0] <= abs(x).max(1) * 1.002 + 1e-7).all()
    else:
        top = minimum[:, 0] + np.float32(TOP[kind]) * scale[:, 0]
        assert (minimum[:, 0] <= x.min(1)).all()
        assert (top >= x.max(1) - 1e-7).all()
    error = gather.unpack_rows(gather.pack_rows(x, kind), 16, kind) - x
    assert abs(error.mean()) < 0.005 * x.std()


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_rounding_has_the_right_mean(kind):
    x = np.linspace(-1, 1, 48, dtype=np.float32)[None]
    total = np.zeros((1, 48))
    for seed in range(600):
        total += gather.unpack_rows(gather.pack_rows(x, kind, rounding="stochastic", seed=seed), 48, kind)
    step = {"int8": 2 / 255, "int4": 2 / 15, "int2": 2 / 3, "nf4": 0.31, "fp8_e4m3": 1 / 8, "fp8_e5m2": 1 / 4}
    np.testing.assert_allclose(total / 600, x, atol=step[kind] * 0.5 * 5 / 600**0.5 + 1e-3)


def test_stochastic_bits_do_not_depend_on_threads(threads):
    x = rows_of(3000, 64)
    got = gather.pack_rows(x, "int4", rounding="stochastic", seed=2**63 + 5)
    np.testing.assert_array_equal(got, reference.pack_rows(x, "int4", None, "stochastic", 2**63 + 5))
    assert (got != gather.pack_rows(x, "int4", rounding="stochastic", seed=1)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", (16, 32, 48, 64, None))
def test_halves_are_rounded_floats(simd_level, kind, group):
    """Bit for bit, whether a value is rounded or looked up among the rounded ones of its group."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    if kind.startswith("fp8") and group is not None:
        pytest.skip("one scale a row")
    for dim in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 97, 130, 200):
        packed = gather.pack_rows(rows_of(5, dim), kind, group)
        exact = gather.unpack_rows(packed, dim, kind, group)
        for dtype, cast in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
            got = gather.unpack_rows(packed, dim, kind, group, dtype=dtype)
            assert got.dtype == cast
            np.testing.assert_array_equal(got.view(np.uint16), exact.astype(cast).view(np.uint16))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_dtypes(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = rows_of(5, 33).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    want = reference.pack_rows(x.astype(np.float32), "int4")
    np.testing.assert_array_equal(gather.pack_rows(x, "int4"), want)
    np.testing.assert_array_equal(gather.pack_rows(np.asfortranarray(x), "int4"), want)
    if dtype != "float64":
        got = gather.unpack_rows(want, 33, "int4", dtype=dtype)
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got, gather.unpack_rows(want, 33, "int4").astype(x.dtype))


# ---------------------------------------------------------------- torch's layout
@pytest.mark.parametrize("kind, name", [("int8", "byte"), ("int4", "4bit"), ("int2", "2bit")])
def test_rows_are_those_of_torch(kind, name):
    torch = pytest.importorskip("torch")
    quantized = torch.ops.quantized
    x = torch.from_numpy(rows_of(40, 64, 2))
    theirs = getattr(quantized, f"embedding_bag_{name}_prepack")(x)
    unpack = getattr(quantized, f"embedding_bag_{name}_unpack")
    np.testing.assert_allclose(gather.unpack_rows(theirs, 64, kind), unpack(theirs), rtol=1e-5, atol=1e-5)
    ours = gather.pack_rows(x, kind)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(gather.unpack_rows(ours, 64, kind), unpack(ours), rtol=1e-5, atol=1e-5)
    assert (unpack(ours) - x).square().mean() <= (unpack(theirs) - x).square().mean() * 1.01


# ---------------------------------------------------------------- single rows
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_updated_in_place(kind, threads):
    x = rows_of(3000, 33)
    packed = gather.pack_rows(x, kind)
    before = packed.copy()
    ids = np.array([7, 2999, 0], np.int64)
    new = rows_of(3, 33, 9)
    assert gather.pack_rows(new, kind, out=packed, ids=ids, rounding="stochastic", seed=3) is packed
    np.testing.assert_array_equal(
        packed[ids], reference.pack_rows(new, kind, None, "stochastic", 3, rows=ids)
    )
    rest = np.setdiff1d(np.arange(3000), ids)
    np.testing.assert_array_equal(packed[rest], before[rest])
    repeated = np.full(3, 5)
    gather.pack_rows(new, kind, out=packed, ids=repeated)
    np.testing.assert_array_equal(packed[5], gather.pack_rows(new, kind)[2])


def test_nothing_is_written_where_an_error_is_raised():
    packed = gather.pack_rows(rows_of(10, 16), "int8")
    before = packed.copy()
    bad = rows_of(3, 16)
    bad[2, 5] = np.nan
    with pytest.raises(ValueError, match=r"table\[2\] holds NaN"):
        gather.pack_rows(bad, "int8", out=packed)
    with pytest.raises(IndexError, match=r"ids\[1\] is 10"):
        gather.pack_rows(rows_of(3, 16), "int8", out=packed, ids=np.array([0, 10, 1]))
    np.testing.assert_array_equal(packed, before)


def test_given_scales():
    x = rows_of(4, 32)
    scale = np.full((4, 2), 0.25, np.float32)
    for kind in ("int8", "int4", "int2", "nf4", "fp8_e4m3"):
        got = gather.pack_rows(x, kind, 16, scale=scale)
        np.testing.assert_array_equal(got, reference.pack_rows(x, kind, 16, scale=scale))
    half = 8
    codes, _, minimum = reference.split(gather.pack_rows(x, "int4", 16, scale=scale), 32, "int4", 16)
    assert (minimum == -0.25 * half).all()
    np.testing.assert_array_equal(codes, np.rint(x / 0.25 + half).clip(0, 15))
    got = gather.pack_rows(x, "int4", 16, scale=scale, minimum=scale * -4)
    np.testing.assert_array_equal(got, reference.pack_rows(x, "int4", 16, scale=scale, minimum=scale * -4))


# ---------------------------------------------------------------- bad input
def test_bad_input():
    x = rows_of(4, 40)
    with pytest.raises(ValueError, match="kind must be one of 'int8', 'int4'"):
        gather.pack_rows(x, "int3")
    with pytest.raises(ValueError, match="group is 24; it must be a multiple of 16"):
        gather.pack_rows(x, "int4", 24)
    with pytest.raises(ValueError, match="rounding must be one of"):
        gather.pack_rows(x, rounding="up")
    with pytest.raises(ValueError, match="table must be 2-d"):
        gather.pack_rows(x[0])
    with pytest.raises(TypeError, match="table has dtype int64"):
        gather.pack_rows(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="seed must be in"):
        gather.pack_rows(x, seed=-1)
    for value in (np.nan, np.inf, -np.inf):
        y = x.copy()
        y[2, 39] = value
        with pytest.raises(ValueError, match=r"table\[2\] holds NaN or infinity"):
            gather.pack_rows(y, "nf4")
    y = x * 1e6
    with pytest.raises(ValueError, match=r"table\[0\] holds a value above 65504"):
        gather.pack_rows(y, "int4")
    gather.pack_rows(y, "int8")
    with pytest.raises(ValueError, match="scale has shape"):
        gather.pack_rows(x, "int4", scale=np.ones(4, np.float32))
    with pytest.raises(ValueError, match="scale must lie in"):
        gather.pack_rows(x, "int4", scale=np.zeros((4, 1), np.float32))
    with pytest.raises(ValueError, match="have no minimum"):
        gather.pack_rows(x, "nf4", scale=np.ones((4, 1), np.float32), minimum=np.ones((4, 1), np.float32))
    with pytest.raises(ValueError, match="ids are given without out"):
        gather.pack_rows(x, ids=np.arange(4))
    packed = gather.pack_rows(x, "int4")
    with pytest.raises(ValueError, match="packed has rows of 24 bytes; dim, kind and group need 48"):
        gather.unpack_rows(packed, 40, "int8")
    with pytest.raises(TypeError, match="packed has dtype int8"):
        gather.unpack_rows(packed.view(np.int8), 40, "int4")
    with pytest.raises(IndexError, match=r"ids\[1\] is 4; ids must lie in \[0, 4\)"):
        gather.unpack_rows(packed, 40, "int4", ids=np.array([0, 4]))
    with pytest.raises(ValueError, match="out must be contiguous"):
        gather.pack_rows(x, "int4", out=np.zeros((4, 48), np.uint8)[:, ::2])
    with pytest.raises(ValueError, match="table has 4 rows, out has 3"):
        gather.pack_rows(x, "int4", out=packed[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_empty(kind):
    for shape in ((0, 5), (3, 0), (0, 0)):
        packed = gather.pack_rows(np.zeros(shape, np.float32), kind)
        assert gather.unpack_rows(packed, shape[1], kind).shape == shape
    packed = gather.pack_rows(np.ones((2, 5), np.float32), kind)
    assert gather.unpack_rows(packed, 5, kind, ids=np.zeros((0, 3), np.int64)).shape == (0, 3, 5)


def test_extreme_rows(simd_level):
    x = np.array([[-3e38, 3e38, 0], [1e-44, 0, -1e-44], [5, 5, 5]], np.float32)
    back = gather.unpack_rows(gather.pack_rows(x, "int8"), 3, "int8")
    np.testing.assert_allclose(back[0], x[0], atol=1.3e36)
    np.testing.assert_array_equal(back[2], x[2])
    np.testing.assert_allclose(back[1], x[1], atol=1e-37)


# ---------------------------------------------------------------- torch
@pytest.mark.parametrize("kind", KINDS)
def test_torch(kind):
    torch = pytest.importorskip("torch")
    from lutra.gather import _packed_torch

    x = torch.from_numpy(rows_of(9, 33))
    packed = gather.pack_rows(x.requires_grad_(), kind, 16)
    assert not packed.requires_grad
    np.testing.assert_array_equal(packed, gather.pack_rows(x.detach().numpy(), kind, 16))
    want = gather.unpack_rows(packed, 33, kind, 16)
    torch.testing.assert_close(_packed_torch.decode(packed, 33, kind, 16), want)
    for dtype in (torch.float16, torch.bfloat16):
        got = gather.unpack_rows(packed.T.contiguous().T, 33, kind, 16, dtype=str(dtype)[6:])
        torch.testing.assert_close(got, want.to(dtype))
    ids = torch.tensor([[1, 8], [0, 1]])
    torch.testing.assert_close(gather.unpack_rows(packed, 33, kind, 16, ids), want[ids])


def test_torch_ops():
    torch = pytest.importorskip("torch")
    import lutra.torch_ops  # noqa: F401

    x = torch.from_numpy(rows_of(9, 33))
    packed = gather.pack_rows(x, "int4")
    ops = torch.ops.lutra
    torch.library.opcheck(ops.pack_rows, (x, None, None, "int4", None, "stochastic", 3))
    torch.library.opcheck(ops.unpack_rows, (packed, torch.tensor([1, 2]), 33, "int4", None, "float16"))
    torch.library.opcheck(
        ops.pack_rows_out, (x[:2], packed, torch.tensor([3, 4]), None, None, "int4", None, "nearest", 0)
    )

    @torch.compile(fullgraph=True, backend="eager")
    def step(table, out, ids):
        gather.pack_rows(table, "int4", out=out, ids=ids)
        return gather.unpack_rows(out, 33, "int4", ids=ids)

    torch.testing.assert_close(
        step(x[:2], packed, torch.tensor([5, 6])), x[:2], atol=float(x[:2].abs().max()) / 7, rtol=0
    )
    version = packed._version
    gather.pack_rows(x, "int4", out=packed)
    assert packed._version > version


def test_threads_do_not_change_bits(threads):
    x = rows_of(4000, 65)
    for kind in KINDS:
        packed = gather.pack_rows(x, kind)
        np.testing.assert_array_equal(packed, reference.pack_rows(x, kind))
        np.testing.assert_allclose(
            gather.unpack_rows(packed, 65, kind),
            reference.unpack_rows(packed, 65, kind),
            rtol=1e-6,
            atol=1e-6,
        )
    assert lutra.gather.pack_rows is gather.pack_rows
