"""lutra.index.HNSW: recall, the graph against its reference, changes, filters, bad input."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from graph_checks import once, same_links, threads_leave_no_trace, two_thirds

from lutra import _backend, reference
from lutra.index import HNSW, Flat
from lutra.index._graph import STORAGES, Graph

METRICS = ("ip", "l2", "cosine")
COMPILED = _backend.core is not None
needs_core = pytest.mark.skipif(not COMPILED, reason="the reference takes too long")


def vectors(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def clustered(n, d, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, n // 50), d))
    return (centres[rng.integers(0, len(centres), n)] + 0.5 * rng.standard_normal((n, d))).astype(np.float32)


def exact(q, x, k, metric, keep=None):
    flat = Flat(x.shape[1], metric)
    if keep is None:
        keep = np.arange(len(x))
    flat.add(x[keep], keep)
    return flat.search(q, k)


def recall(found, truth):
    hits = [len((set(a) & set(b)) - {-1}) for a, b in zip(found.ids.tolist(), truth.ids.tolist())]
    return sum(hits) / (truth.ids >= 0).sum()


# ---- against the reference
def grids(n, d, seed):
    """Small integers, and 127 in one place: exact in every storage, and full of ties."""
    x = np.random.default_rng(seed).integers(-3, 4, (n, d)).astype(np.float32)
    x[:, 0] = 127
    return x


def grown(kernels, monkeypatch, x, metric, storage, M=4, remove=None):
    """A graph by one implementation, as arrays."""
    monkeypatch.setattr("lutra.index._graph._kernels", lambda: kernels)
    graph = Graph(x.shape[1], metric, False, storage, M, 12, 3)
    tables = graph.tables

    def add(first, part):
        room = {name: table.room(len(part)) for name, table in tables.items()}
        graph.encode(part, room)
        for table in tables.values():
            table.grow(len(part))
        graph.insert(first, len(part))

    add(0, x[:-20])
    add(len(x) - 20, x[-20:])
    if remove is not None:
        keep = np.setdiff1d(np.arange(len(x)), remove)
        graph.remove(keep, len(x))
        for table in tables.values():
            table.keep(keep)
        graph.removed(keep, len(x))
    return graph


@needs_core
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("metric", [0, 1], ids=["ip", "l2"])
@pytest.mark.parametrize("d", [1, 15, 130])
def test_graph_is_the_references(simd_level, monkeypatch, storage, metric, d):
    """With exact arithmetic both build the same graph, link for link, and find the same."""
    x = grids(100, d, d)
    remove = np.arange(0, 100, 3)
    graphs = (
        grown(_backend.core, monkeypatch, x, metric, storage, remove=remove),
        once(
            (metric, d, storage),
            lambda: grown(reference.graph, monkeypatch, x, metric, storage, remove=remove),
        ),
    )
    same_links(*graphs)
    q = grids(9, d, 1)
    n = len(x) - len(remove)
    keep, allowed = two_thirds(n)
    for bits, count in ((None, n), (keep, allowed)):
        results = []
        for graph, kernels in zip(graphs, (_backend.core, reference.graph)):
            monkeypatch.setattr("lutra.index._graph._kernels", lambda kernels=kernels: kernels)
            results.append(graph.search(q, 5, 7, bits, count, None, 0, metric))
        np.testing.assert_array_equal(results[0][1], results[1][1])
        np.testing.assert_array_equal(results[0][0], results[1][0])


@needs_core
def test_bytes_with_and_without_vnni(simd_level):
    """Sums of products of bytes are exact: the instruction changes no bit."""
    x, q = vectors(1500, 70), vectors(40, 70, 1)
    results = []
    try:
        for wanted in (True, False):
            _backend.core.use_features(wanted)
            index = HNSW(70, 6, "l2", ef_construction=20, refine=None)
            index.add(x)
            results.append((index._graph.tables["links"].view, *index.search(q, 5)))
    finally:
        _backend.core.use_features(True)
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


@needs_core
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("refine", ["float32", "float16"])
def test_exact_scores_are_the_references(simd_level, monkeypatch, metric, refine):
    x, q = vectors(300, 37), vectors(20, 37, 1)
    index = HNSW(37, 6, metric, ef_search=20, refine=refine)
    index.add(x)
    found = index.search(q, 6)
    monkeypatch.setattr("lutra.index._graph._kernels", lambda: reference.graph)
    again = index.search(q, 6)
    np.testing.assert_allclose(found.scores, again.scores, rtol=1e-5, atol=1e-5)
    assert recall(found, again) > 0.95
    np.testing.assert_allclose(found.scores, exact_of(q, index, found.ids, metric), rtol=1e-5, atol=1e-5)


def exact_of(q, index, ids, metric):
    return reference.scan.pairwise(q, index.reconstruct(ids.ravel()).reshape(*ids.shape, -1), metric)


def test_reference_searches_and_changes(monkeypatch):
    monkeypatch.setattr("lutra.index._graph._kernels", lambda: reference.graph)
    x, q = clustered(250, 8), clustered(20, 8)
    index = HNSW(8, 4, ef_construction=20, ef_search=25)
    index.add(x[:200])
    index.add(x[200:])
    assert recall(index.search(q, 5), exact(q, x, 5, "l2")) > 0.95
    index.remove_ids(np.arange(0, 250, 2))
    left = np.arange(1, 250, 2)
    assert recall(index.search(q, 5), exact(q, x, 5, "l2", left)) > 0.95


# ---- recall
@needs_core
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("metric", METRICS)
def test_recall(storage, metric):
    x = clustered(6000, 40)
    x, q = x[:5800], x[5800:]
    index = HNSW(40, 12, metric, storage=storage, ef_construction=100, refine="float32")
    index.add(x)
    truth = exact(q, x, 10, metric)
    assert recall(index.search(q, 10, ef_search=200), truth) > 0.99
    low, high = (recall(index.search(q, 10, ef_search=ef), truth) for ef in (10, 60))
    assert 0.6 < low < high


@needs_core
def test_recall_after_removing_half():
    x, q = clustered(6000, 32), clustered(6200, 32)[6000:]
    index = HNSW(32, 12, ef_construction=100)
    index.add(x)
    before = recall(index.search(q, 10, ef_search=40), exact(q, x, 10, "l2"))
    gone = np.random.default_rng(0).permutation(6000)[:3000]
    for part in np.array_split(gone, 5):
        index.remove_ids(part)
    left = np.setdiff1d(np.arange(6000), gone)
    after = recall(index.search(q, 10, ef_search=40), exact(q, x, 10, "l2", left))
    fresh = HNSW(32, 12, ef_construction=100)
    fresh.add(x[left], left)
    anew = recall(fresh.search(q, 10, ef_search=40), exact(q, x, 10, "l2", left))
    assert before > 0.9 and after > anew - 0.02
    found = index.search(x[left], 1, ef_search=40).ids[:, 0]
    assert (found == left).mean() > 0.995
    index.add(x[gone[:500]], gone[:500])
    left = np.concatenate([left, gone[:500]])
    assert recall(index.search(q, 10, ef_search=60), exact(q, x, 10, "l2", left)) > 0.9


@needs_core
@pytest.mark.parametrize("share", [0.6, 0.9, 0.999])
def test_removing_most(share):
    x = clustered(3000, 16)
    index = HNSW(16, 8, ef_construction=60)
    index.add(x)
    gone = np.random.default_rng(1).permutation(3000)[: int(3000 * share)]
    assert index.remove_ids(gone) == len(gone)
    left = np.setdiff1d(np.arange(3000), gone)
    found = index.search(x[left], 1, ef_search=30).ids[:, 0]
    assert (found == left).mean() > 0.99
    index.remove_ids(left)
    assert len(index) == 0
    index.add(x[:100])
    assert (index.search(x[:100], 1).ids[:, 0] == np.arange(3000, 3100)).all()


# ---- independence
@needs_core
@pytest.mark.parametrize("storage", ["int8", "float32"])
def test_threads_leave_no_trace(storage):
    x, q = clustered(3000, 24), clustered(100, 24)
    threads_leave_no_trace(lambda: HNSW(24, 8, storage=storage, ef_construction=40), x, q)


@needs_core
def test_batches_leave_no_trace():
    x, q = clustered(2000, 24), clustered(50, 24)
    index = HNSW(24, 8)
    index.add(x)
    together = index.search(q, 10)
    for i in range(50):
        alone = index.search(q[i : i + 1], 10)
        np.testing.assert_array_equal(alone.ids[0], together.ids[i])
        np.testing.assert_array_equal(alone.scores[0], together.scores[i])


# ---- filters
@needs_core
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.02, 0.001])
def test_filter(share):
    x, q = clustered(4000, 24), clustered(60, 24)
    index = HNSW(24, 12)
    index.add(x, np.arange(4000) * 7)
    rng = np.random.default_rng(0)
    allowed = np.flatnonzero(rng.random(4000) < share)
    truth = exact(q, x, 10, "l2", allowed)
    found = index.search(q, 10, filter=allowed * 7)
    assert np.isin(found.ids[found.ids >= 0], allowed * 7).all()
    assert recall(found._replace(ids=np.where(found.ids < 0, -1, found.ids // 7)), truth) > 0.98
    again = index.search(q, 10, filter=lambda ids: np.isin(ids // 7, allowed))
    np.testing.assert_array_equal(found.ids, again.ids)


@needs_core
def test_filter_far_from_the_queries():
    """What may be found lies nowhere near where walks go."""
    x = np.concatenate([vectors(3000, 8), vectors(1500, 8) + 50])
    index = HNSW(8, 8)
    index.add(x)
    q = vectors(10, 8, 1)
    far = np.arange(3000, 4500)
    found = index.search(q, 10, ef_search=10, filter=far)
    assert (found.ids >= 3000).all()
    assert recall(found, exact(q, x, 10, "l2", far)) == 1


def test_filter_of_nothing():
    index = HNSW(4, 4)
    index.add(vectors(50, 4))
    found = index.search(vectors(2, 4), 3, filter=[])
    assert (found.ids == -1).all() and np.isposinf(found.scores).all()


# ---- tiny, equal, many
@pytest.mark.parametrize("n", [1, 2, 3, 17])
@pytest.mark.parametrize("metric", METRICS)
def test_tiny(n, metric):
    x = vectors(n, 5)
    index = HNSW(5, 2, metric, ef_construction=10)
    index.add(x)
    found = index.search(x, n + 3, ef_search=1)
    truth = exact(x, x, n + 3, metric)
    np.testing.assert_array_equal(found.ids, truth.ids)
    np.testing.assert_allclose(found.scores, truth.scores, rtol=1e-5, atol=1e-6)
    index.remove_ids(np.arange(n))
    with pytest.raises(ValueError, match="empty"):
        index.search(x, 1)


@needs_core
@pytest.mark.parametrize("storage", ["int8", "float32"])
def test_equal_vectors(storage):
    """A thousand copies neither hide each other nor what is behind them."""
    rng = np.random.default_rng(0)
    x = vectors(3000, 16)
    x[rng.permutation(3000)[:1000]] = x[5]
    index = HNSW(16, 8, storage=storage, refine="float32")
    index.add(x)
    same = np.flatnonzero((x == x[5]).all(1))
    found = index.search(x[5:6], len(same) + 100, ef_search=1500)
    np.testing.assert_array_equal(found.ids[0, : len(same)], same)
    others = np.setdiff1d(np.arange(3000), same)
    assert (index.search(x[others], 1).ids[:, 0] == others).mean() > 0.95


def test_zero_vectors_and_large_values():
    x = np.zeros((40, 3), np.float32)
    x[20:] = vectors(20, 3) * 1e15
    for metric in METRICS:
        index = HNSW(3, 4, metric, ef_construction=10)
        index.add(x)
        found = index.search(x[25:30], 3)
        np.testing.assert_array_equal(found.ids, exact(x[25:30], x, 3, metric).ids)
    index = HNSW(3, 4)
    index.add(np.full((5, 3), 1e-42, np.float32))
    assert (index.search(np.zeros((1, 3), np.float32), 5).ids == np.arange(5)).all()


@needs_core
def test_k_beyond_ef_and_n():
    x = clustered(1500, 8)
    index = HNSW(8, 6)
    index.add(x)
    found = index.search(x[:3], 1600, ef_search=5)
    truth = exact(x[:3], x, 1600, "l2")
    np.testing.assert_array_equal(found.ids, truth.ids)
    assert recall(index.search(x[:50], 100, ef_search=5), exact(x[:50], x, 100, "l2")) > 0.95


def test_added_one_by_one():
    x = clustered(300, 6)
    index = HNSW(6, 6, ef_construction=30)
    for row in x:
        index.add(row[None])
    assert recall(index.search(x, 5), exact(x, x, 5, "l2")) > 0.98


# ---- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"M": 1}, r"M must be in \[2, 256\], got 1"),
        ({"M": 257}, r"M must be in \[2, 256\], got 257"),
        ({"ef_construction": 0}, "ef_construction must be in"),
        ({"ef_search": 0}, "ef_search must be >= 1"),
        ({"storage": "int4"}, "storage must be one of 'float32', 'float16', 'bfloat16', 'int8'; got 'int4'"),
        ({"refine": "int8"}, "refine must be None, 'auto', 'float32' or 'float16', got 'int8'"),
        ({"metric": "l1"}, "metric must be one of"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HNSW(4, **arguments)


def test_bad_input():
    index = HNSW(4, 4)
    with pytest.raises(ValueError, match="empty"):
        index.search(vectors(1, 4))
    index.add(vectors(30, 4))
    x = vectors(3, 4)
    x[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"x\[1, 2\] is nan"):
        index.add(x)
    with pytest.raises(ValueError, match=r"q\[1, 2\] is nan"):
        index.search(x)
    with pytest.raises(ValueError, match="columns"):
        index.search(vectors(1, 5))
    with pytest.raises(ValueError, match="k must be >= 1"):
        index.search(vectors(1, 4), 0)
    with pytest.raises(ValueError, match="ef_search must be >= 1"):
        index.search(vectors(1, 4), ef_search=0)
    assert len(index) == 30
    for options in ({"storage": "float16"}, {"refine": "float16"}):
        half = HNSW(4, 4, **options)
        with pytest.raises(ValueError, match=r"x\[2\] holds a value beyond float16"):
            half.add(np.array([[0] * 4, [1] * 4, [1e5] * 4], np.float32))
        assert len(half) == 0


@needs_core
@pytest.mark.parametrize("first", [0, 700])
def test_interrupted(monkeypatch, first):
    """An addition that is interrupted leaves what was there."""
    x, q = clustered(1500, 12), clustered(40, 12)
    index = HNSW(12, 8, ef_construction=40)
    index.add(x[:first])
    insert, calls = Graph._insert, itertools.count()

    def interrupted(self, nodes):
        if next(calls) == 12:
            raise KeyboardInterrupt
        insert(self, nodes)

    monkeypatch.setattr(Graph, "_insert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add(x[first:])
    monkeypatch.undo()
    assert len(index) == first
    if first:
        links = index._graph.tables["links"].view
        assert links.max() < first
        assert recall(index.search(q, 10), exact(q, x[:first], 10, "l2")) > 0.95
    index.add(x[first:])
    np.testing.assert_array_equal(index.ids, np.arange(1500))
    assert recall(index.search(q, 10), exact(q, x, 10, "l2")) > 0.95


def test_short_and_long_way_agree():
    """A few plain queries take a short way: the same results, the same errors."""
    x = vectors(60, 5)
    for ids in (None, np.arange(60) * 2):
        index = HNSW(5, 4, ef_construction=10)
        index.add(x, ids)
        short = index.search(x[:7], 4)
        for other in (index.search(x[:7].astype(np.float64), 4), index.search(np.asfortranarray(x[:7]), 4)):
            np.testing.assert_array_equal(short.ids, other.ids)
            np.testing.assert_array_equal(short.scores, other.scores)
    assert index.search(x[:0], 4).ids.shape == (0, 4)
    with pytest.raises(ValueError, match="2-d"):
        index.search(x[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_copies_are_independent(duplicate):
    x = vectors(80, 5)
    index = HNSW(5, 4, ef_construction=10)
    index.add(x[:60])
    before = index.search(x, 4)
    other = duplicate(index)
    other.add(x[60:])
    other.remove_ids(np.arange(30))
    for a, b in zip(before, index.search(x, 4)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(other.search(x[30:], 1).ids[:, 0], np.arange(30, 80))


# ---- libraries
def test_torch():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(vectors(100, 6))
    index = HNSW(6, 6, "cosine", ef_construction=20)
    index.add(x)
    found = index.search(x[:4].bfloat16(), 3)
    assert isinstance(found.ids, torch.Tensor) and found.ids[:, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(index.reconstruct([7]), x[7:8].numpy())
    bare = HNSW(6, 6, "cosine", ef_construction=20, refine=None)
    bare.add(x)
    unit = x / x.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(bare.reconstruct(torch.arange(5)).numpy(), unit[:5].numpy(), atol=0.01)
