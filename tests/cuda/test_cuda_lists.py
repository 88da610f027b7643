"""Scans of inverted lists on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import SIZES, close, rounded

from lutra.quant import _bits
from lutra.reference import lists as reference
from lutra.scan import _lists
from lutra.scan._lists import Lists

BLOCK = 16


def make_lists(rng, sizes, gap=False):
    """Lists in an arena with shuffled positions: begins, sizes, positions, their number, rows."""
    sizes = np.asarray(sizes, np.int64)
    room = (sizes + BLOCK - 1) // BLOCK * BLOCK + (BLOCK if gap else 0)
    begin = np.cumsum(room) - room
    n = int(sizes.sum())
    positions = np.full(int(room.sum()), -1, np.int32)
    rows = np.concatenate([np.empty(0, np.int64), *(b + np.arange(s) for b, s in zip(begin, sizes))])
    positions[rows] = rng.permutation(n)
    return begin, sizes, positions, n, rows


def probes_of(rng, nq, nprobe, nlist):
    probes = np.stack([rng.permutation(nlist)[:nprobe] for _ in range(nq)]) if nq else np.empty((0, nprobe))
    probes = probes.astype(np.int64)
    probes[rng.random(probes.shape) < 0.05] = -1
    return probes


def on_gpu(gpu, begin, sizes, positions, n, keep, probes, repeated=False):
    longest = int(sizes.max(initial=0))
    typical = int(np.square(sizes).sum() // max(1, sizes.sum()))
    begin, sizes, positions, keep, probes = (gpu.put(a) for a in (begin, sizes, positions, keep, probes))
    return Lists(begin, sizes, positions, n, keep, probes, longest, typical, repeated)


def interleave(x):
    """Rows (16 blocks, width) as blocks (blocks, width, 16)."""
    return np.ascontiguousarray(x.reshape(-1, BLOCK, x.shape[1]).transpose(0, 2, 1))


def compare(gpu, got, want, exact=True):
    scores, ids = (gpu.get(a) for a in got)
    if exact:
        np.testing.assert_array_equal(scores, want[0])
        np.testing.assert_array_equal(ids, want[1])
    else:
        close(scores, want[0], factor=10)
        assert (ids == want[1]).mean() > 0.98
        np.testing.assert_array_equal(ids < 0, want[1] < 0)


SHAPES = [  # nq, nprobe, sizes of the lists
    (1, 1, [1]),
    (1, 3, [5, 0, 17, 300]),
    (2, 4, [16, 31, 33, 0, 1]),
    (3, 2, [2000, 10]),
    (40, 3, [97, 65, 63, 15, 400]),
    (65, 5, [33, 1, 0, 700, 16, 17, 260]),
    (130, 2, [1100, 30, 5]),
]


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_rows(gpu, dtype, metric):
    rng = np.random.default_rng(len(dtype))
    for nq, nprobe, sizes in SHAPES:
        for d in (1, 7, 8, 31, 64, 65):
            for k in (1, 10, 17, 300):
                if d != 31 and k in (17, 300):
                    continue
                lists = make_lists(rng, sizes, gap=d == 7)
                x = rng.integers(-3, 4, (len(lists[2]), d)).astype(np.float32)
                q = rng.integers(-3, 4, (nq, d)).astype(np.float32)
                probes = probes_of(rng, nq, nprobe, len(sizes))
                keep = (
                    rng.integers(0, 256, (lists[3] + 7) // 8).astype(np.uint8) if k == 10 and d > 8 else None
                )
                want = reference.list_rows(q, interleave(x), (*lists[:4], keep, probes), k, metric)
                got = _lists.list_rows(
                    gpu.put(q),
                    gpu.put(interleave(x), dtype),
                    on_gpu(gpu, *lists[:4], keep, probes),
                    k,
                    metric,
                )
                compare(gpu, got, want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_of_any_values(gpu, dtype):
    rng = np.random.default_rng(3)
    lists = make_lists(rng, [500, 20, 1300])
    x = rounded(rng.standard_normal((len(lists[2]), 96)).astype(np.float32), dtype)
    for nq in (2, 70):
        q = rng.standard_normal((nq, 96)).astype(np.float32)
        probes = probes_of(rng, nq, 2, 3)
        want = reference.list_rows(q, interleave(x), (*lists[:4], None, probes), 20, "l2")
        got = _lists.list_rows(
            gpu.put(q), gpu.put(interleave(x), dtype), on_gpu(gpu, *lists[:4], None, probes), 20, "l2"
        )
        compare(gpu, got, want, exact=False)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [8, 6])
def test_scalar_codes(gpu, bits, metric):
    rng = np.random.default_rng(bits)
    for nq, nprobe, sizes in SHAPES:
        for d in (1, 2, 3, 4, 5, 17, 64, 97):
            lists = make_lists(rng, sizes)
            codes = rng.integers(0, 1 << bits, (len(lists[2]), d)).astype(np.uint8)
            rows = reference.scalar_rows(codes, bits)
            step = (2.0 ** rng.integers(-3, 1, d)).astype(np.float32)
            offset = rng.integers(-8, 9, d).astype(np.float32)
            center = rng.integers(-4, 5, (len(sizes), d)).astype(np.float32) if d % 2 else None
            q = rng.integers(-3, 4, (nq, d)).astype(np.float32)
            probes = probes_of(rng, nq, nprobe, len(sizes))
            k = 40 if d == 17 else 5
            want = reference.list_scalar(
                q, interleave(rows), bits, step, offset, center, (*lists[:4], None, probes), k, metric
            )
            got = _lists.list_scalar(
                gpu.put(q), gpu.put(interleave(rows)), bits, gpu.put(step), gpu.put(offset), gpu.put(center),
                on_gpu(gpu, *lists[:4], None, probes), k, metric,
            )  # fmt: skip
            compare(gpu, got, want, exact=False)


def packed4(entries):
    """4-bit entries (rows, m) in blocks, as csrc/scan/fast_scan.h has them."""
    n, m = entries.shape
    groups = np.zeros((n, (m + 7) // 8, 2, 4), np.uint8)
    groups.reshape(n, 8 * groups.shape[1])[:, :m] = entries
    bytes_ = groups[:, :, 0] | groups[:, :, 1] << 4  # (n, groups, 4)
    return np.ascontiguousarray(bytes_.reshape(-1, BLOCK, *bytes_.shape[1:]).transpose(0, 2, 1, 3))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_look_ups(gpu, bits, metric):
    rng = np.random.default_rng(bits)
    for nq, nprobe, sizes in SHAPES:
        for m in (1, 3, 4, 7, 8, 9, 16, 20, 32, 65):
            lists = make_lists(rng, sizes)
            n = len(lists[2])
            entries = rng.integers(0, 1 << bits, (n, m)).astype(np.uint8)
            lut = rng.integers(-9, 10, (nq, m, 1 << bits)).astype(np.float32)
            probes = probes_of(rng, nq, nprobe, len(sizes))
            base = bias = add = mul = keep = None
            if m % 2:
                base, bias = (rng.integers(-9, 10, s).astype(np.float32) for s in (probes.shape, nq))
                add, mul = (rng.integers(-2, 3, n).astype(np.float32) for _ in range(2))
                keep = rng.integers(0, 256, (lists[3] + 7) // 8).astype(np.uint8)
            k = 50 if m == 9 else 4
            rows = entries if bits == 4 else _bits.pack(entries, bits)
            given = (lut, rows, base, bias, add, mul, (*lists[:4], keep, probes), k, metric)
            want = reference.lut8(*given, 8 if bits == 4 else bits)
            codes = packed4(entries) if bits == 4 else rows
            terms = [gpu.put(a) for a in (base, bias, add, mul)]
            got = _lists.lut8(
                gpu.put(lut), gpu.put(codes), on_gpu(gpu, *lists[:4], keep, probes), k, metric, *terms, bits
            )
            compare(gpu, got, want)


def test_tables_that_do_not_fit_in_shared_memory(gpu):
    rng = np.random.default_rng(0)
    lists = make_lists(rng, [40, 300])
    for m, bits in ((259, 8), (260, 8), (272, 8), (1000, 6), (4100, 4)):
        entries = rng.integers(0, 1 << bits, (len(lists[2]), m)).astype(np.uint8)
        lut = rng.integers(-2, 3, (3, m, 1 << bits)).astype(np.float32)
        probes = np.array([[0, 1], [1, -1], [-1, -1]])
        rows = entries if bits == 4 else _bits.pack(entries, bits)
        want = reference.lut8(lut, rows, None, None, None, None, (*lists[:4], None, probes), 6, "ip",
                              8 if bits == 4 else bits)  # fmt: skip
        codes = packed4(entries) if bits == 4 else rows
        places = [gpu.put(codes)]
        if bits > 4:  # at an odd address too
            odd = np.concatenate([np.zeros(1, np.uint8), codes.reshape(-1)])
            places.append(gpu.put(odd)[1:].reshape(codes.shape))
        for there in places:
            got = _lists.lut8(gpu.put(lut), there, on_gpu(gpu, *lists[:4], None, probes), 6, "ip", bits=bits)
            compare(gpu, got, want)


@pytest.mark.sanitize
def test_small(gpu):
    """For compute-sanitizer: one probe a block, and groups."""
    rng = np.random.default_rng(0)
    for nq in (2, 20):
        lists = make_lists(rng, [33, 5, 300])
        x = rng.integers(-3, 4, (len(lists[2]), 9)).astype(np.float32)
        q = rng.integers(-3, 4, (nq, 9)).astype(np.float32)
        probes = probes_of(rng, nq, 2, 3)
        for k in (3, 40):
            want = reference.list_rows(q, interleave(x), (*lists[:4], None, probes), k, "l2")
            given = on_gpu(gpu, *lists[:4], None, probes)
            compare(gpu, _lists.list_rows(gpu.put(q), gpu.put(interleave(x)), given, k, "l2"), want)


def test_damage_reads_nothing_outside(gpu):
    """Lists that leave the arena count as empty, positions that are none are passed over."""
    rng = np.random.default_rng(5)
    begin, sizes, positions, n, _ = make_lists(rng, [20, 40, 30])
    x = rng.integers(-3, 4, (len(positions), 6)).astype(np.float32)
    q = rng.integers(-3, 4, (2, 6)).astype(np.float32)
    broken = begin.copy(), sizes.copy(), positions.copy()
    broken[0][1] = 1 << 40
    broken[1][2] = 10_000
    broken[2][3], broken[2][4] = n + 7, -5
    probes = np.array([[0, 1, 2], [2, 99, -7]])
    given = on_gpu(gpu, *broken, n, None, probes)._replace(longest=64)
    _, ids = _lists.list_rows(gpu.put(q), gpu.put(interleave(x)), given, 30, "ip")
    ids = gpu.get(ids)
    assert (ids[1] == -1).all()
    assert sorted(ids[0][ids[0] >= 0].tolist()) == sorted(
        set(positions[:20].tolist()) - set(positions[3:5].tolist())
    )


def test_nan_comes_first(gpu):
    rng = np.random.default_rng(6)
    lists = make_lists(rng, [50, 60])
    x = rng.standard_normal((len(lists[2]), 5)).astype(np.float32)
    x[7] = np.nan
    probes = np.array([[0, 1]])
    q = np.ones((1, 5), np.float32)
    scores, ids = _lists.list_rows(
        gpu.put(q), gpu.put(interleave(x)), on_gpu(gpu, *lists[:4], None, probes), 3, "l2"
    )
    assert gpu.get(ids)[0, 0] == lists[2][7] and np.isnan(gpu.get(scores)[0, 0])
    assert not np.isnan(gpu.get(scores)[0, 1:]).any()


def test_long_and_short_lists(gpu):
    """Long lists are cut into stretches; k beyond the candidates of a group in shared memory."""
    rng = np.random.default_rng(7)
    lists = make_lists(rng, [30_000, 3, 200, 1, 5000])
    x = rng.integers(-3, 4, (len(lists[2]), 4)).astype(np.float32)
    for nq, k in ((1, 5), (1, 2048), (30, 100), (30, 700)):
        q = rng.integers(-3, 4, (nq, 4)).astype(np.float32)
        probes = probes_of(rng, nq, 3, 5)
        want = reference.list_rows(q, interleave(x), (*lists[:4], None, probes), k, "ip")
        given = on_gpu(gpu, *lists[:4], None, probes)
        compare(gpu, _lists.list_rows(gpu.put(q), gpu.put(interleave(x)), given, k, "ip"), want)


def test_a_position_in_two_lists_counts_once(gpu):
    rng = np.random.default_rng(8)
    begin, sizes, positions, n, rows = make_lists(rng, [100, 100])
    x = rng.integers(-3, 4, (len(positions), 4)).astype(np.float32)
    positions[rows[100:]] = positions[rows[:100]]
    x[rows[100:]] = x[rows[:100]]
    q = rng.integers(-3, 4, (5, 4)).astype(np.float32)
    probes = np.tile([0, 1], (5, 1))
    want = reference.list_rows(q, interleave(x), (begin, sizes, positions, n, None, probes[:, :1]), 30, "ip")
    given = on_gpu(gpu, begin, sizes, positions, n, None, probes, repeated=True)
    compare(gpu, _lists.list_rows(gpu.put(q), gpu.put(interleave(x)), given, 30, "ip"), want)


@pytest.mark.parametrize("distances", [False, True])
def test_tables_of_queries(gpu, distances):
    rng = np.random.default_rng(9)
    for m in (1, 3):
        for dsub in (1, 4, 127, 129):
            for columns in (1, 16, 130, 256):
                for nq in (0, 1, 8, 9):
                    a = rng.integers(-3, 4, (m, dsub, columns)).astype(np.float32)
                    constant = rng.integers(-3, 4, (m, columns)).astype(np.float32)
                    q = rng.integers(-3, 4, (nq, m * dsub)).astype(np.float32)
                    parts = q.reshape(nq, m, dsub, 1)
                    want = np.square(parts - a).sum(2) if distances else (parts * a).sum(2)
                    got = _lists.query_tables(gpu.put(q), gpu.put(a), gpu.put(constant), distances=distances)
                    np.testing.assert_array_equal(gpu.get(got), want + constant)


def test_sizes(gpu):
    rng = np.random.default_rng(10)
    for d in SIZES:
        lists = make_lists(rng, [d, 2 * d + 1])
        x = rng.integers(-3, 4, (len(lists[2]), d)).astype(np.float32)
        for nq in (1, d):
            q = rng.integers(-3, 4, (nq, d)).astype(np.float32)
            probes = np.tile([1, 0], (nq, 1))
            want = reference.list_rows(q, interleave(x), (*lists[:4], None, probes), d, "l2")
            given = on_gpu(gpu, *lists[:4], None, probes)
            compare(gpu, _lists.list_rows(gpu.put(q), gpu.put(interleave(x)), given, d, "l2"), want)


def test_thresholds_that_blocks_leave_to_others(gpu):
    """More blocks than run at once, alone and in groups, with ties, a filter and few rows that count."""
    rng = np.random.default_rng(11)
    lists = make_lists(rng, rng.integers(0, 90, 60))
    x = rng.integers(-3, 4, (len(lists[2]), 5)).astype(np.float32)
    for nq, nprobe in ((500, 8), (60, 50)):
        q = rng.integers(-3, 4, (nq, 5)).astype(np.float32)
        probes = probes_of(rng, nq, nprobe, 60)
        for k, keep in ((1, None), (10, 0.5), (100, None), (10, 0.02), (200, 0.5)):
            if keep is not None:
                keep = np.packbits(rng.random(lists[3]) < keep, bitorder="little")
            want = reference.list_rows(q, interleave(x), (*lists[:4], keep, probes), k, "l2")
            given = on_gpu(gpu, *lists[:4], keep, probes)
            compare(gpu, _lists.list_rows(gpu.put(q), gpu.put(interleave(x)), given, k, "l2"), want)
    lut = rng.integers(-9, 10, (500, 6, 16)).astype(np.float32)
    entries = rng.integers(0, 16, (len(lists[2]), 6)).astype(np.uint8)
    probes = probes_of(rng, 500, 20, 60)
    for k in (10, 30):
        want = reference.lut8(lut, entries, None, None, None, None, (*lists[:4], None, probes), k, "ip")
        given = on_gpu(gpu, *lists[:4], None, probes)._replace(
            typical=4000
        )  # two rows a thread, three lists a block
        got = _lists.lut8(gpu.put(lut), gpu.put(packed4(entries)), given, k, "ip", bits=4)
        compare(gpu, got, want)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_look_ups(gpu, bits):
    """Two rows a thread, at sizes around the tiles of that, and several lists a block."""
    rng = np.random.default_rng(bits)
    lists = make_lists(rng, [511, 512, 513, 3, 1024, 0, 257, 4000])
    for nq, m, k in ((70, 3, 10), (70, 16, 40), (1500, 4, 10), (1500, 33, 40)):
        entries = rng.integers(0, 1 << bits, (len(lists[2]), m)).astype(np.uint8)
        lut = rng.integers(-9, 10, (nq, m, 1 << bits)).astype(np.float32)
        probes = probes_of(rng, nq, 7, 8)
        base = rng.integers(-9, 10, probes.shape).astype(np.float32)
        given = on_gpu(gpu, *lists[:4], None, probes)._replace(typical=30_000)
        codes = gpu.put(packed4(entries) if bits == 4 else entries)
        got = _lists.lut8(gpu.put(lut), codes, given, k, "ip", gpu.put(base), bits=bits)
        few = slice(0, nq, nq // 8)  # the reference takes its time
        want = reference.lut8(
            lut[few], entries, base[few], None, None, None, (*lists[:4], None, probes[few]), k, "ip"
        )
        np.testing.assert_array_equal(gpu.get(got[0])[few], want[0])
        np.testing.assert_array_equal(gpu.get(got[1])[few], want[1])
