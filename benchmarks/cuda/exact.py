"""Exact nearest neighbours, rescoring, nearest centroids."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import INPUTS, Case, near, same_neighbours

import lutra

DIMS = 128


def torch_knn(q, x, k, metric):
    """Products and topk of so many queries at a time that a matrix of scores has 2 GB."""
    parts = []
    for part in q.split(max(1, (1 << 31) // (len(x) * x.element_size()))):
        if metric == "l2":
            s = -torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist").square()
        else:
            s = (F.normalize(part) @ F.normalize(x).T) if metric == "cosine" else part @ x.T
        parts.append(s.topk(k))
    scores, ids = (torch.cat(a) for a in zip(*parts))
    return (-scores if metric == "l2" else scores).float(), ids


def same_scores(ours, theirs):
    """bf16 products are rounded to 8 bits by torch."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-2, atol=1e-2)


def search(n, dtype, nq, k, metric, theirs=torch_knn, peer="torch"):
    """Beside torch, or what `peers` brings: its function and its name, which begins the case's."""

    def build():
        x = torch.randn(n, DIMS, device="cuda").to(dtype)
        q = [(torch.randn(nq, DIMS, device="cuda").to(dtype),) for _ in range(2)]
        return (
            lambda q: lutra.scan.knn(q, x, k, metric),
            q,
            lambda q: theirs(q, x, k, metric),
        )

    name = str(dtype).removeprefix("torch.")
    return Case(
        f"{'' if peer == 'torch' else peer + ': '}knn {n}x{DIMS} {name} {metric}, batch {nq}, k {k}",
        None,
        [],
        check=same_scores if dtype == torch.bfloat16 else same_neighbours,
        bytes=n * DIMS * dtype.itemsize,
        flops=2 * nq * n * DIMS,
        rate="fp32" if dtype == torch.float32 else "bf16",
        build=build,
        peer=peer.split()[0],
    )


def screened(n, nq, k, metric):
    """8-bit codes are scanned, and few float32 rows."""

    def build():
        x = torch.randn(n, DIMS, device="cuda")
        q = [(torch.randn(nq, DIMS, device="cuda"),) for _ in range(2)]
        screen = lutra.scan.quantize_int8(x, metric)
        return (
            lambda q: lutra.scan.knn_screened(q, x, screen, k, metric),
            q,
            lambda q: torch_knn(q, x, k, metric),
        )

    return Case(
        f"knn_screened {n}x{DIMS} float32 {metric}, batch {nq}, k {k}",
        None,
        [],
        check=same_neighbours,
        bytes=n * (DIMS + 4),
        flops=2 * nq * n * DIMS,
        rate="int8",
        build=build,
    )


def cases(scale: int) -> Iterator[Case]:
    for centroids in (256, 4096, 65536):
        x = torch.randn(1_000_000 // scale, DIMS, device="cuda")
        c = torch.randn(centroids, DIMS, device="cuda")

        def torch_nearest(x, c):
            ids = [torch.cdist(part, c).argmin(1) for part in x.split(65536 * 4096 // max(4096, len(c)))]
            return torch.cat(ids)[:, None]

        def same(ours, theirs):
            assert (ours.ids == theirs).float().mean() > 0.999

        yield Case(
            f"nearest {len(x)}x{DIMS}, {centroids} centroids",
            lutra.address.nearest,
            [(x, c)],
            torch_nearest,
            same,
            bytes=x.numel() * 4,
            flops=3 * 2 * len(x) * centroids * DIMS,  # three products of bf16 terms
            rate="bf16",
        )
        del x, c

    n = 10_000_000 // scale
    for dtype in (torch.bfloat16, torch.float32):
        for nq, k in ((1, 10), (8, 10), (128, 10), (1024, 10)):
            yield search(n, dtype, nq, k, "ip")
    for nq, k in ((1, 10), (8, 10), (32, 10), (128, 10), (1024, 10), (1024, 100)):
        yield screened(n, nq, k, "ip")
    n = 1_000_000 // scale
    for nq, metric in ((1, "ip"), (1024, "ip"), (1024, "l2")):
        yield screened(n, nq, 10, metric)
    x = torch.randn(n, DIMS, device="cuda")
    yield Case(
        f"quantize_int8 {n}x{DIMS} float32",
        lutra.scan.quantize_int8,
        [(x,)],
        bytes=x.numel() * 5,
    )
    del x
    for nq, k, metric in (
        (1, 10, "ip"),
        (16, 10, "ip"),
        (1024, 10, "ip"),
        (1, 10, "l2"),
        (1024, 10, "l2"),
        (1024, 10, "cosine"),
        (1, 100, "ip"),
        (1024, 100, "ip"),
        (64, 1000, "ip"),
    ):
        yield search(n, torch.float32, nq, k, metric)

    x = torch.randn(n, DIMS, device="cuda")
    candidates = torch.randint(0, n, (1024, 100), device="cuda")
    q = [(torch.randn(1024, DIMS, device="cuda"),) for _ in range(INPUTS)]

    def torch_rescore(q):
        s, at = torch.einsum("qd,qcd->qc", q, x[candidates]).topk(10)
        return s, candidates.gather(1, at)

    yield Case(
        "rescore 1024 queries, 100 candidates",
        lambda q: lutra.scan.rescore(q, x, candidates, 10),
        q,
        torch_rescore,
        lambda a, b: near(1e-3, 1e-3)(a.scores[:, 0], b[0][:, 0]),
        bytes=candidates.numel() * (DIMS * 4 + 8),
    )
