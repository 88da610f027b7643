"""What `Codes` and `IVF` share: coded vectors in lists, the vectors themselves beside them, files."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np

from .. import _backend, _checks, scan
from .._arrays import BF16, F16, F32, I8, I32, I64
from .._checks import METRICS
from ..scan._lists import Lists, list_rows, query_tables
from . import _files
from ._arena import BLOCK, Arena, Field
from ._codec import ROWS, Codec, merge, to_rows, to_rows_on_gpu
from ._codec_gpu import SELECTED, GpuScan, distinct
from ._home import HOST, Home
from ._quantizer_files import quantizer_of, quantizer_tensors, restore_quantizer
from ._refine import rescore_converted
from ._rows import Rows
from .base import Index

_KEPT = {"float32": F32, "float16": F16, "bfloat16": BF16, "int8": I8}
_FEW = 8192, 256  # lists, and of them probes, that a GPU finds by a scan of the centroids as rows
_BATCH, _PROBES = 4096, 1 << 20  # queries of a part, and the lists that they look into
# How codes lie in files: 2 as they are scanned; in 1 scalar codes lay row by row, and entries of 5 to 7 bits
# took a byte.
_LAYOUT = 2
_UPGRADED = 1 << 12  # blocks that are brought to it at a time
_CONVERTED = 1 << 24  # bytes of candidate rows that are converted at a time


class CodedIndex(Index):
    """Vectors coded by a quantizer (or kept as rows) in lists; with ``refine`` the vectors too."""

    _needs_kernels = ("list_rows", "list_scalar", "list_lut")

    def __init__(self, d: int, quantizer: Any, metric: str, refine: str | None) -> None:
        super().__init__(d, metric)
        if refine is not None and refine not in _KEPT:
            raise ValueError(f"refine must be None or one of {', '.join(map(repr, _KEPT))}, got {refine!r}")
        self.refine = refine
        self.quantizer = self._check_quantizer(quantizer)
        self._codec: Codec | None = None
        self._arena: Arena | None = None
        self._pending: list[Any] = []
        self._unchecked = False  # whether positions come from a file
        self._searcher: Any = None  # of the compiled module; made again after each change
        if refine is not None:
            self._rows["vectors"] = Rows(HOST, self.d, _KEPT[refine])
        if refine == "int8":
            self._rows["scales"] = Rows(HOST, 1, F32)
        #: A search scores the best ``k * refine_factor`` by codes again, where vectors are kept; 0: not.
        self.refine_factor = 0 if refine is None else 10 if self._coarse_codes else 4

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the searcher is made again."""
        return {**self.__dict__, "_searcher": None}

    def _check_quantizer(self, quantizer: Any) -> Any:
        from ..quant.base import Quantizer

        if isinstance(quantizer, str) and quantizer in ROWS:
            return quantizer
        if not isinstance(quantizer, Quantizer):
            raise TypeError(
                f"quantizer must be one of lutra.quant, or {', '.join(map(repr, ROWS))}, got {quantizer!r}"
            )
        if quantizer.d != self.d:
            raise ValueError(f"quantizer has d = {quantizer.d}; the index has d = {self.d}")
        return quantizer

    @property
    def _coarse_codes(self) -> bool:
        return not isinstance(self.quantizer, str) and self.quantizer.code_size * 2 <= self.d

    @property
    def _inner(self) -> str:
        """The metric of the codes: cosine is the inner product of normalised vectors."""
        return "ip" if self.metric == "cosine" else self.metric

    @property
    def _here(self) -> Home:
        return self._home or HOST

    def _unit(self, x: Any) -> Any:
        return self._here.normalise(x) if self.metric == "cosine" else x

    def _move(self, home: Home) -> None:
        if home.kind.cuda and self._lacking(home):
            return super()._move(home)  # which says what is lacking
        if self._arena is not None and self._arena.home is not home:
            self._check_positions()
            self._arena = self._arena.to(home)
        super()._move(home)
        self._searcher = None

    # ---- the lists
    @property
    def _nlist(self) -> int:
        return 1

    @property
    def _residual(self) -> bool:
        return False

    def _centers(self) -> np.ndarray | None:
        """Centroids (nlist, d) that codes are relative to."""
        return None

    @property
    def _coder(self) -> Codec:
        """The codec; made when the quantizer is trained."""
        if self._codec is None:
            self._codec = Codec(self.d, self.quantizer, self._inner, self._residual)
            self._arena = Arena(self._nlist, self._codec.fields, self._here)
        return self._codec

    @property
    def _lists(self) -> Arena:
        _ = self._coder
        assert self._arena is not None
        return self._arena

    @property
    def nbytes(self) -> int:
        total = super().nbytes + (self._arena.nbytes if self._arena is not None else 0)
        if not isinstance(self.quantizer, str):
            total += sum(a.nbytes for a in self.quantizer._tensors().values())
        return total

    def compact(self) -> None:
        """Give back the room that lists have to grow; bulk additions leave none."""
        with self._changing():
            if self._arena is not None:
                self._searcher = None
                self._arena.compact()

    # ---- adding and removing
    def _begin(self, count: int) -> None:
        self._pending = []

    def _assign(self, x: Any) -> list[Any]:
        """The lists of normalised vectors: one array for each list that a vector goes into."""
        return [self._here.full((len(x),), 0, I64)]

    def _encode(self, x: Any, out: dict[str, Any], first: int) -> None:
        self._keep_vectors(x, out, first)
        x = self._unit(x)
        home, centers = self._here, self._centers_here()
        for lists in self._assign(x):
            center = None if centers is None else centers[lists]
            if home is HOST:
                values = self._coder.encode(x, center, first)
            else:
                values = self._coder.encode_on_gpu(home, x, center, first)
            self._pending.append((lists, home.arange(len(x)) + first, values))

    def _keep_vectors(self, x: Any, out: dict[str, Any], first: int) -> None:
        if self.refine is None:
            return
        home = self._here
        xp = home.xp
        if self.refine == "int8":
            scale = xp.amax(abs(x), 1)[:, None] / np.float32(127)
            out["scales"][:] = scale
            steps = x / xp.where(scale > 0, scale, 1)
            out["vectors"][:] = np.rint(steps) if home is HOST else home.kind.cast(xp.round(steps), I8)
            return
        try:
            if home is HOST:
                out["vectors"][:] = to_rows(x, out["vectors"].dtype, first, self.refine)
            else:
                out["vectors"][:] = to_rows_on_gpu(home, x, _KEPT[self.refine], first, self.refine)
        except ValueError as error:
            raise ValueError(f"{error}, in which refine={self.refine!r} keeps vectors") from None

    def _added(self, first: int, count: int) -> None:
        pending, self._pending = self._pending, []
        self._searcher = None
        if not pending:
            return
        home = self._here
        lists = home.xp.concatenate([p[0] for p in pending])
        positions = home.kind.cast(home.xp.concatenate([p[1] for p in pending]) + first, I32)
        values = {}
        for name in list(pending[0][2]):
            values[name] = home.xp.concatenate([p[2].pop(name) for p in pending])
        self._lists.append(lists, positions, values)

    def _removed(self, keep: np.ndarray, before: int) -> None:
        self._searcher = None
        self._lists.remove(keep, before)

    def _reconstruct(self, positions: Any) -> Any:
        if self.refine is not None:
            return self._vectors_kept(positions)
        return self._here.bring(self._decoded(HOST.bring(positions)))

    def _decoded(self, positions: np.ndarray) -> np.ndarray:
        """What the codes at positions stand for, on the host."""
        arena, centers = self._lists, self._centers()
        if arena.positions is None:
            center = None if centers is None else np.repeat(centers, len(positions), 0)
            return self._coder.vectors(arena, positions, center)
        place = np.full(self.ntotal, -1, np.int64)
        place[positions] = np.arange(len(positions))
        rows, owner = arena.where(home=HOST)
        wanted = HOST.bring(arena.positions)[rows]
        found = np.full(len(positions), -1, np.int64)
        hit = np.flatnonzero(place[wanted] >= 0)
        _, once = np.unique(wanted[hit], return_index=True)  # a position may have two rows
        hit = hit[once]
        found[place[wanted[hit]]] = hit
        found = found[place[positions]]  # an id that is asked for twice
        center = None if centers is None else centers[owner[found]]
        return self._coder.vectors(arena, rows[found], center)

    def _vectors_kept(self, positions: Any) -> Any:
        x = self._here.kind.cast(self._rows["vectors"].view[positions], F32)
        return x * self._rows["scales"].view[positions] if self.refine == "int8" else x

    # ---- searching
    def _factor(self, refine_factor: Any) -> int:
        factor = self.refine_factor if refine_factor is None else refine_factor
        factor = _checks.integer("refine_factor", factor, 0)
        if factor and self.refine is None:
            raise ValueError(
                f"refine_factor is {factor}, but the index keeps no vectors: "
                "make it with refine='float32', 'float16', 'bfloat16' or 'int8'"
            )
        return factor

    def _centers_here(self) -> Any:
        """`_centers` where the index lives."""
        return self._centers()

    def _coarse(self) -> np.ndarray | None:
        """Centroids (blocks, d, 16) of which a search takes the nearest; None: every list is searched."""
        return None

    def _probe(self, q: np.ndarray, nprobe: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Scores and numbers of each query's lists; None: every list."""
        return None, None

    def _find(
        self, q: np.ndarray, k: int, keep: np.ndarray | None, nprobe: int, factor: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions, in parts of the batch."""
        if self._here is not HOST:
            return self._find_on_gpu(q, k, keep, nprobe, factor)
        step = max(1, min(self._coder.part(k * max(1, factor)), _BATCH, _PROBES // nprobe))
        if len(q) <= step:
            return self._find_part(q, k, keep, nprobe, factor)
        parts = [self._find_part(q[i : i + step], k, keep, nprobe, factor) for i in range(0, len(q), step)]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _find_part(self, q, k, keep, nprobe, factor):
        searcher = self._searcher
        if searcher is None:
            searcher = self._searcher = self._make_searcher()
        if searcher is False:
            return self._compose(q, k, keep, nprobe, factor)
        count = min(k * factor, self.ntotal)
        lut = bias = None
        if not self._own_tables:
            lut, bias = self._coder.tables(self._unit(q))
        fused = not count or self._fused_refine
        scores, ids, bad = searcher.search(
            q, k if fused else count, nprobe, count if fused else 0, keep, lut, bias
        )
        if bad != -1:
            self._explain(bad)
        return (scores, ids) if fused else self._rescore(q, ids, k)

    def _find_on_gpu(self, q: Any, k: int, keep: Any, nprobe: int, factor: int) -> tuple[Any, Any]:
        """The same where the index lives on a GPU. Nothing is read back, so that a CUDA graph can hold it."""
        home, there = self._here, self._searcher
        if there is None:
            there = _There(self)
            home.wait()  # other streams may search with it at once
            self._searcher = there
        copies = self._copies
        most, count = copies * self.ntotal, copies * k
        if factor:
            count = min(max(count, min(count * factor, SELECTED)), most)
        else:
            count = max(k, min(count, most))  # where the lists hold fewer than k the rest is padding
        step, parts = max(1, there.scan.part(count)), []
        for i in range(0, max(1, len(q)), step):
            part = q[i : i + step]
            unit = self._unit(part)
            base, probes = there.probe(unit, nprobe)
            lists = there.lists._replace(keep=keep, probes=probes)
            scores, ids = there.scan.scan(unit, self._lists, lists, count, base, there.centers)
            if factor:
                scores, ids = self._rescore_on_gpu(part, ids, k)
            elif copies > 1:
                scores, ids = distinct(home, scores, ids, k, self._inner)
            if self._inner == "l2":  # rounding may leave small negative ones
                scores = scores.clip(0, None)
            parts.append((scores, ids))
        if len(parts) == 1:
            return parts[0]
        return tuple(home.xp.concatenate(several) for several in zip(*parts))

    def _rescore_on_gpu(self, q: Any, candidates: Any, k: int) -> tuple[Any, Any]:
        vectors = self._rows["vectors"].view
        if self.refine != "int8":
            return scan.rescore(q, vectors, candidates, k, self.metric)
        return rescore_converted(
            self._here, q, vectors, candidates, k, self.metric, self._rows["scales"].view
        )

    def _explain(self, bad: int) -> None:
        if bad >= 1 << 40:
            raise ValueError(f"list {bad - (1 << 40)} of the index leaves its memory: the index is damaged")
        raise ValueError("a score is NaN or infinite, or a position is none of the index: it is damaged")

    def _make_searcher(self) -> Any:
        """What holds the index for searches in one call; False where it cannot."""
        core, codec = _backend.core, self._coder
        if core is None:
            return False
        arena = self._lists
        self._check_positions()
        about = codec.describe(arena)
        self._own_tables = codec.form in ("rows", "scalar") or about["books"] is not None
        # The other forms rescore by `lutra.scan.rescore`, which knows no scales of rows.
        self._fused_refine = codec.form == "lut4" or self.refine != "int8"
        view = self._rows["vectors"].view if self.refine is not None and self._fused_refine else None
        scales = self._rows["scales"].view if self.refine == "int8" and view is not None else None
        return core.ListSearcher({
            **about, "d": self.d, "inner": METRICS[self._inner], "metric": METRICS[self.metric],
            "nlist": self._nlist, "coarse": self._coarse(), "centroids": self._centers(),
            "arena_rows": arena.size,
            "npositions": self.ntotal, "list_begin": arena.begin, "list_rows": arena.rows,
            "positions": arena.positions, "repeated": int(self._copies > 1), "vectors": view,
            "vector_type": _KEPT[self.refine] if self.refine else 0, "scales": scales,
        })  # fmt: skip

    def _check_positions(self) -> None:
        """Look once at the positions that a file gave."""
        arena = self._lists
        if arena.positions is not None and self._unchecked and arena.size:
            low, high = int(arena.positions.min()), int(arena.positions.max())
            if low < -1 or high >= self.ntotal:
                raise ValueError(f"the lists hold positions from {low} to {high}: the index is damaged")
            self._unchecked = False

    def _compose(self, q, k, keep, nprobe, factor):
        """The search made of its parts, on the reference."""
        unit = self._unit(q)
        base, probes = self._probe(unit, nprobe)
        lists = self._of_lists(keep, probes)
        copies, most = self._copies, self._copies * self.ntotal
        count = min(copies * k * max(1, factor), most) if factor or copies > 1 else k
        found = self._coder.scan(unit, self._lists, lists, count, base, self._centers())
        if factor:
            return self._rescore(q, found[1], k)
        return merge([found], len(q), k, self._inner) if copies > 1 else found

    def _rescore(self, q: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        vectors = self._rows["vectors"].view
        if self.refine == "float32":
            return scan.rescore(q, vectors, candidates, k, self.metric)
        nq, c = candidates.shape
        step = max(1, _CONVERTED // (4 * c * self.d))
        results = []
        for i in range(0, nq, step):
            part = np.sort(candidates[i : i + step], 1)  # so that a row's place has the order of its position
            rows = np.maximum(part, 0).reshape(-1)
            places = np.where(part < 0, -1, np.arange(part.size).reshape(part.shape))
            places[:, 1:][part[:, 1:] == part[:, :-1]] = -1
            scores, where = scan.rescore(q[i : i + step], self._vectors_kept(rows), places, k, self.metric)
            results.append((scores, np.where(where < 0, -1, rows[where])))
        return np.concatenate([r[0] for r in results]), np.concatenate([r[1] for r in results])

    def _of_lists(self, keep: np.ndarray | None, probes: np.ndarray | None) -> Lists:
        arena = self._lists
        return Lists(arena.begin, arena.rows, arena.positions, self.ntotal, keep, probes)

    # ---- configuration and files
    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> Any:
        config = dict(config)
        quantizer = quantizer_of(config.pop("quantizer"))
        factor = config.pop("refine_factor", None)
        layout = config.pop("layout", 1)
        if type(layout) is not int or not 1 <= layout <= _LAYOUT:
            raise ValueError(f"'layout' must be an integer from 1 to {_LAYOUT}, it is {layout!r}")
        index = cls(quantizer=quantizer, **config)
        if factor is not None:
            index.refine_factor = index._factor(factor)
        return index

    def _contents(self) -> tuple[list[_files.Tensor], dict[str, str]]:
        tensors, metadata = super()._contents()
        if not isinstance(self.quantizer, str):
            tensors += quantizer_tensors(self.quantizer)
        if self.is_trained:
            arena = self._lists
            blocks = int(((arena.rows + BLOCK - 1) // BLOCK).sum())
            if self._nlist > 1:
                tensors.append(_files.Tensor.of_array("list_rows", arena.rows))
                tensors.append(
                    _files.Tensor("positions", "I32", (blocks, BLOCK), partial(arena.parts, "positions"))
                )
            for name, field in arena.fields.items():
                shape = (blocks, field.a, BLOCK, field.b)
                dtype = _files.name_of(field.dtype)
                tensors.append(_files.Tensor(name, dtype, shape, partial(arena.parts, name)))
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), "layout": _LAYOUT})
        return tensors, metadata

    def _restore(self, file: _files.File, n: int, mmap: bool) -> None:
        trained = file.config.get("trained")
        if trained is not True and (trained is not False or n):
            file.fail(
                "the metadata 'trained' is not true, but there are vectors"
                if n
                else "no 'trained' in the metadata"
            )
        if trained:
            self._restore_trained(file)
            self._restore_lists(file, n, mmap)
        if self.refine is not None:
            code = _KEPT[self.refine]
            vectors, mapped = file.tensor("vectors", _files.NAMES[code], (n, self.d), mmap=mmap)
            self._rows["vectors"] = Rows.of(vectors, code, mapped=mapped)
        if self.refine == "int8":
            scales, mapped = file.tensor("scales", "F32", (n, 1), mmap=mmap)
            self._rows["scales"] = Rows.of(scales, F32, mapped=mapped)

    def _restore_trained(self, file: _files.File) -> None:
        if not isinstance(self.quantizer, str):
            restore_quantizer(file, self.quantizer)

    def _restore_lists(self, file: _files.File, n: int, mmap: bool) -> None:
        arena = self._lists
        rows, positions = np.array([n], np.int64), None
        copies = self._copies
        if self._nlist > 1:
            rows, _ = file.tensor("list_rows", "I64", (self._nlist,), mmap=False)
            if len(rows) and (rows.min() < 0 or rows.max() > n or int(rows.sum()) != copies * n):
                file.fail(
                    f"the lists hold {int(rows.sum())} rows; for {n} vectors they must hold {copies * n}"
                )
        blocks = int(((rows + BLOCK - 1) // BLOCK).sum())
        if self._nlist > 1:
            # A position beyond n is found out when a search meets it.
            found, _ = file.tensor("positions", "I32", (blocks, BLOCK), mmap=mmap)
            positions = found.reshape(-1)
        arrays = {}
        old = self._coder.fields_of_layout_1 if file.config.get("layout", 1) == 1 else {}
        for name, field in arena.fields.items():
            written = old.get(name, field)
            shape = (blocks, written.a, BLOCK, written.b)
            array, _ = file.tensor(name, _files.name_of(field.dtype), shape, mmap=mmap)
            arrays[name] = array if written is field else self._upgraded(array, field)
        arena.restore(rows, arrays, positions)
        self._unchecked = True  # until the first search: opening a file reads no more than it must

    def _upgraded(self, old: np.ndarray, field: Field) -> np.ndarray:
        """The array of codes of a file that has them in layout 1."""
        array = field.empty(len(old))
        for i in range(0, len(old), _UPGRADED):
            rows = old[i : i + _UPGRADED].transpose(0, 2, 1, 3).reshape(-1, *old.shape[1::2])
            new = self._coder.of_layout_1(rows).reshape(-1, BLOCK, field.a, field.b)
            array[i : i + _UPGRADED] = new.transpose(0, 2, 1, 3)
        return array

    @property
    def _copies(self) -> int:
        """Rows that a vector has in the lists."""
        return 1


class _There:
    """What searches on a GPU need of an index as it is: made after each change of it."""

    def __init__(self, index: CodedIndex) -> None:
        home, arena = index._here, index._lists
        self.home = home
        self.inner = index._inner
        self.nlist = index._nlist
        self.scan = GpuScan(index._coder, home)
        self.centers = index._centers_here()
        self.columns = None  # centroids side by side, (1, d, nlist)
        if self.centers is not None:
            self.columns = home.kind.dense(self.centers.T)[None]
        coarse = index._coarse()
        # The centroids as one list of rows, as the CPU scans them: the quicker way where they are not many.
        self.rows = home.bring(coarse) if coarse is not None and self.nlist <= _FEW[0] else None
        self.whole = Lists(
            home.full((1,), 0, I64), home.full((1,), self.nlist, I64), None, self.nlist, None, None,
            self.nlist, self.nlist,
        )  # fmt: skip
        every = home.arange(self.nlist)[None]
        self.every = every
        self.lists = Lists(
            home.bring(arena.begin), home.bring(arena.rows), arena.positions, index.ntotal, None, every,
            arena.longest, arena.typical, index._copies > 1,
        )  # fmt: skip

    def probe(self, q: Any, nprobe: int) -> tuple[Any, Any]:
        """Scores and numbers of the lists that queries look into."""
        if self.columns is None:
            return None, self.home.full((len(q), 1), 0, I64)
        if nprobe < self.nlist:
            if self.rows is not None and nprobe <= _FEW[1]:  # whatever the batch: its size changes no bit
                lists = self.whole._replace(probes=self.home.full((len(q), 1), 0, I64))
                return list_rows(self.home.kind.dense(q), self.rows, lists, nprobe, self.inner)
            return scan.knn(q, self.centers, nprobe, self.inner)
        base = query_tables(q, self.columns, distances=self.inner == "l2")[:, 0]
        probes = self.home.empty((len(q), self.nlist), I64)
        probes[:] = self.every
        return base, probes
