"""The kernels of lutra.quant against the reference, at every level."""

from __future__ import annotations

import numpy as np
import pytest

from lutra import _backend
from lutra.quant import _kernels
from lutra.reference import quant as reference

pytestmark = pytest.mark.skipif(_backend.core is None, reason="no kernels here")
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("a", (1, 3, 16, 33))
def test_linear(simd_level, a):
    for n in SIZES:
        for b in SIZES:
            x, matrix = normal(n, a), normal(a, b)
            y = _kernels.multiply(x, matrix)
            np.testing.assert_allclose(y, reference.linear(x, matrix), atol=1e-5)
            np.testing.assert_array_equal(_kernels.multiply(x[n // 2 : n // 2 + 1], matrix)[0], y[n // 2])


def test_linear_of_many_rows(simd_level, threads):
    x, matrix = normal(1500, 129), normal(129, 200)
    y = _kernels.multiply(x, matrix)
    np.testing.assert_allclose(y, x @ matrix, atol=1e-4)
    np.testing.assert_array_equal(_kernels.multiply(x[700:709], matrix), y[700:709])


@pytest.mark.parametrize(("m", "ksub", "dsub"), [(1, 2, 1), (3, 4, 5), (5, 16, 2), (8, 16, 4), (2, 256, 8)])
def test_nearest_codes(simd_level, m, ksub, dsub):
    books = normal(m, ksub, dsub)
    for n in SIZES:
        x = normal(n, m * dsub)
        entries = _kernels.pq_entries(x, books)
        errors = np.square(x.reshape(n, m, 1, dsub).astype(np.float64) - books).sum(-1)
        found = np.take_along_axis(errors, entries[:, :, None].astype(np.int64), 2)[:, :, 0]
        np.testing.assert_allclose(found, errors.min(2), atol=1e-5)


@pytest.mark.parametrize("dsub", (1, 2, 3, 4, 5, 8, 16, 17))
@pytest.mark.parametrize("ksub", (2, 16, 256))
def test_decoding(simd_level, dsub, ksub):
    for n in SIZES:
        m = n % 7 + 1
        books = normal(m, ksub, dsub)
        entries = np.random.default_rng(n).integers(0, ksub, (n, m)).astype(np.uint8)
        np.testing.assert_array_equal(
            _kernels.pq_vectors(entries, books), reference.pq_decode(entries, books)
        )


def test_ties_go_to_the_lowest(simd_level):
    books = np.repeat(normal(2, 4, 3), 4, axis=1)  # each centroid four times
    entries = _kernels.pq_entries(normal(50, 6), books)
    assert (entries % 4 == 0).all()


def loss_of(x, books, entries, directions, threshold):
    """The anisotropic loss in float64, from its formula."""
    m = len(books)
    decoded = books[np.arange(m), entries].reshape(len(x), -1).astype(np.float64)
    g = directions.astype(np.float64)
    squares = np.square(g).sum(1)
    share = np.minimum(threshold**2 / squares, 0.81)
    eta = np.maximum((x.shape[1] - 1) * share / (1 - share), 1)
    r = x - decoded
    parallel = (r * g).sum(1) ** 2 / squares
    return eta * parallel + np.square(r).sum(1) - parallel


@pytest.mark.parametrize(("m", "ksub", "dsub"), [(3, 4, 5), (5, 16, 2), (8, 16, 4), (2, 256, 8)])
@pytest.mark.parametrize("own", (True, False))
def test_anisotropic_codes(simd_level, m, ksub, dsub, own):
    books = normal(m, ksub, dsub) / np.float32(np.sqrt(m * dsub))
    better = 0
    for n in SIZES:
        x = normal(n, m * dsub)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        directions = x if own else x + normal(n + 1, m * dsub)[1:] / 10
        given = None if own else directions
        entries = _kernels.pq_entries(x, books, given, 0.6)
        expected = reference.pq_encode(x, books, given, 0.6, _kernels.ROUNDS)
        loss = loss_of(x, books, entries, directions, 0.6)
        # near ties may lead another way, to a loss that is about the same
        same = (entries == expected).all(1)
        assert same.mean() >= 0.9
        np.testing.assert_allclose(loss[same], loss_of(x, books, expected, directions, 0.6)[same], atol=1e-5)
        plain = loss_of(x, books, _kernels.pq_entries(x, books), directions, 0.6)
        assert (loss <= plain + 1e-4).all()
        better += (loss < plain - 1e-2).sum()
        one = None if own else directions[n // 2 : n // 2 + 1]
        np.testing.assert_array_equal(
            _kernels.pq_entries(x[n // 2 : n // 2 + 1], books, one, 0.6)[0], entries[n // 2]
        )
    assert better > 40


def test_zero_directions_are_as_none(simd_level):
    books, x = normal(4, 16, 2), normal(33, 8)
    zeros = np.zeros_like(x)
    np.testing.assert_array_equal(_kernels.pq_entries(x, books, zeros, 0.2), _kernels.pq_entries(x, books))


@pytest.mark.parametrize(("m", "ksub"), [(1, 2), (3, 4), (5, 16), (4, 50), (2, 256)])
@pytest.mark.parametrize("beam", (1, 2, 5, 33))
def test_residual_codes(simd_level, m, ksub, beam):
    books = normal(m, ksub, 7) / np.arange(1, m + 1, dtype=np.float32)[:, None, None]
    gram = _kernels.rq_gram(books)
    for n in (1, 3, 17, 65):
        x = normal(n, 7)
        entries = _kernels.rq_entries(x, books, gram, beam)
        dots = reference.linear(x, books.reshape(-1, 7).T)
        expected = reference.rq_encode(dots, np.diagonal(gram), gram, m, beam)[0][:, 0]

        def error(codes, x=x):
            return np.square(x - sum(books[j][codes[:, j]] for j in range(m))).sum(1)

        np.testing.assert_allclose(error(entries), error(expected), atol=1e-4)
        assert (entries == expected).all(1).mean() >= 0.9
        if beam >= ksub ** (m - 1):  # wide enough to try every code
            every = np.stack(np.meshgrid(*[np.arange(ksub)] * m, indexing="ij"), -1).reshape(-1, m)
            sums = sum(books[j][every[:, j]] for j in range(m))
            best = np.square(x[:, None] - sums).sum(-1).min(1)
            np.testing.assert_allclose(error(entries), best, atol=1e-4)


@pytest.mark.parametrize(("m", "ksub"), [(1, 2), (3, 4), (5, 16), (4, 50), (2, 256)])
@pytest.mark.parametrize("beam", (1, 2, 5, 33))
def test_residual_codes_book_by_book(simd_level, threads, m, ksub, beam):
    """As training goes: one codebook after the other, with all partial codes and their scores."""
    books = normal(m, ksub, 7) / np.arange(1, m + 1, dtype=np.float32)[:, None, None]
    whole = _kernels.rq_gram(books)
    gram = np.zeros_like(whole)  # what is filled in is all that may be read
    for n in (0, 1, 17, 200):
        x = normal(n + 1, 7)[1:]
        codes, reached = np.empty((n, 1, 0), np.uint8), np.zeros((n, 1), np.float32)
        for j in range(m):
            new = slice(j * ksub, (j + 1) * ksub)
            gram[: new.stop, new] = whole[: new.stop, new]
            dots = _kernels.multiply(x, books[j].T)
            expected, scores = reference.rq_encode(
                dots, np.diagonal(gram), gram, m, beam, j, j + 1, codes, reached, beam
            )
            codes, reached = _kernels.rq_extend(dots, gram, m, beam, codes, reached)
            assert codes.shape == expected.shape == (n, min(beam, ksub ** (j + 1)), j + 1)
            np.testing.assert_allclose(reached, scores, atol=1e-4)
            assert n == 0 or (codes == expected).all(2).mean() >= 0.9
            assert (np.diff(reached, axis=1) >= 0).all()
            left = x[:, None] - sum(books[i][codes[:, :, i]] for i in range(j + 1))
            np.testing.assert_allclose(
                reached + np.square(x).sum(1)[:, None], np.square(left).sum(-1), atol=1e-4
            )
        np.testing.assert_array_equal(codes[:, 0], _kernels.rq_entries(x, books, whole, beam))


def test_equal_residual_codes_go_to_the_lowest(simd_level):
    books = np.repeat(normal(3, 8, 5), 4, axis=1)  # each centroid four times
    entries = _kernels.rq_entries(normal(50, 5), books, _kernels.rq_gram(books), 4)
    assert (entries % 4 == 0).all()


def test_a_beam_without_room_is_refused():
    one, codes = np.zeros((1, 4), np.float32), np.zeros((1, 5, 2), np.uint8)
    gram = np.zeros((8, 8), np.float32)
    wrong = ((0, 1, 9, 5, "keep"), (1, 3, 1, 1, "codebooks"), (1, 2, 1, 1, "start"))
    for begin, end, width, keep, why in wrong:
        with pytest.raises(ValueError, match=why):
            _backend.core.rq_encode(
                one, one, gram, 1, 2, 4, 5, begin, end, width, keep, None, None, codes, None
            )
