"""maxsim: scores of late interaction (ColBERT), with the maxima inside the product."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import _adopt, _foreign, _hand_back, _is_cupy, call, is_torch, kind_of
from .._results import Neighbors
from ._maxsim_run import _maxsim, _maxsim_topk
from ._maxsim_tokens import ResidualTokens


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
    The similarities of tokens are never written out.

    Parameters
    ----------
    queries : array, shape (query tokens, d), float32, float16, bfloat16 or float64; int8 where docs are int8
        Normalise tokens first where cosines are wanted.
    query_ptr : array, shape (nq + 1,), int64 or int32
        Tokens ``query_ptr[i] : query_ptr[i + 1]`` are those of query i. Begins with 0, does not fall, ends
        with the number of tokens.
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
        padded with -inf and -1; a candidate that is named twice counts once. A document without tokens scores
        -inf (maxima start there, not at 0); a query without tokens 0.

    Raises
    ------
    IndexError
        A candidate outside [-1, documents), a centroid id outside [0, centroids).
    TypeError, ValueError
        Types, dtypes or shapes that do not fit; offsets that do not begin with 0, fall, or do not end with
        the number of tokens (with candidates only those of the candidates are looked at); a NaN score, of
        which the document is named (on CUDA it is NaN).

    See Also
    --------
    maxsim_padded : for padded tensors.

    Notes
    -----
    A score has the same bits whatever the other queries and documents of the call and the number of threads.
    Products of float32 are summed in float32; float16 and residual codes are converted as they are read;
    bfloat16 with bfloat16 is multiplied as it is where the processor has AVX512-BF16. int8 docs with float
    queries: where the processor has AVX-512 VNNI the queries are rounded to 16 bits, relative to each token's
    largest value.

    On CUDA tensor cores compute: float16 with float16, bfloat16 with bfloat16 and int8 with int8 as they are,
    float queries with int8 docs in 16 bits of each token's largest value (d to 128), other types and residual
    codes as sums of three bfloat16 terms, six products each, which is as close as float32 (d to 256); beyond
    these d, and where a score came out as NaN, float32 multiply-adds. Candidates and centroids out of range
    give NaN. CuPy arrays: no ``symmetric`` with candidates, k or residual codes (a TypeError).

    Gradient (torch): of the scores, to queries and float docs (to queries only where docs are codes); ties go
    to the lowest row. Sums are in float32 in a fixed order, the same bits every time. float64 is computed by
    the reference.

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
    if symmetric and _is_cupy(queries) and any(a is not None for a in (k, candidates, codes[0])):
        raise TypeError(
            "symmetric=True with candidates, k or ResidualTokens is not there for CuPy arrays; "
            "torch tensors have it on the GPU too"
        )
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
            with a.device:
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
        xp = np if isinstance(mask, np.ndarray) else sys.modules["cupy"]
        before = xp.concatenate([xp.zeros(1, np.int64), mask.astype(np.int64).cumsum()])
    return before[ptr[1:]] - before[ptr[:-1]]


def _mean(sums, counts):
    """Sums over counts; a sum of nothing stays what it is."""
    if is_torch(sums):
        return sums / counts.clamp_min(1).to(sums.dtype)
    return sums / counts.clip(1).astype(sums.dtype)
