"""MultiVector: candidates by encodings, MaxSim over stored tokens, files."""

import json
import threading
import warnings

import numpy as np
import pytest

from lutra.address import FDE
from lutra.index import HNSW, Flat, MultiVector, load

D = 16
SMALL = {"repetitions": 8, "k_sim": 3, "d_proj": 16}


def sets(count, low, high, seed):
    rng = np.random.default_rng(seed)
    tokens = [rng.standard_normal((rng.integers(low, high), D)).astype(np.float32) for _ in range(count)]
    return [t / np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-9) for t in tokens]


DOCUMENTS = sets(120, 1, 20, 0)
QUERIES = [np.concatenate([d[: 1 + i % 4], s]) for i, (d, s) in enumerate(zip(DOCUMENTS, sets(30, 1, 4, 1)))]


def brute(queries, documents, k):
    scores = np.array([[(q @ d.T).max(1).sum() for d in documents] for q in queries])
    order = np.argsort(-scores, 1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def built(*parts, documents=DOCUMENTS, ids=None, **options):
    index = MultiVector(D, *parts, **{**SMALL, **options})
    if not index.is_trained:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few documents to train on
            index.train(DOCUMENTS * 3, progress=False)
    index.add(documents, ids=ids)
    return index


@pytest.mark.parametrize("tokens", ["float32", "float16", "bfloat16", "int8"])
def test_exact_search_is_maxsim(tokens):
    if tokens == "bfloat16":
        pytest.importorskip("ml_dtypes")
    index = built("float32", tokens)
    scores, ids = index.search(QUERIES, 7, generator="all")
    want, order = brute(QUERIES, [index.reconstruct(i) for i in range(len(DOCUMENTS))], 7)
    np.testing.assert_allclose(scores, want, rtol=0, atol=2e-3 if tokens == "int8" else 1e-5)
    assert (ids == order).mean() > 0.98
    tolerance = {"float32": 0, "float16": 1e-3, "bfloat16": 4e-3, "int8": 5e-3}[tokens]
    for i in (0, 57, 119):
        assert np.abs(index.reconstruct(i) - DOCUMENTS[i]).max() <= tolerance


KINDS = ["float32", "float16", "int8", "pq", "Flat", "SQ8", "HNSW8", "IVF4,Flat"]


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_of_any_index(kind):
    index = built(kind, candidates=50)
    if kind.startswith("IVF"):
        index.index.nprobe = 4
    scores, ids = index.search(QUERIES, 5)
    _, order = brute(QUERIES, DOCUMENTS, 5)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(ids, order)])
    assert recall > (0.6 if kind == "pq" else 0.75)
    full = np.array([[(q @ DOCUMENTS[i].T).max(1).sum() for i in row] for q, row in zip(QUERIES, ids)])
    np.testing.assert_allclose(scores, full, atol=2e-3)  # a found document has its own score
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (index.search(QUERIES, 5, candidates=len(DOCUMENTS)).ids == order).mean() > 0.98


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_residual_tokens(bits, tmp_path):
    index = built("float16", f"residual{bits}")
    decoded = [index.reconstruct(i) for i in range(len(DOCUMENTS))]
    error = np.mean([np.linalg.norm(a - b, axis=1).mean() for a, b in zip(decoded, DOCUMENTS)])
    assert error < {1: 0.6, 2: 0.45, 4: 0.2}[bits]
    scores = index.search(QUERIES, 5, generator="all").scores
    want, order = brute(QUERIES, decoded, 5)
    np.testing.assert_allclose(scores, want, atol=1e-4)
    by_centroids = index.search(QUERIES, 5, candidates=40, generator="centroids")
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(by_centroids.ids, order)]) > 0.6
    index.save(tmp_path / "x")
    again = load(tmp_path / "x")
    for a, b in zip(again.search(QUERIES, 5), index.search(QUERIES, 5)):
        np.testing.assert_array_equal(a, b)


def test_forms_of_documents_and_queries():
    torch = pytest.importorskip("torch")
    want = built().search(QUERIES, 4)
    ptr = np.concatenate([[0], np.cumsum([len(d) for d in DOCUMENTS])])
    flat = MultiVector(D, **SMALL)
    flat.add(np.concatenate(DOCUMENTS), ptr=ptr)
    length = max(map(len, DOCUMENTS))
    padded = np.full((len(DOCUMENTS), length, D), 7, np.float32)
    mask = np.arange(length) < np.array([len(d) for d in DOCUMENTS])[:, None]
    padded[mask] = np.concatenate(DOCUMENTS)
    filled = MultiVector(D, **SMALL)
    filled.add(padded, mask=mask)
    tensors = MultiVector(D, **SMALL)
    tensors.add([torch.from_numpy(d) for d in DOCUMENTS])
    for index in (flat, filled, tensors):
        for a, b in zip(index.search(QUERIES, 4), want):
            np.testing.assert_array_equal(a, b)
    for dtype in (np.float64, np.float16):
        other = MultiVector(D, **SMALL)
        other.add([d.astype(dtype) for d in DOCUMENTS])
        scores = other.search([q.astype(dtype) for q in QUERIES], 4).scores
        np.testing.assert_allclose(scores, want.scores, atol=1e-6 if dtype is np.float64 else 1e-2)
    with pytest.raises(ValueError, match="infinities"):
        tensors.search([np.full((1, D), 1e300)])
    found = tensors.search([torch.from_numpy(q) for q in QUERIES], 4)
    assert isinstance(found.scores, torch.Tensor)
    np.testing.assert_array_equal(found.ids.numpy(), want.ids)


