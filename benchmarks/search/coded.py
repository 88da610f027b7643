"""Scans of codes without lists: 4-bit product quantization, scalar codes, rotated or not, RaBitQ, AVQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lutra.index import Codes
from lutra.quant import PQ, SQ, RaBitQ, RotatedSQ

from .context import Context, K, peer, recall


def filled(c: Context, quantizer: Any, refine: str | None = None, **training: Any) -> Codes:
    """An index over the vectors with a trained quantizer."""
    quantizer.train(c.sample, progress=False, **training)
    index = Codes(quantizer, "ip", refine=refine)
    index.add(c.x)
    return index


def faiss_index(c: Context, text: str) -> Any:
    faiss = peer("faiss")
    if faiss is None:
        return None
    index = faiss.index_factory(c.d, text, faiss.METRIC_INNER_PRODUCT)
    index.train(c.sample)
    index.add(c.x)
    return index


def search_of(index: Any, **options: Any) -> Callable[[np.ndarray], Any]:
    return lambda q: index.search(q, K, **options)


def product_quantization(c: Context) -> None:
    """PQ32x4fs and PQ64x4fs, as they are and with exact rescoring of 30 K candidates."""
    for m, targets in ((32, (1.5, 2.0)), (64, (1.5, 2.0))):
        theirs = faiss_index(c, f"PQ{m}x4fs")
        ours = filled(c, PQ(c.d, m, 4), "float32")
        case = f"PQ{m}x4"
        plain = search_of(ours, refine_factor=0)
        r = (recall(plain(c.q).ids, c.truth), theirs and recall(theirs.search(c.q, K)[1], c.truth))
        c.compare(
            "codes", case, f"FAISS {case}fs", plain, theirs and search_of(theirs), targets=targets, recalls=r
        )
        refined = search_of(ours, refine_factor=30)
        other = None
        if theirs is not None:
            faiss = peer("faiss")
            other = faiss.IndexRefineFlat(theirs, faiss.swig_ptr(c.x))
            other.k_factor = 30
        r = (recall(refined(c.q).ids, c.truth), other and recall(other.search(c.q, K)[1], c.truth))
        c.compare(
            "codes", f"{case}, refine 30", f"FAISS {case}fs,RFlat", refined, other and search_of(other),
            targets=targets, recalls=r,
        )  # fmt: skip


def anisotropic(c: Context) -> None:
    """AVQ: 64 look-ups of 4 bits trained with the anisotropic loss, beside ScaNN's and FAISS's plain PQ."""
    ours = filled(c, PQ(c.d, 64, 4), loss="anisotropic", threshold=0.2)
    got = recall(ours.search(c.q, K).ids, c.truth)
    theirs = faiss_index(c, "PQ64x4fs")
    r = (got, theirs and recall(theirs.search(c.q, K)[1], c.truth))
    c.compare(
        "codes", "AVQ 32 bytes", "FAISS PQ64x4fs", search_of(ours), theirs and search_of(theirs),
        targets=(1.0, 1.0), recalls=r,
    )  # fmt: skip
    scann = peer("scann")
    if scann is None:
        return
    searcher = (
        scann.scann_ops_pybind.builder(c.x, K, "dot_product")
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .build()
    )
    its = np.stack(searcher.search_batched(c.q)[0])
    c.compare(
        "codes",
        "AVQ 32 bytes",
        "ScaNN ah(2)",
        search_of(ours),
        scann_search(searcher),
        recalls=(got, recall(its, c.truth)),
    )


def scann_search(searcher: Any, **options: Any) -> Callable[[np.ndarray], Any]:
    """ScaNN with the way that suits the batch."""

    def run(q: np.ndarray) -> Any:
        if len(q) == 1:
            return searcher.search(q[0], **options)
        return searcher.search_batched_parallel(q, **options)

    return run


def scalar(c: Context) -> None:
    """Rotation and 4-bit scalar codes: 64 bytes for 128 dimensions."""
    ours = filled(c, RotatedSQ(c.d))
    got = recall(ours.search(c.q, K).ids, c.truth)
    turbovec = peer("turbovec")
    theirs = its = None
    if turbovec is not None:
        index = turbovec.TurboQuantIndex(c.d, 4)
        index.add(c.x)
        theirs = lambda q: index.search(q, K)  # noqa: E731
        its = recall(np.asarray(theirs(c.q)[1]).astype(np.int64), c.truth)
    c.compare(
        "codes",
        "RotatedSQ 4 bits",
        "turbovec 4 bits",
        search_of(ours),
        theirs,
        targets=(1.2, 1.2),
        recalls=(got, its),
    )


def minmax(c: Context) -> None:
    """Scalar codes of 8 and 6 bits, each dimension by its range."""
    for bits in (8, 6):
        ours, theirs = filled(c, SQ(c.d, f"{bits}bit")), faiss_index(c, f"SQ{bits}")
        r = (recall(ours.search(c.q, K).ids, c.truth), theirs and recall(theirs.search(c.q, K)[1], c.truth))
        c.compare(
            "codes", f"SQ {bits} bits", f"FAISS SQ{bits}", search_of(ours), theirs and search_of(theirs),
            recalls=r,
        )  # fmt: skip


def rabitq(c: Context) -> None:
    """One bit a dimension."""
    ours = filled(c, RaBitQ(c.d))
    theirs = faiss_index(c, "RaBitQfs")
    r = (recall(ours.search(c.q, K).ids, c.truth), theirs and recall(theirs.search(c.q, K)[1], c.truth))
    c.compare(
        "codes",
        "RaBitQ",
        "FAISS RaBitQfs",
        search_of(ours),
        theirs and search_of(theirs),
        targets=(10, 10),
        recalls=r,
    )
