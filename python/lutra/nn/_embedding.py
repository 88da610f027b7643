"""Embedding: torch's layer with lutra's gradient of the touched rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arrays import torch_kind
from ..gather._spread import worth_spreading
from . import _embedding_ops  # noqa: F401  (registers the op)
from ._common import IDS, ScaleByFrequency, has_kernel

#: From how many ids on a call's sparse gradient is worth its fixed cost (docs/layers.md).
ENOUGH_IDS = 4096


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` with gradients that cost what they touch.

    Constructor, ``from_pretrained``, parameters, state_dict and results are torch's. What differs is the
    gradient:

    - dense, of a table of 4 MB or more of which a call reads at most every fourth row (CPU): only the touched
      rows are written, the rest is fresh memory of the system, which is zero. On 10^6 rows of 64 floats that
      is 0.8 ms instead of 52 for 64 ids, forward and backward;
    - with ``sparse=True`` and at least 4,096 ids in a call: each touched row once, in increasing order, its
      contributions summed in the order of the ids in float32. torch's holds one row per id, which optimizers
      such as ``SparseAdam`` sort and add up first.

    Both are the same bits whatever the number of threads. Looking rows up, and the other calls, torch does as
    fast or faster, and so they are left to it.

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

    #: Set by `lutra.optim`'s ``attach``.
    _attachment: Any = None

    def forward(self, input: Tensor) -> Tensor:
        """The rows, shape (\\*input.shape, embedding_dim)."""
        weight = self.weight
        if self._attachment is not None and weight.requires_grad and torch.is_grad_enabled():
            if self.max_norm is not None:
                torch.embedding_renorm_(weight.detach(), input.contiguous(), self.max_norm, self.norm_type)
            return self._attachment.embedding(self, input)
        if not (
            weight.requires_grad and torch.is_grad_enabled() and input.dtype in IDS and has_kernel(weight)
        ):
            return super().forward(input)
        by_frequency = self.sparse and self.scale_grad_by_freq  # torch cannot
        if not (by_frequency or self._pays(weight, input.numel())):
            return super().forward(input)
        if self.max_norm is not None:  # in place, the rows visited only, before the look-up: as torch does
            torch.embedding_renorm_(weight.detach(), input.contiguous(), self.max_norm, self.norm_type)
        if self.scale_grad_by_freq:
            weight = ScaleByFrequency.apply(weight, input, self.sparse)
        return torch.ops.lutra.embedding(weight, input, self.padding_idx, self.sparse)

    def _pays(self, weight, n):
        """Whether lutra's gradient of n rows is worth its fixed cost."""
        if self.sparse:
            return n >= ENOUGH_IDS
        rows, dim = weight.shape
        return worth_spreading(torch_kind(weight.is_cuda), n, rows, dim * weight.dtype.itemsize)
