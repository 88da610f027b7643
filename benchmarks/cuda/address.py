"""Addresses: n-grams, product keys, random rows, codes; MaxSim."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case

import lutra


def cases(scale: int) -> Iterator[Case]:
    tokens = [(torch.randint(0, 30000, (16384 // scale, 256), device="cuda"),) for _ in range(3)]
    n = tokens[0][0].numel()
    yield Case(
        "token_ngrams order 2, 256 a text",
        lambda t: lutra.address.token_ngrams(t, buckets=2_000_000).ids,
        tokens,
        bytes=n * 8 * 3,
    )
