"""factory: FAISS's words, what they make, and errors that name the part that is wrong."""

import numpy as np
import pytest

from lutra import _backend
from lutra.index import _factory_text as words
from lutra.index import factory

#: Texts that FAISS takes too.
TEXTS = [
    "Flat", "IDMap,Flat", "IDMap2,Flat", "Flat,IDMap", "Flat,RFlat", "SQ8", "SQ6", "SQ4", "SQfp16", "SQbf16",
    "PQ32", "PQ32np", "PQ32x8", "PQ32x4", "PQ32x4fs", "PQ32x4fs_64", "PQ16x6", "PQ32,RFlat",
    "PQ32,Refine(SQfp16)", "PQ32,Refine(SQbf16)", "PQ32,Refine(SQ8)", "RaBitQ",
    "RaBitQ4", "RaBitQfs", "RaBitQfs4", "RQ8x8", "RQ4x4",
    "OPQ32,PQ32", "OPQ32_64,PQ32", "OPQ32,IVF64,PQ32x4fs,RFlat", "PCA64,Flat", "PCAR64,Flat", "PCAW64,Flat",
    "PCAWR64,SQ8", "L2norm,Flat", "RR,Flat", "RR64,PQ16x4fs", "PCA64,RR,SQ4", "IVF64,Flat", "IVF64,SQ8",
    "IVF64,SQfp16", "IVF64,PQ32x4fs,RFlat", "IVF64,PQ32", "IVF64,PQ32x4fsr", "IVF64,RaBitQ", "IVF64,RaBitQ4",
    "IVF64,RaBitQfs", "IVF64,RQ8x8", "IVF64_HNSW32,Flat", "IVF64(HNSW32),Flat", "IVF64,Flat,IDMap", "HNSW",
    "HNSW32", "HNSW32,Flat", "HNSW32,SQ8", "HNSW32_SQ8", "HNSW32,SQfp16", "HNSW32,SQ8,RFlat",
    "HNSW32,PQ16", "HNSW32_PQ16", "HNSW32_PQ16,RFlat", "HNSW32,PQ32,Refine(SQfp16)", "OPQ16,HNSW32_PQ16",
    "PCA64,IVF64,SQ8,RFlat",
]  # fmt: skip
#: Ours alone.
OWN = ["IVF64_SOAR,PQ32x4fs,RFlat", "RSQ4", "IVF64,RSQ4"]


def vectors(n, d=128, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((30, d))
    return (centres[rng.integers(0, 30, n)] + 0.4 * rng.standard_normal((n, d))).astype(np.float32)


@pytest.mark.parametrize("text", [*TEXTS, *OWN])
def test_texts_are_read(text):
    plan = words.read(text, 128, "l2")
    assert plan.d == 128 and plan.text == text


@pytest.mark.parametrize("text", TEXTS)
def test_faiss_takes_them_too(text):
    faiss = pytest.importorskip("faiss")
    faiss.index_factory(128, text)


def test_plans():
    plan = words.read("IDMap, OPQ32_64, IVF1k_SOAR, PQ32x4fs, Refine(SQfp16)", 128, "ip")
    assert plan.steps == (words.Step("OPQ", 64, m=32),)
    assert plan.inner == 64 and plan.nlist == 1024 and plan.soar and plan.refine == "float16"
    assert plan.code == words.Code("PQ", m=32, bits=4)
    plan = words.read("PCAWR32,L2norm,HNSW_SQ8,RFlat", 128, "l2")
    assert plan.steps == (words.Step("PCA", 32, whiten=True, rotate=True), words.Step("L2norm", 32))
    assert plan.graph == 32 and plan.code.name == "8bit" and plan.refine == "float32"
    assert words.read("BFlat", 64, "hamming").is_binary


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "is empty"),
        ("flat", r"part 1, 'flat': expected one of PCA64.*HNSW32.*did you mean 'Flat'"),
        ("IVF64", r"at its end: expected one of Flat, PQ32"),
        ("IVF64,PQ32x4f", r"part 2, 'PQ32x4f'.*did you mean 'PQ32x4fs'"),
        ("IVF64,HNSW32", r"part 2, 'HNSW32': expected one of Flat"),
        ("IVF0,Flat", r"part 1, 'IVF0': the number of lists must be in"),
        ("PQ30", r"part 1, 'PQ30': 30 sub-vectors do not divide 128 dimensions"),
        ("PCA60,PQ32", r"part 2, 'PQ32': 32 sub-vectors do not divide 60 dimensions"),
        ("PQ32x9", r"the bits of PQ must be in \[1, 8\], got 9"),
        ("PQ32x8fs", "needs 4 bits"),
        ("RaBitQ9", r"the bits of RaBitQ must be in \[1, 8\], got 9"),
        ("PCA256,Flat", r"the dimension after PCA must be in \[1, 128\], got 256"),
        ("PCA99999999999999999999,Flat", "the dimension after PCA"),
        ("OPQ32_63,PQ32", "32 sub-vectors do not divide 63"),
        ("Flat,Flat", r"part 2, 'Flat': expected one of the end, IDMap, RFlat"),
        ("Flat,RFlat,RFlat", r"part 3, 'RFlat': expected one of the end"),
        ("PQ32,Refine(PQ64)", r"part 2, 'Refine\(PQ64\)': expected one of RFlat"),
        ("HNSW32,RaBitQ", r"part 2, 'RaBitQ': a graph is over vectors, scalar codes or PQ"),
        ("HNSW32_PQ30", r"part 2, 'PQ30': 30 sub-vectors do not divide 128 dimensions"),
        ("HNSW1", "the links of a node"),
        ("BFlat", "expected one of"),
        ("Flat,", r"part 2, ''"),
        ("IVF64,,Flat", r"part 2, ''"),
        ("LSH", "expected one of"),
    ],
)
def test_errors_name_the_part(text, match):
    with pytest.raises(ValueError, match=match) as caught:
        words.read(text, 128, "l2")
    assert repr(text) in str(caught.value)


