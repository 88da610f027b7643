"""IVF lists, k-means and indexes on the GPU."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from harness import Case, near

import lutra
from lutra import quant
from lutra.index import IVF, Flat, _kmeans
from lutra.index._home import home_of
from lutra.scan import _lists

LISTS, PROBES = 1024, 16


def cases(scale: int) -> Iterator[Case]:
    yield from kmeans(scale)
    yield from scans(scale)
    yield from indexes(scale)


# ---------------------------------------------------------------- k-means
def torch_means(x: Any, codes: Any, k: int) -> Any:
    sums = torch.zeros(k, x.shape[1], device="cuda").index_add_(0, codes, x)
    return sums / torch.bincount(codes, minlength=k).clamp(min=1)[:, None]


def torch_nearest(x: Any, centroids: Any) -> Any:
    square = centroids.square().sum(1)
    return torch.cat([(square - 2 * part @ centroids.T).argmin(1) for part in x.split(32768)])


def kmeans(scale: int) -> Iterator[Case]:
    n, d = 1_000_000 // scale, 128
    for k in (1024, 16384):
        k = max(16, k // scale)
        x = torch.randn(n, d, device="cuda")
        codes = torch.randint(0, k, (n,), device="cuda")
        home = home_of(x)
        yield Case(
            f"means of {k} clusters, {n}x{d}",
            lambda x, c, k=k, home=home: _kmeans._launch_means(home, x, c, k)[0],
            [(x, codes)],
            lambda x, c, k=k: torch_means(x, c, k),
            near(1e-4, 1e-5),
            bytes=n * d * 4,
        )

        def iteration(x, centroids, k=k, home=home):
            codes = lutra.address.nearest(x, centroids, 1, "l2").ids[:, 0]
            return codes, _kmeans._launch_means(home, x, codes, k)[0]

        def theirs(x, centroids, k=k):
            codes = torch_nearest(x, centroids)
            return codes, torch_means(x, codes, k)

        def same(ours, theirs):
            assert (ours[0] == theirs[0]).float().mean() > 0.999

        yield Case(
            f"k-means iteration, {k} clusters, {n}x{d}",
            iteration,
            [(x, x[torch.randperm(n, device="cuda")[:k]])],
            theirs,
            same,
            bytes=2 * n * d * 4,
            flops=2.0 * n * k * d,
        )


# ---------------------------------------------------------------- lists
def arena(rows: int, nlist: int) -> tuple[Any, ...]:
    """Lists of about equal length: begin, sizes, positions, their number, rows of the arena."""
    make = torch.Generator().manual_seed(0)
    sizes = torch.randint(rows // nlist // 2, rows // nlist * 3 // 2, (nlist,), generator=make)
    room = (sizes + 15) // 16 * 16
    begin = room.cumsum(0) - room
    total = int(room.sum())
    positions = torch.full((total,), -1, dtype=torch.int32)
    owned = torch.arange(total) - begin.repeat_interleave(room) < sizes.repeat_interleave(room)
    count = int(owned.sum())
    positions[owned] = torch.randperm(count, generator=make).to(torch.int32)
    return begin, sizes, positions, count, total


def lists_of(laid: tuple[Any, ...], probes: Any) -> _lists.Lists:
    begin, sizes, positions, count, _ = laid
    return _lists.Lists(
        begin.cuda(), sizes.cuda(), positions.cuda(), count, None, probes, int(sizes.max()),
        int(sizes.square().sum() // sizes.sum()),
    )  # fmt: skip


def rows_of_query(laid: tuple[Any, ...], probes: Any) -> Any:
    begin, sizes = laid[0], laid[1]
    return torch.cat([begin[p] + torch.arange(int(sizes[p])) for p in probes.tolist()]).cuda()


def scans(scale: int) -> Iterator[Case]:
    rows, d, k = 1_000_000 // scale, 128, 10
    nlist = max(32, LISTS // scale)
    laid = arena(rows, nlist)
    total = laid[4]
    mean = rows / nlist
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(total // 16, d, 16, device="cuda").to(dtype)
        for nq in (1, 32, 1024):
            inputs = []
            for _ in range(4):
                probes = torch.stack([torch.randperm(nlist)[:PROBES] for _ in range(nq)]).cuda()
                inputs.append((torch.randn(nq, d, device="cuda"), lists_of(laid, probes)))

            def ours(q, lists, x=x):
                return _lists.list_rows(q, x, lists, k, "l2")

            def check(got, x=x, inputs=inputs):
                q, lists = inputs[0]
                own = rows_of_query(laid, lists.probes[0].cpu())
                values = x[own >> 4, :, own & 15].float()
                best = (values - q[0]).square().sum(1).topk(k, largest=False)
                torch.testing.assert_close(got[0][0], best.values, rtol=1e-4, atol=1e-3)
                assert (got[1][0] == lists.positions[own[best.indices]]).float().mean() > 0.8

            check(ours(*inputs[0]))
            read = min(nq * PROBES, nlist * (1 - (1 - PROBES / nlist) ** nq)) * mean * d * x.element_size()
            yield Case(
                f"list_rows {str(dtype)[6:]} {rows}x{d}, {PROBES} of {nlist} lists, {nq} queries",
                ours,
                inputs,
                bytes=read,
                flops=2.0 * nq * PROBES * mean * d,
            )
    for bits, m in ((8, 16), (4, 32)):
        shape = (total // 16, m // 8, 16, 4) if bits == 4 else (total, m)
        codes = torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)
        for nq in (1, 32, 1024):
            inputs = []
            for _ in range(4):
                probes = torch.stack([torch.randperm(nlist)[:PROBES] for _ in range(nq)]).cuda()
                inputs.append((torch.randn(nq, m, 1 << bits, device="cuda"), lists_of(laid, probes)))
            yield Case(
                f"list_lut {m} codes of {bits} bits, {rows}, {PROBES} of {nlist} lists, {nq} queries",
                lambda lut, lists, codes=codes, bits=bits: _lists.lut8(lut, codes, lists, k, "ip", bits=bits),
                inputs,
                bytes=nq * PROBES * mean * m * bits / 8,
            )


# ---------------------------------------------------------------- indexes
STORES = {
    "float32": lambda d: None,
    "float16": lambda d: "float16",
    "SQ 8": lambda d: quant.SQ(d),
    "PQ 16x8": lambda d: quant.PQ(d, 16, 8),
    "PQ 64x4": lambda d: quant.PQ(d, 64, 4),
}


def indexes(scale: int) -> Iterator[Case]:
    """IVF searches whose recall is in the name; the time of one query is that of a CUDA graph."""
    n, d, k = 1_000_000 // scale, 128, 10
    nlist = max(32, LISTS // scale)
    centers = torch.randn(4 * nlist, d, device="cuda")

    def draw(count):
        return centers[torch.randint(0, len(centers), (count,), device="cuda")] + 0.5 * torch.randn(
            count, d, device="cuda"
        )

    x, queries = draw(n), [draw(1024) for _ in range(3)]
    exact = Flat(d, "l2")
    exact.add(x)
    truth = exact.search(queries[0], k).ids
    for name, make in STORES.items():
        start = time.perf_counter()
        index = IVF(d, nlist, make(d), nprobe=PROBES, refine=None if "PQ" not in name else "float16")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            index.train(x[: 256 * nlist], n_iter=5)
        middle = time.perf_counter()
        index.add(x)
        built = {"train_s": middle - start, "add_s": time.perf_counter() - middle}
        found = index.search(queries[0], k).ids
        recall = (found[:, :, None] == truth[:, None]).any(1).float().mean().item()
        for nq in (1, 1024):
            yield Case(
                f"IVF {name}, {PROBES} of {nlist} lists, recall {recall:.3f}, {nq} queries",
                lambda q, index=index: index.search(q, k),
                [(q[:nq].clone(),) for q in queries],
                numbers={**built, "recall": recall},
                graph=nq == 1,
            )
