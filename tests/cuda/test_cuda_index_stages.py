"""MultiVector, Blocks and Funnel on CUDA: against the same index on the CPU, files, waiting, graphs."""

from __future__ import annotations

import numpy as np
import pytest

from lutra import quant
from lutra.index import HNSW, IVF, Blocks, Flat, Funnel, MultiVector, Shards, Transformed, funnel, load, tune
from lutra.index.transforms import PCA

pytestmark = pytest.mark.filterwarnings("ignore:.* (points|vectors) for .* centroids")
D, N, NQ, K = 24, 60, 5, 6
SMALL = {"repetitions": 3, "k_sim": 3, "d_proj": 4}  # encodings of 96 values
EXACT = ("float32", "float16", "bfloat16")


def documents(n=N, seed=0):
    """Ragged documents of small integers, whose products are exact in every format; one without tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, n)
    lengths[n // 2] = 0
    ptr = np.concatenate([[0], np.cumsum(lengths)])
    return rng.integers(-3, 4, (ptr[-1], D)).astype(np.float32), ptr


def queries(n=NQ, length=7, seed=1):
    return np.random.default_rng(seed).integers(-3, 4, (n, length, D)).astype(np.float32)


def skip_bfloat16(gpu, *formats):
    if "bfloat16" in formats and gpu.name == "cupy":
        pytest.skip("CuPy has no bfloat16")


def same(gpu, found, want, places=None):
    """The same scores, and the same ids but for scores that nearly tie."""
    got = gpu.get(found.scores)
    np.testing.assert_allclose(got, want.scores, rtol=1e-4, atol=1e-3)
    assert gpu.owns(found.ids) and gpu.owns(found.scores)
    share = np.mean(
        [len(set(a) & set(b)) / len(b) for a, b in zip(gpu.get(found.ids).tolist(), want.ids.tolist())]
    )
    assert share > 0.95


# ---- MultiVector
def pair(gpu, index="float32", tokens="float32", ids=None, **options):
    """An index on the GPU, and the one of its file on the CPU."""
    x, ptr = documents()
    make = INNER.get(index, lambda: index)
    here = MultiVector(D, make(), tokens, **SMALL, candidates=30, **options)
    given = gpu.put(x), gpu.put(ptr)
    if not here.is_trained:
        here.train(tuple(gpu.put(a) for a in documents(300, seed=7)))
    here.add((given[0][: ptr[20]], given[1][:21]), None if ids is None else ids[:20])
    here.add((given[0][ptr[20] :], gpu.put(ptr[20:] - ptr[20])), None if ids is None else ids[20:])
    return here


INNER = {
    "flat": lambda: Flat(96),
    "ivf": lambda: IVF(96, 4, metric="ip", nprobe=4),
    "transformed": lambda: Transformed(PCA(96, 40), Flat(40)),
}
TOKENS = ("float32", "float16", "bfloat16", "int8", "residual2", "residual8")


@pytest.mark.parametrize("order", ["positions", "mixed"])
@pytest.mark.parametrize(
    ("index", "tokens"),
    [*(("float32", t) for t in TOKENS), ("float16", "float16"), ("bfloat16", "int8")]
    + [("int8", "float16"), ("pq", "float32")]
    + [(name, "float16") for name in INNER],
)
def test_multivector(gpu, index, tokens, order, tmp_path):
    skip_bfloat16(gpu, index, tokens)
    ids = None if order == "positions" else np.random.default_rng(3).choice(999, N, replace=False)
    here = pair(gpu, index, tokens, ids)
    assert here.device.startswith("cuda") and here.index.device == here.device
    here.save(tmp_path / "gpu")
    host = load(tmp_path / "gpu")
    assert host.device == "cpu"
    q = queries()
    want, found = host.search(q, K), here.search(gpu.put(q), K)
    same(gpu, found, want)
    back = here.search(q, K)  # queries from the host come back to it
    np.testing.assert_array_equal(back.ids, gpu.get(found.ids))
    same(gpu, here.search(gpu.put(q), K, generator="all"), host.search(q, K, generator="all"))
    wide = np.arange(999) % 3 > 0
    keep = wide[:N] if ids is None else wide
    for generator in ("encodings", "all"):
        want = host.search(q, K, filter=keep, generator=generator)
        same(gpu, here.search(gpu.put(q), K, filter=keep, generator=generator), want)
        same(gpu, here.search(gpu.put(q), K, filter=gpu.put(keep), generator=generator), want)
    if tokens.startswith("residual"):
        for filter in (None, keep):
            want = host.search(q, K, generator="centroids", filter=filter)
            same(gpu, here.search(gpu.put(q), K, generator="centroids", filter=filter), want)
    # changes, files, and back
    gone = here.ids[::4]
    assert here.remove_ids(gone) == host.remove_ids(gone) == len(gone)
    same(gpu, here.search(gpu.put(q), K), host.search(q, K))
    here.save(tmp_path / "gpu2")
    host.save(tmp_path / "host2")
    assert (tmp_path / "gpu2").read_bytes() == (tmp_path / "host2").read_bytes()
    one = int(here.ids[3])
    np.testing.assert_array_equal(here.reconstruct(one), host.reconstruct(one))
    again = load(tmp_path / "gpu2", device="cuda")
    np.testing.assert_array_equal(
        gpu.get(again.search(gpu.put(q), K).ids), gpu.get(here.search(gpu.put(q), K).ids)
    )
    here.to("cpu")
    np.testing.assert_array_equal(here.search(q, K).ids, host.search(q, K).ids)


@pytest.mark.parametrize("tokens", TOKENS)
def test_what_is_stored(gpu, tokens):
    """Tokens and encodings are those that the CPU stores."""
    skip_bfloat16(gpu, tokens)
    x, ptr = documents()
    here, host = (MultiVector(D, "float32", tokens, **SMALL) for _ in range(2))
    if tokens.startswith("residual"):
        host.train((x, ptr))
        here._tokens.quantizer = host._tokens.quantizer
    here.add((gpu.put(x), gpu.put(ptr)))
    host.add((x, ptr))
    for i in (0, 1, N // 2, N - 1):
        np.testing.assert_allclose(here.reconstruct(i), host.reconstruct(i), atol=1e-5)
        np.testing.assert_allclose(here.index.reconstruct(i), host.index.reconstruct(i), atol=1e-4)


def test_forms_of_queries(gpu):
    here = pair(gpu)
    q, mask = queries(), np.random.default_rng(2).random((NQ, 7)) < 0.7
    ptr = np.arange(NQ + 1) * 7
    want = gpu.get(here.search(gpu.put(q), K).ids)
    flat = gpu.put(q.reshape(-1, D))
    for given in (
        (flat, gpu.put(ptr)), (flat, ptr), [gpu.put(one) for one in q], q, (q.reshape(-1, D), ptr),
    ):  # fmt: skip
        ids = here.search(given, K).ids
        np.testing.assert_array_equal(ids if isinstance(ids, np.ndarray) else gpu.get(ids), want)
    masked = here.search(gpu.put(q), K, mask=gpu.put(mask))
    cut = here.search([gpu.put(one[some]) for one, some in zip(q, mask)], K)
    np.testing.assert_array_equal(gpu.get(masked.ids), gpu.get(cut.ids))
    half = here.search(gpu.put(q, "float16"), K)
    np.testing.assert_array_equal(gpu.get(half.ids), want)
    carved = here.search(gpu.put(q), K)
    here.ball_carving = 1e9
    np.testing.assert_array_equal(gpu.get(here.search(gpu.put(q), K).ids), gpu.get(carved.ids))


@pytest.mark.parametrize("index", ["float32", "float16", "flat", "ivf"])
def test_searches_wait_for_nothing(gpu, index):
    ids = np.random.default_rng(3).choice(999, N, replace=False)
    here = pair(gpu, index, "residual2", ids)
    q = gpu.put(queries())
    tokens, ptr, keep = q.reshape(-1, D), gpu.put(np.arange(NQ + 1) * 7), gpu.put(np.arange(999) % 2 == 0)
    want = gpu.get(here.search(q, K).ids)  # what an index keeps for its searches is made by the first
    with gpu.no_sync():
        found = [
            here.search(q, K),
            here.search((tokens, ptr), K),
            here.search((tokens, ptr), K, generator="all"),
        ]
        filtered = here.search(q, K, filter=keep)
        here.search(q, K, filter=keep, generator="all")
    for one in found[:2]:
        np.testing.assert_array_equal(gpu.get(one.ids), want)
    got = gpu.get(filtered.ids)
    assert ((got % 2 == 0) | (got < 0)).all()


def test_filtered_exact_searches_go_in_parts(gpu, monkeypatch):
    from lutra.index import multivector

    here, q, keep = pair(gpu), gpu.put(queries()), gpu.put(np.arange(N) % 3 == 0)
    want = here.search(q, K, filter=keep, generator="all")
    for most in (1, 2 * N, 3 * N + 1):
        monkeypatch.setattr(multivector, "_LISTS", most)
        found = here.search(q, K, filter=keep, generator="all")
        np.testing.assert_array_equal(gpu.get(found.ids), gpu.get(want.ids))
        np.testing.assert_array_equal(gpu.get(found.scores), gpu.get(want.scores))


def test_offsets_and_nan_of_queries(gpu):
    """Nobody looks at them: the query's scores are NaN, and those of the others what they are."""
    here = pair(gpu)
    q = queries()
    bad = q.copy()
    bad[2, 3, 1] = np.nan
    for given in (bad, (q.reshape(-1, D), np.array([0, 7, 14, 40, 28, 35]))):
        given = tuple(map(gpu.put, given)) if isinstance(given, tuple) else gpu.put(given)
        for generator in ("encodings", "all"):
            want = here.search(gpu.put(q), K, generator=generator)
            scores = gpu.get(here.search(given, K, generator=generator).scores)
            assert np.isnan(scores[2]).any()
            for i in (0, 1, 4):
                np.testing.assert_array_equal(scores[i], gpu.get(want.scores)[i])
    x = np.ones((3, D), np.float32)
    x[1, 4] = np.inf
    with pytest.raises(ValueError, match=r"tokens\[1\] holds NaN or infinities"):
        here.add([gpu.put(x)])
    assert len(here) == N