def test_errors_of_arguments():
    with pytest.raises(TypeError, match="text must be a str"):
        factory(None, 8)
    with pytest.raises(ValueError, match="metric must be one of"):
        factory("Flat", 8, "hamster")
    with pytest.raises(ValueError, match="d must be"):
        factory("Flat", 0)
    with pytest.raises(ValueError, match="expected one of BFlat"):
        factory("PQ8", 64, "hamming")
    with pytest.raises(ValueError, match="metric='l1' is for Flat only"):
        factory("PQ8", 64, "l1")


#: Other names of what is searched anyway, and what trains long.
ALIASES = (
    "IDMap,Flat", "IDMap2,Flat", "Flat,IDMap", "Flat,RFlat", "PQ32np", "PQ32x8", "PQ32x4", "PQ32x4fs_64",
    "RaBitQfs", "RaBitQfs4", "RQ8x8", "IVF64,RQ8x8", "OPQ32_64,PQ32", "OPQ32,PQ32", "IVF64,PQ32x4fsr",
    "IVF64,RaBitQfs",
    "IVF64_HNSW32,Flat", "IVF64(HNSW32),Flat", "IVF64,Flat,IDMap", "HNSW", "HNSW32,Flat", "HNSW32_SQ8",
    "HNSW32,PQ16", "OPQ16,HNSW32_PQ16", "PCAR64,Flat", "PQ32,Refine(SQbf16)",
)  # fmt: skip
SEARCHED = [(text, "l2") for text in (*TEXTS, *OWN) if text not in ALIASES] + [
    (text, metric)
    for text in (
        "PQ32x4fs,RFlat",
        "SQ4",
        "OPQ32,IVF64,PQ32x4fs,RFlat",
        "PCA64,Flat",
        "RR,SQ8",
        "HNSW32",
        "HNSW32_PQ16,RFlat",
        "IVF64,RaBitQ4",
    )
    for metric in ("ip", "cosine")
]


@pytest.mark.skipif(_backend.core is None, reason="the NumPy reference takes too long")
@pytest.mark.parametrize("text, metric", SEARCHED)
def test_they_search(text, metric):
    """Each finds what an exact search finds, as far as its codes allow, and survives a file."""
    d = 128
    x, q = vectors(1000, d), vectors(20, d, 1)
    index = factory(text, d, metric)
    assert index.metric == metric and index.d == d
    if "SOAR" in text or "IVF" in text:
        index_with(index, "nprobe").nprobe = 8
    index.train(x)
    index.add(x)
    scores, ids = index.search(q, 10)
    assert scores.shape == (20, 10) and (ids >= 0).all()
    exact = factory("Flat", d, metric)
    exact.add(x)
    best = exact.search(q, 10)
    recall = np.mean([len(set(a) & set(b)) for a, b in zip(ids.tolist(), best.ids.tolist())]) / 10
    assert recall >= least(text)
    order = np.diff(scores, axis=1)
    assert (order >= 0).all() if metric == "l2" else (order <= 0).all()


def index_with(index, name):
    while not hasattr(index, name):
        index = index.index
    return index


def least(text):
    if "PCA64" in text:
        return 0.5  # vectors are refined as PCA left them
    if "RFlat" in text or text in ("Flat", "HNSW32"):
        return 0.9
    return 0.1 if "RaBitQ" in text or "RQ" in text or "PQ" in text or "PCA" in text or "RR64" in text else 0.5


def test_graphs_over_codes():
    index = factory("HNSW32_PQ16x4,Refine(SQfp16)", 128, "cosine")
    assert (index.M, index.storage.m, index.storage.bits, index.refine) == (32, 16, 4, "float16")
    index = factory("OPQ16_64,HNSW24,PQ16", 128)
    assert (index.index.M, index.index.d, index.index.storage.m, index.index.refine) == (24, 64, 16, None)
    assert not index.is_trained
    with pytest.raises(ValueError, match="refine must be None, 'auto', 'float32' or 'float16', got 'int8'"):
        factory("HNSW32,PQ16,Refine(SQ8)", 128)


def test_flat_metrics_and_binary():
    x = vectors(100, 16)
    for metric in ("l1", "linf"):
        index = factory("Flat", 16, metric)
        index.add(x)
        assert index.search(x[:3], 1).ids.ravel().tolist() == [0, 1, 2]
    for metric in ("hamming", "jaccard"):
        index = factory("IDMap,BFlat", 16, metric)
        bits = np.random.default_rng(0).integers(0, 256, (50, 2), dtype=np.uint8)
        index.add(bits)
        assert (index.search(bits[:3], 1).scores == 0).all()
