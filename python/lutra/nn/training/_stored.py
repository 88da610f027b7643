"""Layers whose table is not a dense ``weight``: what `adaptemb`, `cafe`, `cce`, `lpt` and `alpt` share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...compress.formats.base import check_ids
from .._common import check_bags
from .._compressed import padded_row
from .._compressed_embedding import GradByFrequency
from ._scaffold import Method, entries_of, matrix_shape, reduce_bags, take

_MASK = (1 << 64) - 1


def _signed(n: int) -> int:
    n &= _MASK
    return n - (1 << 64) if n >= 1 << 63 else n


def hashed(ids: Tensor, seed: int, size: int) -> Tensor:
    """Ids (int64) hashed to [0, size): splitmix64 of (seed, id), on any device."""

    def down(x: Tensor, n: int) -> Tensor:
        return (x >> n) & ((1 << (64 - n)) - 1)

    x = ids * _signed(0x9E3779B97F4A7C15) + _signed((seed + 1) * 0xD1342543DE82EF95)
    x = (x ^ down(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ down(x, 27)) * _signed(0x94D049BB133111EB)
    return down(x ^ down(x, 31), 1) % size


class Stored(Method, torch.nn.Module):
    """A layer of ``num_embeddings`` rows that are made from fewer bytes.

    ``weight`` is a Parameter of shape (num_embeddings, 0), for code that looks at an embedding's dtype,
    device or length. A method implements ``_method`` (its arrays), ``_fill`` (from a dense table), ``_rows``
    and, where it reduces bags itself, ``_bags``.
    """

    weight: torch.nn.Parameter
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    def _fill(self, dense: Tensor) -> None:
        """Take the rows of a dense table (rows, dim) over, as well as it goes."""
        raise NotImplementedError

    def _rows(self, ids: Tensor) -> Tensor:
        """Valid ids (n,) to (n, dim), with gradients."""
        raise NotImplementedError

    # ---------------------------------------------------------------- building
    def _begin(
        self, rows: int, dim: int, padding_idx: int | None, max_norm: float | None, norm_type: float,
        scale_grad_by_freq: bool, sparse: bool, device: Any, dtype: Any, method: dict[str, Any],
    ) -> None:  # fmt: skip
        self._refuse_unknown(method)
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = rows, dim
        self.padding_idx = padded_row(padding_idx, rows)
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        dtype = dtype or torch.get_default_dtype()
        stand_in = torch.empty(rows, 0, device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(stand_in, requires_grad=False)
        self._given = method
        self._method(**method)

    def _seed(self, seed: int | None) -> None:
        """Register ``seed``: given, or drawn from torch's generator. A buffer: hashes belong to a
        checkpoint.
        """
        value = int(torch.randint(2**31, ())) if seed is None else int(seed)
        self.register_buffer("seed", torch.tensor(value, dtype=torch.int64))
        self._seed_value: int | None = None

    def _seed_number(self) -> int:
        if self._seed_value is None:
            self._seed_value = int(self.seed)
        return self._seed_value

    #: Buffers that stay float32 when the layer is cast.
    _float32: tuple[str, ...] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: getattr(self, name) for name in self._float32 if hasattr(self, name)}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seed_value = None

    def _fresh(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.weight.device, dtype=self.weight.dtype)

    def reset_parameters(self) -> None:
        """Fresh rows, about N(0, 1)."""
        with torch.no_grad():
            self._fill(self._fresh(self.num_embeddings, self.embedding_dim))

    # ---------------------------------------------------------------- looking at it
    @property
    def nbytes(self) -> int:
        """Bytes of all that stands for the table: parameters and buffers (remaps, sketches, seeds too)."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The dense table, (num_embeddings, embedding_dim), without gradient."""
        step = 1 << 16
        ids = torch.arange(self.num_embeddings, device=self.weight.device)
        none = self.weight.new_zeros(0, self.embedding_dim)
        return torch.cat([none, *(self._values(i) for i in ids.split(step))])

    def _values(self, ids: Tensor) -> Tensor:
        """`_rows`, with the padding row as it comes out."""
        return self._rows(ids)

    def extra_repr(self) -> str:
        share = self.nbytes / max(1, self.num_embeddings * self.embedding_dim * self.weight.element_size())
        own = [f"{k}={v}" for k, v in self._given.items() if isinstance(v, (int, float, str))]
        return ", ".join([f"{self.num_embeddings}, {self.embedding_dim}", *own, f"{share:.2%} of dense"])

    # ---------------------------------------------------------------- computing
    def _take(self, table: Tensor, index: Tensor, padding: int | None = None) -> Tensor:
        """Rows of a parameter, with gradients that cost what they touch (see `lutra.nn.Embedding`)."""
        rows = take(table, index, padding, self.sparse)
        return F.embedding(index, table, padding, sparse=self.sparse) if rows is None else rows

    def _forward(self, ids: Tensor) -> Tensor:
        ids = check_ids(ids, self.num_embeddings)
        return self._given_out(ids.reshape(-1)).reshape(*ids.shape, self.embedding_dim)

    def _given_out(self, ids: Tensor) -> Tensor:
        """`_rows` with max_norm and scale_grad_by_freq."""
        rows = self._rows(ids)
        if self.scale_grad_by_freq and rows.requires_grad:
            rows = GradByFrequency.apply(rows, ids)
        return rows if self.max_norm is None else self._limited(rows)

    def _by_entry(self) -> bool:
        """Whether a bag needs the row of each entry by itself, since gradients go by ids, not by entries of a
        table.
        """
        return self.scale_grad_by_freq and torch.is_grad_enabled()

    def _limited(self, rows: Tensor) -> Tensor:
        """Rows with at most the norm ``max_norm``: what comes out, not what is stored."""
        with torch.no_grad():
            norm = rows.norm(p=self.norm_type, dim=1, keepdim=True)
            factor = torch.where(norm > self.max_norm, self.max_norm / (norm + 1e-7), torch.ones_like(norm))
        return rows * factor

    def _bags(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, mode: str, last: bool
    ) -> Tensor:
        """Bags of valid ids: rows, then `lutra.gather.bag`."""
        rows, entries, pad = entries_of(self._given_out(ids.reshape(-1)), ids, self.padding_idx)
        return reduce_bags(rows, entries, offsets, weights, mode, pad, last)


