"""hash_features: many hashes of an id as real numbers."""

from __future__ import annotations

import functools
from math import prod
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import F32, I32, I64, call
from ..reference import hashes as reference


def hash_features(ids: Any, k: int = 1024, *, buckets: int = 1_000_000, seed: int = 0) -> Any:
    """``k`` hashes of each id as numbers in [-1, 1]: the dense code of deep hash embedding.

    Feature ``j`` of id ``x`` is ``2 (((a_j x + b_j) mod p_j) mod buckets) / (buckets - 1) - 1``. The primes
    ``p_j`` are the ``k`` greatest below 2^31, ``a_j`` and ``b_j`` come from SplitMix64 of the seed: nothing
    is stored.

    Parameters
    ----------
    ids : array, shape (...), int32 or int64
        In [0, 2^32).
    k : int, default 1024
        1 to 65,536.
    buckets : int, default 1,000,000
        2 to 2^31 - 1.
    seed : int, default 0
        Taken modulo 2^64.

    Returns
    -------
    array, shape (..., k), float32

    Raises
    ------
    IndexError
        An id outside [0, 2^32).
    TypeError, ValueError
        A wrong type or option.

    Notes
    -----
    The same bits at every SIMD level and on CUDA, where ids are not checked: those out of range give NaN.
    Cost: 4 k bytes written an id.

    References
    ----------
    Kang, Cheng, Yao, Yi, Chen, Hong, Chi, Learning to Embed Categorical Features without Embedding Tables for
    Recommendation, KDD 2021, arXiv 2010.10784.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.address.hash_features(np.array([3, 4]), 8).shape
    (2, 8)
    """
    return call("hash_features", _hash_features, (ids,), (k, buckets, seed))


def _options(k, buckets, seed):
    _checks.integer("k", k, 1, 1 << 16)
    _checks.integer("buckets", buckets, 2, (1 << 31) - 1)
    return _checks.integer("seed", seed)


@functools.lru_cache(maxsize=32)
def _doubles(k, seed):
    """The coefficients as the kernel takes them."""
    return tuple(c.astype(np.float64) for c in reference.coefficients(k, seed))


_devices: dict[tuple[str, int, int, int], Any] = {}


def _on_device(kind, k, seed, like):
    """Coefficients and inverses of the primes on the device of ``like``; kept, so that graphs can be made."""
    key = (kind.name, kind.launch(like)[0], k, seed)
    if key not in _devices:
        if len(_devices) >= 256:
            _devices.pop(next(iter(_devices)))
        a, b, p = (c.astype(np.int64) for c in reference.coefficients(k, seed))
        inverse = ((1 << 64) - 1) // p.astype(object)
        _devices[key] = kind.from_numpy(np.stack([a, b, p, inverse.astype(np.int64)]), I64, like)
    return _devices[key]


def _hash_features(kind, ids, k=1024, buckets=1_000_000, seed=0):
    seed = _options(k, buckets, seed)
    code = _checks.dtype(kind, ids, "ids", (I32, I64))
    if kind.cuda and kind.kernels is not None:
        shape, ids = tuple(ids.shape), kind.dense(ids)
        out, given = kind.empty((*shape, k), F32, ids), _on_device(kind, k, seed, ids)
        kind.kernels.hash_features(
            kind.ptr(ids),
            code,
            prod(shape),
            k,
            kind.ptr(given),
            float(buckets),
            kind.ptr(out),
            *kind.launch(ids),
        )
        return out
    if kind.cuda:
        if kind.name != "torch":
            _checks.no_kernel(kind, "hash_features")
            return kind.from_numpy(
                reference.hash_features(kind.to_numpy(ids), k, buckets=buckets, seed=seed), F32, ids
            )
        return composition(ids, k, buckets, seed)
    if kind.kernels is None:
        host = kind.to_numpy(ids)
        return kind.from_numpy(reference.hash_features(host, k, buckets=buckets, seed=seed), F32, ids)
    shape = tuple(ids.shape)
    ids = kind.dense(ids)
    out = kind.empty((*shape, k), F32, ids)
    a, b, p = _doubles(k, seed)
    bad = kind.kernels.hash_features(
        kind.ptr(ids), code, prod(shape), k, a, b, p, float(buckets), kind.ptr(out)
    )  # fmt: skip
    if bad != -1:
        reference.check_ids(kind.to_numpy(ids))
        raise IndexError("ids changed while the kernel ran")
    return out


def composition(ids, k, buckets, seed):
    """The same in torch's own ops, on any device."""
    import torch

    a, b, p = (torch.tensor(c, device=ids.device) for c in reference.coefficients(k, seed))
    # a x + b is below 2^63 for all ids below 2^32
    r = (a * ids.long().unsqueeze(-1) + b) % p % buckets
    return ((2 * r.double() - (buckets - 1)) * (1 / (buckets - 1))).float()
