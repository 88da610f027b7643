"""FAISS's indexes and files, both ways: the same results with the same codes, lists, centroids and ids."""

import numpy as np
import pytest

faiss = pytest.importorskip("faiss")

from lutra import _backend, quant  # noqa: E402
from lutra.index import HNSW, IVF, PQ, Codes, Flat, read_faiss, to_faiss, write_faiss  # noqa: E402

pytestmark = pytest.mark.skipif(_backend.core is None, reason="the NumPy reference takes too long")

faiss.omp_set_num_threads(1)  # its threads spin: slow beside other work
D = 32
METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}


def vectors(n, seed=0, d=D):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, d))
    return (centres[rng.integers(0, 20, n)] + 0.5 * rng.standard_normal((n, d))).astype(np.float32)


def same(ours, theirs, k=10):
    """Scores close, and the same ids but where scores are as good as equal."""
    q = vectors(40, 7)
    scores, ids = ours.search(q, k)
    want, want_ids = theirs.search(q, k)
    quantizer = getattr(ours, "quantizer", None)
    if getattr(quantizer, "bits", 8) <= 4 and not getattr(ours, "refine", None):
        # Tables of 4-bit codes are rounded to 8 bits here.
        np.testing.assert_allclose(scores, want, rtol=0.03, atol=0.03 * np.abs(want).max())
        assert np.mean([len(set(a) & set(b)) for a, b in zip(ids.tolist(), want_ids.tolist())]) > 0.8 * k
        return
    np.testing.assert_allclose(scores, want, rtol=3e-4, atol=3e-4)
    differ = ids != want_ids
    assert differ.mean() < 0.02
    gaps = np.abs(np.diff(want, axis=1, append=want[:, -1:]))
    near = np.minimum(gaps, np.concatenate([np.full((len(q), 1), np.inf), gaps[:, :-1]], 1))
    assert (near[differ] < 1e-3).all()


def briefly(index):
    """Few rounds of training: its quality is not the question."""
    index = faiss.downcast_index(index)
    for inner in (getattr(index, "index", None), getattr(index, "base_index", None)):
        if inner is not None:
            briefly(inner)
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False
    for quantizer in (index, getattr(index, "pq", None)):
        if hasattr(quantizer, "cp"):
            quantizer.cp.niter = 2
            quantizer.cp.min_points_per_centroid = 1


def trained(text, metric, n=1500, ids=None):
    index = faiss.index_factory(D, text, METRICS[metric])
    briefly(index)
    index.train(vectors(n))
    if ids is None:
        index.add(vectors(n))
    else:
        index.add_with_ids(vectors(n), ids)
    for inner in (index, getattr(index, "base_index", None)):
        if inner is not None and hasattr(faiss.downcast_index(inner), "nprobe"):
            faiss.downcast_index(inner).nprobe = 5
    return index


TEXTS = [
    "Flat", "PQ8", "PQ16x4", "PQ8x6", "IVF16,Flat", "IVF16,PQ8", "IVF16,PQ16x4", "PQ8,RFlat",
    "IVF16,PQ8,RFlat",
]  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("text", TEXTS)
def test_from_faiss_and_back(tmp_path, text, metric):
    theirs = trained(text, metric)
    ours = read_faiss(theirs)
    assert ours.ntotal == theirs.ntotal and ours.metric == metric
    np.testing.assert_array_equal(ours.ids, np.arange(1500))
    same(ours, theirs)
    again = to_faiss(ours)
    assert type(faiss.downcast_index(again)) is type(faiss.downcast_index(theirs))
    same(ours, again)
    faiss.write_index(theirs, str(tmp_path / "theirs"))
    same(read_faiss(tmp_path / "theirs"), theirs)
    write_faiss(ours, tmp_path / "ours")
    same(ours, faiss.read_index(str(tmp_path / "ours")))
    ours.save(tmp_path / "native")  # and it is an index as any other
    ours.add(vectors(50, 3))
    ours.remove_ids(np.arange(100))
    assert len(ours) == 1450


@pytest.mark.parametrize("residual", [True, False])
def test_residual_or_not(residual):
    coarse = faiss.IndexFlatL2(D)
    theirs = faiss.IndexIVFPQ(coarse, D, 16, 8, 8)
    theirs.by_residual = residual
    briefly(theirs)
    theirs.train(vectors(1500))
    theirs.add(vectors(1500))
    theirs.nprobe = 4
    ours = read_faiss(theirs)
    assert ours.residual is residual and ours.nprobe == 4
    same(ours, theirs)
    assert to_faiss(ours).by_residual == residual
    codes = ours.reconstruct(np.arange(100))
    theirs.make_direct_map()
    np.testing.assert_allclose(codes, theirs.reconstruct_n(0, 100), atol=1e-5)