def test_tune_on_the_gpu(gpu):
    here = pair(gpu)
    x, ptr = documents(seed=9)
    tuned = here.tune((gpu.put(x), gpu.put(ptr)), 0.9, k=3)
    assert tuned.recall >= 0.9 and here.candidates == tuned.parameters["candidates"]


def test_ids_and_truth_that_lie_on_the_gpu(gpu):
    here = pair(gpu)
    want = here.reconstruct([3, 1])
    for got, tokens in zip(here.reconstruct(gpu.put(np.array([3, 1]))), want):
        np.testing.assert_array_equal(got, tokens)
    index, x = IVF(D, 4, nprobe=1), gpu.put(documents()[0])
    index.train(x)
    index.add(x)
    q = gpu.put(queries()[0])
    index.nprobe = 4
    assert tune(index, q, 0.9, 3, truth=index.search(q, 3).ids).recall >= 0.9


def test_shards(gpu):
    """Two shards on one GPU, and one on the host: the exact search is that of one index."""
    here, whole = pair(gpu), pair(gpu)
    shards = Shards(here, ["cuda", "cuda:0", "cpu"])
    assert shards.devices == ["cuda:0", "cuda:0", "cpu"]
    q = gpu.put(queries())
    want = whole.search(q, K, generator="all")
    found = shards.search(q, K, generator="all")
    np.testing.assert_array_equal(gpu.get(found.scores), gpu.get(want.scores))
    np.testing.assert_array_equal(gpu.get(found.ids), gpu.get(want.ids))
    x, ptr = documents(seed=4)
    shards.add((gpu.put(x), gpu.put(ptr)))
    assert shards.ntotal == 2 * N and {shard.ntotal for shard in shards.shards} == {40}
    on_gpu = Shards(shards.shards[0], ["cuda", "cuda"])
    on_gpu.search(q, K)
    with gpu.no_sync():
        on_gpu.search(q, K)


