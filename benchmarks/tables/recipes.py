"""How each training method of `lutra.nn` is used on the model of `training`: its settings and its phases.

A recipe trains as many steps as the dense table, those with two phases half of them in each (PEP, as its
paper says, all of them once more from the first values), and gives the layer and the head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .training import DIM, LR, Trainer


def _layer(name: str, trainer: Trainer, first: Any, **method: Any):
    import torch

    import lutra.nn

    torch.manual_seed(0)
    cls = getattr(lutra.nn, f"{name}EmbeddingBag")
    return cls.from_pretrained(first, freeze=False, mode="sum", **method)


def plain(name: str, rates: dict[str, float] | None = None, **method: Any) -> Callable:
    """A dense table with a method, trained once."""

    def run(trainer: Trainer):
        head = trainer.head()
        bag = _layer(name, trainer, trainer.first(), **method)
        trainer.train(bag, head, trainer.steps, rates=rates)
        return bag, head

    return run


def shared(name: str, **method: Any) -> Callable:
    """Fewer rows than ids, which begin at N(0, 1)."""

    def run(trainer: Trainer):
        import torch

        import lutra.nn

        torch.manual_seed(0)
        head = trainer.head(1.0)
        bag = getattr(lutra.nn, f"{name}EmbeddingBag")(trainer.rows, DIM, mode="sum", **method)
        trainer.train(bag, head, trainer.steps, spread=1.0)
        return bag, head

    return run


def packed(name: str, bits: int) -> Callable:
    """Integer rows, attached to an optimizer of `lutra.optim`."""

    def run(trainer: Trainer):
        import lutra.optim

        head = trainer.head()
        bag = _layer(name, trainer, trainer.first(), bits=bits)
        trainer.train(bag, head, trainer.steps, optimizer=lutra.optim.Adam)
        return bag, head

    return run


def pep(trainer: Trainer):
    """Thresholds first; then the zeros stay, and the rest begins again."""
    first = trainer.first()
    bag = _layer("PEP", trainer, first.clone(), granularity="row", init=-3.5, decay=1e-6)
    trainer.train(bag, trainer.head(), trainer.steps, rates={"threshold": LR / 2})
    bag.keep_zeros(first)
    head = trainer.head()
    trainer.train(bag, head, trainer.steps)
    return bag, head


def deeplight(trainer: Trainer):
    bag, head = (
        _layer("DeepLight", trainer, trainer.first(), rate=0.9, damping=0.2, interval=10),
        trainer.head(),
    )
    trainer.train(bag, head, trainer.steps)
    bag.prune()
    return bag, head


def autosrh(trainer: Trainer):
    """Which dimensions of 8 groups by frequency; then without three quarters of the table."""
    bag, head = (
        _layer("AutoSrh", trainer, trainer.first(), groups=8, counts=trainer.counts, l1=1e-5),
        trainer.head(),
    )
    trainer.train(bag, head, trainer.steps // 2)
    bag.prune(0.75)
    trainer.train(bag, head, trainer.steps - trainer.steps // 2)
    return bag, head


def autodim(trainer: Trainer):
    """Dimensions of 8 groups by frequency; rows come normalised out of the search."""
    method = {"fields": 8, "counts": trainer.counts, "candidates": (2, 4, 8, 16)}
    bag, head = _layer("AutoDim", trainer, trainer.first(), **method), trainer.head(1.0)
    trainer.train(bag, head, trainer.steps // 2)
    bag.choose()
    trainer.train(bag, head, trainer.steps - trainer.steps // 2)
    return bag, head


def optembed(trainer: Trainer):
    """Rows below a threshold go; then dimensions of 8 groups by frequency, to a quarter of the table."""
    first, held = 0.2 * trainer.first(), slice(0, min(20_000, trainer.cut))
    bag, head = _layer("Opt", trainer, first, fields=8, counts=trainer.counts), trainer.head()
    trainer.train(bag, head, trainer.steps // 2)
    bag.search(lambda: trainer.loss(bag, head, held), generations=4, population=8, budget=0.25)
    trainer.train(bag, head, trainer.steps - trainer.steps // 2)
    return bag, head


RECIPES: dict[str, Callable] = {
    "DPQ": plain("DPQ", m=8, k=256), "MGQE": plain("MGQE", m=8, k=256), "QLAE": plain("QLAE", levels=4),
    "DeepLight": deeplight, "PEP": pep,
    "VTrans": plain("VTrans", rates={"log_var": 10 * LR}, kl=0.03), "AutoSrh": autosrh, "AutoDim": autodim,
    "OptEmbed": optembed, "LPT, 8 bits": packed("LPT", 8), "LPT, 4 bits": packed("LPT", 4),
    "ALPT, 8 bits": packed("ALPT", 8), "ALPT, 4 bits": packed("ALPT", 4),
    "AdaptEmb": shared("Adapt"), "CAFE": shared("CAFE"), "CCE": shared("CCE"),
}  # fmt: skip


def rows(folder: Path | None, quick: bool, names: list[str] | None = None) -> Iterator[dict]:
    """For each training method: the loss with the method on, and with the table as it is stored
    afterwards."""
    trainer = Trainer(folder, quick)
    for name in names or RECIPES:
        began = time.perf_counter()
        bag, head = RECIPES[name](trainer)
        row: dict[str, Any] = {"format": name, "scratch": trainer.loss(bag, head)}
        stored = as_stored(bag)
        row["converted"] = trainer.loss(stored, head)
        row["share"] = stored.nbytes / (trainer.rows * DIM * 4)
        row["seconds"] = time.perf_counter() - began
        yield row


def as_stored(bag: Any) -> Any:
    """The layer that holds what a method leaves."""
    import torch

    import lutra.nn

    if hasattr(bag, "packed"):
        table = bag.compressed()
        return getattr(lutra.nn, f"{table.format.layer}EmbeddingBag").from_table(table, mode="sum")
    holder = torch.nn.Sequential(bag)
    return lutra.nn.finish(holder)[0]