@pytest.mark.parametrize(
    "text", ["IDMap,Flat", "IDMap2,PQ8", "IVF16,Flat", "IVF16,PQ8", "IDMap,IVF16,PQ8,RFlat"]
)
def test_ids(text):
    ids = np.random.default_rng(3).permutation(10**12 + np.arange(1500) * 7)
    theirs = trained(text, "l2", ids=ids)
    if "RFlat" in text:
        faiss.downcast_index(faiss.downcast_index(theirs.index).base_index).nprobe = 5
    ours = read_faiss(theirs)
    assert set(ours.ids.tolist()) == set(ids.tolist())
    same(ours, theirs)
    same(ours, to_faiss(ours))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: Flat(D, m),
        lambda m: PQ(D, 8, metric=m),
        lambda m: PQ(D, 8, 6, metric=m),
        lambda m: Codes(quant.PQ(D, 16, 4), m),
        lambda m: Codes(quant.PQ(D, 8), m, refine="float32"),
        lambda m: IVF(D, 16, None, m, nprobe=4),
        lambda m: IVF(D, 16, quant.PQ(D, 8), m, nprobe=4),
        lambda m: IVF(D, 16, quant.PQ(D, 16, 4), m, nprobe=16, residual=False, refine="float16"),
    ],
)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("own_ids", [False, True])
def test_to_faiss_and_back(make, metric, own_ids):
    ours = make(metric)
    ours.train(vectors(1500))
    ours.add(vectors(1500), np.arange(1500)[::-1] * 3 if own_ids else None)
    theirs = to_faiss(ours)
    same(ours, theirs)
    again = read_faiss(theirs)
    assert again.metric == metric
    same(again, theirs)
    assert set(again.ids.tolist()) == set(ours.ids.tolist())


def test_removed_vectors_stay_away():
    ours = IVF(D, 16, quant.PQ(D, 8), nprobe=16)
    ours.train(vectors(1500))
    ours.add(vectors(1500))
    ours.remove_ids(np.arange(0, 1500, 3))
    theirs = to_faiss(ours)
    assert theirs.ntotal == len(ours)
    same(ours, theirs)


def test_what_has_no_counterpart(tmp_path):
    x = vectors(300)
    for text, match in [
        ("SQ8", "IndexScalarQuantizer has no counterpart"),
        ("HNSW8", "IndexHNSWFlat has no counterpart"),
        ("PCA16,Flat", "PCAMatrix"),
    ]:
        index = faiss.index_factory(D, text)
        index.train(x)
        index.add(x)
        with pytest.raises(ValueError, match=match):
            read_faiss(index)
    with pytest.raises(ValueError, match="not trained"):
        read_faiss(faiss.index_factory(D, "IVF4,Flat"))
    with pytest.raises(ValueError, match="metric"):
        read_faiss(faiss.IndexFlat(D, faiss.METRIC_L1))
    twice = faiss.IndexIDMap(faiss.IndexFlatL2(D))
    twice.add_with_ids(x[:2], np.array([5, 5]))
    with pytest.raises(ValueError, match="unique"):
        read_faiss(twice)
    with pytest.raises(TypeError, match="path or an index of FAISS"):
        read_faiss(7)
    with pytest.raises(FileNotFoundError):
        read_faiss(tmp_path / "absent")
    (tmp_path / "x").write_bytes(b"not an index of anyone's, I am afraid")
    with pytest.raises(ValueError, match="not a file that FAISS reads"):
        read_faiss(tmp_path / "x")
    with pytest.raises(ValueError, match="HNSW cannot be written"):
        to_faiss(HNSW(D))
    with pytest.raises(ValueError, match="codes of SQ cannot be written"):
        coded = Codes(quant.SQ(D))
        coded.train(x)
        to_faiss(coded)
    with pytest.raises(ValueError, match="not trained"):
        to_faiss(PQ(D, 8))
    with pytest.raises(ValueError, match="soar"):
        soar = IVF(D, 4, soar=True)
        soar.train(x)
        to_faiss(soar)


def test_empty_ones():
    assert read_faiss(faiss.IndexFlatL2(D)).ntotal == 0
    assert to_faiss(Flat(D)).ntotal == 0
    empty = faiss.index_factory(D, "IVF4,PQ8x4")
    briefly(empty)
    empty.train(vectors(700))
    assert read_faiss(empty).ntotal == 0 == to_faiss(read_faiss(empty)).ntotal
