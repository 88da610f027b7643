"""longest_match: the longest n-gram of a vocabulary that ends at each token."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import I32, I64, call
from ..reference import fgrams as reference
from ._ngrams import _offsets

_INTEGERS = (I32, I64)


class Matches(NamedTuple):
    """Result of `longest_match`: the id of an n-gram at each token, or -1, and its length, or 1."""

    ids: Any
    lengths: Any


def longest_match(tokens: Any, vocabulary: Any, offsets: Any = None) -> Matches:
    """The longest n-gram of a vocabulary that ends at each token.

    Parameters
    ----------
    tokens : array, shape (..., length) or, with ``offsets``, (total,); int32 or int64
        Token ids in [0, 2^30). The last axis is a sequence; nothing is matched across sequences.
    vocabulary : lutra.vocab.FGrams
    offsets : array, shape (sequences,), int32 or int64, optional
        For 1-d tokens: where each sequence begins. Without it they are one.

    Returns
    -------
    ids : array, the shape of tokens, int64
        The id of the longest n-gram of ``vocabulary`` that ends at the token, or -1 where there is none.
    lengths : array, the shape of tokens, int32
        Its length in tokens; 1 where there is none.

    Raises
    ------
    TypeError, ValueError
        Wrong types or shapes.
    IndexError
        A token outside [0, 2^30).

    Notes
    -----
    Exact: keys are kept whole, so that a match is never a collision. Cost: one random read of a cache line
    for each token of the match, and one more where a longer one might begin; 64 tokens are looked up
    together, so that the reads overlap. On CUDA neither tokens nor offsets are checked: a token out of range
    matches nothing.

    References
    ----------
    Yu, Cohen, Ghazi, Huang, Kamath, Kumar, Liu, Zhang, Scaling Embedding Layers in Language Models (SCONE),
    arXiv 2502.01637.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> fgrams = lutra.vocab.FGrams([(5, 6), (5, 6, 7)])
    >>> lutra.address.longest_match(np.array([5, 6, 7, 7]), fgrams)
    Matches(ids=array([-1,  0,  1, -1]), lengths=array([1, 2, 3, 1], dtype=int32))
    """
    try:
        table, n, longest = vocabulary.buckets, len(vocabulary), vocabulary.max_length
    except (AttributeError, TypeError):
        raise TypeError(
            f"vocabulary must be a lutra.vocab.FGrams, got {type(vocabulary).__qualname__}"
        ) from None
    table = vocabulary.table_for(tokens)
    return Matches(*call("longest_match", _longest_match, (tokens, offsets, table), (n, longest)))


def _longest_match(kind, tokens, offsets, buckets, n_ngrams, max_length):
    code = _checks.dtype(kind, tokens, "tokens", _INTEGERS)
    if not len(tokens.shape):
        raise ValueError("tokens has no axis; it must hold sequences, shape (..., length)")
    total = prod(tokens.shape)
    if kind.cuda and kind.kernels is not None:
        return _on_cuda(kind, tokens, offsets, buckets, n_ngrams, max_length, code)
    starts = _starts(kind, tokens, offsets, total)
    if kind.cuda:
        if kind.name != "torch":
            _checks.no_kernel(kind, "longest_match")
        return composition(tokens, starts, buckets, n_ngrams, max_length)
    if kind.kernels is None:
        host = kind.to_numpy(tokens)
        found = _walk(host.reshape(-1).astype(np.int64), starts, kind.to_numpy(buckets), n_ngrams, max_length)
        _check_tokens(host)
        ids, lengths = (a.reshape(host.shape) for a in found)
        return kind.from_numpy(ids, I64, tokens), kind.from_numpy(lengths, I32, tokens)
    shape, tokens = tuple(tokens.shape), kind.dense(tokens)
    ids, lengths = kind.empty(shape, I64, tokens), kind.empty(shape, I32, tokens)
    bad = kind.kernels.longest_match(
        kind.ptr(tokens), code, total, starts, len(starts) - 1, kind.ptr(buckets), len(buckets), n_ngrams,
        max_length, kind.ptr(ids), kind.ptr(lengths),
    )  # fmt: skip
    if bad != -1:
        _check_tokens(kind.to_numpy(tokens))
        raise IndexError("tokens changed while the kernel ran")
    return ids, lengths


def _on_cuda(kind, tokens, offsets, buckets, n_ngrams, max_length, code):
    """By the kernel, without waiting for the device: offsets are taken as they are."""
    shape, total, length = tuple(tokens.shape), prod(tokens.shape), tokens.shape[-1]
    if offsets is not None:
        if _check_offsets(kind, tokens, offsets) == I32:
            offsets = kind.cast(offsets, I64)
        offsets, length = kind.dense(offsets), 0
    tokens, buckets = kind.dense(tokens), kind.dense(buckets)
    ids, lengths = kind.empty(shape, I64, tokens), kind.empty(shape, I32, tokens)
    if offsets is not None and offsets.shape[0] == 0 and total:
        raise ValueError(f"offsets is empty, but tokens has {total} values")
    kind.kernels.longest_match(
        kind.ptr(tokens), code, total, length, None if offsets is None else kind.ptr(offsets),
        0 if offsets is None else offsets.shape[0], kind.ptr(buckets), buckets.shape[0], n_ngrams, max_length,
        kind.ptr(ids), kind.ptr(lengths), *kind.launch(tokens),
    )  # fmt: skip
    return ids, lengths


def _check_offsets(kind, tokens, offsets):
    """Checks that need no data; the dtype's code."""
    _checks.same_kind(kind, offsets, "offsets", tokens, "tokens")
    code = _checks.dtype(kind, offsets, "offsets", _INTEGERS)
    _checks.ndim(offsets, "offsets", 1)
    if len(tokens.shape) != 1:
        raise ValueError(f"offsets go with 1-d tokens only, got shape {tuple(tokens.shape)}")
    return code


