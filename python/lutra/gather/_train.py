"""tensor_train: bags of rows of a table that is a tensor train."""

from __future__ import annotations

from typing import Any

from .. import _checks
from .._arrays import F32, F64, FLOATS, call
from ..reference import train as reference
from . import _bag, _plan

_MODES = {"sum": 0, "mean": 1}


def tensor_train(
    core1: Any,
    core2: Any,
    core3: Any,
    ids: Any,
    offsets: Any = None,
    weights: Any = None,
    *,
    rows: int | None = None,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
) -> Any:
    """Sum or mean of rows of a tensor train: `bag` of a table that is never built.

    Row ``(a * i2 + b) * i3 + c`` is ``core1[a] . core2[b] . core3[c]``, of d1 * d2 * d3 values in the order
    of (d1, d2, d3).

    Parameters
    ----------
    core1 : array, shape (i1, d1, r1), float32, float16, bfloat16 or float64
    core2 : array, shape (i2, r1, d2, r2), the type of core1
    core3 : array, shape (i3, d3, r2), the type of core1
        Transposed: a row of r2 for each of its d3 columns.
    ids, offsets, weights, padding_idx, include_last_offset
        As in `bag`.
    rows : int, optional
        Ids must lie in [0, rows); default and most i1 * i2 * i3.
    mode : {'sum', 'mean'}, default 'sum'

    Returns
    -------
    out : array, shape (bags, d1 * d2 * d3), the type of the cores

    Raises
    ------
    IndexError
        An id out of range, an offset that decreases.
    TypeError, ValueError
        A wrong type, shape or option.

    Notes
    -----
    Computed in float32 (float64 for float64). An id takes r1 r2 d1 d2 + r2 d1 d2 d3 multiply-adds forward; r2
    is padded to multiples of 16. Gradients (torch) to the cores and the weights: ids are sorted, so that
    those with the same a and b share their product; deterministic. On CUDA gradients are of torch tensors,
    by products of torch's.

    References
    ----------
    Yin, Acun, Liu, Wu, TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models, MLSys 2021.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> a, b, c = np.ones((2, 2, 3)), np.ones((2, 3, 1, 4)), np.ones((2, 2, 4))
    >>> lutra.gather.tensor_train(a, b, c, np.array([[0, 7]]))
    array([[24., 24., 24., 24.]])
    """
    options = (rows, mode, padding_idx, include_last_offset)
    return call("tensor_train", _tensor_train, (core1, core2, core3, ids, offsets, weights), options)


def _shapes(core1, core2, core3, ids, offsets, rows, mode, include_last_offset):
    """Checks that need no data: ((i1, i2, i3, d1, d2, d3, r1, r2), rows, bags, length)."""
    _checks.ndim(core1, "core1", 3)
    _checks.ndim(core2, "core2", 4)
    _checks.ndim(core3, "core3", 3)
    i1, d1, r1 = core1.shape
    i2, first, d2, r2 = core2.shape
    i3, d3, last = core3.shape
    if first != r1:
        raise ValueError(f"core2 has shape {tuple(core2.shape)}; its second axis must be core1's rank, {r1}")
    if last != r2:
        raise ValueError(f"core3 has shape {tuple(core3.shape)}; its last axis must be core2's rank, {r2}")
    if min(i1, i2, i3, d1, d2, d3, r1, r2) < 1:
        raise ValueError("the cores must not be empty")
    if rows is None:
        rows = i1 * i2 * i3
    else:
        _checks.integer("rows", rows, 0)
        if rows > i1 * i2 * i3:
            raise ValueError(f"rows is {rows}; the cores have {i1} * {i2} * {i3} = {i1 * i2 * i3}")
    _checks.choice("mode", mode, _MODES)
    bags, length = _bag._layout(ids, offsets, include_last_offset)
    return (i1, i2, i3, d1, d2, d3, r1, r2), rows, bags, length


def _checked(kind, core1, core2, core3, ids, offsets, weights):
    """Kinds and dtypes; the dtype code."""
    code = _checks.dtype(kind, core1, "core1", (*FLOATS, F64))
    if kind.cuda and (kind.kernels is None or code == F64):
        _checks.no_kernel(kind, "tensor_train")
    others = {"core2": core2, "core3": core3, "ids": ids, "offsets": offsets, "weights": weights}
    for name, a in others.items():
        if a is not None:
            _checks.same_kind(kind, a, name, core1, "core1")
    _checks.dtype(kind, core2, "core2", (code,))
    _checks.dtype(kind, core3, "core3", (code,))
    return code


def _single(kind, a):
    """A core, or a gradient, as contiguous float32: cores are small."""
    return kind.dense(a if kind.code(a) == F32 else kind.cast(a, F32))


