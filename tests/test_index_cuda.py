"""Indexes on a GPU: torch and CuPy arrays, moving, saving; against the index on the CPU."""

import numpy as np
import pytest

from lutra.index import PQ, Flat, kmeans, load, refine

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:.* points for .* centroids")]

METRICS = ("ip", "l2", "cosine")


@pytest.fixture(params=["torch", "cupy"])
def put(request):
    """Copies a NumPy array to the GPU, in one library or the other."""
    library = pytest.importorskip(request.param)
    if request.param == "torch":
        return lambda a: library.from_numpy(np.ascontiguousarray(a)).cuda()
    return library.asarray


def host(a):
    return a.cpu().numpy() if hasattr(a, "cpu") else a.get()


def vectors(n, d, seed=0):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((40, d))
    return (centers[rng.integers(0, 40, n)] + 0.3 * rng.standard_normal((n, d))).astype(np.float32)


def integers(n, d, seed=0):
    """Their scores are exact, and full of ties."""
    return np.random.default_rng(seed).integers(-3, 4, (n, d)).astype(np.float32)


def recall(found, want):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), want.tolist())])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_flat(put, metric):
    x, q = integers(700, 24), integers(9, 24, 1)
    ids = np.random.default_rng(2).permutation(5000)[:700]
    index, want = Flat(24, metric), Flat(24, metric)
    index.add(put(x[:400]), ids[:400])
    index.add(x[400:].astype(np.float64), ids[400:])  # an addition from the host moves to the GPU
    want.add(x, ids)
    assert index.device == "cuda:0"
    for _ in range(2):
        assert type(index.search(put(q), 3).ids) is type(put(q))
        for k in (1, 10, 900):
            on_gpu, on_host = index.search(put(q), k), index.search(q, k)
            truth = want.search(q, k)
            np.testing.assert_array_equal(host(on_gpu.ids), truth.ids)
            np.testing.assert_array_equal(host(on_gpu.scores), truth.scores)
            np.testing.assert_array_equal(on_host.ids, truth.ids)
        np.testing.assert_array_equal(index.reconstruct(want.ids), want.reconstruct(want.ids))
        assert type(index.reconstruct(put(want.ids))) is type(put(x))
        assert index.remove_ids(put(ids[::3])) == want.remove_ids(ids[::3])
    index.add(put(x[:5]))
    want.add(x[:5])
    np.testing.assert_array_equal(index.ids, want.ids)


def test_cosine_and_half_precision(put):
    x, q = vectors(500, 32), vectors(7, 32, 1)
    index, want = Flat(32, "cosine"), Flat(32, "cosine")
    index.add(put(x.astype(np.float16)))
    want.add(x.astype(np.float16))
    np.testing.assert_allclose(host(index.search(put(q), 5).scores), want.search(q, 5).scores, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kept", [None, "float16", "float32"])
def test_pq(put, metric, kept):
    x, q = vectors(3000, 32), vectors(50, 32, 1)
    index = PQ(32, 8, 6, metric, refine=kept)
    index.train(put(x))
    index.add(put(x))
    assert index.device == "cuda:0"
    exact = Flat(32, metric)
    exact.add(x)
    truth = exact.search(q, 10).ids
    on_cpu = PQ(32, 8, 6, metric, refine=kept)
    on_cpu.train(x)
    on_cpu.add(x)
    found = host(index.search(put(q), 10).ids)
    assert recall(found, truth) > recall(on_cpu.search(q, 10).ids, truth) - 0.05
    error = np.square(host(index.decode(index.encode(put(x)))) - on_cpu.decode(on_cpu.encode(x))).mean()
    assert error < np.square(x).mean()
    index.to("cpu")
    assert index.device == "cpu"
    assert recall(index.search(q, 10).ids, found) > 0.99
    index.to("cuda")
    np.testing.assert_array_equal(host(index.search(put(q), 10).ids), found)


def test_training_is_deterministic(put):
    x = put(vectors(5000, 16))
    a, b = kmeans(x, 64, seed=3), kmeans(x, 64, seed=3)
    np.testing.assert_array_equal(host(a.centroids), host(b.centroids))
    want = kmeans(vectors(5000, 16), 64, seed=3)
    assert a.objective[-1] == pytest.approx(want.objective[-1], rel=0.02)


@pytest.mark.parametrize("kind", ["flat", "pq"])
def test_files(put, tmp_path, kind):
    x, q = vectors(2000, 16), vectors(5, 16, 1)
    index = Flat(16, "l2") if kind == "flat" else PQ(16, 4, 5, refine="float16")
    if kind == "pq":
        index.train(put(x))
    index.add(put(x), ids=np.arange(2000) * 2)
    index.save(tmp_path / "x")
    found = host(index.search(put(q), 10).ids)
    on_cpu = load(tmp_path / "x")
    assert on_cpu.device == "cpu" and recall(on_cpu.search(q, 10).ids, found) > 0.95
    on_gpu = load(tmp_path / "x", device="cuda")
    assert on_gpu.device == "cuda:0"
    np.testing.assert_array_equal(host(on_gpu.search(put(q), 10).ids), found)


def test_refine(put):
    x, q = vectors(900, 16).astype(np.float16), vectors(6, 16, 1)
    candidates = np.random.default_rng(0).integers(-1, 900, (6, 40))
    want = refine(q, x, candidates, 10, "l2")
    got = refine(put(q), put(x), put(candidates), 10, "l2")
    np.testing.assert_array_equal(host(got.ids), want.ids)
    np.testing.assert_allclose(host(got.scores), want.scores, rtol=1e-4, atol=1e-4)


def test_bad_values_are_found_on_the_gpu_too(put):
    x = vectors(100, 8)
    x[42, 3] = np.nan
    index = Flat(8)
    with pytest.raises(ValueError, match=r"x\[42, 3\] is nan"):
        index.add(put(x))
    assert len(index) == 0
    index.add(put(vectors(100, 8)))
    bad = vectors(2, 8)
    bad[1, 0] = np.nan
    assert np.isnan(
        host(index.search(put(bad), 3).scores)[1]
    ).all()  # no wait for the GPU to look into queries
    with pytest.raises(ValueError, match=r"q\[1, 0\] is nan"):
        index.search(bad, 3)


def test_large_k(put):
    index = PQ(8, 2, 4, refine="float32")
    index.train(put(vectors(700, 8)))
    index.add(put(vectors(5000, 8)))
    assert index.search(put(vectors(2, 8)), 1000, refine=4).ids.shape == (2, 1000)
    found = index.search(put(vectors(2, 8)), 2049).ids
    assert found.shape == (2, 2049) and len(set(host(found)[0].tolist())) == 2049
