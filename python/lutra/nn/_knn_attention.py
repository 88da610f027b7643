"""KNNMemoryAttention: multi-head attention with a memory bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ._memory_attention import Banks, memory_attention
from ._memory_bank import MemoryBank


class KNNMemoryAttention(nn.Module):
    """Multi-head attention to its keys and to the memories of a bank; for ``torch.nn.MultiheadAttention``.

    Takes the arguments of ``MultiheadAttention`` and of its ``forward``, so that it stands in its place, also
    in ``torch.nn.TransformerEncoderLayer`` (whose fused evaluation it turns off).

    Parameters
    ----------
    embed_dim, num_heads, dropout, bias
        As in torch.
    num_kv_heads : int, optional
        Heads of keys and values; default num_heads.
    top_k : int, default 32
        Memories of a query and head.
    similarity_threshold : float, optional
        As for `memory_attention`.
    bank : MemoryBank, or a sequence of them (one for each item of a batch), optional
        May be set later (``layer.bank = bank``), and is made by `remember`. Without it the layer is plain
        attention.
    batch_first : bool, default False
        As in torch.
    device, dtype : optional

    Attributes
    ----------
    q_proj, k_proj, v_proj, out_proj : torch.nn.Linear
    bank : MemoryBank, sequence or None
        Data, not parameters: in no ``state_dict``, and ``to`` leaves it where it is (`MemoryBank.to` moves
        it). Copies and pickles of the layer hold it.

    Raises
    ------
    TypeError, ValueError
        An argument out of range; a bank of another width.

    References
    ----------
    As for `memory_attention`.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.KNNMemoryAttention(16, 4, top_k=2, batch_first=True)
    >>> layer.remember(torch.randn(1, 100, 16))
    >>> out, _ = layer(torch.randn(3, 5, 16), is_causal=True, need_weights=False)
    >>> len(layer.bank), out.shape
    (100, torch.Size([3, 5, 16]))
    """

    # What torch.nn.TransformerEncoderLayer asks before it takes its fused way, which knows no memory.
    _qkv_same_embed_dim = False
    in_proj_weight = None
    in_proj_bias = None

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, *,
        num_kv_heads: int | None = None, top_k: int = 32, similarity_threshold: float | None = None,
        bank: Banks | None = None, batch_first: bool = False, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed_dim = _checks.integer("embed_dim", embed_dim, 1)
        self.num_heads = _checks.integer("num_heads", num_heads, 1)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}, not divisible by num_heads = {num_heads}")
        kv = num_heads if num_kv_heads is None else _checks.integer("num_kv_heads", num_kv_heads, 1)
        if num_heads % kv:
            raise ValueError(f"num_heads is {num_heads}, not divisible by num_kv_heads = {kv}")
        self.num_kv_heads, self.head_dim = kv, embed_dim // num_heads
        self.top_k = _checks.integer("top_k", top_k, 1)
        self.similarity_threshold = similarity_threshold
        self.dropout, self.batch_first, self.bank = float(dropout), bool(batch_first), bank
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **options)
        self.k_proj = nn.Linear(embed_dim, kv * self.head_dim, **options)
        self.v_proj = nn.Linear(embed_dim, kv * self.head_dim, **options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's uniform initialisation, biases of zero."""
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(layer.weight)
        self.out_proj.reset_parameters()
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @classmethod
    @torch.no_grad()
    def from_attention(cls, attention: nn.MultiheadAttention, **options: Any) -> KNNMemoryAttention:
        """A layer with the weights of a ``torch.nn.MultiheadAttention``.

        Parameters
        ----------
        attention : torch.nn.MultiheadAttention
            With one width for queries, keys and values, without ``add_bias_kv`` and ``add_zero_attn``.
        **options
            ``top_k``, ``similarity_threshold``, ``bank``.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(
                f"attention must be a torch.nn.MultiheadAttention, got {type(attention).__qualname__}"
            )
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "attention has kdim or vdim, add_bias_kv or add_zero_attn, which have no place here"
            )
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        layer = cls(
            attention.embed_dim, attention.num_heads, attention.dropout, bias is not None,
            batch_first=attention.batch_first, device=weight.device, dtype=weight.dtype, **options,
        )  # fmt: skip
        for i, part in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
            part.weight.copy_(weight.chunk(3)[i])
            if bias is not None:
                part.bias.copy_(bias.chunk(3)[i])
        layer.out_proj.load_state_dict(attention.out_proj.state_dict())
        return layer.train(attention.training)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, top_k={self.top_k}, "
            f"similarity_threshold={self.similarity_threshold}, bank={self.bank}"
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    @torch.no_grad()
    def remember(self, x: Tensor) -> None:
        """Add the keys and values of inputs to the bank; makes an exact one by cosine where there is none.

        Parameters
        ----------
        x : Tensor, shape (tokens, embed_dim), or with a batch as for ``forward``
        """
        if x.dim() == 3 and not self.batch_first:
            x = x.transpose(0, 1)
        keys, values = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        if self.bank is None:
            weight = self.k_proj.weight
            self.bank = MemoryBank(self.num_kv_heads, self.head_dim, device=weight.device, dtype=weight.dtype)
        if isinstance(self.bank, MemoryBank):
            self.bank.add(keys, values)
            return
        if x.dim() != 3 or len(x) != len(self.bank) or any(b is None for b in self.bank):
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be a batch of one item for each bank")
        for bank, k, v in zip(self.bank, keys, values):
            assert bank is not None
            bank.add(k, v)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Parameters
        ----------
        query, key, value : Tensor, shape (tokens, batch, embed_dim), batch first with ``batch_first``
            Or without a batch. Default of key: query; of value: key.
        key_padding_mask, attn_mask, need_weights, average_attn_weights
            As in torch, where True in a mask means hidden. They are about the local keys.
        is_causal : bool, default False
            Hide later keys; with ``attn_mask`` a hint, as in torch: the mask decides.

        Returns
        -------
        out : Tensor, the shape of query
        weights : Tensor, shape (batch, tokens, keys) or (batch, heads, tokens, keys), or None
            Of the local keys: each row sums to 1 less what memories got.
        """
        key = query if key is None else key
        value = key if value is None else value
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                f"query, key and value must be all 2-d or all 3-d, got {query.dim()}, {key.dim()}"
            )
        turned = query.dim() == 3 and not self.batch_first
        if turned:
            query, key, value = (a.transpose(0, 1) for a in (query, key, value))
        q, k, v = (
            self._heads(self.q_proj(query)),
            self._heads(self.k_proj(key)),
            self._heads(self.v_proj(value)),
        )
        mask = self._mask(q, k, attn_mask, key_padding_mask, is_causal)
        found = memory_attention(
            q, k, v, self.bank, mask, self.dropout if self.training else 0.0, is_causal and mask is None,
            enable_gqa=self.num_kv_heads != self.num_heads, top_k=self.top_k,
            similarity_threshold=self.similarity_threshold, return_weights=need_weights,
        )  # fmt: skip
        out, weights = found if need_weights else (found, None)
        out = self.out_proj(out.transpose(-3, -2).flatten(-2))
        local = None
        if weights is not None:
            local = weights.local.mean(-3) if average_attn_weights else weights.local
        return out.transpose(0, 1) if turned else out, local

    def _mask(self, q, k, mask, padding, is_causal):
        """torch.nn.MultiheadAttention's masks as `memory_attention` takes them."""
        if mask is not None:
            mask = ~mask if mask.dtype == torch.bool else mask
            if mask.dim() == 3 and q.dim() == 4:  # (batch * heads, tokens, keys)
                mask = mask.unflatten(0, (q.shape[0], self.num_heads))
        if padding is None:
            return mask
        padding = padding.unsqueeze(-2).unsqueeze(-2)  # heads and tokens
        if padding.dtype == torch.bool:
            padding = torch.zeros(padding.shape, device=q.device).masked_fill(padding, -torch.inf)
        if mask is None and is_causal:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=q.device).masked_fill(~mask, -torch.inf)
        return padding if mask is None else padding + mask
