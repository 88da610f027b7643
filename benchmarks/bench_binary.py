"""Benchmarks of packed bits beside FAISS's IndexBinaryFlat, and of sign bits."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra.bench import Prepared

BATCHES = (1, 4, 16, 64, 1024)


@pytest.fixture(scope="module")
def faiss():
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(lutra.get_num_threads())
    return faiss


@pytest.mark.parametrize("bits", [128, 256, 384, 1024])
@pytest.mark.parametrize("batch", BATCHES)
def test_hamming(measure, full, faiss, bits, batch):
    """Random bits, k = 10. FAISS computes one query on one thread, whatever it is allowed."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (1_000_000 if full else 100_000, bits // 8), dtype=np.uint8)
    q = rng.integers(0, 256, (batch, bits // 8), dtype=np.uint8)
    theirs = faiss.IndexBinaryFlat(bits)
    theirs.add(x)

    def check():
        np.testing.assert_array_equal(lutra.scan.binary(q, x).scores, theirs.search(q, 10)[0])

    ours, other = (lambda: lutra.scan.binary(q, x)), (lambda: theirs.search(q, 10))
    measure(Prepared(ours, check, {"faiss": other}, bytes=x.nbytes))


def test_binarize(measure, full):
    x = np.random.default_rng(0).standard_normal((200_000 if full else 20_000, 384), dtype=np.float32)

    def theirs():
        return np.packbits(x > 0, axis=1, bitorder="little")

    def check():
        np.testing.assert_array_equal(lutra.address.binarize(x), theirs())

    measure(Prepared(lambda: lutra.address.binarize(x), check, {"numpy": theirs}, bytes=x.nbytes))
