"""``torch.ops.lutra`` for `lutra.scan` and `lutra.address.nearest`."""

from __future__ import annotations

import torch

from ..address._nearest import _nearest
from ..scan._knn import _knn, _rescore
from ..scan._pq import _pq
from ..scan._range import _range_search
from .library import gradient, register


def _results(queries, k):
    nq = queries.shape[0]
    return queries.new_empty((nq, k), dtype=_score_type(queries)), queries.new_empty(
        (nq, k), dtype=torch.int64
    )


def _score_type(queries):
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


def _range_results(queries, database, radius, metric="ip", keep=None):
    found = torch.library.get_ctx().new_dynamic_size()
    integers = {"dtype": torch.int64}
    return (
        queries.new_empty((queries.shape[0] + 1,), **integers),
        queries.new_empty((found,), dtype=_score_type(queries)),
        queries.new_empty((found,), **integers),
    )


# Gradient of the scores: each is a function of one query and one row, known by its id (-1: none).
# With g = grad_scores:  ip      dq = sum_k g x_k,            dx_k = g q
#                        l2      dq = sum_k 2 g (q - x_k),    dx_k = -2 g (q - x_k)
#                        cosine  dq = sum_k g / |q| (x^ - s q^), dx_k = g / |x| (q^ - s x^), 0 at zero
def _pair_gradients(grad, queries, rows, scores, metric):
    """Gradients to queries (nq, d) and to the gathered rows (nq, k, d)."""
    g, q = grad.unsqueeze(-1), queries.unsqueeze(1)
    if metric == "ip":
        return (g * rows).sum(1), g * q
    if metric == "l2":
        to_queries = 2 * g * (q - rows)
        return to_queries.sum(1), -to_queries
    q_norm, x_norm = q.norm(dim=-1, keepdim=True), rows.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(q.dtype).tiny
    g = torch.where((q_norm > 0) & (x_norm > 0), g, 0)
    q_unit, x_unit, s = q / q_norm.clamp_min(tiny), rows / x_norm.clamp_min(tiny), scores.unsqueeze(-1)
    to_queries = (g * (x_unit - s * q_unit) / q_norm.clamp_min(tiny)).sum(1)
    return to_queries, g * (q_unit - s * x_unit) / x_norm.clamp_min(tiny)


def _present(ids, grad, scores):
    """Drop the padding: a place with id -1 has no gradient."""
    here = ids >= 0
    return ids.clamp_min(0), torch.where(here, grad, 0), torch.where(here, scores, 0)


def _exact_setup(ctx, inputs, output):
    ctx.metric = next(i for i in inputs if isinstance(i, str))
    ctx.inputs = len(inputs)
    ctx.save_for_backward(inputs[0], inputs[1], *output)
    ctx.mark_non_differentiable(output[1])


def _exact_backward(ctx, grad, _):
    queries, database, scores, ids = ctx.saved_tensors
    if ctx.metric not in ("ip", "l2", "cosine"):
        raise NotImplementedError(
            f"scores of metric {ctx.metric!r} have no gradient; 'ip', 'l2', 'cosine' have"
        )
    grads = [None] * ctx.inputs
    if database.shape[0] == 0:
        grads[0], grads[1] = torch.zeros_like(queries), torch.zeros_like(database)
        return tuple(grads)
    ids, grad, scores = _present(ids, grad, scores)
    kind = scores.dtype
    to_queries, to_rows = _pair_gradients(grad, queries.to(kind), database[ids].to(kind), scores, ctx.metric)
    grads[0] = to_queries.to(queries.dtype)
    if ctx.needs_input_grad[1]:
        to_database = torch.zeros_like(database, dtype=kind)
        to_database.index_add_(0, ids.flatten(), to_rows.flatten(0, 1))
        grads[1] = to_database.to(database.dtype)
    return tuple(grads)


def _pq_setup(ctx, inputs, output):
    queries, codes, codebooks, _, ctx.metric = inputs
    ctx.save_for_backward(queries, codes, codebooks, *output)
    ctx.mark_non_differentiable(output[1])


def _pq_backward(ctx, grad, _):
    queries, codes, codebooks, scores, ids = ctx.saved_tensors
    m, ksub, dsub = codebooks.shape
    if codes.shape[0] == 0:
        return torch.zeros_like(queries), None, torch.zeros_like(codebooks), None, None
    ids, grad, scores = _present(ids, grad, scores)
    # where each sub-vector of each result lies in the codebooks, taken as (m * ksub, dsub)
    flat = codes[ids].long() + torch.arange(m, device=codes.device) * ksub
    rows = codebooks.reshape(m * ksub, dsub)[flat].flatten(2)
    to_queries, to_rows = _pair_gradients(grad, queries, rows, scores, ctx.metric)
    to_books = torch.zeros_like(codebooks).reshape(m * ksub, dsub)
    to_books = to_books.index_add(0, flat.flatten(), to_rows.reshape(-1, dsub))
    return to_queries, None, to_books.reshape(m, ksub, dsub), None, None


register(
    'knn(Tensor queries, Tensor database, int k=10, str metric="ip", Tensor? keep=None) -> (Tensor, Tensor)',
    _knn,
    lambda queries, database, k=10, metric="ip", keep=None: _results(queries, k),
)
register(
    'range_search(Tensor queries, Tensor database, float radius, str metric="ip", Tensor? keep=None)'
    " -> (Tensor, Tensor, Tensor)",
    _range_search,
    _range_results,
)
register(
    'nearest(Tensor x, Tensor centroids, int k=1, str metric="l2") -> (Tensor, Tensor)',
    _nearest,
    lambda x, centroids, k=1, metric="l2": _results(x, k),
)
register(
    'rescore(Tensor queries, Tensor database, Tensor candidates, int k, str metric="ip") -> (Tensor, Tensor)',
    _rescore,
    lambda queries, database, candidates, k, metric="ip": _results(queries, k),
)
register(
    'pq(Tensor queries, Tensor codes, Tensor codebooks, int k=10, str metric="l2") -> (Tensor, Tensor)',
    _pq,
    lambda queries, codes, codebooks, k=10, metric="l2": _results(queries, k),
)
for name in ("knn", "nearest", "rescore"):
    gradient(name, _exact_backward, _exact_setup)
gradient("pq", _pq_backward, _pq_setup)