def _starts(kind, tokens, offsets, total):
    """Where sequences begin, with the end appended; on the host."""
    if offsets is None:
        length = tokens.shape[-1]
        return np.arange(0, total + 1, length, dtype=np.int64) if length else np.zeros(1, np.int64)
    _check_offsets(kind, tokens, offsets)
    return _offsets(kind.to_numpy(offsets), total)


def _check_tokens(tokens: np.ndarray) -> None:
    bad = (tokens < 0) | (tokens >= reference.NODE)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise IndexError(f"tokens[{', '.join(map(str, at))}] is {tokens[at]}; it must lie in [0, 2^30)")


def _walk(tokens, starts, buckets, n_ngrams, max_length):
    """The trie in NumPy: all tokens take each step together."""
    ids, lengths = np.full(len(tokens), -1, np.int64), np.ones(len(tokens), np.int32)
    place = np.arange(len(tokens)) - np.repeat(starts[:-1], np.diff(starts))
    at, node = np.arange(len(tokens)), tokens
    for length in range(2, max_length + 1):
        far = place[at] >= length - 1
        at, node = at[far], node[far]
        node = reference.lookup(node << 32 | tokens[at - length + 1], buckets).astype(np.int64)
        found = node >= 0
        at, node = at[found], node[found]
        match = node < n_ngrams
        ids[at[match]], lengths[at[match]] = node[match], length
        node = node | reference.NODE
    return ids, lengths


def composition(tokens, starts, buckets, n_ngrams, max_length):
    """The same in torch's own ops, on any device."""
    import torch

    device, flat = tokens.device, tokens.reshape(-1).long()
    starts = torch.as_tensor(starts, device=device)
    index = torch.arange(flat.numel(), device=device)
    place = index - starts[torch.searchsorted(starts, index, right=True) - 1] if flat.numel() else index
    ids, lengths = torch.full_like(flat, -1), torch.ones_like(flat, dtype=torch.int32)
    node, alive = flat, torch.ones_like(flat, dtype=torch.bool)
    for length in range(2, max_length + 1):
        alive = alive & (place >= length - 1)
        keys = node << 32 | flat[(index - length + 1).clamp(min=0)]
        child = _torch_lookup(torch.where(alive, keys, -1), buckets)
        alive = child >= 0
        match = alive & (child < n_ngrams)
        ids = torch.where(match, child, ids)
        lengths = torch.where(match, length, lengths)
        node = child | reference.NODE
    return ids.reshape(tokens.shape), lengths.to(torch.int32).reshape(tokens.shape)


def _torch_lookup(keys, buckets):
    import torch

    n = buckets.shape[0]

    def shifted(h, by):  # logical, which torch's >> of int64 is not
        return (h >> by) & ((1 << (64 - by)) - 1)

    def signed(c):
        return c - (1 << 64) if c >> 63 else c

    h = (keys ^ shifted(keys, 32)) * signed(0x9E3779B97F4A7C15)
    h = (h ^ shifted(h, 29)) * signed(0xBF58476D1CE4E5B9)
    h = h ^ shifted(h, 32)
    at = (shifted(h, 32) * n) >> 32
    out = torch.full_like(keys, -1)
    seeking = keys != reference.NO_KEY
    while bool(seeking.any()):
        rows = buckets[at]
        numbers = rows[:, reference.SLOTS :].contiguous().view(torch.int32)
        same = (rows[:, : reference.SLOTS] == keys[:, None]) & seeking[:, None]
        hit = same.any(1)
        value = numbers.gather(1, same.int().argmax(1, keepdim=True))[:, 0].long()
        out = torch.where(hit, value, out)
        seeking = seeking & ~hit & (numbers[:, reference.SLOTS] == 1)
        at = torch.where(at + 1 == n, 0, at + 1)
    return out
