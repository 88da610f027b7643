"""The attention function of transformers' layers that have memories, or whose keys are being collected."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

try:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
except ImportError as error:
    raise ImportError(
        "lutra.models.extended_mind needs transformers (4.53 or later): pip install transformers"
    ) from error

from ..nn import MemoryBank, memory_attention

NAME = "lutra_memory"
STATE = "_lutra_memory"


class Recorder:
    """Keeps what an attention layer computes."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.angles: tuple[Tensor, Tensor] | None = None


class Reader:
    """What an attention layer needs to attend to memories."""

    def __init__(self, bank: MemoryBank, mind: Any) -> None:
        self.bank, self.mind = bank, mind


def _attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    """The attention function of transformers; of layers without memories it is "sdpa"."""
    state = module.__dict__.get(STATE)
    if not isinstance(state, Reader):
        if state is not None:
            state.key, state.value = key, value
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            **kwargs,
        )  # fmt: skip
    for name in ("position_bias", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"memories have no place for {name} of {type(module).__qualname__}")
    mind, tokens = state.mind, query.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = bool(tokens > 1 and attention_mask is None and is_causal)
    if is_causal and key.shape[2] > tokens:  # a static cache that is still empty
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    found = memory_attention(
        query, key, value, state.bank, attention_mask, dropout, is_causal, scaling,
        key.shape[1] != query.shape[1], top_k=mind.top_k, similarity_threshold=mind.similarity_threshold,
        return_weights=mind.cited is not None,
    )  # fmt: skip
    if mind.cited is not None:
        found, weights = found
        mind.cited.count(weights.ids, weights.memory)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention_layers(model: Any) -> dict[int, Any]:
    """Self-attention modules of a decoder by their numbers."""
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a model of transformers, got {type(model).__qualname__}")
    found: dict[int, Any] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and getattr(module, "is_causal", False):
            if layer in found:
                raise ValueError(f"model has two causal attention layers number {layer}; it is no decoder")
            found[layer] = module
    if not found:
        raise ValueError(
            f"{type(model).__qualname__} has no causal attention layers on transformers' attention interface"
        )
    return dict(sorted(found.items()))


@contextlib.contextmanager
def implementation(model: Any) -> Iterator[None]:
    """The model with our attention function, and as it was afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
