"""What formats of stored codes share, and how `rq` and `clusters` are encoded."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra.compress.formats._codes import pack
from lutra.compress.formats._residual import greedy, refit


def plain_pack(entries, bits):
    """Entry j of a row takes the bits [j bits, (j + 1) bits), the lowest first."""
    n, m = entries.shape
    out = np.zeros((n, (m * bits + 7) // 8), np.uint8)
    for i in range(n):
        for j in range(m):
            for b in range(bits):
                at = j * bits + b
                out[i, at // 8] |= (int(entries[i, j]) >> b & 1) << at % 8
    return out


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("m", (1, 2, 3, 17))
def test_pack(bits, m):
    entries = np.random.default_rng(bits).integers(0, 1 << bits, (5, m))
    assert np.array_equal(pack(entries, bits), plain_pack(entries, bits))
    assert pack(entries[:0], bits).shape == (0, (m * bits + 7) // 8)


def test_refit_is_least_squares():
    rng = np.random.default_rng(0)
    m, ksub, dim, n = 3, 8, 7, 500
    x = rng.standard_normal((n, dim)).astype(np.float32)
    entries = rng.integers(0, ksub - 1, (n, m)).astype(np.uint8)  # the last centroid of each book has no row
    books = rng.standard_normal((m, ksub, dim)).astype(np.float32)
    chosen = np.zeros((n, m * ksub))
    np.put_along_axis(chosen, entries + np.arange(m) * ksub, 1, 1)
    for weights in (None, rng.uniform(0.1, 9, n)):
        root = np.sqrt(np.ones(n) if weights is None else weights)[:, None]

        def error(b, root=root):
            return np.square(root * (x - chosen @ b)).sum()

        best = error(np.linalg.lstsq(root * chosen, root * x, rcond=None)[0])
        found = refit(x, entries, books, weights)
        assert error(found.reshape(-1, dim)) <= 1.002 * best
        assert np.allclose(found[:, -1], books[:, -1], atol=1e-5)
        scaled = refit(x, entries, books, None if weights is None else 1e6 * weights)
        assert np.allclose(found, scaled, atol=1e-4)


def test_rq_is_better_than_its_greedy_books_and_weighs_by_counts():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((900, 5)) @ rng.standard_normal((5, 24))).astype(np.float32)
    x += 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    found = lutra.compress.format("rq:m=4,bits=4")
    books = greedy(x, 4, 16, 0, False)
    start = {"codebooks": books, "codes": pack(found._entries(x, books), 4)}

    def error(data, rows=slice(None)):
        decoded = lutra.compress.Table(found, x.shape, data).decode()
        return np.square(x - decoded)[rows].sum()

    even = found.encode(x, progress=False)
    assert error(even) < 0.97 * error(start)
    counts = np.where(np.arange(900) < 90, 200.0, 1.0)
    assert error(found.encode(x, counts, progress=False), slice(90)) < 0.8 * error(even, slice(90))


def test_clusters_come_near_twelve_rounds_of_kmeans():
    x = np.random.default_rng(2).standard_normal((4000, 6)).astype(np.float32)
    table = lutra.compress.encode(x, "clusters:m=2,bits=6", progress=False)
    error = np.square(x - table.decode()).sum()
    full = 0.0
    for part in (x[:, :3], x[:, 3:]):
        part = np.ascontiguousarray(part)
        books = lutra.index.kmeans(part, 64, n_iter=12, progress=False).centroids
        full += lutra.address.nearest(part, books).scores.sum()
    assert error < 1.03 * full


@pytest.mark.parametrize(
    "shape, density", (((500, 32), 0.075), ((40, 8), 0.5), ((10, 4), 1.0), ((0, 4), 0.5))
)
def test_fresh_csr_has_entries_in_every_row(shape, density):
    found = lutra.compress.format("csr", density=density)
    data = found.initial(shape, seed=5)
    lengths = np.diff(data["indptr"].astype(np.int64))
    assert lengths.sum() == found.kept(shape) and lengths.max(initial=0) - lengths.min(initial=99) <= 1
    for begin, length in zip(data["indptr"], lengths):
        columns = data["columns"][begin : begin + length]
        assert (np.diff(columns.astype(int)) > 0).all()
    if len(data["columns"]) > 200:
        assert set(data["columns"]) == set(range(shape[1]))
