"""EmbeddingBag: torch's layer on lutra's bag kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gather import bag
from ._common import IDS, ScaleByFrequency, has_kernel


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
        if not has_kernel(weight) or input.is_nested:
            return super().forward(input, offsets, per_sample_weights)
        self._check(input, offsets, per_sample_weights)
        if self.max_norm is not None:  # in place, the rows visited only, before the look-up: as torch does
            torch.embedding_renorm_(weight.detach(), input, self.max_norm, self.norm_type)
        if self.scale_grad_by_freq and weight.requires_grad and torch.is_grad_enabled():
            weight = ScaleByFrequency.apply(weight, input, self.sparse)
        return bag(
            weight, input, offsets, per_sample_weights, mode=self.mode, padding_idx=self.padding_idx,
            include_last_offset=self.include_last_offset and offsets is not None, sparse_grad=self.sparse,
        )  # fmt: skip

    def _check(self, input, offsets, per_sample_weights):
        """torch's rules, in torch's kinds of error."""
        if input.dtype not in IDS:
            raise TypeError(f"input has dtype {input.dtype}; it must be int64 or int32")
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError("offsets must be None where input is 2-d: each row of input is a bag")
        elif input.dim() != 1:
            raise ValueError(f"input must be 1-d or 2-d, got shape {tuple(input.shape)}")
        elif offsets is None:
            raise ValueError("offsets is missing: 1-d input needs the starts of its bags")
        if self.mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be one of 'sum', 'mean', 'max'; got {self.mode!r}")
        if self.mode == "max" and self.scale_grad_by_freq:
            raise ValueError("mode 'max' does not support scale_grad_by_freq")
        if self.mode == "max" and self.sparse:
            raise ValueError("mode 'max' does not support sparse gradients")
        if per_sample_weights is not None:
            if per_sample_weights.shape != input.shape:
                raise ValueError(
                    f"per_sample_weights has shape {tuple(per_sample_weights.shape)}; "
                    f"it must be that of input, {tuple(input.shape)}"
                )
            if self.mode != "sum":
                raise NotImplementedError(
                    f"per_sample_weights go with mode 'sum' only, got mode {self.mode!r}"
                )
