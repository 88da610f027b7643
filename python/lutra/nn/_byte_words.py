"""ByteWordPooling: a vector for each word out of those of its bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from ..address import word_offsets
from ..address._words import STYLES
from ..gather import bag

MODES = {"sum": 0, "mean": 1, "max": 2, "attention": 3}


class ByteWordPooling(torch.nn.Module):
    """Words as the sum, mean, maximum or weighted mean of the embeddings of their bytes.

    Parameters
    ----------
    embedding_dim : int
    mode : {'mean', 'sum', 'max', 'attention'}, default 'mean'
        ``'attention'``: weights are the softmax of ``<row, query> / sqrt(dim)`` over the bytes of a word,
        with a learned query.
    num_embeddings : int, default 256
        Values of a byte (more for byte tokenizers with special tokens).
    max_positions : int, default 0
        Where positive, the row of byte b at place p of its word is ``byte row b + position row p``; places
        from max_positions - 1 on share the last one.
    style : {'space', 'leading', 'spacebyte'}, default 'space'
        What a word is where no offsets are given (`lutra.address.word_offsets`).
    ignore : bytes or sequence of int, optional
        Values that are left out of the pooling, such as ``b" \\n"``. A word of such bytes only is zero.
    device, dtype
        As in ``torch.nn.Embedding``.

    Attributes
    ----------
    weight : Parameter, shape (num_embeddings + max_positions, embedding_dim)
        Rows of bytes, then rows of positions.
    query : Parameter, shape (embedding_dim,), mode 'attention' only

    Notes
    -----
    One `lutra.gather.bag` over the byte values: rows of single bytes are not written (but for mode 'max' with
    positions, in texts of fewer bytes than num_embeddings * max_positions). Gradients are deterministic.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.ByteWordPooling(8, ignore=b" ")
    >>> text = torch.frombuffer(bytearray(b"to be, or"), dtype=torch.uint8)
    >>> layer(text).shape
    torch.Size([3, 8])
    """

    skip: Tensor | None

    def __init__(
        self, embedding_dim: int, mode: str = "mean", *, num_embeddings: int = 256, max_positions: int = 0,
        style: str = "space", ignore: Any = None, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding_dim = _checks.integer("embedding_dim", embedding_dim, 1)
        self.num_embeddings = _checks.integer("num_embeddings", num_embeddings, 1)
        self.max_positions = _checks.integer("max_positions", max_positions, 0)
        _checks.choice("mode", mode, MODES)
        _checks.choice("style", style, STYLES)
        self.mode, self.style = mode, style
        ignored = sorted({_checks.integer("ignore", b, 0, num_embeddings - 1) for b in ignore or ()})
        #: Ignored values share the row of the first, which no other value has: the bag's padding.
        self.padding = ignored[0] if ignored else None
        skip = torch.zeros(num_embeddings, dtype=torch.bool, device=device) if ignored else None
        if skip is not None:
            skip[ignored] = True
        self.register_buffer("skip", skip)
        factory = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(
            torch.empty((num_embeddings + max_positions, embedding_dim), **factory)
        )
        query = torch.nn.Parameter(torch.empty(embedding_dim, **factory)) if mode == "attention" else None
        self.register_parameter("query", query)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight)
        if self.query is not None:
            torch.nn.init.normal_(self.query)

    def forward(self, input: Tensor, offsets: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Vectors of words.

        Parameters
        ----------
        input : Tensor, shape (n,) or (batch, length), uint8, int32 or int64
            Bytes; padding may hold any valid value.
        offsets : Tensor, shape (words + 1,) or (batch, words + 1), int64, optional
            Word w holds the bytes from offsets[w] to offsets[w + 1]. Without it words are found by ``style``.
        lengths : Tensor, shape (batch,), optional
            2-d without offsets: bytes of each text.

        Returns
        -------
        Tensor, shape (words, embedding_dim) or (batch, words, embedding_dim)
            Empty words, and those that pad a text, are zero.
        """
        if input.dtype not in (torch.uint8, torch.int32, torch.int64):
            raise TypeError(f"input has dtype {input.dtype}; it must be uint8, int32 or int64")
        if input.dim() not in (1, 2):
            raise ValueError(f"input must be (n,) or (batch, length), got shape {tuple(input.shape)}")
        if offsets is None:
            offsets = word_offsets(input, self.style, lengths)
        elif lengths is not None:
            raise ValueError(
                "lengths goes with words that are to be found; offsets say where they end already"
            )
        _check_offsets(offsets, input)
        if input.dim() == 1:
            return self._pool(input.int(), offsets.long())[:-1]
        batch, length = input.shape
        # A text is one word more: what is behind its last word, padding, up to the next text's first.
        starts = offsets.long() + torch.arange(batch, device=input.device)[:, None] * length
        out = self._pool(input.reshape(-1).int(), starts.reshape(-1))
        return out.reshape(batch, offsets.shape[1], self.embedding_dim)[:, :-1]

    # ---------------------------------------------------------------- one bag
    def _pool(self, values: Tensor, starts: Tensor) -> Tensor:
        """(len(starts), dim): the last word goes to the end."""
        skipped = None
        if self.skip is not None:
            skipped = self.skip[values.long()]
            values = torch.where(skipped, self.padding, values)
        word = place = None
        if self.max_positions or self.mode == "attention":
            at = torch.arange(len(values), device=values.device)
            word = torch.bucketize(at, starts, right=True)  # 0: before the first word
            if self.max_positions:
                first = F.pad(starts, (1, 0))[word]
                place = (at - first).clamp(max=self.max_positions - 1).int()
        if self.mode == "max" and place is not None:
            return self._maximum(values, place, skipped, starts)
        weights = None
        if self.mode == "attention":
            weights = self._attention(values, place, word, len(starts), skipped)
        mode = "mean" if self.mode == "mean" else "max" if self.mode == "max" else "sum"
        if place is not None:  # two entries a byte: its row and that of its place
            place = place + self.num_embeddings
            if skipped is not None:
                place = torch.where(skipped, self.padding, place)
            values, starts = torch.stack([values, place], -1).reshape(-1), starts * 2
            weights = None if weights is None else weights.repeat_interleave(2)
        out = bag(self.weight, values, starts.int(), weights, mode=mode, padding_idx=self.padding)
        return out * 2 if mode == "mean" and place is not None else out

    def _attention(self, values, place, word, words, skipped) -> Tensor:
        """Softmax over the bytes of each word, float32 (float64); 0 for bytes left out."""
        assert self.query is not None
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        row_scores = (self.weight.to(wide) @ self.query.to(wide)) / self.embedding_dim**0.5
        scores = row_scores[values.long()]
        if place is not None:
            scores = scores + row_scores[place.long() + self.num_embeddings]
        if skipped is not None:
            scores = scores.masked_fill(skipped, -torch.inf)
        top = (
            scores.detach()
            .new_full((words + 1,), -torch.inf)
            .scatter_reduce(0, word, scores.detach(), "amax")
        )
        top = top.masked_fill(top == -torch.inf, 0)  # a word of bytes that are all left out
        e = (scores - top[word]).exp()
        total = e.new_zeros(words + 1).index_add(0, word, e)
        return e / total.masked_fill(total == 0, 1)[word]

    def _maximum(self, values: Tensor, place: Tensor, skipped: Tensor | None, starts: Tensor) -> Tensor:
        """Maxima of sums of two rows: of all pairs of byte and place, or of the bytes if these are fewer."""
        n, pairs = self.num_embeddings, self.num_embeddings * self.max_positions
        if len(values) >= pairs:
            table = (self.weight[:n, None] + self.weight[None, n:]).reshape(pairs, self.embedding_dim)
            ids = values * self.max_positions + place
            pad = None
            if skipped is not None and self.padding is not None:
                pad = self.padding * self.max_positions
                ids = torch.where(skipped, pad, ids)
        else:
            table = F.embedding(values, self.weight[:n]) + F.embedding(place, self.weight[n:])
            ids, pad = torch.arange(len(values), device=values.device, dtype=torch.int32), None
            if skipped is not None:
                pad = len(values)
                table, ids = F.pad(table, (0, 0, 0, 1)), torch.where(skipped, pad, ids)
        return bag(table, ids, starts.int(), mode="max", padding_idx=pad)

    def extra_repr(self) -> str:
        text = f"{self.embedding_dim}, mode={self.mode!r}, num_embeddings={self.num_embeddings}"
        return text if not self.max_positions else f"{text}, max_positions={self.max_positions}"


def _check_offsets(offsets: Tensor, input: Tensor) -> None:
    lead = tuple(input.shape[:-1])
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets has dtype {offsets.dtype}; it must be int64 or int32")
    if offsets.dim() != input.dim() or tuple(offsets.shape[:-1]) != lead or offsets.shape[-1] < 1:
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)}; for input of shape {tuple(input.shape)} it must be "
            f"{(*lead, 'words + 1')}"
        )
    if torch.compiler.is_compiling() or not offsets.is_cpu or not offsets.numel():
        return
    length = input.shape[-1]
    bad = (offsets < 0) | (offsets > length)
    bad[..., 1:] |= offsets.diff() < 0
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"offsets[{', '.join(map(str, where))}] is {int(offsets[where])}; offsets must not decrease and "
            f"must lie in [0, {length}]"
        )
