"""``torch.ops.lutra`` for `lutra.address.longest_match` (of integers: no gradient)."""

from __future__ import annotations

import torch

from ..address import _longest_match as op
from .library import register


def _fake(tokens, offsets, buckets, n_ngrams, max_length):
    return tokens.new_empty(tokens.shape, dtype=torch.int64), tokens.new_empty(
        tokens.shape, dtype=torch.int32
    )


register(
    "longest_match(Tensor tokens, Tensor? offsets, Tensor buckets, int n_ngrams, int max_length)"
    " -> (Tensor, Tensor)",
    op._longest_match,
    _fake,
)
