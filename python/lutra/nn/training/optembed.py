"""OptEmbed: which rows, and how many dimensions of each field, are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import _checks
from ._base import MethodEmbedding, MethodEmbeddingBag, TrainingMethod
from ._groups import check_rate, row_groups
from ._sparse import csr_bytes, csr_table

if TYPE_CHECKING:
    from ...compress import Table


class Step(torch.autograd.Function):
    """``[x > 0]``, with the long-tailed estimator for its derivative.

    2 - 4|x| for |x| <= .4, then .4 to |x| = 1, then 0 (Xu, Cheung, Accurate and Compact Convolutional Neural
    Networks with Trained Binarization, 2019; Liu et al., Dynamic Sparse Training, ICLR 2020).
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        far = x.abs()
        slope = torch.where(far <= 0.4, 2 - 4 * far, (far <= 1).to(far.dtype) * 0.4)
        return grad * slope


class OptEmbed(TrainingMethod):
    """Masks of rows and of dimensions: rows are ``[norm(w) > t] * w``, cut to their first dimensions.

    Parameters
    ----------
    fields : int or integer array (num_embeddings,), default 1
        The field of each row, as in a recommender; or so many groups by frequency.
    counts : array, shape (num_embeddings,), optional
        How often each row is used, where ``fields`` is a number; without it rows are taken as ordered by
        frequency.
    granularity : {'field', 'row'}, default 'field'
        A threshold t for each field, or each row.
    norm : {1, 2}, default 1
    alpha : float, default 3e-4
        `regularization` is ``alpha * sum(exp(-t))``, which drives thresholds up.
    supernet : bool, default True
        In training, each entry of a call is cut to a random number of dimensions, 1 to embedding_dim, so that
        every cut is trained. Set ``layer.supernet = False`` to train with ``dims``.

    Attributes
    ----------
    dims : Tensor, shape (fields,), int64
        Dimensions kept of each field outside of the supernet; all, before `set_dims` or `search`.

    Notes
    -----
    Lyu, Tang, Zhu, Guo, Liu, Liu, He, Zhang, OptEmbed: Learning Optimal Embedding Table for Click-through
    Rate Prediction, CIKM 2022. As in the published code: the norm is of the whole row (its mode 'all'), the
    row mask has a straight-through gradient (`Step`) to t and to w, t begins at 0, and dimensions are
    searched by evolution afterwards. The search here keeps the best candidates as parents; the published one
    mutates them in place.

    Cost of a step: a plain embedding's, and a norm a row.

    Becomes: 'csr'.
    """

    threshold: torch.nn.Parameter
    group: Tensor
    dims: Tensor

    def _method(
        self, *, fields: Any = 1, counts: Any = None, granularity: str = "field", norm: int = 1,
        alpha: float = 3e-4, supernet: bool = True,
    ) -> None:  # fmt: skip
        by_row = bool(_checks.choice("granularity", granularity, {"field": 0, "row": 1}))
        self.norm = _checks.integer("norm", norm, 1, 2)
        self.alpha = check_rate("alpha", alpha, 0.0, math.inf)
        self.supernet = bool(supernet)
        group = row_groups("fields", fields, self.num_embeddings, counts).to(self.weight.device)
        self.num_fields = int(group.max()) + 1 if group.numel() else 1
        self.register_buffer("group", group)
        self.register_buffer("dims", torch.full((self.num_fields,), self.embedding_dim, device=group.device))
        shape = (self.num_embeddings if by_row else self.num_fields, 1)
        self.threshold = torch.nn.Parameter(self.weight.detach().new_zeros(shape))
        self.by_row = by_row

    def _transform(self, raw: Tensor, ids: Tensor, training: bool) -> Tensor:
        group = self.group[ids]
        t = self._take(self.threshold, ids) if self.by_row else self.threshold[group]
        mask = Step.apply(raw.norm(self.norm, 1, keepdim=True) - t)
        if training and self.supernet:
            dims = torch.randint(1, self.embedding_dim + 1, ids.shape, device=raw.device)
        else:
            dims = self.dims[group]
        places = torch.arange(self.embedding_dim, device=raw.device)
        return raw * (mask * (places < dims.unsqueeze(1)))

    def regularization(self) -> Tensor:
        """``alpha * sum(exp(-t))``."""
        return self.alpha * torch.exp(-self.threshold).sum()

    def set_dims(self, dims: Any) -> None:
        """Keep the first ``dims[f]`` dimensions of each field f, and leave the supernet."""
        dims = torch.as_tensor(dims)
        if dims.shape != self.dims.shape or dims.is_floating_point():
            raise ValueError(
                f"dims must hold {self.num_fields} integers, one a field; got shape {tuple(dims.shape)}, "
                f"{str(dims.dtype).removeprefix('torch.')}"
            )
        if int(dims.min()) < 1 or int(dims.max()) > self.embedding_dim:
            raise ValueError(f"dims must lie in [1, {self.embedding_dim}], got {dims.tolist()[:10]}")
        self.dims.copy_(dims)
        self.supernet = False

    def search(
        self, score: Callable[[], float], *, generations: int = 10, population: int = 20,
        mutation: float = 0.1, budget: float = 1.0, seed: int = 0,
    ) -> list[int]:  # fmt: skip
        """Search the dimensions of fields by evolution; the best are set (`set_dims`) and given back.

        Parameters
        ----------
        score : callable
            Loss of the model on held-out data with the layer as it is then (smaller is better).
        generations, population : int
            ``score`` is called about half of their product times.
        mutation : float
            How likely a field changes.
        budget : float in (0, 1]
            Candidates keep at most this share of the table, by their dimensions.
        seed : int
        """
        _checks.integer("generations", generations, 1)
        _checks.integer("population", population, 2)
        mutation, budget = check_rate("mutation", mutation), check_rate("budget", budget)
        rng = torch.Generator().manual_seed(seed)
        sizes = torch.bincount(self.group.cpu(), minlength=self.num_fields).double()
        if float(sizes.sum()) > budget * self.weight.numel():
            raise ValueError(f"budget is {budget}; one dimension of every field is {1 / self.embedding_dim}")
        limit = budget * self.weight.numel()
        known: dict[tuple[int, ...], float] = {}
        before = self.dims.clone(), self.supernet

        def fit(dims: Tensor) -> tuple[int, ...]:
            while float(dims.double() @ sizes) > limit + 1e-9:  # thin a random field
                wide = (dims > 1).nonzero().squeeze(1)
                field = wide[torch.randint(len(wide), (), generator=rng)]
                dims[field] = torch.randint(1, int(dims[field]), (), generator=rng)
            return tuple(dims.tolist())

        def draw(*shape: int) -> Tensor:
            return torch.randint(1, self.embedding_dim + 1, shape, generator=rng)

        try:
            found = {fit(draw(self.num_fields)) for _ in range(population)}
            for _ in range(generations):
                for dims in sorted(found - set(known)):
                    self.set_dims(dims)
                    known[dims] = float(score())
                parents = sorted(known, key=known.__getitem__)[: max(2, population // 2)]
                found = set()
                for _ in range(population // 2):
                    a, b = (
                        torch.tensor(parents[int(torch.randint(len(parents), (), generator=rng))])
                        for _ in "ab"
                    )
                    child = torch.where(torch.rand(self.num_fields, generator=rng) < 0.5, a, b)
                    change = torch.rand(self.num_fields, generator=rng) < mutation
                    found.add(fit(torch.where(change, draw(self.num_fields), child)))
        except BaseException:
            self.dims.copy_(before[0])
            self.supernet = before[1]
            raise
        best = min(known, key=known.__getitem__)
        self.set_dims(best)
        return list(best)

    def _table(self) -> Table:
        return csr_table(self)

    def nbytes_compressed(self) -> int:
        return csr_bytes(self)


class OptEmbedding(OptEmbed, MethodEmbedding):
    pass


class OptEmbeddingBag(OptEmbed, MethodEmbeddingBag):
    pass
