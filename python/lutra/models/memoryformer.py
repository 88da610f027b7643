"""MemoryFormer as a model of Hugging Face transformers.

Importing this module registers ``model_type`` "memoryformer" with AutoConfig and AutoModelForCausalLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.cache_utils import DynamicCache
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError("lutra.models.memoryformer needs transformers: pip install transformers") from error

from ..nn import MemoryFormerLM, MemoryLinear
from ..nn._memory_former import small_std

__all__ = ["MemoryFormerConfig", "MemoryFormerForCausalLM"]

#: Newer versions of transformers call the past keys and values "cache".
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MemoryFormerConfig(PretrainedConfig):
    """Arguments of `lutra.nn.MemoryFormerLM` under transformers' names.

    Parameters
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads : int
    bits, ffn_bits : int, default 8 and 10
        tau and tau' of the paper.
    score, hash_temperature, learn_temperature
        Of `lutra.nn.MemoryLinear`.
    position_embedding_type : {'rotary', 'learned'}, default 'rotary'
    rotary_pct : float, default 0.25
    rotary_base : float, default 10000
    max_position_embeddings : int, default 2048
    rms_norm_eps : float, default 1e-6
    hidden_dropout : float, default 0
    tie_word_embeddings : bool, default False
    **kwargs
        Of `transformers.PretrainedConfig`.
    """

    model_type = "memoryformer"

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 512,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        bits: int = 8,
        ffn_bits: int = 10,
        score: str = "scaled",
        hash_temperature: float = 1.0,
        learn_temperature: bool | str = False,
        position_embedding_type: str = "rotary",
        rotary_pct: float = 0.25,
        rotary_base: float = 10000.0,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        hidden_dropout: float = 0.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.bits = bits
        self.ffn_bits = ffn_bits
        self.score = score
        self.hash_temperature = hash_temperature
        self.learn_temperature = learn_temperature
        self.position_embedding_type = position_embedding_type
        self.rotary_pct = rotary_pct
        self.rotary_base = rotary_base
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.hidden_dropout = hidden_dropout
        self.use_cache = use_cache
        super().__init__(
            tie_word_embeddings=tie_word_embeddings, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
            pad_token_id=pad_token_id, **kwargs,
        )  # fmt: skip


class MemoryFormerForCausalLM(PreTrainedModel, GenerationMixin):
    """`lutra.nn.MemoryFormerLM` with transformers' interface; the model itself is the attribute ``lm``.

    ``labels`` give a loss, ``generate`` uses transformers' caches, ``gradient_checkpointing_enable`` works,
    and so do ``save_pretrained`` and ``from_pretrained`` (safetensors) and ``resize_token_embeddings``.
    ``output_attentions`` and ``output_hidden_states`` give nothing.

    Examples
    --------
    >>> import torch
    >>> from lutra.models.memoryformer import MemoryFormerConfig, MemoryFormerForCausalLM
    >>> config = MemoryFormerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    >>> model = MemoryFormerForCausalLM(config)
    >>> model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape
    torch.Size([1, 4, 99])
    """

    config_class = MemoryFormerConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryFormerBlock"]  # noqa: RUF012  (transformers reads a list)
    _tied_weights_keys = {"lm.head.weight": "lm.embedding.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__(config)
        self.lm = MemoryFormerLM(
            config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
            config.bits, config.ffn_bits, positions=config.position_embedding_type, rotary=config.rotary_pct,
            rotary_base=config.rotary_base, max_positions=config.max_position_embeddings,
            tie_embeddings=config.tie_word_embeddings, score=config.score,
            temperature=config.hash_temperature, learn_temperature=config.learn_temperature,
            dropout=config.hidden_dropout, norm_eps=config.rms_norm_eps,
        )  # fmt: skip
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, MemoryLinear):
            module.reset_parameters()
        elif isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=small_std(self.config.hidden_size))
        elif isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.ones_(module.weight)

    def get_input_embeddings(self):
        """The embedding of the tokens."""
        return self.lm.embedding

    def set_input_embeddings(self, value):
        """Take another embedding."""
        self.lm.embedding = value
        self.lm.vocab_size = value.num_embeddings

    def get_output_embeddings(self):
        """The head."""
        return self.lm.head

    def set_output_embeddings(self, new_embeddings):
        """Take another head."""
        self.lm.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, the loss where there are labels, and the cache of keys and values.

        Arguments are those of any causal language model of transformers; ``cache`` is ``past_key_values``
        under its newer name.
        """
        cache = cache if cache is not None else past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        logits = self.lm(
            input_ids, attention_mask=attention_mask, positions=position_ids, cache=cache,
            embeddings=inputs_embeds, last=logits_to_keep,
        )  # fmt: skip
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache if use_cache else None})
        return out.to_tuple() if return_dict is False else out


AutoConfig.register(MemoryFormerConfig.model_type, MemoryFormerConfig)
AutoModelForCausalLM.register(MemoryFormerConfig, MemoryFormerForCausalLM)
