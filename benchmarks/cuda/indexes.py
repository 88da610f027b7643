"""Searches of whole indexes on the GPU: filters that lie there, documents of many vectors, prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from harness import Case

from lutra.index import Flat, Funnel, MultiVector


def cases(scale: int) -> Iterator[Case]:
    yield from filtered(scale)
    yield from documents(scale)
    yield from prefixes(scale)


def same_scores(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-3)


def filtered(scale: int) -> Iterator[Case]:
    """A tenth of the rows passes; the mask is resolved in the call, and a CUDA graph holds it."""
    n, d, k = 4_000_000 // scale, 128, 10
    index = Flat(d)
    x = torch.randn(n, d, device="cuda")
    index.add(x)
    masks = [torch.rand(n, device="cuda") < 0.1 for _ in range(2)]
    ids = [mask.nonzero()[:, 0] for mask in masks]

    def theirs(q, mask):
        keep = (
            mask
            if mask.dtype == torch.bool
            else torch.zeros(n, dtype=torch.bool, device="cuda").index_fill_(0, mask, True)
        )
        return torch.where(keep, q @ x.T, -torch.inf).topk(k)

    for nq in (1, 64):
        queries = [torch.randn(nq, d, device="cuda") for _ in masks]
        for form, filters in (("bools", masks), ("ids", ids)):
            yield Case(
                f"Flat {n}x{d}, {nq} queries, filter of {form}",
                lambda q, keep: index.search(q, k, filter=keep),
                list(zip(queries, filters)),
                theirs,
                same_scores,
                bytes=n * d * 4,
                flops=2.0 * nq * n * d,
                graph=True,
            )


def documents(scale: int) -> Iterator[Case]:
    """MUVERA's encodings scanned whole, MaxSim of 200 candidates: in one CUDA graph."""
    n, length, d, k = max(512, 32768 // scale), 64, 128, 10
    for inner, tokens in (
        ("float16", "float16"), ("float16", "residual2"), ("int8", "float16"), ("pq", "float16"),
    ):  # fmt: skip
        size = {"float16": 2, "int8": 1, "pq": 1 / 8}[inner]
        index = MultiVector(d, inner, tokens)
        unit = torch.nn.functional.normalize
        if not index.is_trained:
            index.train(unit(torch.randn(1024, length, d, device="cuda"), dim=2))
        x = unit(torch.randn(2048, length, d, device="cuda"), dim=2)
        for _ in range(0, n, 2048):
            index.add(unit(x + 0.05 * torch.randn_like(x), dim=2)[: n - len(index)])
        for nq in (1, 64):
            queries = [unit(torch.randn(nq, 32, d, device="cuda"), dim=2) for _ in range(2)]
            yield Case(
                f"MultiVector {inner}, {tokens}, {n} documents of {length} tokens, {nq} queries",
                lambda q, index=index: index.search(q, k),
                [(q,) for q in queries],
                bytes=n * index.encoder.dim * size
                + nq * 200 * length * d * (2 if tokens == "float16" else 0.25),
                flops=2.0 * nq * n * index.encoder.dim,
                graph=True,
            )


def prefixes(scale: int) -> Iterator[Case]:
    n, d, k = 1_000_000 // scale, 768, 10
    index = Funnel(d, (64, 256), storage="float16")
    for _ in range(0, n, 100_000):
        index.add(torch.randn(min(100_000, n - len(index)), d, device="cuda"))
    for nq in (1, 256):
        queries = [torch.randn(nq, d, device="cuda") for _ in range(2)]
        yield Case(
            f"Funnel 64, 256 of {d}, {n} vectors, {nq} queries",
            lambda q: index.search(q, k),
            [(q,) for q in queries],
            bytes=n * 64 * 4,
            flops=2.0 * nq * n * 64,
            graph=nq == 1,
        )
