"""QLAE's quantizer on the rows of a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import _checks
from ._base import BLOCK, MethodEmbedding, MethodEmbeddingBag, TrainingMethod
from ._codebooks import straight_through
from ._groups import check_rate
from ._pq import pq_bytes, pq_table
from .scalar_quantize import scalar_codes, scalar_loss, scalar_values

if TYPE_CHECKING:
    from ...compress import Table


class QLAE(TrainingMethod):
    """Each dimension of a row to the nearest of its own learned values.

    Parameters
    ----------
    levels : int, default 16
        Values of each dimension, at most 256.
    quantization : float, default 1.0
    commitment : float, default 0.25
        `regularization` is ``quantization * mean((v - sg(w))²) + commitment * mean((w - sg(v))²)`` over the
        last call, for entries w and their values v (sg: no gradient). The paper has .01 for both, on latents
        in [-1/2, 1/2] and with strong weight decay around; rows of a table need to be followed closely.

    Notes
    -----
    Hsu, Dorrell, Whittington, Wu, Finn, Disentanglement via Latent Quantization, NeurIPS 2023, applied to a
    table; see `LatentQuantize` for vectors. The first values of a dimension are evenly spaced quantiles of
    its column. The gradient of the result goes straight through to the row; values learn from
    `regularization` alone.

    Cost of a step: a plain embedding's, and log2(levels) comparisons an entry.

    Becomes: 'pq' with a part for each dimension.
    """

    values: torch.nn.Parameter

    def _method(self, *, levels: int = 16, quantization: float = 1.0, commitment: float = 0.25) -> None:
        self.levels = _checks.integer("levels", levels, 1, 256)
        self.quantization = check_rate("quantization", quantization, 0.0, math.inf)
        self.commitment = check_rate("commitment", commitment, 0.0, math.inf)
        self.values = torch.nn.Parameter(self.weight.detach().new_empty(self.embedding_dim, self.levels))
        self.fit_values()

    @torch.no_grad()
    def fit_values(self) -> None:
        """Set each dimension's values to evenly spaced quantiles of its column (of 4,096 rows at most)."""
        rows = self.weight.detach()
        if rows.is_meta or not len(rows):
            self.values.zero_()
            return
        if len(rows) > 4096:
            rows = rows[torch.randperm(len(rows), device=rows.device)[:4096]]
        wide = rows if rows.dtype == torch.float64 else rows.float()
        at = (torch.arange(self.levels, device=rows.device, dtype=wide.dtype) + 0.5) / self.levels
        self.values.copy_(torch.quantile(wide, at, 0).T)

    def codes(self) -> Tensor:
        """The codes of all rows: int64 (num_embeddings, embedding_dim)."""
        return torch.cat([scalar_codes(rows, self.values) for rows in self.weight.split(BLOCK)])

    def _transform(self, raw: Tensor, ids: Tensor, training: bool) -> Tensor:
        values = scalar_values(scalar_codes(raw, self.values), self.values)
        if training and len(raw):
            self._loss = scalar_loss(raw, values, self.quantization, self.commitment)
        return straight_through(raw, values)

    def _table(self) -> Table:
        return pq_table(self, self.codes(), self.values.detach().unsqueeze(2))

    def nbytes_compressed(self) -> int:
        return pq_bytes(self, self.embedding_dim, self.levels)


class QLAEEmbedding(QLAE, MethodEmbedding):
    pass


class QLAEEmbeddingBag(QLAE, MethodEmbeddingBag):
    pass
