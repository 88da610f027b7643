"""bag: sums, means and maxima of table rows, and their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy import ndarray

from .. import _checks
from .._arrays import BF16, F16, F32, F64, FLOATS, I8, I32, I64, NAMES, NUMPY, U8, call, eager, quick
from ..reference import gather as reference
from . import _spread

_tuple = tuple.__new__
_quick = quick("bag")

MODES = {"sum": 0, "mean": 1, "max": 2}
_TABLES = (F32, F16, BF16, U8, I8, F64)
_CODES = (U8, I8)
_IDS = (I32, I64)


class TouchedRows(NamedTuple):
    """Gradient of the rows that a call touched (`bag_grad` with ``sparse=True``)."""

    rows: Any
    values: Any


def bag(
    table: Any,
    ids: Any,
    offsets: Any = None,
    weights: Any = None,
    *,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    scale: Any = None,
    minimum: Any = None,
    sparse_grad: bool = False,
) -> Any:
    """Sum, mean or maximum of table rows: an embedding bag.

    Parameters
    ----------
    table : array, shape (rows, dim), float32, float16, bfloat16, float64, uint8 or int8
        8-bit tables need ``scale`` and ``minimum``. Or a `lutra.compress.Table`, in any format.
    ids : array, shape (bags, length) or (n_ids,), int32 or int64
        Rows of the table. 2-d: a bag per row. 1-d: ``offsets`` says where the bags begin.
    offsets : array, shape (bags,) or (bags + 1,), int32 or int64, optional
        Bag ``b`` holds ``ids[offsets[b] : offsets[b + 1]]``, the last one the rest; with
        ``include_last_offset`` the last offset ends the last bag.
    weights : array, the shape of ids, floating point, optional
        Factor of each row (mode 'sum' only). Used as float32, as float64 with a float64 table.
    mode : {'sum', 'mean', 'max'}, default 'sum'
    padding_idx : int, optional
        Entries with this id are left out, of the mean's count too. Negative: counts from the table's end.
    include_last_offset : bool, default False
    scale, minimum : arrays, shape (rows,), float32, optional
        For 8-bit tables: row ``r`` is ``minimum[r] + scale[r] * table[r]`` (see `quantize_rows`).
    sparse_grad : bool, default False
        torch only: the table's gradient is a coalesced sparse tensor of the touched rows. (When torch fills
        ``.grad`` it forgets the mark; the rows are sorted and unique all the same, and
        ``grad._coalesced_(True)`` sets it again.)

    Returns
    -------
    out : array, shape (bags, dim)
        The type of the table; float32 for 8-bit tables. An empty bag gives zeros.

    Raises
    ------
    IndexError
        An id outside [0, rows); an offset that decreases or lies outside [0, n_ids]. On CUDA, where nothing
        waits for the device, the bag is NaN instead.
    TypeError, ValueError
        A wrong type, dtype, shape or option.

    Notes
    -----
    Sums are accumulated in float32 (float64 for float64) in the order of the ids. Maxima: NaN wins; the
    gradient goes to the first maximum. Gradients (torch): to the table, deterministic, and to the weights
    (for 8-bit tables these only). Cost: one random read per id; a float64 table is computed by the NumPy
    reference.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> table = np.arange(8, dtype=np.float32).reshape(4, 2)
    >>> lutra.gather.bag(table, np.array([[0, 1], [3, 3]]))
    array([[ 2.,  4.],
           [12., 14.]], dtype=float32)
    """
    if padding_idx is None and scale is minimum is None and (type(table) is ndarray or eager(table)):
        result = _quick(table, ids, offsets, weights, mode, include_last_offset)
        if result is not None:
            return result
    if hasattr(table, "format") and hasattr(table, "data"):  # lutra.compress.Table
        if scale is not None or minimum is not None:
            raise ValueError(
                "scale and minimum are for dense tables of codes; a compressed table holds its own"
            )
        return table.format.bag(
            table.data, table.shape, ids, offsets, weights, mode=mode, padding_idx=padding_idx,
            include_last_offset=include_last_offset, sparse=sparse_grad,
        )  # fmt: skip
    arrays = (table, ids, offsets, weights, scale, minimum)
    return call("bag", _bag, arrays, (mode, padding_idx, include_last_offset, sparse_grad))


def bag_grad(
    grad: Any,
    ids: Any,
    offsets: Any = None,
    weights: Any = None,
    *,
    rows: int,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    table: Any = None,
    sparse: bool = False,
) -> Any:
    """Gradient of `bag` to its table, for those who have no autograd.

    Parameters
    ----------
    grad : array, shape (bags, dim), float32, float16, bfloat16 or float64
        Gradient of the result of `bag`.
    ids, offsets, weights, mode, padding_idx, include_last_offset
        As they were given to `bag`.
    rows : int
        Rows of the table.
    table : array, shape (rows, dim), optional
        The table itself; needed (and read) for mode 'max' only.
    sparse : bool, default False
        Give the touched rows only.

    Returns
    -------
    array, shape (rows, dim), the type of grad
        With ``sparse`` instead `TouchedRows`: ``rows`` (int64, increasing) and ``values`` (their gradients).

    Raises
    ------
    IndexError, TypeError, ValueError
        As `bag`.

    Notes
    -----
    Ids are sorted by row and each row's contributions are summed in order, in float32: the same bits whatever
    the number of threads.
    """
    argmax = None
    if mode == "max":
        if table is None:
            raise ValueError(
                "table is needed for mode 'max': the gradient goes to the rows that hold the maxima"
            )
        if table.shape[0] != rows:
            raise ValueError(f"table has {table.shape[0]} rows, rows is {rows}; they must be equal")
        argmax = call("bag_argmax", _bag_argmax, (table, ids, offsets), (padding_idx, include_last_offset))
    arrays = (grad, ids, offsets, weights, argmax)
    options = (rows, mode, padding_idx, include_last_offset)
    if sparse:
        return _tuple(TouchedRows, call("bag_backward_rows", _bag_backward_rows, arrays, options))
    return call("bag_backward", _bag_backward, arrays, options)


# ---------------------------------------------------------------- checks
def _mixed(kind, first, name, others):
    """A TypeError where an array is of another library or on another device than the first."""
    for a, other in others.items():
        if other is not None:
            _checks.same_kind(kind, other, a, first, name)


def _same(kind, first, name, ids, offsets, weights=None, scale=None, minimum=None, argmax=None):
    """All arrays belong together; the cheap form of _mixed for the two kinds where microseconds count."""
    if kind is NUMPY:
        for a in (ids, offsets, weights, scale, minimum, argmax):
            if a is not None and type(a) is not ndarray:
                break
        else:
            return
    elif kind.name == "torch" and not kind.cuda:
        try:
            for a in (ids, offsets, weights, scale, minimum, argmax):
                if a is not None and not a.is_cpu:
                    break
            else:
                return
        except AttributeError:
            pass
    _mixed(
        kind, first, name,
        {"ids": ids, "offsets": offsets, "weights": weights, "scale": scale, "minimum": minimum,
         "argmax": argmax},
    )  # fmt: skip


def _layout(ids, offsets, include_last_offset):
    """(bags, length) from shapes; length is 0 where offsets say it."""
    shape = ids.shape
    if offsets is None:
        if len(shape) == 2:
            if include_last_offset:
                raise ValueError("include_last_offset is True, but there are no offsets (ids is 2-d)")
            return shape
        if len(shape) == 1:
            raise ValueError(
                f"ids has shape {tuple(shape)}; 1-d ids need offsets (2-d ids are one bag per row)"
            )
        raise ValueError(f"ids must be 2-d, or 1-d with offsets; got shape {tuple(shape)}")
    if len(shape) != 1:
        raise ValueError(f"ids must be 1-d where offsets are given, got shape {tuple(shape)}")
    if len(offsets.shape) != 1:
        raise ValueError(f"offsets must be 1-d, got shape {tuple(offsets.shape)}")
    bags = offsets.shape[0]
    if include_last_offset:
        if bags == 0:
            raise ValueError("offsets is empty; with include_last_offset it needs at least one entry")
        bags -= 1
    return bags, 0


def _padding(padding_idx, rows):
    """The padded row as a kernel wants it: -1 for none."""
    if padding_idx is None:
        return -1
    if type(padding_idx) is not int or not -rows <= padding_idx < rows:
        padding_idx = _checks.integer("padding_idx", padding_idx)
        if not -rows <= padding_idx < rows:
            raise ValueError(
                f"padding_idx is {padding_idx}; it must lie in [{-rows}, {rows}), the rows of the table"
            )
    return padding_idx + rows if padding_idx < 0 else padding_idx


def _ids(kind, ids, offsets):
    """Contiguous ids and offsets of one integer type, and its code."""
    id_code = kind.code(ids)
    if id_code not in _IDS:
        id_code = _checks.dtype(kind, ids, "ids", _IDS)
    if offsets is not None:
        if kind.code(offsets) != id_code:
            _checks.dtype(kind, offsets, "offsets", _IDS)
            offsets = kind.cast(offsets, id_code)
        offsets = kind.dense(offsets)
    return kind.dense(ids), offsets, id_code


def _weights(kind, weights, ids, mode, wanted):
    """Weights as a contiguous array of type ``wanted``."""
    if mode != "sum":
        raise ValueError(f"weights go with mode 'sum' only, got mode {mode!r}")
    if weights.shape != ids.shape:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; it must be that of ids, {tuple(ids.shape)}"
        )
    if kind.code(weights) != wanted:
        _checks.dtype(kind, weights, "weights", (*FLOATS, F64))
        weights = kind.cast(weights, wanted)
    return kind.dense(weights)


def _table(kind, table, scale, minimum):
    """Check a table; its dtype code."""
    code = kind.code(table)
    if code not in _TABLES:
        code = _checks.dtype(kind, table, "table", _TABLES)
    if len(table.shape) != 2:
        _checks.ndim(table, "table", 2)
    if code in _CODES:
        for a, name in ((scale, "scale"), (minimum, "minimum")):
            if a is None:
                raise ValueError(f"{name} is missing: a table of {NAMES[code]} codes needs scale and minimum")
            _checks.dtype(kind, a, name, (F32,))
            if tuple(a.shape) != (table.shape[0],):
                raise ValueError(
                    f"{name} has shape {tuple(a.shape)}; it must be ({table.shape[0]},): one per row"
                )
    elif scale is not None or minimum is not None:
        raise ValueError(f"scale and minimum are for tables of uint8 or int8 codes, table is {NAMES[code]}")
    return code


def _explain(kind, ids, offsets, rows, include_last_offset):
    """A kernel reported a bad id or offset: raise the IndexError that says which."""
    offsets = None if offsets is None else kind.to_numpy(offsets)
    reference.check_ids(kind.to_numpy(ids), offsets, rows, include_last_offset)
    raise IndexError("ids or offsets changed while the kernel ran")


def _to_numpy(kind, *arrays):
    return [None if a is None else kind.to_numpy(a) for a in arrays]


def _ptr(kind, a):
    return None if a is None else kind.ptr(a)


# ---------------------------------------------------------------- forward
def _bag(
    kind, table, ids, offsets=None, weights=None, scale=None, minimum=None, mode="sum", padding_idx=None,
    include_last_offset=False, sparse_grad=False,
):  # fmt: skip
    return _forward(
        kind, table, ids, offsets, weights, scale, minimum, mode, padding_idx, include_last_offset, False
    )


def _bag_argmax(kind, table, ids, offsets=None, padding_idx=None, include_last_offset=False):
    """The ids that give the maxima of mode 'max': (bags, dim) int64, -1 for empty bags."""
    return _forward(
        kind, table, ids, offsets, None, None, None, "max", padding_idx, include_last_offset, True
    )


def _forward(
    kind, table, ids, offsets, weights, scale, minimum, mode, padding_idx, include_last_offset, want_argmax
):
    _same(kind, table, "table", ids, offsets, weights, scale, minimum)
    try:
        mode_code = MODES[mode]
    except (KeyError, TypeError):
        mode_code = _checks.choice("mode", mode, MODES)
    code = _table(kind, table, scale, minimum)
    bags, length = _layout(ids, offsets, include_last_offset)
    rows, dim = table.shape
    padding = -1 if padding_idx is None else _padding(padding_idx, rows)
    ids, offsets, id_code = _ids(kind, ids, offsets)
    if weights is not None:
        weights = _weights(kind, weights, ids, mode, F64 if code == F64 else F32)
    out_code = F32 if code in _CODES else code
    kernels = kind.kernels
    if kernels is None or code == F64:
        _checks.no_kernel(kind, "bag")
        arguments = [
            *_to_numpy(kind, table, ids, offsets, weights, scale, minimum),
            mode,
            padding_idx,
            include_last_offset,
            want_argmax,
        ]
        result = reference.bag(*arguments)
        if want_argmax:
            return kind.from_numpy(result[1], I64, table)
        return kind.from_numpy(result, out_code, table)
    table = kind.dense(table)
    out = kind.empty((bags, dim), out_code, table)
    argmax = kind.empty((bags, dim), I64, table) if want_argmax else None
    ptr = kind.ptr
    if code in _CODES:
        scale, minimum = kind.dense(scale), kind.dense(minimum)
    bad = kernels.bag(
        ptr(ids), id_code, ids.shape[0] if length == 0 and offsets is not None else bags * length,
        None if offsets is None else ptr(offsets), include_last_offset, bags, length, padding, mode_code,
        ptr(table), code, rows, dim, None if scale is None else ptr(scale),
        None if minimum is None else ptr(minimum), None if weights is None else ptr(weights), ptr(out),
        None if argmax is None else ptr(argmax), *kind.launch(table),
    )  # fmt: skip
    if bad != -1 and not kind.cuda:
        _explain(kind, ids, offsets, rows, include_last_offset)
    return out if argmax is None else argmax


# ---------------------------------------------------------------- backward
def _bag_backward(
    kind, grad, ids, offsets=None, weights=None, argmax=None, rows=0, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """Dense gradient of the table, (rows, dim)."""
    return _backward(
        kind, grad, ids, offsets, weights, argmax, rows, mode, padding_idx, include_last_offset, False
    )


def _bag_backward_rows(
    kind, grad, ids, offsets=None, weights=None, argmax=None, rows=0, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """The touched rows (int64, increasing) and their gradients."""
    return _backward(
        kind, grad, ids, offsets, weights, argmax, rows, mode, padding_idx, include_last_offset, True
    )


def _backward(
    kind, grad, ids, offsets, weights, argmax, rows, mode, padding_idx, include_last_offset, sparse
):
    _same(kind, grad, "grad", ids, offsets, weights, argmax=argmax)
    mode_code = _checks.choice("mode", mode, MODES)
    rows = _checks.integer("rows", rows, 0)
    code = _checks.dtype(kind, grad, "grad", (*FLOATS, F64))
    bags, length = _layout(ids, offsets, include_last_offset)
    if len(grad.shape) != 2 or grad.shape[0] != bags:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; it must be (bags, dim) with {bags} bags")
    dim = grad.shape[1]
    padding = _padding(padding_idx, rows)
    ids, offsets, id_code = _ids(kind, ids, offsets)
    if weights is not None:
        weights = _weights(kind, weights, ids, mode, F64 if code == F64 else F32)
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "bag_backward")
        arguments = [
            *_to_numpy(kind, grad, ids, offsets, weights, argmax),
            rows,
            mode,
            padding_idx,
            include_last_offset,
            sparse,
        ]
        result = reference.bag_grad(*arguments)
        if sparse:
            return kind.from_numpy(result[0], I64, grad), kind.from_numpy(result[1], code, grad)
        return kind.from_numpy(result, code, grad)
    if argmax is not None:
        argmax = kind.dense(argmax)
    grad = kind.dense(grad)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    if kind.cuda:
        where = (
            kind.ptr(ids), id_code, n_ids, _ptr(kind, offsets), include_last_offset, bags, length, padding,
            mode_code, rows,
        )  # fmt: skip
        return _backward_on_cuda(kind, grad, code, where, weights, argmax, sparse)
    order, starts, touched, bag_of, count, workspace = _spread.plan_memory(kind, grad, n_ids, rows)
    if sparse:  # it outlives the others
        touched = kind.empty((n_ids,), I64, grad)
    bag_scale = kind.empty((bags,), F32, grad) if mode == "mean" else None
    ptr = kind.ptr
    where = (
        ptr(ids), id_code, n_ids, _ptr(kind, offsets), include_last_offset, bags, length, padding, mode_code,
        rows,
    )  # fmt: skip
    plan = (ptr(order), ptr(starts), ptr(touched), ptr(bag_of), _ptr(kind, bag_scale), ptr(count))
    bad = kind.kernels.bag_sort(*where, *plan, ptr(workspace), workspace.shape[0])
    if bad != -1:
        _explain(kind, ids, offsets, rows, include_last_offset)
    few = not sparse and _spread.few_pages(kind, n_ids, rows, dim * grad.dtype.itemsize)
    sparse = sparse or few
    if sparse:
        height = int(count[0])
        result = kind.empty((height, dim), code, grad)
    else:
        result = _spread.empty(kind, (rows, dim), code, grad)
    kind.kernels.bag_backward(
        *where, dim, *plan, ptr(grad), code, _ptr(kind, weights), _ptr(kind, argmax), not sparse, ptr(result)
    )
    if few:
        return _spread.spread(kind, touched[:height], result, rows)
    return (touched[:height], result) if sparse else result


def _backward_on_cuda(kind, grad, code, where, weights, argmax, sparse):
    """One call sorts and sums. The number of touched rows is read last, when all work has been launched."""
    ptr, dim, rows = kind.ptr, grad.shape[1], where[-1]
    n_ids, bags, padding, mode = where[2], where[5], where[7], where[8]
    touched: Any = None
    count: Any = None
    most = min(n_ids, rows)
    if sparse:
        result = kind.empty((most, dim), code, grad)
        touched, count = kind.empty((most,), I64, grad), kind.empty((1,), I64, grad)
    else:
        result = kind.empty((rows, dim), code, grad)
    weights, argmax = _ptr(kind, weights), _ptr(kind, argmax)
    size = kind.kernels.bag_grad_workspace(
        n_ids, where[3], bags, padding, mode, dim, code, weights, not sparse, *kind.launch(grad)
    )
    workspace = kind.empty((size,), U8, grad)
    kind.kernels.bag_grad(
        *where, dim, ptr(grad), code, weights, argmax, not sparse, ptr(result), _ptr(kind, touched),
        _ptr(kind, count), *kind.launch(grad, workspace),
    )  # fmt: skip
    if count is None:
        return result
    height = int(count[0])  # waits for the device, as any sparse result must
    touched, values = touched[:height], result[:height]
    if height * 4 <= most:  # a view would keep the memory of all
        touched, values = kind.copy(touched), kind.copy(values)
    return touched, values


def _bag_weight_grad(
    kind,
    grad,
    table,
    ids,
    offsets=None,
    scale=None,
    minimum=None,
    padding_idx=None,
    include_last_offset=False,
):
    """Gradient of the weights, the shape of ids, float32 (float64 for a float64 table)."""
    _same(kind, grad, "grad", ids, offsets, scale=scale, minimum=minimum)
    _checks.same_kind(kind, table, "table", grad, "grad")
    code = _table(kind, table, scale, minimum)
    bags, length = _layout(ids, offsets, include_last_offset)
    rows, dim = table.shape
    grad_code = _checks.dtype(kind, grad, "grad", (*FLOATS, F64))
    if tuple(grad.shape) != (bags, dim):
        raise ValueError(f"grad has shape {tuple(grad.shape)}; it must be ({bags}, {dim})")
    padding = _padding(padding_idx, rows)
    ids, offsets, id_code = _ids(kind, ids, offsets)
    if kind.kernels is None or code == F64 or grad_code == F64:
        _checks.no_kernel(kind, "bag_weight_grad")
        arguments = [
            *_to_numpy(kind, grad, table, ids, offsets, scale, minimum),
            padding_idx,
            include_last_offset,
        ]
        result = reference.bag_weight_grad(*arguments)
        return kind.from_numpy(result, F64 if code == F64 else F32, grad)
    if kind.cuda and grad_code not in (F32, F32 if code in _CODES else code):  # those that have a kernel
        grad_code, grad = F32, kind.cast(grad, F32)
    grad, table = kind.dense(grad), kind.dense(table)
    if code in _CODES:
        scale, minimum = kind.dense(scale), kind.dense(minimum)
    result = kind.empty(tuple(ids.shape), F32, grad)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    bad = kind.kernels.bag_weight_grad(
        kind.ptr(ids), id_code, n_ids, _ptr(kind, offsets), include_last_offset, bags, length, padding,
        MODES["sum"], kind.ptr(table), code, rows, dim, _ptr(kind, scale), _ptr(kind, minimum),
        kind.ptr(grad), grad_code, kind.ptr(result), *kind.launch(grad),
    )  # fmt: skip
    if bad != -1 and not kind.cuda:
        _explain(kind, ids, offsets, rows, include_last_offset)
    return result
