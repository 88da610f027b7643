"""memory_attention: attention to local keys and to memories of a bank, in one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ..gather import bag, row_dots
from ..torch_ops import ops, plain
from ._autocast import autocasts
from ._memory_bank import MemoryBank

Banks = MemoryBank | Sequence["MemoryBank | None"]


class MemoryWeights(NamedTuple):
    """What each query attended to; each row of ``local`` and ``memory`` together sums to 1.

    Attributes
    ----------
    local : Tensor, shape (..., heads, tokens, keys)
        Weights of the local keys.
    memory : Tensor, shape (..., heads, tokens, k)
        Weights of the memories.
    ids : Tensor, int64, shape (..., heads, tokens, k)
        Their numbers in the bank, -1 where there is none.
    """

    local: Tensor
    memory: Tensor
    ids: Tensor


class _Found(NamedTuple):
    """The memories of a part of the batch, (batch, heads, tokens, k)."""

    bank: MemoryBank
    rows: Tensor  # of the bank's tables, (bank heads * queries, k)
    logits: Tensor
    ids: Tensor
    visible: Tensor | None


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bank: Banks | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    top_k: int = 32,
    similarity_threshold: float | None = None,
    return_weights: bool = False,
) -> Any:
    """Scaled dot product attention to local keys and to the nearest memories of each query.

    As ``torch.nn.functional.scaled_dot_product_attention``, whose arguments come first, with for each query
    token and head the ``top_k`` memories of a bank whose keys are nearest to the query, in the same softmax::

        M = top_k of similarity(query, bank.keys)
        softmax(scale * query @ [bank.keys[M], key].T) @ [bank.values[M], value]

    Parameters
    ----------
    query : Tensor, shape (batch, heads, tokens, d) or (heads, tokens, d)
    key, value : Tensor, shape (..., kv heads, keys, d) and (..., kv heads, keys, dv)
    bank : MemoryBank, or a sequence of them, or None
        One for all items of the batch, or one each (None: no memories). Its heads divide the query's: as with
        grouped queries, consecutive query heads share a head of the bank.
    attn_mask : Tensor, optional
        For the local keys: bools (True takes part) or what is added to the logits.
    dropout_p, is_causal, scale, enable_gqa
        As in torch; ``is_causal`` is about the local keys, memories are always seen.
    top_k : int, default 32
        Memories of a query; may exceed those there are.
    similarity_threshold : float, optional
        Memories whose similarity to the query (by the bank's metric) is not above it are left out; 0.25 in
        Extended Mind Transformers. Default: all that were retrieved take part.
    return_weights : bool, default False
        Give the weights, too.

    Returns
    -------
    Tensor, shape (..., heads, tokens, dv), of query's type
        A query that may see nothing at all gives zeros.
    MemoryWeights
        With ``return_weights``; before dropout.

    Raises
    ------
    TypeError, ValueError
        Shapes, types or devices that do not fit; a bank of another width; NaN in a query.

    Notes
    -----
    Gradients flow to query, key and value, and not into the bank; which memories are taken is no
    differentiable choice. Without any memory this is torch's own function (unless weights are asked for).
    Otherwise the logits of the local keys are written, (heads, tokens, keys) in float32; scores of memories
    are not: see `MemoryBank.search`. Under autocast it computes in autocast's type, as torch does.

    References
    ----------
    Klett and Ahle, Extended Mind Transformers, 2024, arXiv 2406.02332. Wu, Rabe, Hutchins and Szegedy,
    Memorizing Transformers, 2022, arXiv 2203.08913 (which has two softmaxes and a learned gate).

    Examples
    --------
    >>> import torch, lutra.nn
    >>> bank = lutra.nn.MemoryBank(2, 8)
    >>> bank.add(torch.randn(2, 100, 8), torch.randn(2, 100, 8))
    >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
    >>> lutra.nn.memory_attention(q, k, v, bank, is_causal=True, top_k=4).shape
    torch.Size([1, 2, 5, 8])
    """
    top_k = _checks.integer("top_k", top_k, 1)
    flat = query.dim() == 3
    if flat:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    banks = _check(query, key, value, bank, attn_mask, is_causal, enable_gqa)
    if autocasts(query.device.type):
        to = torch.get_autocast_dtype(query.device.type)
        query, key, value = (a if a.dtype == torch.float64 else a.to(to) for a in (query, key, value))
    if not return_weights and not any(len(b) for b, _, _ in banks):
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out.squeeze(0) if flat else out
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    local = _local_logits(query, key, attn_mask, is_causal, scale)
    found = [_retrieve(query[i:j], b, min(top_k, len(b)), scale, similarity_threshold) for b, i, j in banks]
    most = max([0, *(f.ids.shape[-1] for f in found)])
    logits = torch.cat([torch.cat([_hide(f, most) for f in found]), local], -1) if most else local
    weights = logits.softmax(-1)
    if attn_mask is not None or any(f.visible is not None for f in found) or not local.shape[-1]:
        weights = weights.masked_fill(logits.isneginf().all(-1, keepdim=True), 0)  # a query that sees nothing
    kept = F.dropout(weights, dropout_p) if dropout_p else weights
    out = _grouped(kept[..., most:].to(value.dtype), value)
    if most:
        begin = 0
        taken = []
        for f in found:
            end = begin + len(f.ids)
            taken.append(_sum(f, kept[begin:end, ..., : f.ids.shape[-1]], value.shape[-1]))
            begin = end
        out = out + torch.cat(taken).to(out.dtype)
    if flat:
        out = out.squeeze(0)
    if not return_weights:
        return out
    ids = local[..., :0].long()
    if most:
        ids = torch.cat([F.pad(f.ids, (0, most - f.ids.shape[-1]), value=-1) for f in found])
    parts = weights[..., most:], weights[..., :most], ids
    return out, MemoryWeights(*(p.squeeze(0) if flat else p for p in parts))


def _check(query, key, value, bank, attn_mask, is_causal, enable_gqa):
    """The banks, each with the items of the batch that it is for."""
    for name, a in (("query", query), ("key", key), ("value", value)):
        if a.dim() != 4 or not a.is_floating_point():
            raise ValueError(
                f"{name} must be a floating point tensor (batch, heads, tokens, width) or without the batch, "
                f"got {a.dtype} with {a.dim()} axes"
            )
    (batch, heads, _, width), kv_heads = query.shape, key.shape[1]
    if key.shape != (batch, kv_heads, key.shape[2], width) or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; "
            "batch and width of query and key, and batch, heads and tokens of key and value must be equal"
        )
    if kv_heads == 0 or heads % kv_heads or (kv_heads != heads and not enable_gqa):
        raise ValueError(
            f"query has {heads} heads, key {kv_heads}; they must be equal, or with enable_gqa a multiple"
        )
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask exclude each other; the mask can hide later keys itself")
    if attn_mask is not None and not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        raise TypeError(f"attn_mask must be of bools or floating point, got {attn_mask.dtype}")
    if bank is None:
        return []
    if isinstance(bank, MemoryBank):
        banks = [(bank, 0, batch)]
    elif isinstance(bank, Sequence) and all(b is None or isinstance(b, MemoryBank) for b in bank):
        if len(bank) != batch:
            raise ValueError(f"bank holds {len(bank)} banks for a batch of {batch}")
        none = next((MemoryBank(b.num_heads, b.head_dim, b.value_dim) for b in bank if b is not None), None)
        if none is None:
            return []
        banks = [(none if b is None else b, i, i + 1) for i, b in enumerate(bank)]
    else:
        raise TypeError(
            f"bank must be a MemoryBank, a sequence of them or None, got {type(bank).__qualname__}"
        )
    for b, _, _ in banks:
        if (b.head_dim, b.value_dim) != (width, value.shape[-1]):
            raise ValueError(
                f"the bank has keys of width {b.head_dim} and values of width {b.value_dim}; query needs "
                f"keys of width {width}, and value has width {value.shape[-1]}"
            )
        if heads % b.num_heads:
            raise ValueError(f"the bank has {b.num_heads} heads, which do not divide the query's {heads}")
        if len(b) and b.device != query.device:
            raise ValueError(f"the bank is on {b.device}, query on {query.device}; bank.to moves it")
    return banks


def _local_logits(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    logits = _grouped(query * scale, key.transpose(2, 3))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if is_causal:
        tokens, keys = logits.shape[-2:]
        later = torch.ones(tokens, keys, dtype=torch.bool, device=logits.device).triu(1)
        return logits.masked_fill(later, -torch.inf)
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` where consecutive heads of a share one of b."""
    heads, tokens = a.shape[1:3]
    if heads == b.shape[1]:
        return a @ b
    out = a.reshape(len(a), b.shape[1], -1, a.shape[3]) @ b
    return out.reshape(len(a), heads, tokens, b.shape[3])


def _by_bank_head(a: Tensor, heads: int) -> Tensor:
    """(batch, heads, tokens, x) as (bank heads, all that share one, x)."""
    return a.unflatten(1, (heads, -1)).transpose(0, 1).reshape(heads, -1, a.shape[3])


def _by_query_head(a: Tensor, batch: int, tokens: int) -> Tensor:
    """The way back."""
    return a.reshape(a.shape[0], batch, -1, tokens, a.shape[-1]).transpose(0, 1).flatten(1, 2)


def _retrieve(query: Tensor, bank: MemoryBank, k: int, scale: float, threshold: float | None) -> _Found:
    batch, heads, tokens, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not k:
        empty = query.new_empty(batch, heads, tokens, 0, dtype=wide)
        return _Found(bank, empty, empty, empty.long(), None)
    grouped = _by_bank_head(query, bank.num_heads)
    if plain(grouped):  # without torch's dispatcher
        ids = bank.search(grouped, k).ids
    else:
        ids = ops.memory_search(grouped.detach(), bank.handle, k)
    table, step = bank.rows("keys")
    at = _rows_of(ids, step)
    dots = _dots(table, at, grouped.flatten(0, 1)).view(ids.shape).to(wide)
    visible = None if bank.index == "exact" else ids >= 0
    if threshold is not None:
        similarity = dots.detach()
        if bank.metric == "cosine":
            norms = bank.norms.gather(1, ids.clamp(min=0).flatten(1)).view(ids.shape)
            over = grouped.detach().to(wide).norm(dim=-1, keepdim=True) * norms
            similarity = torch.where(over > 0, similarity / over, 0)
        above = similarity > threshold
        visible = above if visible is None else visible & above
    back = [None if a is None else _by_query_head(a, batch, tokens) for a in (dots * scale, ids, visible)]
    return _Found(bank, at, *back)


def _rows_of(ids: Tensor, step: int) -> Tensor:
    """Rows of the bank's tables, (bank heads * queries, k)."""
    heads = torch.arange(ids.shape[0], device=ids.device)[:, None, None]
    return (ids.clamp(min=0) + step * heads).flatten(0, 1)


def _hide(found: _Found, most: int) -> Tensor:
    logits = found.logits
    if found.visible is not None:
        logits = logits.masked_fill(~found.visible, -torch.inf)
    return (
        logits if logits.shape[-1] == most else F.pad(logits, (0, most - logits.shape[-1]), value=-torch.inf)
    )


def _dots(table: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    if x.is_cpu:
        return row_dots(table, rows, x)
    return torch.einsum("rkd,rd->rk", table[rows].to(x.dtype), x)


def _sum(found: _Found, weights: Tensor, width: int) -> Tensor:
    """The memories' share of the result, (batch, heads, tokens, dv)."""
    bank, (batch, heads, tokens, k) = found.bank, found.ids.shape
    if not k:
        return weights.new_zeros(batch, heads, tokens, width)
    table, _ = bank.rows("values")  # which grows with the keys: the same rows
    given = _by_bank_head(weights, bank.num_heads).flatten(0, 1)
    if weights.is_cpu:
        out = bag(table, found.rows, weights=given)
    else:
        out = torch.einsum("rkd,rk->rd", table[found.rows].to(given.dtype), given)
    return _by_query_head(out.view(bank.num_heads, -1, out.shape[-1]), batch, tokens)
