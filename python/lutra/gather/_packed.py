"""pack_rows and unpack_rows: tables as codes of 8, 4 or 2 bits with their scales inside the row."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from .._arrays import BF16, F16, F32, F64, FLOATS, I32, I64, U8, call, is_torch
from ..reference import packed as reference

KINDS = {name: kind.number for name, kind in reference.KINDS.items()}
ROUNDINGS = {"nearest": 0, "stochastic": 1}
OUT_TYPES = {"float32": F32, "float16": F16, "bfloat16": BF16}
_SMALLEST = 1e-37  # of scales: half of it is still a normal number


def pack_rows(
    table: Any,
    kind: str = "int8",
    group: int | None = None,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    scale: Any = None,
    minimum: Any = None,
    out: Any = None,
    ids: Any = None,
) -> Any:
    """Store rows as codes with their scales behind them, each row one run of bytes.

    Parameters
    ----------
    table : array, shape (rows, dim), float32, float16, bfloat16 or float64
        Finite.
    kind : {'int8', 'int4', 'int2', 'nf4', 'fp8_e4m3', 'fp8_e5m2'}, default 'int8'
        'int8': codes of 8 bits, a float32 scale and minimum per group. 'int4', 'int2': codes of 4 or 2 bits,
        a float16 scale and minimum per group. 'nf4': 4 bits, a float16 scale (the largest magnitude) per
        group. 'fp8_*': 8-bit floats, a float32 scale per group.
    group : int, optional
        Columns that share a scale, a multiple of 16; default: all of a row.
    rounding : {'nearest', 'stochastic'}, default 'nearest'
        'stochastic': one of the two neighbouring codes, so that the expectation is exact. The random numbers
        are a hash of (seed, row, column): the same call gives the same bits, whatever the number of threads.
    seed : int, default 0
        In [0, 2**64).
    scale, minimum : arrays, shape (rows, groups), float32, optional
        Take these instead of those of the data; values outside are clipped. Without ``minimum`` the integer
        kinds are symmetric: ``minimum = -scale * 2**(bits - 1)``.
    out : array, shape (packed_rows, row_bytes), uint8, optional
        Write here, in place, and give it back. Nothing is written where an error is raised.
    ids : array, shape (rows,), int32 or int64, optional
        With ``out``: the rows to write; of an id that occurs twice the last row stays. The hash takes them as
        row numbers. Without: the first rows of ``out``.

    Returns
    -------
    packed : array, shape (rows, row_bytes), uint8
        ``row_bytes = ceil(dim * bits / 8)`` for the codes, plus 8 ('int8'), 4 ('int4', 'int2', 'fp8_*') or 2
        ('nf4') for each group.

    Raises
    ------
    TypeError
        A wrong type or dtype.
    ValueError
        A wrong shape or option; a row with NaN or infinity, or, where scales are float16, with a value above
        65504 (the row is named).
    IndexError
        An id outside [0, packed_rows).

    Notes
    -----
    With one group, 'int8', 'int4' and 'int2' are FBGEMM's fused rows: what
    ``torch.ops.quantized.embedding_bag_byte_prepack`` (``_4bit_``, ``_2bit_``) wrote is read as it is, and
    torch reads these. Where scales are float16 the minimum is rounded down and the scale up, and the codes
    are taken with what is stored, so that no value is clipped and the error stays within half a scale. Cost:
    the table is read twice, at 1.5 to 4 GB/s a core with AVX-512. On CUDA a call waits for the device, to
    look for values that are not finite. NF4: Dettmers et al. 2023 (arXiv 2305.14314); fp8: Micikevicius et
    al. 2022 (arXiv 2209.05433).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> packed = lutra.gather.pack_rows(np.array([[0., 1., 2., 3., 15.]], np.float32), "int4")
    >>> packed  # codes 0 1, 2 3, 15; scale 1 and minimum 0 as float16
    array([[16, 50, 15,  0, 60,  0,  0]], dtype=uint8)
    >>> lutra.gather.unpack_rows(packed, 5, "int4")
    array([[ 0.,  1.,  2.,  3., 15.]], dtype=float32)
    """
    if is_torch(table):
        table = table.detach()
    options = (kind, group, rounding, seed)
    if out is None:
        if ids is not None:
            raise ValueError("ids are given without out, the packed table whose rows they name")
        return call("pack_rows", _pack_rows, (table, scale, minimum), options)
    call("pack_rows_out", _pack_rows_out, (table, out, ids, scale, minimum), options)
    return out


def unpack_rows(
    packed: Any,
    dim: int,
    kind: str = "int8",
    group: int | None = None,
    ids: Any = None,
    *,
    dtype: str = "float32",
) -> Any:
    """Decode packed rows.

    Parameters
    ----------
    packed : array, shape (rows, row_bytes), uint8
        What `pack_rows` gave.
    dim : int
        Values of a row.
    kind, group
        As in `pack_rows`.
    ids : array, int32 or int64, any shape, optional
        The rows to decode; default: all.
    dtype : {'float32', 'float16', 'bfloat16'}, default 'float32'

    Returns
    -------
    array, shape (rows, dim) or (*ids.shape, dim), of ``dtype``

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype or option; a row length that does not fit.
    IndexError
        An id outside [0, rows). (On CUDA the row is NaN.)
    """
    shape = None if ids is None or not hasattr(ids, "shape") else tuple(ids.shape)
    flat = ids if shape is None or len(shape) == 1 else ids.reshape(-1)
    result = call("unpack_rows", _unpack_rows, (packed, flat), (dim, kind, group, dtype))
    return result if shape is None or len(shape) == 1 else result.reshape((*shape, result.shape[-1]))


# ---------------------------------------------------------------- checks
def row_layout(dim: Any, kind: Any, group: Any) -> reference.Layout:
    """The layout of rows of ``dim`` values; errors name dim, kind or group."""
    _checks.choice("kind", kind, KINDS)
    dim = _checks.integer("dim", dim, 0)
    if group is not None:
        group = _checks.integer("group", group, 1)
        if group < dim and group % 16:
            raise ValueError(
                f"group is {group}; it must be a multiple of 16 (or at least dim, {dim}: one group)"
            )
    return reference.layout(dim, kind, group)


def check_packed(kind: Any, packed: Any, at: reference.Layout, name: str = "packed") -> None:
    _checks.dtype(kind, packed, name, (U8,))
    _checks.ndim(packed, name, 2)
    if packed.shape[1] != at.row_bytes:
        raise ValueError(
            f"{name} has rows of {packed.shape[1]} bytes; dim, kind and group need {at.row_bytes}: "
            f"{at.code_bytes} of codes and {at.row_bytes - at.code_bytes} of scales"
        )


def _given_scales(kind, table, at, packed_kind, scale, minimum):
    """Contiguous float32 scale and minimum, checked."""
    if scale is None:
        if minimum is not None:
            raise ValueError("minimum is given without scale")
        return None, None
    has_minimum = reference.KINDS[packed_kind].minimum
    if minimum is not None and not has_minimum:
        raise ValueError(f"rows of kind {packed_kind!r} have no minimum")
    for a, name in ((scale, "scale"), (minimum, "minimum")):
        if a is None:
            continue
        _checks.same_kind(kind, a, name, table, "table")
        _checks.dtype(kind, a, name, (F32,))
        if tuple(a.shape) != (table.shape[0], at.groups):
            raise ValueError(
                f"{name} has shape {tuple(a.shape)}; needed is ({table.shape[0]}, {at.groups}), one per group"
            )
    half = reference.KINDS[packed_kind].scale is np.float16
    low, most = (_SMALLEST, 65504.0) if half else (_SMALLEST, 3e38)
    if not bool(((scale >= low) & (scale <= most)).all()):
        raise ValueError(f"scale must lie in [{low:g}, {most:g}] for kind {packed_kind!r}")
    m = (
        (-(2 ** (reference.KINDS[packed_kind].bits - 1)) * scale)
        if minimum is None and has_minimum
        else minimum
    )
    if m is not None and not bool((abs(m) <= most).all()):
        raise ValueError(f"minimum must lie in [{-most:g}, {most:g}] for kind {packed_kind!r}")
    return kind.dense(scale), None if minimum is None else kind.dense(minimum)


def _ptr(kind, a):
    return None if a is None else kind.ptr(a)


def _numpy(kind, a):
    return None if a is None else kind.to_numpy(a)


# ---------------------------------------------------------------- pack
def _checked(kind, table, packed_kind, group, rounding, seed, scale, minimum):
    source = _checks.dtype(kind, table, "table", (*FLOATS, F64))
    _checks.ndim(table, "table", 2)
    at = row_layout(table.shape[1], packed_kind, group)
    _checks.choice("rounding", rounding, ROUNDINGS)
    _checks.integer("seed", seed, 0, 2**64 - 1)
    scale, minimum = _given_scales(kind, table, at, packed_kind, scale, minimum)
    if source == F64:
        with np.errstate(over="ignore"):  # infinity is reported
            table, source = kind.cast(table, F32), F32
    return kind.dense(table), source, at, scale, minimum


def _write(kind, table, source, at, packed_kind, rounding, seed, scale, minimum, out, ids, unique):
    n, dim = table.shape
    if kind.cuda:
        return _write_on_cuda(
            kind, table, source, at, packed_kind, rounding, seed, scale, minimum, out, ids, unique
        )
    if kind.kernels is None:
        rows = None if ids is None else ids
        packed = reference.pack_rows(
            kind.to_numpy(table), packed_kind, at.group, rounding, seed, rows, _numpy(kind, scale),
            _numpy(kind, minimum),
        )  # fmt: skip
        target = kind.to_numpy(out)
        if ids is None:
            target[:n] = packed
        else:
            for i, row in zip(ids, packed):  # one after the other: the last stays
                target[i] = row
        return
    bad = kind.kernels.pack_rows(
        kind.ptr(table), source, n, kind.ptr(out), KINDS[packed_kind], out.shape[0], dim, at.group,
        at.row_bytes, ids, unique, rounding == "stochastic", seed, _ptr(kind, scale), _ptr(kind, minimum),
    )  # fmt: skip
    if bad != -1:
        row = bad if bad >= 0 else -2 - bad
        reference.check_finite(kind.to_numpy(kind.cast(table[row : row + 1], F32)), packed_kind, row)
        raise ValueError("table changed while the kernel ran")


def _write_on_cuda(kind, table, source, at, packed_kind, rounding, seed, scale, minimum, out, ids, unique):
    """Waits for the device once, to raise an error where values are not finite."""
    if ids is not None and not unique:  # of an id that occurs twice the last row stays
        _, place = np.unique(ids[::-1], return_index=True)
        last = np.sort(len(ids) - 1 - place)
        ids, keep = ids[last], kind.from_numpy(last, I64, table)
        table, scale, minimum = (None if a is None else kind.dense(a[keep]) for a in (table, scale, minimum))
    n, dim = table.shape
    where = None if ids is None else kind.from_numpy(ids, I64, table)
    arguments = (
        kind.ptr(table), source, n, kind.ptr(out), KINDS[packed_kind], out.shape[0], dim, at.group,
        at.row_bytes, _ptr(kind, where), rounding == "stochastic", seed, _ptr(kind, scale),
        _ptr(kind, minimum),
    )  # fmt: skip
    bad = kind.empty((2,), I64, table)
    kind.kernels.check_rows(*arguments, kind.ptr(bad), *kind.launch(table))
    infinite, large = (int(v) for v in kind.to_numpy(bad))
    if reference.KINDS[packed_kind].scale is not np.float16:
        large = n
    row = infinite if infinite < n else large
    if row < n:
        reference.check_finite(kind.to_numpy(kind.cast(table[row : row + 1], F32)), packed_kind, row)
        raise ValueError("table changed while the kernel ran")
    kind.kernels.pack_rows(*arguments, *kind.launch(table))


def _pack_rows(
    kind, table, scale=None, minimum=None, packed_kind="int8", group=None, rounding="nearest", seed=0
):
    no_module(kind, "pack_rows")
    table, source, at, scale, minimum = _checked(
        kind, table, packed_kind, group, rounding, seed, scale, minimum
    )
    out = kind.empty((table.shape[0], at.row_bytes), U8, table)
    _write(kind, table, source, at, packed_kind, rounding, seed, scale, minimum, out, None, True)
    return out


def _pack_rows_out(
    kind, table, out, ids=None, scale=None, minimum=None, packed_kind="int8", group=None, rounding="nearest",
    seed=0,
):  # fmt: skip
    _checks.same_kind(kind, out, "out", table, "table")
    no_module(kind, "pack_rows")
    table, source, at, scale, minimum = _checked(
        kind, table, packed_kind, group, rounding, seed, scale, minimum
    )
    check_packed(kind, out, at, "out")
    if kind.name == "torch":
        kind.torch.autograd.graph.increment_version(out)
    if kind.dense(out) is not out or (kind.name == "numpy" and not out.flags.writeable):
        raise ValueError("out must be contiguous and writeable: it is written in place")
    numbers, unique = None, True
    if ids is None:
        if table.shape[0] > out.shape[0]:
            raise ValueError(f"table has {table.shape[0]} rows, out has {out.shape[0]}")
    else:
        numbers, unique = _row_numbers(kind, ids, table, out.shape[0])
    _write(kind, table, source, at, packed_kind, rounding, seed, scale, minimum, out, numbers, unique)


def _row_numbers(kind, ids, table, rows):
    """ids as int64 in NumPy, and whether they increase (no row twice)."""
    _checks.same_kind(kind, ids, "ids", table, "table")
    _checks.dtype(kind, ids, "ids", (I32, I64))
    if tuple(ids.shape) != (table.shape[0],):
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}; it must be ({table.shape[0]},), one per row of table"
        )
    numbers = np.ascontiguousarray(kind.to_numpy(ids).astype(np.int64))
    bad = (numbers < 0) | (numbers >= rows)
    if bad.any():
        i = int(bad.argmax())
        raise IndexError(f"ids[{i}] is {numbers[i]}; ids must lie in [0, {rows}), the rows of out")
    return numbers, bool((np.diff(numbers) > 0).all())


# ---------------------------------------------------------------- unpack
def _unpack_rows(kind, packed, ids=None, dim=0, packed_kind="int8", group=None, dtype="float32", out=None):
    """``out``: where a kernel may write to, (n, dim) of dtype; what is returned counts."""
    at = row_layout(dim, packed_kind, group)
    check_packed(kind, packed, at)
    out_code = _checks.choice("dtype", dtype, OUT_TYPES)
    id_code, rows = I64, packed.shape[0]
    if ids is not None:
        _checks.same_kind(kind, ids, "ids", packed, "packed")
        id_code = _checks.dtype(kind, ids, "ids", (I32, I64))
        _checks.ndim(ids, "ids", 1)
        ids = kind.dense(ids)
    no_module(kind, "unpack_rows")
    n = rows if ids is None else ids.shape[0]
    if kind.kernels is None:
        if ids is not None:
            check_row_ids(kind.to_numpy(ids), rows)
        result = reference.unpack_rows(kind.to_numpy(packed), dim, packed_kind, at.group, _numpy(kind, ids))
        return kind.from_numpy(result, out_code, packed)
    packed = kind.dense(packed)
    if out is None:
        out = kind.empty((n, dim), out_code, packed)
    bad = kind.kernels.unpack_rows(
        kind.ptr(packed), KINDS[packed_kind], rows, dim, at.group, at.row_bytes, _ptr(kind, ids), id_code, n,
        0, kind.ptr(out), out_code, *kind.launch(packed),
    )  # fmt: skip
    if bad != -1:
        check_row_ids(kind.to_numpy(ids), rows)
        raise IndexError("ids changed while the kernel ran")
    return out


def no_module(kind, op):
    """On CUDA nothing falls back on the reference."""
    if kind.cuda and kind.kernels is None:
        _checks.no_kernel(kind, op)


def check_row_ids(ids, rows):
    bad = (ids < 0) | (ids >= rows)
    if bad.any():
        i = int(bad.argmax())
        raise IndexError(f"ids[{i}] is {ids[i]}; ids must lie in [0, {rows}), the rows of the packed table")
