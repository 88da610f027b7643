"""AutoSrh: which dimensions each frequency group needs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._base import MethodEmbedding, MethodEmbeddingBag, TrainingMethod
from ._groups import check_rate, row_groups
from ._sparse import group_bytes, group_table

if TYPE_CHECKING:
    from ...compress import Table


class AutoSrh(TrainingMethod):
    """A soft choice of dimensions by groups of rows: rows are ``w * alpha[group]``, alpha (groups, dim).

    Parameters
    ----------
    groups : int or integer array (num_embeddings,), default 8
        So many groups of about equal size by frequency, or the group of each row.
    counts : array, shape (num_embeddings,), optional
        How often each row is used. Without it rows are taken as ordered by frequency, the most frequent
        first.
    l1 : float, default 1e-4
        `regularization` is ``l1 * sum(|alpha|)``.

    Notes
    -----
    Kong, Cheng, Huang, Chen, Li, He, AutoSrh: An Embedding Dimensionality Search Framework for Tabular Data
    Prediction, TKDE 2022 (as DNIS, Cheng, Shen, Huang, Differentiable Neural Input Search for Recommender
    Systems, 2020). They train alpha on held-out batches, the rest on the others; that is up to the training
    loop: give alpha an optimizer of its own. The published code divides alpha by its sum over the
    dimensions; here it is free, as in the paper with L1. Alpha does not become exactly zero by itself:
    `prune` sets its smallest to zero for good; train on after that.

    Cost of a step: a plain embedding's, and one product a row.

    Becomes: 'mixed' with a group of rows for each group, which holds its own dimensions only.
    """

    alpha: torch.nn.Parameter
    group: Tensor
    kept: Tensor

    def _method(self, *, groups: Any = 8, counts: Any = None, l1: float = 1e-4) -> None:
        self.l1 = check_rate("l1", l1, 0.0, math.inf)
        group = row_groups("groups", groups, self.num_embeddings, counts).to(self.weight.device)
        number = int(group.max()) + 1 if group.numel() else 1
        self.register_buffer("group", group)
        self.alpha = torch.nn.Parameter(self.weight.detach().new_ones(number, self.embedding_dim))
        self.register_buffer("kept", torch.ones_like(self.alpha, dtype=torch.bool))

    def _transform(self, raw: Tensor, ids: Tensor, training: bool) -> Tensor:
        return raw * (self.alpha * self.kept)[self.group[ids]]

    def regularization(self) -> Tensor:
        """``l1 * sum(|alpha|)`` over what is not pruned."""
        return self.l1 * (self.alpha * self.kept).abs().sum()

    @torch.no_grad()
    def prune(self, sparsity: float) -> None:
        """Drop the dimensions of groups with the smallest ``|alpha|``, until that share of the table is zero.

        Parameters
        ----------
        sparsity : float in [0, 1)
            Entries of the table, so a dimension of a large group counts for more. The last one dropped is the
            one that reaches the share.
        """
        sparsity = check_rate("sparsity", sparsity)
        if sparsity == 1:
            raise ValueError("sparsity is 1.0; it must be below 1: something has to be left")
        sizes = torch.bincount(self.group, minlength=len(self.alpha)).double()
        size = (sizes / max(1, self.weight.numel())).unsqueeze(1).expand_as(self.alpha).reshape(-1)
        order = self.alpha.abs().masked_fill(~self.kept, 0).reshape(-1).argsort(stable=True)
        before = size[order].cumsum(0) - size[order]
        drop = order[before < sparsity - 1e-9]
        kept = torch.ones_like(self.kept).reshape(-1)
        kept[drop] = False
        self.kept.copy_(kept.reshape(self.kept.shape))

    def _columns(self) -> list[Tensor]:
        return [k.nonzero().squeeze(1) for k in self.kept]

    def _table(self) -> Table:
        columns = self._columns()
        diagonals = [torch.diag(a)[c] for a, c in zip(self.alpha.detach(), columns)]
        return group_table(self, self.group, columns, diagonals)

    def nbytes_compressed(self) -> int:
        return group_bytes(self, self.group, [len(c) for c in self._columns()])


class AutoSrhEmbedding(AutoSrh, MethodEmbedding):
    pass


class AutoSrhEmbeddingBag(AutoSrh, MethodEmbeddingBag):
    pass
