"""maxsim: scores of late interaction (ColBERT), with the maxima inside the product."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import (
    F32,
    F64,
    FLOATS,
    I8,
    I32,
    I64,
    NAMES,
    U8,
    _adopt,
    _foreign,
    _hand_back,
    call,
    is_torch,
    kind_of,
)  # fmt: skip
from .._results import Neighbors
from ..reference import maxsim as reference
from ._maxsim_tokens import ResidualTokens

_FLOATS = (*FLOATS, F64)
_BAD = ("", "nan", "query_ptr", "doc_ptr", "candidates", "centroid_ids")  # MaxsimBad in csrc/scan/maxsim.h


def maxsim(
    queries: Any,
    query_ptr: Any,
    docs: Any,
    doc_ptr: Any,
    *,
    candidates: Any = None,
    k: int | None = None,
    doc_scale: Any = None,
    doc_mask: Any = None,
    query_mask: Any = None,
    symmetric: bool = False,
    normalize: bool = False,
) -> Any:
    """Late interaction: the sum over a query's tokens of their best match in a document (MaxSim, Chamfer).

    Tokens of all queries lie one after another, and so do those of all documents; offsets say whose they are.
    The
    similarities of tokens are never written out.

    Parameters
    ----------
    queries : array, shape (query tokens, d), float32, float16, bfloat16 or float64; int8 where docs are int8
        Normalise tokens first where cosines are wanted.
    query_ptr : array, shape (nq + 1,), int64 or int32
        Tokens ``query_ptr[i] : query_ptr[i + 1]`` are those of query i. Begins with 0, does not fall, ends
        with the
        number of tokens.
    docs : array, shape (document tokens, d), float32, float16, bfloat16, int8 or float64; or `ResidualTokens`
        float64 goes with float64 queries only.
    doc_ptr : array, shape (documents + 1,), int64 or int32
    candidates : array, shape (nq, c), int64 or int32, optional
        Documents that each query is scored with, in place of all; -1: none, score -inf.
    k : int, optional
        Give the k best documents only.
    doc_scale : array, shape (document tokens,), float32, optional
        Of int8 docs: what each token is multiplied by.
    doc_mask, query_mask : arrays, shape (tokens,), bool, optional
        Tokens that are False do not count.
    symmetric : bool, default False
        Add the sum over the document's tokens of their best match in the query.
    normalize : bool, default False
        Means in place of sums: over the query's tokens, and with ``symmetric`` over the document's.

    Returns
    -------
    scores : array, shape (nq, documents), or (nq, c) with candidates; float32 (float64 for float64)
        With ``k`` instead `Neighbors`: scores and ids (nq, k), best first, equal scores by increasing id,
        padded with
        -inf and -1; a candidate that is named twice counts once.
        A document without tokens scores -inf (maxima start there, not at 0); a query without tokens 0.

    Raises
    ------
    IndexError
        A candidate outside [-1, documents), a centroid id outside [0, centroids).
    TypeError, ValueError
        Types, dtypes or shapes that do not fit; offsets that do not begin with 0, fall, or do not end with
        the number
        of tokens (with candidates only those of the candidates are looked at); a NaN score, of which the
        document is
        named (on CUDA it is NaN).

    See Also
    --------
    maxsim_padded : for padded tensors.

    Notes
    -----
    A score has the same bits whatever the other queries and documents of the call and the number of threads.
    Products
    of float32 are summed in float32; float16 and residual codes are converted as they are read; bfloat16 with
    bfloat16
    is multiplied as it is where the processor has AVX512-BF16. int8 docs with float queries: where the
    processor has
    AVX-512 VNNI the queries are rounded to 16 bits, relative to each token's largest value.

    Gradient (torch): of the scores, to queries and float docs (to queries only where docs are codes); ties go
    to the
    lowest row. Sums are in float32 in a fixed order, the same bits every time. float64 is computed by the
    reference.

    Cost: 2 d flops for each pair of a query token and a document token, twice that with ``symmetric``.

    ColBERT: Khattab and Zaharia, SIGIR 2020 (arXiv 2004.12832). Residual codes: ColBERTv2 (arXiv 2112.01488).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> tokens = np.eye(4, dtype=np.float32)
    >>> lutra.scan.maxsim(tokens[:2], np.array([0, 2]), tokens, np.array([0, 1, 4]))
    array([[1., 1.]], dtype=float32)
    >>> lutra.scan.maxsim(tokens[:1], np.array([0, 1]), tokens, np.array([0, 1, 4]), k=1).ids
    array([[0]])
    """
    given = (queries, query_ptr, docs, doc_ptr, candidates, doc_scale, doc_mask, query_mask)
    parts = [p for a in given for p in (a[:4] if isinstance(a, ResidualTokens) else (a,))]
    if any(_foreign(p) for p in parts):
        like = next(p for p in parts if _foreign(p))
        q, qp, x, xp, cand, scale, xm, qm = (
            ResidualTokens(*map(_adopt, a)) if isinstance(a, ResidualTokens) else _adopt(a) for a in given
        )
        result = maxsim(
            q, qp, x, xp, candidates=cand, k=k, doc_scale=scale, doc_mask=xm, query_mask=qm,
            symmetric=symmetric,
            normalize=normalize,
        )  # fmt: skip
        handed = _hand_back(tuple(result) if k is not None else result, like)
        return Neighbors(*handed) if k is not None else handed
    codes: tuple[Any, ...] = (None, None, None)
    unit = False
    if isinstance(docs, ResidualTokens):
        docs, codes, unit = docs.codes, docs[1:4], bool(docs.normalize)
    elif is_uint8(docs):
        raise TypeError("docs has dtype uint8; residual codes are given as lutra.scan.ResidualTokens")
    arrays = (queries, query_ptr, docs, doc_ptr, candidates, doc_scale, doc_mask, query_mask, *codes)
    if k is not None:
        k = _checks.integer("k", k, 1)
    if k is not None and not symmetric:
        if _records(queries, docs):  # the scores' gradient is that of the candidates that were found
            best = call("maxsim_topk", _maxsim_topk, tuple(map(_detached, arrays)), (k, unit))
            ids = best[1]
            scores = _scores((*arrays[:4], ids, *arrays[5:]), unit)
        else:
            scores, ids = call("maxsim_topk", _maxsim_topk, arrays, (k, unit))
        if normalize:
            scores = _mean(scores, _counts(query_ptr, query_mask)[:, None])
        return Neighbors(scores, ids)
    scores = _scores(arrays, unit)
    if normalize:
        scores = _mean(scores, _counts(query_ptr, query_mask)[:, None])
    if symmetric:
        from ._maxsim_symmetric import other_way

        scores = scores + other_way(arrays, unit, normalize)
    if k is None:
        return scores
    from ._maxsim_symmetric import select

    return select(scores, k, candidates)


def maxsim_padded(
    queries: Any,
    docs: Any,
    query_mask: Any = None,
    doc_mask: Any = None,
    *,
    candidates: Any = None,
    k: int | None = None,
    doc_scale: Any = None,
    symmetric: bool = False,
    normalize: bool = False,
) -> Any:
    """`maxsim` of padded tensors, which are read as they are.

    Parameters
    ----------
    queries : array, shape (nq, query length, d)
    docs : array, shape (documents, document length, d)
        float32, float16, bfloat16, int8 or float64, as for `maxsim`.
    query_mask : array, shape (nq, query length), bool, optional
    doc_mask : array, shape (documents, document length), bool, optional
        False: padding, or a token that does not count.
    doc_scale : array, shape (documents, document length), float32, optional
    candidates, k, symmetric, normalize
        As for `maxsim`.

    Returns
    -------
    As `maxsim`.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> tokens = np.eye(4, dtype=np.float32)
    >>> mask = np.array([[True, False], [True, True]])
    >>> lutra.scan.maxsim_padded(tokens[None, :2], tokens.reshape(2, 2, 4), doc_mask=mask)
    array([[1., 0.]], dtype=float32)
    """
    ptrs = []
    for a, name in ((queries, "queries"), (docs, "docs")):
        if isinstance(a, ResidualTokens):
            raise TypeError("docs are ResidualTokens, which are not padded; give them to lutra.scan.maxsim")
        if not hasattr(a, "shape"):
            kind_of(a, name)  # raises
        _checks.ndim(a, name, 3)
    q, x = _adopt(queries), _adopt(docs)
    for a in (q, x):
        n, length, _ = a.shape
        if is_torch(a):
            import torch

            ptrs.append(torch.arange(n + 1, device=a.device) * length)
        elif isinstance(a, np.ndarray):
            ptrs.append(np.arange(n + 1) * length)
        else:
            ptrs.append(sys.modules["cupy"].arange(n + 1) * length)
    flat = []
    of_queries, of_docs = (queries.shape[:2], "queries"), (docs.shape[:2], "docs")
    for a, name, (shape, of) in (
        (query_mask, "query_mask", of_queries), (doc_mask, "doc_mask", of_docs), (doc_scale, "doc_scale",
        of_docs)
    ):  # fmt: skip
        if a is not None:
            a = _adopt(a)
            if not hasattr(a, "shape"):
                kind_of(a, name)  # raises
            if tuple(a.shape) != tuple(shape):
                raise ValueError(
                    f"{name} has shape {tuple(a.shape)}; it must be {tuple(shape)}, one for each token of "
                    f"{of}"
                )
            a = a.reshape(-1)
        flat.append(a)
    result = maxsim(
        q.reshape(-1, q.shape[2]), ptrs[0], x.reshape(-1, x.shape[2]), ptrs[1], candidates=_adopt(candidates),
        k=k,
        query_mask=flat[0], doc_mask=flat[1], doc_scale=flat[2], symmetric=symmetric, normalize=normalize,
    )  # fmt: skip
    like = next((a for a in (queries, docs) if _foreign(a)), None)
    if like is None:
        return result
    handed = _hand_back(tuple(result) if k is not None else result, like)
    return Neighbors(*handed) if k is not None else handed


# ---------------------------------------------------------------- what the public functions are made of
def is_uint8(a):
    return hasattr(a, "dtype") and str(a.dtype).removeprefix("torch.") == "uint8"


def _records(*arrays):
    """Whether torch records a gradient for one of them."""
    if not any(is_torch(a) for a in arrays):
        return False
    import torch

    return torch.is_grad_enabled() and any(is_torch(a) and a.requires_grad for a in arrays)


def _detached(a):
    return a.detach() if is_torch(a) else a


def _scores(arrays, unit):
    return call("maxsim", _maxsim, arrays, (unit, _records(*arrays)))[0]


def _counts(ptr, mask):
    """Tokens that count, of each query or document."""
    if mask is None:
        return ptr[1:] - ptr[:-1]
    if is_torch(mask):
        import torch

        before = torch.nn.functional.pad(mask.to(torch.int64).cumsum(0), (1, 0))
    else:
        before = (np if isinstance(mask, np.ndarray) else sys.modules["cupy"]).concatenate(
            [np.zeros(1, np.int64), mask.astype(np.int64).cumsum()]
        )
    return before[ptr[1:]] - before[ptr[:-1]]


def _mean(sums, counts):
    """Sums over counts; a sum of nothing stays what it is."""
    if is_torch(sums):
        return sums / counts.clamp_min(1).to(sums.dtype)
    return sums / counts.clip(1).astype(sums.dtype)


# ---------------------------------------------------------------- checks
class _Call:
    """Checked arrays of a call."""

    def __init__(
        self, kind, queries, query_ptr, docs, doc_ptr, candidates, doc_scale, doc_mask, query_mask, codes
    ):
        named = {
            "query_ptr": query_ptr, "docs": docs, "doc_ptr": doc_ptr, "candidates": candidates,
            "doc_scale": doc_scale,
            "doc_mask": doc_mask, "query_mask": query_mask, "centroid_ids": codes[0], "centroids": codes[1],
            "values": codes[2],
        }  # fmt: skip
        for name, a in named.items():
            if a is not None:
                _checks.same_kind(kind, a, name, queries, "queries")
        self.kind, self.coded = kind, codes[0] is not None
        _checks.ndim(queries, "queries", 2)
        _checks.ndim(docs, "docs", 2)
        self.q_code = _checks.dtype(kind, queries, "queries", (*_FLOATS, I8))
        self.x_code = _checks.dtype(kind, docs, "docs", (U8,) if self.coded else (*_FLOATS, I8))
        if (self.q_code == F64) != (self.x_code == F64) or (self.q_code == I8 and self.x_code != I8):
            raise TypeError(
                f"docs has dtype {NAMES[self.x_code]}, queries has {NAMES[self.q_code]}; "
                "float64 goes with float64, and int8 queries with int8 docs"
            )
        self.d = queries.shape[1]
        self.bits = 0
        if self.coded:
            self._check_codes(docs, *codes)
        elif docs.shape[1] != self.d:
            raise ValueError(
                f"docs has {docs.shape[1]} columns, queries has {self.d}; tokens must be of one width"
            )
        self.q, self.x, self.codes = queries, docs, codes
        self.q_ptr = self._ptr(query_ptr, "query_ptr", queries, "queries")
        self.x_ptr = self._ptr(doc_ptr, "doc_ptr", docs, "docs")
        self.nq, self.documents = query_ptr.shape[0] - 1, doc_ptr.shape[0] - 1
        self.q_mask = self._mask(query_mask, "query_mask", queries, "queries")
        self.x_mask = self._mask(doc_mask, "doc_mask", docs, "docs")
        self.scale = doc_scale
        if doc_scale is not None:
            if self.x_code != I8:
                raise ValueError(f"doc_scale goes with int8 docs, docs is {NAMES[self.x_code]}")
            _checks.dtype(kind, doc_scale, "doc_scale", (F32,))
            self._shape(doc_scale, "doc_scale", docs, "docs")
            self.scale = kind.dense(doc_scale)
        self.cand = candidates
        if candidates is not None:
            _checks.ndim(candidates, "candidates", 2)
            if _checks.dtype(kind, candidates, "candidates", (I32, I64)) == I32:
                candidates = kind.cast(candidates, I64)
            if candidates.shape[0] != self.nq:
                raise ValueError(
                    f"candidates has {candidates.shape[0]} rows; it must have {self.nq}, one for each query"
                )
            self.cand = kind.dense(candidates)
        self.columns = self.documents if candidates is None else candidates.shape[1]

    def _check_codes(self, codes, ids, centroids, values):
        kind = self.kind
        _checks.ndim(centroids, "centroids", 2)
        _checks.ndim(values, "values", 1)
        for a, name, code in (
            (ids, "centroid_ids", I32),
            (centroids, "centroids", F32),
            (values, "values", F32),
        ):
            _checks.dtype(kind, a, name, (code,))
        self._shape(ids, "centroid_ids", codes, "codes")
        if centroids.shape[1] != self.d:
            raise ValueError(
                f"centroids has {centroids.shape[1]} columns, queries has {self.d}; tokens must be of one "
                f"width"
            )
        if values.shape[0] not in (2, 4, 16, 256):
            raise ValueError(
                f"values has {values.shape[0]} entries; it must have 2, 4, 16 or 256 (1, 2, 4, 8 bits)"
            )
        self.bits = {2: 1, 4: 2, 16: 4, 256: 8}[values.shape[0]]
        width = (self.d * self.bits + 7) // 8
        if codes.shape[1] != width:
            raise ValueError(
                f"codes has {codes.shape[1]} columns; it must have {width}, {self.d} dimensions of "
                f"{self.bits} bits"
            )

    def _ptr(self, ptr, name, rows, of):
        kind = self.kind
        _checks.ndim(ptr, name, 1)
        if _checks.dtype(kind, ptr, name, (I32, I64)) == I32:
            ptr = kind.cast(ptr, I64)
        if ptr.shape[0] == 0:
            raise ValueError(f"{name} is empty; it must begin with 0 and end with the number of rows of {of}")
        if not kind.cuda and (int(ptr[0]) != 0 or int(ptr[-1]) != rows.shape[0]):
            reference.check_ptr(name, kind.to_numpy(ptr), rows.shape[0], of)
        return kind.dense(ptr)

    def _shape(self, a, name, rows, of):
        if tuple(a.shape) != (rows.shape[0],):
            raise ValueError(
                f"{name} has shape {tuple(a.shape)}; it must be ({rows.shape[0]},), one for each row of {of}"
            )

    def _mask(self, mask, name, rows, of):
        if mask is None:
            return None
        dtype = str(mask.dtype).removeprefix("torch.")
        if dtype not in ("bool", "uint8"):
            raise TypeError(f"{name} has dtype {dtype}; it must be bool")
        self._shape(mask, name, rows, of)
        mask = self.kind.dense(mask)
        if dtype == "uint8":
            return mask
        return mask.view(self.kind._dtypes[U8])

    @property
    def wide(self):
        return F64 if self.q_code == F64 else F32

    def numpy(self):
        """Arguments of the reference."""
        to = self.kind.to_numpy
        q, x = to(self.q), to(self.x)
        if self.coded:
            ids, centroids, values = (to(a) for a in self.codes)
            x = reference.decode_residual(x, ids, centroids, values, self.unit)
        optional = [None if a is None else to(a) for a in (self.cand, self.scale, self.x_mask, self.q_mask)]
        return q, to(self.q_ptr), x, to(self.x_ptr), *optional

    unit = False


def _rows(kind, a):
    """A matrix whose rows lie anywhere but are dense themselves, and the distance of two rows."""
    if kind.name == "torch" and a.ndim == 2 and a.stride(1) == 1 and a.stride(0) >= a.shape[1]:
        return a, a.stride(0)
    a = kind.dense(a)
    return a, a.shape[1]


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
    (q, ldq), (x, ldx) = _rows(kind, c.q), _rows(kind, c.x)
    codes: list[Any] = [None if a is None else kind.dense(a) for a in c.codes]
    bad, place = kind.kernels.maxsim(
        ptr(q), c.q_code, ldq, ptr(c.q_ptr), ptr(c.q_mask), nq, q_rows, ptr(x), c.x_code, ldx, ptr(c.x_ptr),
        ptr(c.x_mask), ptr(c.scale), c.documents, x.shape[0], c.d, ptr(codes[0]), ptr(codes[1]),
        ptr(codes[2]),
        codes[1].shape[0] if c.coded else 0, c.bits, c.unit, ptr(c.cand), c.columns, k, ptr(scores), ptr(ids),
        ptr(argmax), *kind.launch(c.q),
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
    c = _Call(kind, queries, query_ptr, docs, doc_ptr, candidates, doc_scale, doc_mask, query_mask, codes)
    c.unit = unit
    argmax = None
    if c.cand is not None and c.columns * c.nq == 0:
        scores = _filled(c, 0)[0]
        argmax = kind.empty((c.columns, c.q.shape[0]), I32, c.q)
    elif _kernel(c):
        scores, argmax = _run(c, 0, want_argmax)
    elif kind.cuda:
        from ._maxsim_composed import composed

        scores, argmax = composed(c)
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
    c = _Call(kind, queries, query_ptr, docs, doc_ptr, candidates, doc_scale, doc_mask, query_mask, codes)
    c.unit = unit
    if c.columns * c.nq == 0:
        return _filled(c, k)
    if _kernel(c):
        return _run(c, k, False)
    if kind.cuda:
        from ._maxsim_composed import composed
        from ._maxsim_symmetric import select

        return tuple(select(composed(c)[0], k, c.cand))
    scores, _ = reference.maxsim(*c.numpy())
    scores, ids = reference.top(scores, k, None if c.cand is None else kind.to_numpy(c.cand))
    return kind.from_numpy(scores, c.wide, c.q), kind.from_numpy(ids, I64, c.q)


def _maxsim_backward(
    kind, grad, queries, query_ptr, docs, doc_ptr, candidates, argmax, need_queries=True, need_docs=True
):
    """Gradients to queries and docs in float32 (float64); of what is not needed, an empty array."""
    codes = (None, None, None)
    c = _Call(kind, queries, query_ptr, docs, doc_ptr, candidates, None, None, None, codes)
    q_rows, x_rows, columns = queries.shape[0], docs.shape[0], c.columns
    if tuple(grad.shape) != (c.nq, columns) or tuple(argmax.shape) != (columns, q_rows):
        raise ValueError(
            f"grad has shape {tuple(grad.shape)} and argmax {tuple(argmax.shape)}; "
            f"they must be {(c.nq, columns)} and {(columns, q_rows)}"
        )
    nothing = kind.empty((0,), c.wide, queries)
    if not _kernel(c) or kind.cuda:
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
    (q, ldq), (x, ldx) = _rows(kind, queries), _rows(kind, docs)
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
        kind.ptr(to_q) if need_queries else None, kind.ptr(to_x) if need_docs else None,
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
