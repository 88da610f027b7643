"""lutra.mine on CUDA: what the CPU finds, for arrays and indexes that lie there."""

from __future__ import annotations

import numpy as np
import pytest

from lutra import mine
from lutra.index import IVF, Flat

pytestmark = pytest.mark.filterwarnings("ignore:.* (points|vectors) for .* centroids")
N, NQ, D = 90, 20, 16


def vectors(n, seed=0):
    """Small integers: the same products everywhere, many of them ties."""
    return np.random.default_rng(seed).integers(-3, 4, (n, D)).astype(np.float32)


def near_ties(seed=0):
    """Vectors of which some are copies, and some nearly so."""
    x = np.random.default_rng(seed).standard_normal((N, D)).astype(np.float32)
    x[40:50] = x[:10]
    x[50:60] = x[10:20] + np.float32(0.01)
    return x


@pytest.fixture
def searched(monkeypatch):
    """How often scan.knn was called with arrays on the host, and on the GPU."""
    from lutra import scan

    calls, knn = {"host": 0, "gpu": 0}, scan.knn

    def counting(q, *args, **options):
        calls["host" if isinstance(q, np.ndarray) else "gpu"] += 1
        return knn(q, *args, **options)

    monkeypatch.setattr(scan, "knn", counting)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_hard_negatives(gpu, metric, dtype, searched):
    x, q, right = vectors(N), vectors(NQ, 1), np.random.default_rng(2).integers(0, N, NQ)
    options = {"metric": metric, "num_negatives": 4, "absolute_margin": 1.0, "range_min": 1}
    want = mine.hard_negatives(q, x, right, **options)
    before = searched["host"]
    got = mine.hard_negatives(gpu.put(q, dtype), gpu.put(x, dtype), gpu.put(right), **options)
    assert searched["host"] == before and searched["gpu"] > 0
    for a, b in zip(got, want):
        assert isinstance(a, np.ndarray)
        np.testing.assert_array_equal(a, b)
    mixed = mine.hard_negatives(q, gpu.put(x, dtype), right, **options)
    np.testing.assert_array_equal(mixed.negatives, want.negatives)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_pairs_and_duplicates(gpu, metric, searched):
    x = near_ties()
    limit = {"cosine": 0.95, "l2": 0.1}[metric]
    want = mine.paraphrase_mining(x, 5, 30, metric=metric), mine.deduplicate(x, limit, metric=metric)
    before = searched["host"]
    there = gpu.put(x)
    pairs, groups = (
        mine.paraphrase_mining(there, 5, 30, metric=metric),
        mine.deduplicate(there, limit, metric=metric),
    )
    assert searched["host"] == before and searched["gpu"] > 0
    np.testing.assert_allclose(pairs.scores, want[0].scores, rtol=1e-5, atol=1e-6)
    firm = want[0].scores > want[0].scores[-1] if metric == "cosine" else want[0].scores < want[0].scores[-1]
    assert set(zip(pairs.i[firm], pairs.j[firm])) == set(zip(want[0].i[firm], want[0].j[firm]))
    np.testing.assert_array_equal(groups.keep, want[1].keep)
    np.testing.assert_array_equal(groups.representative, want[1].representative)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_csls(gpu, dtype, searched):
    x, q = (np.random.default_rng(s).standard_normal((n, D)).astype(dtype) for s, n in ((0, N), (1, NQ)))
    for background in (None, x[:30]):
        want = mine.csls(q, x, 5, background=background)
        before = searched["host"]
        there = None if background is None else gpu.put(background)
        got = mine.csls(gpu.put(q), gpu.put(x), 5, background=there)
        assert searched["host"] == before and gpu.owns(got.ids)
        np.testing.assert_allclose(gpu.get(got.scores), want.scores, rtol=1e-4, atol=1e-5)
        assert (gpu.get(got.ids) == want.ids).mean() > 0.95


@pytest.mark.parametrize("make", [lambda: Flat(D, "cosine"), lambda: IVF(D, 4, metric="cosine", nprobe=4)])
def test_indexes(gpu, make):
    x, q = near_ties(), near_ties(1)[:NQ]
    index = make()
    index.train(gpu.put(x))
    index.add(gpu.put(x), np.arange(N) * 2)
    host = Flat(D, "cosine")
    host.add(x, np.arange(N) * 2)
    right = np.arange(NQ) * 2
    for queries in (q, gpu.put(q)):
        got, want = (mine.hard_negatives(a, i, right) for a, i in ((queries, index), (q, host)))
        assert (got.negatives == want.negatives).mean() > 0.95
        found, truth = (mine.csls(a, i, 3) for a, i in ((queries, index), (q, host)))
        ids = found.ids if isinstance(found.ids, np.ndarray) else gpu.get(found.ids)
        assert (ids == truth.ids).mean() > 0.95
    np.testing.assert_array_equal(mine.deduplicate(index).keep, mine.deduplicate(host).keep)


def test_refused(gpu):
    x = vectors(9)
    x[4, 2] = np.nan
    with pytest.raises(ValueError, match=r"x\[4, 2\] is nan"):
        mine.paraphrase_mining(gpu.put(x))
