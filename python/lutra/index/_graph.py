"""The graph of an `HNSW` index: its arrays, how it grows and shrinks. `csrc/graph/graph.h` defines it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _backend
from .. import reference as _reference
from ._files import File, Tensor
from ._graph_codes import Coder
from ._graph_tables import Table
from ._progress import Progress

#: storage: (number in csrc/common/types.h, bytes a value)
STORAGES = {"float32": (0, 4), "float16": (1, 2), "bfloat16": (2, 2), "int8": (3, 1)}
_CODES = 4
_LINE = 64
_SHARE = 32  # a batch of insertions is at most this part of the graph
_BATCH = 4096  # and at most so many: Python looks for an interrupt between batches
_TOP = 15  # the highest layer; one in M**15 nodes would lie higher
_ALPHA = 1.0
_REBUILD = 4  # where fewer than one in so many nodes stay, they are linked anew


def _kernels() -> Any:
    return _reference.graph if _backend.core is None else _backend.core


class Graph:
    """Nodes 0 .. n-1 with their vectors and lists.

    Parameters
    ----------
    d : int
    metric : int
        0: ip, 1: l2.
    normalise : bool
        Vectors are divided by their norms.
    storage : str, PQ or OPQ
    M, ef_construction, seed : int
    """

    def __init__(
        self, d: int, metric: int, normalise: bool, storage: Any, M: int, ef_construction: int, seed: int
    ) -> None:
        self.d, self.metric, self.normalise, self.M = d, metric, normalise, M
        self.ef, self.seed = ef_construction, seed
        self.coder = None if isinstance(storage, str) else Coder(storage, normalise)
        if self.coder is None:
            self.storage, size = STORAGES[storage]
            self.stride = -(-d * size // _LINE) * _LINE
        else:
            self.storage, self.stride = _CODES, self.coder.stride
        self.fill = 2 * M * 3 // 4  # full lists would be chosen anew with every node that comes to them
        #: what there is one row of for each node
        self.tables: dict[str, Table] = {
            "rows": Table(self.stride, np.uint8),
            "links": Table(2 * M, np.int32),
            "levels": Table(1, np.uint8),
            "upper_at": Table(1, np.int32),
        }
        if storage == "int8":
            self.tables["terms"] = Table(2, np.float32)
        self.upper = Table(M, np.int32)
        self.owners = Table(1, np.int32)
        self.entry = -1
        self._heads = np.empty(0, np.int32)
        self._tuple: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:  # views would be copied as arrays of their own
        return {**self.__dict__, "_tuple": None, "_heads": np.empty(0, np.int32)}

    @property
    def nbytes(self) -> int:
        """Beside the tables."""
        codebooks = 0 if self.coder is None else self.coder.nbytes
        return self.upper.nbytes + self.owners.nbytes + self._heads.nbytes + codebooks

    @property
    def levels(self) -> np.ndarray:
        return self.tables["levels"].view[:, 0]

    def parts(self) -> tuple[Any, ...]:
        """The graph as the kernels take it."""
        if self._tuple is None:
            t = self.tables
            n = t["rows"].n
            top = int(self.levels[self.entry]) if self.entry >= 0 else 0
            terms = t["terms"].view if "terms" in t else None
            codes = (None, None, 0, 0) if self.coder is None else self.coder.parts()
            self._tuple = (
                t["rows"].view, terms, t["links"].view, self.upper.view, t["upper_at"].view[:, 0],
                self.levels, n, self.upper.n, self.d, self.stride, 2 * self.M, self.M, self.entry, top,
                self.storage, self.metric, *codes,
            )  # fmt: skip
        return self._tuple

    def changed(self) -> None:
        self._tuple = None

    # ---- vectors
    def encode(self, x: np.ndarray, out: dict[str, Any]) -> None:
        x = np.ascontiguousarray(x)
        if self.coder is not None:
            self.coder.encode(x, out["rows"])
        else:
            _kernels().graph_encode(
                x, len(x), self.d, self.stride, self.storage, self.metric, self.normalise, out["rows"],
                out.get("terms"),
            )  # fmt: skip
        out["links"][:] = -1

    def decode(self, positions: np.ndarray) -> np.ndarray:
        rows = self.tables["rows"].view[positions]
        if self.coder is not None:
            return self.coder.decode(rows)
        terms = self.tables["terms"].view[positions] if "terms" in self.tables else None
        return _reference.graph.decode(rows, terms, self.d, self.storage)

    # ---- growing
    def level_of(self, first: int, count: int) -> np.ndarray:
        """Levels of positions: floor(-ln u / ln M), u from a hash of seed and position (splitmix64)."""
        z = np.arange(first, first + count, dtype=np.uint64)
        z += np.uint64((self.seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        u = ((z >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53  # (0, 1]
        levels = np.floor(-np.log(u) / np.log(max(2, self.M)))
        return np.minimum(levels, _TOP).astype(np.uint8)

    def insert(self, first: int, count: int) -> None:
        """Link the nodes from ``first`` on, whose rows are there; where that fails, take them out again."""
        levels = self.level_of(first, count)
        self._add_levels(first, count, levels)
        try:
            self._link(first, count, levels)
        except BaseException:
            self._forget(first)
            raise
        finally:
            self.changed()

    def _add_levels(self, first: int, count: int, levels: np.ndarray) -> None:
        self.tables["levels"].view[first:, 0] = levels
        rows = levels.astype(np.int64)
        starts = self.upper.n + np.cumsum(rows) - rows
        self.tables["upper_at"].view[first:, 0] = np.where(rows > 0, starts, -1)
        self.owners.append(
            np.repeat(np.arange(first, first + count, dtype=np.int32), rows)[:, None], int(rows.sum())
        )
        self.upper.append(-1, int(rows.sum()))

    def _link(self, first: int, count: int, levels: np.ndarray) -> None:
        self.tables["links"].own()
        self.upper.own()
        at, end = first, first + count
        if self.entry < 0 and count:
            self.entry, at = at, at + 1
        with Progress(count, "HNSW building", None) as bar:
            while at < end:
                batch = min(max(1, at // _SHARE), _BATCH, end - at)
                # A node that is higher than the top ends its batch and is where walks begin from then on.
                top = int(self.levels[self.entry])
                higher = np.flatnonzero(levels[at - first : at - first + batch] > top)
                if len(higher):
                    batch = int(higher[0]) + 1
                self._insert(np.arange(at, at + batch, dtype=np.int32))
                at += batch
                if len(higher):
                    self.entry = at - 1
                bar.tick(batch)
        if count * 8 > end:
            self._heads = np.empty(0, np.int32)  # small additions use them again and again

    def _insert(self, nodes: np.ndarray) -> None:
        self.changed()
        parts = self.parts()
        lists = self.tables["rows"].n + self.upper.n
        if len(self._heads) < lists:
            self._heads = np.full(lists + lists // 4, -1, np.int32)
        _kernels().graph_insert(
            parts, nodes, len(nodes), self.ef, _ALPHA, self.fill, self.owners.view, self._heads
        )
        self.changed()

    def _forget(self, first: int) -> None:
        """Take out the nodes from ``first`` on, which may be linked or not."""
        self._heads = np.empty(0, np.int32)
        if first == 0:
            self.entry = -1
        else:
            stay = np.arange(self.tables["rows"].n) < first
            self._repair(stay)
        self.upper.n = self.owners.n = int(self.levels[:first].sum(dtype=np.int64))

    # ---- shrinking
    def remove(self, keep: np.ndarray, before: int) -> None:
        """Before nodes are taken away: no list of those at ``keep`` shall name any other."""
        self.changed()
        stay = np.zeros(before, bool)
        stay[keep] = True
        if len(keep) == 0 or len(keep) * _REBUILD < before:
            self.entry = -1
        else:
            self._repair(stay)

    def _repair(self, stay: np.ndarray) -> None:
        self.tables["links"].own()
        self.upper.own()
        if not stay[self.entry]:
            self.entry = int(np.argmax(np.where(stay, self.levels.astype(np.int64), -1)))
        self.changed()
        dead = np.packbits(~stay, bitorder="little")
        _kernels().graph_repair(self.parts(), dead, _ALPHA, self.fill)
        self.changed()

    def removed(self, keep: np.ndarray, before: int) -> None:
        """The tables have lost all rows but those of ``keep``: number the nodes anew."""
        n = len(keep)
        number = np.full(before + 1, -1, np.int32)
        number[keep] = np.arange(n, dtype=np.int32)  # the last stays -1, for the ends of lists
        owner = number[self.owners.view[:, 0]]
        rows = np.flatnonzero(owner >= 0)
        self.owners.keep(rows)
        self.owners.view[:, 0] = owner[rows]
        self.upper.keep(rows)
        levels = self.levels.astype(np.int64)
        self.tables["upper_at"].view[:, 0] = np.where(levels > 0, np.cumsum(levels) - levels, -1)
        self._heads = np.empty(0, np.int32)
        self.changed()
        if self.entry < 0:
            self.tables["links"].view[:] = -1
            self.upper.view[:] = -1
            if n:
                self._link(0, n, self.levels)
            return
        self.entry = int(number[self.entry])
        for table in (self.tables["links"], self.upper):
            for i in range(0, table.n, table.step):
                part = table.view[i : i + table.step]
                # a number out of range (in a mapped file that someone wrote to) ends its list
                part[:] = number[np.where((part < 0) | (part >= before), before, part)]
        self._adopt_orphans()

    def _adopt_orphans(self) -> None:
        """Link again the nodes that no list names any more."""
        links = self.tables["links"].view
        named = np.zeros(len(links) + 1, bool)
        named[links] = True
        named[self.entry] = True
        orphans = np.flatnonzero(~named[:-1])
        if len(orphans) == 0:
            return
        links[orphans] = -1
        self.upper.view[np.isin(self.owners.view[:, 0], orphans)] = -1
        for i in range(0, len(orphans), _BATCH):
            self._insert(orphans[i : i + _BATCH].astype(np.int32))

    # ---- searching
    def search(
        self,
        q: np.ndarray,
        k: int,
        ef: int,
        keep: Any,
        allowed: int,
        exact: Any,
        rescore: int,
        score_metric: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = np.empty((len(q), k), np.float32)
        positions = np.empty((len(q), k), np.int64)
        if not q.flags.c_contiguous:
            q = np.ascontiguousarray(q)
        code = 0 if exact is None or exact.dtype == np.float32 else 1
        turned = None if self.coder is None else self.coder.turned(q)
        _kernels().graph_search(
            self.parts(), q, turned, len(q), k, ef, rescore, keep, allowed, exact, code, score_metric, scores,
            positions, None,
        )  # fmt: skip
        return scores, positions

    # ---- files
    def contents(self) -> list[Tensor]:
        t = self.tables
        tensors = [Tensor("rows", "U8", (t["rows"].n, self.stride), t["rows"].parts)]
        if "terms" in t:
            tensors.append(Tensor("terms", "F32", (t["terms"].n, 2), t["terms"].parts))
        tensors.append(Tensor("links", "I32", (t["links"].n, 2 * self.M), t["links"].parts))
        tensors.append(Tensor("levels", "U8", (t["levels"].n,), t["levels"].parts))
        tensors.append(Tensor("upper", "I32", (self.upper.n, self.M), self.upper.parts))
        return tensors

    def restore(self, file: File, n: int, entry: Any, mmap: bool) -> None:
        """From a file: lists and levels are checked, vectors are not read."""
        if n >= 2**31 - 1:
            file.fail(f"{n} vectors; a graph holds less than 2**31 - 1")
        if type(entry) is not int or not (0 <= entry < n if n else entry == -1):
            file.fail(f"'entry' in the metadata is {entry!r}; it must be a position below {n} (-1 of none)")
        levels, _ = file.tensor("levels", "U8", (n,), mmap=False)
        if n and int(levels.max()) > min(_TOP, int(levels[entry])):
            file.fail(
                f"a level is {int(levels.max())}; the entry's is {int(levels[entry])}, the limit {_TOP}"
            )
        rows = int(levels.sum(dtype=np.int64))
        for name, table, shape in (
            ("links", self.tables["links"], (n, 2 * self.M)),
            ("upper", self.upper, (rows, self.M)),
        ):
            values, mapped = file.tensor(name, "I32", shape, mmap=mmap)
            if values.size and (int(values.min()) < -1 or int(values.max()) >= n):
                file.fail(f"{name!r} names nodes from {values.min()} to {values.max()}; there are {n}")
            table.take_over(values, mapped=mapped)
        values, mapped = file.tensor("rows", "U8", (n, self.stride), mmap=mmap)
        self.tables["rows"].take_over(values, mapped=mapped)
        if values.ctypes.data % 4:  # a file that lutra did not write may begin anywhere
            self.tables["rows"].own()
        if "terms" in self.tables:
            values, mapped = file.tensor("terms", "F32", (n, 2), mmap=mmap)
            self.tables["terms"].take_over(values, mapped=mapped)
        self.tables["levels"].take_over(levels)
        counts = levels.astype(np.int64)
        at = np.where(counts > 0, np.cumsum(counts) - counts, -1).astype(np.int32)
        self.tables["upper_at"].take_over(at)
        self.owners.take_over(np.repeat(np.arange(n, dtype=np.int32), counts))
        self.entry = entry
        self.changed()
