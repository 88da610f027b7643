"""CompressedEmbeddingBag: torch.nn.EmbeddingBag on a compressed table."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compress.formats.base import Format, make
from ..gather import bag
from ._common import ScaleByFrequency, check_bags
from ._compressed import Compressed, encoded, padded_row


class CompressedEmbeddingBag(Compressed, torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` whose table is stored as {name}.

    Parameters
    ----------
    num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse
        As in ``torch.nn.EmbeddingBag``; max_norm and sparse as in the Embedding of this format.
    include_last_offset, padding_idx, device, dtype
        As in ``torch.nn.EmbeddingBag``.
    format : str or Format, optional
        The format itself, in the place of its parameters.
    **parameters
        Of the format, see `lutra.compress.formats`.
    """

    _defaults: ClassVar[dict[str, Any]] = {
        "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "mode": "mean", "sparse": False,
        "include_last_offset": False, "padding_idx": None,
    }  # fmt: skip

    def __init__(
        self, num_embeddings: int, embedding_dim: int, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
        include_last_offset: bool = False, padding_idx: int | None = None, device: Any = None,
        dtype: Any = None, *, format: str | Format | None = None, **parameters: Any,
    ) -> None:  # fmt: skip
        chosen = self.format_class(**parameters) if format is None else make(format, **parameters)
        self._begin(
            chosen, None, num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode,
            sparse, include_last_offset, padding_idx, device, dtype,
        )  # fmt: skip

    def _begin(
        self, format, data, rows, dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
        include_last_offset, padding_idx, device, dtype,
    ):  # fmt: skip
        if not isinstance(format, self.format_class):
            raise ValueError(
                f"{type(self).__name__} stores {self.format_class.name!r}, got {format.describe()!r}"
            )
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = rows, dim
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.mode, self.sparse = scale_grad_by_freq, mode, sparse
        self.include_last_offset = include_last_offset
        self.padding_idx = padded_row(padding_idx, rows)
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be one of 'sum', 'mean', 'max'; got {mode!r}")
        self._build(format, data, device, dtype)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
        include_last_offset: bool = False, padding_idx: int | None = None, *, counts: Any = None,
        seed: int = 0, progress: bool | None = None, **parameters: Any,
    ) -> CompressedEmbeddingBag:  # fmt: skip
        """A layer from a dense table (rows, dim); see the Embedding of this format."""
        chosen, data = encoded(cls, embeddings, counts, seed, progress, parameters)
        layer = cls.__new__(cls)
        layer._begin(
            chosen, data, embeddings.shape[0], embeddings.shape[1], max_norm, norm_type, scale_grad_by_freq,
            mode, sparse, include_last_offset, padding_idx, embeddings.device, embeddings.dtype,
        )  # fmt: skip
        if freeze:
            layer.requires_grad_(False)
        return layer

    @classmethod
    def from_embedding(cls, embedding: torch.nn.EmbeddingBag, **options: Any) -> CompressedEmbeddingBag:
        """A layer from an ``nn.EmbeddingBag``: its rows, its settings, its training mode and
        requires_grad."""
        layer = cls.from_pretrained(
            embedding.weight, not embedding.weight.requires_grad, embedding.max_norm, embedding.norm_type,
            embedding.scale_grad_by_freq, embedding.mode, embedding.sparse, embedding.include_last_offset,
            embedding.padding_idx, **options,
        )  # fmt: skip
        return layer.train(embedding.training)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Bags of rows, (bags, embedding_dim); see ``torch.nn.EmbeddingBag``."""
        check_bags(self, input, offsets, per_sample_weights)
        last = self.include_last_offset and offsets is not None
        options: dict[str, Any] = {
            "mode": self.mode,
            "padding_idx": self.padding_idx,
            "include_last_offset": last,
        }
        if self.max_norm is None and not self.scale_grad_by_freq:
            out = self.format.bag(
                self._data(), self._shape, input, offsets, per_sample_weights, sparse=self.sparse, **options
            )
            return out.to(self.weight.dtype)
        ids, inverse = torch.unique(
            input, return_inverse=True
        )  # these two change rows before they are summed
        rows = self._rows(ids)
        if self.scale_grad_by_freq and rows.requires_grad:
            rows = ScaleByFrequency.apply(rows, inverse, False)
        if self.padding_idx is not None:
            inverse = torch.where(input == self.padding_idx, len(ids), inverse)
            rows = torch.cat([rows, rows.new_zeros(1, self.embedding_dim)])
            options["padding_idx"] = len(ids)
        return bag(rows, inverse, offsets, per_sample_weights, **options)
