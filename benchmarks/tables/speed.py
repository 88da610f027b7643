"""Forward and backward of every format against the same written in torch's own ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import lutra
from lutra.bench import interleaved
from lutra.compress import FORMATS, Table

from .quality import about

DIM, LENGTH = 64, 20


def rows(quick: bool, names: list[str] | None = None, share: float = 0.125) -> Iterator[dict[str, Any]]:
    """Milliseconds of a bag of 20 fresh ids (sum), forward, and forward and backward."""
    import torch

    n, bags = (20_000, 256) if quick else (1_000_000, 4096)
    shape = (n, DIM)
    rng = np.random.default_rng(0)
    pool = [torch.from_numpy(rng.integers(0, n, (bags, LENGTH))) for _ in range(16)]
    dense = torch.randn(shape)
    for name in names or sorted(FORMATS):
        # The budget would give a tensor train a rank of hundreds, with a product of rank^2 a row.
        found = FORMATS["tt"](rank=16) if name == "tt" else about(name, shape, share)
        if found is None:
            continue
        arrays = found.arrays(shape)
        data = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in found.initial(shape, 0).items()}
        for key, value in data.items():
            value.requires_grad_(arrays[key].trainable)
        table = Table(found, shape, data)
        leaves = [v for v in data.values() if v.requires_grad]
        weight = torch.randn(
            bags, LENGTH, requires_grad=not leaves
        )  # codes alone: the gradient of the weights

        def ours(ids, table=table, weight=weight, leaves=leaves):
            return lutra.gather.bag(table, ids, None, None if leaves else weight)

        def composed(ids, table=table, weight=weight, leaves=leaves):
            rows = table.format.lookup(table.data, table.shape, ids.reshape(-1)).reshape(bags, LENGTH, DIM)
            return rows.sum(1) if leaves else (rows * weight.unsqueeze(2)).sum(1)

        with torch.no_grad():
            a, b = ours(pool[0]), composed(pool[0])
        assert torch.allclose(a, b, atol=1e-3 * (1 + float(b.abs().max()))), name
        cycle = _cycle(pool)
        inputs = leaves or [weight]

        def step(function: Callable, cycle=cycle, inputs=inputs):
            for p in inputs:
                p.grad = None
            function(cycle()).sum().backward()

        def forward(function: Callable, cycle=cycle):
            with torch.no_grad():
                function(cycle())

        budget = 0.3 if quick else 4.0
        t = interleaved(
            {
                "forward": lambda ours=ours: forward(ours),
                "forward, torch": lambda composed=composed: forward(composed),
                "step": lambda ours=ours: step(ours),
                "step, torch": lambda composed=composed: step(composed),
                "dense": lambda cycle=cycle: lutra.gather.bag(dense, cycle()),
            },
            budget,
        )
        ms = {key: 1e3 * value.median for key, value in t.items()}
        yield {
            "format": name, "parameters": found.describe(), "share": table.nbytes / (n * DIM * 4), **ms,
            "forward ratio": ms["forward, torch"] / ms["forward"], "step ratio": ms["step, torch"] /
            ms["step"], "of dense rows": ms["dense"] / ms["forward"],
        }  # fmt: skip


def _cycle(pool: list) -> Callable[[], Any]:
    position = [0]

    def following():
        position[0] += 1
        return pool[position[0] % len(pool)]

    return following


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['parameters']:<44} {row['share']:>6.1%}  forward {row['forward']:>8.3f} ms "
        f"({row['forward ratio']:>5.1f}x torch ops, {row['of dense rows']:.2f}x fp32 rows)  "
        f"with backward {row['step']:>8.3f} ms ({row['step ratio']:>5.1f}x)"
    )
