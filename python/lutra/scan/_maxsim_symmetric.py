"""maxsim: the documents' side of symmetric scores, and the best of scores that are there."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arrays import is_torch
from .._ranges import ranges
from .._results import Neighbors
from ..reference import maxsim as reference
from ._maxsim import _counts, _mean, _scores


def other_way(arrays: tuple[Any, ...], unit: bool, normalize: bool) -> Any:
    """The sum over a document's tokens of their best match in the query: maxsim with the parts exchanged."""
    q, q_ptr, x, x_ptr, candidates, scale, x_mask, q_mask, *codes = arrays
    if candidates is None:
        x = _floats(x, scale, codes, unit, q)
        sums = _scores((x, x_ptr, q, q_ptr, None, None, q_mask, x_mask, None, None, None), False).T
        return _mean(sums, _counts(x_ptr, x_mask)[None]) if normalize else sums
    cand, ptr = _numpy(candidates).astype(np.int64), _numpy(x_ptr)
    reference.check_candidates(cand, len(ptr) - 1)
    used, flat = np.unique(cand, return_inverse=True)
    flat, used = flat.reshape(-1) - np.count_nonzero(used < 0), used[used >= 0]
    begin, lengths = ptr[used], ptr[used + 1] - ptr[used]
    new = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = ranges(begin, lengths)
    # The queries of each document that is used, side by side.
    pairs = np.argsort(flat, kind="stable")
    pairs = pairs[flat[pairs] >= 0]
    document = flat[pairs]
    counts = np.bincount(document, minlength=len(used))
    place = ranges(0, counts)
    queries = np.full((len(used), counts.max(initial=0)), -1, np.int64)
    queries[document, place] = pairs // max(1, cand.shape[1])
    rows, new, queries, document, place, pairs = (
        _like(a, q) for a in (rows, new, queries, document, place, pairs)
    )
    scale, x_mask = (None if a is None else a[rows] for a in (scale, x_mask))
    codes = [None, None, None] if codes[0] is None else [codes[0][rows], *codes[1:]]
    x = _floats(x[rows], scale, codes, unit, q)
    sums = _scores((x, new, q, q_ptr, queries, None, q_mask, x_mask, None, None, None), False)
    if normalize:
        sums = _mean(sums, _counts(new, x_mask)[:, None])
    found = sums[document, place]
    if is_torch(found):
        import torch

        out = found.new_zeros(cand.size).index_put((pairs,), found)
        return torch.reshape(out, cand.shape)
    out = np.zeros(cand.size, found.dtype)
    out[pairs] = found
    return out.reshape(cand.shape)


def _floats(x, scale, codes, unit, q):
    """Documents as numbers that can be queries."""
    if codes[0] is not None:
        if is_torch(x):
            from ._maxsim_composed import decode

            return decode(x, codes[0], codes[1], codes[2], unit)
        return reference.decode_residual(x, codes[0], codes[1], codes[2], unit)
    whole = "int8" in str(x.dtype)
    if not whole or (scale is None and "int8" in str(q.dtype)):
        return x
    x = x.float() if is_torch(x) else x.astype(np.float32)
    return x if scale is None else x * scale[:, None]


def _numpy(a):
    return a.detach().cpu().numpy() if is_torch(a) else np.asarray(a)


def _like(a, q):
    if is_torch(q):
        import torch

        return torch.from_numpy(np.ascontiguousarray(a)).to(q.device)
    return a


def select(scores: Any, k: int, candidates: Any = None) -> Neighbors:
    """The k best of each row, equal ones by increasing id; a candidate that is named twice counts once."""
    if not is_torch(scores):
        return Neighbors(*reference.top(scores, k, candidates))
    import torch

    if candidates is None:
        ids = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    else:
        ids, order = torch.sort(candidates.to(torch.int64), dim=1, stable=True)
        scores = scores.gather(1, order)
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
        ids = ids.masked_fill(repeated, -1)
    key = scores.detach().masked_fill(ids < 0, -torch.inf)
    order = torch.sort(key, dim=1, descending=True, stable=True).indices
    absent = (ids < 0).gather(1, order)
    order = order.gather(1, torch.sort(absent.to(torch.uint8), dim=1, stable=True).indices)[:, :k]
    ids = ids.gather(1, order)
    scores = scores.gather(1, order).masked_fill(ids < 0, -torch.inf)
    missing = k - ids.shape[1]
    if missing > 0:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    return Neighbors(scores, ids)
