"""FGrams: a vocabulary of n-grams of tokens, in a table that finds the longest one at each token."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import I64, _is_cupy, is_torch, kind_of
from ..address._key_table import KeyTable, lookup
from ..index import _files
from ..reference.fgrams import NODE, empty_table

_KIND = "fgrams"


class FGrams:
    """N-grams of tokens with ids, for `lutra.address.longest_match` and `lutra.nn.SconeEmbedding`.

    Parameters
    ----------
    ngrams : sequence of sequences of int, or array, shape (size, longest), integer
        Distinct, of two tokens at least, tokens in [0, 2^30); an n-gram's id is its position. In an array
        shorter ones end with -1.
    counts : array, shape (size,), integer, optional
        How often each occurs; kept with them.

    Attributes
    ----------
    array : ndarray, shape (size, max_length), int32
        The n-grams; -1 behind those that are shorter.
    counts : ndarray, shape (size,), int64, or None
    max_length : int
    nbytes : int
        Bytes of the table that is searched: 21 an n-gram, where every n-gram's end is an n-gram too.

    Raises
    ------
    TypeError, ValueError, IndexError
        What is no n-gram, or is there twice; the error names it.

    Notes
    -----
    Exact: the table is a trie of the n-grams read backwards, its edges in buckets of a cache line each, with
    whole keys. Memory: 21 bytes a node, and 4 max_length an n-gram for the n-grams themselves, which only
    `array` reads.

    Examples
    --------
    >>> import lutra
    >>> fgrams = lutra.vocab.FGrams([(5, 6), (5, 6, 7)])
    >>> len(fgrams), fgrams.max_length, fgrams[1], (6, 7) in fgrams
    (2, 3, (5, 6, 7), False)
    """

    def __init__(self, ngrams: Sequence[Sequence[int]] | np.ndarray, counts: Any = None) -> None:
        self.array = _array(ngrams)
        self.max_length = max(self.array.shape[1], 1)
        self.counts = None if counts is None else _counts(counts, len(self.array))
        self.lost = 0
        self.buckets = _trie(self.array)
        self._begin()

    def _begin(self, path: str | None = None) -> None:
        self._path = path  # of the file that is mapped
        self._copies: dict[Any, Any] = {}

    # ---------------------------------------------------------------- reading
    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> tuple[int, ...]:
        row = self.array[i]
        if row.ndim != 1:
            raise TypeError("an FGrams gives one n-gram at a time; its attribute array holds them all")
        return tuple(row[row >= 0].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return map(self.__getitem__, range(len(self)))

    def find(self, ngrams: Any) -> np.ndarray:
        """The ids of n-grams, int64; -1 for those that are not in the vocabulary.

        Takes what the constructor takes, of any length.
        """
        rows = _array(ngrams, shortest=1)
        lengths = (rows >= 0).sum(1)
        out = np.full(len(rows), -1, np.int64)
        for n in np.unique(lengths).tolist():
            if 2 <= n <= self.max_length:
                where = np.flatnonzero(lengths == n)
                nodes = _walk(rows[where], n, n, self.buckets)
                out[where] = np.where(nodes < len(self), nodes, -1)
        return out

    def __contains__(self, ngram: Sequence[int]) -> bool:
        return bool(self.find([ngram])[0] >= 0)

    @property
    def nbytes(self) -> int:
        return self.buckets.nbytes

    def __repr__(self) -> str:
        return f"FGrams({len(self)} of 2 to {self.max_length} tokens)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FGrams) and np.array_equal(self.array, other.array)

    __hash__ = None  # type: ignore[assignment]

    def most_frequent(self, size: int) -> FGrams:
        """The first ``size`` n-grams: the most frequent, if `count_fgrams` made them. Ids stay."""
        size = _checks.integer("size", size, 0)
        rows = self.array[:size]
        longest = int((rows >= 0).sum(1).max(initial=0))
        return FGrams(rows[:, :longest], None if self.counts is None else self.counts[:size])

    def table_for(self, tokens: Any) -> Any:
        """``buckets`` as an array of the library of tokens, on their device."""
        if _is_cupy(tokens):
            place = ("cupy", tokens.device.id)
            if place not in self._copies:
                self._copies[place] = kind_of(tokens, "tokens").from_numpy(self.buckets, I64, tokens)
            return self._copies[place]
        if not is_torch(tokens):
            return self.buckets
        found = self._copies.get(tokens.device)
        if found is None:
            import torch

            array = self.buckets if self.buckets.flags.writeable else _writeable_view(self.buckets)
            found = self._copies[tokens.device] = torch.from_numpy(array).to(tokens.device)
        return found

    def __getstate__(self) -> dict[str, Any]:
        if self._path is not None:
            return {"path": self._path}
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "path" in state:
            self.__dict__.update(FGrams.load(state["path"]).__dict__)
            return
        self.__dict__.update(state)
        self.buckets = _aligned(self.buckets)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> FGrams:
        return self  # nothing of it changes

    # ---------------------------------------------------------------- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all: tensors buckets, ngrams and, where given, counts."""
        tensors = [
            _files.Tensor.of_array("buckets", self.buckets),
            _files.Tensor.of_array("ngrams", self.array),
        ]
        if self.counts is not None:
            tensors.append(_files.Tensor.of_array("counts", self.counts))
        size, width = self.array.shape
        config = {"size": size, "width": width, "n_buckets": len(self.buckets), "lost": self.lost}
        _files.write(path, tensors, _files.describe(_KIND, config))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = True) -> FGrams:
        """A vocabulary that was saved; mapped, unless ``mmap`` is False. Pickles of a mapped one hold the
        path.

        Raises
        ------
        FileNotFoundError, OSError
            The file cannot be opened.
        ValueError
            It is no such file, is of a newer version or is damaged.
        """
        path = os.fsdecode(path)
        self = cls.__new__(cls)
        with open(path, "rb") as opened:
            file = _files.File(path, opened)
            file.expect(_KIND, "an FGrams")
            size, width, n_buckets = (file.integer(k) for k in ("size", "width", "n_buckets"))
            self.lost = file.integer("lost")
            if n_buckets < 1 or (width < 2) != (size == 0):
                file.fail(f"{n_buckets} buckets for {size} n-grams of at most {width} tokens cannot be")
            self.buckets, mapped = file.tensor("buckets", "I64", (n_buckets, 8), mmap=mmap)
            self.array = file.tensor("ngrams", "I32", (size, width), mmap=mmap)[0]
            self.counts = file.tensor("counts", "I64", (size,), mmap=mmap)[0] if file.has("counts") else None
            file.finish()
        self.max_length = max(width, 1)
        if not mapped:
            self.buckets = _aligned(self.buckets)
        self._begin(os.path.abspath(path) if mapped else None)
        return self


