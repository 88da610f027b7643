"""IVF and Codes on CUDA: against the same index on the CPU, files, streams, graphs."""

from __future__ import annotations

import numpy as np
import pytest

from lutra import quant
from lutra.index import IVF, Binary, Codes, Flat, Transformed, load
from lutra.index.transforms import PCA

pytestmark = pytest.mark.filterwarnings("ignore:.* (points|vectors) for .* centroids")
D = 32


def vectors(n, seed=0):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((40, D))
    return (centers[rng.integers(0, 40, n)] + 0.4 * rng.standard_normal((n, D))).astype(np.float32)


def recall(found, want):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), want.tolist())])


STORES = {
    "float32": lambda: None,
    "float16": lambda: "float16",
    "bfloat16": lambda: "bfloat16",
    "int8": lambda: "int8",
    "PQ 4": lambda: quant.PQ(D, 16, 4),
    "PQ 8": lambda: quant.PQ(D, 8, 8),
    "PQ 6": lambda: quant.PQ(D, 8, 6),
    "OPQ 8": lambda: quant.OPQ(D, 8, 8),
    "RQ 4": lambda: quant.RQ(D, 8, 4),
    "RaBitQ 1": lambda: quant.RaBitQ(D, 1),
    "RaBitQ 4": lambda: quant.RaBitQ(D, 4),
    "RotatedSQ 4": lambda: quant.RotatedSQ(D, 4),
    "SQ 8": lambda: quant.SQ(D, "8bit"),
    "SQ 6": lambda: quant.SQ(D, "6bit"),
    "SQ 4": lambda: quant.SQ(D, "4bit"),
}
LOW = ("PQ 4", "RQ 4", "RaBitQ 1", "RaBitQ 4", "RotatedSQ 4", "SQ 4")  # integer sums on the CPU, fp32 here


def data(store):
    x, q = vectors(3000), vectors(40, 1)
    return (np.round(x * 10), np.round(q * 10)) if store == "int8" else (x, q)


def skip_bfloat16(gpu, store):
    if store == "bfloat16" and gpu.name == "cupy":
        pytest.skip("CuPy has no bfloat16")


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("store", STORES)
def test_ivf(gpu, store, metric, tmp_path):
    skip_bfloat16(gpu, store)
    if store == "int8" and metric == "cosine":
        pytest.skip("integers are not normalised")
    x, q = data(store)
    options = {"soar": metric == "ip", "residual": metric != "cosine"}
    index = IVF(D, 12, STORES[store](), metric, nprobe=4, **options)
    index.train(gpu.put(x), n_iter=2)
    for i, j in ((0, 1500), (1500, 1503), (1503, 3000)):
        index.add(gpu.put(x[i:j]))
    assert index.device == "cuda:0"
    found = index.search(gpu.put(q), 10)
    assert gpu.owns(found.ids) and gpu.owns(found.scores)
    index.save(tmp_path / "gpu")
    host = load(tmp_path / "gpu")
    want = host.search(q, 10)
    least = 0.8 if store in LOW else 0.98
    assert recall(gpu.get(found.ids), want.ids) > least
    if store not in LOW:
        np.testing.assert_allclose(gpu.get(found.scores), want.scores, rtol=1e-3, atol=1e-3)
    back = load(tmp_path / "gpu", device="cuda")  # of torch, whatever made the file
    again = back.search(gpu.put(q), 10)
    assert gpu.owns(again.ids)
    assert recall(gpu.get(again.ids), gpu.get(found.ids)) > 0.99
    # every list, a filter, and a change
    assert (
        recall(gpu.get(index.search(gpu.put(q), 10, nprobe=99).ids), host.search(q, 10, nprobe=99).ids)
        > least
    )
    even = gpu.get(index.search(gpu.put(q), 10, filter=lambda ids: ids % 2 == 0).ids)
    assert ((even % 2 == 0) | (even == -1)).all()
    gone = np.arange(0, 3000, 7)
    assert index.remove_ids(gpu.put(gone)) == host.remove_ids(gone) == len(gone)
    assert recall(gpu.get(index.search(gpu.put(q), 10).ids), host.search(q, 10).ids) > least
    index.save(tmp_path / "gpu2")
    host.save(tmp_path / "host2")
    assert (tmp_path / "gpu2").read_bytes() == (tmp_path / "host2").read_bytes()
    np.testing.assert_allclose(index.reconstruct([1, 2, 3]), host.reconstruct([1, 2, 3]), atol=1e-5)
    index.to("cpu")
    np.testing.assert_array_equal(index.search(q, 10).ids, host.search(q, 10).ids)


@pytest.mark.parametrize("kept", ["float32", "float16", "bfloat16", "int8"])
def test_refine(gpu, kept):
    skip_bfloat16(gpu, kept)
    x, q = vectors(3000), vectors(40, 1)
    index = IVF(D, 12, quant.PQ(D, 8, 4), refine=kept, nprobe=12, soar=kept == "int8")
    index.train(gpu.put(x), n_iter=2)
    index.add(gpu.put(x), ids=np.arange(3000) * 3)
    exact = Flat(D, "l2")
    exact.add(x, ids=np.arange(3000) * 3)
    want = exact.search(q, 10)
    found = index.search(gpu.put(q), 10, refine_factor=30)
    assert recall(gpu.get(found.ids), want.ids) > (0.8 if kept == "int8" else 0.97)
    np.testing.assert_allclose(gpu.get(index.reconstruct(gpu.put(np.array([3, 6])))), x[1:3], atol=0.05)
    on_host = index.search(q, 10, refine_factor=30)  # queries from the host come back to it
    np.testing.assert_array_equal(on_host.ids, gpu.get(found.ids))


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("store", ["PQ 8", "PQ 6", "PQ 4", "OPQ 8", "RaBitQ 4", "RotatedSQ 4", "SQ 8"])
def test_codes(gpu, store, metric, tmp_path):
    x, q = data(store)
    index = Codes(STORES[store](), metric)
    index.train(gpu.put(x))
    index.add(gpu.put(x))
    found = index.search(gpu.put(q), 10)
    index.save(tmp_path / "x")
    want = load(tmp_path / "x").search(q, 10)
    assert recall(gpu.get(found.ids), want.ids) > (0.8 if store in LOW else 0.97)


