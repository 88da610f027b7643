"""lutra.scan on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import SIZES, close, same_bits

import lutra
from lutra.reference import scan as reference

METRICS = ("ip", "l2", "cosine")


def integers(rng, *shape):
    """Small integers: every score is exact, and many are equal."""
    return rng.integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("nq", [1, 2, 8, 9, 32, 48, 49, 128, 130])
def test_exact_values_and_ties(gpu, nq, metric):
    rng = np.random.default_rng(nq)
    for n in (1, 17, 300, 2500):
        for d in (*SIZES, 4, 128):
            for k in (1, 10):
                q, x = integers(rng, nq, d), integers(rng, n, d)
                a, b = gpu.put(q), gpu.put(x)
                with gpu.no_sync():
                    scores, ids = lutra.scan.knn(a, b, k, metric)
                want_scores, want_ids = reference.knn(q, x, k, metric)
                assert gpu.owns(scores) and gpu.owns(ids)
                np.testing.assert_array_equal(gpu.get(scores), want_scores)
                np.testing.assert_array_equal(gpu.get(ids), want_ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 16, 17, 100, 1000, 2048])
def test_every_size_of_k(gpu, k, metric):
    rng = np.random.default_rng(k)
    for nq in (1, 5, 40, 150):
        q = rng.standard_normal((nq, 20)).astype(np.float32)
        x = rng.standard_normal((6000, 20)).astype(np.float32)
        scores, ids = lutra.scan.knn(gpu.put(q), gpu.put(x), k, metric)
        want_scores, want_ids = reference.knn(q, x, k, metric)
        close(gpu.get(scores), want_scores)
        assert (gpu.get(ids) == want_ids).mean() > 0.995  # rounding may swap near ties
        assert all(len(set(row)) == k for row in gpu.get(ids).tolist())


@pytest.mark.parametrize("k", [10, 300])
@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_sorted_input(gpu, order, k):
    """Rising scores pass every threshold; equal ones are decided by their ids."""
    n = 20_000
    x = {"rising": np.arange(n), "falling": -np.arange(n), "equal": np.ones(n)}[order].astype(np.float32)[
        :, None
    ]
    for nq in (1, 8, 33, 140):
        q = np.ones((nq, 1), np.float32)
        scores, ids = lutra.scan.knn(gpu.put(q), gpu.put(x), k)
        want = np.arange(n)[::-1][:k] if order == "rising" else np.arange(k)
        np.testing.assert_array_equal(gpu.get(ids), np.tile(want, (nq, 1)))
        np.testing.assert_array_equal(gpu.get(scores), np.tile(x[want, 0], (nq, 1)))


@pytest.mark.parametrize("k", [1, 10, 100, 1000, 2048])
def test_many_lists_with_ties(gpu, k):
    """A large collection is scanned in many parts, whose lists are merged by counting."""
    rng = np.random.default_rng(k)
    x = integers(rng, 200_001, 5)
    for nq in (1, 3, 40):
        q = integers(rng, nq, 5)
        scores, ids = lutra.scan.knn(gpu.put(q), gpu.put(x), k)
        want_scores, want_ids = reference.knn(q, x, k)
        np.testing.assert_array_equal(gpu.get(scores), want_scores)
        np.testing.assert_array_equal(gpu.get(ids), want_ids)


def test_padding_and_empty(gpu):
    q, x = gpu.put(np.ones((2, 3), np.float32)), gpu.put(np.ones((1, 3), np.float32))
    for metric, worst in (("ip", -np.inf), ("cosine", -np.inf), ("l2", np.inf)):
        for k in (3, 50, 2000):
            scores, ids = (gpu.get(a) for a in lutra.scan.knn(q, x, k, metric))
            np.testing.assert_array_equal(ids, [[0] + [-1] * (k - 1)] * 2)
            assert (scores[:, 1:] == worst).all()
        assert lutra.scan.knn(q[:0], x, 3, metric).ids.shape == (0, 3)
        scores, ids = lutra.scan.knn(q, x[:0], 2, metric)
        assert (gpu.get(ids) == -1).all() and (gpu.get(scores) == worst).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [1, 20, 130])
def test_nan_comes_first(gpu, nq, metric):
    rng = np.random.default_rng(0)
    q, x = rng.standard_normal((nq, 7)).astype(np.float32), rng.standard_normal((900, 7)).astype(np.float32)
    x[[321, 700]] = np.nan
    scores, ids = (gpu.get(a) for a in lutra.scan.knn(gpu.put(q), gpu.put(x), 4, metric))
    np.testing.assert_array_equal(ids[:, :2], np.tile([321, 700], (nq, 1)))
    assert np.isnan(scores[:, :2]).all() and not np.isnan(scores[:, 2:]).any()


def test_extreme_values(gpu):
    x = np.array([[1.0, 0.0], [np.inf, 0.0], [-np.inf, 0.0]], np.float32)
    scores, ids = lutra.scan.knn(gpu.put(np.array([[1.0, 1.0]], np.float32)), gpu.put(x), 3)
    np.testing.assert_array_equal(gpu.get(ids), [[1, 0, 2]])
    np.testing.assert_array_equal(gpu.get(scores), [[np.inf, 1, -np.inf]])
    big = np.array([[3e20, 0, 4e20], [0, 0, 0], [-1e-25, 0, 0]], np.float32)
    for nq in (1, 9, 60, 200):
        q = np.tile(np.array([[6e20, 0, 8e20]], np.float32), (nq, 1))
        scores, _ = lutra.scan.knn(gpu.put(q), gpu.put(big), 3, "cosine")
        np.testing.assert_allclose(gpu.get(scores), [[1, 0, -0.6]] * nq, rtol=1e-5, atol=1e-6)


def test_unaligned_and_strided_input(gpu):
    rng = np.random.default_rng(0)
    q, x = rng.standard_normal((5, 16)).astype(np.float32), rng.standard_normal((200, 17)).astype(np.float32)
    want = reference.knn(q, np.ascontiguousarray(x[:, 1:]), 5)
    np.testing.assert_array_equal(gpu.get(lutra.scan.knn(gpu.put(q), gpu.put(x)[:, 1:], 5).ids), want[1])
    flat = np.concatenate([[0], x[:, 1:].ravel()]).astype(np.float32)  # contiguous, but 4 bytes off
    ids = lutra.scan.knn(gpu.put(q), gpu.put(flat)[1:].reshape(200, 16), 5).ids
    np.testing.assert_array_equal(gpu.get(ids), want[1])


def test_many_queries_and_long_lists_in_several_launches(gpu):
    """Lists of k = 2048 for so many queries do not fit into one launch's scratch memory."""
    rng = np.random.default_rng(0)
    q, x = integers(rng, 3000, 4), integers(rng, 5000, 4)
    scores, ids = lutra.scan.knn(gpu.put(q), gpu.put(x), 2048)
    want_scores, want_ids = reference.knn(q, x, 2048)
    np.testing.assert_array_equal(gpu.get(ids), want_ids)
    np.testing.assert_array_equal(gpu.get(scores), want_scores)


