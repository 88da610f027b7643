"""ALPT: integer rows with a step for each row that is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from ...gather._update import not_negative
from ._packed import Packed, at_random, check_seed, nearest
from ._stored import StoredEmbedding, StoredEmbeddingBag


class _ALPT(Packed):
    """ALPT: integer rows ``step * code``, codes in [-2**(bits-1), 2**(bits-1) - 1], whose step is learned.

    Parameters
    ----------
    bits : {8, 4, 2}, default 8
    step_lr : float, default 1e-3
        Learning rate of the steps, which go down their gradient as it is, whatever the optimizer.
    seed : int, optional
        Of the rounding; default from torch's generator. A buffer.

    Notes
    -----
    As `LPTEmbedding`, the table has no float copy and the layer must be attached to an optimizer of
    `lutra.optim`. With g the gradient of a touched row: the row w is decoded and updated to w'; its step D
    goes down the gradient ``sum_j g_j dQ(w'_j, D)/dD / sqrt(B * dim * (2**(bits-1) - 1))``, where B is the
    number of vectors that the step's calls gave, and dQ/dD is -2**(bits-1) or 2**(bits-1) - 1 where w'/D is
    clipped, else round(w'/D) - w'/D; then w' is stored with the new step by stochastic rounding. A step is at
    most halved at a time.

    The paper takes the steps' gradient from a second forward and backward pass with the quantized w'; here g
    of the one pass there is stands for it. Memory, `nbytes`: ``dim * bits / 8`` bytes a row and 8 (8 bits:
    the step and the minimum that the format stores; 4 and 2 bits: these as float16, and the step in float32).
    Becomes: 'int8', 'int4' or 'int2' (`compressed`).

    References
    ----------
    Li et al., Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction, AAAI 2023
    (arXiv 2212.05735). The gradient's scale is that of Esser et al., LSQ, ICLR 2020.
    """

    _float32 = ("steps",)

    def _method(self, bits: int = 8, step_lr: float = 1e-3, seed: int | None = None) -> None:
        self.step_lr = not_negative("step_lr", step_lr)
        self._make(bits, check_seed(seed))
        self._given = {"bits": bits}
        if bits != 8:  # the row has room for a float16 only
            self.register_buffer("steps", torch.ones(self.num_embeddings, device=self.weight.device))
        self._start()

    def row_steps(self, ids: Tensor) -> Tensor:
        """The steps of rows (n,), float32."""
        if self.bits != 8:
            return self.steps[ids]
        at = self.embedding_dim
        return self.packed[ids, at : at + 4].view(torch.float32).reshape(-1)

    def _store(self, rows: Tensor, ids: Tensor, steps: Tensor, seed: int | None) -> None:
        if self.bits != 8:
            self.steps[ids] = steps
        if seed is None:
            nearest(self, rows, ids, steps)
        else:
            at_random(self, rows, ids, seed, steps)

    def _encode(self, rows: Tensor, ids: Tensor) -> None:
        steps = rows.float().abs().amax(1) / (2 ** (self.bits - 1) - 1)
        self._store(rows, ids, torch.where(steps > 0, steps, torch.full_like(steps, 1e-3)), None)

    def _shrink(self, rows: Tensor, ids: Tensor, factor: Tensor) -> None:
        self._store(rows * factor, ids, self.row_steps(ids) * factor.squeeze(1), None)  # the same codes

    def _write(self, ids: Tensor, rows: Tensor, grads: Tensor, batch: int, seed: int) -> None:
        high = 2 ** (self.bits - 1) - 1
        steps = self.row_steps(ids)
        code = rows / steps.unsqueeze(1)
        slope = code.round().clamp_(-high - 1, high)  # less code itself, but where it is clipped
        slope.sub_(code.mul_((code > -high - 1) & (code < high)))
        gradient = slope.mul_(grads).sum(1) / (batch * self.embedding_dim * high) ** 0.5
        self._store(rows, ids, torch.maximum(steps - self.step_lr * gradient, steps / 2), seed)


class ALPTEmbedding(_ALPT, StoredEmbedding):
    pass


class ALPTEmbeddingBag(_ALPT, StoredEmbeddingBag):
    pass
