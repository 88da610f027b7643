"""``torch.ops.lutra`` for `lutra.scan.quantize_int8` and `lutra.scan.knn_screened`."""

from __future__ import annotations

import torch

from ..scan._screen import _knn_screened, _quantize_int8
from .library import gradient, register
from .scan import _exact_backward, _exact_setup, _results


def _empty(x, normalize=False):
    n, d = x.shape
    blocks = (n + 15) // 16
    one = x.new_empty((blocks * 16,), dtype=torch.float32)
    codes = x.new_empty((blocks, (d + 3) // 4, 16, 4), dtype=torch.uint8)
    return codes, one, torch.empty_like(one), one.new_empty((d,)), one.new_empty((4,))


register(
    "quantize_int8(Tensor x, bool normalize=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize_int8,
    _empty,
)
register(
    "knn_screened(Tensor queries, Tensor database, Tensor codes, Tensor inverse, Tensor half, Tensor mean, "
    'Tensor bounds, Tensor? keep=None, int k=10, str metric="ip") -> (Tensor, Tensor)',
    _knn_screened,
    lambda queries, database, codes, inverse, half, mean, bounds, keep=None, k=10, metric="ip": _results(
        queries, k
    ),
)
gradient("knn_screened", _exact_backward, _exact_setup)
