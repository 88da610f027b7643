"""Scans of codes on CUDA against the reference: product quantization, packed bits, 4-bit entries."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import SIZES, close, same_bits

import lutra
from lutra.reference import binary as binary_reference
from lutra.reference import fast_scan as fast_reference
from lutra.reference import scan as reference


def integers(rng, *shape):
    """Small integers: every score is exact, and many are equal."""
    return rng.integers(-3, 4, shape).astype(np.float32)


def tables_of(q, books, metric):
    """Tables (nq, m, ksub) in float64."""
    m, _, dsub = books.shape
    parts = q.reshape(len(q), m, 1, dsub).astype(np.float64)
    if metric == "ip":
        return (parts * books).sum(-1)
    return np.square(parts - books).sum(-1)


def all_scores(q, codes, books, metric):
    tables = tables_of(q, books, metric)
    return sum(tables[:, j, codes[:, j]] for j in range(codes.shape[1]))


def check_pq(gpu, q, codes, books, k, metric, batches):
    """Results against sums in float64: the scores of the ids, and that no better row is missing."""
    exact = all_scores(q, codes, books, metric)
    sign = -1 if metric == "ip" else 1
    order = sign * np.sort(np.partition(sign * exact, k - 1, axis=1)[:, :k], axis=1)
    b, c = gpu.put(codes), gpu.put(books)
    for nq in batches:
        a = gpu.put(q[:nq])
        with gpu.no_sync():
            scores, ids = lutra.scan.pq(a, b, c, k, metric)
        scores, ids = gpu.get(scores), gpu.get(ids)
        close(scores, order[:nq], factor=4)
        close(scores, np.take_along_axis(exact[:nq], ids, 1), factor=4)
        assert all(len(set(row)) == k for row in ids.tolist())


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- pq: collections that take the fast scan
@pytest.mark.parametrize(("m", "metric"), [(16, "l2"), (16, "ip"), (15, "l2"), (40, "ip"), (264, "l2")])
def test_pq_larger_still_for_one_query(gpu_torch, rng, m, metric):
    n = (24 << 20) // m + int(rng.integers(1, 3000))
    codes = rng.integers(0, 256, (n, m)).astype(np.uint8)
    books = rng.integers(-300, 300, (m, 256, 1)).astype(np.float32)  # sums are exact, and many are equal
    q = rng.integers(-3, 3, (2, m)).astype(np.float32)
    tables = tables_of(q, books, metric).astype(np.float32)
    b, c = gpu_torch.put(codes), gpu_torch.put(books)
    exact = [np.zeros(n, np.float32) for _ in range(2)]
    for j in range(m):
        column = np.ascontiguousarray(codes[:, j])
        for i in range(2):
            exact[i] += tables[i, j][column]
    for nq in (1, 2):
        a = gpu_torch.put(q[:nq])
        for k in (1, 10, 40):
            scores, ids = lutra.scan.pq(a, b, c, k, metric)
            for i in range(nq):
                signed = exact[i] if metric == "l2" else -exact[i]
                bound = np.partition(signed, k - 1)[k - 1]
                near = np.flatnonzero(signed <= bound)
                best = near[np.lexsort((near, signed[near]))][:k]
                np.testing.assert_array_equal(gpu_torch.get(ids)[i], best)
                np.testing.assert_array_equal(gpu_torch.get(scores)[i], exact[i][best])


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("m", [1, 8, 12, 15, 16, 17, 24, 32, 33, 48, 64, 96, 100, 193, 210, 260, 400])
def test_pq_large(gpu, rng, m, metric):
    n = (1 << 20) // m + int(rng.integers(1, 3000))
    codes = rng.integers(0, 256, (n, m)).astype(np.uint8)
    books = rng.standard_normal((m, 256, 2)).astype(np.float32)
    q = rng.standard_normal((5, 2 * m)).astype(np.float32)
    check_pq(gpu, q, codes, books, 10, metric, (1, 2, 3, 5))


@pytest.mark.parametrize("k", [1, 10, 11, 16, 100, 1000, 1800, 2048, 2049, 9000, 70_001])
def test_pq_large_every_k(gpu, rng, k):
    codes = rng.integers(0, 200, (70_001, 16)).astype(np.uint8)
    books = rng.standard_normal((16, 200, 3)).astype(np.float32)
    check_pq(gpu, rng.standard_normal((6, 48)).astype(np.float32), codes, books, k, "l2", (1, 6))


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_pq_large_ties(gpu, rng, metric):
    """Exact values, with so many equal rows that the fast scan cannot settle which are first."""
    q, books = integers(rng, 5, 32), integers(rng, 16, 10, 2)
    codes = rng.integers(0, 10, (80_000, 16)).astype(np.uint8)
    codes[rng.integers(0, 80_000, 50_000)] = codes[0]
    for k in (1, 10, 300, 2500, 10_000):
        for nq in (1, 5):
            scores, ids = lutra.scan.pq(gpu.put(q[:nq]), gpu.put(codes), gpu.put(books), k, metric)
            want_scores, want_ids = reference.pq(q[:nq], codes, books, k, metric)
            np.testing.assert_array_equal(gpu.get(ids), want_ids)
            np.testing.assert_array_equal(gpu.get(scores), want_scores)


def test_pq_scores_do_not_depend_on_the_batch_or_the_collection(gpu, rng):
    """The fast scan, the plain one and every width give the same bits."""
    codes = rng.integers(0, 256, (70_000, 16)).astype(np.uint8)
    books = rng.standard_normal((16, 256, 2)).astype(np.float32)
    q = rng.standard_normal((6, 32)).astype(np.float32)
    scores, ids = (gpu.get(a) for a in lutra.scan.pq(gpu.put(q), gpu.put(codes), gpu.put(books), 10))
    for nq in (1, 2, 4):
        part = lutra.scan.pq(gpu.put(q[:nq]), gpu.put(codes), gpu.put(books), 10)
        same_bits(gpu.get(part.scores), scores[:nq])
        same_bits(gpu.get(part.ids), ids[:nq])
    for i in range(6):  # few rows: the plain scan
        own, own_ids = lutra.scan.pq(gpu.put(q[i : i + 1]), gpu.put(codes[ids[i]]), gpu.put(books), 10)
        same_bits(gpu.get(own), scores[i : i + 1])
        np.testing.assert_array_equal(ids[i][gpu.get(own_ids)[0]], ids[i])


def test_pq_large_nan_and_infinity(gpu, rng):
    codes = rng.integers(0, 200, (70_000, 16)).astype(np.uint8)
    codes[[5, 69_999, 31_234], [0, 15, 7]] = 255
    books = rng.standard_normal((16, 200, 2)).astype(np.float32)
    q = rng.standard_normal((3, 32)).astype(np.float32)
    for metric in ("l2", "ip"):
        for nq in (1, 3):
            scores, ids = (
                gpu.get(a) for a in lutra.scan.pq(gpu.put(q[:nq]), gpu.put(codes), gpu.put(books), 10, metric)
            )
            np.testing.assert_array_equal(ids[:, :3], [[5, 31_234, 69_999]] * nq)
            assert np.isnan(scores[:, :3]).all() and not np.isnan(scores[:, 3:]).any()
    q[1, 3] = np.nan
    ids = gpu.get(lutra.scan.pq(gpu.put(q), gpu.put(codes), gpu.put(books), 4).ids)
    np.testing.assert_array_equal(ids[1], [0, 1, 2, 3])
    q[1, 3] = np.inf  # <q, x> is infinite or NaN; every distance is infinite
    codes = np.minimum(codes, 199)
    books = np.abs(books)
    scores, ids = (
        gpu.get(a) for a in lutra.scan.pq(gpu.put(np.abs(q)), gpu.put(codes), gpu.put(books), 4, "ip")
    )
    np.testing.assert_array_equal(ids[1], [0, 1, 2, 3])
    assert (scores[1] == np.inf).all() and np.isfinite(scores[[0, 2]]).all()


def test_pq_large_unaligned(gpu, rng):
    flat = rng.integers(0, 256, 70_000 * 16 + 1).astype(np.uint8)
    books = rng.standard_normal((16, 256, 2)).astype(np.float32)
    q = rng.standard_normal((3, 32)).astype(np.float32)
    on_gpu = gpu.put(flat)[1:].reshape(70_000, 16)
    got = lutra.scan.pq(gpu.put(q), on_gpu, gpu.put(books), 10)
    want = lutra.scan.pq(gpu.put(q), gpu.put(flat[1:].reshape(70_000, 16)), gpu.put(books), 10)
    same_bits(gpu.get(got.scores), gpu.get(want.scores))
    same_bits(gpu.get(got.ids), gpu.get(want.ids))


@pytest.mark.parametrize("m", [260, 272])
def test_pq_of_more_codes_than_fit(gpu, rng, m):
    """Slabs of sub-spaces: codes that are none, ties, k of every kind, addresses of all kinds."""
    n = (1 << 20) // m + 9
    flat = rng.integers(0, 200, n * m + 1).astype(np.uint8)
    codes = flat[1:].reshape(n, m)
    codes[rng.integers(0, n, n // 2)] = codes[0]
    q, books = integers(rng, 7, 2 * m), integers(rng, m, 200, 2)
    for metric in ("l2", "ip"):
        for nq in (1, 5, 7):
            for k in (1, 10, 1800, n + 3):
                scores, ids = lutra.scan.pq(gpu.put(q[:nq]), gpu.put(codes), gpu.put(books), k, metric)
                want_scores, want_ids = reference.pq(q[:nq], codes, books, k, metric)
                np.testing.assert_array_equal(gpu.get(ids), want_ids)
                np.testing.assert_array_equal(gpu.get(scores), want_scores)
    there = gpu.put(flat)[1:].reshape(n, m)
    got = lutra.scan.pq(gpu.put(q), there, gpu.put(books), 10)
    np.testing.assert_array_equal(gpu.get(got.ids), reference.pq(q, codes, books, 10, "l2")[1])
    codes[[5, n - 1, n // 2], [0, m - 1, 200]] = 255
    q[2, -1] = np.nan
    scores, ids = (gpu.get(a) for a in lutra.scan.pq(gpu.put(q), gpu.put(codes), gpu.put(books), 10))
    for i in range(7):
        np.testing.assert_array_equal(ids[i, :3], [0, 1, 2] if i == 2 else [5, n // 2, n - 1])
        assert np.isnan(scores[i, :3]).all() and (i == 2 or not np.isnan(scores[i, 3:]).any())


@pytest.mark.parametrize("m", [97, 100, 112])
def test_pq_in_slabs_of_tables_that_fit(gpu, rng, m):
    """As the plain scan, to the last bit, whatever the number of queries of a launch."""
    n = (1 << 20) // m + 9
    flat = rng.integers(0, 200, n * m + 1).astype(np.uint8)
    q = rng.standard_normal((5, 2 * m)).astype(np.float32)
    books = rng.standard_normal((m, 200, 2)).astype(np.float32)
    args = gpu.put(q), gpu.put(flat)[1:].reshape(n, m), gpu.put(books)
    aligned = gpu.put(flat[1:].reshape(n, m))
    try:
        for k in (10, 300):
            lutra._backend.cuda.pq_paths(0, 0)
            want = lutra.scan.pq(*args, k, "ip")
            for queries in (0, 1, 3):
                lutra._backend.cuda.pq_paths(1, queries)
                for codes in (args[1], aligned)[: 1 if queries else 2]:
                    got = lutra.scan.pq(args[0], codes, args[2], k, "ip")
                    same_bits(gpu.get(got.scores), gpu.get(want.scores))
                    same_bits(gpu.get(got.ids), gpu.get(want.ids))
    finally:
        lutra._backend.cuda.pq_paths(0, 0)


@pytest.mark.parametrize("m", [260, 272])
def test_pq_of_few_rows_of_more_codes_than_fit(gpu, rng, m):
    """The plain scan of tables in device memory; codes that are none, addresses of all kinds, any k."""
    n = 1500
    flat = rng.integers(0, 200, n * m + 1).astype(np.uint8)
    codes = flat[1:].reshape(n, m)
    codes[7, m - 1] = 255
    q, books = integers(rng, 3, 2 * m), integers(rng, m, 200, 2)
    for there in (gpu.put(codes), gpu.put(flat)[1:].reshape(n, m)):
        for k in (10, 300):
            scores, ids = (gpu.get(a) for a in lutra.scan.pq(gpu.put(q), there, gpu.put(books), k))
            want_scores, want_ids = reference.pq(q, np.delete(codes, 7, 0), books, k - 1, "l2")
            assert (ids[:, 0] == 7).all() and np.isnan(scores[:, 0]).all()
            np.testing.assert_array_equal(ids[:, 1:], want_ids + (want_ids >= 7))
            np.testing.assert_array_equal(scores[:, 1:], want_scores)


@pytest.mark.sanitize
def test_pq_small_cases(gpu_torch, rng):
    """Every kernel, on as little as makes it run."""
    codes = rng.integers(0, 256, (9000, 272)).astype(np.uint8)
    for m in (16, 20, 128, 272):
        books = rng.standard_normal((m, 256, 1)).astype(np.float32)
        q = rng.standard_normal((6, m)).astype(np.float32)
        for nq in (1, 4, 6):
            for k in (3, 30, 2100):
                part = codes[: (1 << 20) // m + 5, :m]
                check_pq(gpu_torch, q[:nq], part, books, k, "l2", (nq,))


# ---------------------------------------------------------------- packed bits
METRICS = ("hamming", "jaccard")


def check_binary(gpu, q, x, k, metric, filter=None):
    a, b = gpu.put(q), gpu.put(x)
    keep = None if filter is None else np.packbits(filter, bitorder="little")
    on_gpu = None if keep is None else gpu.put(keep)
    with gpu.no_sync():
        scores, ids = lutra.scan.binary(a, b, k, metric, filter=on_gpu)
    want_scores, want_ids = binary_reference.binary(q, x, k, metric, keep)
    assert gpu.owns(scores) and gpu.owns(ids)
    np.testing.assert_array_equal(gpu.get(scores), want_scores)
    np.testing.assert_array_equal(gpu.get(ids), want_ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [1, 2, 3, 7, 8, 9, 17])
def test_binary(gpu, rng, nq, metric):
    for b in (*SIZES, 8, 32, 48, 64, 96, 128, 256):
        for n in (1, 50, 1500):
            x = rng.integers(0, 256, (n, b)).astype(np.uint8)
            q = rng.integers(0, 256, (nq, b)).astype(np.uint8)
            q[0] = x[0]
            check_binary(gpu, q, x, 10, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 16, 17, 300, 2048, 2049, 8193, 30_000])
def test_binary_every_k_with_ties_and_filter(gpu, rng, k, metric):
    x = rng.integers(0, 4, (20_011, 16)).astype(np.uint8)
    x[::3] = x[1]
    x[5:9] = 0
    for nq in (1, 9):
        q = rng.integers(0, 4, (nq, 16)).astype(np.uint8)
        q[-1] = 0
        check_binary(gpu, q, x, k, metric)
        check_binary(gpu, q, x, k, metric, rng.random(20_011) < 0.5)
        check_binary(gpu, q, x, k, metric, rng.random(20_011) < 0.002)


def test_binary_filters_of_every_kind(gpu, rng):
    x, q = (rng.integers(0, 256, (n, 8)).astype(np.uint8) for n in (500, 3))
    mask = rng.random(500) < 0.3
    want = binary_reference.binary(q, x, 5, "hamming", np.packbits(mask, bitorder="little"))
    packed = np.packbits(mask, bitorder="little")
    for filter in (mask, packed, np.flatnonzero(mask), lambda ids: mask[ids], gpu.put(mask), gpu.put(packed)):
        got = lutra.scan.binary(gpu.put(q), gpu.put(x), 5, filter=filter)
        np.testing.assert_array_equal(gpu.get(got.ids), want[1])
        np.testing.assert_array_equal(gpu.get(got.scores), want[0])


@pytest.mark.sanitize
def test_binary_small_cases(gpu_torch, rng):
    for b in (3, 12, 16, 80, 128):
        x, q = (rng.integers(0, 256, (n, b)).astype(np.uint8) for n in (2100, 33))
        for nq in (1, 3, 33):
            for k in (5, 50, 2080):
                for metric in METRICS:
                    check_binary(gpu_torch, q[:nq], x, k, metric, rng.random(2100) < 0.995)


def test_binary_padding_and_empty(gpu, rng):
    x, q = (rng.integers(0, 256, (n, 4)).astype(np.uint8) for n in (3, 2))
    for metric in METRICS:
        for k in (3, 20, 2000):
            check_binary(gpu, q, x, k, metric)
        check_binary(gpu, q, x[:0], 2, metric)
        assert lutra.scan.binary(gpu.put(q[:0]), gpu.put(x), 3, metric).ids.shape == (0, 3)


def test_binary_large_rows_and_unaligned(gpu, rng):
    for b in (1000, 4096, 20_000):
        x, q = (rng.integers(0, 256, (n, b)).astype(np.uint8) for n in (600, 9))
        for nq in (1, 9):
            check_binary(gpu, q[:nq], x, 3, "hamming")
            check_binary(gpu, q[:nq], x, 3, "jaccard")
    flat = rng.integers(0, 256, 300 * 16 + 1).astype(np.uint8)
    got = lutra.scan.binary(gpu.put(flat[:16][None]), gpu.put(flat)[1:].reshape(300, 16), 5)
    want = binary_reference.binary(flat[:16][None], flat[1:].reshape(300, 16), 5, "hamming")
    np.testing.assert_array_equal(gpu.get(got.ids), want[1])


@pytest.mark.parametrize("nq", [1, 9])
def test_binary_sorted(gpu, nq):
    """Rows that get better and better pass every threshold."""
    n = 20_000
    x = np.packbits(np.arange(256)[None] >= (np.arange(n) // 80)[:, None], axis=1)
    q = np.zeros((nq, 32), np.uint8)
    for rows in (x, np.ascontiguousarray(x[::-1])):
        check_binary(gpu, q, rows, 10, "hamming")
        check_binary(gpu, q, rows, 100, "hamming")


def test_rescore_bits(gpu, rng):
    for d in (*SIZES, 128, 1030):
        q = rng.standard_normal((5, d)).astype(np.float32)
        x = rng.integers(0, 256, (300, (d + 7) // 8)).astype(np.uint8)
        for c in (1, 40, 3000):
            candidates = rng.integers(-1, 300, (5, c))
            for k in (1, 10, 60):
                on_gpu = [gpu.put(a) for a in (q, x, candidates)]
                with gpu.no_sync():
                    scores, ids = lutra.scan.rescore_bits(*on_gpu, k)
                want_scores, _ = binary_reference.rescore_bits(q, x, candidates, k)
                close(gpu.get(scores), want_scores)
                ids = gpu.get(ids)
                signs = binary_reference.signs(x, d)
                picked = np.where(ids >= 0, np.einsum("ij,ikj->ik", q, signs[np.maximum(ids, 0)]), -np.inf)
                close(gpu.get(scores), picked)
                assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids)


def test_rescore_bits_bad_candidates(gpu):
    q, x = np.ones((2, 8), np.float32), np.array([[255], [0]], np.uint8)
    candidates = np.array([[0, 1, -1], [0, 2, -7]], np.int32)
    scores, ids = lutra.scan.rescore_bits(gpu.put(q), gpu.put(x), gpu.put(candidates), 3)
    np.testing.assert_array_equal(gpu.get(ids), [[0, 1, -1], [-1, 0, -1]])
    np.testing.assert_array_equal(gpu.get(scores), [[8, -8, -np.inf], [np.nan, 8, -np.inf]])


# ---------------------------------------------------------------- 4-bit entries
def check_fast_scan(gpu, tables, entries, k, metric="ip", **terms):
    n, m = entries.shape
    filter = terms.pop("filter", None)
    codes = lutra.scan.pack4(gpu.put(entries))
    np.testing.assert_array_equal(gpu.get(codes), fast_reference.pack4(entries))
    np.testing.assert_array_equal(gpu.get(lutra.scan.unpack4(codes, n, m)), entries)
    keep = None if filter is None else np.packbits(filter, bitorder="little")
    on_gpu = {name: gpu.put(a) for name, a in terms.items()}
    a, bits = gpu.put(tables), gpu.put(keep)
    with gpu.no_sync():
        scores, ids = lutra.scan.fast_scan(a, codes, n, k, metric, filter=bits, **on_gpu)
    packed = fast_reference.pack4(entries)
    want_scores, want_ids = fast_reference.fast_scan(tables, packed, n, k, metric, **terms, keep=keep)
    scores, ids = gpu.get(scores), gpu.get(ids)
    # The sum of the tables' least entries, to which a score is relative, is made in another order.
    size = np.abs(tables).max(2).sum(1).max(initial=0)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-5 + 2e-6 * size)
    # Sums are integers: where nothing is rounded after them, equal ones are decided by ids alone.
    exact = not ({"add", "mul"} & set(terms))
    assert (ids == want_ids).all() if exact else (ids == want_ids).mean() > 0.99


@pytest.mark.parametrize("m", [1, 3, 4, 5, 8, 9, 16, 31, 32, 33, 64, 65, 96, 97, 128, 200, 256, 1000])
def test_fast_scan(gpu, rng, m):
    for n in (1, 16, 17, 1000):
        entries = rng.integers(0, 16, (n, m)).astype(np.uint8)
        tables = rng.standard_normal((9, m, 16)).astype(np.float32)
        bias = rng.standard_normal(9).astype(np.float32)
        terms = {name: rng.random(n).astype(np.float32) + 0.5 for name in ("add", "mul")}
        for nq in (1, 2, 3, 9):
            check_fast_scan(gpu, tables[:nq], entries, 10)
            check_fast_scan(gpu, tables[:nq], entries, 10, "l2", bias=bias[:nq], **terms)


@pytest.mark.parametrize("k", [1, 16, 17, 500, 2048, 2049, 8193, 30_000])
def test_fast_scan_every_k_ties_and_filter(gpu, rng, k):
    n = 20_003
    entries = rng.integers(0, 16, (n, 6)).astype(np.uint8)
    entries[::3] = entries[1]
    tables = rng.standard_normal((5, 6, 16)).astype(np.float32)
    add = rng.standard_normal(n).astype(np.float32)
    for nq in (1, 5):
        for metric in ("ip", "l2"):
            check_fast_scan(gpu, tables[:nq], entries, k, metric)
            check_fast_scan(gpu, tables[:nq], entries, k, metric, filter=rng.random(n) < 0.3)
        check_fast_scan(gpu, tables[:nq], entries, k, add=add)


@pytest.mark.sanitize
def test_fast_scan_small_cases(gpu_torch, rng):
    entries = rng.integers(0, 16, (2100, 100)).astype(np.uint8)
    tables = rng.standard_normal((4, 100, 16)).astype(np.float32)
    for m in (5, 40, 100):
        for nq in (1, 2, 4):
            for k in (3, 30, 2080):
                check_fast_scan(gpu_torch, tables[:nq, :m], np.ascontiguousarray(entries[:, :m]), k)


def test_fast_scan_padding_empty_and_tables_that_are_not_finite(gpu, rng):
    entries = rng.integers(0, 16, (5, 3)).astype(np.uint8)
    tables = rng.standard_normal((2, 3, 16)).astype(np.float32)
    check_fast_scan(gpu, tables, entries, 20)
    check_fast_scan(gpu, np.zeros_like(tables), entries, 3)
    codes = lutra.scan.pack4(gpu.put(entries))
    assert lutra.scan.fast_scan(gpu.put(tables[:0]), codes, 5, 3).ids.shape == (0, 3)
    scores, ids = lutra.scan.fast_scan(gpu.put(tables), codes, 0, 3)
    assert (gpu.get(ids) == -1).all() and (gpu.get(scores) == -np.inf).all()
    good = gpu.get(lutra.scan.fast_scan(gpu.put(tables), codes, 5, 3).scores)
    for wrong in (np.nan, np.inf, -np.inf):
        tables[1, 2, 7] = wrong
        scores, ids = (gpu.get(a) for a in lutra.scan.fast_scan(gpu.put(tables), codes, 5, 3))
        assert np.isnan(scores[1]).all() and ids[1].tolist() == [0, 1, 2]
        same_bits(scores[0], good[0])


# ---------------------------------------------------------------- sums of look-ups
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [1, 3, 8, 15, 16, 17, 40, 96])
def test_lookups(gpu, rng, bits, m):
    for n in (1, 33, 700):
        codes = rng.integers(0, 256, (n, (m * bits + 7) // 8)).astype(np.uint8)
        bias = rng.standard_normal(n).astype(np.float32)
        for tokens in (1, 2, 5):
            tables = rng.standard_normal((m, tokens, 1 << bits)).astype(np.float32)
            want = reference.lookups(tables.astype(np.float64), codes, bits)
            on_gpu = gpu.put(tables), gpu.put(codes)
            offsets = gpu.put(bias)
            with gpu.no_sync():
                plain = lutra.scan.lookups(*on_gpu, bits=bits)
                half = lutra.scan.lookups(*on_gpu, offsets, bits=bits, dtype="float16")
                scores, ids = lutra.scan.lookups_topk(*on_gpu, 10, offsets, bits=bits)
            close(gpu.get(plain), want)
            close(gpu.get(half), want + bias, "float16")
            scores, ids = gpu.get(scores), gpu.get(ids)
            order = -np.sort(-(want + bias), 1)[:, :10]
            close(scores[:, : order.shape[1]], order)
            assert (ids[:, order.shape[1] :] == -1).all()
            close(
                scores[:, :n][ids[:, :n] >= 0],
                np.take_along_axis(want + bias, ids[:, :n], 1)[ids[:, :n] >= 0],
            )


def test_lookups_bfloat16_strided_tables_and_long_codes(gpu_torch, rng):
    torch = gpu_torch.torch
    codes = rng.integers(0, 256, (500, 300)).astype(np.uint8)
    for m in (20, 300):  # 300: beyond what shared memory has room for
        tables = rng.standard_normal((6, m, 256)).astype(np.float32)
        out = lutra.scan.lookups(
            gpu_torch.put(tables).transpose(0, 1), gpu_torch.put(codes[:, :m]), dtype="bfloat16"
        )
        assert out.dtype == torch.bfloat16
        want = reference.lookups(tables.transpose(1, 0, 2).astype(np.float64), codes[:, :m], 8)
        close(gpu_torch.get(out), want, "bfloat16")
