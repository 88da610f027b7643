"""Exact nearest neighbours, rescoring, nearest centroids."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import INPUTS, Case, near, same_neighbours

import lutra


def cases(scale: int) -> Iterator[Case]:
    for centroids in (256, 4096):
        x, c = torch.randn(1_000_000 // scale, 128, device="cuda"), torch.randn(centroids, 128, device="cuda")

        def torch_nearest(x, c):
            ids = [torch.cdist(part, c).argmin(1) for part in x.split(65536)]
            return torch.cat(ids)[:, None]

        def same(ours, theirs):
            assert (ours.ids == theirs).float().mean() > 0.999

        yield Case(
            f"nearest {len(x)}x128, {centroids} centroids",
            lutra.address.nearest,
            [(x, c)],
            torch_nearest,
            same,
            bytes=x.numel() * 4,
            flops=3 * len(x) * centroids * 128,
        )

    n, d = 1_000_000 // scale, 128
    x = torch.randn(n, d, device="cuda")
    unit = F.normalize(x)

    def torch_knn(q, k, metric):
        parts = []
        for part in q.split(256):
            if metric == "l2":
                s = -torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist").square()
            else:
                s = (F.normalize(part) @ unit.T) if metric == "cosine" else part @ x.T
            parts.append(s.topk(k))
        scores, ids = (torch.cat(a) for a in zip(*parts))
        return (-scores if metric == "l2" else scores), ids

    for nq, k, metric in (
        (1, 10, "ip"),
        (16, 10, "ip"),
        (128, 10, "ip"),
        (1024, 10, "ip"),
        (1, 10, "l2"),
        (1024, 10, "l2"),
        (1024, 10, "cosine"),
        (1, 100, "ip"),
        (1024, 100, "ip"),
        (64, 1000, "ip"),
    ):
        q = [(torch.randn(nq, d, device="cuda"),) for _ in range(INPUTS)]
        yield Case(
            f"knn {n}x{d} {metric}, batch {nq}, k {k}",
            lambda q, k=k, metric=metric: lutra.scan.knn(q, x, k, metric),
            q,
            lambda q, k=k, metric=metric: torch_knn(q, k, metric),
            same_neighbours,
            bytes=n * d * 4,
            flops=(3 if metric == "l2" else 2) * nq * n * d,
        )
    candidates = torch.randint(0, n, (1024, 100), device="cuda")
    q = torch.randn(1024, d, device="cuda")

    def torch_rescore():
        s, at = torch.einsum("qd,qcd->qc", q, x[candidates]).topk(10)
        return s, candidates.gather(1, at)

    yield Case(
        "rescore 1024 queries, 100 candidates",
        lambda: lutra.scan.rescore(q, x, candidates, 10),
        [()],
        torch_rescore,
        lambda a, b: near(1e-3, 1e-3)(a.scores[:, 0], b[0][:, 0]),
        bytes=candidates.numel() * (d * 4 + 8),
    )
