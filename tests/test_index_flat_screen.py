"""index.Flat(screen="int8"): the results of Flat, through every change of the collection."""

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.index import Flat, load

METRICS = ("ip", "l2", "cosine")


def data(n, d=24, seed=0):
    return np.random.default_rng([seed, n]).standard_normal((n, d)).astype(np.float32)


def same(index, plain, q, k=5, **options):
    got, want = index.search(q, k, **options), plain.search(q, k, **options)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.ids, want.ids)


@pytest.mark.parametrize("metric", METRICS)
def test_additions_and_removals(metric):
    index, plain, q = Flat(24, metric, screen="int8"), Flat(24, metric), data(9, seed=1)
    for i, n in enumerate((1, 14, 2, 47, 200, 16)):
        for each in (index, plain):
            each.add(data(n, seed=i) + i)
        same(index, plain, q)
    for gone in ([279, 278], [3, 100, 101, 102], range(0, 250, 3), [277]):
        assert index.remove_ids(gone) == plain.remove_ids(gone)
        same(index, plain, q)
        for each in (index, plain):
            each.add(data(5, seed=99))
        same(index, plain, q)
    for each in (index, plain):
        each.remove_ids(each.ids)
        each.add(data(100, seed=5))
    same(index, plain, q)
    assert index.measure_recall(q) == 1
    if _backend.core is not None:
        assert index._screened.n == 100
        assert index.nbytes - plain.nbytes == 112 * (24 + 8) + 24 * 4 + 16


@pytest.mark.parametrize("mmap", [True, False])
def test_files(tmp_path, mmap):
    index, plain, q = Flat(24, "l2", screen="int8"), Flat(24, "l2"), data(9, seed=1)
    for each in (index, plain):
        each.add(data(300))
    index.save(tmp_path / "index")
    again = load(tmp_path / "index", mmap=mmap)
    assert again.screen == "int8" and "screen='int8'" in repr(again)
    same(again, plain, q)
    for each in (again, plain):
        each.remove_ids(np.arange(200, 220))
        each.add(data(40, seed=3))
    same(again, plain, q)
    again.save(tmp_path / "index")
    same(load(tmp_path / "index"), plain, q)


def test_other_storage_filters_and_kinds():
    torch = pytest.importorskip("torch")
    x, q = data(500), data(20, seed=1)
    for dtype in ("float16", "uint8"):
        rows = np.abs(np.rint(x * 20)) if dtype == "uint8" else x
        index, plain = Flat(24, "l2", dtype=dtype, screen="int8"), Flat(24, "l2", dtype=dtype)
        for each in (index, plain):
            each.add(rows, ids=np.arange(500) * 10)
        got, want = index.search(q, 5), plain.search(q, 5)
        np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5)
        assert (got.ids == want.ids).mean() > 0.99
        same(index, plain, q, filter=lambda ids: ids % 30 == 0)
    got = index.search(torch.from_numpy(q), 5)
    assert isinstance(got.ids, torch.Tensor)


def test_many_neighbours_and_all():
    index, plain, q = Flat(24, "ip", screen="int8"), Flat(24, "ip"), data(3, seed=1)
    for each in (index, plain):
        each.add(data(100))
    for k in (12, 13, 100, 103):
        same(index, plain, q, k)


def test_recall_is_measured(monkeypatch):
    index = Flat(24, "l2", screen="int8")
    index.add(data(400))
    q = data(20, seed=1)
    assert index.measure_recall(q, 10) == 1
    right = Flat._search

    def wrong(self, q, k, keep, exact=False):  # the first two are never found
        if exact:
            return right(self, q, k, keep, exact)
        scores, ids = right(self, q, k + 2, keep)
        return scores[:, 2:], ids[:, 2:]

    monkeypatch.setattr(Flat, "_search", wrong)
    assert index.measure_recall(q, 10) == pytest.approx(0.8)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="screen must be one of 'int8'"):
        Flat(4, screen="int4")
    with pytest.raises(ValueError, match="metric of a screened index"):
        Flat(4, "l1", screen="int8")
    index = Flat(4, screen="int8")
    index.add(np.ones((20, 4), np.float32))
    if _backend.core is not None:
        with pytest.raises(ValueError, match="row 1 of x"):
            index.add(np.array([[1, 1, 1, 1], [1e16, 0, 0, 0]], np.float32))
        assert len(index) == 20
        index.add(np.zeros((3, 4), np.float32))
        assert (index.search(np.ones((1, 4), np.float32), 2).ids == [[0, 1]]).all()


@pytest.mark.skipif(_backend.core is None, reason="no codes without a kernel")
def test_a_file_with_impossible_bounds_is_refused(tmp_path):
    index = Flat(4, screen="int8")
    index.add(np.ones((20, 4), np.float32))
    index._screened._arrays[4][1] = np.nan
    index.save(tmp_path / "index")
    with pytest.raises(ValueError, match="screen_bounds"):
        load(tmp_path / "index")


def test_threads_search_while_another_adds():
    from concurrent.futures import ThreadPoolExecutor

    index = Flat(24, "l2", screen="int8")
    x = data(2000)
    index.add(x[:100])
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(index.search, x[:5], 1) for _ in range(50)]
        for i in range(100, 2000, 100):
            index.add(x[i : i + 100])
        for f in found:
            assert (f.result().ids[:, 0] == np.arange(5)).all()
    assert (index.search(x, 1).ids[:, 0] == np.arange(2000)).all()
    assert lutra.index.Flat is Flat
