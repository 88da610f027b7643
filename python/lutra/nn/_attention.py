"""What a causal language model's attention needs beside its projections: positions, masks, a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_angles(positions: Tensor, dims: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, shape (..., tokens, dims / 2), float32, of positions (..., tokens)."""
    frequencies = base ** (-torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32) / dims)
    angles = positions.unsqueeze(-1).to(torch.float32) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first values of each head by its position's angles; x (..., heads, tokens, head size).

    Value i is paired with value i + dims / 2 (GPT-NeoX's order); what lies behind ``dims`` stays.
    """
    cos, sin = (a.unsqueeze(-3) for a in angles)
    half = cos.shape[-1]
    a, b = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    turned = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    return torch.cat((*turned, x[..., 2 * half :]), -1)


def attend(
    parts: Sequence[Tensor], num_heads: int, angles: tuple[Tensor, Tensor] | None, mask: Tensor | None,
    cache: Any, layer: int,
) -> Tensor:  # fmt: skip
    """Causal attention of several heads, (batch, tokens, dim).

    ``parts`` are queries, keys and values of that shape; ``angles`` turn queries and keys (None: no rotary
    positions), ``mask`` is that of `causal_mask`, ``layer`` the place in ``cache``.
    """
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in parts)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    if cache is not None:
        k, v = cache.update(k, v, layer)
    causal = mask is None and q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def causal_mask(tokens: int, past: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """The mask of `scaled_dot_product_attention` (True: seen); None where ``is_causal`` or nothing is needed.

    ``padding`` (batch, past + tokens) is nonzero at real tokens. A padded token sees itself, so that no row
    is empty: an empty softmax is NaN.
    """
    if padding is None and (past == 0 or tokens == 1):
        return None
    keys = torch.arange(past + tokens, device=device)
    queries = keys[past:].unsqueeze(1)
    seen = keys <= queries
    if padding is None:
        return seen
    return ((seen & padding.bool().unsqueeze(1)) | (keys == queries)).unsqueeze(1)


class KeyValueCache:
    """Keys and values of the tokens so far, one pair a layer; grows by doubling.

    Has the methods of a Hugging Face cache that `MemoryFormerLM` uses, which takes either.
    """

    def __init__(self) -> None:
        self._layers: list[list[Tensor]] = []
        self._length: list[int] = []

    def get_seq_length(self) -> int:
        """Number of tokens in the cache."""
        return self._length[0] if self._length else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append to a layer; keys and values of all its tokens, (batch, heads, tokens, head size)."""
        if layer == len(self._layers):
            self._layers.append([keys.new_empty(0), values.new_empty(0)])
            self._length.append(0)
        begin = self._length[layer]
        end = begin + keys.shape[2]
        held = self._layers[layer]
        for i, new in enumerate((keys, values)):
            if begin == 0 or end > held[i].shape[2]:
                grown = new.new_empty((*new.shape[:2], max(64, 2 * end), new.shape[3]))
                if begin:
                    grown[:, :, :begin] = held[i][:, :, :begin]
                held[i] = grown
            held[i][:, :, begin:end] = new
        self._length[layer] = end
        return held[0][:, :, :end], held[1][:, :, :end]
