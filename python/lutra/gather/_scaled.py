"""Gradients of bags of scaled rows, ``row(x) = scale[x] * table[x mod n]``: all from one sort of the ids."""

from __future__ import annotations

from .. import _checks
from .._arrays import F32, FLOATS, I64
from . import _bag, _plan, _spread


def _scaled_rows_backward(
    kind, grad, table, scale, ids, offsets=None, weights=None, mode="sum", padding_idx=None,
    include_last_offset=False, need_table=True, need_scale=True, need_weights=False,
):  # fmt: skip
    """Gradients of table (n, dim), scale (rows, 1) and weights (as ids, float32), empty if not needed.

    Of a `bag_pieces` of kind 'modulo' with piece weights; see csrc/gather/scaled_rows.h.
    """
    if kind.kernels is None or kind.cuda:
        raise NotImplementedError(
            "the operator lutra::scaled_rows_backward is for the CPU where lutra is compiled; "
            "lutra.gather.bag_pieces composes torch's ops elsewhere"
        )
    code = _checks.dtype(kind, grad, "grad", FLOATS)
    for a, name in ((table, "table"), (scale, "scale")):
        _checks.dtype(kind, a, name, (code,))
    (n, dim), rows = table.shape, scale.shape[0]
    bags, length = _bag._layout(ids, offsets, include_last_offset)
    if tuple(grad.shape) != (bags, dim) or tuple(scale.shape) != (rows, 1):
        raise ValueError(
            f"grad and scale have shapes {tuple(grad.shape)} and {tuple(scale.shape)}; "
            f"they must be ({bags}, {dim}) and (rows, 1)"
        )
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    weights = None if weights is None else _bag._weights(kind, weights, ids, mode, F32)
    grad, table, scale = kind.dense(grad), kind.dense(table), kind.dense(scale)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    keys, key_code, key_padding, per = ids, id_code, padding, -(-rows // max(n, 1))
    if per > 1:
        keys, key_code = kind.empty(tuple(ids.shape), I64, grad), I64
        kind.kernels.scaled_keys(kind.ptr(ids), id_code, n_ids, rows, n, kind.ptr(keys))
        key_padding = -1 if padding < 0 else padding % n * per + padding // n
        offsets = None if offsets is None else kind.cast(offsets, I64)
    plan = _plan.sort_ids(
        kind, keys, key_code, offsets, bags, length, key_padding, mode, n * per if per > 1 else rows,
        include_last_offset, lambda: _bag._explain(kind, ids, offsets, rows, include_last_offset),
    )  # fmt: skip
    empty, none = _spread.empty, kind.empty((0,), code, grad)
    to_table = empty(kind, (n, dim), code, grad) if need_table else none
    to_scale = empty(kind, (rows, 1), code, grad) if need_scale else none
    to_weights = kind.empty(tuple(ids.shape) if need_weights else (0,), F32, grad)
    ptr, optional = kind.ptr, _bag._ptr
    if n:
        kind.kernels.scaled_grads(
            rows, n, dim, n_ids, bags, ptr(plan.order), ptr(plan.starts), ptr(plan.touched),
            ptr(plan.bag_of), optional(kind, plan.bag_scale), ptr(plan.count), optional(kind, weights),
            ptr(table), ptr(scale), ptr(grad), code, ptr(to_table) if need_table else None,
            ptr(to_scale) if need_scale else None, ptr(to_weights) if need_weights else None,
        )  # fmt: skip
    return to_table, to_scale, to_weights
