"""Language models that differ in their layers and in nothing else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import MemoryFormerLM
from ..nn._attention import causal_mask, rotary_angles, rotate
from ..nn._memory_former import rotary_dims, small_std

ARCHITECTURES = ("memoryformer", "lookupffn", "product-key", "dense")


class DenseFeedForward(torch.nn.Sequential):
    """Linear to four times the width, GELU, Linear back."""

    def __init__(self, dim: int) -> None:
        wide = torch.nn.Linear(dim, 4 * dim)
        narrow = torch.nn.Linear(4 * dim, dim)
        torch.nn.init.normal_(wide.weight, std=small_std(dim))
        torch.nn.init.normal_(narrow.weight, std=small_std(dim))
        torch.nn.init.zeros_(wide.bias)
        torch.nn.init.zeros_(narrow.bias)
        super().__init__(wide, torch.nn.GELU(), narrow)


class DenseBlock(torch.nn.Module):
    """`MemoryFormerBlock` with dense projections, an output projection, and any feed-forward layer."""

    def __init__(self, dim: int, num_heads: int, feed_forward: torch.nn.Module, rotary: float = 0.25) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim is {dim}; it must be a multiple of num_heads = {num_heads}")
        self.num_heads = num_heads
        self.rotary_dims, self.rotary_base = rotary_dims(rotary, dim // num_heads), 10000.0
        self.norm, self.ffn_norm = torch.nn.RMSNorm(dim, 1e-6), torch.nn.RMSNorm(dim, 1e-6)
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        for layer in (self.qkv, self.out):
            torch.nn.init.normal_(layer.weight, std=small_std(dim))
            torch.nn.init.zeros_(layer.bias)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, *, angles=None, mask=None, cache: Any = None, layer: int = 0) -> Tensor:
        """As `MemoryFormerBlock`'s."""
        tokens = x.shape[1]
        if angles is None and self.rotary_dims:
            positions = torch.arange(tokens, device=x.device)
            angles = rotary_angles(positions, self.rotary_dims, self.rotary_base)
        if mask is None and cache is None:
            mask = causal_mask(tokens, 0, None, x.device)
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        if self.rotary_dims:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        causal = mask is None and q.shape[2] > 1
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.ffn_norm(x))


def build(
    arch: str, vocab_size: int, *, dim: int, layers: int, heads: int, bits: int = 8, ffn_bits: int = 10
) -> MemoryFormerLM:
    """A model of the given architecture; embedding, positions, norms and head are the same in all.

    ``lookupffn`` has dense attention and `lutra.nn.LookupFFN` in the place of each feed-forward layer;
    ``product-key`` has a `lutra.nn.ProductKeyMemory` in the place of the middle one, as Memory Layers at
    Scale has; ``dense`` is the ordinary transformer.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    if arch == "memoryformer":
        return MemoryFormerLM(vocab_size, dim, layers, heads, bits, ffn_bits)
    # one block of the smallest tables, to be replaced: everything around the blocks is MemoryFormerLM's
    model = MemoryFormerLM(vocab_size, dim, 1, heads, 1, 1)
    model.num_layers = layers
    model.blocks = torch.nn.ModuleList(
        DenseBlock(dim, heads, _feed_forward(arch, dim, bits, i, layers)) for i in range(layers)
    )
    return model


def _feed_forward(arch: str, dim: int, bits: int, layer: int, layers: int) -> torch.nn.Module:
    if arch == "lookupffn":
        from ..nn import LookupFFN

        return LookupFFN(dim, bits=bits)
    if arch == "product-key" and layer == layers // 2:
        from ..nn import ProductKeyMemory

        return ProductKeyMemory(dim, num_sub_keys=128, k=16)
    return DenseFeedForward(dim)
