"""BackpackEmbedding and SenseDict: several rows a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..gather import Senses, bag, senses
from ..gather._senses import GRADIENTS
from ._compressed import padded_row


class BackpackEmbedding(torch.nn.Module):
    """Sense vectors, summed with weights that the context gives.

    Each token x has k sense vectors C(x)_1 ... C(x)_k. A Backpack model computes weights alpha from the
    sequence and represents position i as ``sum_j sum_l alpha[l, i, j] C(x_j)_l``.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    senses : int, default 16
        k, sense vectors of a token.
    padding_idx : int, optional
        This token's sense vectors begin as zeros and get no gradient.
    device, dtype
        As in ``torch.nn.Embedding``.

    Attributes
    ----------
    weight : Parameter, shape (num_embeddings, senses, embedding_dim)

    References
    ----------
    Hewitt, Thickstun, Manning and Liang, Backpack Language Models, ACL 2023, arXiv 2305.16765. (There C is a
    network on an embedding; its values for all tokens are the table that this layer holds.)

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.BackpackEmbedding(100, 8, senses=4)
    >>> ids = torch.tensor([[3, 5, 9]])
    >>> layer(ids, torch.rand(1, 4, 3, 3)).shape, layer(ids, torch.rand(1, 3, 4)).shape
    (torch.Size([1, 3, 8]), torch.Size([1, 3, 8]))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        senses: int = 16,
        *,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = _checks.integer("num_embeddings", num_embeddings, 0)
        self.embedding_dim = _checks.integer("embedding_dim", embedding_dim, 0)
        self.num_senses = _checks.integer("senses", senses, 1)
        self.padding_idx = padded_row(padding_idx, num_embeddings)
        shape = (num_embeddings, self.num_senses, embedding_dim)
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx] = 0

    @classmethod
    def from_pretrained(
        cls, table: Tensor, freeze: bool = True, padding_idx: int | None = None
    ) -> BackpackEmbedding:
        """A layer on given sense vectors, (num_embeddings, senses, embedding_dim)."""
        _sense_table(table)
        rows, count, dim = table.shape
        layer = cls(rows, dim, count, padding_idx=padding_idx, device="meta", dtype=table.dtype)
        layer.weight = torch.nn.Parameter(table, requires_grad=not freeze)
        return layer

    def senses(self, input: Tensor) -> Tensor:
        """Sense vectors of each token, (\\*input.shape, senses, embedding_dim)."""
        rows, count, dim = self.weight.shape
        flat = torch.nn.functional.embedding(input, self.weight.reshape(rows, count * dim), self.padding_idx)
        return flat.reshape(*input.shape, count, dim)

    def forward(self, input: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weighted sums of sense vectors.

        Parameters
        ----------
        input : Tensor, shape (..., n), int64 or int32
        weights : Tensor, optional
            - (..., senses, n, n): ``out[i] = sum_j sum_l weights[l, i, j] C(x_j)_l``, the Backpack;
            - (..., n, senses): ``out[i] = sum_l weights[i, l] C(x_i)_l``, each token for itself;
            - None: as the latter with weights of 1.

        Returns
        -------
        Tensor, shape (..., n, embedding_dim)

        Notes
        -----
        The Backpack's sum is a matrix product over the gathered vectors, n * senses rows. A token's own
        weighted sum is one bag (`lutra.gather.bag`): its rows are not written.
        """
        k, n = self.num_senses, input.shape[-1] if input.dim() else 1
        lead = tuple(input.shape[:-1])
        own, across = (*lead, n, k), (*lead, k, n, n)
        if input.dim() < 1:
            raise ValueError("input must have at least one axis, that of the positions")
        if weights is None or tuple(weights.shape) == own:
            return self._own(input, weights)
        if tuple(weights.shape) != across:
            raise ValueError(
                f"weights has shape {tuple(weights.shape)}; for input of shape {tuple(input.shape)} and {k} "
                f"senses it must be {across} or {own}"
            )
        # Sense by sense, on views, weights would not be copied, but their gradient takes half as long again.
        return torch.einsum("...lij,...jld->...id", weights, self.senses(input))

    def _own(self, input: Tensor, weights: Tensor | None) -> Tensor:
        rows, k, dim = self.weight.shape
        ids = input.reshape(-1, 1) * k + torch.arange(k, device=input.device, dtype=input.dtype)
        given = None if weights is None else weights.reshape(-1, k)
        if given is not None and not given.is_floating_point():
            raise TypeError(f"weights has dtype {given.dtype}; it must be a floating point type")
        out = bag(self.weight.reshape(rows * k, dim), ids, weights=given)
        return _constant(out.reshape(*input.shape, dim), input, self.padding_idx)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, senses={self.num_senses}"
        return text + _padding_repr(self.padding_idx)


class SenseDict(torch.nn.Module):
    """Each token as the one of its senses that fits the context vector best.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    senses : int or sequence of int, default 4
        Senses of a token; a sequence says how many each token has (at least 1 each).
    gradient : {'straight_through', 'softmax', 'hard'}, default 'straight_through'
        What the context receives, as in `lutra.gather.senses`.
    temperature : float, default 1.0
        Of gradient 'softmax'.
    padding_idx : int, optional
        This token's senses begin as zeros; they and the context at its places get no gradient.
    device, dtype
        As in ``torch.nn.Embedding``.

    Attributes
    ----------
    weight : Parameter, shape (num_embeddings, senses, embedding_dim), or (total, embedding_dim)
    offsets : buffer, shape (num_embeddings + 1,), int64, or None
        Where each token's senses begin, where tokens have different numbers of them.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.SenseDict(100, 8, senses=4)
    >>> layer(torch.tensor([[3, 5]]), torch.randn(1, 2, 8)).shape
    torch.Size([1, 2, 8])
    """

    offsets: Tensor | None

    def __init__(
        self, num_embeddings: int, embedding_dim: int, senses: Any = 4, *, gradient: str = "straight_through",
        temperature: float = 1.0, padding_idx: int | None = None, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_embeddings = _checks.integer("num_embeddings", num_embeddings, 0)
        self.embedding_dim = _checks.integer("embedding_dim", embedding_dim, 0)
        _checks.choice("gradient", gradient, GRADIENTS)
        self.gradient, self.temperature = gradient, _checks.positive("temperature", temperature)
        self.padding_idx = padded_row(padding_idx, num_embeddings)
        offsets = None
        shape: tuple[int, ...]
        if isinstance(senses, int):
            shape = (num_embeddings, _checks.integer("senses", senses, 1), embedding_dim)
        else:
            counts = torch.as_tensor(senses)
            if tuple(counts.shape) != (num_embeddings,) or counts.is_floating_point() or (counts < 1).any():
                raise ValueError(
                    f"senses must be one positive integer, or {num_embeddings} of them, one a token"
                )
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).long().to(device)
            shape = (int(counts.sum()), embedding_dim)
        self.register_buffer("offsets", offsets)
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight)
        if self.padding_idx is None or self.weight.is_meta:
            return
        first, end = self.padding_idx, self.padding_idx + 1
        if self.offsets is not None:
            first, end = self.offsets[first : end + 1].tolist()
        with torch.no_grad():
            self.weight[first:end] = 0

    @classmethod
    def from_pretrained(
        cls, table: Tensor, offsets: Tensor | None = None, freeze: bool = True, **options: Any
    ) -> SenseDict:
        """A layer on given senses: (num_embeddings, senses, dim), or (total, dim) with offsets.

        ``options`` are gradient, temperature and padding_idx, whose senses stay as they are given.
        """
        if offsets is None:
            _sense_table(table)
            layer = cls(
                table.shape[0], table.shape[2], table.shape[1], device="meta", dtype=table.dtype, **options
            )
        else:
            counts = offsets.diff()
            if (
                offsets.dim() != 1
                or len(offsets) < 1
                or int(offsets[0]) != 0
                or int(offsets[-1]) != len(table)
            ):
                raise ValueError(f"offsets must begin with 0 and end with {len(table)}, the rows of table")
            layer = cls(
                len(counts), table.shape[1], counts.cpu(), device="meta", dtype=table.dtype, **options
            )
            layer.offsets = offsets.long()
        layer.weight = torch.nn.Parameter(table, requires_grad=not freeze)
        return layer

    def choose(self, input: Tensor, context: Tensor) -> Senses:
        """Vectors, sense numbers and scores; see `lutra.gather.senses`."""
        out = senses(
            self.weight, input, context, self.offsets, gradient=self.gradient, temperature=self.temperature
        )
        return out._replace(vectors=_constant(out.vectors, input, self.padding_idx))

    def forward(self, input: Tensor, context: Tensor) -> Tensor:
        """The chosen senses, (\\*input.shape, embedding_dim); context has that shape too."""
        return self.choose(input, context).vectors

    def extra_repr(self) -> str:
        count = self.weight.shape[1] if self.offsets is None else f"{len(self.weight)} in all"
        text = f"{self.num_embeddings}, {self.embedding_dim}, senses={count}, gradient={self.gradient!r}"
        return text + _padding_repr(self.padding_idx)


def _constant(vectors: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """The same vectors; no gradient goes through those of the padding."""
    if padding_idx is None or not vectors.requires_grad:
        return vectors
    return torch.where((ids == padding_idx).unsqueeze(-1), vectors.detach(), vectors)


def _padding_repr(padding_idx: int | None) -> str:
    return "" if padding_idx is None else f", padding_idx={padding_idx}"


def _sense_table(table: Tensor) -> None:
    if table.dim() != 3 or not table.is_floating_point():
        raise ValueError(
            f"table must be floating point, (num_embeddings, senses, dim); got {table.dtype}, "
            f"{tuple(table.shape)}"
        )
