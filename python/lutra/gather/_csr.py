"""bag_csr: bags of rows of a pruned table."""

from __future__ import annotations

from typing import Any

from .. import _checks
from .._arrays import F32, F64, FLOATS, I32, I64, U8, call
from ..reference import csr as reference
from . import _bag, _plan, _spread

_BAD = -(2**63)  # kBadCsr
_COLUMNS = {"uint8": 1, "int16": 2, "int32": 4}
_MODES = {"sum": 0, "mean": 1}


def bag_csr(
    values: Any,
    indptr: Any,
    columns: Any,
    ids: Any,
    offsets: Any = None,
    weights: Any = None,
    *,
    dim: int,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
) -> Any:
    """Sum or mean of rows that are stored in compressed sparse rows: `bag` of a pruned table.

    Row ``r`` holds ``values[indptr[r] : indptr[r + 1]]`` in the columns
    ``columns[indptr[r] : indptr[r + 1]]``, each column at most once, and zeros elsewhere.

    Parameters
    ----------
    values : array, shape (nnz,), float32, float16, bfloat16 or float64
    indptr : array, shape (rows + 1,), int32 or int64
    columns : array, shape (nnz,), uint8, int16 or int32
        In [0, dim).
    ids, offsets, weights, padding_idx, include_last_offset
        As in `bag`.
    dim : int
        Columns of the table.
    mode : {'sum', 'mean'}, default 'sum'

    Returns
    -------
    out : array, shape (bags, dim), the type of values

    Raises
    ------
    IndexError
        An id out of range, an offset that decreases.
    TypeError, ValueError
        A wrong type, shape or option; an ``indptr`` that decreases or leaves [0, nnz].

    Notes
    -----
    Sums are in float32. Gradients (torch): to the values, of which only those of touched rows are written,
    and to the weights; deterministic. On CUDA rows of at most 56,000 columns; all of the gradient is written,
    an id out of range makes its bag NaN, and an ``indptr`` that is wrong counts as empty rows.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> values, columns = np.array([1, 2, 3], np.float32), np.array([0, 2, 1], np.uint8)
    >>> lutra.gather.bag_csr(values, np.array([0, 2, 3]), columns, np.array([[0, 1]]), dim=3)
    array([[1., 3., 2.]], dtype=float32)
    """
    arrays = (values, indptr, columns, ids, offsets, weights)
    return call("bag_csr", _bag_csr, arrays, (dim, mode, padding_idx, include_last_offset))


def _shapes(values, indptr, columns, ids, offsets, weights, dim, mode, include_last_offset):
    """Checks that need no data: (rows, bags, length)."""
    for a, name in ((values, "values"), (indptr, "indptr"), (columns, "columns")):
        _checks.ndim(a, name, 1)
    if values.shape[0] != columns.shape[0]:
        raise ValueError(
            f"columns has length {columns.shape[0]}; it must be that of values, {values.shape[0]}"
        )
    if indptr.shape[0] < 1:
        raise ValueError("indptr is empty; it needs rows + 1 entries")
    _checks.integer("dim", dim, 0)
    _checks.choice("mode", mode, _MODES)
    bags, length = _bag._layout(ids, offsets, include_last_offset)
    return indptr.shape[0] - 1, bags, length


def _table(kind, values, indptr, columns, dim):
    """The table as the kernel takes it; its arrays are contiguous already."""
    name = str(columns.dtype).removeprefix("torch.")
    ptr = kind.ptr
    return (
        ptr(indptr), kind.code(indptr) == I64, ptr(columns), _COLUMNS[name], ptr(values), kind.code(values),
        indptr.shape[0] - 1, dim, columns.shape[0],
    )  # fmt: skip


def _checked(kind, values, indptr, columns):
    """Dtypes; contiguous arrays."""
    code = _checks.dtype(kind, values, "values", (*FLOATS, F64))
    if kind.cuda and (kind.kernels is None or code == F64):
        _checks.no_kernel(kind, "bag_csr")
    _checks.dtype(kind, indptr, "indptr", (I32, I64))
    name = str(columns.dtype).removeprefix("torch.")
    if name not in _COLUMNS:
        raise TypeError(f"columns has dtype {name}; it must be uint8, int16 or int32")
    if kind.kernels is None:  # kernels look themselves
        starts = kind.to_numpy(indptr)
        inside = len(starts) == 0 or 0 <= starts[0] <= starts[-1] <= len(columns)
        if not inside or (starts[1:] < starts[:-1]).any():
            _raise(kind, _BAD, None, None, 0, False)
    return kind.dense(values), kind.dense(indptr), kind.dense(columns)


def _raise(kind, bad, ids, offsets, rows, include_last_offset):
    if bad == _BAD:
        raise ValueError("indptr must not decrease and must lie in [0, nnz], the number of values")
    if bad != -1:
        _bag._explain(kind, ids, offsets, rows, include_last_offset)


def _same(kind, values, **others):
    for name, a in others.items():
        if a is not None:
            _checks.same_kind(kind, a, name, values, "values")


