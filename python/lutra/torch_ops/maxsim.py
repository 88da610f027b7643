"""``torch.ops.lutra`` for `lutra.scan.maxsim`."""

from __future__ import annotations

import torch

from ..scan._maxsim_run import _maxsim, _maxsim_backward, _maxsim_topk
from .library import gradient, register

ops = torch.ops.lutra


def _wide(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _fake(
    queries, query_ptr, docs, doc_ptr, candidates=None, doc_scale=None, doc_mask=None, query_mask=None,
    centroid_ids=None, centroids=None, values=None, unit=False, want_argmax=False,
):  # fmt: skip
    columns = doc_ptr.shape[0] - 1 if candidates is None else candidates.shape[1]
    argmax = (columns, queries.shape[0]) if want_argmax else (0,)
    return (
        queries.new_empty((query_ptr.shape[0] - 1, columns), dtype=_wide(queries)),
        queries.new_empty(argmax, dtype=torch.int32),
    )


def _fake_topk(
    queries, query_ptr, docs, doc_ptr, candidates=None, doc_scale=None, doc_mask=None, query_mask=None,
    centroid_ids=None, centroids=None, values=None, k=10, unit=False,
):  # fmt: skip
    shape = (query_ptr.shape[0] - 1, k)
    return queries.new_empty(shape, dtype=_wide(queries)), queries.new_empty(shape, dtype=torch.int64)


def _fake_backward(
    grad, queries, query_ptr, docs, doc_ptr, candidates, argmax, need_queries=True, need_docs=True
):
    wide = _wide(queries)
    return (
        grad.new_empty(queries.shape if need_queries else (0,), dtype=wide),
        grad.new_empty(docs.shape if need_docs else (0,), dtype=wide),
    )


def _setup(ctx, inputs, output):
    *tensors, ctx.unit, ctx.kept = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad, _):
    *inputs, argmax = ctx.saved_tensors
    q, q_ptr, x, x_ptr, candidates, scale, _, _, ids, centroids, values = inputs
    need_q, need_x = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    for place, name in ((5, "doc_scale"), (9, "centroids"), (10, "values")):
        if ctx.needs_input_grad[place]:
            raise NotImplementedError(f"{name} of maxsim has no gradient; queries and float docs have one")
    if not ctx.kept:
        argmax = ops.maxsim(*inputs, ctx.unit, True)[1]
    if ids is not None:
        from ..scan._maxsim_composed import decode

        x = decode(x, ids, centroids, values, ctx.unit)
    elif not x.dtype.is_floating_point:
        x = x.float() if scale is None else x.float() * scale[:, None]
    to_q, to_x = ops.maxsim_backward(grad, q, q_ptr, x, x_ptr, candidates, argmax, need_q, need_x)
    grads = [None] * 13
    grads[0] = to_q.to(q.dtype) if need_q else None
    grads[2] = to_x.to(x.dtype) if need_x else None
    return tuple(grads)


_ARRAYS = (
    "Tensor queries, Tensor query_ptr, Tensor docs, Tensor doc_ptr, Tensor? candidates=None, "
    "Tensor? doc_scale=None, Tensor? doc_mask=None, Tensor? query_mask=None, Tensor? centroid_ids=None, "
    "Tensor? centroids=None, Tensor? values=None"
)
register(f"maxsim({_ARRAYS}, bool unit=False, bool want_argmax=False) -> (Tensor, Tensor)", _maxsim, _fake)
register(f"maxsim_topk({_ARRAYS}, int k=10, bool unit=False) -> (Tensor, Tensor)", _maxsim_topk, _fake_topk)
register(
    "maxsim_backward(Tensor grad, Tensor queries, Tensor query_ptr, Tensor docs, Tensor doc_ptr, "
    "Tensor? candidates, Tensor argmax, bool need_queries=True, bool need_docs=True) -> (Tensor, Tensor)",
    _maxsim_backward,
    _fake_backward,
)
gradient("maxsim", _backward, _setup)
