"""A bias of the rows in knn and knn_screened (for the encoder of TopKSAE): the results of one more column."""

import numpy as np
import pytest

from lutra import _backend
from lutra._arrays import NUMPY
from lutra.reference import scan as exact
from lutra.scan import _screen
from lutra.scan._knn import _knn

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)

pytestmark = pytest.mark.skipif(_backend.core is None, reason="the bias is for the kernels")


def integers(rng, *shape, top=4):
    """Sums that are exact in any order, with ties."""
    return rng.integers(-top, top, shape).astype(np.float32)


def check(q, x, bias, k, rtol=0.0):
    scores, ids = exact.knn(
        np.concatenate([q, np.ones((len(q), 1), np.float32)], 1), np.concatenate([x, bias[:, None]], 1), k
    )
    codes = _screen._quantize_int8(NUMPY, x, False, bias, 7)
    for found in (
        _knn(NUMPY, q, x, k, "ip", None, bias),
        _screen._knn_screened(NUMPY, q, x, *codes, None, k, "ip", None, bias),
    ):
        np.testing.assert_allclose(found[0], scores, rtol=rtol, atol=rtol * 10)
        assert (found[1] != ids).mean() <= (0.01 if rtol else 0)


@pytest.fixture(params=(True, False), ids=("vnni", "no-vnni"))
def vnni(request, monkeypatch):
    monkeypatch.setattr(_screen, "_VNNI", request.param)


def test_integers_at_odd_sizes(simd_level, vnni):
    rng = np.random.default_rng(0)
    for i, n in enumerate(SIZES):
        for tokens in (1, 2, 5, 12, 13, 33, 49):
            d = SIZES[-1 - i]
            check(integers(rng, tokens, d), integers(rng, n, d), integers(rng, n, top=30), min(n, 1 + n // 3))


def test_real_numbers_and_threads(simd_level, vnni, threads):
    rng = np.random.default_rng(1)
    q, x, bias = (rng.standard_normal(s).astype(np.float32) for s in ((70, 40), (3000, 40), 3000))
    check(q, x, bias * 3, 9, rtol=1e-5)


def test_zero_rows_zero_queries_and_large_biases(simd_level, vnni):
    rng = np.random.default_rng(2)
    q, x, bias = integers(rng, 40, 17), integers(rng, 300, 17), integers(rng, 300, top=9)
    q[::3] = 0
    x[::2] = 0
    check(q, x, bias, 50)
    check(q * np.float32(2e-30), x, bias, 50)
    check(q, x * np.float32(2e-30), bias, 50, rtol=1e-6)
    check(q, x, bias * 1e5, 50)


def test_a_bias_that_is_not_a_number(simd_level):
    rng = np.random.default_rng(3)
    for tokens in (1, 30):
        q, x, bias = integers(rng, tokens, 8), integers(rng, 200, 8), integers(rng, 200)
        bias[77] = np.nan
        with pytest.raises(ValueError, match="77"):
            _knn(NUMPY, q, x, 3, "ip", None, bias)
        bias[77] = np.inf
        assert (_knn(NUMPY, q, x, 3, "ip", None, bias)[1][:, 0] == 77).all()
