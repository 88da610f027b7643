"""Tied heads: logits from compressed tables against the dense product.

``python benchmarks/bench_heads.py`` prints the tables of docs/heads.md (some minutes; 2 GB of memory):
``--threads 2`` on two threads, ``--quick`` a small vocabulary, ``--only`` and ``--dtype`` a part of it,
``--json FILE`` keeps the rows. Times are medians, on one thread of the process's time, on more of wall clock;
the ways take turns. Codes and tables are random: times do not depend on them.

``pytest benchmarks/bench_heads.py`` checks the quick form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial

import pytest

torch = pytest.importorskip("torch")
import lutra  # noqa: E402

FORMATS = ("pq:m=64", "pq:m=128", "pq:m=256,bits=4", "int8", "int4", "int2", "nf4", "fp8",
           "low_rank:rank=128")  # fmt: skip


def layer(spec: str, rows: int, dim: int, dtype):
    """An embedding of a format; int tables are packed from random rows."""
    format = lutra.compress.format(spec)
    if format.name in ("pq", "low_rank"):
        data = format.initial((rows, dim), seed=0)
    else:
        data = {"codes": lutra.gather.pack_rows(torch.randn(rows, dim), format.kind, format.columns).numpy()}
    cls = getattr(lutra.nn, f"{type(format).layer}Embedding")
    return cls.from_table(lutra.compress.Table(format, (rows, dim), data), dtype=dtype).requires_grad_(False)


def interleaved(ways, repeats: int):
    """Median milliseconds of each way, which take turns."""
    times = {name: [] for name in ways}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            begin = clock()
            way()
            times[name].append((clock() - begin) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def logits(rows: int, dim: int, tokens, dtype, specs=FORMATS):
    """Milliseconds of the logits of each format, and of the dense product."""
    heads = {spec: lutra.nn.TiedHead(layer(spec, rows, dim, dtype)) for spec in specs}
    dense = torch.randn(rows, dim).to(dtype)
    for n in tokens:
        hidden = torch.randn(n, dim).to(dtype)
        ways = {"dense": partial(torch.nn.functional.linear, hidden, dense)}
        ways |= {spec: partial(head, hidden) for spec, head in heads.items()}
        with torch.no_grad():
            yield {"what": "logits", "dtype": str(dtype), "tokens": n, **interleaved(ways, 9 if n < 8 else 5)}


def selected(rows: int, dim: int, tokens, dtype, specs=FORMATS, k: int = 50):
    """Milliseconds of the 50 largest logits."""
    heads = {spec: lutra.nn.TiedHead(layer(spec, rows, dim, dtype)) for spec in specs}
    dense = torch.randn(rows, dim).to(dtype)
    for n in tokens:
        hidden = torch.randn(n, dim).to(dtype)
        ways = {"dense": lambda hidden=hidden: torch.nn.functional.linear(hidden, dense).topk(k)}
        ways |= {spec: partial(head.topk, hidden, k) for spec, head in heads.items()}
        with torch.no_grad():
            yield {"what": "topk", "dtype": str(dtype), "tokens": n, **interleaved(ways, 7)}


def training(rows: int, dim: int, tokens: int, specs=("pq:m=64", "low_rank:rank=128", "int8")):
    """Milliseconds of the cross entropy, forward and backward, in float32."""
    hidden, targets = torch.randn(tokens, dim), torch.randint(0, rows, (tokens,))
    dense = torch.randn(rows, dim, requires_grad=True)

    def step(head):
        def run():
            x = hidden.clone().requires_grad_(True)
            loss = (
                torch.nn.functional.cross_entropy(x @ dense.T, targets)
                if head is None
                else head.cross_entropy(x, targets)
            )
            loss.backward()

        return run

    ways = {"dense": step(None)}
    for spec in specs:
        embedding = layer(spec, rows, dim, torch.float32)
        for p in embedding.parameters():
            p.requires_grad_(p.numel() > 0)
        ways[spec] = step(lutra.nn.TiedHead(embedding))
    yield {"what": "cross_entropy", "dtype": "torch.float32", "tokens": tokens, **interleaved(ways, 1)}


def show(row):
    head = f"{row['what']} {row['dtype'].removeprefix('torch.')} tokens={row['tokens']}"
    dense = row["dense"]
    rest = (
        f"{k} {v:.2f} ({dense / v:.1f}x)"
        for k, v in row.items()
        if k not in ("what", "dtype", "tokens", "dense")
    )
    print(f"{head}: dense {dense:.2f} ms; " + "; ".join(rest), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("logits", "topk", "training"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of logits; default both")
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lutra.set_num_threads(given.threads)
    rows, dim = (20_000, 256) if given.quick else (151_936, 1024)
    tokens = (1, 4, 64) if given.quick else (1, 4, 16, 64)
    dtypes = [getattr(torch, given.dtype)] if given.dtype else [torch.bfloat16, torch.float32]
    parts = {
        "logits": lambda: (r for d in dtypes for r in logits(rows, dim, tokens, d)),
        "topk": lambda: selected(rows, dim, (1, 4), torch.bfloat16),
        "training": lambda: training(rows, dim, 256),
    }
    found = []
    for name, part in parts.items():
        if given.only in (None, name):
            for row in part():
                show(row)
                found.append(row)
    if given.json:
        with open(given.json, "w") as file:
            json.dump(found, file, indent=1)


def test_quick():
    for row in (
        *logits(3000, 64, (1, 20), torch.bfloat16, ("pq:m=8", "int4")),
        *training(3000, 64, 20, ("pq:m=8",)),
    ):
        assert all(v > 0 for v in row.values() if isinstance(v, float))


if __name__ == "__main__":
    main()
