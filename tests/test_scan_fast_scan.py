"""scan.fast_scan, pack4 and unpack4 against the reference; lists, positions and rescoring of the kernel."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import _backend, scan
from lutra.reference import fast_scan as reference

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 47, 63, 64, 65, 97)
compiled = pytest.mark.skipif(_backend.core is None, reason="needs the compiled module")


@pytest.fixture(params=(True, False), ids=("vbmi", "shuffle"))
def features(request):
    """Both ways of level v4; one where the processor has one only."""
    if _backend.core is None:
        if not request.param:
            pytest.skip("the reference has one way")
        yield
        return
    names = _backend.core.use_features(request.param)
    if request.param != bool(names):
        pytest.skip("this processor has no AVX512_VBMI")
    yield
    _backend.core.use_features(True)


def data(nq, n, m, seed=0):
    rng = np.random.default_rng([seed, nq, n, m])
    entries = rng.integers(0, 16, (n, m), dtype=np.uint8)
    if n > 8:
        entries[n // 2 : n // 2 + 3] = entries[1]  # ties
    tables = rng.standard_normal((nq, m, 16), dtype=np.float32) * rng.random((nq, m, 1), dtype=np.float32)
    return tables, entries


def same(got, want, rtol=1e-5):
    np.testing.assert_allclose(got.scores, want[0], rtol=rtol, atol=1e-4)
    differ = got.ids != want[1]
    if differ.any():  # keys may be rounded differently: then the scores are all but equal
        assert differ.mean() < 0.02


@pytest.mark.parametrize("m", (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 64, 128))
def test_against_the_reference(simd_level, features, m):
    for nq, n, k in ((1, 97, 5), (2, 16, 3), (3, 65, 70), (5, 333, 10), (9, 200, 1)):
        for metric in ("ip", "l2"):
            tables, entries = data(nq, n, m)
            got = scan.fast_scan(tables, scan.pack4(entries), n, k, metric)
            want = reference.fast_scan(tables, reference.pack4(entries), n, k, metric)
            same(got, want)


@pytest.mark.parametrize("n", SIZES)
def test_sizes_terms_and_filters(simd_level, n):
    m, rng = 12, np.random.default_rng(n)
    tables, entries = data(4, n, m)
    bias, add = (rng.standard_normal(s, dtype=np.float32) for s in (4, n))
    mul = rng.random(n, dtype=np.float32) + 0.5
    mask = rng.random(n) < 0.5
    keep = np.packbits(mask, bitorder="little")
    codes = scan.pack4(entries)
    for metric in ("ip", "l2"):
        for terms in ({}, {"bias": bias}, {"add": add}, {"mul": mul}, {"bias": bias, "add": add, "mul": mul}):
            got = scan.fast_scan(tables, codes, n, 7, metric, **terms, filter=mask)
            want = reference.fast_scan(tables, codes, n, 7, metric, **terms, keep=keep)
            same(got, want)
            assert (mask[got.ids[got.ids >= 0]]).all()


def test_many_rows_and_tables_of_one_value():
    tables, entries = data(2, 5000, 300)
    tables[1] = 3.5
    got = scan.fast_scan(tables, scan.pack4(entries), 5000, 20)
    same(got, reference.fast_scan(tables, scan.pack4(entries), 5000, 20))
    np.testing.assert_array_equal(got.ids[1], np.arange(20))  # all equal: the lowest ids
    np.testing.assert_allclose(got.scores[1], 3.5 * 300)


def test_rounding_is_within_its_bound():
    tables, entries = data(6, 400, 40)
    exact = np.stack([t[np.arange(40), entries].sum(1) for t in tables])
    got = scan.fast_scan(tables, scan.pack4(entries), 400, 400)
    step = reference.rounded_tables(tables)[1]
    error = np.abs(got.scores - np.take_along_axis(exact, got.ids, 1)).max(1)
    assert (error <= 20 * step * 1.001 + 1e-4).all()
    assert error.max() > 0  # tables are rounded: otherwise this test tests nothing


@compiled
@pytest.mark.parametrize("misleading", (False, True))
def test_guessed_thresholds(misleading):
    """Many rows and a large k: a threshold is guessed from a sample of tiles, which may mislead."""
    n, m, k, nq = 140_000, 8, 200, 70
    tables, entries = data(nq, n, m)
    if misleading:  # all good rows lie where the sample looks, and they are too few
        tables = np.abs(tables)
        tables[:, :, 0] = 0
        entries[np.arange(n) // 64 % 32 != 0] = 0
        entries[np.arange(n) // 64 % 32 == 0] *= (
            np.arange((np.arange(n) // 64 % 32 == 0).sum())[:, None] % 40 == 0
        )
    codes = scan.pack4(entries)
    got = scan.fast_scan(tables, codes, n, k)
    few = [scan.fast_scan(tables[i : i + 1], codes, n, k) for i in range(0, nq, 23)]  # without a guess
    for i, want in zip(range(0, nq, 23), few):
        np.testing.assert_array_equal(got.ids[i], want.ids[0])
        np.testing.assert_array_equal(got.scores[i], want.scores[0])
    same(scan.Neighbors(got.scores[:2], got.ids[:2]), reference.fast_scan(tables[:2], codes, n, k))


@pytest.mark.parametrize("m", (1, 4, 7, 8, 9, 31))
@pytest.mark.parametrize("n", (0, 1, 15, 16, 17, 100))
def test_pack_and_unpack(simd_level, n, m):
    entries = np.random.default_rng(n).integers(0, 16, (n, m), dtype=np.uint8)
    packed = scan.pack4(entries)
    np.testing.assert_array_equal(packed, reference.pack4(entries))
    np.testing.assert_array_equal(scan.unpack4(packed, n, m), entries)
    np.testing.assert_array_equal(reference.unpack4(packed, n, m), entries)


@compiled
def test_batches_and_threads_change_nothing():
    tables, entries = data(300, 20_000, 16)
    codes = scan.pack4(entries)
    want = scan.fast_scan(tables, codes, 20_000, 50)
    for threads in (1, 2, 5):
        lutra.set_num_threads(threads)
        for batch in (1, 3, 16, 300):
            got = scan.fast_scan(tables[:batch], codes, 20_000, 50)
            np.testing.assert_array_equal(got.scores, want.scores[:batch])
            np.testing.assert_array_equal(got.ids, want.ids[:batch])
    lutra.set_num_threads(0)


@compiled
@pytest.mark.parametrize("nq", (1, 5, 40))
@pytest.mark.parametrize("metric", ("ip", "l2"))
@pytest.mark.parametrize("dtype", ("float32", "float16", "int8"))
def test_lists_positions_and_rescoring(simd_level, nq, metric, dtype):
    """Lists with gaps, every vector in two of them, and the best by codes scored again."""
    rng = np.random.default_rng(nq)
    d, m, lists, count, k = 24, 12, 6, 150, 9
    x = (rng.standard_normal((count, d)) * 20).astype(dtype)
    q = rng.standard_normal((nq, d), dtype=np.float32)
    books = rng.standard_normal((m, 16, d // m), dtype=np.float32)
    begin, rows, positions = [], [], []
    for member in range(lists):
        mine = np.flatnonzero(
            (np.arange(count) % lists == member) | ((np.arange(count) + 1) % lists == member)
        )
        begin.append(len(positions))
        rows.append(len(mine))
        positions += [*mine, *[-1] * (-len(mine) % 16)]
    positions = np.array(positions, np.int32)
    entries = rng.integers(0, 16, (count, m), dtype=np.uint8)
    codes = scan.pack4(np.where(positions[:, None] >= 0, entries[positions], 0).astype(np.uint8))
    probes = np.stack([rng.permutation(lists)[:3] for _ in range(nq)]).astype(np.int64)
    probes[:, 2] = np.where(rng.random(nq) < 0.5, -1, probes[:, 2])
    base = rng.standard_normal((nq, 3), dtype=np.float32)
    mask = rng.random(count) < 0.8
    keep = np.packbits(mask, bitorder="little")
    begin, rows = np.array(begin), np.array(rows)
    scores, ids = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)

    def run(candidates):
        code = {"float32": 0, "float16": 1, "int8": 3}[dtype]
        bad = _backend.core.fast_scan(
            nq, m, k, int(metric == "l2"), None, books, d // m, None, codes, len(positions), None, None,
            positions, True, begin, rows, lists, probes, base, 3, keep, count, q, d, candidates,
            int(metric == "l2"), code, x if candidates else None, None, d, d, scores, ids,
        )  # fmt: skip
        assert bad == -1

    sign = -1 if metric == "l2" else 1
    sub = q.reshape(nq, m, 1, -1)
    tables = ((sub - books) ** 2).sum(-1) if metric == "l2" else (sub * books).sum(-1)
    look, step, least = reference.rounded_tables((sign * tables).astype(np.float32))
    full = x.astype(np.float64)
    for candidates in (0, 20, 1000):
        run(candidates)
        for i in range(nq):
            best, rows_seen = {}, []
            for slot, member in enumerate(probes[i]):
                if member < 0:
                    continue
                for p in positions[begin[member] : begin[member] + rows[member]]:
                    if mask[p]:
                        total = least[i] + step[i] * look[i, np.arange(m), entries[p]].sum()
                        rows_seen.append((total + sign * base[i, slot], p))
                        best[p] = max(best.get(p, -np.inf), rows_seen[-1][0])
            order = sorted(best, key=lambda p: (-best[p], p))
            if candidates:
                exact = ((q[i] - full) ** 2).sum(1) if metric == "l2" else full @ q[i]
                rows_seen.sort(key=lambda entry: (-entry[0], entry[1]))
                chosen = {p for _, p in rows_seen[: 2 * candidates]}
                order = sorted(chosen, key=lambda p: (-sign * exact[p], p))
                want = np.array([exact[p] for p in order[:k]])
            else:
                want = np.array([sign * best[p] for p in order[:k]])
            found = ids[i] >= 0
            assert found.sum() == len(want)
            np.testing.assert_allclose(scores[i][found], want, rtol=1e-4, atol=1e-3)
            assert len(set(ids[i][found])) == found.sum()


def test_errors():
    tables, entries = data(2, 20, 8)
    codes = scan.pack4(entries)
    with pytest.raises(ValueError, match=r"tables\[1, 2, 3\]"):
        wrong = tables.copy()
        wrong[1, 2, 3] = np.nan
        scan.fast_scan(wrong, codes, 20)
    with pytest.raises(ValueError, match="shape"):
        scan.fast_scan(tables, codes, 33)
    with pytest.raises(ValueError, match="shape"):
        scan.fast_scan(tables[:, :, :8], codes, 20)
    with pytest.raises(ValueError, match="k must"):
        scan.fast_scan(tables, codes, 20, 0)
    with pytest.raises(ValueError, match="bias"):
        scan.fast_scan(tables, codes, 20, bias=np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="codes"):
        scan.fast_scan(tables, codes.astype(np.int8), 20)
    with pytest.raises(ValueError, match="filter"):
        scan.fast_scan(tables, codes, 20, filter=np.ones(3, bool))


def test_torch():
    torch = pytest.importorskip("torch")
    tables, entries = data(3, 50, 9)
    want = scan.fast_scan(tables, scan.pack4(entries), 50, 4, filter=range(0, 50, 2))
    codes = scan.pack4(torch.from_numpy(entries))
    got = scan.fast_scan(torch.from_numpy(tables), codes, 50, 4, filter=range(0, 50, 2))
    np.testing.assert_array_equal(got.ids.numpy(), want.ids)
    np.testing.assert_array_equal(scan.unpack4(codes, 50, 9).numpy(), entries)
    args = (torch.from_numpy(tables), codes, None, None, None, None, 50, 4, "l2")
    torch.library.opcheck(torch.ops.lutra.fast_scan.default, args)
    torch.library.opcheck(torch.ops.lutra.pack4.default, (torch.from_numpy(entries),))
    torch.library.opcheck(torch.ops.lutra.unpack4.default, (codes, 50, 9))
