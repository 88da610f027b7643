"""VectorStore: strings and their vectors, mapped from a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from ..index import _files
from ..scan import knn
from . import _oov, _text
from ._keys import Keys

_KIND = "vector store"
_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8"}
_OOV = {"ngrams": 0, "random": 1, "error": 2}


class Entries(NamedTuple):
    """A slice of a store: its keys, and its vectors, (n, dim) float32."""

    keys: list[str]
    vectors: np.ndarray


class VectorStore:
    """Vectors under string keys, in a file that opens at once whatever its size.

    ``VectorStore(path)`` maps a file that `save` wrote; `from_arrays`, `from_text` and `from_gensim` make a
    store in memory. Strings that are not among the keys get a vector from their character n-grams.

    Parameters
    ----------
    path : path
    mmap : bool, default True
        False reads the file.

    Attributes
    ----------
    keys : sequence of str
        In the order of the rows; a mapped one reads a key when it is asked for.
    vectors : ndarray, (n, dim), float32, float16 or int8
        The rows as they are stored; of int8 ones row i is ``scales[i] * vectors[i]``.
    dim : int
    dtype : {'float32', 'float16', 'int8'}
    oov : {'ngrams', 'random', 'error'}
        What becomes of a string that is no key. ``'ngrams'``: the mean of the rows of its character n-grams
        (3 to 6 characters of ``<word>``, lowered), where the row of an n-gram is the mean of the unit vectors
        of all keys that hold it (of a bucket of hashes, float16), scaled to the mean length of the store's
        vectors. ``'random'``, and where no n-gram is known: the mean of a pseudo-random N(0, I) row of each
        n-gram, scaled in the same way. Both are functions of the string and the file. ``'error'``: a
        KeyError.

    Raises
    ------
    FileNotFoundError, OSError
        The file cannot be opened.
    ValueError
        It is no vector store, is of a newer version or is damaged; the message names the path.

    Notes
    -----
    The file is safetensors: ``vectors``, ``scales`` of int8, ``keys`` (UTF-8), ``key_offsets``, ``buckets``
    (a hash table of cache lines, from a hash of a key to its row; keys are compared, so that no other key is
    taken for it) and ``ngram_rows``. Opening reads none of them; a look-up reads three places.

    References
    ----------
    Patel, Sands, Callison-Burch, Apidianaki, Magnitude: A Fast, Efficient Universal Vector Embedding Utility
    Package, EMNLP 2018. Bojanowski et al., Enriching Word Vectors with Subword Information, TACL 2017.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> store = lutra.VectorStore.from_arrays(["cat", "dog", "car"], np.eye(3) + [[0, 1, 0], [1, 0, 0], [0, 0,
    0]])
    >>> store["dog"]
    array([1., 1., 0.], dtype=float32)
    >>> store.most_similar("cat", 1)
    [('dog', 1.0)]
    """

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool = True) -> None:
        self.path: str | None = os.path.abspath(os.fsdecode(path))
        with open(self.path, "rb") as opened:
            file = _files.File(self.path, opened)
            file.expect(_KIND, "a vector store")
            n, dim, size, n_buckets, seed, rows = (
                file.integer(k) for k in ("n", "dim", "key_bytes", "n_buckets", "seed", "ngram_rows")
            )
            dtype, oov, norm = (file.config.get(k) for k in ("dtype", "oov", "norm"))
            if dtype not in _DTYPES or oov not in _OOV or not isinstance(norm, float) or n_buckets < 1:
                file.fail(f"dtype {dtype!r}, oov {oov!r}, norm {norm!r}, {n_buckets} buckets cannot be")

            def tensor(name: str, code: str, shape: tuple[int, ...]) -> np.ndarray:
                return file.tensor(name, code, shape, mmap=mmap)[0]

            vectors = tensor("vectors", _DTYPES[dtype], (n, dim))
            scales = tensor("scales", "F32", (n,)) if dtype == "int8" else None
            keys = Keys(
                tensor("keys", "U8", (size,)), tensor("key_offsets", "I64", (n + 1,)),
                tensor("buckets", "I64", (n_buckets, 8)), seed,
            )  # fmt: skip
            ngram_rows = tensor("ngram_rows", "F16", (rows, dim)) if oov == "ngrams" else None
            file.finish()
        self._set(keys, vectors, scales, ngram_rows, oov, norm)

    def _set(self, keys, vectors, scales, ngram_rows, oov, norm) -> None:
        self.keys: Keys = keys
        self.vectors: np.ndarray = vectors
        self.scales: np.ndarray | None = scales
        self._ngram_rows, self.oov, self._norm = ngram_rows, oov, norm
        self.index: Any = None

    # ---------------------------------------------------------------- building
    @classmethod
    def from_arrays(
        cls, keys: Sequence[str], vectors: Any, *, dtype: str = "float32", oov: str = "ngrams",
        ngram_buckets: int | None = None,
    ) -> VectorStore:  # fmt: skip
        """A store in memory.

        Parameters
        ----------
        keys : sequence of distinct str
        vectors : array, shape (n, dim), floating point
        dtype : {'float32', 'float16', 'int8'}, default 'float32'
            int8: a row has a scale of its own, and its largest value is 127.
        oov : {'ngrams', 'random', 'error'}, default 'ngrams'
        ngram_buckets : int, optional
            Rows of the table for ``oov='ngrams'``, in 2 dim bytes each; default the number of keys, a power
            of two in [1024, 2^18].

        Raises
        ------
        TypeError, ValueError
            Keys that are no distinct strings, vectors of another shape or that are not finite (in ``dtype``).
        """
        _checks.choice("dtype", dtype, dict.fromkeys(_DTYPES, 0))
        _checks.choice("oov", oov, _OOV)
        if isinstance(keys, str):
            raise TypeError("keys must be a sequence of str, got a str")
        rows = np.asarray(vectors.detach().cpu() if hasattr(vectors, "detach") else vectors)
        if rows.ndim != 2 or rows.shape[0] != len(keys) or rows.dtype.kind not in "fiu":
            raise ValueError(
                f"vectors must be ({len(keys)}, dim) numbers, a row a key; got {rows.dtype} of shape "
                f"{rows.shape}"
            )
        index = Keys.of(keys)
        with np.errstate(over="ignore", invalid="ignore"):
            whole = rows.astype(np.float32)
            stored, scales = _store_as(whole, dtype)
        bad = ~np.isfinite(whole if dtype == "int8" else stored).all(1)
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(f"vectors[{i}], of {index[i]!r}, is not finite in {dtype}")
        self = cls.__new__(cls)
        self.path = None
        lengths = np.linalg.norm(whole.astype(np.float64), axis=1)
        norm = float(lengths.mean()) if len(lengths) else 1.0
        table = None
        if oov == "ngrams":
            if ngram_buckets is None:
                ngram_buckets = 1 << min(max(len(keys), 1 << 10).bit_length(), 18)
            ngram_buckets = _checks.integer("ngram_buckets", ngram_buckets, 1, 1 << 31)
            table = _oov.bucket_rows(list(keys), _oov.unit(whole), ngram_buckets)
        self._set(index, stored, scales, table, oov, norm or 1.0)
        return self

    @classmethod
    def from_text(
        cls, path: str | os.PathLike[str], *, limit: int | None = None, progress: bool | None = None,
        **options: Any,
    ) -> VectorStore:  # fmt: skip
        """From word vectors as text: fastText's .vec, word2vec's text form, GloVe's.

        ``limit`` takes the first ones only; ``options`` are `from_arrays`'. Repeated keys are left out.
        """
        keys, rows = _text.read(path, limit, progress)
        return cls.from_arrays(keys, rows, **options)

    @classmethod
    def from_gensim(cls, vectors: Any, **options: Any) -> VectorStore:
        """From gensim's KeyedVectors, or anything with ``index_to_key`` and ``vectors``."""
        try:
            keys, rows = vectors.index_to_key, vectors.vectors
        except AttributeError:
            raise TypeError(
                f"vectors must be gensim's KeyedVectors (4.0 or later), got {type(vectors).__qualname__}"
            ) from None
        return cls.from_arrays(keys, rows, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the store to a safetensors file, whole or not at all."""
        of = _files.Tensor.of_array
        tensors = [
            of("vectors", self.vectors), of("keys", self.keys.blob), of("key_offsets", self.keys.offsets),
            of("buckets", self.keys.buckets),
        ]  # fmt: skip
        if self.scales is not None:
            tensors.append(of("scales", self.scales))
        if self._ngram_rows is not None:
            tensors.append(of("ngram_rows", self._ngram_rows))
        config = {
            "n": len(self), "dim": self.dim, "key_bytes": int(self.keys.blob.size), "seed": self.keys.seed,
            "n_buckets": len(self.keys.buckets), "dtype": self.dtype, "oov": self.oov, "norm": self._norm,
            "ngram_rows": 0 if self._ngram_rows is None else len(self._ngram_rows),
        }  # fmt: skip
        _files.write(path, tensors, _files.describe(_KIND, config))

    def save_text(self, path: str | os.PathLike[str]) -> None:
        """Write keys and vectors as text, in the form of fastText's .vec."""
        _text.write(path, self.keys, lambda i, j: self._rows(np.arange(i, min(j, len(self)))), self.dim)

    # ---------------------------------------------------------------- reading
    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    @property
    def dtype(self) -> str:
        return self.vectors.dtype.name

    def __len__(self) -> int:
        return len(self.vectors)

    def __contains__(self, key: object) -> bool:
        return key in self.keys

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys)

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        """Keys and vectors, in the order of the rows."""
        for begin in range(0, len(self), 4096):
            yield from zip(*self[begin : begin + 4096])

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(self.path)
        return f"VectorStore({len(self)} x {self.dim}, {self.dtype}, oov={self.oov!r}, {where})"

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__) if self.path is None else {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["path"] is None:
            self.__dict__.update(state)
        else:
            self.__init__(state["path"])  # type: ignore[misc]

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        found = self.vectors[rows].astype(np.float32)
        return found if self.scales is None else found * self.scales[rows, None]

    def rows_of(self, keys: Sequence[str]) -> np.ndarray:
        """The row of each key, int64; -1 for strings that are no keys."""
        return self.keys.find(list(keys))

    def __getitem__(self, key: Any) -> Any:
        """The vector of a string, (dim,), of several, (n, dim), float32; or a slice of the store, `Entries`.

        Raises
        ------
        KeyError
            A string that is no key, with ``oov='error'``.
        """
        if isinstance(key, str):
            return self._vectors([key])[0]
        if isinstance(key, slice):
            rows = np.arange(*key.indices(len(self)))
            return Entries([self.keys[i] for i in rows.tolist()], self._rows(rows))
        if not isinstance(key, (list, tuple)):
            raise TypeError(f"a key is a str, a list of them or a slice, got {type(key).__qualname__}")
        return self._vectors(list(key))

    def _vectors(self, keys: list[str]) -> np.ndarray:
        rows = self.keys.find(keys)
        missing = np.flatnonzero(rows < 0)
        if not len(missing):
            return self._rows(rows)
        if self.oov == "error":
            raise KeyError(keys[missing[0]])
        if len(rows) == len(missing):
            return _oov.vectors(keys, self._ngram_rows, self.dim, self._norm)
        out = np.empty((len(keys), self.dim), np.float32)
        known = np.flatnonzero(rows >= 0)
        out[known] = self._rows(rows[known])
        out[missing] = _oov.vectors([keys[i] for i in missing], self._ngram_rows, self.dim, self._norm)
        return out

    # ---------------------------------------------------------------- comparing
    def most_similar(self, query: Any, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` keys whose vectors have the largest cosine with the query's, and the cosines.

        Parameters
        ----------
        query : str, array of shape (dim,), or list of str
            A string may be one that is no key. Several: the mean of their unit vectors. Strings of the query
            are not among the result.
        k : int, default 10

        Notes
        -----
        Exact, by a scan of the mapped rows, unless `build_index` was called.
        """
        k = _checks.integer("k", k, 1)
        names = [query] if isinstance(query, str) else query if isinstance(query, (list, tuple)) else []
        if names and not all(isinstance(name, str) for name in names):
            names = []
        if names:
            vector = _oov.unit(self._vectors(list(names))).mean(0)
            own = set(self.rows_of(names).tolist())
        else:
            vector, own = np.asarray(query, np.float32), set()
        if vector.shape != (self.dim,):
            raise ValueError(f"query has shape {vector.shape}; a vector of this store is ({self.dim},)")
        vector = np.ascontiguousarray(vector, np.float32)[None]
        wanted = min(k + len(own), len(self))
        if not wanted:
            return []
        if self.index is None:
            scores, rows = knn(vector, self.vectors, wanted, "cosine")
        else:
            scores, rows = self.index.search(vector, wanted)
        found = [(r, s) for r, s in zip(rows[0].tolist(), scores[0].tolist()) if r >= 0 and r not in own]
        return [(self.keys[r], float(s)) for r, s in found[:k]]

    def similarity(self, a: Any, b: Any) -> Any:
        """The cosine of two strings or vectors; of one and several, an array."""
        many = isinstance(b, (list, tuple)) or (isinstance(b, np.ndarray) and b.ndim == 2)
        one, other = _oov.unit(self._of(a)), _oov.unit(self._of(b))
        return other @ one if many else float(other @ one)

    def _of(self, a: Any) -> np.ndarray:
        if isinstance(a, str) or (isinstance(a, (list, tuple)) and all(isinstance(x, str) for x in a)):
            return self[a]
        array = np.asarray(a, np.float32)
        if array.shape[-1:] != (self.dim,):
            raise ValueError(f"a vector of this store is ({self.dim},), got shape {array.shape}")
        return array

    def doesnt_match(self, keys: Sequence[str]) -> str:
        """The string whose vector is farthest, by cosine, from the mean of the unit vectors of all."""
        if isinstance(keys, str) or not len(keys):
            raise ValueError("keys must be several strings")
        rows = _oov.unit(self._vectors(list(keys)))
        return keys[int((rows @ rows.mean(0)).argmin())]

    def build_index(self, factory: str = "Flat", **options: Any) -> Any:
        """An index over the vectors, for `most_similar`: a text that `lutra.index.factory` takes, such as
        'HNSW32'.

        Returns
        -------
        index
            The same as the attribute ``index``; ``index.save`` keeps it, and ``store.index =
            lutra.index.load(path)`` brings it back. Its ids are rows, its metric is the cosine.
        """
        from .. import index as indexes

        self.index = None
        index = indexes.factory(factory, self.dim, "cosine")
        rows = self._rows(np.arange(len(self)))
        if hasattr(index, "train") and not getattr(index, "is_trained", True):
            index.train(rows, **options)
        index.add(rows)
        self.index = index
        return index


def _store_as(rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    if dtype != "int8":
        return np.ascontiguousarray(rows.astype(dtype)), None
    largest = np.abs(rows).max(1, initial=0)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.clip(np.rint(rows / scales[:, None]), -127, 127).astype(np.int8), scales
