"""MemoryLinear against nn.Linear and against the layer in torch's operations."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch

import lutra
import lutra.nn
import lutra.optim
from layers.timing import medians

BITS = 8


def composed(x, tables, bias):
    """The layer in torch's operations."""
    n_tables, entries, dim = tables.shape
    z = x.view(-1, n_tables, BITS).float()
    codes = ((z >= 0).long() << torch.arange(BITS)).sum(-1) + torch.arange(n_tables) * entries
    weights = torch.sigmoid(2 * z.abs()).prod(-1).to(tables.dtype)
    flat = tables.view(-1, dim)
    return torch.nn.functional.embedding_bag(codes, flat, per_sample_weights=weights, mode="sum") + bias


def check(got, want, limit):
    torch.testing.assert_close(got.float(), want.float(), rtol=limit, atol=limit)


def layers(d, dtype):
    layer = lutra.nn.MemoryLinear(d, d, BITS, dtype=dtype)
    small = lutra.nn.MemoryLinear(d, d, BITS, dtype=torch.float32 if dtype == torch.float32 else dtype)
    small.load_state_dict(layer.state_dict())
    return layer, small.quantize_(), torch.nn.Linear(d, d, dtype=dtype)


def forward(d: int, tokens: int, dtype, made, seconds: float) -> dict:
    layer, small, dense = made
    xs = [torch.randn(tokens, d).to(dtype) for _ in range(8 if tokens < 512 else 2)]
    turns = [cycle(xs) for _ in range(4)]
    with torch.no_grad():
        limit = 1e-4 if dtype == torch.float32 else 3e-2
        want = composed(xs[0].float(), layer.tables.float(), layer.bias.float())
        check(layer(xs[0]), want, limit)
        rows = small.minimum[..., None] + small.scale[..., None] * small.tables
        check(small(xs[0]), composed(xs[0].float(), rows, layer.bias.float()), limit)
        ways = {
            "lutra": lambda: layer(next(turns[0])),
            "int8": lambda: small(next(turns[1])),
            "linear": lambda: dense(next(turns[2])),
            "torch": lambda: composed(next(turns[3]), layer.tables, layer.bias),
        }
        if dtype == torch.float32:  # the kernel alone, without hash and torch
            hashed = cycle([tuple(lutra.address.sign_hash(x.numpy(), BITS)) for x in xs])
            tables, bias = layer.tables.numpy(), layer.bias.numpy()
            ways["gather"] = lambda: lutra.gather.tables(tables, *next(hashed), bias)
        return medians(ways, seconds)


def training(d: int, tokens: int, dtype, made, seconds: float) -> dict:
    """Forward and backward with a dense gradient; and with the fused update, whole steps of SGD."""
    layer, _, dense = made
    fused = lutra.nn.MemoryLinear(d, d, BITS, dtype=dtype)
    fused.load_state_dict(layer.state_dict())
    optimizer = lutra.optim.SGD(fused.parameters(), lr=1e-6)
    optimizer.attach(fused)
    xs = [torch.randn(tokens, d).to(dtype) for _ in range(8 if tokens < 512 else 2)]
    turn, grad = cycle(xs), torch.randn(tokens, d).to(dtype)

    def backward(f, *leaves, x=None):
        """The gradients, which die with the result: each way pays for its own."""
        inner = (next(turn) if x is None else x).clone().requires_grad_()
        f(inner).backward(grad)
        found = inner.grad, *(p.grad for p in leaves)
        for p in leaves:
            p.grad = None
        return found

    def step():
        optimizer.zero_grad()
        inner = next(turn).clone().requires_grad_()
        fused(inner).backward(grad)
        optimizer.step()

    own = layer.tables, layer.bias
    limit = 1e-3 if dtype == torch.float32 else 6e-2
    both = backward(layer, *own, x=xs[0]), backward(lambda v: composed(v, *own), *own, x=xs[0])
    for a, b, factor in zip(*both, (1.0, max(1.0, tokens / 64), max(1.0, tokens / 64))):
        check(a, b, limit * factor)
    del both, a, b
    ways = {
        "lutra": lambda: backward(layer, *own),
        "lutra fused step": step,
        "linear": lambda: backward(dense, *dense.parameters()),
        "torch": lambda: backward(lambda v: composed(v, *own), *own),
    }
    return medians(ways, seconds)


def rows(quick: bool) -> Iterator[dict]:
    sizes = (256,) if quick else (512, 1024, 4096)
    counts = (1, 16, 300) if quick else (1, 16, 512, 4096)
    threads = torch.get_num_threads()
    for d in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            made = layers(d, dtype)
            for tokens in counts:
                if d >= 4096 and tokens > 512 and dtype == torch.bfloat16:
                    continue  # torch's own operations take minutes
                about = {"d": d, "dtype": str(dtype)[6:], "tokens": tokens, "threads": threads}
                seconds = 0.1 if quick else 1.0
                yield {"what": "forward", **about, **forward(d, tokens, dtype, made, seconds)}
                if d < 4096 or (tokens == 1 and dtype == torch.float32):  # tables of 2 GB and their gradients
                    yield {"what": "training", **about, **training(d, tokens, dtype, made, seconds)}


def line(row: dict) -> str:
    head = (
        f"{row['what']:8} d {row['d']:4} {row['dtype']:8} tokens {row['tokens']:4} threads {row['threads']}:"
    )
    ours = row["lutra"]
    rest = "; ".join(
        f"{name} {row[name]:.3f} ({row[name] / ours:.1f}x)"
        for name in ("gather", "int8", "lutra fused step", "linear", "torch")
        if name in row
    )
    return f"{head} lutra {ours:.3f} ms; {rest}"
