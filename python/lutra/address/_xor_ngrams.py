"""xor_ngrams: hashed n-grams of tokens by multiply and xor, in several heads."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import I32, I64, call
from ..reference import ngrams as reference

_TOP = 1 << 31


def xor_ngrams(
    tokens: Any,
    multipliers: Sequence[int],
    moduli: Sequence[int],
    orders: Sequence[int] = (2, 3),
    *,
    pad: int = 0,
) -> Any:
    """Rows of hashed n-grams that end at each token, in several heads a length: Engram's addresses.

    For token ``i`` and length ``n`` of ``orders``, ``mix`` is the exclusive or of ``tokens[i - k] *
    multipliers[k]`` over ``k < n``, modulo 2^64; head ``j`` of that length gives ``mix mod moduli[j]``,
    counted from where the rows of the heads before end.

    Parameters
    ----------
    tokens : array, shape (..., length), int32 or int64
        In [0, 2^31). The last axis is a sequence.
    multipliers : sequence of int
        At least as many as the longest n-gram has tokens; in [0, 2^63). Odd ones lose nothing.
    moduli : sequence of int
        The rows of each head, of all heads of the first length, then of the next; distinct primes, so that
        two n-grams that meet in one head part in another. In all below 2^62.
    orders : sequence of int, default (2, 3)
        Lengths of the n-grams, increasing.
    pad : int, default 0
        The token that stands before a sequence.

    Returns
    -------
    array, shape (..., length, len(moduli)), int64

    Raises
    ------
    IndexError
        A token outside [0, 2^31).
    TypeError, ValueError
        A wrong type, shape or option.

    Notes
    -----
    About 1.5 ns an id. On CUDA tokens are not checked; with more than 96 heads in all or n-grams of more than
    64 tokens torch's own ops compute, where products must stay below 2^63 (as `lutra.nn.Engram` chooses its
    multipliers).

    References
    ----------
    Cheng et al., Conditional Memory via Scalable Lookup: A New Axis of Sparsity for Large Language Models,
    arXiv 2601.07372.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.address.xor_ngrams(np.array([4, 5, 4, 5]), [1, 3], [7, 11], [2])
    array([[ 4, 11],
           [ 2, 16],
           [ 4, 18],
           [ 2, 16]])
    """
    options = ([int(m) for m in multipliers], [int(m) for m in moduli], [int(n) for n in orders], pad)
    return call("xor_ngrams", _xor_ngrams, (tokens,), options)


def check(multipliers, moduli, orders, pad):
    if not orders or any(a >= b for a, b in zip([0, *orders], orders)):
        raise ValueError(f"orders must be increasing lengths of 1 and more, got {orders}")
    if len(multipliers) < orders[-1]:
        raise ValueError(f"multipliers are {len(multipliers)}; n-grams of {orders[-1]} tokens need as many")
    if any(not 0 <= m < 1 << 63 for m in multipliers):
        raise ValueError(f"multipliers must lie in [0, 2^63), got {multipliers}")
    if not moduli or len(moduli) % len(orders):
        raise ValueError(f"moduli are {len(moduli)}; they must be as many for each of {len(orders)} lengths")
    if min(moduli) < 1 or sum(moduli) >= 1 << 62:
        raise ValueError(f"moduli must be 1 at least and below 2^62 in all, got {moduli}")
    _checks.integer("pad", pad, 0, _TOP - 1)


def _xor_ngrams(kind, tokens, multipliers, moduli, orders, pad=0):
    check(multipliers, moduli, orders, pad)
    code = _checks.dtype(kind, tokens, "tokens", (I32, I64))
    if not len(tokens.shape):
        raise ValueError("tokens has no axis; it must hold sequences, shape (..., length)")
    shape, total = tuple(tokens.shape), prod(tokens.shape)
    if kind.cuda and _kernel(kind, moduli, orders):
        tokens = kind.dense(tokens)
        ids = kind.empty((*shape, len(moduli)), I64, tokens)
        first = (np.cumsum(moduli, dtype=np.int64) - moduli).tolist()
        kind.kernels.xor_ngrams(
            kind.ptr(tokens), code, total // shape[-1] if total else 0, shape[-1], multipliers, orders,
            moduli, first, pad, kind.ptr(ids), *kind.launch(tokens),
        )  # fmt: skip
        return ids
    if kind.cuda and kind.name == "torch":
        return composition(tokens, multipliers, moduli, orders, pad)
    if kind.cuda or kind.kernels is None:
        host = kind.to_numpy(tokens)
        _check_tokens(host)
        return kind.from_numpy(reference.xor_ngrams(host, multipliers, moduli, orders, pad), I64, tokens)
    tokens = kind.dense(tokens)
    ids = kind.empty((*shape, len(moduli)), I64, tokens)
    sizes = np.array(moduli, np.int64)
    bad = kind.kernels.xor_ngrams(
        kind.ptr(tokens), code, total // shape[-1] if total else 0, shape[-1], np.array(multipliers,
        np.int64), len(multipliers), np.array(orders, np.int64), len(orders), len(moduli) // len(orders),
        sizes, np.cumsum(sizes) - sizes, pad, kind.ptr(ids),
    )  # fmt: skip
    if bad != -1:
        _check_tokens(kind.to_numpy(tokens))
        raise IndexError("tokens changed while the kernel ran")
    return ids


def _kernel(kind, moduli, orders):
    """Whether the CUDA kernel takes so many heads and such long n-grams."""
    kernels = kind.kernels
    return kernels is not None and len(moduli) <= kernels.xor_heads and orders[-1] <= kernels.xor_order


def _check_tokens(tokens: np.ndarray) -> None:
    bad = (tokens < 0) | (tokens >= _TOP)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise IndexError(f"tokens[{', '.join(map(str, at))}] is {tokens[at]}; it must lie in [0, 2^31)")


def composition(tokens, multipliers, moduli, orders, pad):
    """The same in torch's own ops, on any device; products must stay below 2^63."""
    import torch

    sizes = torch.tensor(moduli, device=tokens.device).view(len(orders), -1)
    first = (sizes.view(-1).cumsum(0) - sizes.view(-1)).view_as(sizes)
    mix, parts, at = torch.zeros_like(tokens, dtype=torch.int64), [], 0
    padded = torch.nn.functional.pad(tokens.long(), (orders[-1] - 1, 0), value=pad)
    for k in range(orders[-1]):
        begin = orders[-1] - 1 - k
        mix = mix ^ (padded[..., begin : begin + tokens.shape[-1]] * multipliers[k])
        if k + 1 in orders:
            parts.append(mix[..., None] % sizes[at] + first[at])
            at += 1
    return torch.cat(parts, -1)
