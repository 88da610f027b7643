"""LexinvariantEmbedding: rows drawn anew for every sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..address import random_rows
from ..address._random_rows import signed
from ..compress.formats.base import check_ids

#: Another stream of the same generator, for which tokens of a sequence are random.
_CHOICE = 0x5851F42D4C957F2D


class LexinvariantEmbedding(torch.nn.Embedding):
    """Embedding whose rows are N(0, I), the same for a token within a sequence and fresh in the next.

    A model on it cannot know a token by its row and learns to read its meaning from the context. Rows come
    from `lutra.address.random_rows`; no table is stored. Some tokens may keep learned rows: those of
    ``learned``, and with ``random_fraction`` p below 1 each token of each sequence with probability 1 - p.

    Parameters
    ----------
    num_embeddings, embedding_dim, padding_idx
        As in ``torch.nn.Embedding``; rows of padding are zero.
    seed : int, default 0
        Not in the state_dict: like sizes, it belongs to the constructor.
    learned : sequence of int or bool mask, optional
        Tokens with learned rows (punctuation, byte tokens, ...).
    random_fraction : float, default 1.0
        Share of (sequence, token) pairs, outside ``learned``, that are random. Below 1 every token has a
        learned row too. The attribute may be changed at any time, to 0 for a model with learned rows only.
    scale : float, default 1.0
        Standard deviation of the random rows.
    device, dtype
        As in ``torch.nn.Embedding``.

    Attributes
    ----------
    weight : Parameter, shape (num_embeddings, 0)
        Holds no memory; says dtype and device.
    learned_rows : Parameter, shape (number of learned tokens, embedding_dim), or None
    next_sequence : buffer, int64
        The key of the next sequence, in the state_dict, so that a run that goes on draws fresh rows.

    Notes
    -----
    Each call draws new keys, in training and in evaluation. Where rows must stay (steps of a generation with
    a cache, a block that gradient checkpointing runs twice), pass the keys: ``keys = layer.draw(batch)``,
    ``layer(ids, keys)``; or use ``with layer.hold():``, in which all calls have one batch's keys. Processes
    of a distributed run, and replicas of DataParallel, need seeds or keys of their own.

    References
    ----------
    Huang, Zelikman, Chen, Wu, Valiant and Liang, Lexinvariant Language Models, 2023, arXiv 2305.16349.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.LexinvariantEmbedding(100, 64, seed=1)
    >>> x = layer(torch.tensor([[3, 5, 3], [3, 5, 3]]))
    >>> bool((x[0, 0] == x[0, 2]).all()), bool((x[0, 0] == x[1, 0]).any())
    (True, False)
    """

    learned_rows: Tensor | None
    slot: Tensor | None
    always: Tensor | None
    next_sequence: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        seed: int = 0,
        learned: Any = None,
        random_fraction: float = 1.0,
        scale: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.num_embeddings = _checks.integer("num_embeddings", num_embeddings, 0, 2**32)
        self.embedding_dim = _checks.integer("embedding_dim", embedding_dim, 0)
        if padding_idx is not None:
            padding_idx = _checks.integer("padding_idx", padding_idx, -num_embeddings, num_embeddings - 1)
            padding_idx %= num_embeddings
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.seed = signed(_checks.integer("seed", seed))
        self.scale = float(scale)
        self._random_fraction = _fraction(random_fraction)
        complete = self._random_fraction < 1
        mask = None if learned is None else _mask(learned, num_embeddings)
        empty = torch.empty((num_embeddings, 0), device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(empty, requires_grad=False)
        self.register_buffer("next_sequence", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("always", None if mask is None else mask.to(device))
        slot = None if mask is None or complete else mask.long().cumsum(0) - 1
        self.register_buffer("slot", None if slot is None else slot.clamp(min=0).to(device))
        rows = None
        if complete or mask is not None:
            count = num_embeddings if complete else int(mask.sum())  # type: ignore[union-attr]
            rows = torch.nn.Parameter(torch.empty((count, embedding_dim), device=device, dtype=dtype))
        self.register_parameter("learned_rows", rows)
        self.reset_parameters()
        self._held: int | None = None

    @property
    def random_fraction(self) -> float:
        return self._random_fraction

    @random_fraction.setter
    def random_fraction(self, value: float) -> None:
        value = _fraction(value)
        if value < 1 and (self.learned_rows is None or len(self.learned_rows) < self.num_embeddings):
            raise ValueError(
                f"random_fraction is {value}; below 1 every token needs a learned row: build the layer "
                "with a random_fraction below 1"
            )
        self._random_fraction = value

    def reset_parameters(self) -> None:
        """Learned rows about N(0, scale^2); sequences from 0."""
        with torch.no_grad():
            self.next_sequence.zero_()
            if self.learned_rows is not None:
                torch.nn.init.normal_(self.learned_rows, std=self.scale)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = False, padding_idx: int | None = None, *,
        learned: Any = None, random_fraction: float = 1.0, **options: Any,
    ) -> LexinvariantEmbedding:  # fmt: skip
        """A layer whose learned rows are those of a dense table, (num_embeddings, embedding_dim)."""
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be 2-d, got shape {tuple(embeddings.shape)}")
        options = {"device": embeddings.device, "dtype": embeddings.dtype, **options}
        layer = cls(
            embeddings.shape[0],
            embeddings.shape[1],
            padding_idx,
            learned=learned,
            random_fraction=random_fraction,
            **options,
        )
        if layer.learned_rows is not None:
            rows = embeddings if layer.slot is None else embeddings[layer.always]
            layer.learned_rows = torch.nn.Parameter(rows.detach().clone(), requires_grad=not freeze)
        return layer

    # ---------------------------------------------------------------- keys
    def draw(self, batch: int) -> Tensor:
        """Keys of ``batch`` new sequences, int64 (batch,)."""
        keys = self.next_sequence + torch.arange(batch, device=self.next_sequence.device)
        if self._held is None:
            self.next_sequence.add_(batch)
        else:
            self._held = max(self._held, batch)
        return keys

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within it all calls have the same keys: entry b of every batch is one sequence."""
        if self._held is not None:
            raise RuntimeError("hold() is already in force")
        self._held = 0
        try:
            yield
        finally:
            self.next_sequence.add_(self._held)
            self._held = None

    # ---------------------------------------------------------------- rows
    def forward(self, input: Tensor, sequences: Tensor | None = None) -> Tensor:
        """Rows, (\\*input.shape, embedding_dim).

        Parameters
        ----------
        input : Tensor, shape (..., length), int64 or int32
            Each entry of the leading axes is a sequence.
        sequences : Tensor, shape input.shape[:-1], int64, optional
            Their keys; without it new ones are drawn.
        """
        check_ids(input, self.num_embeddings)
        shape = input.shape[:-1]
        if sequences is None:
            sequences = self.draw(prod(shape)).reshape(shape)
        return self._rows(input, sequences)

    def _rows(self, input: Tensor, sequences: Tensor) -> Tensor:
        name = str(self.weight.dtype).removeprefix("torch.")
        if self.learned_rows is not None and self.random_fraction == 0:
            rows = torch.nn.functional.embedding(input, self.learned_rows)
        else:
            rows = random_rows(
                input, self.embedding_dim, sequences, seed=self.seed, scale=self.scale, dtype=name
            )
            if self.learned_rows is not None:
                rows = self._mixed(input, sequences, rows)
        if self.padding_idx is not None:
            rows = rows.masked_fill((input == self.padding_idx).unsqueeze(-1), 0)
        return rows

    def _mixed(self, input: Tensor, sequences: Tensor, rows: Tensor) -> Tensor:
        assert self.learned_rows is not None
        chosen = None if self.always is None else self.always[input]
        if self.random_fraction < 1:
            word = random_rows(input, 1, sequences, seed=self.seed ^ _CHOICE, output="words").squeeze(-1)
            drawn = word.long() >= round(self.random_fraction * 2**32) - 2**31
            chosen = drawn if chosen is None else chosen | drawn
        if chosen is None or len(self.learned_rows) == 0:
            return rows
        slot = input if self.slot is None else self.slot[input]
        own = torch.nn.functional.embedding(slot, self.learned_rows)
        return torch.where(chosen.unsqueeze(-1), own, rows)

    def table(self, sequences: Tensor) -> Tensor:
        """All rows of each sequence, (\\*sequences.shape, num_embeddings, embedding_dim)."""
        ids = torch.arange(self.num_embeddings, device=sequences.device)
        return self._rows(ids.expand(*sequences.shape, -1), sequences)

    def logits(self, hidden: Tensor, sequences: Tensor) -> Tensor:
        """Tied head: products of hidden (batch, length, dim) with all rows of each sequence."""
        return hidden @ self.table(sequences).transpose(-1, -2).to(hidden.dtype)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, seed={self.seed}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.learned_rows is not None:
            text += f", learned={len(self.learned_rows)}, random_fraction={self.random_fraction:g}"
        return text


def _mask(learned: Any, rows: int) -> Tensor:
    """``learned`` as a bool mask over the tokens."""
    ids = torch.as_tensor(learned)
    if ids.dtype == torch.bool:
        if tuple(ids.shape) != (rows,):
            raise ValueError(f"learned has shape {tuple(ids.shape)}; a mask must be ({rows},)")
        return ids.cpu()
    if ids.numel() and ids.is_floating_point():
        raise TypeError(f"learned has dtype {ids.dtype}; it must be token ids or a bool mask")
    ids = check_ids(ids.reshape(-1).long().cpu(), rows)
    return torch.zeros(rows, dtype=torch.bool).index_fill(0, ids, True)


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"random_fraction must lie in [0, 1], got {value!r}")
    return float(value)
