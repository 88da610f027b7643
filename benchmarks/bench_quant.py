"""Quantizers on real and made vectors: reconstruction error, recall of codes alone, time, beside FAISS's.

``pytest benchmarks/bench_quant.py -s`` prints a table for each data set: bytes a vector; mean squared error
over the variance; recall at 10 by inner product against exact search, by codes alone; seconds to train and to
encode. FAISS's figures are in brackets. ``--full`` takes all real vectors and a million made ones, and
trains residual quantizers of many dimensions, which takes a minute.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from lutra import quant
from lutra.bench import data as made

SETS = {
    "SIFT": ("sift5k_5000x128_u8.npy", None),
    "image features": ("oxford5k_fc7pca_5063x128_f32.npy", None),
    "sentences": ("debian_docs_f16.npy", "debian_queries_f16.npy"),
    "clustered": (None, None),
}


@pytest.fixture(params=SETS)
def vectors(request, full):
    """Vectors and 200 queries, of unit norm."""
    if request.param == "clustered":
        x, q = made.clustered(1_000_000 if full else 10_000, 128)
        return request.param, x, q[:200]
    places = (os.environ.get("LUTRA_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data")
    folder = next((Path(p) for p in places if p and Path(p, "README.md").is_file()), None)
    if folder is None:
        pytest.skip("no real data here: neither LUTRA_DATA nor ../shared/data")
    rows, queries = SETS[request.param]
    x = np.load(folder / rows).astype(np.float32)
    x, q = (
        (x[:-200], x[-200:]) if queries is None else (x, np.load(folder / queries).astype(np.float32)[:200])
    )
    x = x if full else x[:3000]
    return request.param, *(a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, q))


def pairs(d, full):
    """Name, ours, and FAISS's or None; its OPQ and RQ take minutes to train, so they are for --full."""
    faiss = pytest.importorskip("faiss")
    m = d // 4
    beam = faiss.ResidualQuantizer(d, m, 4)
    beam.max_beam_size = 5
    yield f"PQ {m}x4", quant.PQ(d, m, 4), faiss.ProductQuantizer(d, m, 4)
    yield f"AVQ {m}x4", quant.PQ(d, m, 4, loss="anisotropic"), None
    yield f"OPQ {m}x4", quant.OPQ(d, m, 4), faiss.index_factory(d, f"OPQ{m},PQ{m}x4") if full else None
    if full or d <= 128:
        yield f"RQ {m}x4", quant.RQ(d, m, 4), beam if full else None
    yield f"PQ {m}x6", quant.PQ(d, m, 6), faiss.ProductQuantizer(d, m, 6)
    yield f"PQ {d // 8}x8", quant.PQ(d, d // 8, 8), faiss.ProductQuantizer(d, d // 8, 8)
    yield f"PQ {d // 2}x4", quant.PQ(d, d // 2, 4), faiss.ProductQuantizer(d, d // 2, 4)
    yield f"AVQ {d // 2}x4", quant.PQ(d, d // 2, 4, loss="anisotropic"), None
    for kind in ("4bit", "6bit", "8bit", "fp16", "bf16"):
        theirs = faiss.ScalarQuantizer(d, getattr(faiss.ScalarQuantizer, f"QT_{kind}"))
        yield f"SQ {kind}", quant.SQ(d, kind), theirs
    yield "RaBitQ 1", quant.RaBitQ(d, 1), faiss.IndexRaBitQ(d, faiss.METRIC_INNER_PRODUCT)
    for bits in (2, 4, 8):
        yield f"RaBitQ {bits}", quant.RaBitQ(d, bits), None
    for bits in (2, 4):
        yield f"RotatedSQ {bits}", quant.RotatedSQ(d, bits), None


def figures(quantizer, x, q, exact):
    """Bytes, error over variance, recall at 10, seconds to train and to encode."""
    begin = time.perf_counter()
    quantizer.train(x)
    trained = time.perf_counter()
    encode = (
        getattr(quantizer, "encode", None) or getattr(quantizer, "sa_encode", None) or quantizer.compute_codes
    )
    codes = encode(x)
    encoded = time.perf_counter()
    decode = getattr(quantizer, "sa_decode", None) or quantizer.decode
    decoded = decode(codes)
    error = np.square(x - decoded).sum() / np.square(x - x.mean(0)).sum()
    top = np.argpartition(-(q @ decoded.T), 10, axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) for a, b in zip(top.tolist(), exact.tolist())]) / 10
    return codes.shape[1], error, recall, trained - begin, encoded - trained


@pytest.mark.benchmark(group="quant")
def test_quantizers(vectors, capsys, full):
    name, x, q = vectors
    exact = np.argpartition(-(q @ x.T), 10, axis=1)[:, :10]
    lines = [f"{name}: {len(x)} x {x.shape[1]}"]
    for label, ours, theirs in pairs(x.shape[1], full):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few vectors for 256 centroids
            size, *mine = figures(ours, x, q, exact)
            peer = None if theirs is None else figures(theirs, x, q, exact)
        text = f"  {label:12s} {size:4d} bytes"
        for i, (what, form) in enumerate(
            zip(("error", "recall", "train s", "encode s"), (".4f", ".3f", ".2f", ".2f"))
        ):
            text += f"  {what} {mine[i]:{form}}" + (f" ({peer[i + 1]:{form}})" if peer else "")
        lines.append(text)
        if peer is not None:
            # No worse than FAISS's, but for chance.
            assert mine[0] < (1.05 if label.startswith("RQ") else 1.1) * peer[1] + 1e-6
    with capsys.disabled():
        print("\n" + "\n".join(lines))
