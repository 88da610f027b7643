"""``torch.ops.lutra`` for `lutra.address.xor_ngrams` (of integers: no gradient)."""

from __future__ import annotations

import torch

from ..address import _xor_ngrams as op
from .library import register


def _fake(tokens, multipliers, moduli, orders, pad=0):
    op.check(multipliers, moduli, orders, pad)
    return tokens.new_empty((*tokens.shape, len(moduli)), dtype=torch.int64)


register(
    "xor_ngrams(Tensor tokens, int[] multipliers, int[] moduli, int[] orders, int pad=0) -> Tensor",
    op._xor_ngrams,
    _fake,
)
