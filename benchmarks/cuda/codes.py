"""Scans over codes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import INPUTS, Case, same_neighbours

import lutra


def cases(scale: int) -> Iterator[Case]:
    n, d = 1_000_000 // scale, 128
    for m in (16, 64):
        codes = torch.randint(0, 256, (n, m), device="cuda", dtype=torch.uint8)
        books = torch.randn(m, 256, d // m, device="cuda")

        def torch_pq(q, codes=codes, books=books, m=m):
            tables = (q.view(len(q), m, 1, -1) - books).square().sum(-1)
            s = torch.zeros(len(q), n, device="cuda")
            for j in range(m):
                s += tables[:, j][:, codes[:, j].long()]
            return s.topk(10, largest=False)

        for nq in (1, 64):
            q = [(torch.randn(nq, d, device="cuda"),) for _ in range(INPUTS)]
            yield Case(
                f"pq {n} codes of {m}, batch {nq}",
                lambda q, c=codes, b=books: lutra.scan.pq(q, c, b, 10),
                q,
                torch_pq,
                same_neighbours,
                bytes=n * m * max(1, nq / 4),
            )  # the codes once for 4 queries