def test_same_bits_every_time(gpu):
    rng = np.random.default_rng(0)
    x = gpu.put(rng.standard_normal((50_000, 64)).astype(np.float32))
    for nq in (1, 100):
        q = gpu.put(rng.standard_normal((nq, 64)).astype(np.float32))
        first = [gpu.get(a) for a in lutra.scan.knn(q, x, 20)]
        for _ in range(3):
            for a, b in zip(first, lutra.scan.knn(q, x, 20)):
                same_bits(a, gpu.get(b))


def test_a_query_has_the_same_scores_in_any_batch(gpu):
    rng = np.random.default_rng(0)
    q, x = (
        rng.standard_normal((130, 50)).astype(np.float32),
        rng.standard_normal((3000, 50)).astype(np.float32),
    )
    whole = gpu.get(lutra.scan.knn(gpu.put(q), gpu.put(x), 10, "l2").scores)
    for part in (q[:1], q[:7], q[:40]):
        same_bits(gpu.get(lutra.scan.knn(gpu.put(part), gpu.put(x), 10, "l2").scores), whole[: len(part)])


# ---------------------------------------------------------------- rescore
@pytest.mark.parametrize("metric", METRICS)
def test_rescore(gpu, metric):
    rng = np.random.default_rng(0)
    for d in (3, 7, 64):  # with d = 1 every cosine is 1 or -1, but for rounding
        q, x = (
            rng.standard_normal((33, d)).astype(np.float32),
            rng.standard_normal((500, d)).astype(np.float32),
        )
        for c in (1, 20, 100, 3000):
            for k in (1, 10, 64):
                candidates = rng.integers(-1, 500, (33, c))
                on_gpu = [gpu.put(a) for a in (q, x, candidates)]
                with gpu.no_sync():
                    scores, ids = lutra.scan.rescore(*on_gpu, k, metric)
                want_scores, want_ids = reference.rescore(q, x, candidates, k, metric)
                close(gpu.get(scores), want_scores)
                assert (gpu.get(ids) == want_ids).mean() > 0.99  # rounding may swap near ties


