"""Reference of `lutra.nn.memory_attention`."""

from __future__ import annotations

import numpy as np

from . import scan


def memory_attention(
    query, key, value, memory_keys, memory_values, *, top_k=32, metric="cosine", similarity_threshold=None,
    attn_mask=None, is_causal=False, scale=None,
):  # fmt: skip
    """Attention of query tokens to local keys and to the top_k memories of each, in one softmax.

    query (B, H, T, d); key, value (B, Hk, S, d) and (B, Hk, S, dv); memory_keys, memory_values (Hm, n, d) and
    (Hm, n, dv): H is a multiple of Hk and of Hm, and consecutive query heads share a head of the others.
    Memories are chosen by ``metric``, equal ones in the order of their numbers; those whose similarity is not
    above the threshold take no part, nor do those with id -1. ``attn_mask`` (bool: True takes part, else
    added to the logits) and ``is_causal`` (query t sees keys 0 to t) are for the local keys only. A query
    that sees nothing gives zeros.

    Returns out (B, H, T, dv), weights of the local keys (B, H, T, S), of the memories (B, H, T, k) and ids of
    these, k = min(top_k, n).
    """
    batch, heads, tokens, d = query.shape
    length, scale = key.shape[2], d**-0.5 if scale is None else scale
    k = min(top_k, memory_keys.shape[1])
    wide = np.result_type(query, np.float32)
    out = np.zeros((batch, heads, tokens, value.shape[-1]), wide)
    local, memory = np.zeros((batch, heads, tokens, length), wide), np.zeros((batch, heads, tokens, k), wide)
    ids = np.full((batch, heads, tokens, k), -1, np.int64)
    seen = np.tril(np.ones((tokens, length), bool)) if is_causal else np.ones((tokens, length), bool)
    bias = np.where(seen, 0.0, -np.inf)
    if attn_mask is not None:
        bias = bias + (np.where(attn_mask, 0.0, -np.inf) if attn_mask.dtype == bool else attn_mask)
    bias = np.broadcast_to(bias, local.shape)
    for b, h in np.ndindex(batch, heads):
        q, at = query[b, h], h * key.shape[1] // heads
        where = h * memory_keys.shape[0] // heads
        rows, kept = memory_keys[where], memory_values[where]
        logits = [scale * (q @ key[b, at].T) + bias[b, h]]
        if k:
            similarity, ids[b, h] = scan.knn(q, rows, k, metric)
            chosen = scale * np.einsum("td,tkd->tk", q, rows[ids[b, h]])
            hidden = ids[b, h] < 0
            if similarity_threshold is not None:
                hidden |= ~(similarity > similarity_threshold)
            logits.append(np.where(hidden, -np.inf, chosen))
        both = np.concatenate(logits, 1).astype(wide)
        top = both.max(1, keepdims=True, initial=-np.inf)
        p = np.exp(both - np.where(np.isfinite(top), top, 0))
        total = p.sum(1, keepdims=True)
        p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
        local[b, h], memory[b, h] = p[:, :length], p[:, length:]
        out[b, h] = local[b, h] @ value[b, at]
        if k:
            out[b, h] += np.einsum("tk,tkd->td", memory[b, h], kept[ids[b, h]])
    return out, local, memory, ids
