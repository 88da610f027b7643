"""lutra.index.HNSW over codes of PQ and OPQ: the reference's graph, recall, changes, filters, files."""

import copy
import itertools
import json
import pickle

import numpy as np
import pytest
from graph_checks import (
    once,
    same_links,
    survives_a_round_trip,
    survives_damage,
    threads_leave_no_trace,
    two_thirds,
)
from test_index_hnsw import clustered, exact, grids, grown, needs_core, recall, vectors
from test_index_hnsw_files import parts, tensor, write

import lutra
from lutra import _backend, reference
from lutra.index import HNSW, load
from lutra.quant import OPQ, PQ, RQ, SQ, RaBitQ

METRICS = ("ip", "l2", "cosine")


def grid_pq(d, m, bits, reach=3, seed=0):
    """Whole numbers as centroids: everything is exact, but for the tables where they reach far; many ties."""
    quantizer = PQ(d, m, bits)
    books = np.random.default_rng(seed).integers(-reach, reach + 1, (m, 1 << bits, d // m))
    books = books.astype(np.float32)
    quantizer._restore({"codebooks": books})
    return quantizer


def trained(kind, x, m, bits, **options):
    few = {"n_iter": 4, "rotations": 3} if kind is OPQ else {"n_iter": 4}
    with pytest.warns(UserWarning, match="advisable") if len(x) < 39 << bits else nothing():
        return kind(x.shape[1], m, bits, **options).train(x, progress=False, **few)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


# ---- against the reference
@needs_core
@pytest.mark.parametrize("metric", [0, 1], ids=["ip", "l2"])
@pytest.mark.parametrize(
    ("d", "m", "bits", "reach"),
    [(1, 1, 8, 3), (1, 1, 4, 3), (15, 5, 8, 3), (15, 15, 4, 3), (34, 17, 8, 3), (66, 33, 4, 3),
     (97, 97, 8, 3), (65, 13, 6, 3), (63, 63, 3, 3), (16, 2, 1, 3), (130, 130, 4, 3), (24, 3, 8, 3),
     (64, 4, 8, 3), (12, 4, 8, 300), (33, 33, 4, 300), (15, 3, 8, 300)],
)  # fmt: skip
def test_graph_is_the_references(simd_level, monkeypatch, metric, d, m, bits, reach):
    """Link for link, and the same is found with the same scores."""
    x, quantizer = grids(100, d, d), grid_pq(d, m, bits, reach)
    remove = np.arange(0, 100, 3)
    case = ("codes", metric, d, m, bits, reach)
    graphs = (
        grown(_backend.core, monkeypatch, x, metric, quantizer, remove=remove),
        once(case, lambda: grown(reference.graph, monkeypatch, x, metric, quantizer, remove=remove)),
    )
    same_links(*graphs)
    q = grids(9, d, 1)
    n = len(x) - len(remove)
    keep, allowed = two_thirds(n)
    kept = vectors(n, d)
    for bits_, count, rows in ((None, n, None), (keep, allowed, None), (None, n, kept)):

        def search(graph, kernels, given=(bits_, count, rows)):
            monkeypatch.setattr("lutra.index._graph._kernels", lambda: kernels)
            return graph.search(q, 5, 7, *given, 7, metric)

        which = (*case, bits_ is None, rows is None)
        results = [
            search(graphs[0], _backend.core),
            once(which, lambda search=search: search(graphs[1], reference.graph)),
        ]
        np.testing.assert_array_equal(results[0][1], results[1][1])
        if rows is None:
            np.testing.assert_array_equal(results[0][0], results[1][0])
        else:
            np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)


@needs_core
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [PQ, OPQ])
def test_scores_are_those_of_the_codes(simd_level, metric, bits, kind):
    """Without vectors: what `reconstruct` gives, up to the rounding of the tables."""
    x, q = clustered(700, 33), clustered(30, 33)
    index = HNSW(33, 8, metric, storage=trained(kind, x, 11, bits), refine=None)
    index.add(x)
    found = index.search(q, 6)
    rows = index.reconstruct(found.ids.ravel()).reshape(*found.ids.shape, -1)
    if metric == "cosine":
        wanted = reference.scan.pairwise(unit(q), rows, "ip")
    else:
        wanted = reference.scan.pairwise(q, rows, metric)
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@needs_core
@pytest.mark.parametrize("value", [1e-30, 1e15, 1e25, 3e38])
@pytest.mark.parametrize("metric", METRICS)
def test_large_and_small_queries(simd_level, monkeypatch, value, metric):
    """Tables of any size are integers that fit, the same as the reference's."""
    x = vectors(60, 12)
    index = HNSW(12, 4, metric, storage=trained(PQ, x, 6, 4), refine=None)
    index.add(x)
    q = np.sign(vectors(5, 12, 1)) * np.float32(value)
    with np.errstate(over="ignore"):
        found = index.search(q, 3)
        monkeypatch.setattr("lutra.index._graph._kernels", lambda: reference.graph)
        again = index.search(q, 3)
    assert (found.ids >= 0).all() and not np.isnan(found.scores).any()
    if value < 1e38:  # beyond, products overflow in one order of addition and not in another
        np.testing.assert_allclose(found.scores, again.scores, rtol=1e-3, atol=1e-5)


