"""A small model of text with each format, from scratch and converted.

The next byte of tinyshakespeare from the 1- to 6-grams before it: each n-gram has a row in a hashed table of
50,000 x 32, the rows of a position are summed by an EmbeddingBag, and two dense layers give the 65 logits.
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

ROWS, DIM, ORDER = 50_000, 32, 6


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
        self.steps = 150 if quick else 1500
        self.batch = 256 if quick else 1024

    def head(self, gain: float = 1.0):
        """The dense layers; ``gain`` scales rows that begin about N(0, 1) down to what they expect."""
        torch = self.torch
        torch.manual_seed(1)
        first = torch.nn.Linear(DIM, 128)
        with torch.no_grad():
            first.weight.mul_(gain)
        return torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Linear(128, self.symbols))

    def train(self, bag, head, steps: int, lr: float = 3e-3) -> float:
        """Train both; the loss on the last tenth, nats a byte."""
        import lutra.nn

        torch = self.torch
        generator = torch.Generator().manual_seed(2)
        parameters = [p for p in (*bag.parameters(), *head.parameters()) if p.requires_grad and p.numel()]
        optimizer = torch.optim.Adam(parameters, lr=lr)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 2 * (1 - step / steps))
            pick = torch.randint(self.cut, (self.batch,), generator=generator)
            loss = torch.nn.functional.cross_entropy(head(bag(self.x[pick])), self.y[pick])
            loss = loss + lutra.nn.regularization(bag)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            lutra.nn.step_schedules(bag)
        return self.loss(bag, head)

    def loss(self, bag, head) -> float:
        torch = self.torch
        with torch.no_grad():
            logits = head(bag(self.x[self.cut :]))
            return float(torch.nn.functional.cross_entropy(logits, self.y[self.cut :]))


def rows(
    folder: Path | None, quick: bool, names: list[str] | None = None, share: float = 0.125
) -> Iterator[dict]:
    """For each format: the loss trained from scratch in it, converted, and converted and trained a little
    more."""
    import copy

    import torch

    import lutra.nn

    trainer = Trainer(folder, quick)
    torch.manual_seed(0)
    dense, head = lutra.nn.EmbeddingBag(trainer.rows, DIM, mode="sum"), trainer.head()
    with torch.no_grad():
        dense.weight.mul_(0.1)
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
            row["scratch"] = trainer.train(fresh, trainer.head(0.1), trainer.steps)
        row["seconds"] = time.perf_counter() - began
        yield row


#: Training methods and what they are given here. PEP, VTrans, AutoSrh, AutoDim and OptEmbed need settings of
#: their own to come to a size: docs/training-methods.md has runs of them.
METHODS: dict[str, dict[str, Any]] = {
    "DPQ": {"m": 8, "k": 256}, "MGQE": {"m": 8, "k": 256}, "QLAE": {"levels": 4}, "DeepLight": {"rate": 0.8},
    "Adapt": {}, "CAFE": {}, "CCE": {},
}  # fmt: skip


def method_rows(folder: Path | None, quick: bool, names: list[str] | None = None) -> Iterator[dict]:
    """For each training method: the loss with the method on, and with the table as it is stored
    afterwards."""
    import torch

    import lutra.nn

    trainer = Trainer(folder, quick)
    for name in names or METHODS:
        layer = getattr(lutra.nn, "AdaptEmbeddingBag" if name == "Adapt" else f"{name}EmbeddingBag")
        torch.manual_seed(0)
        began = time.perf_counter()
        bag = layer(trainer.rows, DIM, mode="sum", **METHODS[name])
        with torch.no_grad():
            for p in bag.parameters():
                if p.dim() == 2 and p.shape[1] == DIM:
                    p.mul_(0.1)
        head = trainer.head()
        row: dict[str, Any] = {"format": name, "scratch": trainer.train(bag, head, trainer.steps)}
        if name == "DeepLight":
            bag.prune(METHODS[name]["rate"])
        holder = torch.nn.Sequential(bag)
        lutra.nn.finish(holder)
        stored: Any = holder[0]
        row["converted"] = trainer.loss(stored, head)
        row["share"] = stored.nbytes / (trainer.rows * DIM * 4)
        row["seconds"] = time.perf_counter() - began
        yield row


def line(row: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return f"{row[key]:.4f}" if key in row else "-"

    return (
        f"{row.get('parameters', row['format']):<44} {row['share']:>7.2%}  scratch {number('scratch'):>7}  "
        f"converted {number('converted'):>7}  tuned {number('tuned'):>7}  {row.get('seconds', 0):.0f} s"
    )
