"""Scans over codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from harness import INPUTS, Case, same_neighbours

import lutra

_memory: list[torch.Tensor] = []


def random_bytes(rows: int, width: int) -> torch.Tensor:
    """Random bytes; the same memory for all cases."""
    size = rows * width
    if not _memory or _memory[0].numel() < size:
        _memory[:] = [torch.empty(size, dtype=torch.uint8, device="cuda").random_(0, 256)]
    return _memory[0][:size].view(rows, width)


def same_scores(ours: Any, theirs: Any) -> None:
    """Many scores are equal integers, and topk takes others of them."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-4)


def pq_case(n: int, m: int, nq: int, k: int = 10) -> Case:
    def build() -> tuple[Any, ...]:
        codes, books = random_bytes(n, m), torch.randn(m, 256, 8, device="cuda")

        def theirs(q):
            tables = (q.view(len(q), m, 1, -1) - books).square().sum(-1)
            s = torch.zeros(len(q), n, device="cuda")
            for j in range(m):
                for begin in range(0, n, 1 << 24):  # as int32 for the look-up, a part at a time
                    part = codes[begin : begin + (1 << 24), j].int()
                    s[:, begin : begin + (1 << 24)] += tables[:, j].index_select(1, part)
            return s.topk(k, largest=False)

        inputs = [(torch.randn(nq, m * 8, device="cuda"),) for _ in range(INPUTS)]
        return lambda q: lutra.scan.pq(q, codes, books, k), inputs, theirs

    # The codes once for four queries, which is what a block serves; of slabs two.
    size = n * m * max(1, nq / (4 if m <= 96 else 2))
    return Case(f"pq {n} x {m}, batch {nq}, k {k}", None, [], None, same_neighbours, bytes=size, build=build)


def binary_case(n: int, b: int, nq: int) -> Case:
    def build() -> tuple[Any, ...]:
        x = random_bytes(n, b)
        inputs = [(torch.randint(0, 256, (nq, b), device="cuda", dtype=torch.uint8),) for _ in range(INPUTS)]
        ones = torch.tensor([bin(i).count("1") for i in range(256)], dtype=torch.uint8, device="cuda")

        def theirs(q):
            parts = x.split(1 << 21)
            found = [
                torch.stack([ones[(part ^ row).int()].sum(1, dtype=torch.int32) for row in q])
                for part in parts
            ]
            return torch.cat(found, 1).float().topk(10, largest=False)

        return lambda q: lutra.scan.binary(q, x, 10), inputs, theirs

    size = n * b * max(1, nq / 8)  # the rows once for eight queries
    return Case(f"binary {n} x {b} bytes, batch {nq}", None, [], None, same_scores, bytes=size, build=build)


def fast_scan_case(n: int, m: int, nq: int) -> Case:
    def build() -> tuple[Any, ...]:
        codes = random_bytes(n // 16, m * 8).view(n // 16, m // 8, 16, 4)
        inputs = [(torch.randn(nq, m, 16, device="cuda"),) for _ in range(INPUTS)]

        def theirs(tables):
            entries = lutra.scan.unpack4(codes, n, m)
            low = tables.min(2).values
            spread = (tables.max(2).values - low).view(nq, m // 8, 2, 4).sum(2).amax((1, 2))
            step = (spread / 254)[:, None, None]
            rounded = ((tables - low[:, :, None]) * (1 / step) + 0.5).int()
            s = torch.zeros(nq, n, dtype=torch.int32, device="cuda")
            for j in range(m):
                s += rounded[:, j].index_select(1, entries[:, j].int())
            return (low.sum(1)[:, None] + step[:, :, 0] * s).topk(10)

        return lambda t: lutra.scan.fast_scan(t, codes, n, 10), inputs, theirs

    size = n * m / 2 * max(1, nq / 4)
    name = f"fast_scan {n} x {m} entries of 4 bits, batch {nq}"
    return Case(name, None, [], None, same_scores, bytes=size, build=build)


def lookups_case(n: int, m: int, tokens: int) -> Case:
    def build() -> tuple[Any, ...]:
        codes = random_bytes(n, m)
        inputs = [(torch.randn(m, tokens, 256, device="cuda"),) for _ in range(INPUTS)]

        def theirs(tables):
            s = torch.zeros(tokens, n, device="cuda")
            for j in range(m):
                s += tables[j].index_select(1, codes[:, j].int())
            return s

        return lambda t: lutra.scan.lookups(t, codes), inputs, theirs

    def check(ours: Any, theirs: Any) -> None:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)

    size = n * (m + 4 * tokens)
    return Case(f"lookups {n} x {m}, {tokens} tokens", None, [], None, check, bytes=size, build=build)


def cases(scale: int) -> Iterator[Case]:
    yield pq_case(100_000_000 // scale, 16, 1)
    yield pq_case(100_000_000 // scale, 16, 1, 1000)
    for m in (16, 64):
        for nq in (1, 64):
            yield pq_case(1_000_000 // scale, m, nq)
    for nq in (1, 32):  # of more sub-spaces than have tables in shared memory: encodings of MultiVector
        yield pq_case(1_000_000 // scale, 1280, nq)
    for b in (16, 64, 128):
        yield binary_case(800_000_000 // b // scale, b, 1)
    yield binary_case(1_000_000 // scale, 32, 64)
    for m in (32, 192):
        yield fast_scan_case(1_600_000_000 // m // scale // 16 * 16, m, 1)
    yield fast_scan_case(1_000_000 // scale // 16 * 16, 64, 64)
    for tokens in (1, 32):
        yield lookups_case(128_000 // scale, 64, tokens)
    _memory.clear()
