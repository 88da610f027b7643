"""``torch.ops.lutra`` for 4-bit codes; integers come in or go out, so nothing is differentiable."""

from __future__ import annotations

import torch

from ..scan._fast_scan import _fast_scan, _pack4, _unpack4
from .library import register

register(
    "pack4(Tensor entries) -> Tensor",
    _pack4,
    lambda entries: entries.new_empty(((entries.shape[0] + 15) // 16, (entries.shape[1] + 7) // 8, 16, 4)),
)
register("unpack4(Tensor packed, int n, int m) -> Tensor", _unpack4, lambda p, n, m: p.new_empty((n, m)))
register(
    "fast_scan(Tensor tables, Tensor codes, Tensor? bias=None, Tensor? add=None, Tensor? mul=None, "
    "Tensor? keep=None, int n=0, int k=10, str metric='ip') -> (Tensor, Tensor)",
    _fast_scan,
    lambda tables, codes, bias=None, add=None, mul=None, keep=None, n=0, k=10, metric="ip": (
        tables.new_empty((tables.shape[0], k)),
        tables.new_empty((tables.shape[0], k), dtype=torch.int64),
    ),
)
