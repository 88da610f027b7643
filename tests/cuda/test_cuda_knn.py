"""Exact search on CUDA: storage types, the screen on tensor cores, filters."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from gpu_arrays import close, rounded, same_bits

import lutra
from lutra.reference import scan as reference

METRICS = ("ip", "l2", "cosine", "l1", "linf")
STORAGE = ("float32", "float16", "bfloat16", "int8", "uint8")


@pytest.fixture(params=["sm90", "plain"])
def kernels(request):
    """With and without the kernels for Hopper; the screen also for small collections."""
    lutra._backend.cuda.knn_paths(request.param == "sm90", 1)
    yield request.param
    lutra._backend.cuda.knn_paths(True, 0)


def values(rng, dtype, *shape):
    """float32 values that the type holds."""
    if dtype == "int8":
        return rng.integers(-128, 128, shape).astype(np.float32)
    if dtype == "uint8":
        return rng.integers(0, 256, shape).astype(np.float32)
    return rounded(rng.standard_normal(shape).astype(np.float32), dtype)


def integers(rng, *shape):
    """Small integers, which every type holds: every score is exact, and many are equal."""
    return rng.integers(0, 5, shape).astype(np.float32)


def by_eights(gpu, q, x, k, metric, **options):
    """The same search without the screen: at most 8 queries at a time."""
    parts = [lutra.scan.knn(q[i : i + 8], x, k, metric, **options) for i in range(0, len(q), 8)]
    return [np.concatenate([gpu.get(p[i]) for p in parts]) for i in range(2)]


def same_as_by_eights(gpu, q, x, k, metric, **options):
    with contextlib.nullcontext() if options else gpu.no_sync():
        scores, ids = lutra.scan.knn(q, x, k, metric, **options)
    want_scores, want_ids = by_eights(gpu, q, x, k, metric, **options)
    np.testing.assert_array_equal(gpu.get(ids), want_ids)
    same_bits(gpu.get(scores), want_scores)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("nq", [1, 2, 8, 9, 65, 128, 129, 257])
def test_exact_values_and_ties(gpu_torch, kernels, nq, dtype):
    rng = np.random.default_rng(nq)
    for n, d, k in ((1, 3, 2), (63, 16, 5), (130, 65, 30), (700, 8, 10), (1500, 33, 100), (513, 128, 1)):
        q, x = integers(rng, nq, d), integers(rng, n, d)
        a, b = gpu_torch.put(q), gpu_torch.put(x, dtype)
        for metric in ("ip", "l2", "l1", "linf") if nq in (2, 65) else ("ip", "l2"):
            scores, ids = lutra.scan.knn(a, b, k, metric)
            want_scores, want_ids = reference.knn(q, x, k, metric)
            np.testing.assert_array_equal(gpu_torch.get(ids), want_ids)
            np.testing.assert_array_equal(gpu_torch.get(scores), want_scores)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_types_and_metrics(gpu, kernels, dtype, metric):
    rng = np.random.default_rng()
    for nq, n, d in ((1, 900, 20), (5, 333, 130), (40, 500, 64), (130, 300, 127)):
        q, x = values(rng, dtype, nq, d), values(rng, dtype, n, d)
        b = gpu.put(x, dtype)
        for queries in (gpu.put(q), gpu.put(q, dtype)):
            scores, ids = (gpu.get(a) for a in lutra.scan.knn(queries, b, 7, metric))
            want_scores, want_ids = reference.knn(q, x, 7, metric)
            close(scores, want_scores)
            assert (ids == want_ids).mean() > 0.98  # rounding may swap near ties
            exact, who = (gpu.get(a) for a in lutra.scan.rescore(queries, b, gpu.put(ids), 7, metric))
            same_bits(exact, scores)
            np.testing.assert_array_equal(who, ids)


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
def test_the_screen_finds_what_the_pass_finds(gpu_torch, kernels, dtype, metric):
    rng = np.random.default_rng()
    for nq, n, d, k in ((9, 4000, 128, 10), (130, 5000, 96, 10), (300, 3000, 64, 1), (257, 2000, 40, 128)):
        q, x = gpu_torch.put(values(rng, "float32", nq, d)), gpu_torch.put(values(rng, dtype, n, d), dtype)
        same_as_by_eights(gpu_torch, q, x, k, metric)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d", [1, 7, 8, 63, 64, 65, 100, 129, 256, 257, 320, 513, 700, 1100, 2050])
def test_dimensions(gpu_torch, kernels, d, dtype):
    rng = np.random.default_rng(d)
    x = gpu_torch.put(values(rng, dtype, 600, d), dtype)
    for nq in (20, 150):
        q = gpu_torch.put(values(rng, dtype, nq, d))
        same_as_by_eights(gpu_torch, q, x, 10, "ip")
        same_as_by_eights(gpu_torch, gpu_torch.put(gpu_torch.get(q), dtype), x, 10, "l2")


@pytest.mark.parametrize(
    ("dtype", "metric"), [("float32", "ip"), ("float32", "l2"), ("float32", "cosine"), ("bfloat16", "ip")]
)
def test_long_lists(gpu_torch, kernels, dtype, metric):
    """k above 128: what the screen lets through is counted. Where many rows are alike, it is too much."""
    rng = np.random.default_rng()
    n = 11_000 if dtype == "float32" else 21_000  # of which a sample makes a bar
    normal = values(rng, dtype, n, 8)
    alike, rising = normal.copy(), np.sort(normal, 0)
    alike[n // 2 :] = alike[-1]
    for x in (normal, alike, rising) if metric == "ip" else (normal,):
        q = np.concatenate([values(rng, "float32", 8, 8), x[-1:], x[-1:]])
        q[9, 2] = np.nan  # passes every bar
        same_as_by_eights(gpu_torch, gpu_torch.put(q), gpu_torch.put(x, dtype), 140, metric)


def hard_cases(rng, n, d):
    normal = rng.standard_normal((n, d)).astype(np.float32)
    near = 1 + normal * 1e-6
    scales = normal * np.exp(rng.uniform(-40, 30, (n, 1))).astype(np.float32)
    tiny, huge = normal * np.float32(1e-23), normal * np.float32(1e17)
    repeated = normal[rng.integers(0, 5, n)]
    broken = normal.copy()
    broken[rng.integers(0, n, 3)] = np.nan
    broken[rng.integers(0, n, 9), 0] = np.inf
    broken[rng.integers(0, n, 9), 1] = -np.inf
    broken[rng.integers(0, n, 50)] = 0
    offset = normal * 0.01 + 100
    overflowing = normal * np.float32(1e20)
    return {
        "near": near, "scales": scales, "tiny": tiny, "huge": huge, "repeated": repeated, "broken": broken,
        "all NaN": normal * np.nan, "zeros": normal * 0, "offset": offset, "overflowing": overflowing,
    }  # fmt: skip


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_data_that_the_screen_cannot_order(gpu_torch, kernels, metric):
    rng = np.random.default_rng()
    n, d = 1500, 36
    for name, x in hard_cases(rng, n, d).items():
        q = rng.standard_normal((33, d)).astype(np.float32)
        q[:11] = x[:11]
        q[11] = 0
        q[12] *= 1e25
        q[13, 3] = np.nan
        q[14, 3] = np.inf
        for dtype in ("float32", "bfloat16"):
            with np.errstate(all="ignore"):
                a, b = gpu_torch.put(q), gpu_torch.put(x, dtype if gpu_torch.name == "torch" else "float32")
            try:
                same_as_by_eights(gpu_torch, a, b, 10, metric)
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}: {error}") from None


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_sorted_rows(gpu_torch, kernels, order):
    """Rising scores pass every bar; equal ones are decided by their ids."""
    n = 30_000
    x = {"rising": np.arange(n), "falling": -np.arange(n), "equal": np.ones(n)}[order].astype(np.float32)
    x = gpu_torch.put(np.stack([x, x], 1))
    for nq, k in ((1, 10), (7, 100), (40, 10), (300, 100)):
        ids = lutra.scan.knn(gpu_torch.put(np.ones((nq, 2), np.float32)), x, k).ids
        want = np.arange(n)[::-1][:k] if order == "rising" else np.arange(k)
        np.testing.assert_array_equal(gpu_torch.get(ids), np.tile(want, (nq, 1)))


@pytest.mark.parametrize("metric", METRICS)
def test_filter(gpu, kernels, metric):
    rng = np.random.default_rng()
    x = values(rng, "float32", 700, 24)
    x[5] = np.nan
    b = gpu.put(x)
    for nq in (1, 8, 40, 140):
        q = values(rng, "float32", nq, 24)
        for mask in (rng.random(700) < 0.3, np.zeros(700, bool), np.arange(700) == 600):
            mask[5] = False
            keep = np.packbits(mask, bitorder="little")
            scores, ids = (gpu.get(a) for a in lutra.scan.knn(gpu.put(q), b, 6, metric, filter=mask))
            want_scores, want_ids = reference.knn(q, x, 6, metric, keep=keep)
            close(scores, want_scores)
            assert (ids == want_ids).mean() > 0.98
            assert set(ids[ids >= 0]) <= set(np.flatnonzero(mask))


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_one_neighbour_of_many_queries_with_a_filter(gpu, kernels, metric):
    """The plan of such a call is another one than without a filter, and needs more memory."""
    rng = np.random.default_rng(5)
    q, x = integers(rng, 1024, 5), integers(rng, 4096, 5)
    keep = rng.random(4096) < 0.3
    a, b = gpu.put(q), gpu.put(x)
    want = lutra.scan.knn(q, x, 1, metric, filter=keep)
    for found in (
        lutra.scan.knn(a, b, 1, metric, filter=gpu.put(keep)),
        lutra.scan.knn_screened(a, b, lutra.scan.quantize_int8(b, metric), 1, metric, filter=gpu.put(keep)),
    ):
        np.testing.assert_array_equal(gpu.get(found.ids), want.ids)
        np.testing.assert_array_equal(gpu.get(found.scores), want.scores)


def test_filter_forms(gpu, kernels):
    rng = np.random.default_rng(0)
    q, x = values(rng, "float32", 20, 8), values(rng, "float32", 50, 8)
    mask = np.arange(50) % 3 == 0
    want = reference.knn(q, x, 4, keep=np.packbits(mask, bitorder="little"))[1]
    bits = np.packbits(mask, bitorder="little")
    for filter in (
        mask,
        bits,
        gpu.put(mask),
        gpu.put(bits),
        np.flatnonzero(mask).tolist(),
        lambda i: i % 3 == 0,
    ):
        ids = lutra.scan.knn(gpu.put(q), gpu.put(x), 4, filter=filter).ids
        np.testing.assert_array_equal(gpu.get(ids), want)


def test_unaligned_input(gpu, kernels):
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float16", "int8"):
        for d in (16, 18, 21):
            q, x = values(rng, dtype, 70, d), values(rng, dtype, 400, d)
            flat = gpu.put(np.concatenate([[0], x.ravel()]).astype(np.float32), dtype)
            for queries in (q, q[:3]):
                scores = lutra.scan.knn(gpu.put(queries), flat[1:].reshape(400, d), 5, "l2").scores
                close(gpu.get(scores), reference.knn(queries, x, 5, "l2")[0])


def test_bias(gpu, kernels):
    from lutra import _arrays
    from lutra.scan._knn import _knn

    rng = np.random.default_rng()
    x, bias = values(rng, "float32", 900, 32), 5 * values(rng, "float32", 900)
    for nq in (1, 6, 50):
        q = values(rng, "float32", nq, 32)
        a = gpu.put(q)
        scores, ids = _knn(_arrays.kind_of(a, "q"), a, gpu.put(x), 8, "ip", None, gpu.put(bias))
        want = np.sort(q @ x.T + bias, 1)[:, ::-1][:, :8]
        close(gpu.get(scores), want)
        close(np.take_along_axis(q @ x.T + bias, gpu.get(ids), 1), want)


def test_in_a_graph(gpu_torch, kernels):
    torch, rng = gpu_torch.torch, np.random.default_rng()
    q, x = gpu_torch.put(values(rng, "float32", 100, 64)), gpu_torch.put(values(rng, "float32", 3000, 64))
    lutra.scan.knn(q, x, 10)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, ids = lutra.scan.knn(q, x, 10)
    for data in (values(rng, "float32", 3000, 64), np.tile(values(rng, "float32", 1, 64), (3000, 1))):
        x.copy_(gpu_torch.put(data))
        graph.replay()
        want_scores, want_ids = by_eights(gpu_torch, q, x, 10, "ip")
        np.testing.assert_array_equal(gpu_torch.get(ids), want_ids)
        same_bits(gpu_torch.get(scores), want_scores)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small(gpu_torch, kernels, dtype):
    rng = np.random.default_rng(1)
    q, x = integers(rng, 19, 33), integers(rng, 150, 33)
    for part in (q, q[:3], q[:1]):
        ids = lutra.scan.knn(gpu_torch.put(part), gpu_torch.put(x, dtype), 5, "l2").ids
        np.testing.assert_array_equal(gpu_torch.get(ids), reference.knn(part, x, 5, "l2")[1])


# ---------------------------------------------------------------- the open unit ball
def in_ball(rng, n, d, dtype="float32"):
    x = rng.standard_normal((n, d))
    x *= (0.98 * rng.random((n, 1))) / np.linalg.norm(x, axis=1, keepdims=True)
    return rounded(x.astype(np.float32), dtype)


def check_poincare(gpu, q, x, got, k):
    """Scores against float64, and that the ids are as good as any."""
    scores, ids = (gpu.get(a) for a in got)
    exact = reference.pairwise(q.astype(np.float64), x.astype(np.float64), "poincare")
    found = min(k, len(x))
    np.testing.assert_allclose(scores[:, :found], np.sort(exact, 1)[:, :found], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(
        np.take_along_axis(exact, ids[:, :found], 1), np.sort(exact, 1)[:, :found], rtol=2e-5, atol=2e-6
    )
    assert all(len(set(row)) == found for row in ids[:, :found].tolist())
    assert (ids[:, found:] == -1).all() and (scores[:, found:] == np.inf).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("nq", [1, 3, 9, 17])
def test_poincare(gpu, nq, dtype):
    rng = np.random.default_rng()
    for n, d, k in ((1, 3, 2), (63, 16, 5), (130, 65, 30), (700, 8, 600), (300, 129, 1)):
        q, x = in_ball(rng, nq, d), in_ball(rng, n, d, dtype)
        q[0] = 0
        a, b, candidates = gpu.put(q), gpu.put(x, dtype), gpu.put(np.tile(np.arange(n), (nq, 1)))
        with gpu.no_sync():
            found = lutra.scan.knn(a, b, k, "poincare")
            everything = lutra.scan.rescore(a, b, candidates, k, "poincare")
        check_poincare(gpu, q, x, found, k)
        for one, other in zip(found, everything):  # the same bits from both
            same_bits(gpu.get(one), gpu.get(other))
        best = gpu.get(found.scores)[:, 0]
        offsets, scores, ids = lutra.scan.range_search(a, b, float(best.max()), "poincare")
        offsets, scores, ids = (gpu.get(v) for v in (offsets, scores, ids))
        for i in range(nq):
            assert scores[offsets[i]] == best[i] and ids[offsets[i]] == gpu.get(found.ids)[i, 0]


@pytest.mark.sanitize
def test_poincare_ties_filter_and_points_outside(gpu_torch):
    rng = np.random.default_rng()
    x = in_ball(rng, 90, 6)
    x[40:] = x[:50]
    q = np.concatenate([x[3:5], in_ball(rng, 9, 6)])
    keep = rng.random(90) < 0.5
    keep[[3, 43]] = True
    for some in (q[:2], q):
        a, b = gpu_torch.put(some), gpu_torch.put(x)
        scores, ids = lutra.scan.knn(a, b, 4, "poincare")
        assert gpu_torch.get(ids)[:2, :2].tolist() == [[3, 43], [4, 44]]
        assert (gpu_torch.get(scores)[:2, :2] == 0).all()
        filtered = lutra.scan.knn(a, b, 100, "poincare", filter=keep)
        assert set(gpu_torch.get(filtered.ids)[0].tolist()) == {*np.flatnonzero(keep).tolist(), -1}
    y = x.copy()
    y[57] = 2  # comes first, as every NaN
    for some in (q[:2], q):
        scores, ids = lutra.scan.knn(gpu_torch.put(some), gpu_torch.put(y), 3, "poincare")
        assert np.isnan(gpu_torch.get(scores)[:, 0]).all() and (gpu_torch.get(ids)[:, 0] == 57).all()
    scores = lutra.scan.knn(
        gpu_torch.put(q / np.linalg.norm(q, axis=1, keepdims=True) * 2), gpu_torch.put(x), 3, "poincare"
    ).scores
    assert np.isnan(gpu_torch.get(scores)).all()


def test_poincare_index(gpu_torch):
    rng = np.random.default_rng()
    x, q = in_ball(rng, 200, 8), in_ball(rng, 5, 8)
    index = lutra.index.Flat(8, "poincare")
    index.add(x)
    want = index.search(q, 7)
    found = index.to("cuda").search(gpu_torch.put(q), 7)
    np.testing.assert_allclose(gpu_torch.get(found.scores), want.scores, rtol=2e-5, atol=2e-6)


# ---------------------------------------------------------------- the nearest of many
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("d", [1, 3, 32, 65, 128, 200, 513])
def test_nearest(gpu_torch, kernels, d, metric):
    rng = np.random.default_rng()
    for n, c in ((1024, 1), (1025, 2), (1500, 63), (2000, 65), (1100, 300)):
        x, centroids = values(rng, "float32", n, d), values(rng, "float32", c, d)
        centroids[c // 2] = centroids[0]  # a tie
        a, b = gpu_torch.put(x), gpu_torch.put(centroids)
        with gpu_torch.no_sync():
            scores, ids = lutra.address.nearest(a, b, 1, metric)
        want_scores, want_ids = by_eights(gpu_torch, a[:64], b, 1, metric)
        np.testing.assert_array_equal(gpu_torch.get(ids)[:64], want_ids)
        same_bits(gpu_torch.get(scores)[:64], want_scores)
        close(gpu_torch.get(scores), reference.knn(x, centroids, 1, metric)[0])


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_nearest_of_hard_cases(gpu_torch, kernels, metric):
    rng = np.random.default_rng()
    for name, centroids in hard_cases(rng, 150, 20).items():
        x = rng.standard_normal((1040, 20)).astype(np.float32)
        x[:11] = centroids[:11]
        x[12] *= 1e25
        x[13, 3] = np.nan
        x[14, 3] = np.inf
        a, b = gpu_torch.put(x), gpu_torch.put(centroids)
        scores, ids = lutra.address.nearest(a, b, 1, metric)
        want_scores, want_ids = by_eights(gpu_torch, a[:40], b, 1, metric)
        np.testing.assert_array_equal(gpu_torch.get(ids)[:40], want_ids, err_msg=name)
        same_bits(gpu_torch.get(scores)[:40], want_scores)


# ---------------------------------------------------------------- range search
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_range_search(gpu, dtype, metric):
    rng = np.random.default_rng()
    for nq, n, d in ((1, 700, 5), (9, 300, 33), (20, 1000, 16), (3, 40, 8)):
        q, x = integers(rng, nq, d), integers(rng, n, d)
        x[n // 2] = q[0]
        a, b = gpu.put(q), gpu.put(x, dtype)
        middle = np.sort(reference.pairwise(q[:1], x, metric)[0])[n // 3]
        mask = rng.random(n) < 0.5
        for radius in (float(middle) + 1e-4, np.inf, -np.inf):
            for filter in (None, mask):
                keep = None if filter is None else np.packbits(mask, bitorder="little")
                got = lutra.scan.range_search(a, b, radius, metric, filter=filter)
                want = reference.range_search(q, x, radius, metric, keep)
                assert all(gpu.owns(part) for part in got)
                np.testing.assert_array_equal(gpu.get(got[0]), want[0])
                close(gpu.get(got[1]), want[1])
                if metric != "cosine":
                    np.testing.assert_array_equal(gpu.get(got[2]), want[2])


def test_range_search_of_nothing(gpu):
    a = gpu.put(np.zeros((3, 4), np.float32))
    for q, x in ((a[:0], a), (a, a[:0])):
        offsets, scores, ids = (gpu.get(part) for part in lutra.scan.range_search(q, x, 1.0))
        assert offsets.tolist() == [0] * (len(q) + 1) and len(scores) == len(ids) == 0


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_any_k(gpu, metric):
    rng = np.random.default_rng()
    x = integers(rng, 20_000, 6)
    for nq, k in ((1, 513), (3, 2049), (11, 9000), (2, 20_001)):
        q = integers(rng, nq, 6)
        scores, ids = lutra.scan.knn(gpu.put(q), gpu.put(x), k, metric)
        want_scores, want_ids = reference.knn(q, x, k, metric)
        np.testing.assert_array_equal(gpu.get(ids), want_ids)
        np.testing.assert_array_equal(gpu.get(scores), want_scores)
