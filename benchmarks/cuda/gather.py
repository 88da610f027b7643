"""Bags of rows: forward, backward, quantized rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import INPUTS, Case, near

import lutra


def cases(scale: int) -> Iterator[Case]:
    rows, dim, length = 1_000_000, 64, 20
    table = torch.randn(rows, dim, device="cuda")
    for bags in (4096, 65536 // scale):
        ids = [torch.randint(0, rows, (bags, length), device="cuda") for _ in range(INPUTS)]
        for dtype in (torch.float32, torch.bfloat16):
            t = table.to(dtype)
            moved = bags * (length * (dim * t.element_size() + 8) + dim * t.element_size())
            yield Case(
                f"bag {bags}x{length} of {rows}x{dim} {str(dtype)[6:]}",
                lutra.gather.bag,
                [(t, i) for i in ids],
                lambda t, i: F.embedding_bag(i, t, mode="sum"),
                near(2e-2 if dtype == torch.bfloat16 else 1e-4, 6e-2 if dtype == torch.bfloat16 else 1e-4),
                bytes=moved,
            )
        q = lutra.gather.quantize_rows(table)

        def quantized(i, q=q):
            return lutra.gather.bag(q.codes, i, scale=q.scale, minimum=q.minimum)

        def expand(i, q=q):
            return ((q.codes[i].float() * q.scale[i, None]) + q.minimum[i, None]).sum(1)

        yield Case(
            f"bag {bags}x{length} of {rows}x{dim} uint8",
            quantized,
            [(i,) for i in ids],
            expand,
            near(1e-3, 1e-3),
            bytes=bags * (length * (dim + 16) + dim * 4),
        )

    for bags in (4096, 65536 // scale):
        ids = [torch.randint(0, rows, (bags, length), device="cuda") for _ in range(INPUTS)]
        weight = torch.nn.Parameter(table.clone())
        g = torch.randn(bags, dim, device="cuda")
        touched = bags * length * dim * 4
        for sparse in (False, True):

            def ours(i, sparse=sparse, g=g, weight=weight):
                out = lutra.gather.bag(weight, i, sparse_grad=sparse)
                return torch.autograd.grad(out, weight, g)[0]

            def theirs(i, sparse=sparse, g=g, weight=weight):
                out = F.embedding_bag(i, weight, mode="sum", sparse=sparse)
                return torch.autograd.grad(out, weight, g)[0]

            def check(a, b):
                near(1e-4, 1e-4)(a.to_dense(), b.to_dense())

            yield Case(
                f"bag {bags}x{length} forward + backward {'sparse' if sparse else 'dense'}",
                ours,
                [(i,) for i in ids],
                theirs,
                check,
                bytes=2 * touched + (0 if sparse else rows * dim * 4),
            )
