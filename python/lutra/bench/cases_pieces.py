"""Cases of `lutra.gather.bag_pieces`: bags of 20 rows of 64 made of pieces, with fresh ids at every call."""

from __future__ import annotations

from functools import partial
from typing import Any

from .. import gather
from . import data, expect
from .case import Case, Prepared
from .cases_gather import DIM, LENGTH, _sizes


def _pieces(spec: str, training: bool, quick: bool) -> Prepared:
    """A format's bag against its composition in torch's own ops (and, forward, a bag of float32 rows)."""
    import torch

    from ..compress import Table, format

    rows, bags = _sizes(quick)
    found, shape = format(spec), (rows, DIM)
    arrays = {k: torch.from_numpy(v) for k, v in found.initial(shape).items()}
    table = Table(found, shape, arrays)
    floats = [a for a in arrays.values() if a.is_floating_point()]
    ids = [torch.from_numpy(i) for i in data.bag_ids(rows, bags, LENGTH)]
    mine, theirs, dense_ids = data.fresh(ids), data.fresh(ids), data.fresh(ids)
    grad = torch.from_numpy(data.vectors(bags, DIM, seed=3))

    def composed(batch: Any) -> Any:
        return found.lookup(arrays, shape, batch.reshape(-1)).reshape(bags, LENGTH, DIM).sum(1)

    def step(function: Any, batch: Any) -> Any:
        for a in floats:
            a.requires_grad_()
        gradients = torch.autograd.grad(function(batch), floats, grad)
        for a in floats:
            a.requires_grad_(False)
        return gradients

    def ours(batch: Any) -> Any:
        return gather.bag(table, batch)

    def check() -> None:
        if not training:
            expect.close(ours(ids[0]), composed(ids[0]), atol=1e-4, what=spec)
            return
        for got, want in zip(step(ours, ids[0]), step(composed, ids[0])):
            scale = float(want.abs().max())
            expect.close(got, want, rtol=1e-3, atol=1e-5 * (1 + scale), what=f"gradient of {spec}")

    if training:
        return Prepared(
            ours=lambda: step(ours, mine()), check=check, peers={"torch": lambda: step(composed, theirs())}
        )
    dense = torch.from_numpy(data.vectors(rows, DIM))
    return Prepared(
        ours=lambda: ours(mine()),
        check=check,
        peers={"torch": lambda: composed(theirs()), "bag fp32": lambda: gather.bag(dense, dense_ids())},
        flops=float(bags * DIM * LENGTH),
    )


_FORMATS = (
    "pq:m=16", "pq:m=8", "pq:m=16,bits=4", "rq:m=4", "digits", "qr:c=62500", "qr:c=62500,combine=product",
    "hash:size=62500", "robe:size=4000000,block=32", "memcom:size=62500", "dedup:blocks=62500",
)  # fmt: skip
_MAIN = ("pq:m=16",)
CASES = [
    Case(
        f"bag {spec}" + ", forward and backward" * training, "tables", partial(_pieces, spec, training),
        needs=("torch",), full_only=spec not in _MAIN,
    )
    for spec in _FORMATS
    for training in (False, True)
]  # fmt: skip