def test_one_query_and_a_batch_agree(gpu):
    x, q = vectors(3000), vectors(200, 1)
    for store in ("float32", "SQ 8", "PQ 8"):
        index = IVF(D, 12, STORES[store](), nprobe=3)
        index.train(gpu.put(x), n_iter=2)
        index.add(gpu.put(x))
        batch = index.search(gpu.put(q), 5)
        for i in (0, 7, 199):
            alone = index.search(gpu.put(q[i : i + 1]), 5)
            np.testing.assert_array_equal(gpu.get(alone.ids)[0], gpu.get(batch.ids)[i])
            np.testing.assert_array_equal(gpu.get(alone.scores)[0], gpu.get(batch.scores)[i])


def test_limits_and_errors(gpu):
    x = vectors(3000)
    index = IVF(D, 12, nprobe=3)
    index.train(gpu.put(x), n_iter=1)
    index.add(gpu.put(x))
    with pytest.raises(ValueError, match="k must be at most 2048 on CUDA"):
        index.search(gpu.put(x[:2]), 2049)
    assert gpu.get(index.search(gpu.put(x[:2]), 2048).ids).shape == (2, 2048)
    bad = x[:2].copy()
    bad[1, 3] = np.nan
    assert np.isnan(gpu.get(index.search(gpu.put(bad), 3).scores)[1]).all()
    with pytest.raises(ValueError, match=r"x\[1, 3\] is nan"):
        index.add(gpu.put(bad))
    assert len(index) == 3000
    small = IVF(D, 12, "int8")
    small.train(gpu.put(np.round(x)), n_iter=1)
    with pytest.raises(ValueError, match=r"x\[0, \d+\] is .*int8 rows hold integers"):
        small.add(gpu.put(x))
    with pytest.raises(NotImplementedError, match=r"Binary is for the CPU.*IVF"):
        Binary(D).to("cuda") if Binary._host_only else pytest.skip("Binary lives on a GPU")


def test_transformed(gpu):
    x, q = vectors(3000), vectors(20, 1)
    index = Transformed(PCA(D, 16), IVF(16, 12, nprobe=4))
    index.train(gpu.put(x))
    index.add(gpu.put(x))
    assert index.device == "cuda:0" and gpu.owns(index.search(gpu.put(q), 5).ids)


@pytest.mark.parametrize("store", ["float32", "PQ 8", "PQ 4", "RaBitQ 4", "SQ 8"])
@pytest.mark.parametrize("refine", [None, "float32", "float16"])
def test_searches_in_cuda_graphs(gpu_torch, store, refine):
    torch = gpu_torch.torch
    x = vectors(3000)
    index = IVF(D, 12, STORES[store](), "cosine" if store == "PQ 8" else "l2", refine=refine, nprobe=3)
    index.train(gpu_torch.put(x), n_iter=1)
    index.add(gpu_torch.put(x), ids=np.arange(3000) * 2 + 1)
    static = gpu_torch.put(vectors(30, 1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        index.search(static, 10)  # what an index keeps for its searches is made by the first
        with gpu_torch.no_sync():
            index.search(static, 10)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = index.search(static, 10)
    for seed in (2, 3):
        fresh = gpu_torch.put(vectors(30, seed))
        static.copy_(fresh)
        graph.replay()
        want = index.search(fresh, 10)
        np.testing.assert_array_equal(gpu_torch.get(out.ids), gpu_torch.get(want.ids))


def test_on_a_busy_stream(gpu_torch):
    torch = gpu_torch.torch
    x, q = vectors(3000), gpu_torch.put(vectors(30, 1))
    index = IVF(D, 12, nprobe=3)
    index.train(gpu_torch.put(x), n_iter=1)
    index.add(gpu_torch.put(x))
    want = gpu_torch.get(index.search(q, 10).ids)
    late, side = torch.zeros_like(q), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        found = index.search(late, 10)
        assert not side.query(), "the search waited for its stream"
    side.synchronize()
    np.testing.assert_array_equal(gpu_torch.get(found.ids), want)


def test_cupy_queries_of_a_torch_index(gpu_torch):
    cupy = pytest.importorskip("cupy")
    x, q = vectors(3000), vectors(30, 1)
    for make in (lambda: IVF(D, 12, nprobe=3), lambda: Flat(D, "l2")):
        index = make()
        if isinstance(index, IVF):
            index.train(gpu_torch.put(x), n_iter=1)
        index.add(gpu_torch.put(x))
        want = gpu_torch.get(index.search(gpu_torch.put(q), 10).ids)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            found = index.search(cupy.asarray(q), 10)
        stream.synchronize()
        assert isinstance(found.ids, cupy.ndarray)
        np.testing.assert_array_equal(found.ids.get(), want)
