"""Store: an index in a folder that grows without being written again.

A base file, a small file for each addition, and a manifest that says which files are the state. Files are
never changed: a new state is new files and a new manifest, which takes the place of the old one in one step.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from .. import _checks, _filters
from .._arrays import U8, kind_of
from .._results import Neighbors
from . import _manifest
from ._home import HOST, check_ids, check_matrix, deliver, to_float32
from ._load import load
from ._lock import ReadWriteLock
from ._manifest import Entry, Manifest
from .base import Index

_DESCENDING = ("ip", "cosine")
_SELF_CONTAINED = ("Flat", "Binary")  # what they keep is what was added: no second copy for compaction
_UNTRAINED = ("Flat", "HNSW")
_SET = ("nprobe", "ef_search", "refine_factor", "rescore")  # search parameters that indexes have
_TRIES = 20  # of reading a state that a compaction is taking away


class _Part:
    """One index of the store and which of its positions have been removed."""

    def __init__(self, index: Any, entry: Entry | None = None, dead: np.ndarray | None = None) -> None:
        self.index = index
        self.entry = entry
        self.dead = dead  # bool (n,), or None
        self.changed = False  # dead is not what the file says

    @property
    def live(self) -> np.ndarray | slice:
        return slice(None) if self.dead is None else ~self.dead

    @property
    def ids(self) -> np.ndarray:
        return self.index.ids[self.live]

    @property
    def count(self) -> int:
        return self.index.ntotal - (0 if self.dead is None else int(self.dead.sum()))

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Positions of ids, -1 where they are not there or removed."""
        where = self.index._ids.positions(ids)
        if self.dead is not None and self.index.ntotal:
            where = np.where((where >= 0) & ~self.dead[where], where, -1)
        return where


