"""The scans of inverted lists against their reference."""

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.quant._bits import pack
from lutra.reference import lists as reference
from lutra.reference.scan import pq_tables
from lutra.scan import _lists
from lutra.scan._lists import Lists

# look-ups, entries of a table, bits of a code
LUT8 = [
    (1, 256, 8), (2, 16, 8), (8, 256, 8), (17, 100, 8), (97, 3, 8), (1, 32, 5), (7, 32, 5), (8, 17, 5),
    (33, 32, 5), (2, 64, 6), (16, 64, 6), (65, 40, 6), (3, 128, 7), (24, 100, 7), (63, 128, 7),
]  # fmt: skip
DTYPES = ["float32", "float16", "bfloat16", "int8"]


def dtype_of(name):
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16) if name == "bfloat16" else np.dtype(name)


def arena(rng, sizes, gaps=True):
    """Lists of these sizes with room between them, positions in random order, some rows empty."""
    begin = np.concatenate([[0], np.cumsum([(s + 15) // 16 * 16 + 16 * (s % 3) for s in sizes])]).astype(
        np.int64
    )
    total = int(begin[-1])
    positions = np.full(total, -1, np.int32)
    rows = np.concatenate([np.arange(b, b + s) for b, s in zip(begin, sizes)] or [np.empty(0, int)]).astype(
        int
    )
    live = rows[rng.random(len(rows)) < 0.9] if gaps else rows
    positions[live] = rng.permutation(len(live))
    return begin[:-1].copy(), np.array(sizes, np.int64), total, positions, len(live)


def probes_of(rng, nq, nlist, nprobe):
    probes = np.array([rng.permutation(nlist)[:nprobe] for _ in range(nq)], np.int64).reshape(nq, -1)
    probes[rng.random(probes.shape) < 0.1] = -1
    return probes


def problems(seed):
    rng = np.random.default_rng(seed)
    for sizes in ([0], [1], [17, 0, 3], [1, 15, 16, 17, 31, 33, 2000, 65, 97, 0, 5, 1100]):
        for nq in (1, 2, 3, 7, 33):
            begin, rows, total, positions, n = arena(rng, sizes)
            keep = None if nq % 2 else np.packbits(rng.random(n) < 0.5, bitorder="little")
            nprobe = min(len(sizes), 1 + nq % 12)
            yield (
                rng,
                nq,
                total,
                Lists(begin, rows, positions, n, keep, probes_of(rng, nq, len(sizes), nprobe)),
            )


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_list_rows(simd_level, dtype, metric):
    for d in (1, 3, 17, 64):
        for rng, nq, total, lists in problems(d):
            x = rng.integers(-3, 4, (total // 16, d, 16)).astype(dtype_of(dtype))
            q = rng.integers(-3, 4, (nq, d)).astype(np.float32)
            for k in (1, 10, 70):
                got = _lists.list_rows(q, x, lists, k, metric)
                want = reference.list_rows(q, x, lists, k, metric)
                np.testing.assert_array_equal(got[1], want[1])
                np.testing.assert_array_equal(got[0], want[0])


def scalar_blocks(codes, bits):
    """Codes (n, d) in the layout of the kernel."""
    rows = reference.scalar_rows(codes, bits)
    return np.ascontiguousarray(rows.reshape(-1, 16, rows.shape[1]).transpose(0, 2, 1))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [6, 8])
def test_list_scalar(simd_level, bits, metric):
    for d in (1, 2, 3, 4, 5, 18, 63, 64):
        for rng, nq, total, lists in problems(d):
            codes = rng.integers(0, 1 << bits, (total, d)).astype(np.uint8)
            assert reference.scalar_rows(codes, bits).shape[1] == (d * bits + 7) // 8
            x = scalar_blocks(codes, bits)
            step, offset = rng.integers(0, 3, d).astype(np.float32), rng.integers(-9, 9, d).astype(np.float32)
            centroids = None
            if nq % 2:
                centroids = rng.integers(-5, 6, (len(lists.begin), d)).astype(np.float32)
            q = rng.integers(-3, 4, (nq, d)).astype(np.float32)
            for k in (1, 70):
                got = _lists.list_scalar(q, x, bits, step, offset, centroids, lists, k, metric)
                want = reference.list_scalar(q, x, bits, step, offset, centroids, lists, k, metric)
                np.testing.assert_array_equal(got[1], want[1])
                np.testing.assert_array_equal(got[0], want[0])
                if d == 18:  # and the reference reads the layout as it is meant
                    owner = np.repeat(np.arange(len(lists.rows)), lists.rows)
                    of = np.concatenate([np.arange(b, b + r) for b, r in zip(lists.begin, lists.rows)])
                    values = codes[of] * step + offset + (0 if centroids is None else centroids[owner])
                    row = {int(p): v for p, v in zip(lists.positions[of], values)}
                    for i in range(nq):
                        for score, position in zip(got[0][i], got[1][i]):
                            if position >= 0:
                                v = row[int(position)]
                                assert score == (np.square(q[i] - v).sum() if metric == "l2" else q[i] @ v)


@pytest.mark.parametrize("bits", [6, 8])
def test_every_byte_is_a_scalar_code(bits):
    rng = np.random.default_rng(0)
    for d in range(1, 14):
        rows = rng.integers(0, 256, (50, (d * bits + 7) // 8)).astype(np.uint8)
        codes = reference.scalar_codes(rows, bits, d)
        assert codes.shape == (50, d) and codes.max() < 1 << bits
        np.testing.assert_array_equal(
            reference.scalar_codes(reference.scalar_rows(codes, bits), bits, d), codes
        )


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize(("m", "ksub", "bits"), LUT8)
def test_lut8_in_lists(simd_level, m, ksub, bits, metric):
    for rng, nq, total, lists in problems(m):
        codes = pack(rng.integers(0, ksub, (total, m)).astype(np.uint8), bits)
        lut = rng.integers(-9, 10, (nq, m, ksub)).astype(np.float32)
        terms = [
            None if rng.random() < 0.3 else rng.integers(-5, 6, shape).astype(np.float32)
            for shape in (lists.probes.shape, nq, total, total)
        ]
        for k in (1, 70):
            got = _lists.lut8(lut, codes, lists, k, metric, *terms, bits)
            want = reference.lut8(lut, codes, *terms, lists, k, metric, bits)
            np.testing.assert_array_equal(got[1], want[1])
            np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize(("m", "ksub", "bits"), LUT8)
def test_lut8_flat(simd_level, m, ksub, bits, metric):
    rng = np.random.default_rng(m)
    for nq in (1, 3, 4, 15, 17, 33):
        for n in (0, 1, 17, 63, 600):
            codes = pack(rng.integers(0, ksub, (n, m)).astype(np.uint8), bits)
            lut = rng.integers(-9, 10, (nq, m, ksub)).astype(np.float32)
            base, bias, add, mul = (
                None if rng.random() < 0.3 else rng.integers(-5, 6, shape).astype(np.float32)
                for shape in ((nq, 1), nq, n, n)
            )
            keep = None if nq % 2 else np.packbits(rng.random(n) < 0.5, bitorder="little")
            lists = Lists(np.zeros(1, np.int64), np.array([n]), None, n, keep, None)
            got = _lists.lut8(lut, codes, lists, 60, metric, base, bias, add, mul, bits)
            want = reference.lut8(lut, codes, base, bias, add, mul, lists, 60, metric, bits)
            np.testing.assert_array_equal(got[1], want[1])
            np.testing.assert_array_equal(got[0], want[0])


KERNELS = [
    "list_rows", "scalar 8", "scalar 6", "lut8", "lut8 flat", "lut8 of 7 bits", "lut8 flat of 7 bits",
]  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_batches_and_threads_change_no_bit(simd_level, kernel):
    rng = np.random.default_rng(0)
    begin, rows, total, positions, n = arena(rng, [700, 30, 2500, 1, 1500] * 3)
    nq, d = 41, 24
    lists = Lists(begin, rows, positions, n, None, probes_of(rng, nq, 15, 9))
    x = rng.standard_normal((total // 16, d, 16)).astype(np.float32)
    q = rng.standard_normal((nq, d)).astype(np.float32)
    lut = rng.standard_normal((nq, d, 256)).astype(np.float32)
    codes = rng.integers(0, 256, (total, d)).astype(np.uint8)
    add, mul = rng.standard_normal((2, total)).astype(np.float32)
    base = rng.standard_normal(lists.probes.shape).astype(np.float32)

    centroids = rng.standard_normal((15, d)).astype(np.float32)

    def run(i):
        part = lists._replace(probes=lists.probes[i])
        if kernel == "list_rows":
            return _lists.list_rows(q[i], x, part, 20, "l2")
        if kernel in ("scalar 8", "scalar 6"):
            bits = int(kernel[-1])
            y = scalar_blocks(codes >> (8 - bits), bits)
            return _lists.list_scalar(q[i], y, bits, mul[:d], add[:d], centroids, part, 20, "l2")
        bits = 7 if kernel.endswith("7 bits") else 8
        packed, tables = pack(codes >> (8 - bits), bits), np.ascontiguousarray(lut[i, :, : 1 << bits])
        if "flat" not in kernel:
            return _lists.lut8(tables, packed, part, 20, "ip", base[i], None, add, mul, bits)
        flat = Lists(begin[:1], np.array([total]), None, total, None, None)
        return _lists.lut8(tables, packed, flat, 20, "ip", base[i][:, :1].copy(), None, add, mul, bits)

    before = lutra.get_num_threads()
    try:
        for threads in (1, 2, 3):
            lutra.set_num_threads(threads)
            got = run(slice(None))
            if threads == 1:
                want = got
            for i in (slice(0, 1), slice(3, 5), slice(7, 41)):
                for a, b in zip(run(i), want):
                    np.testing.assert_array_equal(a, b[i])
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])
    finally:
        lutra.set_num_threads(before)


def test_damage_is_reported(simd_level):
    rng = np.random.default_rng(0)
    begin, rows, total, positions, n = arena(rng, [40, 50], gaps=False)
    lists = Lists(begin, rows, positions, n, None, np.array([[0, 1]], np.int64))
    x, q = rng.standard_normal((total // 16, 3, 16)).astype(np.float32), np.ones((1, 3), np.float32)
    codes, lut = rng.integers(0, 9, (total, 4)).astype(np.uint8), np.ones((1, 4, 9), np.float32)
    x[1, 2, 3] = np.nan
    codes[19, 2] = 9
    with pytest.raises(ValueError, match=f"position {positions[19]} is NaN" if _backend.core else "is NaN"):
        _lists.list_rows(q, x, lists, 5, "l2")
    with pytest.raises(
        ValueError, match=f"position {positions[19]} is NaN" if _backend.core else "not below 9"
    ):
        _lists.lut8(lut, codes, lists, 5, "l2")
    x[1, 2, 3] = 0
    positions[5] = n
    with pytest.raises(ValueError, match=r"no such position|is not below"):
        _lists.list_rows(q, x, lists, 5, "l2")
    positions[5] = -1
    if _backend.core:
        rows[1] = 10**6
        with pytest.raises(ValueError, match="list 1 of the index leaves its memory"):
            _lists.list_rows(q, x, lists, 5, "l2")


@pytest.mark.parametrize("distances", [False, True])
def test_lut_tables(simd_level, distances):
    if _backend.core is None:
        pytest.skip("the reference makes tables with NumPy")
    rng = np.random.default_rng(0)
    for nq, m, dsub, ksub in ((1, 1, 1, 16), (3, 5, 4, 16), (17, 2, 3, 33), (40, 3, 2, 256), (2, 7, 1, 65)):
        q = rng.integers(-3, 4, (nq, m * dsub)).astype(np.float32)
        books = rng.integers(-3, 4, (m, ksub, dsub)).astype(np.float32)
        want = pq_tables(q, books, "l2") if distances else -2 * pq_tables(q, books, "ip")
        out = np.empty((nq, m, ksub), np.float32)
        sides = np.ascontiguousarray(books.transpose(0, 2, 1))
        _backend.core.lut_tables(q, nq, m * dsub, sides, m, dsub, ksub, distances, -2.0, out)
        np.testing.assert_array_equal(out, want)
