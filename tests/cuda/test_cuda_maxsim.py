"""lutra.scan.maxsim on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import SIZES, close

import lutra
from lutra.reference import maxsim as reference

LENGTHS = (7, 0, 65, 1, 16, 3, 130, 12, 64)


def problem(seed, d, whole=True):
    rng = np.random.default_rng(seed)
    qp, xp = (np.concatenate([[0], np.cumsum(n)]) for n in ((5, 0, 33, 1, 64), LENGTHS))
    sets = [rng.integers(-3, 4, (p[-1], d)) if whole else rng.standard_normal((p[-1], d)) for p in (qp, xp)]
    return rng, sets[0].astype(np.float32), qp, sets[1].astype(np.float32), xp


@pytest.mark.parametrize("d", (*SIZES, 128))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_scores(gpu, d, dtype):
    rng, q, qp, x, xp = problem(d, d)
    put = [gpu.put(a) for a in (q, qp)], [gpu.put(x, dtype), gpu.put(xp)]
    want, _ = reference.maxsim(q, qp, x, xp)
    got = lutra.scan.maxsim(*put[0], *put[1])
    assert gpu.owns(got)
    np.testing.assert_array_equal(gpu.get(got), want)
    masks = rng.random(len(x)) < 0.6, rng.random(len(q)) < 0.7
    cand = rng.integers(-1, len(LENGTHS), (5, 17))
    for candidates in (None, cand):
        want, _ = reference.maxsim(q, qp, x, xp, candidates, None, *masks)
        options = {"doc_mask": gpu.put(masks[0]), "query_mask": gpu.put(masks[1])}
        got = lutra.scan.maxsim(*put[0], *put[1], candidates=gpu.put(candidates), **options)
        np.testing.assert_array_equal(gpu.get(got), want)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("normalize", [True, False])
def test_residual_codes(gpu, bits, normalize):
    for d in (8, 17, 128):
        rng, q, qp, x, xp = problem(bits, d, whole=False)
        docs = lutra.scan.ResidualTokens(
            rng.integers(0, 256, (len(x), (d * bits + 7) // 8)).astype(np.uint8),
            rng.integers(0, 9, len(x)).astype(np.int32), rng.standard_normal((9, d)).astype(np.float32),
            rng.standard_normal(2**bits).astype(np.float32), normalize,
        )  # fmt: skip
        want, _ = reference.maxsim(q, qp, reference.decode_residual(*docs), xp)
        there = lutra.scan.ResidualTokens(*map(gpu.put, docs[:4]), normalize)
        close(gpu.get(lutra.scan.maxsim(gpu.put(q), gpu.put(qp), there, gpu.put(xp))), want)


def test_gradients(gpu):
    if gpu.name != "torch":
        pytest.skip("gradients are torch's")
    rng, q, qp, x, xp = problem(3, 33)
    for cand in (None, rng.integers(-1, len(LENGTHS), (5, 17))):
        a, b = gpu.put(q).requires_grad_(), gpu.put(x).requires_grad_()
        scores = lutra.scan.maxsim(a, gpu.put(qp), b, gpu.put(xp), candidates=gpu.put(cand))
        want, argmax = reference.maxsim(q, qp, x, xp, cand)
        np.testing.assert_array_equal(gpu.get(scores), want)
        grad = rng.integers(-3, 4, want.shape).astype(np.float32)
        scores.backward(gpu.put(grad))
        for got, wanted in zip((a, b), reference.maxsim_backward(grad, q, qp, x, xp, cand, argmax)):
            close(gpu.get(got.grad), wanted)


def test_nan_shows(gpu):
    _, q, qp, x, xp = problem(4, 20)
    x[10, 3] = np.nan  # of document 2
    got = gpu.get(lutra.scan.maxsim(gpu.put(q), gpu.put(qp), gpu.put(x), gpu.put(xp)))
    assert np.isnan(got[[0, 2, 3, 4], 2]).all() and np.isnan(got).sum() == 4
