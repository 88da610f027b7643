"""Reference of `lutra.address.hash_features`."""

from __future__ import annotations

import functools

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _splitmix(state):
    """The generator SplitMix64: (value, next state)."""
    state = (state + _GOLDEN) & _MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31), state


def primes_below(top, count):
    """The ``count`` greatest primes below ``top``, decreasing."""
    small = np.ones(int(top**0.5) + 1, bool)
    small[:2] = False
    for i in range(2, int(len(small) ** 0.5) + 1):
        if small[i]:
            small[i * i :: i] = False
    divisors = np.flatnonzero(small)
    found: list[int] = []
    end, size = top, max(32 * count, 1 << 12)
    while len(found) < count and end > 2:
        begin = max(end - size, 2)
        prime = np.ones(end - begin, bool)
        for d in divisors[divisors < end**0.5 + 1]:
            first = max(-(-begin // d), 2) * d
            prime[first - begin :: d] = False
        found += (begin + np.flatnonzero(prime)[::-1]).tolist()
        end = begin
    return np.array(found[:count], np.int64)


@functools.lru_cache(maxsize=32)
def coefficients(k, seed):
    """(a, b, p), (k,) int64 each: p the k greatest primes below 2^31, 1 <= a < p, 0 <= b < p."""
    p = primes_below(1 << 31, k)
    state, a, b = seed & _MASK, [], []
    for prime in p.tolist():
        value, state = _splitmix(state)
        a.append(1 + value % (prime - 1))
        value, state = _splitmix(state)
        b.append(value % prime)
    out = np.array(a, np.int64), np.array(b, np.int64), p
    for array in out:
        array.flags.writeable = False
    return out


def check_ids(ids):
    bad = (ids < 0) | (ids.astype(np.int64) >> 32 != 0)
    if bad.any():
        at = np.unravel_index(int(bad.reshape(-1).argmax()), ids.shape)
        raise IndexError(f"ids[{', '.join(map(str, at))}] is {ids[at]}; ids must lie in [0, 2^32)")


def hash_features(ids, k, *, buckets=1_000_000, seed=0):
    """Hash features, (..., k) float32; see `lutra.address.hash_features`."""
    check_ids(ids)
    a, b, p = (c.astype(np.uint64) for c in coefficients(k, seed))
    x = ids.astype(np.uint64)[..., None]
    r = (a * x + b) % p % np.uint64(buckets)
    return ((2 * r.astype(np.float64) - (buckets - 1)) * (1 / (buckets - 1))).astype(np.float32)
