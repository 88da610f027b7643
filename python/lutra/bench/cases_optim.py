"""Cases of `lutra.optim`: a whole step (forward, backward, update) of a large table, against torch's."""

from __future__ import annotations

from functools import partial
from typing import Any

from . import data, expect
from .case import Case, Prepared
from .cases_gather import DIM, LENGTH, TORCH, _sizes

#: lutra's name: torch's name, values of state read and written for each value of a touched row.
PEERS = {
    "SGD": ("SGD", 0.0),
    "Adagrad": ("Adagrad", 1.0),
    "Adam": ("SparseAdam", 2.0),
    "RowwiseAdagrad": ("", 0.0),
}


def _step(layer: Any, optimizer: Any, ids: Any, grad: Any) -> None:
    optimizer.zero_grad()
    layer(ids).backward(grad)
    optimizer.step()


def _training(name: str, attached: bool, quick: bool) -> Prepared:
    import torch

    from .. import nn, optim

    rows, bags = _sizes(quick)
    start = torch.from_numpy(data.vectors(rows, DIM))
    ids = [torch.from_numpy(i) for i in data.bag_ids(rows, bags, LENGTH)]
    grad = torch.from_numpy(data.vectors(bags, DIM, seed=3))
    theirs, state = PEERS[name]

    def ours():
        layer = nn.EmbeddingBag.from_pretrained(start.clone(), freeze=False, mode="sum", sparse=True)
        optimizer = getattr(optim, name)(layer.parameters(), lr=0.01)
        if attached:
            optimizer.attach(layer)
        return layer, optimizer

    def peer():
        layer = torch.nn.EmbeddingBag.from_pretrained(start.clone(), freeze=False, mode="sum", sparse=True)
        return layer, getattr(torch.optim, theirs)(layer.parameters(), lr=0.01)

    (my_layer, my_optimizer), following = ours(), data.fresh(ids)
    peers = {}
    if theirs:
        (layer, optimizer), theirs_following = peer(), data.fresh(ids)
        peers["torch"] = lambda: _step(layer, optimizer, theirs_following(), grad)

    def check():
        trained = [ours(), peer() if theirs else ours()]
        a, b = trained[0][0], trained[1][0]
        for layer, optimizer in trained:
            for i in ids[:2]:
                _step(layer, optimizer, i, grad)
        expect.close(a.weight, b.weight, rtol=1e-4, atol=1e-5, what=f"weights after two steps of {name}")
        touched = torch.unique(ids[0])
        assert not torch.equal(a.weight[touched].detach(), start[touched]), "nothing was updated"

    # Rows are read by forward, read and written by the update, with their state. About 4 % of the ids are the
    # same row as another: counted as if they were not.
    passes = 3 + 2 * state
    return Prepared(
        ours=lambda: _step(my_layer, my_optimizer, following(), grad),
        check=check,
        peers=peers,
        bytes=4.0 * passes * bags * DIM * LENGTH,
    )


def _case(name: str, attached: bool) -> Case:
    how = "attached" if attached else "sparse gradient"
    full_only = not attached or name == "RowwiseAdagrad"
    return Case(f"step of {name}, {how}", "nn", partial(_training, name, attached), TORCH, full_only)


CASES = [_case(name, attached) for name in PEERS for attached in (True, False)]