def test_what_stays_on_the_cpu(gpu):
    x, ptr = documents()
    index = MultiVector(D, HNSW(96, metric="ip"), **SMALL)
    index.add((gpu.put(x), gpu.put(ptr)))
    assert index.device == "cpu"
    found = index.search(gpu.put(queries()), K, candidates=20)
    assert gpu.owns(found.ids)
    with pytest.raises(NotImplementedError, match=r"for the CPU.*'float16'.*Flat, IVF"):
        index.to("cuda")


@pytest.mark.parametrize("index", ["float16", "int8", "pq"])
def test_multivector_in_a_cuda_graph(gpu_torch, index):
    torch = gpu_torch.torch
    here = pair(gpu_torch, index, tokens="float16")
    q = gpu_torch.put(queries())
    here.search(q, K)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = here.search(q, K)
    for seed in (5, 6):
        q.copy_(gpu_torch.put(queries(seed=seed)))
        graph.replay()
        np.testing.assert_array_equal(gpu_torch.get(out.ids), gpu_torch.get(here.search(q, K).ids))


# ---- Blocks
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_blocks(gpu, dtype, n, tmp_path):
    skip_bfloat16(gpu, dtype)
    rng = np.random.default_rng(n)
    x, q = (rng.integers(-5, 6, (m, 48)).astype(np.float32) for m in (n, NQ))
    q[:, 12:24] = 0
    here, host = Blocks(48, 12, dtype), Blocks(48, 12, dtype)
    half = n // 2
    for index, put in ((here, gpu.put), (host, lambda a: a)):
        index.add(put(x[:half]))
        index.add(put(x[half:]), np.arange(half, n) * 2)
    assert here.device.startswith("cuda")
    for filter in (None, np.arange(2 * n if n > 1 else n) % 3 == 0):
        want, found = host.search(q, K, filter=filter), here.search(gpu.put(q), K, filter=filter)
        np.testing.assert_array_equal(gpu.get(found.ids), want.ids)
        np.testing.assert_array_equal(gpu.get(found.scores), want.scores)
    rows = host.search_blocks(_rows(q), K)
    np.testing.assert_array_equal(here.search_blocks(_rows(q), K).ids, rows.ids)
    gone = host.ids[::3]
    assert here.remove_ids(gone) == host.remove_ids(gone)
    here.save(tmp_path / "gpu")
    host.save(tmp_path / "host")
    assert (tmp_path / "gpu").read_bytes() == (tmp_path / "host").read_bytes()
    if len(here):
        np.testing.assert_array_equal(here.reconstruct(host.ids), host.reconstruct(host.ids))
        back = load(tmp_path / "host", device="cuda")
        np.testing.assert_array_equal(gpu.get(back.search(gpu.put(q), K).ids), host.search(q, K).ids)
        back.to("cpu")
        np.testing.assert_array_equal(back.search(q, K).ids, host.search(q, K).ids)
        back.add(x[:3])
        assert len(back) == len(host) + 3


