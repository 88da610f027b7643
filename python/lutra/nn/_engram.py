"""Engram: a memory of hashed n-grams, let in by the hidden state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from ..address import xor_ngrams
from ._embedding import Embedding
from ._host import HostEmbedding


class Engram(nn.Module):
    """A layer that looks up the n-grams that end at each token, and adds what the hidden state lets in.

    Each n-gram has a row in every head of its length (`lutra.address.xor_ngrams`); the rows are put together
    to the memory e of the token. With key W_k e and value W_v e, the gate is sigmoid(a) of the agreement
    a = norm(h) . norm(key) / sqrt(d), and the output is v = gate * value and, with a convolution,
    v + silu(conv(norm(v))): depthwise, causal, its weights zero at the start. Add it to the residual stream.

    Parameters
    ----------
    d : int
        Width of the hidden states.
    num_tokens : int
        Size of the tokens' vocabulary.
    orders : sequence of int, default (2, 3)
        Lengths of the n-grams.
    heads : int, default 8
        Hashes of each length.
    rows : int, default 100_003
        About so many rows a head: the heads' sizes are the next distinct primes from here on.
    memory_dim : int, optional
        Values of e; default d. A multiple of ``len(orders) * heads``.
    kernel_size : int, default 4
        Of the convolution, which reaches back in steps of the longest n-gram; 0 leaves it out.
    gate : {"sigmoid", "root"}, default "sigmoid"
        "root" takes sigmoid(sign(a) sqrt(abs(a))), abs(a) at least 1e-6: so does the authors' code, while
        the paper's formula has no root.
    pad : int, default 0
        The token that stands before a sequence.
    seed : int, default 0
        Of the hashes; layers of one model should have different ones.
    host : bool, default False
        Keep the table in host memory (`HostEmbedding`).
    sparse : bool, default True
        The gradient of the table holds the rows touched only (for `lutra.optim` and torch.optim.SparseAdam).
    device, dtype

    Attributes
    ----------
    memory : lutra.nn.Embedding or HostEmbedding, (sum of moduli, memory_dim / (len(orders) heads))
    moduli, multipliers : tuple of int

    Raises
    ------
    TypeError, ValueError
        Options that do not fit together.

    References
    ----------
    Cheng et al., Conditional Memory via Scalable Lookup: A New Axis of Sparsity for Large Language Models,
    arXiv 2601.07372.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.Engram(64, 1000, heads=4, rows=500)
    >>> layer(torch.randn(2, 7, 64), torch.randint(0, 1000, (2, 7))).shape
    torch.Size([2, 7, 64])
    """

    def __init__(
        self, d: int, num_tokens: int, orders: Sequence[int] = (2, 3), heads: int = 8, *, rows: int = 100_003,
        memory_dim: int | None = None, kernel_size: int = 4, gate: str = "sigmoid", pad: int = 0,
        seed: int = 0, host: bool = False, sparse: bool = True, eps: float = 1e-6, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d = _checks.integer("d", d, 1)
        self.num_tokens = _checks.integer("num_tokens", num_tokens, 1, 1 << 31)
        self.orders = tuple(_checks.integer("orders", n, 1) for n in orders)
        self.heads = _checks.integer("heads", heads, 1)
        self.kernel_size = _checks.integer("kernel_size", kernel_size, 0)
        if gate not in ("sigmoid", "root"):
            raise ValueError(f"gate must be 'sigmoid' or 'root', got {gate!r}")
        self.gate = gate
        if not self.orders or list(self.orders) != sorted(set(self.orders)):
            raise ValueError(f"orders must be increasing, got {self.orders}")
        self.pad = _checks.integer("pad", pad, 0, self.num_tokens - 1)
        self.seed = _checks.integer("seed", seed)
        parts = len(self.orders) * self.heads
        memory_dim = d if memory_dim is None else _checks.integer("memory_dim", memory_dim, 1)
        if memory_dim % parts:
            raise ValueError(
                f"memory_dim is {memory_dim}; it must be a multiple of len(orders) * heads = {parts}, the "
                "parts it is put together from"
            )
        self.memory_dim = memory_dim
        self.moduli = _primes(_checks.integer("rows", rows, 2), parts)
        self.multipliers = _multipliers(self.orders[-1], self.num_tokens, self.seed)
        where = {"device": device, "dtype": dtype}
        kind = HostEmbedding if host else Embedding
        self.memory = kind(sum(self.moduli), memory_dim // parts, sparse=sparse, **where)
        self.key = nn.Linear(memory_dim, d, bias=False, **where)
        self.value = nn.Linear(memory_dim, d, bias=False, **where)
        self.norm_hidden, self.norm_key = nn.RMSNorm(d, eps, **where), nn.RMSNorm(d, eps, **where)
        self.norm_value: nn.RMSNorm | None = None
        self.conv: nn.Conv1d | None = None
        if kernel_size:
            self.norm_value = nn.RMSNorm(d, eps, **where)
            self.conv = nn.Conv1d(d, d, kernel_size, groups=d, dilation=self.orders[-1], bias=False, **where)
            nn.init.zeros_(self.conv.weight)

    def extra_repr(self) -> str:
        return f"{self.d}, {self.num_tokens}, orders={self.orders}, heads={self.heads}, seed={self.seed}"

    def ids(self, tokens: Tensor) -> Tensor:
        """Rows of the table, (\\*tokens.shape, len(orders) heads)."""
        return xor_ngrams(tokens, self.multipliers, self.moduli, self.orders, pad=self.pad)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What to add to hidden.

        Parameters
        ----------
        hidden : Tensor, (batch, length, d)
        tokens : Tensor, (batch, length), int64 or int32
            The whole sequence up to here: n-grams and convolution begin with it.

        Returns
        -------
        Tensor, (batch, length, d)
        """
        if hidden.dim() != 3 or hidden.shape[-1] != self.d or tokens.shape != hidden.shape[:2]:
            raise ValueError(
                f"hidden must be (batch, length, {self.d}) and tokens (batch, length), got "
                f"{tuple(hidden.shape)} and {tuple(tokens.shape)}"
            )
        memory = self.memory(self.ids(tokens)).flatten(-2)
        key, value = self.key(memory), self.value(memory)
        agreement = (self.norm_hidden(hidden) * self.norm_key(key)).sum(-1, keepdim=True) / math.sqrt(self.d)
        if self.gate == "root":
            agreement = agreement.abs().clamp_min(1e-6).sqrt() * agreement.sign()
        value = torch.sigmoid(agreement) * value
        if self.conv is None or self.norm_value is None:
            return value
        reach = (self.kernel_size - 1) * self.orders[-1]
        past = F.pad(self.norm_value(value).transpose(1, 2), (reach, 0))
        return value + F.silu(self.conv(past)).transpose(1, 2)


def _multipliers(n: int, num_tokens: int, seed: int) -> tuple[int, ...]:
    """Odd numbers from SplitMix64, so small that a token's product stays below 2^63."""
    out, state = [], seed
    bound = ((1 << 63) - 1) // num_tokens
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
        h = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
        out.append((h ^ (h >> 31)) % (bound - 1) | 1)  # at most bound
    return tuple(out)


def _primes(start: int, count: int) -> tuple[int, ...]:
    """The first primes from ``start`` on."""
    out: list[int] = []
    while len(out) < count:
        if _is_prime(start):
            out.append(start)
        start += 1
    return tuple(out)


def _is_prime(n: int) -> bool:
    """Miller and Rabin with bases that decide every n below 3.3e24."""
    small = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % p == 0 for p in small):
        return n in small
    d, s = n - 1, 0
    while d % 2 == 0:
        d, s = d // 2, s + 1
    for a in small:
        x = pow(a, d, n)
        if x in (1, n - 1):
            continue
        for _ in range(s - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True
