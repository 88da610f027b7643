"""Partitioned search at recall .99, beside FAISS's IVF and ScaNN's tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lutra.index import IVF
from lutra.quant import PQ

from .coded import faiss_index, scann_search
from .context import Context, K, peer, recall

WANTED = 0.99


def least(c: Context, values: Sequence[Any], run: Callable[[Any], np.ndarray]) -> tuple[Any, float]:
    """The first of increasing settings whose recall is WANTED or more, or the last; and that recall."""
    got = 0.0
    for value in values:
        got = recall(run(value), c.truth)
        if got >= WANTED:
            break
    return value, got


def partitioned(c: Context) -> None:
    """The fastest setting of each that reaches the recall."""
    nlist = 1024 if c.n >= 500_000 else 128
    probes = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
    found = {}
    for soar in (False, True):
        ours = IVF(c.d, nlist, PQ(c.d, 32, 4), "ip", soar=soar, refine="float32")
        ours.train(c.sample, progress=False)
        ours.add(c.x)
        for factor in (5, 10, 20, 30):
            nprobe, got = least(
                c, probes, lambda p, f=factor, i=ours: i.search(c.q, K, nprobe=p, refine_factor=f).ids
            )
            run = lambda q, p=nprobe, f=factor, i=ours: i.search(q, K, nprobe=p, refine_factor=f)  # noqa: E731
            if got >= WANTED or factor == 30:
                seconds = c.time({"ours": lambda run=run: run(c.q)})["ours"]
                found[seconds] = (run, got, f"nprobe {nprobe}, refine {factor}{', SOAR' if soar else ''}")
    run, got, note = found[min(found)]
    name = f"IVF{nlist},PQ32x4,refine"
    faiss = peer("faiss")
    if faiss is not None:
        theirs = faiss_index(c, f"IVF{nlist},PQ32x4fs,RFlat")
        theirs.k_factor = 30
        inner = faiss.downcast_index(theirs.base_index)

        def set_probes(p: int) -> np.ndarray:
            inner.nprobe = p
            return theirs.search(c.q, K)[1]

        p, its = least(c, probes, set_probes)
        c.compare(
            "lists", name, f"FAISS IVF, nprobe {p}", run, lambda q: theirs.search(q, K),
            targets=(1.0, 1.0), recalls=(got, its), note=note,
        )  # fmt: skip
    scann = peer("scann")
    if scann is None:
        return
    searcher = (
        scann.scann_ops_pybind.builder(c.x, K, "dot_product")
        .tree(num_leaves=nlist, num_leaves_to_search=16, training_sample_size=len(c.sample), soar_lambda=1.5,
              overretrieve_factor=2.0)
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(100)
        .build()
    )  # fmt: skip
    p, its = least(
        c,
        probes,
        lambda p: np.stack(searcher.search_batched_parallel(c.q, leaves_to_search=p)[0]).astype(np.int64),
    )
    c.compare(
        "lists", name, f"ScaNN SOAR, {p} leaves", run, scann_search(searcher, leaves_to_search=p),
        targets=(1.0, 1.0), recalls=(got, its), note=note,
    )  # fmt: skip