# ---- recall
@needs_core
@pytest.mark.parametrize(("kind", "bits"), [(PQ, 8), (PQ, 4), (PQ, 6), (OPQ, 8), (OPQ, 4)])
@pytest.mark.parametrize("metric", METRICS)
def test_recall(kind, bits, metric):
    """With vectors nearly everything is found; without, what a scan of the codes finds."""
    x = clustered(5200, 40)
    x, q = x[:5000], x[5000:]
    quantizer = trained(kind, x, 20, bits)
    index = HNSW(40, 12, metric, storage=quantizer, ef_construction=100)
    assert index.refine == "float16"
    index.add(x)
    truth = exact(q, x, 10, metric)
    low, high = (recall(index.search(q, 10, ef_search=ef), truth) for ef in (10, 200))
    assert 0.2 < low < high and high > 0.97
    bare = HNSW(40, 12, metric, storage=quantizer, ef_construction=100, refine=None)
    bare.add(x)
    coded = quantizer.decode(quantizer.encode(unit(x) if metric == "cosine" else x))
    scan = exact(q, coded, 10, "ip" if metric == "cosine" else metric)
    assert recall(bare.search(q, 10, ef_search=200), scan) > 0.97
    assert bare.nbytes + 2 * 40 * 5000 == index.nbytes


@needs_core
def test_memory():
    """32 bytes a vector for 32 entries of 8 bits, 16 for as many of 4; the rest are links and codebooks."""
    x = clustered(2000, 128)
    for bits, size in ((8, 32), (4, 16)):
        index = HNSW(128, 8, storage=trained(PQ, x, 32, bits), refine=None)
        index.add(x)
        assert index._graph.tables["rows"].nbytes == size * 2000
        assert index.nbytes < (size + 8 * 8 + 12) * 2000 + (128 << bits) * 4


@needs_core
@pytest.mark.parametrize("refine", [None, "float32"])
def test_recall_after_removing_half(refine):
    x, q = clustered(4000, 32), clustered(4200, 32)[4000:]
    quantizer = trained(PQ, x, 16, 8)
    index = HNSW(32, 12, storage=quantizer, ef_construction=100, refine=refine)
    index.add(x)
    gone = np.random.default_rng(0).permutation(4000)[:2000]
    for part in np.array_split(gone, 5):
        index.remove_ids(part)
    left = np.setdiff1d(np.arange(4000), gone)
    fresh = HNSW(32, 12, storage=quantizer, ef_construction=100, refine=refine)
    fresh.add(x[left], left)
    truth = exact(q, x, 10, "l2", left)
    anew = recall(fresh.search(q, 10, ef_search=60), truth)
    assert recall(index.search(q, 10, ef_search=60), truth) > anew - 0.02
    index.add(x[gone[:500]], gone[:500])
    found = index.search(x[gone[:500]], 5, ef_search=60).ids
    assert (found == gone[:500, None]).any(1).mean() > 0.95


