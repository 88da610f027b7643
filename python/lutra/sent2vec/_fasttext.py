"""The binary files of epfml/sent2vec (fastText's layout, version 11), little-endian."""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from ..index import _files
from ._corpus import PLACEHOLDER

_MAGIC, _VERSION = 793712314, 11
_SENT2VEC, _NS = 4, 2  # of the enumerations of models and losses
_MODELS = {1: "cbow", 2: "skipgram", 3: "supervised", 4: "sent2vec", 5: "cbow-c+w-ngrams"}
_ARGS = struct.Struct("<12id")
_SIZES = struct.Struct("<3i2q")


class Model(NamedTuple):
    words: list[str]  # without row 0
    counts: np.ndarray
    total: int
    rows: np.ndarray  # (1 + words + buckets, dim)
    output: np.ndarray  # (1 + words, dim)
    params: dict[str, Any]


class _Reader:
    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.path}: {problem}")

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        data = self.file.read(layout.size)
        if len(data) < layout.size:
            self.fail(f"truncated at byte {self.size}")
        return layout.unpack(data)

    def matrix(self, rows: int, dim: int, name: str) -> np.ndarray:
        m, n = self.take(struct.Struct("<2q"))
        if n != dim or not rows <= m <= rows + 1:  # the original has a row for characters, of no use here
            self.fail(f"the {name} matrix is {m} x {n}; by the file's head it must be {rows} x {dim}")
        if self.file.tell() + 4 * m * n > self.size:
            self.fail(f"truncated in the {name} matrix: the file has {self.size} bytes")
        return np.fromfile(self.file, "<f4", m * n).reshape(m, n)[:rows].astype(np.float32, copy=False)


def read(path: str | os.PathLike[str]) -> Model:
    """A model that ``fasttext sent2vec`` wrote."""
    where = os.fsdecode(path)
    with open(where, "rb") as file:
        r = _Reader(where, file)
        head = file.read(8)
        if len(head) < 8 or struct.unpack("<2i", head) != (_MAGIC, _VERSION):
            r.fail(
                f"not a model of epfml/sent2vec: it begins with {head.hex()}, not with fastText's number and "
                f"version {_VERSION} (fastText's own models are version 12)"
            )
        dim, _, epochs, min_count, negatives, order, _, model, buckets, _, _, _, t = r.take(_ARGS)
        if model != _SENT2VEC:
            r.fail(f"it holds a {_MODELS.get(model, model)} model, not a sent2vec one")
        size, n_words, n_labels, total, pruned = r.take(_SIZES)
        if min(dim, n_words - 1, order, buckets) < 1 or size != n_words + n_labels or n_labels < 0:
            r.fail(f"{n_words} words, {n_labels} labels, {buckets} buckets, dim {dim} cannot be")
        if pruned > 0:
            r.fail("its buckets are pruned, which is not supported")
        words, counts = _words(r, size, n_words)
        if words[0] != PLACEHOLDER:
            r.fail(f"its first word is {words[0]!r}, not {PLACEHOLDER!r}")
        if file.read(1) != b"\0":
            r.fail("its matrices are quantized, which is not supported")
        rows = r.matrix(n_words + buckets, dim, "input")
        if file.read(1) != b"\0":
            r.fail("its output matrix is quantized, which is not supported")
        output = r.matrix(n_words, dim, "output")
    params = {
        "dim": dim, "word_ngrams": order, "buckets": buckets, "min_count": min_count, "negatives": negatives,
        "epochs": epochs, "subsample": t,
    }  # fmt: skip
    return Model(words[1:], np.array(counts[1:], np.int64), total, rows, output, params)


def _words(r: _Reader, size: int, n_words: int) -> tuple[list[str], list[int]]:
    words, counts, entry = [], [], struct.Struct("<qb")
    start = r.file.tell()
    data = r.file.read(1 << 24)
    at = 0
    for i in range(size):
        while (end := data.find(b"\0", at)) < 0 or end + 1 + entry.size > len(data):
            more = r.file.read(1 << 24)
            if not more:
                r.fail(f"truncated in word {i} of {size}")
            start, data, at = start + at, data[at:] + more, 0
        count, kind = entry.unpack_from(data, end + 1)
        if kind not in (0, 1) or (kind == 0) != (i < n_words):
            r.fail(f"word {i} of {size} is of kind {kind}, which cannot be")
        if kind == 0:
            words.append(_decoded(data[at:end], i))
            counts.append(count)
        at = end + 1 + entry.size
    r.file.seek(start + at)
    return words, counts


def _decoded(word: bytes, i: int) -> str:
    try:
        return word.decode()
    except UnicodeDecodeError:  # cut within a character: no text holds it, and it must not be another's
        return f"{word.decode(errors='replace')} #{i}"


def write(path: str | os.PathLike[str], model: Model) -> None:
    """The same layout, whole or not at all."""
    p, dim = model.params, model.rows.shape[1]
    names = [PLACEHOLDER, *model.words]
    for word in names:
        if "\0" in word:
            raise ValueError(f"the word {word!r} holds a NUL, which this form cannot")

    def matrix(rows: np.ndarray, more: int):
        yield struct.pack("<2q", len(rows) + more, dim)
        for begin in range(0, len(rows), 65_536):
            yield np.ascontiguousarray(rows[begin : begin + 65_536], "<f4").data.cast("B")
        yield bytes(4 * dim * more)

    def parts():
        yield struct.pack("<2i", _MAGIC, _VERSION)
        yield _ARGS.pack(
            dim, 5, p["epochs"], p["min_count"], p["negatives"], p["word_ngrams"], _NS, _SENT2VEC,
            p["buckets"], 0, 0, 100, p["subsample"],
        )  # fmt: skip
        yield _SIZES.pack(len(names), len(names), 0, model.total, -1)
        for word, count in zip(names, [0, *model.counts.tolist()]):
            yield word.encode() + b"\0" + struct.pack("<qb", count, 0)
        yield b"\0"
        yield from matrix(model.rows, 1)
        yield b"\0"
        yield from matrix(model.output, 0)

    _files.write_bytes(path, parts())