class StoredEmbedding(Stored, torch.nn.Embedding):
    """``torch.nn.Embedding``'s interface: its arguments, then by name those of a method."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        sparse: bool = False, device: Any = None, dtype: Any = None, **method: Any,
    ) -> None:  # fmt: skip
        self._begin(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            device, dtype, method,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """The rows, shape (\\*input.shape, embedding_dim).

        Raises
        ------
        TypeError, IndexError
            Ids of another type than int64 or int32, or outside [0, num_embeddings).
        """
        return self._forward(input)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        sparse: bool = False, **method: Any,
    ) -> Any:  # fmt: skip
        """A layer that begins as near a dense table (rows, dim) as the method can."""
        rows, dim = matrix_shape(embeddings)
        layer = cls(
            rows, dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, embeddings.device,
            embeddings.dtype, **method,
        )  # fmt: skip
        return _filled(layer, embeddings, freeze)


class StoredEmbeddingBag(Stored, torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag``'s interface: its arguments, then by name those of a method."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
        include_last_offset: bool = False, padding_idx: int | None = None, device: Any = None,
        dtype: Any = None, **method: Any,
    ) -> None:  # fmt: skip
        self._begin(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            device, dtype, method,
        )  # fmt: skip
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Bags of rows, (bags, embedding_dim); arguments and errors as `lutra.nn.EmbeddingBag`."""
        check_bags(self, input, offsets, per_sample_weights)
        ids = check_ids(input, self.num_embeddings)
        if offsets is not None:
            offsets = offsets.to(ids.dtype)
        last = self.include_last_offset and offsets is not None
        reduce = Stored._bags if self._by_entry() else type(self)._bags
        return reduce(self, ids, offsets, per_sample_weights, self.mode, last)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
        include_last_offset: bool = False, padding_idx: int | None = None, **method: Any,
    ) -> Any:  # fmt: skip
        """A layer that begins as near a dense table (rows, dim) as the method can."""
        rows, dim = matrix_shape(embeddings)
        layer = cls(
            rows, dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse, include_last_offset,
            padding_idx, embeddings.device, embeddings.dtype, **method,
        )  # fmt: skip
        return _filled(layer, embeddings, freeze)


def _filled(layer: Any, embeddings: Tensor, freeze: bool) -> Any:
    with torch.no_grad():
        layer._fill(embeddings.detach())
    if freeze:
        layer.requires_grad_(False)
    return layer


class Remapped(Stored):
    """Methods whose ids go to rows of one smaller parameter ``table``; the last row is the padding's, if
    any.
    """

    table: torch.nn.Parameter

    def _index(self, ids: Tensor) -> Tensor:
        """Rows of ``table`` for valid ids (n,), the padding id not treated."""
        raise NotImplementedError

    def _make(self, rows: int) -> None:
        """Create ``table`` of that many rows, and one for the padding."""
        self._height = rows
        table = self._fresh(rows + (self.padding_idx is not None), self.embedding_dim)
        if self.padding_idx is not None:
            table[-1] = 0
        self.table = torch.nn.Parameter(table)

    @property
    def _pad(self) -> int | None:
        return None if self.padding_idx is None else self._height

    def _place(self, ids: Tensor) -> Tensor:
        index = self._index(ids)
        if self.padding_idx is not None:
            index = torch.where(ids == self.padding_idx, self._height, index)
        return index

    def _renorm(self, index: Tensor) -> None:
        if self.max_norm is not None:
            torch.embedding_renorm_(self.table.detach(), index.contiguous(), self.max_norm, self.norm_type)

    def _limited(self, rows: Tensor) -> Tensor:
        return rows  # `_renorm` has seen to it

    def _rows(self, ids: Tensor) -> Tensor:
        index = self._place(ids)
        self._renorm(index)
        return self._take(self.table, index, self._pad)

    def _values(self, ids: Tensor) -> Tensor:
        return self.table[self._place(ids)]

    def _bags(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, mode: str, last: bool
    ) -> Tensor:
        index = self._place(ids.reshape(-1)).reshape(ids.shape)
        self._renorm(index)
        return reduce_bags(self.table, index, offsets, weights, mode, self._pad, last, self.sparse)

    def _fill_means(self, dense: Tensor) -> None:
        """Each row of ``table`` becomes the mean of the rows that go to it."""
        index = self._place(torch.arange(len(dense), device=dense.device))
        wide = torch.float64 if dense.dtype == torch.float64 else torch.float32
        sums = torch.zeros(self.table.shape, dtype=wide, device=dense.device)
        sums.index_add_(0, index, dense.to(sums.dtype))
        count = torch.bincount(index, minlength=len(sums)).unsqueeze(1)
        self.table.copy_(torch.where(count > 0, sums / count.clamp(min=1), self.table.to(sums.dtype)))
        if self.padding_idx is not None:
            self.table[-1] = dense[self.padding_idx]
