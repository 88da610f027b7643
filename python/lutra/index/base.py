"""What all indexes share: ids, locking, filters, adding, removing, moving, saving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from .. import _checks, _filters
from .._arrays import kind_of
from .._results import Neighbors
from . import _files
from ._home import HOST, Home, check_ids, check_matrix, deliver, home_of, home_on, to_float32
from ._ids import Ids
from ._lock import ReadWriteLock
from ._rows import Rows

_METRICS = {"ip": 0, "l2": 1, "cosine": 2}
_PART = 1 << 24  # bytes of float32 vectors that are converted or encoded at a time
_GPU_PART = 1 << 28  # and on a GPU

#: The classes that `load` knows, by their names.
KINDS: dict[str, type[Index]] = {}
_Kind = TypeVar("_Kind", bound="type[Index]")


def register(kind: _Kind) -> _Kind:
    """Class decorator: let `load` open the files of this kind."""
    KINDS[kind.__name__] = kind
    return kind


class Index:
    """Base class of the indexes: a collection of vectors of one dimension, each with an id.

    Any number of threads may search at once. What changes an index (`train`, `add`, `remove_ids`, `to`) waits
    for the searches that run, holds back new ones, and has the index to itself.

    Attributes
    ----------
    d : int
        Dimension of the vectors.
    metric : {'ip', 'l2', 'cosine'}
    """

    d: int
    metric: str
    #: Whether this kind lives on the CPU only; queries from elsewhere are copied there.
    _host_only = False
    #: Kernels without which it stays on the CPU where arrays on a GPU come.
    _needs_kernels: tuple[str, ...] = ()
    #: The metrics that this kind takes.
    _metrics: dict[str, int] = _METRICS

    def __init__(self, d: int, metric: str) -> None:
        self.d = _checks.integer("d", d, 1, 2**31 - 1)
        _checks.choice("metric", metric, self._metrics)
        self.metric = metric
        self._home: Home | None = HOST if self._host_only else None  # else decided by the first array
        self._ids = Ids()
        self._lock = ReadWriteLock()
        self._rows = {}

    # ---- what a kind of index defines
    #: Attributes that hold `Rows`, by the name of their tensor in a file.
    _rows: dict[str, Rows]

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return True

    def _encode(self, x: Any, out: dict[str, Any], first: int) -> None:
        """Write float32 vectors, number ``first`` of the addition and on, to their rows.

        It may still raise, and the index must then be as it was.
        """
        raise NotImplementedError

    def _begin(self, count: int) -> None:
        """``count`` vectors are about to be encoded; those of an addition that failed may be forgotten."""

    def _added(self, first: int, count: int) -> None:
        """The rows of positions ``first`` to ``first + count`` are in place: take them into the structure."""

    def _removing(self, keep: np.ndarray, before: int) -> None:
        """Of ``before`` rows all but those at the increasing positions ``keep`` are about to go."""

    def _removed(self, keep: np.ndarray, before: int) -> None:
        """Of ``before`` rows those at the increasing positions ``keep`` are left, now 0, 1, 2, ..."""

    def _search(self, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """``(q, k, keep, **options)``: scores and positions for checked float32 queries of the home.

        ``keep``: packed bits (uint8, little order) over positions, those that may be found; None: all.
        """
        raise NotImplementedError

    def _reconstruct(self, positions: Any) -> Any:
        """Vectors (float32) at positions."""
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON values."""
        raise NotImplementedError

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> Index:
        """An empty index by what `_config` gave; TypeError or ValueError where it is not sound."""
        return cls(**config)

    def _restore(self, file: _files.File, n: int, mmap: bool) -> None:
        """Take over the ``n`` vectors of a file, which is checked while it is read."""
        raise NotImplementedError

    # ---- the collection
    @property
    def ntotal(self) -> int:
        """Number of vectors in the index."""
        return self._ids.n

    def __len__(self) -> int:
        return self._ids.n

    @property
    def ids(self) -> np.ndarray:
        """The ids of all vectors in the order of their addition (a copy, int64)."""
        return self._ids.array.copy()

    @property
    def device(self) -> str:
        """Where the vectors are kept: 'cpu', 'cuda:0', ..."""
        return "cpu" if self._home is None else self._home.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays (vectors or codes, codebooks, ids), without room to grow.

        Vectors that are mapped from a file count too, although the system may keep them on disk.
        """
        return self._ids.nbytes + sum(rows.nbytes for rows in self._rows.values())

    def __repr__(self) -> str:
        config = ", ".join(f"{name}={value!r}" for name, value in self._config().items())
        state = f"ntotal={self.ntotal}, device={self.device!r}"
        return f"{type(self).__name__}({config}, {state}{'' if self.is_trained else ', not trained'})"

    def add(self, x: Any, ids: Any = None) -> None:
        """Add vectors.

        Parameters
        ----------
        x : array, shape (n, d), float32, float16, bfloat16, float64, uint8 or int8
            Copied. The first array that an index is given decides where it lives: on the CPU, or on the GPU
            where the array is (see `to`).
        ids : array or list of int, shape (n,), optional
            Unique and not negative. Default: the numbers that follow the largest id that was ever in the
            index, from 0.

        Raises
        ------
        TypeError
            ``x`` is no array or has another dtype; ``ids`` are no integers.
        ValueError
            Shapes that do not fit; NaN, infinities or values beyond float32 (the row is named); ids that are
            negative, repeated or in the index already; an index that is not trained. The index is then
            unchanged.

        Notes
        -----
        Cost: one copy, in parts (and the encoding, for compressed indexes). The memory grows by half when it
        is full, so that many small additions cost linear time in all.
        """
        native = check_matrix(x, "x", self.d)
        with self._changing():
            self._add(native, ids)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The index for a change, alone.

        On a GPU no search is under way any more when it begins, and the change is done when it ends, so that
        any stream may search.
        """
        with self._lock.writing():
            home = self._home or HOST
            home.wait()
            with home.here():
                yield
            if self._home is not None:
                self._home.wait()

    def _add(self, native: Any, ids: Any) -> None:
        if not self.is_trained:
            raise ValueError(f"this {type(self).__name__} is not trained: call train(x) with a sample first")
        count = native.shape[0]
        new = self._ids.check_new(ids, count)
        home = self._settle(native)
        with home.here():
            self._add_to(home, native, new)

    def _add_to(self, home: Home, native: Any, new: np.ndarray | None) -> None:
        count = native.shape[0]
        step = max(1, (_PART if home is HOST else _GPU_PART) // (4 * self.d))
        room = {name: rows.room(count) for name, rows in self._rows.items()}
        self._begin(count)
        for i in range(0, count, step):
            part = to_float32(home, native[i : i + step], "x", i)
            self._encode(part, {name: rows[i : i + step] for name, rows in room.items()}, i)
        for rows in self._rows.values():
            rows.grow(count)
        try:
            self._added(self._ids.n, count)
        except BaseException:
            for rows in self._rows.values():
                rows.grow(-count)
            raise
        self._ids.add(new, count)

    def search(self, q: Any, k: int = 10, *, filter: Any = None) -> Neighbors:
        """The k best vectors for each query.

        Parameters
        ----------
        q : array, shape (nq, d), float32, float16, bfloat16, float64, uint8 or int8
            Of any library and on any device; it is moved to the index where it lies elsewhere.
        k : int, default 10
            May exceed the number of vectors.
        filter : optional
            Which ids may be found: a list or array of ids; bools, one for each id from 0 on, or the same as
            packed bits (``np.packbits(..., bitorder="little")``); or a function that takes all ids (int64)
            and gives bools, called once. Default: all. With an index on a GPU, give an array on a GPU: only
            that is not looked at on the host, where the search would wait.

        Returns
        -------
        scores : array, shape (nq, k), float32, of the kind and on the device of ``q``
            Best first: inner products or cosines descending, squared distances ascending; where k exceeds
            what may be found -inf (ip, cosine) or +inf (l2).
        ids : array, shape (nq, k), int64, likewise
            Ids as they were added; -1 where k exceeds what may be found. Among equal scores the vector that
            was added first comes first.

        Raises
        ------
        TypeError
            ``q`` is no array or has another dtype.
        ValueError
            A shape that does not fit, k < 1, NaN or infinities (the row is named), an index that is empty or
            not trained. Queries on a GPU are not looked into, for that would mean to wait for it: there a NaN
            gives NaN scores.

        Notes
        -----
        Any number of threads may search at once; the interpreter lock is released meanwhile. Searches wait
        for changes of the index, and changes for searches.
        """
        return self._answer(q, k, filter)

    def _answer(self, q: Any, k: Any, filter: Any = None, **options: Any) -> Neighbors:
        lock = self._lock
        lock.acquire_read()
        try:
            native = check_matrix(q, "q", self.d)
            if type(k) is not int or k < 1:
                k = _checks.integer("k", k, 1)
            home = self._home or self._home_for(native)
            if not home.kind.cuda:
                return self._results(home, native, q, k, filter, options)
            with home.following(native):
                return self._results(home, native, q, k, filter, options)
        finally:
            lock.release_read()

    def _results(
        self, home: Home, native: Any, q: Any, k: int, filter: Any, options: dict[str, Any]
    ) -> Neighbors:
        part = to_float32(home, native, "q", finite=not kind_of(native, "q").cuda)
        if not self._ids.n:
            self._nothing()
        keep = None if filter is None else self._keep(home, filter)
        scores, positions = self._search(part, k, keep, **options)
        return Neighbors(*deliver(home, (scores, self._ids.of(home, positions)), q))

    def _nothing(self) -> None:
        """Why there is nothing to search."""
        name = type(self).__name__
        if not self.is_trained:
            raise ValueError(f"this {name} is not trained: call train(x), then add(x)")
        raise ValueError(f"this {name} is empty: add(x) first")

    def _keep(self, home: Home, filter: Any) -> Any:
        """A filter of ids as packed bits over positions."""
        ids = self._ids
        return _filters.beside(home.anchor, filter, ids.n, ids, lambda: ids.table(home))

    def reconstruct(self, ids: Any) -> Any:
        """The stored vectors of some ids.

        Parameters
        ----------
        ids : int, or list or array of int, shape (n,)

        Returns
        -------
        array, shape (d,) for an int, else (n, d), float32
            Of the kind and on the device of ``ids``; NumPy for an int or a list.

        Raises
        ------
        IndexError
            An id that is not in the index.
        """
        wanted = check_ids(ids)
        with self._lock.reading():
            home, vectors = self._vectors(wanted)
        if not hasattr(ids, "__dlpack__"):
            result = HOST.bring(vectors)
        else:
            (result,) = deliver(home, (vectors,), ids)
        return result if wanted.ndim else result[0]

    def _vectors(self, wanted: np.ndarray) -> tuple[Home, Any]:
        positions = self._ids.positions(np.atleast_1d(wanted))
        missing = np.flatnonzero(positions < 0)
        if len(missing):
            where = f"[{missing[0]}]" if wanted.ndim else ""
            raise IndexError(
                f"ids{where} is {int(np.atleast_1d(wanted)[missing[0]])}, which is not in the index"
            )
        home = self._home or HOST
        with home.here():
            return home, self._reconstruct(home.positions(positions))

    def remove_ids(self, ids: Any) -> int:
        """Remove vectors.

        Parameters
        ----------
        ids : int, or list or array of int, shape (n,)
            Ids that are not in the index are passed over, as in FAISS; an id that is named twice counts once.

        Returns
        -------
        int
            Number of vectors that were removed.

        Notes
        -----
        The others keep their ids and their order. Removed ids may be added again; ids given by default are
        never used twice. Cost: the vectors behind the first that is removed move up, so remove many at once
        rather than one by one.
        """
        wanted = np.atleast_1d(check_ids(ids))
        with self._changing():
            positions = self._ids.positions(wanted)
            before = self._ids.n
            stay = np.ones(before, bool)
            stay[positions[positions >= 0]] = False
            keep = np.flatnonzero(stay)
            if len(keep) < before:
                self._removing(keep, before)
                for rows in self._rows.values():
                    rows.keep(keep)
                self._ids.keep(keep)
                self._removed(keep, before)
            return before - len(keep)

    def tune(
        self, queries: Any, recall: float = 0.95, k: int = 10, *, vectors: Any = None, truth: Any = None
    ) -> Any:
        """Set the fastest search parameters that reach a recall: `lutra.index.tune`, which says more."""
        from .tune import tune

        return tune(self, queries, recall, k, vectors=vectors, truth=truth)

    # ---- where it lives
    def _settle(self, native: Any) -> Home:
        """The home, decided by this first array where it was still open."""
        if self._home is None:
            self._move(self._home_for(native))
        assert self._home is not None
        return self._home

    def _home_for(self, native: Any) -> Home:
        """The home, or the one that this array would decide."""
        home = self._home or home_of(native, "q")
        return HOST if home.kind.cuda and self._lacking(home) else home

    def _lacking(self, home: Home) -> list[str]:
        """Kernels that are needed in a home and are not there."""
        return [name for name in self._needs_kernels if not hasattr(home.kind.kernels, name)]

    def _move(self, home: Home) -> None:
        if home.kind.cuda and (lacking := self._lacking(home)):
            if home.kind.kernels is None:
                _checks.no_kernel(home.kind, type(self).__name__)
            raise NotImplementedError(
                f"{type(self).__name__} cannot move to {home.device}: this build has no CUDA kernel "
                f"{', '.join(lacking)}"
            )
        for name, rows in self._rows.items():
            if rows.home is not home:
                self._rows[name] = rows.to(home)
        self._home = home

    def _why_host(self, device: Any) -> str:
        """The message of an index that stays on the CPU."""
        able = sorted(name for name, kind in KINDS.items() if not kind._host_only)
        return (
            f"{type(self).__name__} is for the CPU: it has no CUDA kernels and cannot move to "
            f"{device!r}; {', '.join(able)} can"
        )

    def to(self, device: Any) -> Index:
        """Move the index to a device.

        Parameters
        ----------
        device : {'cpu', 'cuda', 'cuda:0', ...} or torch.device
            On a GPU the vectors are kept as torch tensors where torch is in use, else as CuPy arrays.

        Returns
        -------
        Index
            The index itself.
        """
        if self._host_only and str(device) != "cpu":
            raise NotImplementedError(self._why_host(device))
        home = home_on(device)
        with self._changing():
            if self._home is None or self._home.device != home.device:
                self._move(home)
            home.wait()
        return self

    # ---- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the index to a safetensors file.

        The file is written beside ``path`` under another name, synced to disk and then renamed: ``path``
        holds either the old file or the new one, whole, even when the disk is full or the power fails. Saving
        over the file that this index was loaded from is safe.

        Raises
        ------
        OSError
            The file cannot be written; what ``path`` held before is still there.
        """
        with self._lock.reading():
            _files.write(path, *self._contents())

    def _contents(self) -> tuple[list[_files.Tensor], dict[str, str]]:
        tensors = [_files.Tensor.of_rows(name, rows) for name, rows in self._rows.items()]
        if not self._ids.are_positions:
            tensors.append(_files.Tensor.of_array("ids", self._ids.array))
        config = {**self._config(), "n": self.ntotal, "next_id": self._ids.next, "trained": self.is_trained}
        return tensors, _files.describe(type(self).__name__, config)
