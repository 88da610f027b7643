"""lutra.address.hash_features against the formula."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra.reference import hashes as reference

torch = pytest.importorskip("torch")


def test_reference_is_the_formula():
    a, b, p = reference.coefficients(5, 7)
    assert p.tolist() == [2147483647, 2147483629, 2147483587, 2147483579, 2147483563]  # known primes
    got = reference.hash_features(np.array([0, 3, 2**32 - 1]), 5, buckets=1000, seed=7)
    for i, x in enumerate((0, 3, 2**32 - 1)):
        for j in range(5):
            h = (int(a[j]) * x + int(b[j])) % int(p[j]) % 1000
            assert got[i, j] == pytest.approx(2 * h / 999 - 1, abs=1e-7)


@pytest.mark.parametrize("k", (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 97))
def test_kernel_has_the_bits_of_the_reference(simd_level, k):
    rng = np.random.default_rng(k)
    ids = np.concatenate([rng.integers(0, 2**32, 200), [0, 1, 2**31 - 1, 2**31, 2**32 - 1]])
    for buckets in (2, 3, 1000, 1_000_000, 2**31 - 1):
        want = reference.hash_features(ids, k, buckets=buckets, seed=k)
        assert np.array_equal(lutra.address.hash_features(ids, k, buckets=buckets, seed=k), want)


def test_ids_whose_hash_is_a_multiple_of_the_prime(simd_level):
    """a x + b = 0 mod p, and its neighbours: where a rounded quotient is off by one."""
    a, b, p = (c.tolist() for c in reference.coefficients(64, 0))
    ids = [(-b[j] * pow(a[j], -1, p[j])) % p[j] + d * p[j] for j in range(64) for d in (0, 1)]
    ids = np.array([i + d for i in ids for d in (-1, 0, 1) if 0 <= i + d < 2**32])
    want = reference.hash_features(ids, 64)
    assert (want == -1).any()
    assert np.array_equal(lutra.address.hash_features(ids, 64), want)


def test_shapes_kinds_and_threads(threads):
    ids = np.random.default_rng(0).integers(0, 10**6, (30, 40))
    want = reference.hash_features(ids, 96)
    assert want.shape == (30, 40, 96) and abs(want.mean()) < 0.01 and 0.55 < want.std() < 0.6
    for given in (torch.from_numpy(ids), torch.from_numpy(ids).int(), torch.from_numpy(ids.T.copy()).T):
        assert np.array_equal(lutra.address.hash_features(given, 96).numpy(), want)
    assert lutra.address.hash_features(ids[:0], 96).shape == (0, 40, 96)
    from lutra.address._hash_features import composition

    assert np.array_equal(composition(torch.from_numpy(ids), 96, 1_000_000, 0).numpy(), want)
    torch.library.opcheck(torch.ops.lutra.hash_features.default, (torch.from_numpy(ids), 8, 1000, 3))


def test_seeds_differ():
    ids = np.arange(100)
    a, b = (lutra.address.hash_features(ids, 32, seed=s) for s in (0, 1))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1
    assert np.array_equal(b, lutra.address.hash_features(ids, 32, seed=1 + 2**64))


def test_bad_input():
    call = lutra.address.hash_features
    with pytest.raises(IndexError, match=r"ids\[1\] is -1"):
        call(np.array([0, -1]))
    with pytest.raises(IndexError, match=r"ids\[0, 1\] is 4294967296"):
        call(torch.tensor([[0, 2**32]]))
    with pytest.raises(TypeError, match="ids"):
        call(np.zeros(3))
    with pytest.raises(ValueError, match="k"):
        call(np.arange(3), 0)
    with pytest.raises(ValueError, match="buckets"):
        call(np.arange(3), 4, buckets=1)