class Store:
    """An index in a folder: searched as a whole, added to piece by piece.

    Made by `lutra.index.create`, opened by `lutra.index.open`. It behaves as the index it was made from:
    `search` (with that kind's own options), `add`, `remove_ids`, `reconstruct`, ``ids``, ``ntotal``. Changes
    are in memory until `commit` writes them; leaving a ``with`` block commits unless it raised.

    Attributes
    ----------
    path : str
    d, metric : of the index.
    generation : int
        Counts the states of the folder.

    Notes
    -----
    **Files.** ``manifest.json``; a base ``000001-base.safetensors``; for each commit that added vectors a
    ``-segment`` of the same kind with the base's training, and, for kinds that keep codes only, ``-vectors``
    with the vectors themselves, which compaction needs; ``-removed`` bits for parts that lost vectors. All
    are safetensors. Each is synced before the manifest names it, so a crash leaves the state before or after.

    **Readers** map the files of the state that was current when they opened and keep it, even while a writer
    commits or compacts; `refresh` goes to the newest. One writer at a time (a lock that the system releases
    when the process ends).

    **Cost.** A commit writes what is new, and n / 8 bytes for each part that lost vectors. A search is one
    search of each part and a merge: results are those of one index that was given everything (for a graph:
    as good as). Many small commits are many parts: `compact` now and then, which reads all and writes one new
    base.
    """

    def __init__(self, path: str, writable: bool) -> None:
        self.path = path
        self._lock = ReadWriteLock()
        self._descriptor = _manifest.lock(path) if writable else None
        try:
            self._take(*self._read())
            if writable:
                _manifest.sweep(path, self._manifest.files())
        except BaseException:
            self._release()
            raise

    # ---- reading the folder
    def _read(self) -> tuple[Manifest, list[_Part]]:
        for attempt in range(_TRIES):
            manifest = _manifest.read(self.path)
            try:
                return manifest, [self._open_part(entry) for entry in manifest.parts]
            except FileNotFoundError as error:
                # A writer may have gone on to a newer state; where it has not, the folder is damaged.
                newer = _manifest.read(self.path).generation != manifest.generation
                if not newer or attempt == _TRIES - 1:
                    _manifest.fail(self.path, f"{os.path.basename(error.filename)} is missing")
        raise AssertionError("unreachable")

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _open_part(self, entry: Entry) -> _Part:
        index = load(self._file(entry.file))
        if index.ntotal != entry.n:
            _manifest.fail(
                self._file(entry.file), f"it holds {index.ntotal} vectors; by the manifest {entry.n}"
            )
        dead = None
        if entry.removed:
            path = self._file(entry.removed)
            bits = _manifest.load_array(path, "removed", ("U8",), (entry.n + 7) // 8, None)
            dead = np.unpackbits(bits, count=entry.n, bitorder="little").astype(bool)
        return _Part(index, entry, dead)

    def _take(self, manifest: Manifest, parts: list[_Part]) -> None:
        first = parts[0].index
        for part in parts[1:]:
            if type(part.index) is not type(first) or _fixed(part.index) != _fixed(first):
                assert part.entry is not None
                _manifest.fail(self._file(part.entry.file), "it is of another kind than the base")
        ids = np.concatenate([part.ids for part in parts])
        if len(np.unique(ids)) != len(ids) or (len(ids) and int(ids.max()) >= manifest.next_id):
            _manifest.fail(self.path, "an id is in two parts, or beyond the manifest's 'next_id'")
        self._manifest, self._parts = manifest, parts
        self.d, self.metric = first.d, first.metric
        self._next = manifest.next_id
        self._pending: _Part | None = None
        self._raw: list[tuple[np.ndarray, np.ndarray]] = []
        self._all_ids: np.ndarray | None = None

    @property
    def generation(self) -> int:
        return self._manifest.generation

    def refresh(self) -> bool:
        """Go to the newest state of the folder, where there is one; True where there was.

        A ValueError where this store is a writer with changes that are not committed (they would be lost).
        """
        with self._lock.writing():
            if self._dirty:
                raise ValueError("this store has changes that are not committed: commit() or close() first")
            if _manifest.read(self.path).generation == self.generation:
                return False
            self._take(*self._read())
            return True

    # ---- the collection
    @property
    def parts(self) -> list[Any]:
        """The indexes that the store consists of; ``parts[0]`` has the search parameters of all."""
        return [part.index for part in self._every()]

    def _every(self) -> list[_Part]:
        return [*self._parts, self._pending] if self._pending else self._parts

    @property
    def ntotal(self) -> int:
        """Number of vectors."""
        return sum(part.count for part in self._every())

    def __len__(self) -> int:
        return self.ntotal

    @property
    def is_trained(self) -> bool:
        return self._parts[0].index.is_trained

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays of all parts, removed vectors included until `compact`."""
        return sum(part.index.nbytes for part in self._every())

    @property
    def ids(self) -> np.ndarray:
        """The ids of all vectors in the order of their addition, int64."""
        with self._lock.reading():
            return self._ids().copy()

    def _ids(self) -> np.ndarray:
        ids = self._all_ids
        if ids is None:
            ids = self._all_ids = np.concatenate([part.ids for part in self._every()])
        return ids

    def __repr__(self) -> str:
        kind = type(self._parts[0].index).__name__
        return f"Store({self.path!r}, {kind}, ntotal={self.ntotal}, parts={len(self._every())})"

    def search(self, q: Any, k: int = 10, *, filter: Any = None, **options: Any) -> Neighbors:
        """The k best vectors for each query; ``filter`` and ``options`` as in the index's own `search`."""
        k = _checks.integer("k", k, 1)
        native = check_matrix(q, "q")
        with self._lock.reading():
            every = self._every()
            _align(every)
            parts = [part for part in every if part.count]
            if not parts:
                return every[0].index.search(q, k)  # which says why not
            masks = self._masks(every, filter)
            x = HOST.bring(native)
            found = [
                part.index.search(x, k, filter=None if mask is None else _Fixed(mask), **options)
                for part, mask in zip(every, masks)
                if part.count
            ]
        scores = np.concatenate([f.scores for f in found], 1)
        ids = np.concatenate([f.ids for f in found], 1)
        key = -scores if self.metric in _DESCENDING else scores
        order = np.argsort(key, 1, kind="stable")[:, :k]  # equal scores: in the order of addition
        merged = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        return Neighbors(*deliver(HOST, merged, q))

    def _masks(self, parts: list[_Part], filter: Any) -> list[np.ndarray | None]:
        """For each part which positions may be found, bool; None: all."""
        if filter is None:
            return [None if part.dead is None else ~part.dead for part in parts]
        ids = self._ids()
        keep = _filters.resolve(filter, len(ids), ids)
        bits = np.unpackbits(keep, count=len(ids), bitorder="little").astype(bool)
        masks: list[np.ndarray | None] = []
        start = 0
        for part in parts:
            mask = np.zeros(part.index.ntotal, bool)
            mask[part.live] = bits[start : start + part.count]
            start += part.count
            masks.append(mask)
        return masks

    def reconstruct(self, ids: Any) -> Any:
        """The stored vectors of some ids, as `Index.reconstruct`."""
        wanted = check_ids(ids)
        flat = np.atleast_1d(wanted)
        with self._lock.reading():
            pieces = [(part, part.positions(flat)) for part in self._every()]
            there = np.zeros(len(flat), bool)
            out: Any = None
            for part, positions in pieces:
                rows = np.flatnonzero(positions >= 0)
                there[rows] = True
                if len(rows):
                    values = part.index.reconstruct(flat[rows])
                    out = np.empty((len(flat), values.shape[1]), values.dtype) if out is None else out
                    out[rows] = values
        if not there.all():
            first = int((~there).argmax())
            raise IndexError(f"ids[{first}] is {int(flat[first])}, which is not in the index")
        if out is None:
            return self._parts[0].index.reconstruct(ids)
        if hasattr(ids, "__dlpack__"):
            (out,) = deliver(HOST, (out,), ids)
        return out if wanted.ndim else out[0]

    # ---- changing it
    def _need_writer(self) -> None:
        if self._descriptor is None:
            raise ValueError(f"the store is open for reading; lutra.index.open({self.path!r}, 'a') writes")

    @property
    def _dirty(self) -> bool:
        return self._pending is not None or any(part.changed for part in self._parts)

    def add(self, x: Any, ids: Any = None) -> None:
        """Add vectors, as `Index.add`; searches find them at once, `commit` writes them."""
        self._need_writer()
        native = HOST.bring(check_matrix(x, "x"))
        with self._lock.writing():
            count = native.shape[0]
            if ids is None:
                new = np.arange(self._next, self._next + count)
            else:
                new = np.array(check_ids(ids), np.int64)
            for part in self._every():
                known = np.flatnonzero(part.positions(np.atleast_1d(new)) >= 0)
                if len(known):
                    raise ValueError(
                        f"ids[{known[0]}] is {int(new[known[0]])}, which is in the index; remove_ids it first"
                    )
            pending = self._pending or _Part(self._empty())
            pending.index.add(native, new)
            if count:
                if type(pending.index).__name__ not in _SELF_CONTAINED:
                    self._raw.append((new, _as_added(native)))
                self._pending = pending
                self._next = max(self._next, int(new.max()) + 1)
                self._all_ids = None

    def _empty(self) -> Any:
        """An empty index with the training of the base."""
        base = self._parts[0]
        if type(base.index).__name__ in _UNTRAINED:
            empty = type(base.index)._from_config(base.index._config())
            if empty.is_trained:  # a graph over codes is not
                return empty
        assert base.entry is not None
        fresh = load(self._file(base.entry.file))  # mapped: letting go of all rows reads none
        fresh.remove_ids(fresh.ids)
        return fresh

    def remove_ids(self, ids: Any) -> int:
        """Remove vectors and return how many there were, as `Index.remove_ids`; `commit` makes it last."""
        self._need_writer()
        wanted = np.unique(np.atleast_1d(check_ids(ids)))
        removed = 0
        with self._lock.writing():
            for part in self._parts:
                positions = part.positions(wanted)
                positions = positions[positions >= 0]
                if len(positions):
                    dead = np.zeros(part.index.ntotal, bool) if part.dead is None else part.dead.copy()
                    dead[positions] = True
                    part.dead, part.changed = dead, True
                    removed += len(positions)
            if self._pending is not None:
                removed += self._pending.index.remove_ids(wanted)
                kept = [(i, ~np.isin(i, wanted), x) for i, x in self._raw]
                self._raw = [(i[keep], x[keep]) for i, keep, x in kept]
            self._all_ids = None
        return removed

    # ---- writing the folder
    def commit(self) -> None:
        """Write what has changed and make it the state of the folder.

        Raises
        ------
        OSError
            A file cannot be written; the folder holds the state before, and the store its changes.
        """
        self._need_writer()
        with self._lock.writing():
            if self._dirty:
                self._commit()

    def _commit(self) -> None:
        number = self.generation + 1
        parts = list(self._parts)
        entries = [_copy(part) for part in parts]
        for i, part in enumerate(parts):
            if part.changed and part.dead is not None:
                entries[i].removed = name = f"{number:06d}-removed-{i}.safetensors"
                bits = np.packbits(part.dead, bitorder="little")
                _manifest.save_array(self._file(name), "removed", bits)
        if self._pending is not None and self._pending.index.ntotal:
            entry = Entry(f"{number:06d}-segment.safetensors", self._pending.index.ntotal)
            self._pending.index.save(self._file(entry.file))
            if self._raw:
                entry.vectors = f"{number:06d}-vectors.safetensors"
                vectors = np.concatenate([x for _, x in self._raw])
                _manifest.save_array(self._file(entry.vectors), "vectors", vectors)
            entries.append(entry)
            parts.append(self._open_part(entry))
        self._replace(Manifest(number, self._next, entries), parts)

    def _replace(self, manifest: Manifest, parts: list[_Part]) -> None:
        _manifest.write(self.path, manifest)
        for part, entry in zip(parts, manifest.parts):
            part.entry, part.changed = entry, False
        self._manifest, self._parts = manifest, parts
        self._pending, self._raw, self._all_ids = None, [], None
        _manifest.sweep(self.path, manifest.files())

    def compact(self) -> None:
        """Commit, then make one base of all parts, without what was removed.

        The new base is what adding the vectors to the old one, one segment after another, makes. Readers
        keep the files that they have mapped; the names of old files are gone.

        Raises
        ------
        OSError
            A file cannot be written; the folder holds the state before.

        Notes
        -----
        Reads everything and holds the new base in memory while it is made.
        """
        self._need_writer()
        with self._lock.writing():
            if self._dirty:
                self._commit()
            first, *others = self._parts
            if not others and first.dead is None:
                return
            assert first.entry is not None
            whole = load(self._file(first.entry.file))
            if first.dead is not None:
                whole.remove_ids(whole.ids[first.dead])
            for part in others:
                ids = part.index.ids
                whole.add(self._added(part, ids)[part.live], ids[part.live])
            number = self.generation + 1
            entry = Entry(f"{number:06d}-base.safetensors", whole.ntotal)
            whole.save(self._file(entry.file))
            self._replace(Manifest(number, self._next, [entry]), [self._open_part(entry)])

    def _added(self, part: _Part, ids: np.ndarray) -> np.ndarray:
        """The vectors of a segment as they were added."""
        entry = part.entry
        if entry is None or entry.vectors is None:
            return part.index.reconstruct(ids)
        return _manifest.load_array(
            self._file(entry.vectors), "vectors", ("F32", "U8"), entry.n, part.index.d
        )

    def close(self) -> None:
        """Let go of the folder; changes that are not committed are lost."""
        self._release()

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: Any, *exc: Any) -> None:
        try:
            if kind is None and self._descriptor is not None:
                self.commit()
        finally:
            self.close()


