"""What the two embedding layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arrays import torch_kind
from ._embedding_ops import sparse_rows

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
IDS = (torch.int64, torch.int32)


def has_kernel(weight: Tensor) -> bool:
    """Whether lutra computes with this table; if not, the layer leaves the call to torch.

    float64 has no kernel. A pure-Python install computes with the reference: it behaves like any other.
    """
    if weight.dtype not in _FLOATS:
        return False
    if weight.is_cpu or weight.is_meta:
        return True
    return weight.is_cuda and torch_kind(True).kernels is not None


class ScaleByFrequency(torch.autograd.Function):
    """The identity; its gradient is divided, row by row, by how often the row occurs in ``ids``."""

    @staticmethod
    def forward(weight: Tensor, ids: Tensor, sparse: bool) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, ids, ctx.sparse = inputs
        ctx.rows = weight.shape[0]
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        ids = ids.reshape(-1).long()
        counts = torch.zeros(ctx.rows, dtype=torch.float32, device=grad.device)
        counts = counts.index_add(0, ids, torch.ones_like(ids, dtype=torch.float32)).clamp(min=1)
        if ctx.sparse:
            grad = grad.coalesce()
            rows = grad.indices()
            values = (grad.values() / counts[rows[0]].unsqueeze(1)).to(grad.dtype)
            return sparse_rows(rows[0], values, grad.shape), None, None
        return (grad / counts.unsqueeze(1)).to(grad.dtype), None, None


def check_bags(layer, input, offsets, per_sample_weights):
    """The arguments of an EmbeddingBag: torch's rules, in torch's kinds of error."""
    if input.dtype not in IDS:
        raise TypeError(f"input has dtype {input.dtype}; it must be int64 or int32")
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError("offsets must be None where input is 2-d: each row of input is a bag")
    elif input.dim() != 1:
        raise ValueError(f"input must be 1-d or 2-d, got shape {tuple(input.shape)}")
    elif offsets is None:
        raise ValueError("offsets is missing: 1-d input needs the starts of its bags")
    if layer.mode not in ("sum", "mean", "max"):
        raise ValueError(f"mode must be one of 'sum', 'mean', 'max'; got {layer.mode!r}")
    if layer.mode == "max" and layer.scale_grad_by_freq:
        raise ValueError("mode 'max' does not support scale_grad_by_freq")
    if layer.mode == "max" and layer.sparse:
        raise ValueError("mode 'max' does not support sparse gradients")
    if per_sample_weights is not None:
        if per_sample_weights.shape != input.shape:
            raise ValueError(
                f"per_sample_weights has shape {tuple(per_sample_weights.shape)}; "
                f"it must be that of input, {tuple(input.shape)}"
            )
        if layer.mode != "sum":
            raise NotImplementedError(f"per_sample_weights go with mode 'sum' only, got mode {layer.mode!r}")
