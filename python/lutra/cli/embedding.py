"""Texts as vectors whose inner products rank like BM25: address.ngrams, then gather.bag.

A text is a bag of hashed words and character n-grams. BM25 is an inner product between the bags of a
question and of a text, weighted by how often a feature occurs there and how rare it is elsewhere. Giving
every bucket a random row of ``dim`` signs keeps inner products in expectation (Johnson and Lindenstrauss
1984, Achlioptas 2003), with an error of about 1 / sqrt(dim) of the norms: the weighted sum of the rows is
the vector of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .. import address, gather

WORD_BUCKETS = CHARACTER_BUCKETS = 1 << 16
CHARACTERS = (3, 5)
CHARACTER_WEIGHT = 0.3  # of a character n-gram beside a word
SATURATION, LENGTH = 1.2, 0.5  # BM25's k1 and b
BATCH = 256  # texts that are embedded at a time


class Fields(NamedTuple):
    """A text in parts of different weight."""

    name: str  # qualified
    summary: str  # first paragraph of the docstring
    body: str  # the rest
    context: str  # summary of the module that it is in


FIELD_WEIGHTS = {"name": 1.0, "summary": 1.0, "body": 0.1, "context": 0.3}
#: The long body has no character n-grams: they would be most of the work and say little.
CHARACTER_FIELDS = ("name", "summary", "context")


class Bags(NamedTuple):
    """Features of texts: text i has ``ids[offsets[i] : offsets[i + 1]]``, each once, with its weight."""

    ids: np.ndarray
    offsets: np.ndarray  # (texts + 1,)
    weights: np.ndarray

    def part(self, begin: int, end: int) -> Bags:
        """The texts begin..end."""
        first, last = self.offsets[begin], self.offsets[end]
        return Bags(self.ids[first:last], self.offsets[begin : end + 1] - first, self.weights[first:last])


def split_identifier(name: str) -> str:
    """``'json.JSONDecoder.raw_decode'`` as words: ``'json JSON Decoder raw decode'``."""
    name = re.sub(r"([a-z0-9])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3 \2\4", name)
    return re.sub(r"[._]+", " ", name)


def _words(texts: Sequence[str]) -> address.Ngrams:
    return address.ngrams(texts, buckets=WORD_BUCKETS, word_ngrams=1)


def _characters(texts: Sequence[str]) -> address.Ngrams:
    return address.ngrams(texts, buckets=CHARACTER_BUCKETS, word_ngrams=0, char_ngrams=CHARACTERS)


def _count(parts: Sequence[tuple[address.Ngrams, float]], buckets: int) -> tuple[np.ndarray, ...]:
    """(text, bucket, weighted count) of the features of several fields, sorted by text."""
    keys, values = [], []
    for (ids, offsets), weight in parts:
        lengths = np.diff(np.append(offsets, len(ids)))
        keys.append(np.repeat(np.arange(len(offsets)), lengths) * buckets + ids)
        values.append(np.full(len(ids), weight, np.float32))
    unique, where = np.unique(np.concatenate(keys), return_inverse=True)
    counts = np.bincount(where, np.concatenate(values), minlength=len(unique))
    return unique // buckets, unique % buckets, counts


class HashedText:
    """Turns texts into vectors; `fit` learns how rare each feature is.

    Parameters
    ----------
    dim : int
    seed : int
        Of the table of random signs, one byte a sign: row r is ``(2 * table[r] - 1) / sqrt(dim)``.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        self.dim = dim
        rows = WORD_BUCKETS + CHARACTER_BUCKETS
        bits = np.random.default_rng(seed).integers(0, 256, (rows, dim // 8), dtype=np.uint8)
        self.table = np.unpackbits(bits, axis=1)
        self.scale = np.full(rows, 2 / np.sqrt(dim), np.float32)
        self.minimum = np.full(rows, -1 / np.sqrt(dim), np.float32)
        self.rarity = np.zeros(rows, np.float32)

    def fit(self, texts: Sequence[Fields], importance: Sequence[float] | None = None) -> Bags:
        """Learn the rarity of the features in texts; their bags, with BM25's weights times ``importance``."""
        words = [(_words([getattr(t, field) for t in texts]), w) for field, w in FIELD_WEIGHTS.items()]
        characters = [
            (_characters([getattr(t, field) for t in texts]), FIELD_WEIGHTS[field])
            for field in CHARACTER_FIELDS
        ]
        groups = (
            (_count(words, WORD_BUCKETS), 0, WORD_BUCKETS, 1.0),
            (_count(characters, CHARACTER_BUCKETS), WORD_BUCKETS, CHARACTER_BUCKETS, CHARACTER_WEIGHT),
        )
        n = len(texts)
        rows, ids, weights = [], [], []
        for (row, bucket, count), first, buckets, share in groups:
            frequency = np.bincount(bucket, minlength=buckets)
            idf = np.log1p((n - frequency + 0.5) / (frequency + 0.5)) * (frequency > 0)
            # a question's weight is multiplied with a text's: each gets the root
            self.rarity[first : first + buckets] = np.sqrt(idf) * share
            length = np.bincount(row, count, minlength=n)
            room = SATURATION * (1 - LENGTH + LENGTH * length / max(length.mean(), 1e-9))
            rows.append(row)
            ids.append(bucket + first)
            weights.append(count * (SATURATION + 1) / (count + room[row]) * self.rarity[first + bucket])
        of, weight = np.concatenate(rows), np.concatenate(weights)
        if importance is not None:
            weight = weight * np.asarray(importance, np.float32)[of]
        return _bags(of, np.concatenate(ids), weight, n)

    def questions(self, texts: Sequence[str]) -> Bags:
        """The bags of questions."""
        word_row, word, word_count = _count([(_words(texts), 1.0)], WORD_BUCKETS)
        row, character, count = _count([(_characters(texts), 1.0)], CHARACTER_BUCKETS)
        ids = np.concatenate([word, character + WORD_BUCKETS])
        counts = np.concatenate([word_count, count])
        return _bags(
            np.concatenate([word_row, row]), ids, (1 + np.log(counts)) * self.rarity[ids], len(texts)
        )  # fmt: skip

    def embed(self, bags: Bags, tick: Callable[[int], object] | None = None) -> np.ndarray:
        """The vectors (texts, dim), float32, of bags; ``tick`` is told how many are done."""
        n = len(bags.offsets) - 1
        out = np.empty((n, self.dim), np.float32)
        for begin in range(0, n, BATCH):
            end = min(begin + BATCH, n)
            part = bags.part(begin, end)
            out[begin:end] = gather.bag(
                self.table, part.ids, part.offsets, part.weights, include_last_offset=True, scale=self.scale,
                minimum=self.minimum,
            )  # fmt: skip
            if tick is not None:
                tick(end - begin)
        return out


def _bags(rows: np.ndarray, ids: np.ndarray, weights: np.ndarray, n: int) -> Bags:
    order = np.argsort(rows, kind="stable")
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n), out=offsets[1:])
    return Bags(ids[order], offsets, weights[order].astype(np.float32))