class _Fixed:
    """A filter that has been resolved: bools over positions."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        return self.mask


def _fixed(index: Any) -> dict[str, Any]:
    """The configuration without what may be set at any time."""
    return _without(index._config())


def _without(config: Any) -> Any:
    """A configuration, and those inside it, without parameters that may be set and what counts vectors."""
    if not isinstance(config, dict):
        return config
    return {name: _without(v) for name, v in config.items() if name not in (*_SET, "n", "next_id")}


def _align(parts: list[_Part]) -> None:
    """Give the search parameters of the base to all."""
    base = parts[0].index
    for name in _SET:
        value = getattr(base, name, None)
        for part in parts[1:] if value is not None else ():
            setattr(part.index, name, value)


def _copy(part: _Part) -> Entry:
    assert part.entry is not None
    return Entry(part.entry.file, part.entry.n, part.entry.removed, part.entry.vectors)


def _as_added(native: Any) -> np.ndarray:
    if kind_of(native, "x").code(native) == U8:
        return np.array(native)
    return np.array(to_float32(HOST, native, "x"))


def create(path: str | os.PathLike[str], index: Index) -> Store:
    """Make a folder that holds an index and can be added to; opened for writing.

    Parameters
    ----------
    path : str or path-like
        A folder that is not there yet, or is empty.
    index : Index
        Trained where its kind needs that, filled or empty. It is written, not kept: go on with the store.

    Returns
    -------
    Store

    Raises
    ------
    FileExistsError
        There is something at ``path``.

    Examples
    --------
    >>> with lutra.index.create("vectors.lutra", index) as store:  # doctest: +SKIP
    ...     store.add(more)
    >>> store = lutra.index.open("vectors.lutra")                  # doctest: +SKIP
    """
    path = os.fsdecode(path)
    if not index.is_trained:
        raise ValueError(f"this {type(index).__name__} is not trained: call train(x) with a sample first")
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path) or os.listdir(path):
            raise
    entry = Entry("000001-base.safetensors", index.ntotal)
    try:
        index.save(os.path.join(path, entry.file))
        _manifest.write(path, Manifest(1, index._ids.next, [entry]))
    except BaseException:
        for name in (entry.file, _manifest.NAME):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, name))
        with contextlib.suppress(OSError):
            os.rmdir(path)
        raise
    return Store(path, True)


def open_store(path: str | os.PathLike[str], mode: str = "r") -> Store:
    """Open a folder that `create` made.

    Parameters
    ----------
    path : str or path-like
    mode : {'r', 'a'}, default 'r'
        'a' may add and remove; one at a time, in all processes together.

    Returns
    -------
    Store

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    BlockingIOError
        Another writer has it open.
    ValueError
        It is no such folder, or a file in it is missing, damaged or does not fit; the path is named.
    """
    _checks.choice("mode", mode, {"r": 0, "a": 1})
    return Store(os.fsdecode(path), mode == "a")


def compact(path: str | os.PathLike[str]) -> None:
    """`Store.compact` of a folder that nobody else writes to."""
    with open_store(path, "a") as store:
        store.compact()