def _aligned(buckets: np.ndarray) -> np.ndarray:
    """A copy with each bucket in one cache line; beside it a look-up takes twice as long."""
    out = empty_table(len(buckets))
    out[:] = buckets
    return out


def _writeable_view(array: np.ndarray) -> np.ndarray:
    """The same memory without NumPy's mark, for torch.from_numpy, which warns of it; nothing writes there."""
    import ctypes

    pointer = (ctypes.c_int64 * array.size).from_address(array.ctypes.data)
    pointer.keep = array  # type: ignore[attr-defined]
    return np.ctypeslib.as_array(pointer).reshape(array.shape)


def _array(ngrams: Any, shortest: int = 2) -> np.ndarray:
    """(size, longest) int32, checked."""
    if is_torch(ngrams):
        ngrams = ngrams.cpu().numpy()
    if isinstance(ngrams, np.ndarray):
        rows = ngrams
        if rows.ndim != 2 or rows.dtype.kind not in "iu":
            raise TypeError(f"ngrams must be a 2-d array of integers, got {rows.dtype} of shape {rows.shape}")
        lengths = (rows >= 0).sum(1)
    else:
        lists = [list(g) for g in ngrams]
        lengths = np.array([len(g) for g in lists], np.int64)
        rows = np.full((len(lists), int(lengths.max(initial=0))), -1, np.int64)
        for i, g in enumerate(lists):
            for j, token in enumerate(g):
                rows[i, j] = _checks.integer(f"ngrams[{i}][{j}]", token)
    wrong = (rows >= NODE).any(1) | ((rows >= 0) != (np.arange(rows.shape[1]) < lengths[:, None])).any(1)
    if wrong.any():
        i = int(wrong.argmax())
        raise IndexError(
            f"ngrams[{i}] is {rows[i].tolist()}; tokens must lie in [0, 2^30), -1 ends a shorter one"
        )
    short = lengths < shortest
    if short.any():
        i = int(short.argmax())
        raise ValueError(f"ngrams[{i}] has {lengths[i]} tokens; an n-gram needs {shortest} at least")
    longest = int(lengths.max(initial=0))
    return np.ascontiguousarray(rows[:, :longest], np.int32)


def _counts(counts: Any, size: int) -> np.ndarray:
    array = np.asarray(counts)
    if array.shape != (size,) or (array.dtype.kind not in "iu" and size):
        raise ValueError(
            f"counts must be {size} integers, one an n-gram; got {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.int64)


def _walk(rows: np.ndarray, n: int, steps: int, buckets: np.ndarray) -> np.ndarray:
    """The node of the last ``steps`` tokens of n-grams of n tokens: int64, -1 where there is none."""
    nodes = rows[:, n - 1].astype(np.int64)
    for step in range(2, steps + 1):
        keys = np.where(nodes < 0, -1, nodes << 32 | rows[:, n - step])
        nodes = lookup(keys, buckets).astype(np.int64)
        if step < steps:
            nodes = np.where(nodes < 0, -1, nodes | NODE)
    return nodes


def _trie(rows: np.ndarray) -> np.ndarray:
    """The edges of the trie in a table; see csrc/address/longest_match.h."""
    lengths = (rows >= 0).sum(1)
    table, nodes = KeyTable(len(rows)), len(rows)
    if nodes >= NODE:
        raise ValueError(f"ngrams are {nodes}; a vocabulary holds fewer than 2^30")
    for n in range(2, rows.shape[1] + 1):
        ids = np.flatnonzero(lengths == n)
        part = rows[ids]
        parents = part[:, n - 1].astype(np.int64)
        for step in range(2, n):
            keys = parents << 32 | part[:, n - step]
            children = lookup(keys, table.buckets).astype(np.int64)
            missing = np.flatnonzero(children < 0)
            if len(missing):  # the end of an n-gram that is none itself: a node that only leads on
                new, inverse = np.unique(keys[missing], return_inverse=True)
                if nodes + len(new) >= NODE:
                    raise ValueError(
                        f"ngrams need {nodes + len(new)} nodes; a vocabulary holds fewer than 2^30"
                    )
                table.insert(new, np.arange(nodes, nodes + len(new)))
                children[missing] = nodes + inverse
                nodes += len(new)
            parents = children | NODE
        twice = table.insert(parents << 32 | part[:, 0], ids)
        if twice >= 0:
            raise ValueError(
                f"ngrams[{ids[twice]}] is {tuple(part[twice, :n].tolist())}, which is there twice; "
                "n-grams must be distinct"
            )
    return table.buckets
