"""``torch.ops.lutra.linear_topk``: the largest outputs of a linear map, which are not written."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scan import knn, knn_screened, quantize_int8
from ..torch_ops.library import register

#: A scan of 8-bit codes saves, over this many inputs, what making the codes costs.
PAYS_AFTER = 128


def with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """The rows of a linear map with the bias as a column more."""
    return torch.cat([weight, bias.unsqueeze(1)], 1)


def codes_pay(inputs: int, rows: Tensor, k: int) -> bool:
    return inputs >= PAYS_AFTER and len(rows) >= 32 * k


def select(x: Tensor, rows: Tensor, screen: object, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``rows[:, :-1] @ x + rows[:, -1]`` for each of x (inputs, d), float32."""
    one = torch.nn.functional.pad(x, (0, 1), value=1.0)
    scores, ids = knn(one, rows, k) if screen is None else knn_screened(one, rows, screen, k)  # type: ignore
    return scores, ids


def _linear_topk(kind, x, weight, bias, k):
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    if kind.cuda or x.dtype == torch.float64:
        found = torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).T).topk(k, 1)
        return found.values, found.indices
    rows = with_bias(weight, bias)
    return select(x, rows, quantize_int8(rows) if codes_pay(len(x), rows, k) else None, k)


register(
    "linear_topk(Tensor x, Tensor weight, Tensor bias, int k) -> (Tensor, Tensor)",
    _linear_topk,
    lambda x, weight, bias, k: (
        x.new_empty((x.shape[0], k)),
        x.new_empty((x.shape[0], k), dtype=torch.int64),
    ),
)
