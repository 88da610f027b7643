"""bag_packed: sums, means and maxima of packed rows."""

from __future__ import annotations

from typing import Any

from .. import _checks
from .._arrays import F32, F64, FLOATS, call
from ..reference import packed as reference
from ._bag import MODES, _explain, _ids, _layout, _padding, _same, _to_numpy, _weights
from ._packed import KINDS, OUT_TYPES, check_packed, no_module, row_layout


def bag_packed(
    packed: Any,
    ids: Any,
    offsets: Any = None,
    weights: Any = None,
    *,
    dim: int,
    kind: str = "int8",
    group: int | None = None,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    dtype: str = "float32",
) -> Any:
    """Sum, mean or maximum of packed rows: `bag` on what `pack_rows` wrote.

    Parameters
    ----------
    packed : array, shape (rows, row_bytes), uint8
        Rows of `pack_rows`, or of ``torch.ops.quantized.embedding_bag_byte_prepack`` and its kin.
    ids, offsets, weights, mode, padding_idx, include_last_offset
        As in `bag`.
    dim : int
        Values of a row.
    kind, group
        As in `pack_rows`.
    dtype : {'float32', 'float16', 'bfloat16'}, default 'float32'
        Of the result.

    Returns
    -------
    array, shape (bags, dim), of ``dtype``
        Sums are accumulated in float32, in the order of the ids. An empty bag gives zeros.

    Raises
    ------
    IndexError
        An id outside [0, rows); an offset that decreases or lies outside [0, n_ids]. (On CUDA: NaN.)
    TypeError, ValueError
        A wrong type, dtype, shape or option; a row length that does not fit.

    Notes
    -----
    Gradients (torch) flow to the weights. Cost: a random read of one or two cache lines per id; rows are
    decoded in registers.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> packed = lutra.gather.pack_rows(np.array([[0., 1.], [2., 3.]], np.float32), "int8")
    >>> lutra.gather.bag_packed(packed, np.array([[0, 1], [1, 1]]), dim=2).round(3)
    array([[2., 4.],
           [4., 6.]], dtype=float32)
    """
    options = (dim, kind, group, mode, padding_idx, include_last_offset, dtype)
    return call("bag_packed", _bag_packed, (packed, ids, offsets, weights), options)


def _checked(kind, packed, ids, offsets, weights, dim, packed_kind, group, include_last_offset):
    _same(kind, packed, "packed", ids, offsets, weights)
    at = row_layout(dim, packed_kind, group)
    check_packed(kind, packed, at)
    return at, *_layout(ids, offsets, include_last_offset)


def _bag_packed(
    kind, packed, ids, offsets=None, weights=None, dim=0, packed_kind="int8", group=None, mode="sum",
    padding_idx=None, include_last_offset=False, dtype="float32",
):  # fmt: skip
    mode_code = _checks.choice("mode", mode, MODES)
    out_code = _checks.choice("dtype", dtype, OUT_TYPES)
    at, bags, length = _checked(
        kind, packed, ids, offsets, weights, dim, packed_kind, group, include_last_offset
    )
    rows = packed.shape[0]
    padding = _padding(padding_idx, rows)
    ids, offsets, id_code = _ids(kind, ids, offsets)
    if weights is not None:
        weights = _weights(kind, weights, ids, mode, F32)
    no_module(kind, "bag_packed")
    if kind.kernels is None:
        result = reference.bag_packed(
            *_to_numpy(kind, packed, ids, offsets, weights), dim=dim, kind=packed_kind, group=at.group,
            mode=mode, padding_idx=padding_idx, include_last_offset=include_last_offset,
        )  # fmt: skip
        return kind.from_numpy(result, out_code, packed)
    packed = kind.dense(packed)
    out = kind.empty((bags, dim), out_code, packed)
    ptr = kind.ptr
    bad = kind.kernels.bag_packed(
        ptr(ids), id_code, ids.shape[0] if offsets is not None else bags * length,
        None if offsets is None else ptr(offsets), include_last_offset, bags, length, padding, mode_code,
        ptr(packed), KINDS[packed_kind], rows, dim, at.group, at.row_bytes,
        None if weights is None else ptr(weights), ptr(out), out_code, *kind.launch(packed),
    )  # fmt: skip
    if bad != -1:
        _explain(kind, ids, offsets, rows, include_last_offset)
    return out


def _bag_packed_weight_grad(
    kind, grad, packed, ids, offsets=None, dim=0, packed_kind="int8", group=None, padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """Gradient of the weights, the shape of ids, float32."""
    _same(kind, grad, "grad", ids, offsets)
    _checks.same_kind(kind, packed, "packed", grad, "grad")
    at, bags, length = _checked(
        kind, packed, ids, offsets, None, dim, packed_kind, group, include_last_offset
    )
    grad_code = _checks.dtype(kind, grad, "grad", (*FLOATS, F64))
    if tuple(grad.shape) != (bags, dim):
        raise ValueError(f"grad has shape {tuple(grad.shape)}; it must be ({bags}, {dim})")
    rows = packed.shape[0]
    padding = _padding(padding_idx, rows)
    ids, offsets, id_code = _ids(kind, ids, offsets)
    if grad_code == F64:
        grad, grad_code = kind.cast(grad, F32), F32
    grad = kind.dense(grad)
    no_module(kind, "bag_packed_weight_grad")
    if kind.kernels is None:
        result = reference.bag_packed_weight_grad(
            *_to_numpy(kind, grad, packed, ids, offsets), dim=dim, kind=packed_kind, group=at.group,
            padding_idx=padding_idx, include_last_offset=include_last_offset,
        )  # fmt: skip
        return kind.from_numpy(result, F32, grad)
    packed = kind.dense(packed)
    result = kind.empty(tuple(ids.shape), F32, grad)
    ptr = kind.ptr
    bad = kind.kernels.bag_packed_weight_grad(
        ptr(ids), id_code, ids.shape[0] if offsets is not None else bags * length,
        None if offsets is None else ptr(offsets), include_last_offset, bags, length, padding,
        ptr(packed), KINDS[packed_kind], rows, dim, at.group, at.row_bytes, ptr(grad), grad_code, ptr(result),
        *kind.launch(grad),
    )  # fmt: skip
    if bad != -1:
        _explain(kind, ids, offsets, rows, include_last_offset)
    return result
