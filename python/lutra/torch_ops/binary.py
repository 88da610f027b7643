"""``torch.ops.lutra`` for packed bits; integers come in or go out, so nothing is differentiable."""

from __future__ import annotations

import torch

from ..address._binarize import _binarize
from ..scan._binary import _binary, _rescore_bits
from .library import register


def _found(queries, k, dtype):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(shape, dtype=torch.int64)


register(
    "binary(Tensor queries, Tensor database, Tensor? keep=None, int k=10, str metric='hamming') "
    "-> (Tensor, Tensor)",
    _binary,
    lambda queries, database, keep=None, k=10, metric="hamming": _found(queries, k, torch.float32),
)
register(
    "rescore_bits(Tensor queries, Tensor database, Tensor candidates, int k) -> (Tensor, Tensor)",
    _rescore_bits,
    lambda queries, database, candidates, k: _found(queries, k, queries.dtype),
)
register(
    "binarize(Tensor x, Tensor? thresholds=None, float threshold=0.0) -> Tensor",
    _binarize,
    lambda x, thresholds=None, threshold=0.0: x.new_empty(
        (*x.shape[:-1], (x.shape[-1] + 7) // 8), dtype=torch.uint8
    ),
)
