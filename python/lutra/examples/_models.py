"""Language models that differ in their layers and in nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn import LookupFFN, MemoryFormerLM, ProductKeyMemory
from ..nn._attention import attend
from ..nn._memory_former import rotary_dims, small_std

ARCHITECTURES = ("memoryformer", "lookupffn", "product-key", "dense")


def linear(in_features: int, out_features: int, dim: int) -> torch.nn.Linear:
    """A dense layer initialised as the embedding of a model of width ``dim`` is; its bias is zero."""
    layer = torch.nn.Linear(in_features, out_features)
    torch.nn.init.normal_(layer.weight, std=small_std(dim))
    torch.nn.init.zeros_(layer.bias)
    return layer


class DenseFeedForward(torch.nn.Sequential):
    """Linear to four times the width, GELU, Linear back."""

    def __init__(self, dim: int) -> None:
        super().__init__(linear(dim, 4 * dim, dim), torch.nn.GELU(), linear(4 * dim, dim, dim))


class DenseBlock(torch.nn.Module):
    """`MemoryFormerBlock` with dense projections, an output projection, and any feed-forward layer."""

    def __init__(self, dim: int, num_heads: int, feed_forward: torch.nn.Module, rotary: float = 0.25) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim is {dim}; it must be a multiple of num_heads = {num_heads}")
        self.num_heads = num_heads
        self.rotary_dims, self.rotary_base = rotary_dims(rotary, dim // num_heads), 10000.0
        self.norm, self.ffn_norm = torch.nn.RMSNorm(dim, 1e-6), torch.nn.RMSNorm(dim, 1e-6)
        self.qkv, self.out = linear(dim, 3 * dim, dim), linear(dim, dim, dim)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, *, angles=None, mask=None, cache: Any = None, layer: int = 0) -> Tensor:
        """As `MemoryFormerBlock`'s; the model around it gives angles and mask."""
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        angles = angles if self.rotary_dims else None
        x = x + self.out(attend(parts, self.num_heads, angles, mask, cache, layer))
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
        return LookupFFN(dim, bits=bits)
    if arch == "product-key" and layer == layers // 2:
        return ProductKeyMemory(dim, num_sub_keys=128, k=16)
    return DenseFeedForward(dim)
