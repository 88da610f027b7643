"""HNSW: search by walking a graph of near neighbours."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import F16, F32
from .._results import Neighbors
from ._files import File, Tensor, describe
from ._graph import STORAGES, Graph
from ._graph_codes import check_quantizer
from ._home import HOST, check_matrix
from ._quantizer_files import quantizer_config, quantizer_of, quantizer_tensors, restore_quantizer
from ._rows import Rows
from .base import Index, register
from .codes import SAMPLE, sampled

_KEPT = {"float32": F32, "float16": F16}
_METRICS = {"ip": 0, "l2": 1, "cosine": 2}


@register
class HNSW(Index):
    """A collection that is searched by walking a graph of near neighbours.

    Every vector is linked to up to 2 M others, near ones in different directions. A search goes along the
    links from a fixed vector towards the query, keeping the ``ef_search`` nearest that it has seen, and looks
    at a few hundred or thousand vectors whatever the size of the collection.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    M : int, default 16
        Links of a vector on the upper layers; on the lowest it has 2 M. 2 to 256. More take memory (8 M bytes
        a vector) and time to build, and give a higher recall at the same ``ef_search``.
    metric : {'l2', 'ip', 'cosine'}, default 'l2'
        As in `Flat`. For cosine the vectors for walking are normalised.
    ef_construction : int, default 200
        How many near vectors an insertion chooses its neighbours from.
    ef_search : int, default 64
        How many a search keeps, at least its k: the higher, the better the recall and the longer the time.
        An attribute, which may be changed at any time, and an argument of `search`.
    storage : {'int8', 'float16', 'bfloat16', 'float32'} or a quantizer, default 'int8'
        How the vectors are stored that walks compare with the query. ``'int8'``: d bytes and 8 more, each
        vector with a scale of its own; a walk then reads a quarter of the memory. A `lutra.quant.PQ` or
        `lutra.quant.OPQ`, trained or not (`train`): its codes, m bytes where it has 5 to 8 bits, m / 2
        where it has fewer.
    refine : {'auto', None, 'float32', 'float16'}, default 'auto'
        Keep the vectors as they are besides, 4 d or 2 d bytes each, so that a search ranks the best that it
        found by exact scores. ``'auto'``: ``'float32'`` where ``storage`` is ``'int8'``, ``'float16'`` for
        codes, else None. Codes are coarse: where memory is for them alone, take None, and expect the recall
        of an exhaustive scan of the codes, whatever ``ef_search``.
    seed : int, default 0
        Of the layers that vectors are put on.

    Notes
    -----
    The walk is best first on a layered graph, with the paper's choice of neighbours (its heuristic,
    algorithm 4). Vectors are inserted in batches of up to 1/32 of the graph, which search it in parallel and
    are then linked in order: the graph depends on how the vectors were divided into calls of `add`, never on
    the number of threads. Removal links the neighbours of what goes with one another.

    Memory a vector: the row by ``storage`` (rounded up to 64 bytes; codes to 16), the vector by ``refine``,
    8 M bytes of links and about 10 more. Searching takes n / 8 bytes a thread besides.

    Scores are exact with ``refine`` and with ``storage='float32'``, else those of the stored rows (of codes:
    by tables of 16-bit integers). With ``refine`` a search scores its best max(2 k, k + 16) again, over codes
    all ``ef_search``.

    Over codes the graph is built from the codes, also where vectors are kept: a graph of the vectors
    themselves finds about as much.

    References
    ----------
    Malkov, Yashunin, Efficient and robust approximate nearest neighbor search using hierarchical navigable
    small world graphs, arXiv 1603.09320. Batches: Manohar et al., ParlayANN, arXiv 2305.04359. Removal: Singh
    et al., FreshDiskANN, arXiv 2105.09613.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.random.default_rng(0).standard_normal((2000, 16), dtype=np.float32)
    >>> index = lutra.index.HNSW(16)
    >>> index.add(x)
    >>> index.search(x[:3], k=1).ids.ravel()
    array([0, 1, 2])
    """

    _host_only = True

    def __init__(
        self,
        d: int,
        M: int = 16,
        metric: str = "l2",
        *,
        ef_construction: int = 200,
        ef_search: int = 64,
        storage: Any = "int8",
        refine: str | None = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(d, metric)
        self.M = _checks.integer("M", M, 2, 256)
        self.ef_construction = _checks.integer("ef_construction", ef_construction, 1, 1 << 20)
        self.ef_search = _checks.integer("ef_search", ef_search, 1)
        #: The quantizer of the codes, None where rows are no codes.
        self.quantizer = check_quantizer(storage, self.d)
        if self.quantizer is None and not (isinstance(storage, str) and storage in STORAGES):
            raise ValueError(
                f"storage must be one of {', '.join(map(repr, STORAGES))}; got {storage!r} "
                "(a PQ or OPQ of lutra.quant is one too)"
            )
        self.storage = storage
        if refine == "auto":
            refine = "float16" if self.quantizer is not None else "float32" if storage == "int8" else None
        if refine is not None and refine not in _KEPT:
            raise ValueError(f"refine must be None, 'auto', 'float32' or 'float16', got {refine!r}")
        self.refine = refine
        self.seed = _checks.integer("seed", seed, 0)
        if storage == "int8" and self.d > 65536:
            raise ValueError(f"storage='int8' is for d up to 65536, got d = {self.d}")
        ip = metric != "l2"
        self._graph = Graph(
            self.d, 0 if ip else 1, metric == "cosine", storage, self.M, self.ef_construction, self.seed
        )
        self._rows = dict(self._graph.tables)
        if refine is not None:
            self._rows["vectors"] = Rows(HOST, self.d, _KEPT[refine])

    @property
    def is_trained(self) -> bool:
        return self.quantizer is None or self.quantizer.is_trained

    def train(self, x: Any, progress: bool | None = None) -> None:
        """Train the quantizer on a sample of vectors; nothing where there is none.

        Parameters
        ----------
        x : array, shape (n, d)
            Like those that will be added. At most 131,072 are used, drawn by a fixed seed.
        progress : bool or None
            A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

        Raises
        ------
        TypeError, ValueError
            As the quantizer's ``train``; an index that holds vectors, whose codes would lose their meaning.
        """
        native = check_matrix(x, "x", self.d)
        if self.quantizer is None:
            return
        with self._lock.writing():
            if self.ntotal:
                raise ValueError(f"the index holds {self.ntotal} coded vectors; train a new one")
            points = sampled(native, SAMPLE, 0)
            self.quantizer.train(
                HOST.normalise(points) if self.metric == "cosine" else points, progress=progress
            )
            self._graph.changed()

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._graph.nbytes

    # ---- changing
    def _encode(self, x, out, first):
        if self.refine is not None:
            with np.errstate(over="ignore"):
                out["vectors"][:] = x
            self._check_range(out["vectors"], self.refine, "refine", first)
        self._graph.encode(x, out)
        if self.storage == "float16":
            self._check_range(out["rows"].view(np.float16), "float16", "storage", first)

    @staticmethod
    def _check_range(values: np.ndarray, kept: str, argument: str, first: int) -> None:
        if kept == "float16" and not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
            raise ValueError(
                f"x[{first + row}] holds a value beyond float16, in which {argument}='float16' keeps "
                "vectors; take 'float32' or scale the vectors"
            )

    def _added(self, first, count):
        if first + count >= 2**31 - 1:
            raise ValueError(f"a graph holds less than 2**31 - 1 vectors; this makes {first + count}")
        self._graph.insert(first, count)

    def _removing(self, keep, before):
        self._graph.remove(keep, before)

    def _removed(self, keep, before):
        self._graph.removed(keep, before)

    # ---- searching
    def search(self, q: Any, k: int = 10, *, filter: Any = None, ef_search: int | None = None) -> Neighbors:
        """The k best vectors that a walk finds for each query.

        Parameters
        ----------
        q, k, filter
            As in `Flat.search`. With a filter that lets the share f of all vectors pass, a walk keeps ef / f
            of those that it sees; where that would come to a scan, or finds fewer than k, the vectors that
            pass are scanned instead.
        ef_search : int, optional
            Instead of the attribute.

        Returns
        -------
        scores, ids : arrays, shape (nq, k)
            As from `Flat.search`.

        Raises
        ------
        TypeError, ValueError
            As `Flat.search`; ``ef_search`` < 1.

        Notes
        -----
        Queries are searched in parallel, a single one on one thread. Collections that a walk would see a
        third of are scanned.
        """
        ef = self.ef_search if ef_search is None else ef_search
        if filter is None and type(q) is np.ndarray and type(k) is int and type(ef) is int:
            found = self._plain(q, k, ef)
            if found is not None:
                return found
        return self._answer(q, k, filter, ef=_checks.integer("ef_search", ef, 1))

    def _plain(self, q: np.ndarray, k: int, ef: int) -> Neighbors | None:
        """The short way of a few float32 queries, where microseconds count; None where it does not serve."""
        if q.dtype != np.float32 or q.ndim != 2 or q.size > 8192 or k < 1 or ef < 1:
            return None
        if q.shape[1] != self.d or not q.flags.c_contiguous or not isfinite(np.vdot(q, q)):
            return None
        self._lock.acquire_read()
        try:
            if not self._ids.n:
                return None
            scores, positions = self._search(q, k, None, ef)
            return Neighbors(scores, self._ids.of(HOST, positions))
        finally:
            self._lock.release_read()

    def _search(self, q, k, keep, ef):
        n = self._ids.n
        allowed = n
        if keep is not None:
            from .. import _filters

            allowed = _filters.count(keep)
        ef = max(ef, k)
        vectors = self._rows.get("vectors")
        exact = None if vectors is None else vectors.view
        rescore = max(2 * k, k + 16) if self.quantizer is None else ef
        return self._graph.search(q, k, ef, keep, allowed, exact, rescore, _METRICS[self.metric])

    def _reconstruct(self, positions):
        vectors = self._rows.get("vectors")
        if vectors is not None:
            return vectors.view[positions].astype(np.float32, copy=False)
        return self._graph.decode(positions)

    # ---- files
    def _config(self):
        return {
            "d": self.d, "M": self.M, "metric": self.metric, "ef_construction": self.ef_construction,
            "ef_search": self.ef_search, "storage": quantizer_config(self.storage),
            "refine": self.refine, "seed": self.seed,
        }  # fmt: skip

    @classmethod
    def _from_config(cls, config):
        config = {name: value for name, value in config.items() if name != "entry"}
        return cls(**{**config, "storage": quantizer_of(config.get("storage", "int8"))})

    def _contents(self):
        tensors = self._graph.contents()
        if self.refine is not None:
            tensors.append(Tensor.of_rows("vectors", self._rows["vectors"]))
        if self.quantizer is not None:
            tensors += quantizer_tensors(self.quantizer)
        if not self._ids.are_positions:
            tensors.append(Tensor.of_array("ids", self._ids.array))
        config = {**self._config(), "entry": self._graph.entry, "n": self.ntotal, "next_id": self._ids.next}
        return tensors, describe(type(self).__name__, {**config, "trained": self.is_trained})

    def _restore(self, file: File, n: int, mmap: bool) -> None:
        if self.quantizer is not None:
            trained = file.config.get("trained")
            if type(trained) is not bool or (n and not trained):
                file.fail(f"'trained' in the metadata is {trained!r}; there are {n} vectors")
            if trained:
                restore_quantizer(file, self.quantizer)
        self._graph.restore(file, n, file.config.get("entry"), mmap)
        if self.refine is not None:
            dtype = {"float32": "F32", "float16": "F16"}[self.refine]
            vectors, mapped = file.tensor("vectors", dtype, (n, self.d), mmap=mmap)
            self._rows["vectors"] = Rows.of(vectors, _KEPT[self.refine], mapped=mapped)
