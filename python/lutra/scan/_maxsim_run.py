"""maxsim: what is behind the ops: a kernel, the reference, or on CUDA torch's own operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from .._arrays import F32, F64, I32, I64
from ..reference import maxsim as reference
from ._maxsim_call import Call, rows_of

_BAD = ("", "nan", "query_ptr", "doc_ptr", "candidates", "centroid_ids")  # MaxsimBad in csrc/scan/maxsim.h


def _kernel(c):
    """Whether a kernel serves the call."""
    kernels = c.kind.kernels
    return kernels is not None and hasattr(kernels, "maxsim") and c.q_code != F64 and c.d > 0


def _run(c, k, want_argmax):
    kind, ptr = c.kind, lambda a: None if a is None else c.kind.ptr(a)
    nq, q_rows = c.nq, c.q.shape[0]
    if want_argmax and c.x.shape[0] >= 2**31:
        raise ValueError(f"docs has {c.x.shape[0]} rows; gradients need fewer than 2**31")
    scores = kind.empty((nq, k or c.columns), F32, c.q)
    ids = kind.empty((nq, k), I64, c.q) if k else None
    argmax = kind.empty((c.columns, q_rows), I32, c.q) if want_argmax else None
    (q, ldq), (x, ldx) = rows_of(kind, c.q), rows_of(kind, c.x)
    codes: list[Any] = [None if a is None else kind.dense(a) for a in c.codes]
    scratch = kind.scratch("maxsim", c.q, nq, c.columns, k)
    bad, place = kind.kernels.maxsim(
        ptr(q), c.q_code, ldq, ptr(c.q_ptr), ptr(c.q_mask), nq, q_rows, ptr(x), c.x_code, ldx, ptr(c.x_ptr),
        ptr(c.x_mask), ptr(c.scale), c.documents, x.shape[0], c.d, ptr(codes[0]), ptr(codes[1]),
        ptr(codes[2]),
        codes[1].shape[0] if c.coded else 0, c.bits, c.unit, ptr(c.cand), c.columns, k, ptr(scores), ptr(ids),
        ptr(argmax), *kind.launch(c.q, scratch),
    )  # fmt: skip
    if bad:
        _explain(c, _BAD[bad], place)
    return scores, ids if k else argmax


def _explain(c, what, place):
    """The kernel reported bad input: the error that says which."""
    to = c.kind.to_numpy
    if what == "nan":
        raise ValueError(reference.nan_message(place))
    if what in ("query_ptr", "doc_ptr"):
        ptr, rows, of = (c.q_ptr, c.q, "queries") if what == "query_ptr" else (c.x_ptr, c.x, "docs")
        return reference.check_ptr(what, to(ptr), rows.shape[0], of)
    if what == "candidates":
        reference.check_candidates(to(c.cand), c.documents)
    if what == "centroid_ids":
        found, limit = int(to(c.codes[0])[place]), c.codes[1].shape[0]
        raise IndexError(f"centroid_ids[{place}] is {found}; ids must lie in [0, {limit})")
    raise ValueError(f"{what} changed while the kernel ran")


def _on_cuda(c, want_argmax):
    if _kernel(c):
        return _run(c, 0, want_argmax)
    if c.kind.name != "torch":
        _checks.no_kernel(c.kind, "maxsim")
    from ._maxsim_composed import composed

    return composed(c)


def _filled(c, k):
    """Results where there are no candidates at all."""
    kind = c.kind
    shape = (c.nq, k or c.columns)
    wide = np.float64 if c.wide == F64 else np.float32
    scores = kind.from_numpy(np.full(shape, -np.inf, wide), c.wide, c.q)
    return scores, kind.from_numpy(np.full(shape, -1, np.int64), I64, c.q)


def _maxsim(
    kind, queries, query_ptr, docs, doc_ptr, candidates=None, doc_scale=None, doc_mask=None, query_mask=None,
    centroid_ids=None, centroids=None, values=None, unit=False, want_argmax=False,
):  # fmt: skip
    """Scores, and the rows of the maxima (columns, query tokens) or an empty array."""
    codes = (centroid_ids, centroids, values)
    c = Call(kind, queries, query_ptr, docs, doc_ptr, candidates, doc_scale, doc_mask, query_mask, codes)
    c.unit = unit
    argmax = None
    if c.cand is not None and c.columns * c.nq == 0:
        scores = _filled(c, 0)[0]
        argmax = kind.empty((c.columns, c.q.shape[0]), I32, c.q)
    elif kind.cuda:
        scores, argmax = _on_cuda(c, want_argmax)
    elif _kernel(c):
        scores, argmax = _run(c, 0, want_argmax)
    else:
        scores, argmax = reference.maxsim(*c.numpy())
        scores, argmax = kind.from_numpy(scores, c.wide, c.q), kind.from_numpy(argmax, I32, c.q)
    return scores, argmax if want_argmax else kind.empty((0,), I32, c.q)


def _maxsim_topk(
    kind, queries, query_ptr, docs, doc_ptr, candidates=None, doc_scale=None, doc_mask=None, query_mask=None,
    centroid_ids=None, centroids=None, values=None, k=10, unit=False,
):  # fmt: skip
    """Scores and ids of the k best."""
    k = _checks.integer("k", k, 1)
    codes = (centroid_ids, centroids, values)
    c = Call(kind, queries, query_ptr, docs, doc_ptr, candidates, doc_scale, doc_mask, query_mask, codes)
    c.unit = unit
    if c.columns * c.nq == 0:
        return _filled(c, k)
    if kind.cuda and not _kernel(c):
        from ._maxsim_symmetric import select

        if kind.name != "torch":
            _checks.no_kernel(kind, "maxsim")
        return tuple(select(_on_cuda(c, False)[0], k, c.cand))
    if _kernel(c):
        return _run(c, k, False)
    scores, _ = reference.maxsim(*c.numpy())
    scores, ids = reference.top(scores, k, None if c.cand is None else kind.to_numpy(c.cand))
    return kind.from_numpy(scores, c.wide, c.q), kind.from_numpy(ids, I64, c.q)


def _maxsim_backward(
    kind, grad, queries, query_ptr, docs, doc_ptr, candidates, argmax, need_queries=True, need_docs=True
):
    """Gradients to queries and docs in float32 (float64); of what is not needed, an empty array."""
    codes = (None, None, None)
    c = Call(kind, queries, query_ptr, docs, doc_ptr, candidates, None, None, None, codes)
    q_rows, x_rows, columns = queries.shape[0], docs.shape[0], c.columns
    if tuple(grad.shape) != (c.nq, columns) or tuple(argmax.shape) != (columns, q_rows):
        raise ValueError(
            f"grad has shape {tuple(grad.shape)} and argmax {tuple(argmax.shape)}; "
            f"they must be {(c.nq, columns)} and {(columns, q_rows)}"
        )
    nothing = kind.empty((0,), c.wide, queries)
    if not _kernel(c):
        if kind.cuda:
            from ._maxsim_composed import composed_backward

            to_q, to_x = composed_backward(c, grad, argmax)
        else:
            q, qp, x, xp, g, rows = map(kind.to_numpy, (queries, c.q_ptr, docs, c.x_ptr, grad, argmax))
            to_q, to_x = reference.maxsim_backward(g, q, qp, x, xp, None, rows)
            to_q, to_x = (kind.from_numpy(a, c.wide, queries) for a in (to_q, to_x))
        return to_q if need_queries else nothing, to_x if need_docs else nothing
    if kind.code(grad) != F32:
        grad = kind.cast(grad, F32)
    _checks.dtype(kind, argmax, "argmax", (I32,))
    (q, ldq), (x, ldx) = rows_of(kind, queries), rows_of(kind, docs)
    grad, argmax = kind.dense(grad), kind.dense(argmax)  # held until the kernel is done
    order = first = None
    if need_docs and c.cand is not None:
        order, first = _by_document(kind, c.cand, c.documents)
    to_q = kind.empty((q_rows, c.d), F32, q) if need_queries else nothing
    to_x = kind.empty((x_rows, c.d), F32, q) if need_docs else nothing
    good = kind.kernels.maxsim_backward(
        kind.ptr(grad), kind.ptr(q), c.q_code, ldq, kind.ptr(c.q_ptr), c.nq, q_rows, kind.ptr(x),
        c.x_code,
        ldx, kind.ptr(c.x_ptr), c.documents, x_rows, c.d, kind.ptr(argmax), columns,
        None if order is None else kind.ptr(order), None if first is None else kind.ptr(first),
        kind.ptr(to_q) if need_queries else None, kind.ptr(to_x) if need_docs else None, *kind.launch(q),
    )  # fmt: skip
    if not good:
        _explain(c, "query_ptr", 0)
        _explain(c, "doc_ptr", 0)
    return to_q, to_x


def _by_document(kind, cand, documents):
    """Places of candidates in the order of their documents, and where each document's begin."""
    if kind.name == "torch":
        import torch

        found, order = torch.sort(cand.reshape(-1), stable=True)
        first = torch.searchsorted(found, torch.arange(documents + 1, device=cand.device))
        return order, first
    flat = cand.reshape(-1)
    order = np.argsort(flat, kind="stable")
    return order, np.searchsorted(flat[order], np.arange(documents + 1)).astype(np.int64)
