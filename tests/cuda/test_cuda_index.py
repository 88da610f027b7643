"""IVF and Codes on CUDA: against the same index on the CPU, files, streams, graphs."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import lutra
from lutra import quant
from lutra.index import HNSW, IVF, PQ, Binary, Codes, Flat, Shards, Transformed, load
from lutra.index.transforms import PCA, Chain, Normalize, RandomRotation, Truncate, Whitening

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


@pytest.mark.parametrize("refine", [None, "float32", "int8"])
@pytest.mark.parametrize("store", ["float32", "SQ 8"])
@pytest.mark.parametrize("soar", [False, True])
def test_more_results_than_vectors(gpu, soar, store, refine, tmp_path):
    """Results are padded to k as on the CPU, and every vector is among them, also where codes stand twice."""
    x, q = vectors(41), vectors(3, 1)
    index = IVF(D, 4, STORES[store](), "l2", nprobe=4, soar=soar, refine=refine)
    index.train(gpu.put(x), n_iter=2)
    index.add(gpu.put(x))
    index.save(tmp_path / "x")
    host = load(tmp_path / "x")
    for k in (10, 41, 45, 82, 83, 200):
        for options in ({}, {"filter": lambda ids: ids % 2 == 0}, {"nprobe": 1}):
            found, want = index.search(gpu.put(q), k, **options), host.search(q, k, **options)
            ids, scores = gpu.get(found.ids), gpu.get(found.scores)
            assert ids.shape == scores.shape == want.ids.shape == (3, k)
            np.testing.assert_array_equal(ids < 0, want.ids < 0)
            assert np.isposinf(scores[ids < 0]).all() and np.isposinf(want.scores[ids < 0]).all()
            if k >= 41:
                np.testing.assert_array_equal(np.sort(ids, 1), np.sort(want.ids, 1))


def test_candidates_of_a_refined_search_are_selected_by_the_scan(gpu, monkeypatch):
    """k * refine has a limit, so that no search sorts all rows or leaves the quick scan for it."""
    x, q = vectors(3000), vectors(3, 1)
    ivf = IVF(D, 12, quant.PQ(D, 8, 4), refine="float32", nprobe=12)
    codes = Codes(quant.SQ(D, "8bit"), refine="float16")
    pq = PQ(D, 8, 4, refine="float32")
    for index, limit in ((ivf, 2048), (codes, 2048), (pq, 1820)):
        index.train(gpu.put(x), **({} if index is codes else {"n_iter": 1}))
        index.add(gpu.put(x))
        wide = {"refine": 10_000} if index is pq else {"refine_factor": 10_000}
        index.search(gpu.put(q), 3)  # there is a searcher now
        scan, wanted = (index._scan if index is pq else index._searcher.scan.scan), []
        place = 2 if index is pq else 3

        def counted(*a, scan=scan, wanted=wanted, place=place):
            wanted.append(a[place])
            return scan(*a)

        monkeypatch.setattr(*((index, "_scan") if index is pq else (index._searcher.scan, "scan")), counted)
        found = index.search(gpu.put(q), 3, **wide)
        index.search(gpu.put(q), 2500, **wide)
        assert wanted == [limit, 2500]
        exact = Flat(D, "l2")
        exact.add(x)
        assert recall(gpu.get(found.ids), exact.search(q, 3).ids) > 0.9


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


def test_all_vectors_are_removed(gpu):
    index, x = IVF(D, 4, nprobe=4), vectors(300)
    index.train(gpu.put(x), n_iter=2)
    index.add(gpu.put(x))
    assert index.remove_ids(np.arange(300)) == 300 and len(index) == 0
    index.add(gpu.put(x[:5]), [5, 6, 7, 8, 9])
    np.testing.assert_array_equal(gpu.get(index.search(gpu.put(x[:5]), 1).ids)[:, 0], [5, 6, 7, 8, 9])


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
    for k in (2048, 2049, 4000):  # sorted from 2049 on
        found = index.search(gpu.put(x[:2]), k)
        assert gpu.get(found.ids).shape == (2, k)
        best = index.search(gpu.put(x[:2]), 20)
        np.testing.assert_array_equal(gpu.get(found.ids)[:, :20], gpu.get(best.ids))
        ids = gpu.get(found.ids)
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() > 200 for row in ids)
        assert (np.diff(gpu.get(found.scores)[ids >= 0].reshape(-1)[:200]) >= 0).all()
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
    with pytest.raises(NotImplementedError, match=r"HNSW is for the CPU.*IVF"):
        HNSW(D).to("cuda")


def test_transforms(gpu):
    x = vectors(500)
    chain = Chain([PCA(D, 16), Normalize(16)])
    for t in (PCA(D, 8), Whitening(D), RandomRotation(D, 40), Normalize(D), Truncate(D, 5), chain):
        t.train(x)
        np.testing.assert_allclose(gpu.get(t.apply(gpu.put(x))), t.apply(x), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(copy.deepcopy(t).apply(x), t.apply(x), rtol=1e-6, atol=1e-7)
    bad = x.copy()
    bad[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"x\[3, 1\] is inf"):
        chain.apply(gpu.put(bad))


def test_transformed(gpu):
    x, q = vectors(3000), vectors(20, 1)
    index = Transformed(PCA(D, 16), IVF(16, 12, nprobe=4))
    index.train(gpu.put(x))
    index.add(gpu.put(x))
    found = index.search(gpu.put(q), 5)
    assert index.device == "cuda:0" and gpu.owns(found.ids)
    queries = gpu.put(q)
    with gpu.no_sync():
        index.search(queries, 5)
    np.testing.assert_array_equal(index.to("cpu").search(q, 5).ids, gpu.get(found.ids))


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


@pytest.mark.parametrize("kind", ["flat", "ivf", "pq"])
def test_shards(gpu, kind, tmp_path):
    """Two shards on one GPU, and one on the host."""
    x, q = vectors(3000), vectors(20, 1)
    index = {"flat": lambda: Flat(D, "ip"), "ivf": lambda: IVF(D, 12, nprobe=4), "pq": lambda: PQ(D, 8)}[
        kind
    ]()
    index.train(x)
    index.add(x)
    want = index.search(q, 10)
    shards = Shards(index, ["cuda", "cuda:0", "cpu"])
    assert shards.devices == ["cuda:0", "cuda:0", "cpu"]
    for queries in (q, gpu.put(q)):
        found = shards.search(queries, 10)
        assert type(found.ids) is type(queries)
        ids = found.ids if isinstance(found.ids, np.ndarray) else gpu.get(found.ids)
        assert recall(ids, want.ids) > 0.99
    shards.save(tmp_path / "s")
    back = Shards.load(tmp_path / "s", ["cuda"])
    assert back.devices == ["cuda:0"] * 3
    assert recall(gpu.get(back.search(gpu.put(q), 10).ids), want.ids) > 0.99
    assert back.remove_ids(np.arange(0, 3000, 2)) == 1500
    back.add(gpu.put(x[:300]))
    assert back.ntotal == 1800


def test_shards_wait_for_nothing(gpu_torch):
    torch = gpu_torch.torch
    index = Flat(D, "l2")
    index.add(vectors(3000))
    shards = Shards(index, ["cuda", "cuda"])
    q = gpu_torch.put(vectors(20, 1))
    want = gpu_torch.get(shards.search(q, 10).ids)
    with gpu_torch.no_sync():
        found = shards.search(q, 10)
    np.testing.assert_array_equal(gpu_torch.get(found.ids), want)
    if torch.cuda.device_count() > 1:
        two = Shards(shards.shards[0], ["cuda:0", "cuda:1"])
        assert two.search(q, 10).ids.device == q.device


def test_two_devices(gpu_torch):
    torch = gpu_torch.torch
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, q = vectors(3000), vectors(20, 1)
    index = IVF(D, 12, nprobe=4)
    index.train(torch.from_numpy(x).to("cuda:1"), n_iter=1)
    index.add(x)
    assert index.device == "cuda:1"
    want = index.search(q, 10)
    for device in ("cuda:0", "cuda:1"):
        found = index.search(torch.from_numpy(q).to(device), 10)
        assert str(found.ids.device) == device
        np.testing.assert_array_equal(found.ids.cpu().numpy(), want.ids)
    np.testing.assert_array_equal(index.to("cuda:0").search(q, 10).ids, want.ids)


@pytest.mark.parametrize("metric", ["hamming", "jaccard"])
@pytest.mark.parametrize("refine", [None, "float32", "float16", "int8"])
def test_binary(gpu, metric, refine):
    for d in (D, 29):
        x, q = vectors(2000)[:, :d].copy(), vectors(20, 1)[:, :d].copy()
        index, host = Binary(d, metric, refine=refine), Binary(d, metric, refine=refine)
        index.add(gpu.put(x))
        host.add(x)
        assert index.device == "cuda:0"
        keep = np.arange(2000) % 3 == 0
        for rescore in (None, "bits", "vectors", "both") if refine else (None, "bits"):
            for filter in (None, keep):
                found = index.search(gpu.put(q), 10, rescore=rescore, filter=filter)
                want = host.search(q, 10, rescore=rescore, filter=filter)
                assert recall(gpu.get(found.ids), want.ids) > 0.97
        packed = np.packbits(q > 0, axis=1, bitorder="little")
        np.testing.assert_array_equal(
            gpu.get(index.search(gpu.put(packed), 5).ids), host.search(packed, 5).ids
        )
        np.testing.assert_allclose(index.reconstruct([3, 5]), host.reconstruct([3, 5]), atol=1e-6)
        assert index.remove_ids([1, 2, 9]) == host.remove_ids([1, 2, 9])
        index.to("cpu")
        np.testing.assert_array_equal(index.search(q, 5).ids, host.search(q, 5).ids)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_filtered_pq(gpu, metric):
    x, q = vectors(3000), vectors(20, 1)
    index = PQ(D, 8, 6, metric)
    index.train(gpu.put(x))
    index.add(gpu.put(x))
    keep = np.arange(3000) % 5 == 0
    found = gpu.get(index.search(gpu.put(q), 10, filter=keep).ids)
    assert (found % 5 == 0).all()
    assert recall(found, index.to("cpu").search(q, 10, filter=keep).ids) > 0.98


@pytest.mark.parametrize(
    "make", [lambda: quant.PQ(D, 8, 6), lambda: quant.OPQ(D, 8, 6), lambda: quant.RQ(D, 4, 5)]
)
def test_quantizers_train_on_the_gpu(gpu, make):
    x = vectors(3000)
    errors = [
        np.square(one.decode(one.encode(x)) - x).mean() for one in (make().train(gpu.put(x)), make().train(x))
    ]
    assert errors[0] < errors[1] * 1.05


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine", "l1", "linf"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8"])
def test_flat(gpu, dtype, metric, tmp_path):
    skip_bfloat16(gpu, dtype)
    rng = np.random.default_rng(0)
    x, q = (rng.integers(0, 9, s).astype(np.float32) for s in ((900, D), (12, D)))
    index, host = Flat(D, metric, dtype=dtype), Flat(D, metric, dtype=dtype)
    index.add(gpu.put(x))
    host.add(x)
    assert index.device == "cuda:0"
    keep = np.arange(900) % 3 == 0
    for filter in (None, keep):
        found, want = index.search(gpu.put(q), 10, filter=filter), host.search(q, 10, filter=filter)
        np.testing.assert_allclose(gpu.get(found.scores), want.scores, rtol=1e-5)
        if metric != "cosine":
            np.testing.assert_array_equal(gpu.get(found.ids), want.ids)
    radius = float(np.median(want.scores))
    if metric in ("ip", "l2"):
        found, want = (i.range_search(v, radius) for i, v in ((index, gpu.put(q)), (host, q)))
        np.testing.assert_array_equal(gpu.get(found.offsets), want.offsets)
        np.testing.assert_array_equal(gpu.get(found.ids), want.ids)
    index.save(tmp_path / "gpu")
    host.save(tmp_path / "host")
    assert (tmp_path / "gpu").read_bytes() == (tmp_path / "host").read_bytes()


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_screened_flat(gpu, metric, tmp_path):
    """The codes follow the vectors: additions, removals, moves, files."""
    lutra._backend.cuda.screen_paths(1, 0)
    x, q = vectors(1500), vectors(9, 1)
    index, plain = (Flat(D, metric, screen=screen) for screen in ("int8", None))

    def same(**options):
        got, want = (i.search(gpu.put(q), 7, **options) for i in (index, plain))
        np.testing.assert_array_equal(gpu.get(got.ids), gpu.get(want.ids))
        np.testing.assert_array_equal(gpu.get(got.scores), gpu.get(want.scores))

    try:
        for part in (x[:3], x[3:1000], x[1000:1017]):
            for each in (index, plain):
                each.add(gpu.put(part))
            same()
        assert index.device == "cuda:0" and index._screened.home.kind.cuda and index._screened.n == 1017
        same(filter=np.arange(1017) % 3 == 0)
        for gone in ([1016, 1015], np.arange(0, 1000, 5)):
            assert index.remove_ids(gone) == plain.remove_ids(gone)
            same()
            for each in (index, plain):
                each.add(gpu.put(x[1017:1100]))
            same()
        if metric != "cosine":  # which codes unit vectors
            with pytest.raises(ValueError, match="row 1 of x"):
                index.add(gpu.put(np.stack([x[0], x[1] * np.float32(1e17)])))
        assert len(index) == len(plain)
        same()
        assert index.measure_recall(gpu.put(q)) == 1
        index.save(tmp_path / "index")
        back = load(tmp_path / "index")
        assert back._screened.n == len(index)
        np.testing.assert_array_equal(back.search(q, 5).ids, gpu.get(index.search(gpu.put(q), 5).ids))
        index.to("cpu").to("cuda")
        assert index._screened.home.kind.cuda
        index.to("cpu")
        np.testing.assert_array_equal(index.search(q, 5).ids, back.search(q, 5).ids)
    finally:
        lutra._backend.cuda.screen_paths(0, 0)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["PQ", "OPQ", "RQ"])
def test_codes_are_made_where_the_vectors_are(gpu, kind, bits, monkeypatch):
    """The arrays of an index that vectors were added to on the GPU are those of the CPU, up to near ties."""
    x = vectors(700)
    quantizer = getattr(quant, kind)(D, 4 if kind == "RQ" else 8, bits)
    for metric, residual in (("l2", True), ("l2", False), ("ip", True)):
        index = IVF(D, 3, copy.deepcopy(quantizer), metric, residual=residual, nprobe=3)
        index.train(x, n_iter=1)
        moved = copy.deepcopy(index).to("cuda")
        index.add(x)
        with monkeypatch.context() as m:
            m.setattr("lutra.index._codec.Codec.encode", None)  # the host's code is not called
            moved.add(gpu.put(x))
        want, found = index.search(x[:9], 30), moved.search(gpu.put(x[:9]), 30)
        same = [len(set(a) & set(b)) for a, b in zip(gpu.get(found.ids).tolist(), want.ids.tolist())]
        assert np.mean(same) > (25 if bits == 4 else 28)  # the CPU rounds the tables of 4-bit codes
        median = np.median(gpu.get(found.scores), 1)
        np.testing.assert_allclose(median, np.median(want.scores, 1), rtol=0.08 if bits == 4 else 0.01)
