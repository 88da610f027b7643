"""lutra.scan.maxsim on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import close, library, rounded

import lutra
from lutra.reference import maxsim as reference

LENGTHS = (7, 0, 65, 1, 16, 3, 130, 12, 64)
#: Of queries: some chunks of 32 and some passes; one of several chunks; many short ones; one.
QUERIES = ((5, 0, 33, 1, 64), (100,), (32, 3, 9) * 6, (7,))
TYPES = (
    ("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("int8", "int8"),
    ("float32", "int8"), ("bfloat16", "int8"), ("float32", "bfloat16"), ("bfloat16", "float16"),
    ("float16", "float32"),
)  # fmt: skip


def problem(seed, d, whole=True, queries=QUERIES[0], lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    qp, xp = (np.concatenate([[0], np.cumsum(n)]) for n in (queries, lengths))
    sets = [rng.integers(-3, 4, (p[-1], d)) if whole else rng.standard_normal((p[-1], d)) for p in (qp, xp)]
    return rng, sets[0].astype(np.float32), qp, sets[1].astype(np.float32), xp


def same(got, want, types):
    """To the bit where integers are multiplied as they are; 16 bits of a float query meet int8."""
    if types[1] == "int8" and types[0] != "int8":
        np.testing.assert_allclose(got, want, rtol=3e-5, atol=3e-5 * np.abs(want[np.isfinite(want)]).max())
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("d", (1, 3, 16, 17, 31, 33, 63, 65, 97, 128, 129, 256, 300))
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_scores(gpu, d, types):
    rng, q, qp, x, xp = problem(d, d, queries=QUERIES[d % 4])
    nq = len(qp) - 1
    put = [gpu.put(q, types[0]), gpu.put(qp), gpu.put(x, types[1]), gpu.put(xp)]
    want, _ = reference.maxsim(q, qp, x, xp)
    got = lutra.scan.maxsim(*put)
    assert gpu.owns(got)
    same(gpu.get(got), want, types)
    masks = rng.random(len(x)) < 0.6, rng.random(len(q)) < 0.7
    scale = (rng.integers(1, 5, len(x)) / 4).astype(np.float32) if types[1] == "int8" else None
    cand = rng.integers(-1, len(LENGTHS), (nq, 17))
    for candidates in (None, cand):
        want, _ = reference.maxsim(q, qp, x, xp, candidates, scale, *masks)
        options = {
            "doc_mask": gpu.put(masks[0]),
            "query_mask": gpu.put(masks[1]),
            "doc_scale": gpu.put(scale),
        }
        got = lutra.scan.maxsim(*put, candidates=gpu.put(candidates), **options)
        same(gpu.get(got), want, types)


@pytest.mark.sanitize
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_small(gpu_torch, types):
    for queries in QUERIES:
        _, q, qp, x, xp = problem(1, 40, queries=queries)
        got = lutra.scan.maxsim(
            gpu_torch.put(q, types[0]), gpu_torch.put(qp), gpu_torch.put(x, types[1]), gpu_torch.put(xp)
        )
        same(gpu_torch.get(got), reference.maxsim(q, qp, x, xp)[0], types)


@pytest.mark.parametrize("types", TYPES[:5], ids="-".join)
@pytest.mark.parametrize("k", (1, 3, 9, 12, 40))
def test_best(gpu, types, k):
    for queries, lengths in zip(QUERIES, (LENGTHS, LENGTHS[:2], (3, 20, 0) * 30, (1,) * 50)):
        rng, q, qp, x, xp = problem(k, 33, queries=queries, lengths=lengths)
        put = [gpu.put(q, types[0]), gpu.put(qp), gpu.put(x, types[1]), gpu.put(xp)]
        for cand in (None, rng.integers(-1, len(lengths), (len(queries), 23))):
            scores, ids = reference.top(reference.maxsim(q, qp, x, xp, cand)[0], k, cand)
            got = lutra.scan.maxsim(*put, candidates=gpu.put(cand), k=k)
            same(gpu.get(got.scores), scores, types)
            if types[0] == types[1]:
                np.testing.assert_array_equal(gpu.get(got.ids), ids)


@pytest.mark.parametrize("d", (16, 100, 128))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_accuracy(gpu, d, dtype):
    """Sums of float32 products are as close as float32 sums are."""
    for seed, queries in enumerate(QUERIES):
        _, q, qp, x, xp = problem(seed, d, False, queries)
        q, x = rounded(q, dtype), rounded(x, dtype)
        want = reference.maxsim(q.astype(np.float64), qp, x.astype(np.float64), xp)[0]
        got = gpu.get(lutra.scan.maxsim(gpu.put(q, dtype), gpu.put(qp), gpu.put(x, dtype), gpu.put(xp)))
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(got), finite)
        size = np.sqrt((q**2).sum(1).max() * (x**2).sum(1).max()) * np.diff(qp)[:, None]
        assert (np.abs(got - want)[finite] <= 1e-6 * np.broadcast_to(size, want.shape)[finite]).all()


def test_same_bits_whatever_else_is_asked(gpu):
    for types in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "int8")):
        _, q, qp, x, xp = problem(5, 70, types[1] == "int8", (40, 3, 33, 70))
        put = gpu.put(q, types[0]), gpu.put(x, types[1])
        both = gpu.get(lutra.scan.maxsim(put[0], gpu.put(qp), put[1], gpu.put(xp)))
        for i in range(4):
            part = slice(int(qp[i]), int(qp[i + 1]))
            alone = lutra.scan.maxsim(put[0][part], gpu.put(qp[i : i + 2] - qp[i]), put[1], gpu.put(xp))
            np.testing.assert_array_equal(gpu.get(alone)[0], both[i])
            cand = np.array([[6, 2, 0]])
            alone = lutra.scan.maxsim(
                put[0][part], gpu.put(qp[i : i + 2] - qp[i]), put[1], gpu.put(xp), candidates=gpu.put(cand)
            )
            np.testing.assert_array_equal(gpu.get(alone)[0], both[i][cand[0]])


@pytest.mark.sanitize
@pytest.mark.parametrize("masked", [True, False])
def test_means_of_both_ways(gpu, masked):
    rng, q, qp, x, xp = problem(8, 40)
    q_mask, x_mask = (rng.random(len(a)) > 0.3 if masked else None for a in (q, x))
    masks = {"query_mask": q_mask, "doc_mask": x_mask}
    for options in ({"normalize": True}, {"symmetric": True}, {"normalize": True, "symmetric": True}):
        want = lutra.scan.maxsim(q, qp, x, xp, **masks, **options)
        there = {name: gpu.put(mask) for name, mask in masks.items()}
        got = lutra.scan.maxsim(*map(gpu.put, (q, qp, x, xp)), **there, **options)
        assert gpu.owns(got)
        np.testing.assert_allclose(gpu.get(got), want, rtol=1e-5, atol=1e-5)


def test_what_is_not_there_for_cupy_is_said():
    gpu = library("cupy")
    _, q, qp, x, xp = problem(8, 40)
    for options in ({"k": 2}, {"candidates": gpu.put(np.zeros((len(qp) - 1, 1), np.int64))}):
        with pytest.raises(TypeError, match="not there for CuPy arrays"):
            lutra.scan.maxsim(*map(gpu.put, (q, qp, x, xp)), symmetric=True, **options)


def test_layouts(gpu):
    """Rows that begin anywhere, and tokens of a wider matrix."""
    for dtype in ("float32", "float16", "int8"):
        _, q, qp, x, xp = problem(7, 40)
        wide = np.zeros((len(x), 45), np.float32)
        wide[:, 3:43] = x
        there = gpu.put(wide, dtype)[:, 3:43]
        got = lutra.scan.maxsim(gpu.put(q, dtype), gpu.put(qp), there, gpu.put(xp))
        np.testing.assert_array_equal(gpu.get(got), reference.maxsim(q, qp, x, xp)[0])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("normalize", [True, False])
def test_residual_codes(gpu, bits, normalize):
    for d, queries in ((8, QUERIES[0]), (17, QUERIES[1]), (100, QUERIES[2]), (128, QUERIES[3])):
        rng, q, qp, x, xp = problem(bits, d, whole=False, queries=queries)
        docs = lutra.scan.ResidualTokens(
            rng.integers(0, 256, (len(x), (d * bits + 7) // 8)).astype(np.uint8),
            rng.integers(0, 9, len(x)).astype(np.int32), rng.standard_normal((9, d)).astype(np.float32),
            rng.standard_normal(2**bits).astype(np.float32), normalize,
        )  # fmt: skip
        mask = rng.random(len(x)) < 0.8
        want, _ = reference.maxsim(q, qp, reference.decode_residual(*docs), xp, None, None, mask)
        there = lutra.scan.ResidualTokens(*map(gpu.put, docs[:4]), normalize)
        got = lutra.scan.maxsim(gpu.put(q), gpu.put(qp), there, gpu.put(xp), doc_mask=gpu.put(mask))
        close(gpu.get(got), want)
        ids = docs.centroid_ids.copy()
        ids[3] = 9  # of document 0
        mask[3] = True
        there = there._replace(centroid_ids=gpu.put(ids))
        got = gpu.get(lutra.scan.maxsim(gpu.put(q), gpu.put(qp), there, gpu.put(xp), doc_mask=gpu.put(mask)))
        asked = np.diff(qp) > 0
        assert np.isnan(got[asked, 0]).all() and not np.isnan(got[:, 1:]).any()


def test_gradients(gpu_torch):
    gpu = gpu_torch
    for seed, queries in enumerate(QUERIES):
        rng, q, qp, x, xp = problem(seed, 33, queries=queries)
        for dtype in ("float32", "bfloat16"):
            for cand in (None, rng.integers(-1, len(LENGTHS), (len(queries), 17))):
                a, b = gpu.put(q, dtype).requires_grad_(), gpu.put(x, dtype).requires_grad_()
                scores = lutra.scan.maxsim(a, gpu.put(qp), b, gpu.put(xp), candidates=gpu.put(cand))
                want, argmax = reference.maxsim(q, qp, x, xp, cand)
                np.testing.assert_array_equal(gpu.get(scores), want)
                grad = rng.integers(-3, 4, want.shape).astype(np.float32)
                scores.backward(gpu.put(grad))
                for got, wanted in zip((a, b), reference.maxsim_backward(grad, q, qp, x, xp, cand, argmax)):
                    close(gpu.get(got.grad), wanted, dtype)


def test_bad_candidates_show(gpu):
    _, q, qp, x, xp = problem(4, 20)
    cand = np.zeros((5, 4), np.int64)
    cand[:, 1] = 9
    cand[:, 2] = -5
    put = [gpu.put(a) for a in (q, qp, x, xp)]
    got = gpu.get(lutra.scan.maxsim(*put, candidates=gpu.put(cand)))
    assert np.isnan(got[:, 1:3]).all() and not np.isnan(got[:, [0, 3]]).any()


def test_nan_and_infinity_show(gpu):
    for dtype in ("float32", "float16"):
        _, q, qp, x, xp = problem(4, 20)
        q = np.abs(q) + 1
        x[10, 3] = np.nan  # of document 2
        put = [gpu.put(q, dtype), gpu.put(qp), gpu.put(x, dtype), gpu.put(xp)]
        got = gpu.get(lutra.scan.maxsim(*put))
        assert np.isnan(got[[0, 2, 3, 4], 2]).all() and np.isnan(got).sum() == 4
        x[10, 3] = np.inf
        put[2] = gpu.put(x, dtype)
        want = reference.maxsim(q, qp, x, xp)[0]
        assert np.isinf(want[0, 2])
        np.testing.assert_array_equal(gpu.get(lutra.scan.maxsim(*put)), want)


def test_no_synchronisation(gpu_torch):
    _, q, qp, x, xp = problem(4, 128)
    put = [gpu_torch.put(q, "bfloat16"), gpu_torch.put(qp), gpu_torch.put(x, "bfloat16"), gpu_torch.put(xp)]
    want = gpu_torch.get(lutra.scan.maxsim(*put, k=3).ids)
    with gpu_torch.no_sync():
        got = lutra.scan.maxsim(*put, k=3)
    np.testing.assert_array_equal(gpu_torch.get(got.ids), want)
