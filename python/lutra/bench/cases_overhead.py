"""What a call costs when there is next to nothing to compute."""

from __future__ import annotations

from functools import partial

import numpy as np

from .. import address, gather, reference, scan
from . import data, expect
from .case import Case, Prepared


def _tensors(library: str, *arrays: np.ndarray):
    if library == "numpy":
        return arrays
    torch = data.installed("torch")
    return tuple(torch.from_numpy(a) for a in arrays)


def _sign_hash(library: str, quick: bool) -> Prepared:
    (x,) = _tensors(library, data.vectors(1, 8))
    want = reference.address.sign_hash(data.vectors(1, 8))
    return Prepared(
        ours=lambda: address.sign_hash(x),
        check=lambda: expect.equal(address.sign_hash(x).codes, want[0]),
    )


def _bag(library: str, quick: bool) -> Prepared:
    table, ids = _tensors(library, data.vectors(4, 8), np.array([[1, 2]]))
    want = data.vectors(4, 8)[[1, 2]].sum(0, keepdims=True)
    peers = {}
    if library == "torch":
        import torch

        peers["torch"] = lambda: torch.nn.functional.embedding_bag(ids, table, mode="sum")
    else:
        peers["numpy"] = lambda: table[ids].sum(1)
    return Prepared(
        ours=lambda: gather.bag(table, ids),
        check=lambda: expect.close(gather.bag(table, ids), want),
        peers=peers,
    )


def _knn(library: str, quick: bool) -> Prepared:
    q, x = _tensors(library, data.vectors(1, 8, seed=1), data.vectors(8, 8))
    want = reference.scan.knn(data.vectors(1, 8, seed=1), data.vectors(8, 8), 1)
    if library == "torch":
        peers = {"torch": lambda: (q @ x.T).topk(1)}
    else:
        peers = {"numpy": lambda: (q @ x.T).argmax(1)}
    return Prepared(
        ours=lambda: scan.knn(q, x, 1),
        check=lambda: expect.equal(scan.knn(q, x, 1).ids, want[1]),
        peers=peers,
    )


def _cases() -> list[Case]:
    out = []
    for library, label in (("numpy", "NumPy"), ("torch", "torch")):
        needs = ("torch",) if library == "torch" else ()
        for name, prepare in (("sign_hash", _sign_hash), ("bag", _bag), ("knn", _knn)):
            out.append(Case(f"call of {name}, {label}", "overhead", partial(prepare, library), needs=needs))
    return out


CASES = _cases()