def test_ids_removal_and_filters(tmp_path):
    ids = np.random.default_rng(2).permutation(1000)[: len(DOCUMENTS)]
    index = built(ids=ids)
    _, order = brute(QUERIES, DOCUMENTS, 3)
    np.testing.assert_array_equal(index.search(QUERIES, 3, generator="all").ids, ids[order])
    gone = ids[order[:, 0]]
    some = index.search(QUERIES, 3, filter=lambda i: ~np.isin(i, gone))
    assert index.remove_ids(np.concatenate([gone, [5000]])) == len(set(gone.tolist()))
    assert index.ntokens == sum(len(d) for d, i in zip(DOCUMENTS, ids) if i not in set(gone.tolist()))
    left = [(i, d) for i, d in zip(ids, DOCUMENTS) if i not in set(gone.tolist())]
    _, order = brute(QUERIES, [d for _, d in left], 3)
    want = np.array([i for i, _ in left])[order]
    np.testing.assert_array_equal(index.search(QUERIES, 3, generator="all").ids, want)
    np.testing.assert_array_equal(index.search(QUERIES, 3).ids, some.ids)
    allowed = np.array([i for i, _ in left])[:4]
    for generator in ("encodings", "all"):
        found = index.search(QUERIES, 6, filter=allowed, candidates=20, generator=generator)
        assert (found.ids[:, 4:] == -1).all()
        assert np.isneginf(found.scores[:, 4:]).all()
        assert set(found.ids[:, :4].ravel().tolist()) == set(allowed.tolist())
    index.add(DOCUMENTS[:2], ids=[2000, 2001])
    np.testing.assert_array_equal(index.reconstruct([2001])[0].astype(np.float32).shape, DOCUMENTS[1].shape)
    index.save(tmp_path / "x")
    again = load(tmp_path / "x")
    again.remove_ids([2000])
    again.add(DOCUMENTS[5:6])
    assert again.ids[-1] == 2002
    assert again.ntotal == index.ntotal


@pytest.mark.parametrize("mmap", [True, False])
def test_files(tmp_path, mmap):
    index = built("float16", "int8", candidates=33, ball_carving=0.8, ids=np.arange(120) * 2)
    index.save(tmp_path / "x")
    again = load(tmp_path / "x", mmap=mmap)
    assert (again.candidates, again.ball_carving, again.tokens) == (33, 0.8, "int8")
    assert again.encoder == index.encoder
    assert repr(again) == repr(index)
    for a, b in zip(again.search(QUERIES, 5), index.search(QUERIES, 5)):
        np.testing.assert_array_equal(a, b)
    again.add(DOCUMENTS[:3])
    again.save(tmp_path / "x")  # over the file that is mapped
    assert load(tmp_path / "x").ntotal == 123
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    config["encoder"]["k_sim"] = 4  # encodings of other parameters than the index's
    header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    (tmp_path / "y").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ValueError, match="dimensions"):
        load(tmp_path / "y")


def test_empty_documents_and_queries():
    documents = [DOCUMENTS[0], np.empty((0, D), np.float32), DOCUMENTS[1]]
    index = built(documents=documents)
    scores, ids = index.search([DOCUMENTS[1][:2], np.empty((0, D), np.float32)], 3)
    assert ids[0, 0] == 2
    assert ids[0, 2] == -1 or np.isneginf(scores[0, 2])  # without tokens a document matches nothing
    assert (scores[1] == 0).all()
    assert index.reconstruct(1).shape == (0, D)


def test_nothing_changes_when_an_addition_fails():
    class Failing(Flat):
        left = 1

        def _encode(self, x, out, first):
            Failing.left -= 1
            if Failing.left < 0:
                raise MemoryError("no more")
            super()._encode(x, out, first)

    from lutra.index import multivector

    encoder = FDE(D, 6, 3, 8)
    index = MultiVector(D, Failing(encoder.dim, "ip"), encoder=encoder)
    index.add(DOCUMENTS[:10])
    before = index.search(QUERIES, 3)
    Failing.left = 2
    old, multivector._PART = multivector._PART, 4 * encoder.dim * 5
    try:
        with pytest.raises(MemoryError):
            index.add(DOCUMENTS[10:])
    finally:
        multivector._PART = old
    assert (index.ntotal, index.ntokens) == (10, sum(map(len, DOCUMENTS[:10])))
    for a, b in zip(index.search(QUERIES, 3), before):
        np.testing.assert_array_equal(a, b)
    Failing.left = 100
    index.add(DOCUMENTS[10:])
    np.testing.assert_array_equal(
        index.search(QUERIES, 3, generator="all").ids, brute(QUERIES, DOCUMENTS, 3)[1]
    )


