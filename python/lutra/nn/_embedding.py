"""Embedding: torch's layer with lutra's gradient of the touched rows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _embedding_ops  # noqa: F401  (registers the op)
from ._common import IDS, ScaleByFrequency, has_kernel

#: From how many ids on a call's sparse gradient is worth its fixed cost (docs/layers.md).
ENOUGH_IDS = 4096


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` with a smaller sparse gradient.

    Constructor, ``from_pretrained``, parameters, state_dict and results are torch's. With ``sparse=True`` and
    at least 4,096 ids in a call, the gradient holds each touched row once, in increasing order, its
    contributions summed in the order of the ids in float32: the same bits whatever the number of threads.
    torch's holds one row per id, which optimizers such as ``SparseAdam`` sort and add up first. Looking rows
    up, the dense gradient, and calls with few ids, torch does as fast or faster, and so they are left to it.

    Parameters
    ----------
    num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device, dtype
        As in ``torch.nn.Embedding``. (torch refuses ``scale_grad_by_freq`` with ``sparse``; here they go
        together.)

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.Embedding(10, 3, sparse=True)
    >>> layer(torch.tensor([[1, 2, 1]])).sum().backward()
    >>> layer.weight.grad.to_dense()[1]
    tensor([2., 2., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        """The rows, shape (\\*input.shape, embedding_dim)."""
        weight, by_frequency = self.weight, self.scale_grad_by_freq
        if (
            not (self.sparse and (by_frequency or input.numel() >= ENOUGH_IDS))
            or not (weight.requires_grad and torch.is_grad_enabled())
            or not (input.dtype in IDS and has_kernel(weight))
        ):
            return super().forward(input)
        if self.max_norm is not None:  # in place, the rows visited only, before the look-up: as torch does
            torch.embedding_renorm_(weight.detach(), input.contiguous(), self.max_norm, self.norm_type)
        if by_frequency:
            weight = ScaleByFrequency.apply(weight, input, True)
        return torch.ops.lutra.embedding(weight, input, self.padding_idx)