def test_rescore_counts_a_duplicate_once(gpu):
    rng = np.random.default_rng(0)
    q, x = integers(rng, 4, 5), integers(rng, 50, 5)
    for repeat in (1, 3, 400):  # 400: more candidates than are sorted at a time
        candidates = np.tile(rng.permutation(50), repeat)[None].repeat(4, 0)
        scores, ids = lutra.scan.rescore(gpu.put(q), gpu.put(x), gpu.put(candidates), 60)
        want = reference.knn(q, x, 60)
        np.testing.assert_array_equal(gpu.get(ids), want[1])
        np.testing.assert_array_equal(gpu.get(scores), want[0])


def test_a_candidate_that_is_none_shows_as_nan(gpu):
    q = gpu.put(np.ones((2, 3), np.float32))
    scores, ids = lutra.scan.rescore(q, q, gpu.put(np.array([[0, 1, -1], [0, 2, -7]])), 3)
    np.testing.assert_array_equal(gpu.get(ids), [[0, 1, -1], [-1, 0, -1]])
    np.testing.assert_array_equal(gpu.get(scores), [[3, 3, -np.inf], [np.nan, 3, -np.inf]])


# ---------------------------------------------------------------- pq
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("m", [1, 4, 7, 16, 20, 48, 97, 260])
def test_pq(gpu, m, metric):
    rng = np.random.default_rng(m)
    for ksub, dsub in ((256, 2), (16, 1), (3, 5)):
        books = rng.standard_normal((m, ksub, dsub)).astype(np.float32)
        for nq in (1, 3, 10):
            for n in (1, 50, 5000):
                q = rng.standard_normal((nq, m * dsub)).astype(np.float32)
                codes = rng.integers(0, ksub, (n, m)).astype(np.uint8)
                on_gpu = [gpu.put(a) for a in (q, codes, books)]
                for k in (1, 10, 40):
                    with gpu.no_sync():
                        scores, ids = lutra.scan.pq(*on_gpu, k, metric)
                    want_scores, want_ids = reference.pq(q, codes, books, k, metric)
                    close(gpu.get(scores), want_scores, factor=4)
                    assert (gpu.get(ids) == want_ids).mean() > 0.99


def test_pq_exact_values_and_ties(gpu):
    rng = np.random.default_rng(0)
    q, books = integers(rng, 9, 16), integers(rng, 8, 10, 2)
    codes = rng.integers(0, 10, (30_000, 8)).astype(np.uint8)
    for k in (5, 100, 2048):
        for metric in ("l2", "ip"):
            scores, ids = lutra.scan.pq(gpu.put(q), gpu.put(codes), gpu.put(books), k, metric)
            want_scores, want_ids = reference.pq(q, codes, books, k, metric)
            np.testing.assert_array_equal(gpu.get(ids), want_ids)
            np.testing.assert_array_equal(gpu.get(scores), want_scores)


def test_pq_a_code_outside_its_codebook_is_nan_and_first(gpu):
    books = np.ones((4, 5, 2), np.float32)
    codes = np.zeros((100, 4), np.uint8)
    codes[60, 2] = 5
    scores, ids = lutra.scan.pq(gpu.put(np.ones((3, 8), np.float32)), gpu.put(codes), gpu.put(books), 3)
    np.testing.assert_array_equal(gpu.get(ids), [[60, 0, 1]] * 3)
    assert np.isnan(gpu.get(scores)[:, 0]).all() and (gpu.get(scores)[:, 1:] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_scores(gpu_torch, metric):
    torch, rng = gpu_torch.torch, np.random.default_rng(0)
    q, x = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal((40, 8)).astype(np.float32)
    grads = []
    for device in (gpu_torch.put(q).device, torch.device("cpu")):
        a = torch.from_numpy(q).to(device).requires_grad_()
        b = torch.from_numpy(x).to(device).requires_grad_()
        scores, _ = lutra.scan.knn(a, b, 3, metric)
        grads.append([g.cpu().numpy() for g in torch.autograd.grad(scores.square().sum(), (a, b))])
    for on_gpu, on_cpu in zip(*grads):
        close(on_gpu, on_cpu, factor=5)
