"""``torch.ops.lutra.linear_topk``: the largest outputs of a linear map, which are not written."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arrays import torch_kind
from ..scan import knn
from ..scan._knn import _knn
from ..scan._screen import _knn_screened, _quantize_int8
from ..torch_ops.library import register

#: A scan of 8-bit codes saves, over this many inputs, what making the codes costs.
PAYS_AFTER = 32
#: Rows whose mean the codes leave out: any will do, and codes are made often.
_SAMPLE = 256
#: Beyond, a bias leaves no room for the scores in the screen's floats.
_LARGEST_BIAS = 1e6


def make_codes(inputs: int, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, ...] | None:
    """8-bit codes of a linear map (`lutra.scan.quantize_int8`), where over so many inputs they pay."""
    kind = torch_kind(False)
    if kind.kernels is None or inputs < PAYS_AFTER or len(weight) < 32 * k:
        return None
    bias = bias.float().contiguous()
    if not bias.abs().max() <= _LARGEST_BIAS:
        return None
    return _quantize_int8(kind, weight, False, bias, _SAMPLE)


def select(
    x: Tensor, weight: Tensor, bias: Tensor, codes: tuple[Tensor, ...] | None, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest of ``weight @ x + bias`` for each of x (inputs, d), float32, on the CPU."""
    kind = torch_kind(False)
    if kind.kernels is None:
        rows = torch.cat([weight, bias.unsqueeze(1)], 1)
        return knn(torch.nn.functional.pad(x, (0, 1), value=1.0), rows, k)
    bias = bias.float().contiguous()
    if codes is None:
        return _knn(kind, x, weight, k, "ip", None, bias)
    numbers, inverse, half, mean, bounds = codes
    return _knn_screened(kind, x, weight, numbers, inverse, half, mean, bounds, k=k, bias=bias)


def _linear_topk(kind, x, weight, bias, k):
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    if kind.cuda and kind.kernels is not None and x.dtype == torch.float32:
        return _knn(kind, x, weight, k, "ip", None, bias.float())
    if kind.cuda or x.dtype == torch.float64:
        found = torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).T).topk(k, 1)
        return found.values, found.indices
    return select(x, weight, bias, make_codes(len(x), weight, bias, k), k)


register(
    "linear_topk(Tensor x, Tensor weight, Tensor bias, int k) -> (Tensor, Tensor)",
    _linear_topk,
    lambda x, weight, bias, k: (
        x.new_empty((x.shape[0], k)),
        x.new_empty((x.shape[0], k), dtype=torch.int64),
    ),
)
