"""Language models of memory layers and their dense twin: equal settings, equal steps, their losses.

The trainer of ``python -m lutra.examples.train_lm`` on tinyshakespeare's bytes (random words where there is
no real data): 4 blocks of width 128, 2,000 steps of 16 windows of 128 bytes, with each of two highest
learning rates. Five to ten minutes of one core for each model and rate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from real_data import data_folder

from lutra.examples._models import ARCHITECTURES
from lutra.examples._run import draw
from lutra.examples._training import Settings, Trainer

RATES = (1e-3, 3e-3)
_curves: dict[str, dict[float, list[list[float]]]] = {}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """The last losses of each architecture at each rate, nats a byte."""
    folder = data_folder()
    small = {
        "dim": 32,
        "layers": 2,
        "heads": 2,
        "context": 32,
        "batch": 4,
        "steps": 30,
        "warmup": 5,
        "bits": 4,
    }
    sizes = (
        {**small, "ffn_bits": 5, "eval_every": 30, "eval_windows": 4}
        if quick
        else {"dim": 128, "eval_every": 250}
    )
    _curves.clear()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "text.txt")
        if folder is not None:
            path = folder / "tinyshakespeare.txt"
        else:
            words = np.random.default_rng(0).zipf(1.4, 20_000) % 100
            path.write_text(" ".join(f"{'ab' * (i % 5)}{i}" for i in words))
        for arch in ARCHITECTURES:
            for rate in RATES[-1:] if quick else RATES:
                trainer = Trainer(Settings(arch=arch, data=str(path), lr=rate, **sizes))
                begin = time.process_time()
                parameters = sum(p.numel() for p in trainer.model.parameters())
                losses = _curves.setdefault(arch, {})[rate] = trainer.train()
                yield {
                    "arch": arch, "lr": rate, "steps": len(losses), "first": losses[0][1],
                    "held out": losses[-1][2], "parameters": parameters,
                    "seconds": time.process_time() - begin,
                }  # fmt: skip


def expect(found: list[dict[str, Any]]) -> None:
    """Each has learned something."""
    assert [r["arch"] for r in found] == list(ARCHITECTURES)
    assert all(r["held out"] < r["first"] - 0.5 for r in found), found


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['arch']:13} lr {row['lr']:g}: {row['parameters'] / 1e6:.2f} million parameters, "
        f"{row['steps']} steps, {row['seconds']:.0f} s; held out {row['held out']:.4f} nats a byte"
    )


def plot(folder: Path) -> None:
    """Each architecture at the better of its rates, into twins.svg."""
    best = {arch: min(runs.items(), key=lambda r: r[1][-1][2]) for arch, runs in _curves.items()}
    draw(folder / "twins.svg", {f"{arch}, lr {rate:g}": curve for arch, (rate, curve) in best.items()})
