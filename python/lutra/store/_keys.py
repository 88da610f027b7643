"""Strings as keys: a list of them in three arrays that can be mapped, and where each one is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .. import _backend
from ..address._key_table import KeyTable, lookup

_MASK = (1 << 64) - 1


def _fnv(data: bytes, seed: int) -> int:
    h = 14695981039346656037 ^ seed
    for byte in data:
        h = (h ^ byte) * 1099511628211 & _MASK
    return h >> 1


def hash_strings(texts: list[str], seed: int, name: str = "keys") -> np.ndarray:
    """A 63-bit hash of each string: 64-bit FNV-1a of its UTF-8, from a start with the seed, its upper
    bits."""
    out = np.empty(len(texts), np.int64)
    if _backend.core is not None:
        bad = _backend.core.hash_strings(texts, seed, out)
        if bad >= 0:
            _refuse(texts, bad, name)
        return out
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            _refuse(texts, i, name)
        try:
            out[i] = _fnv(text.encode(), seed)
        except UnicodeEncodeError:
            _refuse(texts, i, name)
    return out


def _refuse(texts: Sequence[Any], i: int, name: str) -> None:
    if isinstance(texts[i], str):
        raise ValueError(f"{name}[{i}] holds a lone surrogate, and so has no UTF-8 form: {texts[i]!r}")
    raise TypeError(f"{name}[{i}] must be a str, got {type(texts[i]).__qualname__}")


class Keys(Sequence[str]):
    """Distinct strings, by position; ``find`` gives positions of strings.

    Parameters
    ----------
    blob : ndarray, uint8: the UTF-8 of all, in a row
    offsets : ndarray, (n + 1,), int64: string i is blob[offsets[i] : offsets[i + 1]]
    buckets : ndarray, (.., 8), int64: a table (csrc/address/key_table.h) from hashes to positions
    seed : int, of the hashes
    """

    def __init__(self, blob: np.ndarray, offsets: np.ndarray, buckets: np.ndarray, seed: int) -> None:
        self.blob, self.offsets, self.buckets, self.seed = blob, offsets, buckets, seed

    @classmethod
    def of(cls, texts: Sequence[str]) -> Keys:
        texts = list(texts)
        for seed in range(100):  # another seed where two strings have one hash: never seen
            hashes = hash_strings(texts, seed)
            table = KeyTable(len(texts))
            twice = table.insert(hashes, np.arange(len(texts)))
            if twice < 0:
                break
            first = int(np.flatnonzero(hashes == hashes[twice])[0])
            if texts[first] == texts[twice]:
                raise ValueError(f"keys must be distinct; {texts[first]!r} is at {first} and at {twice}")
        encoded = [text.encode() for text in texts]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(data) for data in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets, table.buckets, seed)

    def find(self, texts: list[str], name: str = "keys") -> np.ndarray:
        """The position of each string, int64, or -1."""
        rows = np.empty(len(texts), np.int64)
        if _backend.core is not None:
            bad = _backend.core.find_strings(
                texts, self.seed, self.buckets, len(self.buckets), self.blob, self.blob.size, self.offsets,
                len(self), rows,
            )  # fmt: skip
            if bad >= 0:
                _refuse(texts, bad, name)
            return rows
        for i, row in enumerate(lookup(hash_strings(texts, self.seed, name), self.buckets).tolist()):
            rows[i] = row if 0 <= row < len(self) and self[row] == texts[i] else -1
        return rows

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"key {i} of {n}")
        i %= n
        return self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for i in range(len(self)):
            yield self[i]

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and self.find([text])[0] >= 0
