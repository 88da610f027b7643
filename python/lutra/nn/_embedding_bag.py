"""EmbeddingBag: torch's layer on lutra's bag kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gather import bag
from ._common import ScaleByFrequency, check_bags, has_kernel


class EmbeddingBag(torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag``, computed by `lutra.gather.bag`.

    Constructor, ``from_pretrained``, parameters, state_dict and results are torch's. What differs:

    - gradients are the same bits whatever the number of threads, and with ``sparse=True`` they hold each
      touched row once (torch's hold one row per id, which optimizers must sort and add up first);
    - an id out of range is an IndexError that names its position;
    - ``scale_grad_by_freq`` divides by the row's own count (torch 2.13's CPU kernel takes another row's), and
      goes with ``sparse`` too;
    - float64 tables, and CUDA where lutra was built without it, are left to torch.

    Parameters
    ----------
    num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse
        As in ``torch.nn.EmbeddingBag``.
    include_last_offset, padding_idx, device, dtype
        As in ``torch.nn.EmbeddingBag``.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.EmbeddingBag(10, 3, mode="sum")
    >>> layer(torch.tensor([1, 2, 4, 5]), torch.tensor([0, 3])).shape
    torch.Size([2, 3])
    """

    #: Set by `lutra.optim`'s ``attach``.
    _attachment: Any = None

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Bags of rows, (bags, embedding_dim).

        Parameters
        ----------
        input : Tensor, shape (bags, length) or (n,), int32 or int64
        offsets : Tensor, shape (bags,) or, with ``include_last_offset``, (bags + 1,), for 1-d input
        per_sample_weights : Tensor, the shape of input, floating point, mode 'sum' only
        """
        weight = self.weight
        attached = self._attachment is not None and weight.requires_grad and torch.is_grad_enabled()
        if not (attached or has_kernel(weight)) or input.is_nested:
            return super().forward(input, offsets, per_sample_weights)
        check_bags(self, input, offsets, per_sample_weights)
        if self.max_norm is not None:  # in place, the rows visited only, before the look-up: as torch does
            torch.embedding_renorm_(weight.detach(), input, self.max_norm, self.norm_type)
        if attached:
            return self._attachment.bag(self, input, offsets, per_sample_weights)
        if self.scale_grad_by_freq and weight.requires_grad and torch.is_grad_enabled():
            weight = ScaleByFrequency.apply(weight, input, self.sparse)
        return bag(
            weight, input, offsets, per_sample_weights, mode=self.mode, padding_idx=self.padding_idx,
            include_last_offset=self.include_last_offset and offsets is not None, sparse_grad=self.sparse,
        )  # fmt: skip
