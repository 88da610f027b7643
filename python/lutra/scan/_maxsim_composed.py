"""maxsim in torch's own operations, some documents at a time: for CUDA tensors that no kernel serves."""

from __future__ import annotations

from typing import Any

import torch

#: Similarities that are held at once.
TILE = 1 << 24


def decode(codes, ids, centroids, values, normalize):
    """Residual codes as tokens (n, d)."""
    d = centroids.shape[1]
    bits = (values.shape[0] - 1).bit_length()
    at = torch.arange(d, device=codes.device) * bits
    entries = (codes[:, at >> 3].int() >> (at & 7)) & ((1 << bits) - 1)
    rows = centroids[ids.long()] + values[entries]
    return (
        torch.nn.functional.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny) if normalize else rows
    )


def _pad(ptr, rows, mask, device):
    """Places (n, longest) of tokens, and which are there."""
    lengths = ptr[1:] - ptr[:-1]
    longest = int(lengths.max()) if len(lengths) else 0
    at = torch.arange(longest, device=device)
    here = at < lengths[:, None]
    places = (ptr[:-1, None] + at).clamp_max(max(rows - 1, 0))
    if mask is not None and rows:
        here = here & mask[places].bool()
    return places, here


def composed(c: Any) -> tuple[Any, Any]:
    """Scores and arg-maxima of a checked call (`lutra.scan._maxsim_call.Call`)."""
    wide = torch.float64 if c.q.dtype == torch.float64 else torch.float32
    x = decode(c.x, c.codes[0], c.codes[1], c.codes[2], c.unit) if c.coded else c.x
    device, q_rows, x_rows = c.q.device, c.q.shape[0], x.shape[0]
    q_places, q_here = _pad(c.q_ptr, q_rows, c.q_mask, device)
    x_places, x_here = _pad(c.x_ptr, x_rows, c.x_mask, device)
    longest = x_places.shape[1]
    scores = torch.full((c.nq, c.columns), -torch.inf, dtype=wide, device=device)
    argmax = torch.full((c.columns, q_rows), -1, dtype=torch.int32, device=device)
    q = c.q.to(wide)

    def rows_of(places):
        found = x[places].to(wide)
        return found if c.scale is None else found * c.scale[places].unsqueeze(-1)

    def best_of(similarity, places, here):
        """Over the last dimension; the lowest of equals."""
        similarity = similarity.masked_fill(~here, -torch.inf)
        if similarity.shape[-1] == 0:
            return similarity.new_full(similarity.shape[:-1], -torch.inf), None
        best = similarity.amax(-1, keepdim=True)
        at = ((similarity == best) & here).to(torch.uint8).argmax(-1)
        row = places.expand(similarity.shape).gather(-1, at.unsqueeze(-1)).squeeze(-1)
        return best.squeeze(-1), torch.where(here.any(-1), row, -1).to(torch.int32)

    def of_queries(best):
        """(tokens, columns) to (nq, columns)."""
        if q_rows == 0 or q_places.shape[1] == 0:
            return best.new_zeros((c.nq, best.shape[1]))
        return torch.where(q_here.unsqueeze(-1), best[q_places], 0).sum(1)

    if c.cand is None:
        step = max(1, TILE // max(1, longest * max(1, q_rows)))
        for begin in range(0, c.documents, step):
            part = slice(begin, begin + step)
            places, here = x_places[part], x_here[part]
            similarity = (q @ rows_of(places).reshape(-1, c.d).T).reshape(q_rows, *places.shape)
            best, row = best_of(similarity, places, here)
            scores[:, part] = of_queries(best)
            if row is not None:
                argmax[part] = row.T
    else:
        for i in range(c.nq):
            begin, end = int(c.q_ptr[i]), int(c.q_ptr[i + 1])
            cand = c.cand[i]
            step = max(1, TILE // max(1, longest * max(1, end - begin, c.d)))
            for first in range(0, c.columns, step):
                part = slice(first, first + step)
                ids = cand[part]
                places, here = x_places[ids.clamp_min(0)], x_here[ids.clamp_min(0)] & (ids >= 0)[:, None]
                similarity = torch.einsum("td,cld->tcl", q[begin:end], rows_of(places))
                best, row = best_of(similarity, places, here)
                live = torch.ones(end - begin, dtype=torch.bool, device=device)
                if c.q_mask is not None:
                    live = c.q_mask[begin:end].bool()
                sums = torch.where(live[:, None], best, 0).sum(0)
                scores[i, part] = torch.where(ids >= 0, sums, -torch.inf)
                if row is not None:
                    argmax[part, begin:end] = row.T
    if c.q_mask is not None:
        argmax[:, ~c.q_mask.bool()] = -1
    return scores, argmax


def composed_backward(c: Any, grad: Any, argmax: Any) -> tuple[Any, Any]:
    """Gradients to queries and docs, from the rows of the maxima."""
    wide = torch.float64 if c.q.dtype == torch.float64 else torch.float32
    lengths = c.q_ptr[1:] - c.q_ptr[:-1]
    owner = torch.repeat_interleave(torch.arange(c.nq, device=grad.device), lengths)
    here = argmax >= 0
    weights = torch.where(here, grad.to(wide).T[:, owner], 0)  # (columns, tokens)
    to_q = torch.zeros(c.q.shape, dtype=wide, device=grad.device)
    to_x = torch.zeros(c.x.shape, dtype=wide, device=grad.device)
    q = c.q.to(wide)
    if c.x.shape[0] == 0:
        return to_q, to_x
    step = max(1, TILE // max(1, q.numel()))
    for first in range(0, c.columns, step):
        rows = argmax[first : first + step].long().clamp_min(0)
        w = weights[first : first + step].unsqueeze(-1)
        to_q += (c.x[rows].to(wide) * w).sum(0)
        to_x.index_add_(0, rows.reshape(-1), (w * q).reshape(-1, c.d))
    return to_q, to_x
