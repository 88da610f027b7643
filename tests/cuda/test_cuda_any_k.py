"""k above 2048, which blocks do not select, on CUDA: candidates, lists, documents; against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import close
from test_cuda_lists import interleave, make_lists, on_gpu, probes_of

import lutra
from lutra.reference import binary as binary_reference
from lutra.reference import lists as lists_reference
from lutra.reference import maxsim as maxsim_reference
from lutra.reference import scan as reference
from lutra.scan import _lists

KS = (2048, 2049, 2500, 4000)


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


def integers(rng, *shape):
    return rng.integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("k", KS)
def test_rescore(gpu, rng, k, metric):
    """Ties, candidates that are named twice, and -1."""
    q, x = integers(rng, 3, 5), integers(rng, 4000, 5)
    for c in (2049, 3333):
        candidates = rng.integers(-1, 4000, (3, c))
        on_gpu_ = [gpu.put(a) for a in (q, x, candidates)]
        with gpu.no_sync():
            scores, ids = lutra.scan.rescore(*on_gpu_, k, metric)
        want_scores, want_ids = reference.rescore(q, x, candidates, k, metric)
        np.testing.assert_array_equal(gpu.get(ids), want_ids)
        np.testing.assert_array_equal(gpu.get(scores), want_scores)


def test_rescore_of_long_lists(gpu, rng):
    """Lists that are sorted one by one, by the whole machine."""
    q, x = integers(rng, 2, 3), integers(rng, 70_000, 3)
    for c, k in ((66_000, 50_000), (5000, 3000), (4000, 2049)):  # 4000: by segments
        candidates = rng.integers(0, 70_000, (2, c))
        scores, ids = lutra.scan.rescore(gpu.put(q), gpu.put(x), gpu.put(candidates), k)
        want_scores, want_ids = reference.rescore(q, x, candidates, k)
        np.testing.assert_array_equal(gpu.get(ids), want_ids)
        np.testing.assert_array_equal(gpu.get(scores), want_scores)


def test_candidates_that_are_none_show_as_nan(gpu, rng):
    q, x = integers(rng, 2, 3), integers(rng, 9, 3)
    candidates = np.tile(np.array([*range(9), 12, -5, -1]), (2, 200))
    candidates[1] = np.where((candidates[1] < 0) | (candidates[1] > 8), 0, candidates[1])
    scores, ids = (gpu.get(a) for a in lutra.scan.rescore(*map(gpu.put, (q, x, candidates)), 2100))
    assert np.isnan(scores[0, 0]) and ids[0, 0] == -1 and not np.isnan(scores[0, 1:]).any()
    want = reference.knn(q, x, 9)
    np.testing.assert_array_equal(ids[0, 1:10], want[1][0])
    np.testing.assert_array_equal(ids[1, :9], want[1][1])
    assert (ids[0, 10:] == -1).all() and (ids[1, 9:] == -1).all() and (scores[1, 9:] == -np.inf).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("k", KS)
def test_rescore_bits(gpu, rng, k):
    q = integers(rng, 2, 19)
    x = rng.integers(0, 256, (3000, 3)).astype(np.uint8)
    candidates = rng.integers(-1, 3000, (2, 2600))
    scores, ids = lutra.scan.rescore_bits(*map(gpu.put, (q, x, candidates)), k)
    want_scores, want_ids = binary_reference.rescore_bits(q, x, candidates, k)
    np.testing.assert_array_equal(gpu.get(ids), want_ids)
    np.testing.assert_array_equal(gpu.get(scores), want_scores)


@pytest.mark.parametrize("k", KS)
def test_lists_of_rows(gpu, rng, k):
    for nq, nprobe, sizes in ((1, 1, [2500]), (2, 3, [2100, 0, 17, 900]), (9, 2, [30, 2049, 1100])):
        lists = make_lists(rng, sizes)
        x, q = integers(rng, len(lists[2]), 6), integers(rng, nq, 6)
        probes = probes_of(rng, nq, nprobe, len(sizes))
        for metric, keep in (
            ("ip", None),
            ("l2", rng.integers(0, 256, (lists[3] + 7) // 8).astype(np.uint8)),
        ):
            want = lists_reference.list_rows(q, interleave(x), (*lists[:4], keep, probes), k, metric)
            got = _lists.list_rows(
                gpu.put(q), gpu.put(interleave(x)), on_gpu(gpu, *lists[:4], keep, probes), k, metric
            )
            np.testing.assert_array_equal(gpu.get(got[1]), want[1])
            np.testing.assert_array_equal(gpu.get(got[0]), want[0])


def test_positions_in_several_lists_count_once(gpu, rng):
    begin, sizes, positions, n, rows = make_lists(rng, [1300, 1300])
    positions[rows[1300:]] = positions[rows[:1300]]  # the second list names the vectors of the first
    x, q = integers(rng, len(positions), 4), integers(rng, 2, 4)
    x[rows[1300:]] = x[rows[:1300]]
    probes = np.array([[0, 1], [1, 0]])
    lists = on_gpu(gpu, begin, sizes, positions, n, None, probes, repeated=True)
    scores, ids = (
        gpu.get(a) for a in _lists.list_rows(gpu.put(q), gpu.put(interleave(x)), lists, 2200, "ip")
    )
    assert all(len(set(row[:1300].tolist())) == 1300 for row in ids)
    assert (ids[:, 1300:] == -1).all() and (scores[:, 1300:] == -np.inf).all()


@pytest.mark.parametrize("k", KS)
def test_maxsim(gpu, rng, k):
    lengths = rng.integers(0, 3, 2500)
    xp, qp = np.concatenate([[0], np.cumsum(lengths)]), np.array([0, 3, 5])
    q, x = integers(rng, 5, 8), integers(rng, xp[-1], 8)
    put = [gpu.put(a) for a in (q, qp, x, xp)]
    for cand in (None, rng.integers(-1, 2500, (2, 2300))):
        scores, ids = maxsim_reference.top(maxsim_reference.maxsim(q, qp, x, xp, cand)[0], k, cand)
        got = lutra.scan.maxsim(*put, candidates=gpu.put(cand), k=k)
        np.testing.assert_array_equal(gpu.get(got.scores), scores)
        np.testing.assert_array_equal(gpu.get(got.ids), ids)


@pytest.mark.filterwarnings("ignore:.* (points|vectors) for .* centroids")
@pytest.mark.parametrize("store", [None, "float16", "PQ"])
def test_indexes(gpu_torch, rng, store):
    x, q = rng.standard_normal((2600, 16)).astype(np.float32), rng.standard_normal((3, 16)).astype(np.float32)
    quantizer = lutra.quant.PQ(16, 4, 8) if store == "PQ" else store
    index = lutra.index.IVF(16, 4, quantizer=quantizer, nprobe=4)
    index.train(x[:1000], n_iter=1)
    index.add(x)
    want = index.search(q, 2500)
    index = index.to("cuda")
    found = index.search(gpu_torch.put(q), 2500)
    ids = gpu_torch.get(found.ids)
    assert all(len(set(row)) == 2500 for row in ids.tolist())
    order = want.scores if store != "PQ" else np.sort(want.scores, 1)
    close(gpu_torch.get(found.scores), order, factor=1000 if store == "PQ" else 100)


def test_binary_index_of_signs(gpu_torch, rng):
    x, q = rng.standard_normal((3000, 40)).astype(np.float32), rng.standard_normal((2, 40)).astype(np.float32)
    index = lutra.index.Binary(40, refine="float32")
    index.train(x)
    index.add(x)
    want = index.search(q, 700, refine_factor=4)
    found = index.to("cuda").search(gpu_torch.put(q), 700, refine_factor=4)
    assert (gpu_torch.get(found.ids) == want.ids).mean() > 0.99
