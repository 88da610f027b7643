"""Heads of compressed tables: logits of packed rows and of codes, gradients; the unit ball; large k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from harness import INPUTS, Case, near, same_neighbours

import lutra


def packed(rows: int, dim: int, kind: str, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows, and what they stand for as bfloat16."""
    table = torch.randn(rows, dim, device="cuda")
    codes = lutra.gather.pack_rows(table, kind, group)
    return codes, lutra.gather.unpack_rows(codes, dim, kind, group, dtype="bfloat16")


def logits_case(
    rows: int, dim: int, tokens: int, kind: str, dtype: torch.dtype, k: int = 0, group: int | None = None
) -> Case:
    """Against torch's product with the decoded table."""
    made = lutra.gather.pack_rows(torch.ones(1, dim), kind, group)

    def build() -> tuple[Any, ...]:
        codes, dense = packed(rows, dim, kind, group)
        dense = dense.to(dtype)
        inputs = [(torch.randn(tokens, dim, device="cuda", dtype=dtype),) for _ in range(INPUTS)]
        if k:
            return (
                lambda h: lutra.scan.packed_topk(h, codes, k, kind=kind, group=group),
                inputs,
                lambda h: (h @ dense.T).float().topk(k),
            )
        return (
            lambda h: lutra.scan.packed_logits(h, codes, kind=kind, group=group),
            inputs,
            lambda h: h @ dense.T,
        )

    def check(ours: Any, theirs: Any) -> None:
        a, b = (ours[0], theirs[0]) if k else (ours, theirs)
        size = dim**0.5
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2 * size)

    name = str(dtype).removeprefix("torch.")
    what = f"packed_topk {k}" if k else "packed_logits"
    groups = "" if group is None else f" in groups of {group}"
    return Case(
        f"{what} {rows}x{dim} {kind}{groups}, {tokens} tokens, {name}",
        None,
        [],
        None,
        check,
        bytes=rows * made.shape[1] + (0 if k else rows * tokens * dtype.itemsize),
        flops=2 * rows * dim * tokens * (2 if dtype == torch.float32 else 1),
        rate="bf16",
        build=build,
    )


def lookups_backward_case(n: int, m: int, tokens: int) -> Case:
    codes = torch.randint(0, 256, (n, m), dtype=torch.uint8, device="cuda")

    def theirs(grad: torch.Tensor) -> torch.Tensor:
        out = grad.new_zeros((m, tokens, 256))
        for j in range(m):
            out[j].index_add_(1, codes[:, j].int(), grad)
        return out

    return Case(
        f"gradient of lookups {n} x {m}, {tokens} tokens",
        lambda grad: torch.ops.lutra.lookups_backward(grad, codes, m, 8),
        [(torch.randn(tokens, n, device="cuda"),) for _ in range(2)],
        theirs,
        near(1e-3, 1e-2),
        bytes=n * (m + 4 * tokens) + 4 * m * tokens * 256,
        flops=n * m * tokens,
    )


def poincare_case(n: int, d: int, nq: int) -> Case:
    def ball(rows: int) -> torch.Tensor:
        x = torch.randn(rows, d, device="cuda")
        return x * (0.9 * torch.rand(rows, 1, device="cuda") / x.norm(dim=1, keepdim=True))

    def build() -> tuple[Any, ...]:
        x = ball(n)
        room = 1 - x.double().square().sum(1)

        def theirs(q):
            own = 1 - q.double().square().sum(1, keepdim=True)
            parts = [torch.cdist(q, part).double().square() for part in x.split(1 << 20)]
            y = 2 * torch.cat(parts, 1) / (own * room)
            return torch.log1p(y + (y * (y + 2)).sqrt()).float().topk(10, largest=False)

        return lambda q: lutra.scan.knn(q, x, 10, "poincare"), [(ball(nq),) for _ in range(2)], theirs

    size = n * d * 4 * max(1, nq / 8)
    name = f"knn {n}x{d} float32 poincare, batch {nq}"
    return Case(name, None, [], None, same_neighbours, bytes=size, build=build)


def rescore_case(n: int, d: int, nq: int, c: int, k: int) -> Case:
    def build() -> tuple[Any, ...]:
        x = torch.randn(n, d, device="cuda")
        inputs = [
            (torch.randn(nq, d, device="cuda"), torch.stack([torch.randperm(n, device="cuda")[:c]] * nq))
            for _ in range(2)
        ]

        def theirs(q, candidates):
            scores, places = torch.einsum("qd,qcd->qc", q, x[candidates]).topk(k)
            return scores, candidates.gather(1, places)

        return lambda q, candidates: lutra.scan.rescore(q, x, candidates, k), inputs, theirs

    name = f"rescore {c} of {n}x{d}, {nq} queries, k {k}"
    return Case(name, None, [], None, same_neighbours, bytes=nq * c * d * 4, build=build)


def cases(scale: int) -> Iterator[Case]:
    rows, half, single = 128_000 // scale, torch.bfloat16, torch.float32
    for kind in ("int8", "int4", "int2", "nf4", "fp8_e4m3"):
        yield logits_case(rows, 4096, 1, kind, half)
    yield logits_case(rows, 4096, 1, "int4", half, group=128)
    for tokens in (8, 32, 128):
        yield logits_case(rows, 4096, tokens, "int8", half)
    for tokens in (1, 8, 32, 256):
        yield logits_case(rows, 4096, tokens, "int8", single)
    for tokens in (1, 32):
        yield logits_case(rows, 4096, tokens, "int8", half, k=40)
    for tokens in (1, 32, 512):
        yield lookups_backward_case(rows, 64, tokens)
    for nq in (1, 64):
        yield poincare_case(4_000_000 // scale, 64, nq)
    for k in (1000, 5000):
        yield rescore_case(1_000_000 // scale, 128, 32, 20_000 // scale, k // scale)
