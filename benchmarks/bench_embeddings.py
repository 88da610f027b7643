"""What bits, transforms, prefixes and mining do on real sentence embeddings: tables, printed with ``-s``.

``pytest -s benchmarks/bench_embeddings.py``; it needs the real data of LUTRA_DATA (or ../shared/data): 8,288
summaries of Debian packages as queries, their long descriptions as documents, 384 values each.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

import lutra
from lutra.index import Binary, Flat, Funnel, Transformed
from lutra.index.transforms import PCA, Chain, Normalize, RandomRotation, Truncate, Whitening
from lutra.mine import csls, deduplicate, hard_negatives, paraphrase_mining


@pytest.fixture(scope="module")
def data():
    for place in (os.environ.get("LUTRA_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"):
        if place and Path(place, "README.md").is_file():
            return Path(place)
    pytest.skip("no real data here: neither LUTRA_DATA nor ../shared/data")


@pytest.fixture(scope="module")
def x(data):
    return np.load(data / "debian_docs_f16.npy").astype(np.float32)


@pytest.fixture(scope="module")
def q(data):
    return np.load(data / "debian_queries_f16.npy").astype(np.float32)


@pytest.fixture(scope="module")
def names(data):
    return [line.split("\t")[0] for line in (data / "debian_texts.tsv").read_text().splitlines()]


@pytest.fixture(scope="module")
def truth(q, x):
    return lutra.scan.knn(q, x, 10, "cosine").ids


def recall(found, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist())])


def own(found):
    """The share of summaries whose own description is among those found."""
    return (found == np.arange(len(found))[:, None]).any(1).mean()


def timed(function):
    function()
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def test_bits(q, x, truth):
    index = Binary(384, refine="int8")
    index.add(x)
    print("\nBinary(384, refine='int8'): recall at 10")
    found = {}
    for rescore, factor in (
        (None, 1),
        ("bits", 4),
        ("bits", 10),
        ("vectors", 4),
        ("vectors", 10),
        ("both", 4),
    ):
        ids, seconds = timed(lambda r=rescore, f=factor: index.search(q, 10, rescore=r, refine_factor=f).ids)
        found[rescore, factor] = recall(ids, truth)
        print(f"  rescore={rescore!r:10} refine_factor={factor:2}: {found[rescore, factor]:.3f}, "
              f"{seconds / len(q) * 1e6:.0f} us a query")  # fmt: skip
    assert found[None, 1] < found["bits", 4] < found["vectors", 4] < found["vectors", 10]


def test_transforms(q, x, truth):
    print("\nTransformed: recall at 10 of the exact result, and the share that finds its own description")
    for width in (64, 128, 192):
        for t in (
            PCA(384, width),
            PCA(384, width, center=False),
            Truncate(384, width),
            RandomRotation(384, width),
        ):
            uncentred = isinstance(t, PCA) and not t.center
            index = Transformed(t, Flat(width, "ip" if uncentred else "cosine"))
            index.train(x)
            index.add(x)
            ids = index.search(q, 10).ids
            print(f"  {t!r:75} {recall(ids, truth):.3f} {own(ids):.3f}")
    white = Transformed(Chain([Whitening(384), Normalize(384)]), Flat(384))
    white.train(x)
    white.add(x)
    print(f"  whitened: {own(white.search(q, 10).ids):.3f}; as they are: {own(truth):.3f}")


def test_funnel(q, x, truth):
    turn = PCA(384, 384, center=False).train(x)  # puts what matters first, as Matryoshka training does
    x, q = turn.apply(x), turn.apply(q)
    flat = Flat(384, "cosine")
    flat.add(x)
    _, exact = timed(lambda: flat.search(q, 10))
    print(f"\nFunnel: recall at 10 (Flat: {exact / len(q) * 1e6:.0f} us a query)")
    for dims, keep in (
        ((64,), (100,)),
        ((128,), (50,)),
        ((64, 128), (200, 50)),
        ((32, 64, 128), (400, 100, 40)),
    ):
        index = Funnel(384, dims, keep)
        index.add(x)
        (_, ids), seconds = timed(lambda i=index: i.search(q, 10))
        print(f"  dims={dims} keep={keep}: {recall(ids, truth):.3f}, {seconds / len(q) * 1e6:.0f} us a query")


def test_mining(q, x, names):
    (_, plain), _ = timed(lambda: lutra.scan.knn(q, x, 10, "cosine"))
    (_, better), seconds = timed(lambda: csls(q, x, 10))
    for name, ids in (("cosine", plain), ("CSLS", better)):
        first = (ids[:, 0] == np.arange(len(q))).mean()
        hub = np.bincount(ids[:, 0]).max()
        print(
            f"\n{name}: own description first {first:.4f}, among ten {own(ids):.4f}; largest hub {hub}",
            end="",
        )
    assert (better[:, 0] == np.arange(len(q))).mean() > (plain[:, 0] == np.arange(len(q))).mean()
    print(f"\ncsls: {seconds:.2f} s")
    pairs, seconds = timed(lambda: paraphrase_mining(x, 10, 2000))
    print(f"paraphrase_mining: {seconds:.2f} s; the nearest pairs:")
    for score, i, j in zip(pairs.scores[:6], pairs.i, pairs.j):
        print(f"  {score:.3f} {names[i]}, {names[j]}")
    for threshold in (0.9, 0.95, 0.97):
        found, seconds = timed(lambda t=threshold: deduplicate(x, t))
        sizes = np.bincount(found.representative)
        largest = np.flatnonzero(found.representative == sizes.argmax())
        print(f"dedup at {threshold}: keeps {len(found.keep)}, {(sizes > 1).sum()} groups; {seconds:.2f} s")
        print(f"  {len(largest)} in the largest: {', '.join(names[i] for i in largest[:3])} ...")
    right = np.arange(len(q))
    mined, seconds = timed(lambda: hard_negatives(q, x, right, relative_margin=0.05, range_max=20))
    print(f"hard_negatives: {len(mined.triplets())} triplets in {seconds:.2f} s; for {names[100]}: "
          f"{', '.join(names[j] for j in mined.negatives[100])}")  # fmt: skip
