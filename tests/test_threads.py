"""The pool of threads: many callers at once, jobs within jobs' time, a forked child."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lutra
from lutra import _backend, scan

pytestmark = pytest.mark.skipif(_backend.core is None, reason="needs the compiled module")


@pytest.fixture
def four_threads():
    lutra.set_num_threads(4)
    yield
    lutra.set_num_threads(0)


def test_many_callers_at_once(four_threads):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, 48), dtype=np.float32)
    queries = [rng.standard_normal((1 + i % 7, 48), dtype=np.float32) for i in range(64)]
    want = [scan.knn(q, x, 5) for q in queries]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, expected in zip(pool.map(lambda q: scan.knn(q, x, 5), queries), want):
                np.testing.assert_array_equal(got.ids, expected.ids)
                np.testing.assert_array_equal(got.scores, expected.scores)


def test_changing_the_number_of_threads(four_threads):
    rng = np.random.default_rng(1)
    x, q = rng.standard_normal((30_000, 32), dtype=np.float32), rng.standard_normal((3, 32), dtype=np.float32)
    want = scan.knn(q, x, 9)
    for threads in (1, 2, 3, 16, 5, 1, 300):
        lutra.set_num_threads(threads)
        got = scan.knn(q, x, 9)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.scores, want.scores)