def test_tune():
    index = built("float16")
    tuned = index.tune(QUERIES, 0.9, 5)
    assert tuned.reached
    assert index.candidates == tuned.parameters["candidates"]
    _, order = brute(QUERIES, DOCUMENTS, 5)
    ids = index.search(QUERIES, 5).ids
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(ids, order)]) >= 0.9
    graph = built("HNSW8")
    assert set(graph.tune(QUERIES, 0.8, 5).parameters) == {"candidates", "ef_search"}


def test_many_threads_search_at_once():
    index = built(candidates=30)
    want = index.search(QUERIES, 5)
    found = []
    threads = [threading.Thread(target=lambda: found.append(index.search(QUERIES, 5))) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 4
    for other in found:
        np.testing.assert_array_equal(other.ids, want.ids)


def test_bad_input():
    with pytest.raises(ValueError, match="tokens must be one of"):
        MultiVector(D, tokens="float8")
    with pytest.raises(ValueError, match="d = 8"):
        MultiVector(8, encoder=FDE(D))
    with pytest.raises(ValueError, match="parameters have 1024 dimensions"):
        MultiVector(D, Flat(100, "ip"), **SMALL)
    with pytest.raises(ValueError, match="metric 'ip'"):
        MultiVector(D, Flat(1024, "l2"), **SMALL)
    with pytest.raises(TypeError, match="FDE"):
        MultiVector(D, encoder=3)
    with pytest.raises(TypeError, match="single-vector"):
        MultiVector(D, 5)
    with pytest.raises(ValueError, match="candidates"):
        MultiVector(D, candidates=0)
    index = MultiVector(D, **SMALL)
    with pytest.raises(ValueError, match="empty"):
        index.search(QUERIES)
    with pytest.raises(ValueError, match="not trained"):
        MultiVector(D, tokens="residual2", **SMALL).add(DOCUMENTS)
    bad = [d.copy() for d in DOCUMENTS[:3]]
    bad[1][0, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        index.add(bad)
    tokens = np.concatenate(DOCUMENTS[:3])
    for ptr in ([0, 5, 3, len(tokens)], [0, 2], [1, len(tokens)]):
        with pytest.raises(ValueError, match="ptr"):
            index.add(tokens, ptr=np.array(ptr))
    with pytest.raises(ValueError, match="15"):
        index.add([d[:, :15] for d in DOCUMENTS])
    with pytest.raises(ValueError, match="ids"):
        index.add(DOCUMENTS[:3], ids=[1, 1, 2])
    assert index.ntotal == index.ntokens == 0
    index.add(DOCUMENTS)
    with pytest.raises(ValueError, match="k must be"):
        index.search(QUERIES, 0)
    with pytest.raises(ValueError, match="generator"):
        index.search(QUERIES, generator="tokens")
    with pytest.raises(ValueError, match="residual2"):
        index.search(QUERIES, candidates=20, generator="centroids")
    with pytest.raises(IndexError, match="500"):
        index.reconstruct(500)
    with pytest.raises(NotImplementedError, match=r"in HNSW, which is for the CPU.*Flat, IVF"):
        MultiVector(D, HNSW(index.encoder.dim, metric="ip"), **SMALL).to("cuda")
    with pytest.raises(ValueError, match="recall"):
        index.tune(QUERIES, 1.5)
    with pytest.raises(TypeError, match="single-vector"):
        MultiVector(D, index, **SMALL)


def test_centroid_interaction_is_maxsim_of_centroids():
    index = built("float16", "residual2")
    store = index._tokens
    ids, centroids = store.docs.centroid_ids, store.docs.centroids
    documents = [centroids[ids[low:high]] for low, high in zip(store.ptr[:-1], store.ptr[1:])]
    names = [set(ids[low:high].tolist()) for low, high in zip(store.ptr[:-1], store.ptr[1:])]
    wide = np.concatenate(QUERIES), np.concatenate([[0], np.cumsum([len(q) for q in QUERIES])])
    found = index._centroid_interaction().candidates(*wide, 10, None)
    for query, got in zip(QUERIES, found):
        near = set(np.argsort(-(query @ centroids.T), 1)[:, :4].ravel().tolist())
        scores = [(query @ d.T).max(1).sum() if near & n else -np.inf for d, n in zip(documents, names)]
        assert set(got.tolist()) == set(np.argsort(-np.array(scores), kind="stable")[:10].tolist())
    few = index._centroid_interaction().candidates(
        *wide, 10, np.packbits(np.arange(120) < 3, bitorder="little")
    )
    assert ((few[:, -3:] >= -1) & (few[:, -3:] < 3)).all()
