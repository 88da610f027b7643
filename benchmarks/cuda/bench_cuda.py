"""The CUDA kernels against torch and against the GPU's own limits.

    python benchmarks/cuda/bench_cuda.py [--quick] [--filter NAME] [--json FILE]

Each case checks its result against torch's before it is timed. Times are medians of CUDA events around one
call; inputs rotate so that no call finds the data of the last one in the caches where a real one would not;
lutra and torch take turns. `share` is the time that the measured limit allows (bytes over copy bandwidth
or fp32 operations over the rate of a large fp32 product, whichever takes longer) over the time taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lutra
from lutra import _backend

GB = 1e9
INPUTS = 6  # sets of inputs that calls rotate through


@dataclass
class Case:
    name: str
    ours: Callable[..., Any]
    inputs: list[tuple[Any, ...]]
    theirs: Callable[..., Any] | None = None
    check: Callable[[Any, Any], None] | None = None
    bytes: float = 0
    flops: float = 0
    numbers: dict[str, Any] = field(default_factory=dict)


def milliseconds(
    functions: list[Callable[..., Any]], inputs: list[tuple[Any, ...]], budget: float
) -> list[float]:
    """Median time of each function, called in turns until the budget (seconds) is spent."""
    times: list[list[float]] = [[] for _ in functions]
    for f in functions:
        for args in inputs[:2]:
            f(*args)
    torch.cuda.synchronize()
    spent, i = 0.0, 0
    while (spent < budget * 1e3 and i < 500) or i < 8:
        for f, t in zip(functions, times):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(200_000)  # 0.1 ms, so that the launch's own time on the host does not count
            start.record()
            f(*inputs[i % len(inputs)])
            end.record()
            end.synchronize()
            t.append(start.elapsed_time(end))
            spent += t[-1]
        i += 1
    return [statistics.median(t) for t in times]


def limits() -> dict[str, float]:
    """Bytes a second of a large copy (read and written), fp32 operations a second of a large product."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    (copy,) = milliseconds([b.copy_], [(a,)], 0.5)
    bandwidth = 2 * a.numel() * 4 / copy * 1e3
    m = torch.randn(8192, 8192, device="cuda")
    (product,) = milliseconds([lambda: m @ m], [()], 0.5)
    return {"copy_bytes_per_s": bandwidth, "fp32_flops_per_s": 2 * 8192**3 / product * 1e3}


