"""Exact search: floats, the 8-bit screen, packed bits, k-means."""

from __future__ import annotations

import time

import numpy as np

from lutra import address, scan
from lutra.index import Flat, kmeans

from .context import Context, K, Row, peer, recall


def flat(c: Context) -> None:
    """Exact inner products, and the same behind a screen of 8-bit codes."""
    faiss = peer("faiss")
    index = None
    if faiss is not None:
        index = faiss.IndexFlatIP(c.d)
        index.add(c.x)
    theirs = None if index is None else lambda q: index.search(q, K)
    ours = Flat(c.d, "ip")
    ours.add(c.x)
    sizes, targets = (1, 16, 1024), (2.3, 6.0, 2.0)
    full = recall(ours.search(c.q, K).ids, c.truth)
    c.compare(
        "exact",
        "Flat float32",
        "FAISS Flat",
        lambda q: ours.search(q, K),
        theirs,
        sizes,
        targets,
        (full, 1.0),
    )
    screened = Flat(c.d, "ip", screen="int8")
    screened.add(c.x)
    got = recall(screened.search(c.q, K).ids, c.truth)
    c.compare(
        "exact",
        'Flat screen="int8"',
        "FAISS Flat",
        lambda q: screened.search(q, K),
        theirs,
        (1, 1024),
        (4.0, 5.0),
        (got, 1.0),
    )


def binary(c: Context) -> None:
    """Hamming distances of 256 bits."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (c.n, 32), dtype=np.uint8)
    q = rng.integers(0, 256, (c.queries, 32), dtype=np.uint8)
    faiss = peer("faiss")
    index = None
    if faiss is not None:
        index = faiss.IndexBinaryFlat(256)
        index.add(x)
        want, _ = index.search(q[:50], K)
        np.testing.assert_array_equal(scan.binary(q[:50], x, K).scores, want)
    for batch, target in ((1, 2.0), (min(1024, c.queries), 2.0)):
        part = q[:batch]
        functions = {"ours": lambda part=part: scan.binary(part, x, K)}
        if index is not None:
            functions["theirs"] = lambda part=part: index.search(part, K)
        t = {name: s / batch * 1e3 for name, s in c.time(functions).items()}
        c.add(
            Row(
                "binary",
                f"binary 256 bits, batch {batch}",
                "FAISS IndexBinaryFlat",
                t["ours"],
                t.get("theirs"),
                target=target,
            )
        )


def clustering(c: Context) -> None:
    """Ten rounds of k-means with all points."""
    k = 64 if c.quick else 1024
    faiss = peer("faiss")
    start = time.perf_counter()
    ours = kmeans(c.x, k, n_iter=10, max_points_per_centroid=None, progress=False)
    seconds = time.perf_counter() - start
    theirs = None
    note = ""
    if faiss is not None:
        other = faiss.Kmeans(c.d, k, niter=10, max_points_per_centroid=c.n, seed=1)
        start = time.perf_counter()
        other.train(c.x)
        theirs = time.perf_counter() - start
        mine = address.nearest(c.x, ours.centroids).scores.mean(dtype=np.float64)
        its = address.nearest(c.x, other.centroids).scores.mean(dtype=np.float64)
        note = f"mean squared distance {mine:.4f}, FAISS {its:.4f}"
    c.add(
        Row(
            "k-means",
            f"k-means, k = {k}, 10 rounds",
            "FAISS Kmeans",
            seconds,
            theirs,
            target=3.0,
            unit="s",
            note=note,
        )
    )
