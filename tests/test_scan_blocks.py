"""The scans of panels by block-sparse queries against the reference."""

import numpy as np
import pytest

from lutra import _backend
from lutra.index._panels import Panels
from lutra.reference import blocks as reference
from lutra.scan import _blocks

SIZES = [1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97]


def rows_of(rng, nq, num_blocks, width, share=0.5, whole=False):
    have = rng.random((nq, num_blocks)) < share
    query, block = np.nonzero(have)
    ptr = np.zeros(nq + 1, np.int64)
    np.cumsum(np.bincount(query, minlength=nq), out=ptr[1:])
    shape = (len(query), width)
    values = rng.integers(-4, 5, shape) if whole else rng.standard_normal(shape)
    return _blocks.Rows(ptr, block.astype(np.int32), values.astype(np.float32))


def panels_of(x, num_blocks, lanes=256):
    panels = Panels(num_blocks, x.shape[1] // num_blocks, lanes, x.dtype)
    panels.reserve(len(x))
    panels.write(0, x)
    panels.grow(len(x))
    return panels


def stored(rng, n, d, dtype, whole=False):
    if dtype == "int8":
        return rng.integers(-127, 128, (n, d)).astype(np.int8)
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
        from lutra._arrays import BF16, NUMPY

        dtype = NUMPY.dtype(BF16)
    values = rng.integers(-4, 5, (n, d)) if whole else rng.standard_normal((n, d))
    return values.astype(dtype)


def expected(rows, panels, k, scale=None, keep=None):
    return reference.blocks(*rows, panels.used, panels.n, k, scale, None, keep)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_odd_sizes(dtype, simd_level, threads):
    rng = np.random.default_rng(0)
    for i, n in enumerate([*SIZES, 255, 256, 257, 600]):
        nq, num_blocks, width = SIZES[-1 - i % 11], SIZES[i % 7], SIZES[(3 * i) % 8]
        x = stored(rng, n, num_blocks * width, dtype)
        rows, panels = rows_of(rng, nq, num_blocks, width), panels_of(x, num_blocks)
        scale = rng.random((n, 1), dtype=np.float32) if dtype == "int8" else None
        k = (1, 3, 10, 60)[i % 4]
        scores, ids = _blocks.scan(rows, panels, k, scale)
        want, want_ids = expected(rows, panels, k, None if scale is None else scale[:, 0])
        tolerance = 1e-5 * np.abs(want[np.isfinite(want)]).max(initial=1)
        np.testing.assert_allclose(scores, want, rtol=1e-4, atol=tolerance)
        same = ids == want_ids  # but where two scores differ by less than what sums in another order do
        full = expected(rows, panels, n, None if scale is None else scale[:, 0])
        for q, j in np.argwhere(~same):
            place = np.flatnonzero(full[1][q] == ids[q, j])[0]
            assert abs(full[0][q, place] - scores[q, j]) <= 4 * tolerance
        assert same.mean() > 0.98 or n < 3


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_ties_go_to_the_lowest_position(dtype, simd_level, threads):
    rng = np.random.default_rng(1)
    x = stored(rng, 700, 24, "float32", whole=True).astype(dtype)  # scores are whole numbers, full of ties
    rows, panels = rows_of(rng, 13, 6, 4, whole=True), panels_of(x, 6)
    for k in (1, 5, 70, 800):
        got, want = _blocks.scan(rows, panels, k), expected(rows, panels, k)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "pq"])
def test_bits_depend_on_neither_batch_nor_threads(dtype, simd_level):
    if _backend.core is None:
        pytest.skip("the reference has no such promise")
    rng = np.random.default_rng(2)
    rows = rows_of(rng, 70, 20, 16, share=0.6)
    books = None
    if dtype == "pq":
        books = rng.standard_normal((40, 8, 256)).astype(np.float32)
        panels = panels_of(rng.integers(0, 256, (1500, 40)).astype(np.uint8), 20, 512)
    else:
        panels = panels_of(stored(rng, 1500, 320, dtype), 20)
    all_at_once = _blocks.scan(rows, panels, 9, books=books)
    for i in range(0, 70, 23):
        one = _blocks.Rows(
            np.array([0, rows.ptr[i + 1] - rows.ptr[i]]),
            rows.blocks[rows.ptr[i] : rows.ptr[i + 1]],
            rows.values[rows.ptr[i] : rows.ptr[i + 1]],
        )
        alone = _blocks.scan(one, panels, 9, books=books)
        assert alone[0].tobytes() == all_at_once[0][i].tobytes()
        assert alone[1].tobytes() == all_at_once[1][i].tobytes()
    for count in (1, 2, 5):
        _backend.core.set_num_threads(count)
        again = _blocks.scan(rows, panels, 9, books=books)
        _backend.core.set_num_threads(0)
        assert again[0].tobytes() == all_at_once[0].tobytes() and (again[1] == all_at_once[1]).all()