def _rows(q, width=12):
    from lutra.address import BlockRows
    from lutra.scan._blocks import dense_rows

    return BlockRows(*dense_rows(q, width))


def test_blocks_refuse(gpu):
    x = np.zeros((3, 48), np.float32)
    x[1, 2] = 1e6
    index = Blocks(48, 12)
    with pytest.raises(ValueError, match=r"x\[1, 2\] is 1000000.0, which is too large for float16"):
        index.add(gpu.put(x))
    assert len(index) == 0


@pytest.mark.parametrize("dtype", ["int8", "pq"])
@pytest.mark.parametrize("n", [1, 255, 512, 600])
def test_blocks_of_codes(gpu, dtype, n, tmp_path):
    rng = np.random.default_rng(n)
    x, q, sample = (rng.standard_normal((m, 48)).astype(np.float32) for m in (n, NQ, 300))
    x[n // 2] = 0
    q[:, 12:24] = 0
    host = Blocks(48, 12, dtype, dsub=4)
    host.train(sample, n_iter=2)
    host.save(tmp_path / "empty")
    here, half = load(tmp_path / "empty", device="cuda"), n // 2
    for index, put in ((here, gpu.put), (host, lambda a: a)):
        index.add(put(x[:half]))
        index.add(put(x[half:]), np.arange(half, n) * 2)
    assert here.device.startswith("cuda") and here.nbytes >= host.nbytes
    check_codes(gpu, here, host, q)
    gone = host.ids[::3]
    assert here.remove_ids(gone) == host.remove_ids(gone)
    if not len(here):
        return
    here.save(tmp_path / "gpu")
    host.save(tmp_path / "host")
    assert (tmp_path / "gpu").read_bytes() == (tmp_path / "host").read_bytes()
    np.testing.assert_allclose(here.reconstruct(host.ids), host.reconstruct(host.ids), rtol=1e-6)
    back = load(tmp_path / "host", device="cuda")
    check_codes(gpu, back, host, q)
    back.add(gpu.put(x[:3]))
    back.to("cpu")
    np.testing.assert_array_equal(back.search(q, K, filter=host.ids).ids, host.search(q, K).ids)
    assert len(back) == len(host) + 3


def check_codes(gpu, here, host, q):
    for filter in (None, np.arange(host.ids.max() + 1) % 4 == 1):
        want = host.search(q, K, filter=filter)
        queries, there = gpu.put(q), gpu.put(filter)
        here.search(queries, K, filter=there)
        with gpu.no_sync():
            found = here.search(queries, K, filter=there)
        for result in (found, here.search(queries, K, filter=filter)):
            np.testing.assert_allclose(gpu.get(result.scores), want.scores, rtol=1e-4, atol=1e-3)
            assert np.mean(gpu.get(result.ids) == want.ids) > 0.95  # scores may nearly tie
    rows = here.search_blocks(_rows(q, host.width), K)
    want = host.search_blocks(_rows(q, host.width), K)
    np.testing.assert_allclose(rows.scores, want.scores, rtol=1e-4, atol=1e-3)


def test_blocks_of_codes_wide(gpu, tmp_path):
    """More sub-spaces than tables fit in shared memory; a row of int8 that no vector load fits."""
    rng = np.random.default_rng(0)
    for dtype, d in (("pq", 1056), ("int8", 2079)):
        x, q = (rng.standard_normal((m, d)).astype(np.float32) for m in (70, NQ))
        host = Blocks(d, 33, dtype, dsub=3)
        host.train(np.tile(x, (4, 1)), n_iter=1)
        host.add(x)
        host.save(tmp_path / dtype)
        here = load(tmp_path / dtype, device="cuda")
        check_codes(gpu, here, host, q)


@pytest.mark.parametrize("dtype", ["int8", "pq"])
def test_blocks_train_where_the_sample_lies(gpu, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 24)).astype(np.float32)
    index = Blocks(24, 12, dtype, dsub=4)
    index.train(gpu.put(x), n_iter=2)
    index.add(gpu.put(x))
    assert index.device.startswith("cuda")
    found = gpu.get(index.search(gpu.put(x), 1).ids)[:, 0]
    assert np.mean(found == np.arange(300)) > 0.7


