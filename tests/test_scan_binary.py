"""scan.binary and scan.rescore_bits against the reference, SciPy's definitions and each other."""

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import binary as reference

METRICS = ("hamming", "jaccard")
SIZES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 97, 124, 125, 192, 257)


@pytest.fixture(params=(True, False), ids=("vpopcnt", "plain"))
def vpopcnt(request):
    """Both ways to count bits at the highest level; one where the processor has one only."""
    if _backend.core is None:
        if request.param:
            yield
        else:
            pytest.skip("the reference counts in one way")
        return
    if _backend.core.use_vpopcnt(request.param) != request.param:
        pytest.skip("this processor has no AVX-512 VPOPCNTDQ")
    yield
    _backend.core.use_vpopcnt(True)


def packed(n, b, seed=0, density=0.5):
    rng = np.random.default_rng(seed)
    return np.packbits(rng.random((n, b * 8)) < density, axis=1, bitorder="little")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("b", SIZES)
def test_against_the_reference(simd_level, vpopcnt, metric, b):
    x = packed(203, b, b, 0.3)
    x[5:8] = 0
    x[40:50] = x[40]  # ties
    for nq, n, k in ((1, 203, 10), (3, 64, 70), (9, 17, 3), (17, 203, 10), (37, 67, 100), (70, 1, 2)):
        q = packed(nq, b, nq + 1, 0.3)
        q[-1] = 0
        got = lutra.scan.binary(q, x[:n], k, metric)
        want_scores, want_ids = reference.binary(q, x[:n], k, metric)
        np.testing.assert_array_equal(got.ids, want_ids)
        np.testing.assert_array_equal(got.scores, want_scores)  # the same two roundings: no tolerance
        assert got.scores.dtype == np.float32 and got.ids.dtype == np.int64


def test_the_reference_by_definition():
    """Hamming and Jaccard as SciPy and FAISS define them, spelled out bit by bit."""
    q, x = packed(6, 5), packed(30, 5, 1)
    x[3] = q[2] = 0
    a, b = (np.unpackbits(v, axis=1).astype(bool) for v in (q, x))
    differ = (a[:, None] != b[None]).sum(-1)
    common, united = (a[:, None] & b[None]).sum(-1), (a[:, None] | b[None]).sum(-1)
    distance = np.where(united == 0, 0.0, 1 - common / np.maximum(united, 1))
    for metric, want in (("hamming", differ), ("jaccard", distance)):
        scores, ids = reference.binary(q, x, 30, metric)
        np.testing.assert_allclose(scores, np.sort(want, axis=1), rtol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(want, ids, 1), scores, rtol=1e-6)
    assert distance[2, 3] == 0


@pytest.mark.parametrize("metric", METRICS)
def test_filters(simd_level, metric):
    n = 1003
    q, x = packed(21, 16, 1), packed(n, 16, 2)
    rng = np.random.default_rng(0)
    for share in (0.0, 0.003, 0.4, 1.0):
        mask = rng.random(n) < share
        bits = np.packbits(mask, bitorder="little")
        want = reference.binary(q, x, 12, metric, bits)
        for filter in (mask, bits, np.flatnonzero(mask), lambda ids, mask=mask: mask[ids]):
            for part in (slice(0, 1), slice(0, 21)):
                got = lutra.scan.binary(q[part], x, 12, metric, filter=filter)
                np.testing.assert_array_equal(got.ids, want[1][part])
                np.testing.assert_array_equal(got.scores, want[0][part])
    with pytest.raises(ValueError, match="filter has 5 bools; it needs 1003"):
        lutra.scan.binary(q, x, filter=np.ones(5, bool))
    with pytest.raises(IndexError, match="filter"):
        lutra.scan.binary(q, x, filter=[2000])


@pytest.mark.skipif(_backend.core is None, reason="long for the reference")
@pytest.mark.parametrize("metric", METRICS)
def test_threads_and_batches_do_not_matter(threads, metric):
    q, x = packed(40, 6, 1), packed(60_000, 6, 2)  # few bits: ties everywhere
    for k in (10, 200):
        whole = lutra.scan.binary(q, x, k, metric)
        _backend.core.set_num_threads(1)
        parts = [lutra.scan.binary(q[i : i + 1], x, k, metric) for i in range(0, 40, 7)]
        _backend.core.set_num_threads(threads)
        for i, part in zip(range(0, 40, 7), parts):
            np.testing.assert_array_equal(part.ids[0], whole.ids[i])
            np.testing.assert_array_equal(part.scores[0], whole.scores[i])
        assert (np.diff(whole.scores, axis=1) >= 0).all()
        same = whole.scores[:, 1:] == whole.scores[:, :-1]
        assert (np.diff(whole.ids, axis=1)[same] > 0).all() and same.any()


def test_input_is_taken_as_it_comes(simd_level):
    q, x = packed(5, 24, 1), packed(50, 24, 2)
    want = lutra.scan.binary(q, x, 4)
    wide = np.repeat(x, 2, axis=1)[:, ::2]
    shifted = np.empty(x.size + 1, np.uint8)[1:].reshape(x.shape)
    shifted[:] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    for a in (wide, shifted, frozen, np.asfortranarray(x)):
        np.testing.assert_array_equal(lutra.scan.binary(q, a, 4).ids, want.ids)
    empty = lutra.scan.binary(q, x[:0], 3)
    assert (empty.ids == -1).all() and np.isposinf(empty.scores).all() and empty.ids.shape == (5, 3)
    assert lutra.scan.binary(q[:0], x, 3).ids.shape == (0, 3)


