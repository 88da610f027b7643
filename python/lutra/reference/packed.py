"""Reference of packed rows: codes of 8, 4 or 2 bits with their scales behind them, a row one run of bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import gather


class Kind(NamedTuple):
    """How a kind of packed rows stores values; ``number`` is that of csrc/gather/packed.h."""

    number: int
    bits: int
    scale: type  # of the scales (and minima)
    minimum: bool  # codes count from a stored minimum
    levels: np.ndarray | None = None  # the value of each code where it is not the code itself


def _small_float(mantissa: int, bias: int, finite_only: bool) -> np.ndarray:
    """The values of the 256 codes of an 8-bit float."""
    code = np.arange(256)
    field, m = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
    top = (0x7F >> mantissa) if not finite_only else 1 << 8
    value = np.where(
        field == 0,
        m * 2.0 ** (1 - bias - mantissa),
        (1 + m / 2.0**mantissa) * 2.0 ** (field.astype(float) - bias),
    )
    value = np.where(field == top, np.where(m == 0, np.inf, np.nan), value)
    if finite_only:
        value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value).astype(np.float32)


NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
     1.0],
    np.float32,
)  # fmt: skip

KINDS = {
    "int8": Kind(0, 8, np.float32, True),
    "int4": Kind(1, 4, np.float16, True),
    "int2": Kind(2, 2, np.float16, True),
    "nf4": Kind(3, 4, np.float16, False, NF4),
    "fp8_e4m3": Kind(4, 8, np.float32, False, _small_float(3, 7, True)),
    "fp8_e5m2": Kind(5, 8, np.float32, False, _small_float(2, 15, False)),
}
_MOST = {"fp8_e4m3": np.float32(448), "fp8_e5m2": np.float32(57344)}


class Layout(NamedTuple):
    """Where things lie in a row."""

    group: int  # columns of a group; dim (at least 1) where there is one
    groups: int
    code_bytes: int
    row_bytes: int


def layout(dim: int, kind: str, group: int | None = None) -> Layout:
    """The layout of a row of ``dim`` values."""
    k = KINDS[kind]
    group = max(dim, 1) if group is None or group >= dim else group
    groups = -(-dim // group)
    code_bytes = -(-dim * k.bits // 8)
    return Layout(
        group, groups, code_bytes, code_bytes + groups * (1 + k.minimum) * np.dtype(k.scale).itemsize
    )


# ---------------------------------------------------------------- bytes
def join(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None, kind: str) -> np.ndarray:
    """Codes (n, dim), scale and minimum (n, groups) as packed rows."""
    k = KINDS[kind]
    per = 8 // k.bits
    if per > 1:
        padded = np.zeros((len(codes), -(-codes.shape[1] // per) * per), np.uint8)
        padded[:, : codes.shape[1]] = codes
        parts = padded.reshape(len(codes), padded.shape[1] // per, per)
        codes = np.zeros(parts.shape[:2], np.uint8)
        for i in range(per):
            codes |= parts[:, :, i] << (i * k.bits)
    tail = scale[..., None] if minimum is None else np.stack([scale, minimum], -1)
    tail = tail.reshape(len(codes), tail.shape[1] * tail.shape[2])  # not -1: there may be no rows
    tail = np.ascontiguousarray(tail, k.scale)
    size = tail.shape[1] * tail.itemsize
    return np.concatenate([codes, tail.view(np.uint8).reshape(len(codes), size)], 1)


def split(packed: np.ndarray, dim: int, kind: str, group: int | None = None):
    """Codes (n, dim) uint8, scale and minimum (n, groups) float32 of packed rows; minimum may be None."""
    k, at = KINDS[kind], layout(dim, kind, group)
    codes = packed[:, : at.code_bytes]
    if k.bits < 8:
        shifts = np.arange(0, 8, k.bits, dtype=np.uint8)
        parts = (codes[:, :, None] >> shifts) & ((1 << k.bits) - 1)
        codes = parts.reshape(len(packed), at.code_bytes * 8 // k.bits)[:, :dim]
    tail = np.ascontiguousarray(packed[:, at.code_bytes :]).view(k.scale).astype(np.float32)
    tail = tail.reshape(len(packed), at.groups, 1 + k.minimum)
    return codes, tail[:, :, 0], tail[:, :, 1] if k.minimum else None


# ---------------------------------------------------------------- rounding
def _half_below(x):
    with np.errstate(over="ignore"):
        h = x.astype(np.float16)
        return np.where(h.astype(np.float32) > x, np.nextafter(h, np.float16(-np.inf)), h).astype(np.float32)


def _half_above(x):
    with np.errstate(over="ignore"):
        h = x.astype(np.float16)
        return np.where(h.astype(np.float32) < x, np.nextafter(h, np.float16(np.inf)), h).astype(np.float32)


def _mix64(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix32(x):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def noise_bits(seed: int, rows: np.ndarray, dim: int) -> np.ndarray:
    """32 random bits for each (row, column): a hash, so that they depend on nothing else."""
    start = np.array([(seed + 0x9E3779B97F4A7C15) % 2**64], np.uint64)
    key = _mix64(_mix64(start) + rows.astype(np.int64).view(np.uint64))
    low, high = key.astype(np.uint32), (key >> np.uint64(32)).astype(np.uint32)
    column = np.arange(dim, dtype=np.uint32)
    return _mix32(_mix32(column + low[:, None]) + high[:, None])


def _unit(bits):
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _affine_codes(x, scale, minimum, most, noise):
    half = np.float32(0.5)  # halves: a row from -2e38 to 2e38 must not overflow
    t = (x * half - minimum * half) / (scale * half)
    return (np.rint(t) if noise is None else np.floor(t + _unit(noise))).clip(0, most)


def _nf4_codes(x, scale, noise):
    t = x / np.where(scale > 0, scale, np.float32(1))
    low, high = NF4[:-1], NF4[1:]
    if noise is None:
        return (t[..., None] > (low + high) * np.float32(0.5)).sum(-1)
    return (t[..., None] - low > _unit(noise)[..., None] * (high - low)).sum(-1)


def _positive(kind):
    """The finite values from 0 up, which are those of codes 0, 1, ..."""
    values = KINDS[kind].levels
    assert values is not None
    return values[:128][np.isfinite(values[:128])]


def _float_codes(x, scale, kind, noise):
    """8-bit floats: the nearest, ties to the even code; or with noise one of the two neighbours."""
    t = x / np.where(scale > 0, scale, np.float32(1))
    a = np.minimum(abs(t), _MOST[kind])
    levels = _positive(kind)
    below = np.searchsorted(levels, a, "right") - 1
    above = np.minimum(below + 1, len(levels) - 1)
    low, high = levels[below], levels[above]
    if noise is None:
        middle = (low + high) / 2
        code = np.where((a > middle) | ((a == middle) & (below % 2 == 1)), above, below)
    else:
        mantissa = 3 if kind == "fp8_e4m3" else 2
        smallest = levels[1 << mantissa]
        drop = 23 - mantissa  # normal numbers: random bits are added below the mantissa
        bits = (a.view(np.uint32) + (noise & np.uint32((1 << drop) - 1))) >> np.uint32(drop)
        normal = bits - (smallest.view(np.uint32) >> np.uint32(drop)) + np.uint32(1 << mantissa)
        code = np.where(a < smallest, np.floor(a / levels[1] + _unit(noise)), normal)
    return code.astype(np.uint8) | np.where(t < 0, np.uint8(128), np.uint8(0))


# ---------------------------------------------------------------- rows
def check_finite(table, kind: str, first: int = 0) -> None:
    """ValueError for the first row with NaN or infinity, or else with a value that the scales do not reach.

    ``first`` is the number of the table's first row.
    """
    bad = ~np.isfinite(table).all(1)
    if bad.any():
        row = first + int(bad.argmax())
        raise ValueError(f"table[{row}] holds NaN or infinity; packed rows need finite values")
    large = (abs(table) > 65504).any(1)
    if KINDS[kind].scale is np.float16 and large.any():
        raise ValueError(
            f"table[{first + int(large.argmax())}] holds a value above 65504, the largest that the float16 "
            f"scales of kind {kind!r} reach; 'int8' and 'fp8_e4m3' have float32 scales"
        )


def pack_rows(
    table, kind="int8", group=None, rounding="nearest", seed=0, rows=None, scale=None, minimum=None
):
    """Packed rows of a table (n, dim); see `lutra.gather.pack_rows`. ``rows``: row numbers, for the noise."""
    x = table.astype(np.float32)
    check_finite(x, kind)
    n, dim = x.shape
    k, at = KINDS[kind], layout(dim, kind, group)
    noise = None
    if rounding == "stochastic":
        noise = noise_bits(seed, np.arange(n) if rows is None else rows, dim)
    codes = np.zeros((n, dim), np.uint8)
    scales, minima = np.zeros((n, at.groups), np.float32), np.zeros((n, at.groups), np.float32)
    most = np.float32(2**k.bits - 1)
    for g in range(at.groups):
        part = slice(g * at.group, min((g + 1) * at.group, dim))
        y, here = x[:, part], None if noise is None else noise[:, part]
        low, high = y.min(1), y.max(1)
        magnitude = np.maximum(-low, high)
        if scale is not None:
            s = scale[:, g].astype(np.float32)
            m = -s * np.float32(2 ** (k.bits - 1)) if minimum is None else minimum[:, g].astype(np.float32)
            if k.scale is np.float16:
                s = np.maximum(s.astype(np.float16), np.float16(2**-24)).astype(np.float32)
                m = m.astype(np.float16).astype(np.float32)
        elif kind == "int8":
            s, m = high / most - low / most, low
        elif k.minimum:
            m = _half_below(low)
            s = _half_above((high - m) / most)
        elif kind == "nf4":
            s, m = _half_above(magnitude), low
        else:
            s, m = magnitude / _MOST[kind], low
        if k.minimum:
            s = np.where(s >= np.float32(1e-37), s, np.float32(1))  # (nearly) constant: code 0, its minimum
            codes[:, part] = _affine_codes(y, s[:, None], m[:, None], most, here)
        elif kind == "nf4":
            codes[:, part] = _nf4_codes(y, s[:, None], here)
        else:
            codes[:, part] = _float_codes(y, s[:, None], kind, here)
        scales[:, g], minima[:, g] = s, m
    return join(codes, scales, minima if k.minimum else None, kind)


def unpack_rows(packed, dim, kind, group=None, ids=None):
    """Rows ``ids`` (all) decoded to float32."""
    k, at = KINDS[kind], layout(dim, kind, group)
    codes, scale, minimum = split(packed if ids is None else packed[ids], dim, kind, group)
    of = np.arange(dim) // at.group
    out = codes.astype(np.float32) if k.levels is None else k.levels[codes]
    if minimum is None:
        return out * scale[:, of]
    # in float64: a scale times a code may be beyond float32 where the value is not
    return (out * scale[:, of].astype(np.float64) + minimum[:, of]).astype(np.float32)


def _decoded(packed, ids, offsets, dim, kind, group, padding_idx, include_last_offset):
    """The rows that a call takes, decoded; ids and padding_idx that count in them."""
    rows = packed.shape[0]
    gather.check_ids(ids, offsets, rows, include_last_offset)
    touched, slot = np.unique(
        ids.clip(0, max(rows - 1, 0)), return_inverse=True
    )  # ids of no bag may be anything
    pad = None
    if padding_idx is not None:
        at = np.flatnonzero(touched == padding_idx % max(rows, 1))
        pad = int(at[0]) if at.size else None
    return unpack_rows(packed, dim, kind, group, touched), slot.reshape(ids.shape), pad


def bag_packed(
    packed, ids, offsets=None, weights=None, *, dim, kind, group=None, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """Sum, mean or maximum of packed rows, float32; see `lutra.gather.bag_packed`."""
    args = (packed, ids, offsets, dim, kind, group, padding_idx, include_last_offset)
    table, slot, pad = _decoded(*args)
    return gather.bag(table, slot, offsets, weights, None, None, mode, pad, include_last_offset)


def bag_packed_weight_grad(
    grad, packed, ids, offsets=None, *, dim, kind, group=None, padding_idx=None, include_last_offset=False
):
    """Gradient of the weights of `bag_packed` (mode 'sum'); the shape of ids."""
    args = (packed, ids, offsets, dim, kind, group, padding_idx, include_last_offset)
    table, slot, pad = _decoded(*args)
    return gather.bag_weight_grad(grad, table, slot, offsets, None, None, pad, include_last_offset)
