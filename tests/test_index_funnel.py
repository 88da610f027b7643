"""lutra.index.Funnel and funnel: prefixes, stage by stage."""

import numpy as np
import pytest

from lutra.index import Flat, Funnel, funnel, load

METRICS = ("cosine", "ip", "l2")


def vectors(n, d=48, seed=0):
    """Values fall from the first to the last, as in Matryoshka embeddings."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) * np.linspace(2, 0.2, d)).astype(np.float32)


def scores_of(q, x, metric):
    q, x = q.astype(np.float64), x.astype(np.float64)
    if metric == "l2":
        return -((q[:, None] - x[None]) ** 2).sum(-1)
    if metric == "cosine":
        q, x = (a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-300) for a in (q, x))
    return q @ x.T


def brute(q, x, k, dims, keep, metric):
    """The definition, one query at a time: sort, cut, go on with a longer prefix."""
    out = []
    for one in q:
        left = np.arange(len(x))
        for width, count in zip((*dims, x.shape[1]), (*keep, k)):
            key = scores_of(one[None, :width], x[left, :width], metric)[0]
            left = np.sort(left[np.argsort(-key, kind="stable")[:count]])
        key = scores_of(one[None], x[left], metric)[0]
        out.append(left[np.argsort(-key, kind="stable")])
    return np.array(out)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("dims", "keep"), [((8,), (20,)), ((5, 17), (40, 12)), ((4, 8, 48), (60, 30))])
def test_stages(simd_level, metric, dims, keep):
    x, q = vectors(300), vectors(9, seed=1)
    x[7] = 0
    ids = np.arange(300) * 2 + 5
    for storage in ("float32", "float16"):
        index = Funnel(48, dims, keep, metric, storage=storage)
        index.add(x, ids)
        got = index.search(q, 7)
        stored = index.reconstruct(ids)
        if storage == "float32":
            want = brute(q, x, 7, [d for d in dims if d < 48], keep, metric)
            np.testing.assert_array_equal(got.ids, ids[want])
            np.testing.assert_array_equal(funnel(q, x, 7, dims, keep, metric).ids, want)
        key = scores_of(q, stored, metric) * (-1 if metric == "l2" else 1)
        np.testing.assert_allclose(got.scores, np.take_along_axis(key, (got.ids - 5) // 2, 1), rtol=1e-4)


def test_wide_funnels_are_exact():
    x, q = vectors(200), vectors(5, seed=1)
    for metric in METRICS:
        exact, index = Flat(48, metric), Funnel(48, (8, 16), metric=metric)
        for i in (exact, index):
            i.add(x)
        np.testing.assert_array_equal(index.search(q, 10, keep=(200, 200)).ids, exact.search(q, 10).ids)
        np.testing.assert_array_equal(index.search(q, 300).ids, exact.search(q, 300).ids)
    assert index.search(q, 10).ids.shape == (5, 10)  # keep by k: 160, 40


def test_parts_of_a_batch_do_not_matter(monkeypatch):
    from lutra.index import _compact

    x, q = vectors(400), vectors(33, seed=1)
    index = Funnel(48, (8, 16), (50, 20))
    index.add(x)
    whole = index.search(q, 5)
    monkeypatch.setattr(_compact, "_PART", 1)
    for got in (index.search(q, 5), index.search(q[:1], 5)):
        np.testing.assert_array_equal(got.ids, whole.ids[: len(got.ids)])
        np.testing.assert_array_equal(got.scores, whole.scores[: len(got.ids)])


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_files_and_changes(tmp_path, storage, mmap):
    x = vectors(120)
    index = Funnel(48, [6, 12], [30, 20], "ip", storage=storage)
    index.add(x, np.arange(120) * 3)
    index.keep = (40, 10)
    index.save(tmp_path / "index")
    again = load(tmp_path / "index", mmap=mmap)
    assert repr(again) == repr(index) and again.keep == (40, 10) and again.dims == (6, 12)
    np.testing.assert_array_equal(again.search(x[:9], 4).ids, index.search(x[:9], 4).ids)
    assert again.remove_ids([0, 3, 500]) == 2
    again.add(x[:2])
    assert again.ids[-2:].tolist() == [358, 359] and len(again) == 120
    assert 359 in again.search(x[1:2], 3).ids
    assert again.nbytes == 120 * (24 + 48 * (4 if storage == "float32" else 2) + 8)


def test_torch():
    torch = pytest.importorskip("torch")
    x = torch.randn(50, 32)
    index = Funnel(32, (8,))
    index.add(x)
    got = index.search(x[:3], 1)
    assert got.ids.flatten().tolist() == [0, 1, 2]
    got = funnel(x[:3], x.half(), 1, (8,))
    assert isinstance(got.ids, torch.Tensor) and got.ids.flatten().tolist() == [0, 1, 2]


def test_bad_input():
    for dims in ((), (48,), (8, 8), (16, 8), (64,)):
        with pytest.raises(ValueError, match="dims must be increasing prefixes below d = 48"):
            Funnel(48, dims)
    with pytest.raises(TypeError, match="dims must be a list of integers, got 8"):
        Funnel(48, 8)
    for keep in ((10,), (10, 20), (30, 20, 10)):
        with pytest.raises(ValueError, match="keep must be 2 numbers that do not increase"):
            Funnel(48, (8, 16), keep)
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        Funnel(48, (8,), (0,))
    with pytest.raises(ValueError, match="storage must be 'float32' or 'float16'"):
        Funnel(48, (8,), storage="int4")
    index = Funnel(48, (8,))
    with pytest.raises(ValueError, match="this Funnel is empty"):
        index.search(vectors(1))
    index.add(vectors(3))
    with pytest.raises(ValueError, match="q has 47 columns"):
        index.search(vectors(1, 47))
    with pytest.raises(ValueError, match="vectors has 47 columns, queries has 48"):
        funnel(vectors(1), vectors(2, 47), dims=(8,))
    half = Funnel(48, (8,), storage="float16")
    with pytest.raises(ValueError, match=r"x\[0\] holds a value beyond float16"):
        half.add(np.full((1, 48), 1e6, np.float32))


def test_filter():
    x = vectors(90)
    index = Funnel(48, (8, 16), (20, 10))
    index.add(x)
    found = index.search(x[:4], 3, filter=[1, 2, 50]).ids
    assert (np.sort(found, axis=1) == [1, 2, 50]).all() and found[1, 0] == 1