def kernels(function: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> list[tuple[str, int, float]]:
    """What a call runs on the device: name, launches and milliseconds of each kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    calls = 10
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for i in range(calls):
            function(*inputs[i % len(inputs)])
        torch.cuda.synchronize()
    rows = [
        (event.key, round(event.count / calls), event.self_device_time_total / calls / 1e3)
        for event in record.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row[2])


def near(rtol: float = 1e-4, atol: float = 1e-4) -> Callable[[Any, Any], None]:
    def check(ours: Any, theirs: Any) -> None:
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol)

    return check


def same_neighbours(ours: Any, theirs: Any) -> None:
    """Scores agree, and all but near ties are the same ids."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)
    same = (ours[1].sort(1)[0] == theirs[1].sort(1)[0]).float().mean()
    assert same > 0.995, f"only {same:.4f} of the neighbours are torch's"


# ---------------------------------------------------------------- address
def address(scale: int) -> Iterator[Case]:
    def torch_hash(x):
        z = x.float().unflatten(-1, (-1, 8))
        powers = 1 << torch.arange(8, device="cuda", dtype=torch.int32)
        return ((z >= 0).int() * powers).sum(-1, dtype=torch.int32), torch.sigmoid(2 * z.abs()).prod(-1)

    def check(ours, theirs):
        assert bool((ours[0] == theirs[0]).all())
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)

    rows, d = 32768 // scale, 4096
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [(torch.randn(rows, d, device="cuda").to(dtype),) for _ in range(3)]
        size = inputs[0][0].element_size()
        yield Case(
            f"sign_hash {rows}x{d} {str(dtype)[6:]}",
            lutra.address.sign_hash,
            inputs,
            torch_hash,
            check,
            bytes=rows * d * (size + 1),
        )
    tokens = [(torch.randint(0, 30000, (16384 // scale, 256), device="cuda"),) for _ in range(3)]
    n = tokens[0][0].numel()
    yield Case(
        "token_ngrams order 2, 256 a text",
        lambda t: lutra.address.token_ngrams(t, buckets=2_000_000).ids,
        tokens,
        bytes=n * 8 * 3,
    )
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


# ---------------------------------------------------------------- gather
def gather(scale: int) -> Iterator[Case]:
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

    for d in (1024, 4096 if scale == 1 else 1024):
        n_tables = d // 8
        tables = torch.randn(n_tables, 256, d, device="cuda") * 0.02
        linear = torch.nn.Linear(d, d, device="cuda")
        for tokens in (1, 256, 4096 // scale):
            x = [(torch.randn(tokens, d, device="cuda"),) for _ in range(INPUTS)]

            def layer(x, tables=tables):
                return lutra.gather.tables(tables, *lutra.address.sign_hash(x))

            def composed(x, tables=tables, n_tables=n_tables):
                codes, weights = lutra.address.sign_hash(x)
                out = torch.empty(len(x), tables.shape[2], device="cuda")
                for a, c, w in zip(out.split(64), codes.split(64), weights.split(64)):
                    rows = tables[torch.arange(n_tables, device="cuda"), c.long()]
                    a.copy_(torch.bmm(w[:, None], rows)[:, 0])
                return out

            case = Case(
                f"memory layer {d}, {tokens} tokens",
                layer,
                x,
                composed,
                near(1e-3, 1e-4),
                bytes=min(tokens * n_tables, n_tables * 256) * d * 4 + tokens * d * 8,
            )
            with torch.no_grad():
                case.numbers["linear_ms"] = milliseconds([linear], x, 0.2)[0]
            yield case
        tokens = 4096 // scale
        x = torch.randn(tokens, d, device="cuda")
        codes, weights = lutra.address.sign_hash(x)
        leaf, leaf_w = tables.clone().requires_grad_(), weights.clone().requires_grad_()
        g = torch.randn(tokens, d, device="cuda")

        def backward(codes=codes, leaf=leaf, leaf_w=leaf_w, g=g):
            return torch.autograd.grad(lutra.gather.tables(leaf, codes, leaf_w), (leaf, leaf_w), g)

        yield Case(
            f"memory layer {d}, {tokens} tokens, forward + backward",
            backward,
            [()],
            bytes=3 * leaf.numel() * 4 + 3 * g.numel() * 4,
        )
        del leaf, tables


# ---------------------------------------------------------------- scan
def scan(scale: int) -> Iterator[Case]:
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the data, less time")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--profile", action="store_true", help="show the kernels of each case besides")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    usable, reason = _backend.cuda_status()
    if not usable or not torch.cuda.is_available():
        print(f"no CUDA benchmark: {reason if not usable else 'torch finds no CUDA device'}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    limit = limits()
    print(
        f"{torch.cuda.get_device_name()}: {limit['copy_bytes_per_s'] / GB:.0f} GB/s copy, "
        f"{limit['fp32_flops_per_s'] / 1e12:.1f} TFLOP/s fp32\n"
    )
    print(f"{'case':52} {'lutra ms':>9} {'torch ms':>9} {'ratio':>6} {'GB/s':>6} {'share':>6}")
    figures, failures = [], 0
    for group in (address, gather, scan):
        for case in group(8 if options.quick else 1):
            if options.filter not in case.name:
                continue
            figure: dict[str, Any] = {"name": case.name, **case.numbers}
            try:
                out = case.ours(*case.inputs[0])
                if case.check and case.theirs:
                    case.check(out, case.theirs(*case.inputs[0]))
                del out
                functions = [f for f in (case.ours, case.theirs) if f]
                times = milliseconds(functions, case.inputs, 0.1 if options.quick else 0.5)
            except Exception as error:  # one case that fails must not hide the others
                failures += 1
                figure["error"] = f"{type(error).__name__}: {error}"
                print(f"{case.name:52} failed: {figure['error'].splitlines()[0][:100]}")
                figures.append(figure)
                continue
            floor = 1e3 * max(case.bytes / limit["copy_bytes_per_s"], case.flops / limit["fp32_flops_per_s"])
            figure |= {
                "ms": times[0],
                "torch_ms": times[1] if len(times) > 1 else None,
                "ratio": times[1] / times[0] if len(times) > 1 else None,
                "gb_per_s": case.bytes / times[0] / 1e6,
                "share_of_limit": floor / times[0],
            }
            figures.append(figure)
            torch_ms, ratio = (
                (f"{times[1]:9.3f}", f"{times[1] / times[0]:6.2f}") if len(times) > 1 else (" " * 9, " " * 6)
            )
            print(
                f"{case.name:52} {times[0]:9.3f} {torch_ms} {ratio} {figure['gb_per_s']:6.0f} "
                f"{figure['share_of_limit']:6.2f}",
                flush=True,
            )
            if options.profile:
                for kernel, launches, took in kernels(case.ours, case.inputs)[:12]:
                    print(f"    {took:9.4f} ms  {launches:3} x  {kernel[:100]}")
    if options.json:
        options.json.write_text(
            json.dumps({"limits": limit, "cases": figures, "failures": failures}, indent=1)
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
