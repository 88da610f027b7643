"""AutoDim: a dimension for each field, out of a few candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks
from ._base import MethodEmbedding, MethodEmbeddingBag, TrainingMethod
from ._groups import check_rate, row_groups
from ._sparse import group_bytes, group_table

if TYPE_CHECKING:
    from ...compress import Table

EPS = 1e-5


class AutoDim(TrainingMethod):
    """A choice among dimensions: rows are ``sum_n p_n BN_n(w[:d_n] @ W_n)``, p by a Gumbel softmax.

    Parameters
    ----------
    candidates : tuple of int, optional
        Dimensions to choose from, increasing. Default: embedding_dim and its halves down to 2, five at most.
    fields : int or integer array (num_embeddings,), default 1
        The field of each row, as in a recommender; or so many groups by frequency.
    counts : array, shape (num_embeddings,), optional
        How often each row is used, where ``fields`` is a number; without it rows are taken as ordered by
        frequency.
    min_temperature : float, default 0.01
        The temperature is ``max(min_temperature, 1 - 5e-5 t)`` after t steps.

    Attributes
    ----------
    alpha : Parameter, shape (fields, candidates)
        Logits of the choice.
    projection_0, ... : Parameters, shape (fields, d_n, embedding_dim)

    Notes
    -----
    Zhao, Liu, Liu, Tang, Guo, Shi, Wang, Gao, Long, AutoDim: Field-aware Embedding Dimension Search in
    Recommender Systems, WWW 2021: candidates share the first dimensions of one row (its weight sharing);
    each has a linear transform to the full dimension and a batch normalisation without parameters; one
    sample of p a call and field. They train alpha on held-out batches: give it an optimizer of its own. When
    the search is done, `choose` fixes the best candidate of each field, and the layer (without
    normalisation, as one candidate needs none) is trained on. Before `choose`, eval mode gives the likeliest
    candidate of each field.

    Cost of a step: for each row of the call the products with all candidates' projections, 2 dim sum(d_n)
    flops; after `choose` with one.

    Becomes: 'mixed' with a group of rows for each field.
    """

    alpha: torch.nn.Parameter
    group: Tensor
    chosen: Tensor
    steps: Tensor
    running_mean: Tensor
    running_var: Tensor

    def _method(
        self, *, candidates: Any = None, fields: Any = 1, counts: Any = None, min_temperature: float = 0.01
    ) -> None:
        dim = self.embedding_dim
        if candidates is None:
            candidates = sorted({max(1, dim >> i) for i in range(5) if i == 0 or dim >> i >= 2})
        self.candidates = tuple(_checks.integer("candidates", d, 1, dim) for d in candidates)
        if not self.candidates or list(self.candidates) != sorted(set(self.candidates)):
            raise ValueError(f"candidates must increase, got {tuple(candidates)}")
        self.min_temperature = check_rate("min_temperature", min_temperature, 1e-6, 1.0)
        group = row_groups("fields", fields, self.num_embeddings, counts).to(self.weight.device)
        self.num_fields = int(group.max()) + 1 if group.numel() else 1
        like, number = self.weight.detach(), len(self.candidates)
        self.register_buffer("group", group)
        self._choice: list[int] | None = None  # of chosen, where compilers see it
        self.register_buffer("chosen", torch.full((self.num_fields,), -1, device=like.device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=like.device))
        self.register_buffer("running_mean", like.new_zeros(self.num_fields, number, dim))
        self.register_buffer("running_var", like.new_ones(self.num_fields, number, dim))
        self.alpha = torch.nn.Parameter(like.new_zeros(self.num_fields, number))
        for n, d in enumerate(self.candidates):
            w = like.new_empty(self.num_fields, d, dim)
            self.register_parameter(f"projection_{n}", torch.nn.Parameter(w.normal_(0, d**-0.5)))

    @property
    def temperature(self) -> float:
        return max(self.min_temperature, 1 - 5e-5 * int(self.steps))

    @torch.no_grad()
    def step(self) -> None:
        """Count a step: the temperature falls."""
        self.steps += 1

    @torch.no_grad()
    def choose(self, dims: Any = None) -> list[int]:
        """Fix the dimension of each field and end the search.

        Parameters
        ----------
        dims : sequence of int, one a field, optional
            Of the candidates; default: those with the largest alpha.

        Returns
        -------
        list of int
        """
        if dims is None:
            best = self.alpha.argmax(1)
        else:
            given = [int(d) for d in dims]
            if len(given) != self.num_fields or not set(given) <= set(self.candidates):
                raise ValueError(
                    f"dims must hold {self.num_fields} of the candidates {self.candidates}, got {given}"
                )
            best = torch.tensor([self.candidates.index(d) for d in given], device=self.chosen.device)
        if self._choice is None:  # the normalisation's scale goes into the projections
            for n in range(len(self.candidates)):
                w = self._projection(n)
                w /= (self.running_var[:, n] + EPS).sqrt().unsqueeze(1).to(w)
        self.chosen.copy_(best)
        self._settle()
        return [self.candidates[n] for n in best.tolist()]

    def _settle(self) -> None:
        self._choice = self.chosen.tolist()
        self.alpha.requires_grad_(False)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if (self.chosen >= 0).all():
            self._settle()
        elif self._choice is not None:
            self._choice = None
            self.alpha.requires_grad_(True)

    def _projection(self, n: int) -> Tensor:
        return getattr(self, f"projection_{n}")

    def _transform(self, raw: Tensor, ids: Tensor, training: bool) -> Tensor:
        p = None
        if self._choice is None and training:
            tau = torch.clamp(1 - 5e-5 * self.steps, min=self.min_temperature).to(self.alpha.dtype)
            p = F.softmax((F.log_softmax(self.alpha, 1) + _gumbel(self.alpha)) / tau, 1)
        if self.num_fields == 1:
            return self._field(raw, 0, p)
        if not len(raw):
            return raw
        group = self.group[ids]
        out = torch.zeros_like(raw)
        for f in group.unique().tolist():
            here = (group == f).nonzero().squeeze(1)
            out = out.index_copy(0, here, self._field(raw[here], f, p))
        return out

    def _field(self, raw: Tensor, f: int, p: Tensor | None) -> Tensor:
        """Rows of one field: of the candidate chosen, or with p of all."""
        if p is None:
            n = int(self.alpha[f].argmax()) if self._choice is None else self._choice[f]
            out = self._product(raw, n, f)
            return self._normalised(out, f, n, False) if self._choice is None else out
        out = torch.zeros_like(raw)
        for n in range(len(self.candidates)):
            out = out + p[f, n] * self._normalised(self._product(raw, n, f), f, n, True)
        return out

    def _product(self, raw: Tensor, n: int, f: int) -> Tensor:
        product = raw[:, : self.candidates[n]] @ self._projection(n)[f]
        return product.to(raw.dtype)  # autocast's is narrower; an embedding's rows are not

    def _normalised(self, x: Tensor, f: int, n: int, training: bool) -> Tensor:
        training = training and len(x) > 1  # one row has no variance
        return F.batch_norm(x, self.running_mean[f, n], self.running_var[f, n], training=training, eps=EPS)

    def _table(self) -> Table:
        self._check_chosen()
        chosen = self.chosen.tolist()
        columns = [torch.arange(self.candidates[n], device=self.weight.device) for n in chosen]
        return group_table(self, self.group, columns, [self._projection(n)[f] for f, n in enumerate(chosen)])

    def nbytes_compressed(self) -> int:
        self._check_chosen()
        return group_bytes(self, self.group, [self.candidates[n] for n in self.chosen.tolist()])

    def _check_chosen(self) -> None:
        if self._choice is None:
            raise ValueError("the dimensions are still searched for: call choose() first, and train on")


def _gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


class AutoDimEmbedding(AutoDim, MethodEmbedding):
    pass


class AutoDimEmbeddingBag(AutoDim, MethodEmbeddingBag):
    pass
