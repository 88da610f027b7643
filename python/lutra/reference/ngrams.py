"""Reference of `lutra.address.ngrams` and `token_ngrams`: Python's own integers, cut to 64 bits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from math import prod

import numpy as np

_STEP = 116049371
_WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")


def fnv1a(data: bytes) -> int:
    """32-bit FNV-1a over signed bytes, as fastText computes it."""
    h = 2166136261
    for byte in data:
        h ^= byte if byte < 128 else byte | 0xFFFFFF00
        h = h * 16777619 & 0xFFFFFFFF
    return h


def _signed(h: int) -> int:
    return h - (1 << 32) if h >> 31 else h


def _rolling(values: Sequence[int], order: int, buckets: int) -> Iterator[int]:
    """Hashes of the n-grams of 2..order values, by start, then by length."""
    for i in range(len(values)):
        h = values[i]
        for j in range(i + 1, min(i + order, len(values))):
            h = (h * _STEP + values[j]) & 0xFFFFFFFFFFFFFFFF
            yield h % buckets


def _character_ngrams(token: bytes, low: int, high: int, buckets: int) -> Iterator[int]:
    text = f"<{token.decode()}>"
    for i in range(len(text)):
        for n in range(low, min(high, len(text) - i) + 1):
            if n > 1 or 0 < i < len(text) - 1:  # a boundary alone says nothing
                yield fnv1a(text[i : i + n].encode()) % buckets


def _ragged(rows: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids: list[int] = []
    offsets: list[int] = []
    for row in rows:
        offsets.append(len(ids))
        ids.extend(row)
    return np.array(ids, np.int64), np.array(offsets, np.int64)


def ngrams(
    texts,
    *,
    buckets=2_000_000,
    word_ngrams=2,
    char_ngrams=None,
    vocabulary=None,
    tokenizer="word",
    lowercase=True,
):
    """Ids and offsets of hashed n-grams; see `lutra.address.ngrams`."""
    index = None if vocabulary is None else {word.encode(): i for i, word in enumerate(vocabulary)}
    first = 0 if index is None else len(index)
    low, high = (1, 0) if char_ngrams is None else char_ngrams
    known: dict[bytes, list[int]] = {}  # texts repeat their tokens

    def characters(token: bytes) -> list[int]:
        if token not in known:
            known[token] = [first + h for h in _character_ngrams(token, low, high, buckets)]
        return known[token]

    def row(text: str) -> list[int]:
        data = (str.lower(text) if lowercase else text).encode()
        tokens = _WORD.findall(data) if tokenizer == "word" else data.split()
        ids: list[int] = []
        if word_ngrams:
            if index is None:
                values = [_signed(fnv1a(t)) for t in tokens]
                ids += [v % 2**64 % buckets for v in values]
            else:
                values = [index[t] for t in tokens if t in index]
                ids += values
            ids += [first + h for h in _rolling(values, word_ngrams, buckets)]
        if high:
            for token in tokens:
                ids += characters(token)
        return ids

    return _ragged(map(row, [texts] if isinstance(texts, str) else texts))


def token_ngrams(tokens, offsets=None, *, order=2, buckets, first_bucket=0, unigrams=True):
    """Ids and offsets of the n-grams of integer tokens; see `lutra.address.token_ngrams`."""
    if offsets is None:
        texts = list(tokens)
    else:
        texts = np.split(tokens, offsets[1:]) if len(offsets) else []

    def row(text: np.ndarray) -> list[int]:
        values = [int(v) for v in text]
        ids = [v if first_bucket else v % 2**64 % buckets for v in values] if unigrams else []
        return ids + [first_bucket + h for h in _rolling(values, order, buckets)]

    return _ragged(map(row, texts))


def xor_ngrams(tokens, multipliers, moduli, orders, pad=0):
    """Ids of n-grams hashed by multiply and xor; see `lutra.address.xor_ngrams`."""
    rows = tokens.reshape(prod(tokens.shape[:-1]), tokens.shape[-1]).astype(np.uint64)
    heads = np.asarray(moduli).reshape(len(orders), -1).astype(np.uint64)
    first = np.cumsum(heads.reshape(-1)) - heads.reshape(-1)
    ids = []
    mix = np.zeros_like(rows)
    with np.errstate(over="ignore"):
        for k in range(max(orders)):
            shifted = np.full_like(rows, pad)
            shifted[:, k:] = rows[:, : max(0, rows.shape[1] - k)]
            mix = mix ^ shifted * np.uint64(multipliers[k])
            if k + 1 in orders:
                ids.append(mix[:, :, None] % heads[list(orders).index(k + 1)])
    out = np.concatenate(ids, 2) + first
    return out.astype(np.int64).reshape(*tokens.shape, heads.size)