@needs_core
@pytest.mark.parametrize("metric", METRICS)
def test_equal_vectors(metric):
    """A thousand copies neither hide each other nor what is behind them."""
    rng = np.random.default_rng(0)
    x = vectors(3000, 16)
    x[rng.permutation(3000)[:1000]] = x[5]
    index = HNSW(16, 8, metric, storage=trained(PQ, x, 16, 8), refine="float32")
    index.add(x)
    same = np.flatnonzero((x == x[5]).all(1))
    if metric != "ip":
        found = index.search(x[5:6], len(same), ef_search=1500)
        np.testing.assert_array_equal(np.sort(found.ids[0]), same)
    others = np.setdiff1d(np.arange(3000), same)
    found = index.search(x[others], 10, ef_search=200)
    assert recall(found, exact(x[others], x, 10, metric)) > 0.9


# ---- independence
@needs_core
@pytest.mark.parametrize("kind", [PQ, OPQ])
def test_threads_and_batches_leave_no_trace(kind):
    x, q = clustered(3000, 24), clustered(100, 24)
    quantizer = trained(kind, x, 12, 8)
    index, found = threads_leave_no_trace(
        lambda: HNSW(24, 8, "cosine", storage=quantizer, ef_construction=40), x, q
    )
    for i in range(0, 100, 7):
        alone = index.search(q[i : i + 1], 10)
        np.testing.assert_array_equal(alone.ids[0], found.ids[i])
        np.testing.assert_array_equal(alone.scores[0], found.scores[i])


@needs_core
@pytest.mark.parametrize("bits", [4, 8])
def test_whole_numbers_are_exact(simd_level, bits):
    """Where the tables' entries are whole numbers and fit, so are the scores, at every level."""
    x, q = np.rint(clustered(1500, 24) * 2), np.rint(clustered(50, 24) * 2)
    quantizer = grid_pq(24, 12, bits)
    index = HNSW(24, 6, storage=quantizer, refine=None, ef_construction=30)
    index.add(x)
    found = index.search(q, 5, ef_search=1)
    coded = quantizer.decode(quantizer.encode(x))
    wanted = np.square(q[:, None] - coded[found.ids]).sum(2)
    np.testing.assert_array_equal(found.scores, wanted)


