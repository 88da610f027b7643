"""``torch.ops.lutra`` for `lutra.address.hash_features` (of integers: no gradient)."""

from __future__ import annotations

import torch

from ..address import _hash_features as hashes
from .library import register


def _fake(ids, k=1024, buckets=1_000_000, seed=0):
    hashes._options(k, buckets, seed)
    return ids.new_empty((*ids.shape, k), dtype=torch.float32)


register(
    "hash_features(Tensor ids, int k=1024, int buckets=1000000, int seed=0) -> Tensor",
    hashes._hash_features,
    _fake,
)
