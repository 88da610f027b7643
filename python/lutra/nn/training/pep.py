"""PEP: embeddings pruned by thresholds that are learned."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import _checks
from ._base import MethodEmbedding, MethodEmbeddingBag, TrainingMethod
from ._groups import check_rate
from ._sparse import csr_bytes, csr_table

if TYPE_CHECKING:
    from ...compress import Table

GRANULARITY = {"global": 0, "dimension": 1, "row": 2, "both": 3}


class PEP(TrainingMethod):
    """Soft thresholds that are learned: rows are ``sign(w) relu(|w| - sigmoid(s))``.

    Parameters
    ----------
    granularity : {'global', 'dimension', 'row', 'both'}, default 'row'
        One threshold s; one for each dimension; for each row; for each row and dimension.
    init : float, default -8.0
        First value of s: sigmoid(-8) = .0003. (The published code begins at -15.)
    decay : float, default 0.0
        `regularization` is ``decay / 2 * sum(s ** 2)``. It pulls s towards 0, that is the thresholds up, to
        1/2 at most: what the weight decay of the published code's optimizer does.

    Notes
    -----
    Liu, Gao, Chen, Jin, Li, Learnable Embedding Sizes for Recommender Systems, ICLR 2021. Where ``|w|`` is
    below the threshold the row's entry is zero and has no gradient, neither has its threshold.

    Cost: the published code transforms the whole table in each step; here only the rows of a call are, so
    that a step costs as much as a plain embedding's, and a threshold a row ('row') or a second row ('both').
    With ``decay``, also a pass over all thresholds.

    The paper trains the pruned table once more, from its first values: see `keep_zeros`.

    Becomes: 'csr'.
    """

    threshold: torch.nn.Parameter
    kept: Tensor | None

    def _method(self, *, granularity: str = "row", init: float = -8.0, decay: float = 0.0) -> None:
        _checks.choice("granularity", granularity, GRANULARITY)
        self.decay = check_rate("decay", decay, 0.0, math.inf)
        init = check_rate("init", init, -1e4, 1e4)
        shape = {
            "global": (1,), "dimension": (self.embedding_dim,), "row": (self.num_embeddings, 1),
            "both": (self.num_embeddings, self.embedding_dim),
        }[granularity]  # fmt: skip
        self.threshold = torch.nn.Parameter(self.weight.detach().new_full(shape, init))
        self.register_buffer("kept", None)

    def _transform(self, raw: Tensor, ids: Tensor, training: bool) -> Tensor:
        if self.kept is not None:
            return raw * self.kept[ids]
        s = self.threshold
        return soft_threshold(raw, torch.sigmoid(self._take(s, ids) if s.dim() == 2 else s))

    def regularization(self) -> Tensor:
        """``decay / 2 * sum(s ** 2)``."""
        if not self.decay:  # no gradient of zeros the size of the table
            return self.threshold.new_zeros(())
        return self.decay / 2 * self.threshold.square().sum()

    @torch.no_grad()
    def keep_zeros(self, weight: Tensor | None = None) -> None:
        """Fix which entries are zero, and train the others without thresholds from now on.

        Parameters
        ----------
        weight : Tensor, shape (num_embeddings, embedding_dim), optional
            Values to begin again from (the paper takes the first ones); else the entries keep their values.

        Notes
        -----
        Holds a mask of a byte an entry, ``kept``, which is part of the state_dict.
        """
        table = self.table()
        if weight is not None and weight.shape != table.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be {tuple(table.shape)}")
        self.kept = table != 0
        self.weight.copy_(torch.where(self.kept, table if weight is None else weight.to(table), 0))
        self.threshold.requires_grad_(False)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if self.kept is None and f"{prefix}kept" in state_dict:
            self.kept = torch.ones_like(self.weight, dtype=torch.bool)
            self.threshold.requires_grad_(False)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _table(self) -> Table:
        return csr_table(self)

    def nbytes_compressed(self) -> int:
        return csr_bytes(self)


def soft_threshold(w: Tensor, threshold: Tensor) -> Tensor:
    """``sign(w) relu(|w| - threshold)`` for thresholds >= 0."""
    return torch.sign(w) * torch.relu(w.abs() - threshold)


class PEPEmbedding(PEP, MethodEmbedding):
    pass


class PEPEmbeddingBag(PEP, MethodEmbeddingBag):
    pass