# ---- Funnel
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_funnel(gpu, metric, storage, tmp_path):
    rng = np.random.default_rng(0)
    x, q = (rng.standard_normal((m, 48)).astype(np.float32) for m in (700, NQ))
    here, host = (Funnel(48, (8, 16, 24), metric=metric, storage=storage) for _ in range(2))
    here.add(gpu.put(x), np.arange(700) * 2)
    host.add(x, np.arange(700) * 2)
    assert here.device.startswith("cuda")
    keep = np.arange(1400) % 4 == 0
    for options in ({}, {"filter": keep}, {"keep": (90, 60, 30)}):
        same(gpu, here.search(gpu.put(q), K, **options), host.search(q, K, **options))
    queries, mask = gpu.put(q), gpu.put(keep)
    here.search(queries, K)
    with gpu.no_sync():
        here.search(queries, K, filter=mask)
    if storage == "float32":
        same(
            gpu,
            funnel(queries, gpu.put(x), K, (8, 16), metric=metric),
            funnel(q, x, K, (8, 16), metric=metric),
        )
        with gpu.no_sync():
            funnel(queries, queries, 2, (8, 16), metric=metric)
    here.save(tmp_path / "gpu")
    host.save(tmp_path / "host")
    if metric != "cosine":  # norms may differ by a bit
        assert (tmp_path / "gpu").read_bytes() == (tmp_path / "host").read_bytes()
    back = load(tmp_path / "host", device="cuda")
    same(gpu, back.search(queries, K), host.search(q, K))
    assert here.remove_ids([2, 4]) == host.remove_ids([2, 4]) == 2
    np.testing.assert_array_equal(here.reconstruct([6, 8]), host.reconstruct([6, 8]))
    np.testing.assert_array_equal(here.to("cpu").search(q, K).ids, host.search(q, K).ids)


def test_funnel_in_a_cuda_graph(gpu_torch):
    torch = gpu_torch.torch
    index = Funnel(48, (8, 16))
    rng = np.random.default_rng(0)
    x, q = (gpu_torch.put(rng.standard_normal((m, 48)).astype(np.float32)) for m in (700, NQ))
    index.add(x)
    index.search(q, K)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = index.search(q, K)
    q.copy_(gpu_torch.put(rng.standard_normal((NQ, 48)).astype(np.float32)))
    graph.replay()
    np.testing.assert_array_equal(gpu_torch.get(out.ids), gpu_torch.get(index.search(q, K).ids))


# ---- residual tokens
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("normalize", [False, True])
def test_residual_quantizer(gpu, bits, normalize):
    x = np.random.default_rng(bits).standard_normal((400, 19)).astype(np.float32)
    if normalize:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    quantizer = quant.ResidualQuantizer(19, bits, 16).train(x)
    want, got = quantizer.encode(x), quantizer.encode(gpu.put(x))
    assert all(gpu.owns(a) for a in got[:4])
    ids = gpu.get(got.centroid_ids)
    equal = ids == want.centroid_ids  # norms and distances may differ by a bit
    assert equal.mean() > 0.98
    assert (gpu.get(got.codes)[equal] == want.codes[equal]).mean() > 0.98
    error = np.square(gpu.get(quantizer.decode(got)) - x).mean()
    assert error < 1.01 * np.square(quantizer.decode(want) - x).mean() + 1e-9
    there = quant.ResidualQuantizer(19, bits, 16).train(gpu.put(x))
    assert np.square(there.decode(there.encode(x)) - x).mean() < 1.1 * error + 1e-9
