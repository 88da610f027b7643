"""A small model of text with each format, from scratch and converted.

The next byte of tinyshakespeare from the 1- to 6-grams before it: each n-gram has a row in a hashed table of
20,000 x 32, the rows of a position are summed by an EmbeddingBag, and two dense layers give the 65 logits.
Nearly all parameters lie in the table. The n-grams are hashed backwards from the position here:
`lutra.address.token_ngrams` goes through a text by their starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lutra.compress import FORMATS

from .quality import about

ROWS, DIM, ORDER = 20_000, 32, 6
LR = 3e-3
#: Of the rows that a table begins with: the head expects sums of six about this long.
SPREAD = 0.1


def corpus(folder: Path | None, quick: bool) -> tuple[np.ndarray, int]:
    """Bytes as small integers, and how many different ones there are."""
    if folder is None:
        text = b"".join(b"the quick brown fox %d jumps over the lazy dog\n" % (i % 97) for i in range(4000))
    else:
        text = (folder / "tinyshakespeare.txt").read_bytes()
    symbols, tokens = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    tokens = tokens.astype(np.int64)
    return (tokens[:60_000] if quick else tokens), len(symbols)


def grams(tokens: np.ndarray, rows: int) -> np.ndarray:
    """The rows of the n-grams that end at each position, (positions, ORDER)."""
    n = len(tokens)
    out = np.empty((n, ORDER), np.int64)
    h = np.zeros(n, np.uint64)
    padded = np.concatenate([np.zeros(ORDER, np.int64), tokens + 1])
    for k in range(ORDER):
        h = h * np.uint64(1099511628211) + padded[ORDER - k : ORDER - k + n].astype(np.uint64)
        mixed = (h ^ (h >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15 + 2 * k)
        out[:, k] = ((mixed >> np.uint64(20)) % np.uint64(rows)).astype(np.int64)
    return out


class Trainer:
    """The model with some bag layer in front, the same batches for all."""

    def __init__(self, folder: Path | None, quick: bool) -> None:
        import torch

        self.torch = torch
        tokens, self.symbols = corpus(folder, quick)
        self.rows = ROWS // 10 if quick else ROWS
        ids = grams(tokens, self.rows)[:-1]
        cut = len(ids) * 9 // 10
        self.x, self.y = torch.from_numpy(ids), torch.from_numpy(tokens[1:])
        self.cut = cut
        self.counts = np.bincount(ids[:cut].reshape(-1), minlength=self.rows)
        self.steps = 150 if quick else 1200
        self.batch = 256 if quick else 512

    def head(self, spread: float = SPREAD):
        """The dense layers, for rows that begin about N(0, ``spread``**2)."""
        torch = self.torch
        torch.manual_seed(1)
        layers = [torch.nn.Linear(DIM, 128), torch.nn.ReLU(), torch.nn.Linear(128, self.symbols)]
        return torch.nn.Sequential(Scale(SPREAD / spread), *layers)

    def first(self, spread: float = SPREAD):
        """A dense table to begin with."""
        return spread * self.torch.randn(self.rows, DIM, generator=self.torch.Generator().manual_seed(3))

    def train(
        self, bag, head, steps: int, lr: float = LR, spread: float = SPREAD,
        rates: dict[str, float] | None = None, optimizer: Any = None,
    ) -> float:  # fmt: skip
        """Train both; the loss on the last tenth, nats a byte.

        ``spread``: of the rows as they begin. Steps of Adam are as long as the learning rate, so rows that
        begin ten times as long need ten times the rate. ``rates``: of parameters of the table, by name.
        """
        import lutra.nn

        torch = self.torch
        generator = torch.Generator().manual_seed(2)
        groups = [{"params": list(head.parameters()), "lr": lr}]
        for name, p in bag.named_parameters():
            if p.requires_grad and (p.numel() or optimizer is not None):
                groups.append({"params": [p], "lr": (rates or {}).get(name, lr * spread / SPREAD)})
        optimizer = (optimizer or torch.optim.Adam)(groups)
        if hasattr(bag, "packed"):
            optimizer.attach(bag)
        first = [group["lr"] for group in optimizer.param_groups]
        bag.train()
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, first):
                group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
            pick = torch.randint(self.cut, (self.batch,), generator=generator)
            loss = torch.nn.functional.cross_entropy(head(bag(self.x[pick])), self.y[pick])
            loss = loss + lutra.nn.regularization(bag)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            lutra.nn.step_schedules(bag)
        return self.loss(bag, head)

    def loss(self, bag, head, part: slice | None = None) -> float:
        """The loss in eval mode; of the last tenth, or of a part of the training text."""
        torch = self.torch
        part = slice(self.cut, None) if part is None else part
        bag.eval()
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(head(bag(self.x[part])), self.y[part]))


def Scale(factor: float):
    """The layer that multiplies by a number."""
    import torch

    class Scaled(torch.nn.Module):
        def forward(self, x):
            return x * factor

    return Scaled()


def rows(
    folder: Path | None, quick: bool, names: list[str] | None = None, share: float = 0.125
) -> Iterator[dict]:
    """For each format: the loss trained from scratch in it, converted, and converted and trained a little
    more."""
    import copy

    import torch

    import lutra.nn

    trainer = Trainer(folder, quick)
    dense, head = (
        lutra.nn.EmbeddingBag(trainer.rows, DIM, mode="sum", _weight=trainer.first()),
        trainer.head(),
    )
    began = time.perf_counter()
    best = trainer.train(dense, head, trainer.steps)
    yield {"format": "dense", "share": 1.0, "scratch": best, "seconds": time.perf_counter() - began}
    shape = (trainer.rows, DIM)
    zeros = lutra.nn.EmbeddingBag(trainer.rows, DIM, mode="sum", _weight=torch.zeros(shape))
    nothing = trainer.train(zeros.requires_grad_(False), trainer.head(), trainer.steps // 4)
    yield {"format": "dense layers alone", "share": 0.0, "scratch": nothing}
    for name in names or sorted(FORMATS):
        found = about(name, shape, share)
        if found is None:
            continue
        layer = getattr(lutra.nn, f"{FORMATS[name].layer}EmbeddingBag")
        began = time.perf_counter()
        made = layer.from_pretrained(
            dense.weight.detach(),
            freeze=False,
            mode="sum",
            format=found,
            counts=trainer.counts,
            progress=False,
        )
        row: dict[str, Any] = {
            "format": name, "parameters": found.describe(), "share": made.nbytes / (trainer.rows * DIM * 4),
            "converted": trainer.loss(made, head),
        }  # fmt: skip
        row["tuned"] = trainer.train(made, copy.deepcopy(head), trainer.steps // 5, 1e-3)
        if any(p.requires_grad and p.numel() for p in made.parameters()):
            torch.manual_seed(0)
            fresh = layer(trainer.rows, DIM, mode="sum", format=found)
            row["scratch"] = trainer.train(fresh, trainer.head(1.0), trainer.steps, spread=1.0)
        row["seconds"] = time.perf_counter() - began
        yield row


def line(row: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return f"{row[key]:.4f}" if key in row else "-"

    return (
        f"{row.get('parameters', row['format']):<44} {row['share']:>7.2%}  scratch {number('scratch'):>7}  "
        f"converted {number('converted'):>7}  tuned {number('tuned'):>7}  {row.get('seconds', 0):.0f} s"
    )
