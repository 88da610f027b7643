"""The screen of scalar codes: their highest bits first, what these leave in doubt by all bits."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import _backend, quant, scan
from lutra.reference.scan import select

pytestmark = pytest.mark.skipif(_backend.core is None, reason="needs the compiled module")
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97, 128)


def data(nq, n, m, bits, seed=0):
    rng = np.random.default_rng([seed, nq, n, m, bits])
    half = np.sort(rng.random(1 << (bits - 1)).astype(np.float32) + np.float32(0.1))
    levels = np.concatenate([-half[::-1], half])
    return (
        rng.standard_normal((nq, m), dtype=np.float32),
        rng.integers(0, 1 << bits, (n, m), np.uint8),
        levels,
    )


def kernel(q, entries, levels, k, metric, screen, bias=None, add=None, mul=None, keep=None):
    n, m = entries.shape
    tables = np.zeros((len(q), m, 16), np.float32)
    tables[:, :, : len(levels)] = q[:, :, None] * levels
    scores, ids = np.empty((len(q), k), np.float32), np.empty((len(q), k), np.int64)
    high = float(np.square(levels).sum() / np.abs(levels).sum())
    bad = _backend.core.screen_scan(
        len(q), m, k, {"ip": 0, "l2": 1}[metric], tables, levels, int(np.log2(len(levels))), high, screen,
        bias, scan.pack4(entries), n, add, mul, keep, scores, ids,
    )  # fmt: skip
    return scores, ids, bad


def full(q, entries, levels, k, metric, bias=None, add=None, mul=None, keep=None):
    scores = q.astype(np.float64) @ levels[entries].T.astype(np.float64)
    scores = scores if mul is None else scores * mul
    scores = scores if add is None else scores + add
    scores = scores if bias is None else scores + bias[:, None]
    ids = np.arange(len(entries))
    if keep is not None:
        ids = np.where(np.unpackbits(keep, count=len(ids), bitorder="little"), ids, -1)
    return select(scores.astype(np.float32), np.tile(ids, (len(q), 1)), k, metric)


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("m", SIZES)
def test_against_full_scores(simd_level, m, bits):
    """With a screen that lets every row pass the result is exact."""
    for nq, n, k in ((1, 97, 5), (2, 16, 3), (3, 65, 70), (9, 333, 10)):
        q, entries, levels = data(nq, n, m, bits)
        rng = np.random.default_rng(n)
        bias, add = rng.standard_normal(nq).astype(np.float32), rng.standard_normal(n).astype(np.float32)
        mul = rng.random(n, np.float32) + np.float32(0.5)
        keep = np.packbits(rng.random(n) < 0.6, bitorder="little")
        for metric in ("ip", "l2"):
            for terms in ((), (bias, add, mul), (None, None, mul, keep)):
                scores, ids, bad = kernel(q, entries, levels, k, metric, 400, *terms)
                want = full(q, entries, levels, k, metric, *terms)
                assert bad == -1
                np.testing.assert_allclose(scores, want[0], rtol=1e-4, atol=1e-4)
                assert (ids != want[1]).mean() < 0.02  # sums in another order may swap near ties


@pytest.mark.parametrize("kind", ["gauss", "clusters"])
@pytest.mark.parametrize("screen", [10, 40, 160])
def test_few_candidates_are_noticed(simd_level, kind, screen):
    """A screen that is too small finds what a full scan does: it notices, and makes all look-ups."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, 64)).astype(np.float32)
    q = rng.standard_normal((40, 64)).astype(np.float32)
    if kind == "clusters":
        centers = 2 * rng.standard_normal((200, 64)).astype(np.float32)
        x, q = x + centers[rng.integers(0, 200, len(x))], q + centers[: len(q)]
    codes = quant.RotatedSQ(64, 4).train(x)
    entries, mul = codes.entries(codes.encode(x)), codes.row_terms(codes.encode(x)).mul
    rotated = (codes.tables(q).lut[:, :, 15] / codes.levels[15]).astype(np.float32)
    scores, ids, _ = kernel(rotated, entries, codes.levels, 10, "ip", screen, None, None, mul)
    want = full(rotated, entries, codes.levels, 10, "ip", None, None, mul)
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), want[1].tolist())])
    assert hits > (0.97 if screen == 10 else 0.985)
    np.testing.assert_allclose(scores[:, 0], want[0][:, 0], rtol=2e-3)


def test_batches_and_threads_leave_results_alone(simd_level):
    q, entries, levels = data(150, 9000, 70, 4)
    want = kernel(q, entries, levels, 7, "l2", 60)
    threads = lutra.get_num_threads()
    try:
        for count in (1, 2, 3):
            lutra.set_num_threads(count)
            for part in (1, 5, 64, 150):
                parts = [kernel(q[i : i + part], entries, levels, 7, "l2", 60) for i in range(0, 150, part)]
                np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), want[1])
                np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), want[0])
    finally:
        lutra.set_num_threads(threads)


def test_what_is_not_finite_is_reported(simd_level):
    q, entries, levels = data(2, 400, 16, 4)
    mul = np.ones(400, np.float32)
    mul[7] = np.inf
    assert kernel(q, entries, levels, 300, "ip", 400, None, None, mul)[2] == 7
    q[1, 3] = np.inf
    assert kernel(q, entries, levels, 3, "ip", 100)[2] == -2


def test_screens_that_do_not_fit_are_refused():
    q, entries, levels = data(2, 40, 16, 4)
    with pytest.raises(ValueError, match="out of range"):
        kernel(q, entries, levels, 5, "ip", 4)


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_index(metric):
    """In a collection that is large enough the index takes it; with refine too, and after a file."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((150_000, 64), dtype=np.float32)
    x[:500] *= 1.5
    index = lutra.index.Codes(quant.RotatedSQ(64, 4).train(x[:20_000]), metric, refine="float16")
    index.add(x)
    q = x[:30] + 0.3 * rng.standard_normal((30, 64), dtype=np.float32)
    plain, refined = index.search(q, 5, refine_factor=0), index.search(q, 5)
    truth = scan.knn(q, index.quantizer.decode(index.quantizer.encode(index._unit(x))), 5, metric)
    hits = [np.mean([len(set(a) & set(b)) / 5 for a, b in zip(f.ids.tolist(), truth.ids.tolist())])
            for f in (plain, refined)]  # fmt: skip
    assert hits[0] > 0.97 and hits[1] > 0.85  # refined scores are those of the vectors
    np.testing.assert_allclose(plain.scores[:, 0], truth.scores[:, 0], rtol=1e-2, atol=1e-2)
    alone = [index.search(q[i : i + 1], 5, refine_factor=0) for i in range(30)]
    np.testing.assert_array_equal(np.concatenate([a.scores for a in alone]), plain.scores)
    odd = index.search(q, 5, refine_factor=0, filter=lambda ids: ids % 2 == 1)
    assert (odd.ids % 2 == 1).all()