def _bag_csr(
    kind, values, indptr, columns, ids, offsets=None, weights=None, dim=0, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    _same(kind, values, indptr=indptr, columns=columns, ids=ids, offsets=offsets, weights=weights)
    rows, bags, length = _shapes(
        values, indptr, columns, ids, offsets, weights, dim, mode, include_last_offset
    )
    values, indptr, columns = _checked(kind, values, indptr, columns)
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    code = kind.code(values)
    if weights is not None:
        weights = _bag._weights(kind, weights, ids, mode, F64 if code == F64 else F32)
    if kind.kernels is None or code == F64:
        result = reference.bag_csr(*[
            *_bag._to_numpy(kind, values, indptr, columns, ids, offsets, weights), dim, mode,
            None if padding < 0 else padding, include_last_offset,
        ])  # fmt: skip
        return kind.from_numpy(result, code, values)
    out = kind.empty((bags, dim), code, values)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    bad = kind.kernels.bag_csr(
        kind.ptr(ids), id_code, n_ids, _bag._ptr(kind, offsets), include_last_offset, bags, length, padding,
        _MODES[mode], *_table(kind, values, indptr, columns, dim), _bag._ptr(kind, weights), kind.ptr(out),
        *kind.launch(values),
    )  # fmt: skip
    _raise(kind, bad, ids, offsets, rows, include_last_offset)
    return out


def _bag_csr_backward(
    kind, grad, indptr, columns, ids, offsets=None, weights=None, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """Gradient of the values, (nnz,)."""
    dim, rows = grad.shape[1], indptr.shape[0] - 1
    grad, indptr, columns = _checked(kind, grad, indptr, columns)
    bags, length = _bag._layout(ids, offsets, include_last_offset)
    if grad.shape[0] != bags:
        raise ValueError(f"grad has {grad.shape[0]} rows; it must have one for each of the {bags} bags")
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    code = kind.code(grad)
    if weights is not None:
        weights = _bag._weights(kind, weights, ids, mode, F64 if code == F64 else F32)
    if kind.kernels is None or code == F64:
        result = reference.bag_csr_grad(*[
            *_bag._to_numpy(kind, grad, indptr, columns, ids, offsets, weights), mode,
            None if padding < 0 else padding, include_last_offset,
        ])  # fmt: skip
        return kind.from_numpy(result, code, grad)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    if kind.cuda:
        out = kind.empty((columns.shape[0],), code, grad)
        arguments = (
            kind.ptr(ids), id_code, n_ids, _bag._ptr(kind, offsets), include_last_offset, bags, length,
            padding, _MODES[mode], *_table(kind, grad, indptr, columns, dim), _bag._ptr(kind, weights),
            kind.ptr(grad), kind.ptr(out),
        )  # fmt: skip
        workspace = kind.empty((kind.kernels.bag_csr_grad(*arguments, None, *kind.launch(grad)),), U8, grad)
        kind.kernels.bag_csr_grad(*arguments, *kind.launch(grad, workspace))
        return out
    plan = _plan.sort_ids(kind, ids, id_code, offsets, bags, length, padding, mode, rows, include_last_offset)
    nnz, size = columns.shape[0], grad.dtype.itemsize
    few = _spread.few_pages(kind, n_ids, rows, nnz * size // max(rows, 1))
    out = (_spread.zeros if few else _spread.empty)(kind, (nnz,), code, grad)
    ptr, optional = kind.ptr, _bag._ptr
    bad = kind.kernels.bag_csr_backward(
        n_ids, bags, *_table(kind, grad, indptr, columns, dim), ptr(plan.order), ptr(plan.starts),
        ptr(plan.touched), ptr(plan.bag_of), optional(kind, plan.bag_scale), ptr(plan.count),
        optional(kind, weights), ptr(grad), not few, ptr(out),
    )  # fmt: skip
    _raise(kind, bad, ids, offsets, rows, include_last_offset)
    return out


def _bag_csr_weight_grad(
    kind, grad, values, indptr, columns, ids, offsets=None, padding_idx=None, include_last_offset=False
):
    """Gradient of the weights, the shape of ids, float32 (float64 for float64 values)."""
    dim, rows = grad.shape[1], indptr.shape[0] - 1
    values, indptr, columns = _checked(kind, values, indptr, columns)
    bags, length = _bag._layout(ids, offsets, include_last_offset)
    if grad.shape[0] != bags:
        raise ValueError(f"grad has {grad.shape[0]} rows; it must have one for each of the {bags} bags")
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    code = kind.code(values)
    if kind.kernels is None or code == F64:
        result = reference.bag_csr_weight_grad(*[
            *_bag._to_numpy(kind, grad, values, indptr, columns, ids, offsets),
            None if padding < 0 else padding, include_last_offset,
        ])  # fmt: skip
        return kind.from_numpy(result, F64 if code == F64 else F32, grad)
    grad = kind.dense(kind.cast(grad, code))
    out = kind.empty(tuple(ids.shape), F32, grad)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    bad = kind.kernels.bag_csr_weight_grad(
        kind.ptr(ids), id_code, n_ids, _bag._ptr(kind, offsets), include_last_offset, bags, length, padding,
        0, *_table(kind, values, indptr, columns, dim), kind.ptr(grad), kind.ptr(out),
        *kind.launch(grad),
    )  # fmt: skip
    _raise(kind, bad, ids, offsets, rows, include_last_offset)
    return out