def test_bad_input():
    q, x = packed(2, 4), packed(9, 4)
    with pytest.raises(ValueError, match=r"k must be >= 1, got 0"):
        lutra.scan.binary(q, x, 0)
    with pytest.raises(ValueError, match="metric must be one of 'hamming', 'jaccard'; got 'l2'"):
        lutra.scan.binary(q, x, 1, "l2")
    with pytest.raises(ValueError, match="database has rows of 3 bytes, queries of 4"):
        lutra.scan.binary(q, x[:, :3])
    with pytest.raises(ValueError, match="a byte at least"):
        lutra.scan.binary(q[:, :0], x[:, :0])
    with pytest.raises(TypeError, match="database has dtype float32; it must be one of uint8"):
        lutra.scan.binary(q, x.astype(np.float32))
    with pytest.raises(ValueError, match=r"queries must be 2-d, got shape \(4,\)"):
        lutra.scan.binary(q[0], x)
    with pytest.raises(TypeError, match="queries must be a NumPy"):
        lutra.scan.binary([[1]], x)


# ---- rescore_bits
@pytest.mark.parametrize("d", (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 97, 384))
def test_rescore_against_the_reference(simd_level, d):
    rng = np.random.default_rng(d)
    x = rng.integers(0, 256, (300, (d + 7) // 8), dtype=np.uint8)  # spare bits hold anything
    for nq, c in ((1, 1), (2, 0), (3, 17), (40, 33), (5, 250)):
        q = rng.integers(-4, 5, (nq, d)).astype(np.float32)  # integers: exact, ties in a defined order
        candidates = rng.integers(-1, 300, (nq, c))
        candidates[:, : c // 2] %= 20  # repeated
        for k in (1, 10, 60):
            got = lutra.scan.rescore_bits(q, x, candidates, k)
            want = reference.rescore_bits(q, x, candidates, k)
            np.testing.assert_array_equal(got.ids, want[1])
            np.testing.assert_array_equal(got.scores, want[0])
    q = rng.standard_normal((4, d), dtype=np.float32)
    candidates = np.tile(np.arange(300, dtype=np.int32), (4, 1))
    got = lutra.scan.rescore_bits(q, x, candidates, 300)
    signs = np.unpackbits(x, axis=1, count=d, bitorder="little") * 2.0 - 1
    np.testing.assert_allclose(got.scores, -np.sort(-(q @ signs.T), axis=1), rtol=1e-4, atol=1e-4)
    exact = lutra.scan.rescore_bits(q.astype(np.float64), x, candidates, 300)
    assert exact.scores.dtype == np.float64
    np.testing.assert_allclose(exact.scores, got.scores, rtol=1e-4, atol=1e-4)


def test_rescore_bad_input(simd_level):
    q, x = np.ones((2, 12), np.float32), packed(9, 2)
    with pytest.raises(IndexError, match=r"candidates holds 9 at position 3; ids must lie in \[0, 9\)"):
        lutra.scan.rescore_bits(q, x, np.array([[0, 1], [2, 9]]), 1)
    with pytest.raises(IndexError, match="candidates holds -2 at position 1"):
        lutra.scan.rescore_bits(q, x, np.array([[0, -2], [2, 3]]), 1)
    with pytest.raises(ValueError, match=r"database has rows of 2 bytes; queries of d = 17 need 3"):
        lutra.scan.rescore_bits(np.ones((2, 17), np.float32), x, np.array([[0], [1]]), 1)
    with pytest.raises(ValueError, match="candidates has 1 rows, queries has 2"):
        lutra.scan.rescore_bits(q, x, np.array([[0]]), 1)
    q[1, 3] = np.nan
    with pytest.raises(ValueError, match="row 4 of database is NaN"):
        lutra.scan.rescore_bits(q, x, np.array([[0], [4]]), 1)


# ---- torch
def test_torch():
    torch = pytest.importorskip("torch")
    q, x = packed(5, 24, 1), packed(50, 24, 2)
    tq, tx = torch.tensor(q), torch.tensor(x)
    mask = np.arange(50) % 3 > 0
    for filter in (None, mask, torch.tensor(mask), [3, 4]):
        want = lutra.scan.binary(q, x, 60, "jaccard", filter=filter)
        got = lutra.scan.binary(tq, tx, 60, "jaccard", filter=filter)
        assert got.ids.dtype == torch.int64 and got.scores.dtype == torch.float32
        np.testing.assert_array_equal(got.ids.numpy(), want.ids)
        np.testing.assert_array_equal(got.scores.numpy(), want.scores)
    floats = torch.randn(5, 190)
    got = lutra.scan.rescore_bits(floats, tx, torch.tensor([[1, 2, 3]] * 5), 2)
    want = lutra.scan.rescore_bits(floats.numpy(), x, np.array([[1, 2, 3]] * 5), 2)
    np.testing.assert_array_equal(got.ids.numpy(), want.ids)
    with pytest.raises(TypeError, match="database must be a torch tensor, as queries is"):
        lutra.scan.binary(tq, x)

    def both(q, x, f):
        found = lutra.scan.binary(q, x, 3).ids
        return found, lutra.scan.rescore_bits(f, x, found, 2).scores

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(tq, tx, floats)
    for a, b in zip(compiled, both(tq, tx, floats)):
        torch.testing.assert_close(a, b)
