"""lutra.index.Flat: storage types, all metrics, filters, range search."""

import numpy as np
import pytest

import lutra
from lutra.index import Flat, load
from lutra.reference import scan as reference

METRICS = ("ip", "l2", "cosine", "l1", "linf", "poincare")
DTYPES = ("float32", "float16", "bfloat16", "int8", "uint8")


def data(n, d, dtype="float32", metric="l2", seed=0):
    """Vectors that the type holds exactly, as float32."""
    rng = np.random.default_rng(seed)
    if dtype in ("int8", "uint8"):
        return rng.integers(0, 100, (n, d)).astype(np.float32)
    x = rng.standard_normal((n, d)).astype(np.float16)
    if metric == "poincare":
        x = (x / np.float16(4 * np.sqrt(d))).astype(np.float16)
    # eight bits of mantissa: bfloat16 holds them
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def filled(d, metric, dtype, x, ids):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    index = Flat(d, metric, dtype=dtype)
    index.add(x[:50], ids[:50])
    index.add(x[50:], ids[50:])
    return index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_storage_search_and_files(metric, dtype, tmp_path):
    if metric == "poincare" and dtype in ("int8", "uint8"):
        pytest.skip("nothing but zero lies in the unit ball")
    d = 19
    x, q = data(210, d, dtype, metric), data(20, d, dtype, metric, 1)
    ids = np.random.default_rng(2).choice(10**10, 210, replace=False)
    index = filled(d, metric, dtype, x, ids)
    assert index.nbytes == 210 * d * {"float32": 4, "float16": 2, "bfloat16": 2}.get(dtype, 1) + 210 * 8
    np.testing.assert_array_equal(index.reconstruct(ids[::7]), x[::7])
    index.save(tmp_path / "index")
    again = load(tmp_path / "index")
    assert again.dtype == dtype and again.metric == metric
    for one in (index, again):
        for k in (1, 12):
            scores, found = one.search(q, k)
            want = lutra.scan.knn(q, x, k, metric)
            np.testing.assert_array_equal(scores, want.scores)
            np.testing.assert_array_equal(found, ids[want.ids])
    index.remove_ids(ids[:100])
    np.testing.assert_array_equal(index.search(q, 3).scores, lutra.scan.knn(q, x[100:], 3, metric).scores)


@pytest.mark.parametrize("metric", METRICS)
def test_filters_speak_of_ids(metric):
    x, q = data(300, 8, metric=metric), data(9, 8, metric=metric, seed=1)
    ids = np.random.default_rng(3).permutation(5000)[:300]
    index = filled(8, metric, "float32", x, ids)
    passing = np.sort(ids)[::3]
    mask = np.zeros(5000, bool)
    mask[passing] = True
    rows = np.flatnonzero(np.isin(ids, passing))
    want = lutra.scan.knn(q, x[rows], 7, metric)
    for filter in (passing, passing.tolist(), mask, np.packbits(mask, bitorder="little"), lambda i: mask[i]):
        scores, found = index.search(q, 7, filter=filter)
        np.testing.assert_array_equal(found, ids[rows[want.ids]])
        np.testing.assert_array_equal(scores, want.scores)
    none = index.search(q, 2, filter=[])
    assert (none.ids == -1).all() and np.isinf(none.scores).all()


@pytest.mark.parametrize("metric", METRICS)
def test_range_search(metric):
    x, q = data(300, 8, metric=metric), data(9, 8, metric=metric, seed=1)
    ids = np.random.default_rng(3).permutation(5000)[:300]
    index = filled(8, metric, "float16", x, ids)
    every = reference.pairwise(q.astype(np.float64), x.astype(np.float64), metric)
    radius = float(np.quantile(every, 0.2 if metric in reference.DISTANCES else 0.8))
    offsets, scores, found = index.range_search(q, radius)
    inside = every <= radius if metric in reference.DISTANCES else every >= radius
    np.testing.assert_array_equal(np.diff(offsets), inside.sum(1))
    for i in range(9):
        here = slice(offsets[i], offsets[i + 1])
        assert set(found[here]) == set(ids[inside[i]])
        assert (np.diff(scores[here]) * (1 if metric in reference.DISTANCES else -1) >= 0).all()
    some = index.range_search(q, radius, filter=lambda i: i % 2 == 0)
    np.testing.assert_array_equal(some.ids, found[found % 2 == 0])


def test_range_search_of_torch_tensors():
    torch = pytest.importorskip("torch")
    x = data(40, 6)
    index = Flat(6, "l2")
    index.add(torch.from_numpy(x))
    found = index.range_search(torch.from_numpy(x[:3]), 5.0)
    assert all(isinstance(a, torch.Tensor) for a in found)
    np.testing.assert_array_equal(found.ids.numpy(), index.range_search(x[:3], 5.0).ids)


def test_what_a_type_cannot_hold_is_refused():
    x = np.zeros((5, 3), np.float32)
    for dtype, value, message in [
        ("int8", 0.5, r"x\[3, 2\] is 0.5; int8 holds whole numbers from -128 to 127"),
        ("int8", 128, "is 128.0; int8 holds"),
        ("uint8", -1, "is -1.0; uint8 holds whole numbers from 0 to 255"),
        ("float16", 1e5, r"x\[3, 2\] is 100000.0; which is too large for float16"),
    ]:
        index = Flat(3, dtype=dtype)
        index.add(x)
        bad = x.copy()
        bad[3, 2] = value
        with pytest.raises(ValueError, match=message):
            index.add(bad)
        assert len(index) == 5 and index.search(x, 9).ids.max() == 4
    with pytest.raises(
        ValueError, match="dtype must be one of 'float32', 'float16', 'bfloat16', 'int8', 'uint8'"
    ):
        Flat(3, dtype="float64")


def test_poincare_refuses_what_lies_outside_the_ball():
    index = Flat(2, "poincare")
    inside = np.array([[0.5, 0.5], [0, 0]], np.float32)
    index.add(inside)
    with pytest.raises(ValueError, match=r"x\[1\] has norm 1; for 'poincare' norms must be < 1"):
        index.add(np.array([[0, 0], [0, 1]], np.float32))
    for search in (lambda q: index.search(q, 1), lambda q: index.range_search(q, 1.0)):
        with pytest.raises(ValueError, match=r"q\[0\] has norm 5; for 'poincare'"):
            search(np.array([[3, 4]], np.float32))
    assert len(index) == 2
    np.testing.assert_allclose(
        index.search(inside[1:], 2).scores[0], [0, 2 * np.arctanh(0.5**0.5)], rtol=1e-6
    )


def test_bad_range_searches():
    index = Flat(2)
    with pytest.raises(ValueError, match="this Flat is empty"):
        index.range_search(np.zeros((1, 2), np.float32), 1.0)
    index.add(np.zeros((1, 2), np.float32))
    with pytest.raises(TypeError, match="radius must be a number"):
        index.range_search(np.zeros((1, 2), np.float32), "far")
    with pytest.raises(ValueError, match="q has 3 columns; the index has d = 2"):
        index.range_search(np.zeros((1, 3), np.float32), 1.0)
