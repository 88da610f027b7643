"""lutra.address.simhash, fde and ball_carving on CUDA against the reference."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from gpu_arrays import FLOATS, SIZES

import lutra
from lutra.address import FDE
from lutra.address._fde_encoder import tables_of
from lutra.reference import fde as reference


def make(d, lengths=(3, 0, 1, 40, 0, 170, 2)):
    """Small integers: sums and signs are exact."""
    ptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.random.default_rng(d).integers(-4, 5, (ptr[-1], d)).astype(np.float32), ptr


@pytest.mark.parametrize("dtype", FLOATS)
def test_simhash(gpu, dtype):
    for n in SIZES:
        for d, shape in ((5, (5, 3)), (33, (6, 33, 5)), (64, (1, 64, 16)), (97, (97, 31))):
            x = np.random.default_rng(n).integers(-4, 5, (n, d)).astype(np.float32)
            planes = np.random.default_rng(d).integers(-4, 5, shape).astype(np.float32)
            on_gpu, those = gpu.put(x, dtype), gpu.put(planes)
            with gpu.no_sync():
                got = lutra.address.simhash(on_gpu, those)
            assert gpu.owns(got)
            np.testing.assert_array_equal(gpu.get(got), reference.simhash(x, planes))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "e",
    [
        FDE(7, 2, 3, 4), FDE(130, 5, 5, 16), FDE(33, 3, 0, 40, projection="count"),
        FDE(300, 2, 6, projection=None), FDE(17, 6, 4, 3, fill_empty=False), FDE(20, 1, 11, 2),
        FDE(20, 1, 13, 2), FDE(20, 3, 4, 8, final_dim=50),
    ],
    ids=str,
)  # fmt: skip
def test_encodings(gpu, dtype, e):
    tokens, ptr = make(e.d)
    on_gpu, where = gpu.put(tokens, dtype), gpu.put(ptr)
    planes, psi, scale, final = tables_of(e)
    for query in (False, True):
        want = reference.fde(
            tokens, ptr, planes, psi, scale, query=query, fill_empty=e.fill_empty, final=final
        )
        got = lutra.address.fde(on_gpu, where, e, query=query)  # the first call copies the encoder's arrays
        assert gpu.owns(got)
        np.testing.assert_allclose(gpu.get(got), want, rtol=3e-6, atol=3e-5)
        if e.final_dim is None and e.k_sim <= 11:
            with gpu.no_sync():
                again = lutra.address.fde(on_gpu, where, e, query=query)
            np.testing.assert_array_equal(gpu.get(again), gpu.get(got))
    if e.final_dim is None:
        rows = e.encode_queries(on_gpu, where, sparse=True)
        want = reference.fde_blocks(tokens, ptr, planes, psi, scale)
        for one, other in zip(rows, want):
            assert gpu.owns(one)
            np.testing.assert_allclose(gpu.get(one), other, rtol=3e-6, atol=3e-5)


def test_offsets_that_are_none(gpu):
    """Nobody waits to look at them: their documents are NaN, and nothing outside is read."""
    e = FDE(8, 2, 3, 4)
    tokens, _ = make(8, (9,))
    for wrong in ([0, 4, 3, 9], [-5, 2, 5, 9], [0, 4, 10, 9], [2**40, 2**41, 5, 9]):
        got = gpu.get(lutra.address.fde(gpu.put(tokens), gpu.put(np.array(wrong)), e))
        for i, (begin, end) in enumerate(pairwise(wrong)):
            sound = 0 <= begin <= end <= len(tokens)
            assert np.isnan(got[i]).all() != sound and np.isfinite(got[i]).all() == sound


def test_balls(gpu):
    tokens, ptr = make(20)
    got, where = lutra.address.ball_carving(gpu.put(tokens), gpu.put(ptr), 5.0)
    want, bounds = reference.ball_carving(tokens, ptr, 5.0)
    assert gpu.owns(got) and gpu.owns(where)
    np.testing.assert_array_equal(gpu.get(where), bounds)
    np.testing.assert_allclose(gpu.get(got), want, rtol=1e-6)