def _tensor_train(
    kind, core1, core2, core3, ids, offsets=None, weights=None, rows=None, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    sizes, rows, bags, length = _shapes(core1, core2, core3, ids, offsets, rows, mode, include_last_offset)
    code = _checked(kind, core1, core2, core3, ids, offsets, weights)
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    if weights is not None:
        weights = _bag._weights(kind, weights, ids, mode, F64 if code == F64 else F32)
    if kind.kernels is None or code == F64:
        result = reference.tensor_train(*[
            *_bag._to_numpy(kind, core1, core2, core3, ids, offsets, weights), rows, mode,
            None if padding < 0 else padding, include_last_offset,
        ])  # fmt: skip
        return kind.from_numpy(result, code, core1)
    cores = [_single(kind, core) for core in (core1, core2, core3)]
    out = kind.empty((bags, sizes[3] * sizes[4] * sizes[5]), F32, core1)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    bad = kind.kernels.tensor_train(
        kind.ptr(ids), id_code, n_ids, _bag._ptr(kind, offsets), include_last_offset, bags, length, padding,
        _MODES[mode], *(kind.ptr(core) for core in cores), sizes, rows, _bag._ptr(kind, weights),
        kind.ptr(out), *kind.launch(core1),
    )  # fmt: skip
    if bad != -1:
        _bag._explain(kind, ids, offsets, rows, include_last_offset)
    return out if code == F32 else kind.cast(out, code)


def _tensor_train_backward(
    kind, grad, core1, core2, core3, ids, offsets=None, weights=None, rows=None, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """Gradients of the cores."""
    sizes, rows, bags, length = _shapes(core1, core2, core3, ids, offsets, rows, mode, include_last_offset)
    code = _checked(kind, core1, core2, core3, ids, offsets, weights)
    dim = sizes[3] * sizes[4] * sizes[5]
    if tuple(grad.shape) != (bags, dim):
        raise ValueError(f"grad has shape {tuple(grad.shape)}; it must be ({bags}, {dim})")
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    if weights is not None:
        weights = _bag._weights(kind, weights, ids, mode, F64 if code == F64 else F32)
    if kind.kernels is None or code == F64:
        results = reference.tensor_train_grad(*[
            *_bag._to_numpy(kind, grad, core1, core2, core3, ids, offsets, weights), rows, mode,
            None if padding < 0 else padding, include_last_offset,
        ])  # fmt: skip
        return tuple(kind.from_numpy(r, code, core1) for r in results)
    cores = [_single(kind, core) for core in (core1, core2, core3)]
    grad = _single(kind, grad)
    if kind.cuda:
        given = (
            ids,
            offsets,
            weights,
            None,
            rows,
            mode,
            None if padding < 0 else padding,
            include_last_offset,
        )
        results = _backward_by_torch(kind, grad, cores, sizes, given)
        return tuple(g if code == F32 else kind.cast(g, code) for g in results)
    plan = _plan.sort_ids(kind, ids, id_code, offsets, bags, length, padding, mode, rows, include_last_offset)
    out = [kind.empty(tuple(core.shape), F32, core1) for core in cores]
    n_ids = ids.shape[0] if offsets is not None else bags * length
    ptr, optional = kind.ptr, _bag._ptr
    kind.kernels.tensor_train_backward(
        n_ids, bags, *(ptr(core) for core in cores), sizes, rows, ptr(plan.order), ptr(plan.starts),
        ptr(plan.touched), ptr(plan.bag_of), optional(kind, plan.bag_scale), ptr(plan.count),
        optional(kind, weights), ptr(grad), *(ptr(g) for g in out),
    )  # fmt: skip
    return tuple(g if code == F32 else kind.cast(g, code) for g in out)


def _backward_by_torch(kind, grad, cores, sizes, given):
    """Gradients of the cores from those of the touched rows, on CUDA: (core1, core2, core3) in float32."""
    core1, core2, core3 = cores
    _, i2, i3, d1, d2, d3, r1, r2 = sizes
    rows, g = _bag._bag_backward_rows(kind, grad, *given)
    n, prefix = len(rows), rows // i3
    a, b, c = prefix // i2, prefix % i2, rows % i3
    first, second = core1[a], core2[b].reshape(n, r1, d2 * r2)
    product = (first @ second).reshape(n, d1 * d2, r2)
    g = g.reshape(n, d1 * d2, d3)
    to_product = (g @ core3[c]).reshape(n, d1, d2 * r2)
    parts = (
        (to_product @ second.transpose(1, 2), a, core1.shape),
        (first.transpose(1, 2) @ to_product, b, core2.shape),
        (g.transpose(1, 2) @ product, c, core3.shape),
    )
    return [
        _bag._bag_backward(kind, p.reshape(n, -1), at.reshape(-1, 1), rows=shape[0]).reshape(shape)
        for p, at, shape in parts
    ]


def _tensor_train_weight_grad(
    kind, grad, core1, core2, core3, ids, offsets=None, rows=None, padding_idx=None, include_last_offset=False
):
    """Gradient of the weights, the shape of ids, float32 (float64 for float64 cores)."""
    sizes, rows, bags, length = _shapes(core1, core2, core3, ids, offsets, rows, "sum", include_last_offset)
    code = _checked(kind, core1, core2, core3, ids, offsets, None)
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    if kind.kernels is None or code == F64:
        result = reference.tensor_train_weight_grad(*[
            *_bag._to_numpy(kind, grad, core1, core2, core3, ids, offsets), rows,
            None if padding < 0 else padding, include_last_offset,
        ])  # fmt: skip
        return kind.from_numpy(result, F64 if code == F64 else F32, core1)
    cores = [_single(kind, core) for core in (core1, core2, core3)]
    grad = _single(kind, grad)
    if kind.cuda:  # rows of the entries, then products with their bags' gradients
        flat = ids.reshape(-1)
        parts = _tensor_train(kind, cores[0], cores[1], cores[2], flat.reshape(-1, 1), rows=rows)
        parts, entries, pad = _plan.leave_out(parts, flat, None if padding < 0 else padding)
        return _bag._bag_weight_grad(
            kind, grad, parts, entries.reshape(ids.shape), None if offsets is None else offsets.long(), None,
            None, pad, include_last_offset,
        )  # fmt: skip
    out = kind.empty(tuple(ids.shape), F32, core1)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    bad = kind.kernels.tensor_train_weight_grad(
        kind.ptr(ids), id_code, n_ids, _bag._ptr(kind, offsets), include_last_offset, bags, length, padding,
        0, *(kind.ptr(core) for core in cores), sizes, rows, kind.ptr(grad), kind.ptr(out),
    )  # fmt: skip
    if bad != -1:
        _bag._explain(kind, ids, offsets, rows, include_last_offset)
    return out
