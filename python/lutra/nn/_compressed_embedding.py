"""CompressedEmbedding: torch.nn.Embedding on a compressed table."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..compress._table import Table
from ..compress.formats.base import Format, make
from ._compressed import Compressed, as_tensor, encoded, padded_row


class CompressedEmbedding(Compressed, torch.nn.Embedding):
    """``torch.nn.Embedding`` whose table is stored as {name}.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    padding_idx : int, optional
        This row gets no gradient; it is kept exactly, in ``padding_row``.
    max_norm, norm_type : float
        Rows with a larger norm come out scaled to it. (torch changes the table itself; what a call gives is
        the same.)
    scale_grad_by_freq : bool, default False
        Divide a row's gradient by how often its id occurs in the call.
    sparse : bool, default False
        Sparse gradients of the arrays that have a row per id, where the format can; the others stay dense.
    device, dtype : optional
        dtype is that of the results and of the floating point arrays.
    format : str or Format, optional
        The format itself, in the place of its parameters.
    **parameters
        Of the format, see `lutra.compress.formats`.

    Attributes
    ----------
    format : Format
    weight : Parameter, shape (num_embeddings, 0)
        Stands for the table where libraries look at dtype, device or length.
    nbytes : int

    Notes
    -----
    Begins with random rows about N(0, 1), as torch's layer does, with torch's generator. `from_pretrained`,
    `from_embedding` and `from_table` take rows over.
    """

    _defaults: ClassVar[dict[str, Any]] = {
        "padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False,
    }  # fmt: skip

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        sparse: bool = False, device: Any = None, dtype: Any = None, *, format: str | Format | None = None,
        **parameters: Any,
    ) -> None:  # fmt: skip
        chosen = self.format_class(**parameters) if format is None else make(format, **parameters)
        self._begin(
            chosen, None, num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            sparse, device, dtype,
        )  # fmt: skip

    def _begin(
        self, format, data, rows, dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device,
        dtype, padding_row=None,
    ):  # fmt: skip
        if not isinstance(format, self.format_class):
            raise ValueError(
                f"{type(self).__name__} stores {self.format_class.name!r}, got {format.describe()!r}"
            )
        torch.nn.Module.__init__(self)  # not Embedding's: that one allocates the dense table
        self.num_embeddings, self.embedding_dim = rows, dim
        self.padding_idx = padded_row(padding_idx, rows)
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self._build(format, data, device, dtype)
        if self.padding_idx is not None:
            zeros = torch.zeros(dim, device=device, dtype=self.weight.dtype)
            self.register_buffer("padding_row", zeros if padding_row is None else padding_row.to(zeros))
        else:
            self.padding_row = None

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        sparse: bool = False, *, counts: Any = None, seed: int = 0, progress: bool | None = None,
        **parameters: Any,
    ) -> CompressedEmbedding:  # fmt: skip
        """A layer from a dense table (rows, dim).

        As ``torch.nn.Embedding.from_pretrained``, and besides: ``counts`` (how often each row is used),
        ``seed`` and ``progress`` of the encoding, and the parameters of the format (or ``format``).
        """
        chosen, data = encoded(cls, embeddings, counts, seed, progress, parameters)
        rows, dim = embeddings.shape
        layer = cls.__new__(cls)
        pad = padded_row(padding_idx, rows)
        layer._begin(
            chosen, data, rows, dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            embeddings.device, embeddings.dtype, None if pad is None else embeddings[pad].detach(),
        )  # fmt: skip
        if freeze:
            layer.requires_grad_(False)
        return layer

    @classmethod
    def from_embedding(cls, embedding: torch.nn.Embedding, **options: Any) -> CompressedEmbedding:
        """A layer from an ``nn.Embedding``: its rows, its settings, its training mode and requires_grad.

        ``options`` are ``counts``, ``seed``, ``progress`` and the parameters of the format.
        """
        layer = cls.from_pretrained(
            embedding.weight, not embedding.weight.requires_grad, embedding.padding_idx, embedding.max_norm,
            embedding.norm_type, embedding.scale_grad_by_freq, embedding.sparse, **options,
        )  # fmt: skip
        return layer.train(embedding.training)

    @classmethod
    def _taken(cls, table: Table, settings: dict[str, Any]) -> dict[str, Any]:
        pad = padded_row(settings["padding_idx"], table.shape[0])
        return {"padding_row": None if pad is None else _row(table, pad)}

    def forward(self, input: Tensor) -> Tensor:
        """The rows, shape (\\*input.shape, embedding_dim). Ids int32 or int64."""
        ids = input.reshape(-1)
        rows = self._rows(ids)
        if self.scale_grad_by_freq and rows.requires_grad:
            rows = GradByFrequency.apply(rows, ids)
        if self.padding_idx is not None:
            rows = torch.where((ids == self.padding_idx).unsqueeze(1), self.padding_row, rows)
        return rows.reshape(*input.shape, self.embedding_dim)


def _row(table: Table, row: int) -> Tensor:
    """One decoded row of a table."""
    if isinstance(next(iter(table.data.values())), np.ndarray):
        return as_tensor(table[np.array([row])])[0]
    return table[torch.tensor([row])][0].detach()


class GradByFrequency(torch.autograd.Function):
    """The identity on looked-up rows; the gradient of each is divided by how often its id occurs."""

    @staticmethod
    def forward(ctx, rows, ids):
        ctx.save_for_backward(ids)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        _, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        return grad / counts[inverse].unsqueeze(1).to(grad.dtype), None
