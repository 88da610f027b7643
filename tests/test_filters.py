"""The filters of searches: every kind gives the same bitmap."""

import numpy as np
import pytest

from lutra import _device_filters, _filters
from lutra._arrays import torch_kind
from lutra.index._ids import Ids


def packed(mask):
    return np.packbits(mask, bitorder="little")


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
def test_every_kind_gives_the_same_bitmap(n):
    rng = np.random.default_rng(n)
    mask = rng.random(n) < 0.3
    want, rows = packed(mask), np.flatnonzero(mask)
    twice = rng.permutation(np.concatenate([rows, rows]))
    kinds = [
        mask, np.repeat(mask, 2)[::2], want, rows, twice.astype(np.int32), rows.astype(np.uint64),
        twice.tolist(), set(rows.tolist()), tuple(rows.tolist()), lambda ids: mask[ids],
    ]  # fmt: skip
    for one in kinds:
        got = _filters.resolve(one, n)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, want)
    assert _filters.count(want) == mask.sum()
    np.testing.assert_array_equal(_filters.positions(want, n), rows)
    assert _filters.resolve(None, n) is None
    np.testing.assert_array_equal(_filters.resolve(range(n), n), packed(np.ones(n, bool)))
    np.testing.assert_array_equal(_filters.resolve([], n), packed(np.zeros(n, bool)))


def test_bits_behind_the_end_are_cleared_in_a_copy():
    bits = np.full(2, 255, np.uint8)
    np.testing.assert_array_equal(_filters.resolve(bits, 11), [255, 7])
    assert bits[1] == 255
    assert _filters.resolve(bits, 16) is bits


def index_ids(ids):
    there = Ids()
    there.add(there.check_new(ids, len(ids)), len(ids))
    return there


@pytest.mark.parametrize("order", ["increasing", "mixed", "positions"])
def test_ids_of_an_index(order):
    rng = np.random.default_rng(0)
    ids = rng.choice(5000, 300, replace=False)
    ids = np.sort(ids) if order == "increasing" else np.arange(300) if order == "positions" else ids
    passing = rng.choice(5000, 700, replace=False)  # most of them not in the index
    mask = np.zeros(5000, bool)
    mask[passing] = True
    want = packed(np.isin(ids, passing))
    positions = order == "positions"
    for there in [index_ids(ids)] if positions else [index_ids(ids), ids]:
        np.testing.assert_array_equal(
            _filters.resolve(passing[passing < 300] if positions else passing, 300, there), want
        )
        np.testing.assert_array_equal(_filters.resolve(mask[:300] if positions else mask, 300, there), want)
        np.testing.assert_array_equal(
            _filters.resolve(packed(mask[:300] if positions else mask), 300, there), want
        )
        np.testing.assert_array_equal(_filters.resolve(lambda some: np.isin(some, passing), 300, there), want)


def test_ids_beyond_a_bitmap_do_not_pass():
    there = index_ids(np.array([3, 100, 17, 16]))
    for bitmap in (np.ones(17, bool), np.full(2, 255, np.uint8)):
        want = there.array < (17 if bitmap.dtype == bool else 16)
        np.testing.assert_array_equal(_filters.resolve(bitmap, 4, there), packed(want))
        np.testing.assert_array_equal(_filters.resolve(bitmap[:0], 4, there), [0])


def test_a_callable_is_called_once_and_cannot_change_the_ids():
    there, calls = index_ids(np.array([5, 3, 9])), []

    def passes(ids):
        calls.append(ids.dtype)
        passing = ids > 4
        ids[:] = 0
        return passing

    np.testing.assert_array_equal(_filters.resolve(passes, 3, there), [0b101])
    assert calls == [np.int64]
    np.testing.assert_array_equal(there.array, [5, 3, 9])


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    mask = torch.tensor([True, False, True])
    for one in (mask, torch.tensor([5], dtype=torch.uint8), torch.tensor([2, 0]), lambda ids: mask):
        np.testing.assert_array_equal(_filters.resolve(one, 3), [5])


@pytest.mark.parametrize(
    ("filter", "error", "message"),
    [
        (3, TypeError, "filter must be a bool array, packed bits.*got int"),
        ("all", TypeError, "got str"),
        (np.ones(4), TypeError, "filter has dtype float64"),
        ([0.5], TypeError, "filter is a list of float64"),
        ([[1], [2, 3]], TypeError, "filter must be"),
        (np.ones((2, 2), bool), ValueError, r"filter must be 1-d, got shape \(2, 2\)"),
        (np.ones(9, bool), ValueError, "filter has 9 bools; it needs 10"),
        (np.ones(3, np.uint8), ValueError, "filter has 3 bytes of packed bits; it needs 2, for 10 rows"),
        ([1, 10], IndexError, r"filter\[1\] is 10; rows must lie in \[0, 10\)"),
        ([-1], IndexError, r"filter\[0\] is -1"),
        (np.array([2**63], np.uint64), ValueError, "less than 2"),
        (lambda ids: None, TypeError, r"returned a NoneType; it must return a bool array of shape \(10,\)"),
        (lambda ids: ids, TypeError, r"filter returned int64 of shape \(10,\)"),
        (lambda ids: ids[1:] > 0, TypeError, r"filter returned bool of shape \(9,\)"),
    ],
)  # fmt: skip
def test_bad_filters(filter, error, message):
    with pytest.raises(error, match=message):
        _filters.resolve(filter, 10)


# ---- the same by the operations of the array's library, as on a GPU
def there(filter, n, ids=None):
    torch = pytest.importorskip("torch")
    like, table = torch.empty(0), None if ids is None else lambda: torch.from_numpy(ids.array)
    increasing = ids is not None and ids.increasing
    return _device_filters.resolve(
        torch_kind(False), like, torch.from_numpy(filter), n, table, increasing
    ).numpy()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 100])
def test_arrays_where_they_lie(n):
    rng = np.random.default_rng(n)
    mask = rng.random(n) < 0.4
    want, rows = packed(mask), np.flatnonzero(mask)
    twice = rng.permutation(np.concatenate([rows, rows]))
    names = ("int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
    outside = np.concatenate([rows, [-1, n, n + 5, -(2**62)]])
    for one in (mask, want, outside, *(twice.astype(name) for name in names)):
        got = there(one, n)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("order", ["increasing", "mixed"])
@pytest.mark.parametrize("n", [1, 8, 65, 300])
def test_ids_of_an_index_where_they_lie(n, order):
    rng = np.random.default_rng(n)
    ids = rng.choice(5000, n, replace=False)
    ids = index_ids(np.sort(ids) if order == "increasing" else ids)
    for size in (0, 1, 17, 4000, 6000):
        mask = rng.random(size) < 0.4
        named = rng.permutation(np.flatnonzero(mask))
        for one in (mask, packed(mask), named, np.array([-1, 4999, 7000])):
            np.testing.assert_array_equal(there(one, n, ids), _filters.resolve(one, n, ids))


def test_what_arrays_are_refused_where_they_lie():
    with pytest.raises(ValueError, match="filter has 3 bools; it needs 4"):
        there(np.ones(3, bool), 4)
    with pytest.raises(ValueError, match="filter has 2 bytes of packed bits; it needs 1, for 4 rows"):
        there(np.ones(2, np.uint8), 4)
    with pytest.raises(ValueError, match="filter must be 1-d"):
        there(np.ones((2, 2), bool), 4)
    with pytest.raises(TypeError, match="filter has dtype float32"):
        there(np.ones(4, np.float32), 4)
