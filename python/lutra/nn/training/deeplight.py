"""DeepLight: magnitude pruning at a rate that grows."""

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

#: Above so many entries the threshold of a scheduled pruning comes from a sample of as many.
SAMPLE = 1 << 21


class DeepLight(TrainingMethod):
    """Magnitude pruning in training: every few steps the smallest entries of the table are set to zero.

    After t steps (those of the warm-up left out) the share that is pruned is
    ``rate * (1 - damping ** (t / 100))``. Pruned entries go on being trained, and come back where
    they grow past the threshold before the next pruning.

    Parameters
    ----------
    rate : float, default 0.9
        The share of zeros that the schedule goes to, in [0, 1).
    damping : float, default 0.99
        In (0, 1): the smaller, the faster.
    interval : int, default 10
        Steps between prunings.
    warmup : int, default 0
        Steps before the first.

    Notes
    -----
    Deng, Pan, Zhou, Kong, Flores, Lin, DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR
    Predictions in Ad Serving, WSDM 2021; schedule and interval as in the published code.

    Cost: look-ups are a plain embedding's. `step` does nothing but count, and every ``interval`` steps goes
    over the table (two passes; at most 2^21 entries are looked at for the threshold then, so that the share
    is exact to about .1 %). `prune` is exact: call it last, since the entries that came back after the last
    pruning are in the table.

    Becomes: 'csr'.
    """

    steps: Tensor

    def _method(
        self, *, rate: float = 0.9, damping: float = 0.99, interval: int = 10, warmup: int = 0
    ) -> None:
        self.rate = check_rate("rate", rate)
        if self.rate == 1:
            raise ValueError("rate is 1.0; it must be below 1: something has to be left")
        self.damping = check_rate("damping", damping)
        if not 0 < self.damping < 1:
            raise ValueError(f"damping is {self.damping}; it must lie in (0, 1)")
        self.interval = _checks.integer("interval", interval, 1)
        self.warmup = _checks.integer("warmup", warmup, 0)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    def _transform(self, raw: Tensor, ids: Tensor, training: bool) -> Tensor:
        return raw

    @property
    def current_rate(self) -> float:
        """The share to prune now: ``rate * (1 - damping ** (t / 100))``."""
        return self.rate * (1 - self.damping ** (max(0, int(self.steps) - self.warmup) / 100))

    @torch.no_grad()
    def step(self) -> None:
        """Count a step; every ``interval`` steps, prune to `current_rate`."""
        self.steps += 1
        t = int(self.steps) - self.warmup
        if t > 0 and t % self.interval == 0:
            self._prune(self.current_rate, SAMPLE)

    def prune(self, rate: float | None = None) -> None:
        """Set the smallest entries to zero, exactly that share of them (`current_rate` by default)."""
        self._prune(self.current_rate if rate is None else check_rate("rate", rate), None)

    @torch.no_grad()
    def _prune(self, rate: float, sample: int | None) -> None:
        flat = self.weight.detach().view(-1)
        seen = flat
        if sample is not None and flat.numel() > sample:
            seen = flat[torch.randint(flat.numel(), (sample,), device=flat.device)]
        k = math.floor(rate * seen.numel())
        if k == 0:
            return
        seen = seen.abs()
        seen = seen if seen.dtype == torch.float64 else seen.float()  # kthvalue knows no float16
        threshold = float(seen.kthvalue(k).values)
        flat.masked_fill_(flat.abs() <= threshold, 0)

    def _table(self) -> Table:
        return csr_table(self)

    def nbytes_compressed(self) -> int:
        return csr_bytes(self)


class DeepLightEmbedding(DeepLight, MethodEmbedding):
    pass


class DeepLightEmbeddingBag(DeepLight, MethodEmbeddingBag):
    pass
