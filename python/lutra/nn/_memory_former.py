"""MemoryFormer: a transformer whose projections and feed-forward layers are table look-ups."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import _checks
from ._attention import KeyValueCache, attend, causal_mask, rotary_angles
from ._memory_linear import MemoryLinear

#: The two configurations of the published code: layers, width, heads.
PUBLISHED = {"tiny": (6, 512, 8), "small": (6, 768, 8)}


def small_std(dim: int) -> float:
    """Standard deviation of "small init" (Nguyen and Salazar 2019), which the published code uses."""
    return math.sqrt(2 / (5 * dim))


class MemoryFormerBlock(torch.nn.Module):
    """A block of MemoryFormer: ``x = x + attention(norm(x)); x = x + ffn(norm(x))`` with memory layers only.

    Queries, keys and values come from one `MemoryLinear` with one hash. The heads' outputs are added to the
    residual as they are: the paper has no output projection. The feed-forward layer is two memory layers: the
    first turns ``dim / bits`` chunks of ``bits`` into ``dim / bits`` chunks of ``ffn_bits`` values, so its
    width is ``dim * ffn_bits / bits`` (1.25 dim), the second hashes those by ``ffn_bits``.

    Parameters
    ----------
    dim : int
        A multiple of ``bits`` and of ``num_heads``.
    num_heads : int, default 8
    bits : int, default 8
        tau of the paper: of the hash of queries, keys and values and of the first feed-forward layer.
    ffn_bits : int, default 10
        tau': of the second feed-forward layer.
    score, temperature, learn_temperature
        Of `MemoryLinear`; 'scaled' is what the published code trains with.
    rotary : float, default 0.25
        The part of each head that rotary positions turn, from 0 (none) to 1.
    rotary_base : float, default 10000
    dropout : float, default 0
        Of the attention's and the feed-forward layer's outputs.
    norm_eps : float, default 1e-6
        Of the RMSNorm before each hash. (The published code has a LayerNorm between the two feed-forward
        layers.)
    device, dtype : optional

    Attributes
    ----------
    norm, ffn_norm, hidden_norm : RMSNorm
    qkv, expand, contract : MemoryLinear

    Notes
    -----
    Parameters: ``dim**2 / bits * (2**bits * (3 + ffn_bits / bits) + 2**ffn_bits)``, 69.2 million at dim 512.
    Read per token: ``dim / bits`` rows of 3 dim, 1.25 dim and dim values.

    References
    ----------
    Ding et al., MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers,
    NeurIPS 2024, arXiv 2411.12992, and https://github.com/C0-Design/MemoryFormer.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> lutra.nn.MemoryFormerBlock(64, num_heads=4)(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        bits: int = 8,
        ffn_bits: int = 10,
        *,
        score: str = "scaled",
        temperature: float = 1.0,
        learn_temperature: bool | str = False,
        rotary: float = 0.25,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = _checks.integer("dim", dim, 1)
        self.num_heads = _checks.integer("num_heads", num_heads, 1)
        bits, ffn_bits = _checks.integer("bits", bits, 1, 16), _checks.integer("ffn_bits", ffn_bits, 1, 16)
        for name, number in (("num_heads", self.num_heads), ("bits", bits)):
            if self.dim % number:
                raise ValueError(f"dim is {dim}; it must be a multiple of {name} = {number}")
        self.rotary_dims = rotary_dims(rotary, self.dim // self.num_heads)
        self.rotary_base = _checks.positive("rotary_base", rotary_base)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        weights: dict[str, Any] = {
            "score": score,
            "temperature": temperature,
            "learn_temperature": learn_temperature,
        }
        hidden = dim // bits * ffn_bits
        self.norm = torch.nn.RMSNorm(dim, norm_eps, **options)
        self.qkv = MemoryLinear(dim, (dim, dim, dim), bits, init_std=small_std(dim), **weights, **options)
        self.ffn_norm = torch.nn.RMSNorm(dim, norm_eps, **options)
        self.expand = MemoryLinear(dim, hidden, bits, **weights, **options)
        self.hidden_norm = torch.nn.RMSNorm(hidden, norm_eps, **options)
        self.contract = MemoryLinear(hidden, dim, ffn_bits, **weights, **options)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        angles: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
        layer: int = 0,
    ) -> Tensor:
        """The block's output for ``x`` of shape (batch, tokens, dim), causal.

        Parameters
        ----------
        x : Tensor, shape (batch, tokens, dim)
        angles : pair of Tensors, optional
            Of rotary positions; those of 0, 1, ... (behind what the cache holds) where not given.
        mask : Tensor, optional
            Of `torch.nn.functional.scaled_dot_product_attention`; causal where not given.
        cache : optional
            A `KeyValueCache` or a cache of transformers; ``layer`` is this block's place in it.
        """
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, tokens, {self.dim})")
        tokens = x.shape[1]
        if cache is not None and (angles is None or mask is None):
            past = cache.get_seq_length() if layer == 0 else cache.get_seq_length() - tokens
        else:
            past = 0
        if mask is None:
            mask = causal_mask(tokens, past, None, x.device)
        if angles is None and self.rotary_dims:
            positions = torch.arange(past, past + tokens, device=x.device)
            angles = rotary_angles(positions, self.rotary_dims, self.rotary_base)
        angles = angles if self.rotary_dims else None
        mixed = attend(self.qkv(self.norm(x)), self.num_heads, angles, mask, cache, layer)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.contract(self.hidden_norm(self.expand(self.ffn_norm(x)))))

    def extra_repr(self) -> str:
        """The arguments that its layers do not show, for ``repr``."""
        return f"num_heads={self.num_heads}, rotary_dims={self.rotary_dims}"