def pq_case(seed, n, num_blocks, depth, dsub, nq):
    rng = np.random.default_rng(seed)
    books = rng.standard_normal((num_blocks * depth, 256, dsub)).astype(np.float32)
    codes = rng.integers(0, 256, (n, num_blocks * depth)).astype(np.uint8)
    rows = rows_of(rng, nq, num_blocks, depth * dsub)
    return rows, panels_of(codes, num_blocks, 512), books


@pytest.mark.parametrize("n", [1, 17, 97, 511, 513, 1300])
def test_product_quantization(n, simd_level, features, threads):
    rows, panels, books = pq_case(n, n, 5, 3, 4, 7)
    laid = np.ascontiguousarray(books.transpose(0, 2, 1))
    for k in (1, 10, 400):
        scores, ids = _blocks.scan(rows, panels, k, books=laid)
        want, want_ids = reference.blocks(*rows, panels.used, n, k, None, books)
        np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)
        assert (ids == want_ids).mean() > 0.99


def test_rounded_tables_of_many_look_ups(simd_level, features):
    """More than 256 look-ups, of the greatest entries: 16-bit sums must be taken over in time."""
    rng = np.random.default_rng(3)
    num_blocks = 700
    books = np.full((num_blocks, 256, 1), 1, np.float32)
    books[:, 0] = 0
    codes = rng.integers(1, 256, (600, num_blocks)).astype(np.uint8)
    codes[[3, 599]] = 0
    codes[5, :350] = 0
    codes[100:200, :250] = 0  # more than are scored again, with sums just below 2**16
    panels = panels_of(codes, num_blocks, 512)
    rows = _blocks.Rows(
        np.array([0, num_blocks]),
        np.arange(num_blocks, dtype=np.int32),
        -np.ones((num_blocks, 1), np.float32),
    )
    scores, ids = _blocks.scan(rows, panels, 4, books=np.ascontiguousarray(books.transpose(0, 2, 1)))
    assert ids.tolist() == [[3, 599, 5, 100]] and scores.tolist() == [[0, 0, -350, -450]]


@pytest.mark.parametrize("coded", [False, True])
def test_filters(coded, simd_level, features, threads):
    rng = np.random.default_rng(4)
    n = 1200
    if coded:
        rows, panels, books = pq_case(5, n, 6, 2, 3, 9)
        options = {"books": np.ascontiguousarray(books.transpose(0, 2, 1))}
    else:
        rows, panels, books = rows_of(rng, 9, 6, 7), panels_of(stored(rng, n, 42, "float32"), 6), None
        options = {}
    for mask in (rng.random(n) < 0.5, np.arange(n) == 700, np.arange(n) >= n - 3, np.zeros(n, bool)):
        keep = np.packbits(mask, bitorder="little")
        scores, ids = _blocks.scan(rows, panels, 20, keep=keep, **options)
        want, want_ids = reference.blocks(*rows, panels.used, n, 20, None, books, keep)
        np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)
        assert (ids == want_ids).mean() > 0.99


def test_queries_without_blocks_and_no_queries(simd_level):
    rng = np.random.default_rng(5)
    panels = panels_of(stored(rng, 300, 12, "float32"), 3)
    empty = _blocks.Rows(np.zeros(3, np.int64), np.zeros(0, np.int32), np.zeros((0, 4), np.float32))
    scores, ids = _blocks.scan(empty, panels, 3)
    assert (scores == 0).all() and ids.tolist() == [[0, 1, 2]] * 2
    none = _blocks.Rows(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros((0, 4), np.float32))
    assert _blocks.scan(none, panels, 3)[0].shape == (0, 3)


def test_nan_is_reported(simd_level):
    x = np.ones((300, 4), np.float32)
    x[270, 1] = np.nan
    panels = panels_of(x, 2)
    rows = _blocks.dense_rows(np.ones((1, 4), np.float32), 2)
    with pytest.raises(ValueError, match="row 270 of the index is NaN"):
        _blocks.scan(rows, panels, 3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_rows_are_laid_into_lanes(dtype, simd_level, threads):
    """Additions that begin and end anywhere in a panel."""
    rng = np.random.default_rng(6)
    panels, parts = Panels(7, 81, 256, np.dtype(dtype)), []
    for n in (1, 15, 17, 40, 63, 65, 100, 300, 0, 7):
        parts.append(stored(rng, n, 567, dtype))
        panels.reserve(n + 9)
        panels.write(0, parts[-1][: n // 2])
        panels.write(n // 2, parts[-1][n // 2 :])
        panels.grow(n)
    x = np.concatenate(parts)
    for i in range(0, len(x), 256):
        panel = panels.arrays[i // 256].reshape(567, 256)
        np.testing.assert_array_equal(panel[:, : len(x) - i].T, x[i : i + 256])
    np.testing.assert_array_equal(panels.take(np.arange(len(x))), x)


def test_dense_rows():
    q = np.zeros((3, 6), np.float32)
    q[0, 1], q[0, 5], q[2, 2] = 1, 2, 3
    rows = _blocks.dense_rows(q, 2)
    assert rows.ptr.tolist() == [0, 2, 2, 3] and rows.blocks.tolist() == [0, 2, 1]
    assert rows.values.tolist() == [[0, 1], [0, 2], [3, 0]]
