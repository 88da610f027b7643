"""Sampled softmax: drawing ids, how often each is expected, and the loss."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor


class Distribution:
    """Ids to draw: 'log_uniform', 'uniform', or weights (rows,)."""

    def __init__(self, kind: Any, rows: int, device: torch.device) -> None:
        self.rows, self.device, self.kind = rows, device, kind
        if isinstance(kind, Tensor):
            if tuple(kind.shape) != (rows,) or not kind.is_floating_point():
                raise ValueError(
                    f"distribution must be a floating point tensor of shape ({rows},), "
                    f"got {tuple(kind.shape)} of {kind.dtype}"
                )
            # float64: the cumulated sum of a large vocabulary needs it
            weights = kind.detach().to(device, torch.float64)
            if not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < torch.inf:
                raise ValueError("distribution must hold finite weights >= 0, not all of them 0")
            self.p = weights / weights.sum()
            self.upto = self.p.cumsum(0)
            self.support = int((weights > 0).sum())
        elif kind in ("log_uniform", "uniform"):
            self.support = rows
        else:
            raise ValueError(f"distribution must be 'log_uniform', 'uniform' or a tensor, got {kind!r}")

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Ids (count,), with repeats."""
        if isinstance(self.kind, Tensor):
            u = (
                torch.rand(count, generator=generator, device=self.device, dtype=torch.float64)
                * self.upto[-1]
            )
            return torch.searchsorted(self.upto, u, right=True).clamp_(max=self.rows - 1)
        if self.kind == "uniform":
            return torch.randint(self.rows, (count,), generator=generator, device=self.device)
        u = torch.rand(count, generator=generator, device=self.device, dtype=torch.float64)
        return ((u * log(self.rows + 1)).exp_().long() - 1).clamp_(0, self.rows - 1)

    def probability(self, ids: Tensor) -> Tensor:
        """Of each id, float64."""
        if isinstance(self.kind, Tensor):
            return self.p[ids]
        if self.kind == "uniform":
            return torch.full(ids.shape, 1 / self.rows, device=ids.device, dtype=torch.float64)
        return torch.log1p(1 / (ids.double() + 1)) / log(self.rows + 1)

    def sample(self, count: int, unique: bool, generator: torch.Generator | None) -> tuple[Tensor, int]:
        """Ids (count,) and how many were drawn for them."""
        if not unique:
            return self.draw(count, generator), count
        if count > self.support:
            raise ValueError(
                f"num_samples is {count}, but only {self.support} ids have a probability above 0; "
                "draw fewer or use unique=False"
            )
        drawn = self.draw(count + count // 4 + 8, generator)
        while True:
            ids, first = first_places(drawn)
            if len(ids) >= count:
                places = first.sort().values[
                    :count
                ]  # the first `count` different ones, in the order of drawing
                return drawn[places], int(places[-1]) + 1
            if len(drawn) > 64 * count + 4096:  # nearly all the ids there are: the rest would take for ever
                return self._fill(ids, drawn, count, generator), len(drawn)
            drawn = torch.cat([drawn, self.draw(len(drawn), generator)])

    def _fill(self, ids: Tensor, drawn: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """The ids drawn, and of those left the likeliest by Gumbel's trick, to make ``count``."""
        keys = self.probability(torch.arange(self.rows, device=self.device)).log()
        u = torch.rand(self.rows, generator=generator, device=self.device, dtype=torch.float64)
        keys = keys - (-u.log()).log()
        keys[ids] = -torch.inf
        return torch.cat([ids, keys.topk(count - len(ids)).indices])

    def expected(self, ids: Tensor, drawn: int, unique: bool) -> Tensor:
        """Logarithm of how often each id is expected in a sample that took ``drawn`` draws."""
        p = self.probability(ids)
        count = -torch.expm1(drawn * torch.log1p(-p.clamp(max=1 - 1e-12))) if unique else drawn * p
        return count.clamp(min=1e-300).log()


def first_places(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The different ids and where each occurs first."""
    ids, inverse = torch.unique(drawn, return_inverse=True)
    places = torch.arange(len(drawn), device=drawn.device)
    first = torch.full((len(ids),), len(drawn), device=drawn.device)
    return ids, first.scatter_reduce_(0, inverse, places, "amin")


def sampled_loss(
    head: Any,
    hidden: Tensor,
    targets: Tensor,
    count: int,
    kind: Any,
    unique: bool,
    remove_hits: bool,
    generator: Any,
) -> Tensor:
    """The loss of each token, float32 or wider."""
    source = Distribution(kind, head.out_features, hidden.device)
    samples, drawn = source.sample(count, unique, generator)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # One look-up for both, so that a row that is target and sample is decoded, and has its gradient, in one
    # place.
    rows = head._rows(torch.cat([targets, samples])).to(hidden.dtype)
    n = len(targets)
    true = (hidden * rows[:n]).sum(1, dtype=wide)
    other = (hidden @ rows[n:].T).to(wide)
    if head.bias is not None:
        true = true + head.bias[targets].to(wide)
        other = other + head.bias[samples].to(wide)
    true = true - source.expected(targets, drawn, unique).to(wide)
    other = other - source.expected(samples, drawn, unique).to(wide)
    if remove_hits:
        other = other.masked_fill(targets.unsqueeze(1) == samples, -torch.inf)
    logits = torch.cat([true.unsqueeze(1), other], 1)
    return torch.logsumexp(logits, 1) - true