def rotary_dims(part: float, head_size: int) -> int:
    """Values of a head that rotary positions turn: an even number."""
    if not isinstance(part, (int, float)) or not 0 <= part <= 1:
        raise ValueError(f"rotary must be in [0, 1], got {part!r}")
    dims = int(head_size * part) // 2 * 2
    return max(dims, 2) if part and head_size > 1 else 0


class MemoryFormerLM(torch.nn.Module):
    """A causal language model of `MemoryFormerBlock`.

    Parameters
    ----------
    vocab_size : int
    dim : int, default 512
    num_layers : int, default 6
    num_heads : int, default 8
    bits, ffn_bits : int, default 8 and 10
    positions : {'rotary', 'learned'}, default 'rotary'
    rotary : float, default 0.25
        The part of each head that rotary positions turn.
    rotary_base : float, default 10000
    max_positions : int, default 2048
        The longest text with learned positions (rotary ones have no limit).
    tie_embeddings : bool, default False
        Use the embedding's weight as the output head's.
    score, temperature, learn_temperature, dropout, norm_eps
        As in `MemoryFormerBlock`.
    device, dtype : optional

    Attributes
    ----------
    embedding, positions : Embedding (positions is None where they are rotary)
    blocks : ModuleList of MemoryFormerBlock
    norm : RMSNorm
    head : Linear, without bias
    gradient_checkpointing : bool, default False
        Keep only the blocks' inputs while training, and compute each block once more on the way back.

    Notes
    -----
    The defaults are the published code's "tiny" (`MemoryFormerLM.published`). Embedding, head and the tables
    of queries, keys and values are drawn from N(0, sqrt(2 / (5 dim))), the other tables from N(0, 0.02).
    `lutra.models.memoryformer` wraps this model for transformers.

    References
    ----------
    Ding et al., MemoryFormer, NeurIPS 2024, arXiv 2411.12992.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> model = lutra.nn.MemoryFormerLM(256, dim=64, num_layers=2, num_heads=4, bits=4, ffn_bits=5)
    >>> model(torch.randint(0, 256, (2, 7))).shape
    torch.Size([2, 7, 256])
    >>> model.generate(torch.zeros(1, 1, dtype=torch.int64), 5).shape
    torch.Size([1, 6])
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 512,
        num_layers: int = 6,
        num_heads: int = 8,
        bits: int = 8,
        ffn_bits: int = 10,
        *,
        positions: str = "rotary",
        rotary: float = 0.25,
        rotary_base: float = 10000.0,
        max_positions: int = 2048,
        tie_embeddings: bool = False,
        score: str = "scaled",
        temperature: float = 1.0,
        learn_temperature: bool | str = False,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = _checks.integer("vocab_size", vocab_size, 1)
        self.dim = _checks.integer("dim", dim, 1)
        self.num_layers = _checks.integer("num_layers", num_layers, 1)
        self.max_positions = _checks.integer("max_positions", max_positions, 1)
        _checks.choice("positions", positions, {"rotary": 0, "learned": 1})
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        rotary = rotary if positions == "rotary" else 0.0
        self.embedding = torch.nn.Embedding(vocab_size, dim, **options)
        self.positions = torch.nn.Embedding(max_positions, dim, **options) if positions == "learned" else None
        self.blocks = torch.nn.ModuleList(
            MemoryFormerBlock(
                dim, num_heads, bits, ffn_bits, score=score, temperature=temperature,
                learn_temperature=learn_temperature, rotary=rotary, rotary_base=rotary_base, dropout=dropout,
                norm_eps=norm_eps, **options,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.norm = torch.nn.RMSNorm(dim, norm_eps, **options)
        self.head = torch.nn.Linear(dim, vocab_size, bias=False, **options)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.dropout = torch.nn.Dropout(dropout)
        self.gradient_checkpointing = False
        for module in (self.embedding, self.positions, self.head):
            if module is not None:
                torch.nn.init.normal_(module.weight, std=small_std(dim))

    @classmethod
    def published(cls, name: str, vocab_size: int = 50304, **options) -> MemoryFormerLM:
        """The configuration of one of the published code's files: 'tiny' or 'small', freshly initialised."""
        if name not in PUBLISHED:
            raise ValueError(f"name must be one of {', '.join(map(repr, PUBLISHED))}; got {name!r}")
        num_layers, dim, num_heads = PUBLISHED[name]
        return cls(vocab_size, dim, num_layers, num_heads, **options)

    def forward(
        self,
        ids: Tensor | None,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        embeddings: Tensor | None = None,
        last: int | Tensor = 0,
    ) -> Tensor:
        """Logits of the next token, shape (batch, tokens, vocab_size).

        Parameters
        ----------
        ids : Tensor, shape (batch, tokens), int64
        attention_mask : Tensor, shape (batch, cached + tokens), optional
            Nonzero at real tokens, 0 at padding. A 4-d one goes to the attention as it is.
        positions : Tensor, shape (batch, tokens), optional
            Count from the cache's length where not given, or with a 2-d mask from the first real token.
        cache : optional
            `KeyValueCache` or a cache of transformers: holds the tokens before, and takes these up.
        embeddings : Tensor, shape (batch, tokens, dim), optional
            In place of ids.
        last : int or Tensor, default 0
            Logits of so many last tokens only (0: of all), or of the tokens at these indices.
        """
        x = self.hidden(ids, attention_mask, positions, cache, embeddings)
        if isinstance(last, Tensor):
            x = x[:, last]
        elif last:
            x = x[:, -last:]
        return self.head(x)

    def hidden(self, ids, attention_mask=None, positions=None, cache=None, embeddings=None) -> Tensor:
        """What the head sees, shape (batch, tokens, dim); arguments as in `forward`."""
        if (ids is None) == (embeddings is None):
            raise ValueError("give either ids or embeddings")
        x = self.embedding(self._checked(ids)) if embeddings is None else embeddings
        tokens = x.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            if mask.shape[1] != past + tokens:
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}; with {past} tokens in the cache and "
                    f"{tokens} given it must be ({x.shape[0]}, {past + tokens})"
                )
            if positions is None:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        elif mask is not None and mask.dim() != 4:
            raise ValueError(f"attention_mask must be 2-d or 4-d, got shape {tuple(mask.shape)}")
        if mask is None or mask.dim() == 2:
            mask = causal_mask(tokens, past, mask, x.device)
        if positions is None:
            positions = torch.arange(past, past + tokens, device=x.device)
        if self.positions is not None:
            if past + tokens > self.max_positions:
                raise ValueError(
                    f"the text has {past + tokens} tokens; learned positions end at max_positions = "
                    f"{self.max_positions}"
                )
            x = x + self.positions(positions)
        x = self.dropout(x)
        first = self.blocks[0]
        angles = rotary_angles(positions, first.rotary_dims, first.rotary_base) if first.rotary_dims else None
        keep = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for i, block in enumerate(self.blocks):
            if keep:
                x = checkpoint(block, x, angles=angles, mask=mask, use_reentrant=False)
            else:
                x = block(x, angles=angles, mask=mask, cache=cache, layer=i)
        return self.norm(x)

    def _checked(self, ids):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids must be an int64 or int32 tensor, got {getattr(ids, 'dtype', type(ids))}")
        if ids.dim() != 2:
            raise ValueError(f"ids has shape {tuple(ids.shape)}; it must be (batch, tokens)")
        return ids

    def loss(self, ids: Tensor, labels: Tensor | None = None, *, ignore_index: int = -100) -> Tensor:
        """Mean cross entropy of each next token, in nats.

        ``labels`` (batch, tokens), ids by default, are shifted here: the logits at token i are held against
        label i + 1. Labels of ``ignore_index`` do not count.
        """
        logits = self(ids)[:, :-1]
        labels = (ids if labels is None else labels)[:, 1:]
        return F.cross_entropy(
            logits.reshape(-1, self.vocab_size).float(), labels.reshape(-1).long(), ignore_index=ignore_index
        )

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``ids`` (batch, tokens) token by token, with a cache of keys and values.

        ``temperature`` 0 takes the likeliest token; ``top_k`` draws from so many likeliest ones only. A text
        that reached ``eos`` goes on with it. Returns (batch, tokens + new tokens). Dropout is on where the
        model is in training mode: call ``eval()`` first.
        """
        if self._checked(ids).shape[1] < 1:
            raise ValueError("ids is empty; generation needs a first token")
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        cache = KeyValueCache()
        texts, step = [ids], ids
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for _ in range(_checks.integer("max_new_tokens", max_new_tokens, 0)):
            logits = self(step, cache=cache, last=1)[:, -1].float()
            if temperature == 0:
                step = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kept = logits.topk(min(top_k, self.vocab_size)).values[:, -1:]
                    logits = logits.masked_fill(logits < kept, -math.inf)
                step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            step = step.to(ids.dtype)
            if eos is not None:
                step = step.masked_fill(done.unsqueeze(1), eos)
                done |= step[:, 0] == eos
            texts.append(step)
            if eos is not None and bool(done.all()):
                break
        return torch.cat(texts, 1)
