"""VTrans masks: dimensions or rows with a variational mask, dropped where it is mostly noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import _checks
from ._base import MethodEmbedding, MethodEmbeddingBag, TrainingMethod
from ._groups import check_rate
from ._sparse import column_bytes, column_table, csr_bytes, csr_table

if TYPE_CHECKING:
    from ...compress import Table


class VTrans(TrainingMethod):
    """Variational masks: rows are ``w * z``, z ~ N(mu, sigma²), for each dimension or each row.

    In training a mask is drawn for each entry of a call. In eval mode z is mu where ``mu² / sigma²`` is
    large, and 0 elsewhere.

    Parameters
    ----------
    granularity : {'dimension', 'row'}, default 'dimension'
    kl : float, default 1e-4
        `regularization` is ``kl / 2 * sum(log(1 + mu² / sigma²))``.
    threshold : float, default 0.0
        Dropped where ``log(sigma² / mu²)`` is at least this.

    Notes
    -----
    Dutta, Gupta, Agarwal, VTrans: Accelerating Transformer Compression with Variational Information
    Bottleneck based Pruning, 2024, whose masks are those of Dai, Zhu, Guo, Wipf, Compressing Neural Networks
    using the Variational Information Bottleneck, ICML 2018; mu begins at N(1, .01²), log sigma² at N(-9,
    .01²), as in the published code of the latter. (VTrans also steers the weight of the KL term to a wanted
    sparsity; here it is given.)

    Cost of a step: a plain embedding's, and a random number an entry; the KL term goes over all masks.

    Becomes: 'columns' (the dropped ones zero) for dimensions, 'csr' for rows.
    """

    mu: torch.nn.Parameter
    log_var: torch.nn.Parameter

    def _method(self, *, granularity: str = "dimension", kl: float = 1e-4, threshold: float = 0.0) -> None:
        self.by_row = bool(_checks.choice("granularity", granularity, {"dimension": 0, "row": 1}))
        self.kl = check_rate("kl", kl, 0.0, math.inf)
        self.threshold = check_rate("threshold", threshold, -1e4, 1e4)
        shape = (self.num_embeddings, 1) if self.by_row else (self.embedding_dim,)
        like = self.weight.detach()
        self.mu = torch.nn.Parameter(like.new_empty(shape).normal_(1.0, 0.01))
        self.log_var = torch.nn.Parameter(like.new_empty(shape).normal_(-9.0, 0.01))

    def _transform(self, raw: Tensor, ids: Tensor, training: bool) -> Tensor:
        mu, log_var = self.mu, self.log_var
        if self.by_row:
            mu, log_var = self._take(mu, ids), self._take(log_var, ids)
        if training:
            noise = torch.randn_like(raw[:, :1] if self.by_row else raw)
            return raw * (mu + torch.exp(0.5 * log_var) * noise)
        return raw * (mu * _kept(mu, log_var, self.threshold))

    def regularization(self) -> Tensor:
        """``kl / 2 * sum(log(1 + mu² / sigma²))``."""
        return self.kl / 2 * torch.log1p(self.mu.square() * torch.exp(-self.log_var)).sum()

    @torch.no_grad()
    def kept(self) -> Tensor:
        """Which dimensions (or rows) eval mode keeps: bool, (embedding_dim,) or (num_embeddings,)."""
        return _kept(self.mu, self.log_var, self.threshold).reshape(-1)

    def _table(self) -> Table:
        if self.by_row:
            return csr_table(self)
        return column_table(self, self.kept().nonzero().squeeze(1))

    def nbytes_compressed(self) -> int:
        return csr_bytes(self) if self.by_row else column_bytes(self, int(self.kept().sum()))


def _kept(mu: Tensor, log_var: Tensor, threshold: float) -> Tensor:
    """``log(sigma² / mu²) < threshold``, without dividing by a mu of zero."""
    return log_var.float() < threshold + torch.log(mu.float().square() + 1e-8)


class VTransEmbedding(VTrans, MethodEmbedding):
    pass


class VTransEmbeddingBag(VTrans, MethodEmbeddingBag):
    pass