# ---- filters
@needs_core
@pytest.mark.parametrize("share", [0.5, 0.02, 0.001])
def test_filter(share):
    x, q = clustered(4000, 24), clustered(60, 24)
    index = HNSW(24, 12, storage=trained(PQ, x, 12, 8))
    index.add(x, np.arange(4000) * 7)
    allowed = np.flatnonzero(np.random.default_rng(0).random(4000) < share)
    truth = exact(q, x, 10, "l2", allowed)
    found = index.search(q, 10, filter=allowed * 7)
    assert np.isin(found.ids[found.ids >= 0], allowed * 7).all()
    assert recall(found._replace(ids=np.where(found.ids < 0, -1, found.ids // 7)), truth) > 0.98
    nothing_ = index.search(q[:2], 3, filter=[])
    assert (nothing_.ids == -1).all()


# ---- training, bad arguments
def test_training():
    x = vectors(60, 8)
    index = HNSW(8, 4, "cosine", storage=PQ(8, 4, 4), ef_construction=10)
    assert not index.is_trained and "not trained" in repr(index)
    for call in (lambda: index.add(x), lambda: index.search(x[:1])):
        with pytest.raises(ValueError, match=r"not trained: call train\(x\)"):
            call()
    assert len(index) == 0
    with pytest.warns(UserWarning, match="advisable"):
        index.train(x)
    assert index.is_trained and index.storage.is_trained
    index.add(x)
    assert (index.search(x, 1).ids[:, 0] == np.arange(60)).all()
    with pytest.raises(ValueError, match="the index holds 60 coded vectors; train a new one"):
        index.train(x)
    with pytest.warns(UserWarning, match="advisable"):
        other = PQ(8, 4, 4).train(unit(x))
    np.testing.assert_allclose(index.storage.codebooks, other.codebooks, atol=1e-6)


@pytest.mark.parametrize("quantizer", [RQ(8, 4), SQ(8), RaBitQ(8)])
def test_other_quantizers(quantizer):
    with pytest.raises(ValueError, match=r"storage may be the quantizers PQ and OPQ of lutra\.quant, got"):
        HNSW(8, storage=quantizer)


def test_bad_arguments():
    with pytest.raises(ValueError, match="the quantizer has d = 8; the index has d = 16"):
        HNSW(16, storage=PQ(8, 4))
    for storage in (None, 8, PQ):
        with pytest.raises(
            ValueError, match=r"storage must be one of 'float32'.*a PQ or OPQ of lutra\.quant"
        ):
            HNSW(8, storage=storage)
    index = HNSW(4, 4, storage=trained(PQ, vectors(40, 4), 2, 4))
    with pytest.raises(ValueError, match=r"x\[2\] holds a value beyond float16"):
        index.add(np.array([[0] * 4, [1] * 4, [1e5] * 4], np.float32))
    assert len(index) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
@pytest.mark.parametrize("kind", [PQ, OPQ])
def test_copies_are_independent(duplicate, kind):
    x = vectors(80, 6)
    index = HNSW(6, 4, ef_construction=10, storage=trained(kind, x, 3, 4))
    index.add(x[:60])
    before = index.search(x, 4)
    other = duplicate(index)
    assert other._graph.coder.quantizer is other.quantizer is other.storage is not index.storage
    other.add(x[60:])
    other.remove_ids(np.arange(30))
    for a, b in zip(before, index.search(x, 4)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(other.search(x[30:], 1).ids[:, 0], np.arange(30, 80))


def test_reconstruct():
    x = vectors(70, 12)
    for kind, bits, metric in itertools.product((PQ, OPQ), (2, 4, 5, 8), ("l2", "cosine")):
        quantizer = trained(kind, vectors(300, 12), 4, bits)
        index = HNSW(12, 4, metric, storage=quantizer, refine=None, ef_construction=10)
        index.add(x)
        wanted = quantizer.decode(quantizer.encode(unit(x) if metric == "cosine" else x))
        np.testing.assert_allclose(index.reconstruct([7, 3]), wanted[[7, 3]], atol=1e-6)
    index = HNSW(12, 4, storage=quantizer, refine="float32", ef_construction=10)
    index.add(x)
    np.testing.assert_array_equal(index.reconstruct(np.arange(70)), x)


# ---- files
def made(kind=PQ, n=120, d=9, **options):
    options = {"storage": trained(kind, vectors(300, d), 3, options.pop("bits", 4)), **options}
    index = HNSW(d, 4, ef_construction=15, **options)
    index.add(vectors(n, d), np.arange(n) * 3)
    return index


@pytest.mark.parametrize(("kind", "bits"), [(PQ, 8), (PQ, 4), (PQ, 3), (OPQ, 8)])
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("refine", [None, "float32"])
def test_round_trip(tmp_path, kind, bits, mmap, refine):
    index = made(kind, bits=bits, refine=refine, metric="cosine", ef_search=17, seed=5)
    survives_a_round_trip(index, tmp_path / "index", vectors(10, 9, 1), vectors(20, 9, 2), mmap)


@pytest.mark.parametrize("ready", [True, False])
def test_empty_files(tmp_path, ready):
    quantizer = trained(PQ, vectors(50, 9), 3, 4) if ready else PQ(9, 3, 4)
    HNSW(9, 4, storage=quantizer).save(tmp_path / "index")
    again = load(tmp_path / "index")
    assert len(again) == 0 and again.is_trained == ready
    if ready:
        again.add(vectors(3, 9, 2))
        assert again.search(vectors(3, 9, 2), 1).ids.shape == (3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storage": {"name": "PQ", "d": 9, "m": 9, "bits": 8}}, "quantizer.codebooks"),
        ({"storage": {"name": "PQ", "d": 18, "m": 3, "bits": 4}}, "the quantizer has d = 18"),
        ({"storage": {"name": "OPQ", "d": 9, "m": 3, "bits": 4}}, "quantizer.rotation"),
        ({"storage": {"name": "SQ", "d": 9}}, "storage may be the quantizers PQ and OPQ"),
        ({"storage": {"name": "Zip", "d": 9}}, "a quantizer of kind 'Zip'"),
        ({"storage": {"name": "PQ", "d": 9, "m": 2}}, "m must divide d = 9"),
        ({"storage": "int8"}, "rows"),
        ({"storage": []}, "storage must be one of"),
        ({"trained": False}, "'trained' in the metadata is False; there are 120 vectors"),
        ({"trained": None}, "'trained' in the metadata is None"),
        ({"refine": None}, "unexpected tensors: 'vectors'"),
        ({"d": 8}, "the quantizer has d = 9"),
    ],
)
def test_metadata_that_do_not_fit(tmp_path, change, message):
    path = tmp_path / "index"
    made().save(path)
    header, body = parts(path)
    config = json.loads(header["__metadata__"]["config"])
    header["__metadata__"]["config"] = json.dumps({**config, **change})
    write(path, header, body)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codebooks_that_are_no_numbers(tmp_path, value):
    path = tmp_path / "index"
    made().save(path)
    header, body = parts(path)
    tensor(header, body, "quantizer.codebooks", np.float32)[5] = value
    write(path, header, body)
    with pytest.raises(ValueError, match="'codebooks' holds NaN or infinities"):
        load(path)


@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("mmap", [True, False])
def test_any_codes(tmp_path, bits, mmap):
    """Entries that no encoder gives are taken modulo the centroids: by searches and by `reconstruct`."""
    path = tmp_path / "index"
    index = made(bits=bits, refine=None)
    index.save(path)
    header, body = parts(path)
    rows = tensor(header, body, "rows", np.uint8)
    rows[:] = np.random.default_rng(0).integers(0, 256, len(rows))
    write(path, header, body)
    again = load(path, mmap=mmap)
    q = vectors(5, 9, 1)
    found = again.search(q, 120)
    assert (found.ids >= 0).all()
    x = again.reconstruct(found.ids.ravel()).reshape(5, 120, 9)
    np.testing.assert_allclose(found.scores, np.square(q[:, None] - x).sum(2), rtol=1e-3, atol=1e-3)
    again.add(q)
    again.remove_ids(again.ids[::2])
    assert again.search(q, 3).ids.shape == (5, 3)


def test_any_bytes(tmp_path):
    survives_damage(made(n=60, d=6, metric="cosine"), tmp_path / "index", vectors(3, 6, 1), 300, 5)


# ---- what asks the index about itself
@needs_core
def test_tune_needs_vectors_without_refine():
    x = clustered(2000, 16)
    quantizer = trained(PQ, x, 8, 8)
    index = HNSW(16, 8, storage=quantizer, refine=None)
    index.add(x)
    with pytest.raises(ValueError, match="keeps codes only"):
        index.tune(x[:50])
    index.tune(x[:50], 0.3, vectors=x)
    kept = HNSW(16, 8, storage=quantizer)
    kept.add(x)
    kept.tune(x[:50], 0.9)
    assert recall(kept.search(x[:50], 10), exact(x[:50], x, 10, "l2")) > 0.9


@needs_core
def test_in_a_folder(tmp_path):
    """Segments take the training of the base."""
    x = clustered(900, 16)
    index = HNSW(16, 8, storage=trained(PQ, x, 8, 4), ef_construction=40)
    index.add(x[:500])
    with lutra.index.create(tmp_path / "folder", index) as store:
        store.add(x[500:700])
        store.commit()
        store.add(x[700:])
        assert recall(store.search(x, 5), exact(x, x, 5, "l2")) > 0.9
        store.remove_ids(np.arange(0, 900, 3))
        store.compact()
    left = np.setdiff1d(np.arange(900), np.arange(0, 900, 3))
    again = lutra.index.open(tmp_path / "folder")
    assert recall(again.search(x[left], 5), exact(x[left], x, 5, "l2", left)) > 0.9
