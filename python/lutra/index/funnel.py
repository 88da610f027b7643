"""Funnel: Matryoshka embeddings, searched by ever longer prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .. import _checks, scan
from .._arrays import F16, F32, F64
from .._results import Neighbors
from ._compact import rescore_fetched
from ._files import File
from ._home import HOST, check_matrix, deliver, home_of, to_float32
from ._refine import rescore_converted
from ._rows import Rows
from .base import Index, register

_KEPT = {"float32": F32, "float16": F16}
_NAMES = {"float32": "F32", "float16": "F16"}
_METRICS = {"ip": 0, "l2": 1, "cosine": 2}


def check_dims(dims: Any, d: int) -> tuple[int, ...]:
    """Increasing prefixes below d, one at least; d itself may close them and is dropped."""
    if not isinstance(dims, (Sequence, np.ndarray)) or isinstance(dims, str):
        raise TypeError(f"dims must be a list of integers, got {dims!r}")
    out = tuple(_checks.integer("dims", v, 1) for v in dims)
    if out and out[-1] == d:
        out = out[:-1]
    if not out or any(a >= b for a, b in zip(out, (*out[1:], d))):
        raise ValueError(f"dims must be increasing prefixes below d = {d}, one at least; got {tuple(dims)}")
    return out


def check_keep(keep: Any, stages: int) -> tuple[int, ...] | None:
    """Candidates after each stage, not increasing; None: by k."""
    if keep is None:
        return None
    if not isinstance(keep, (Sequence, np.ndarray)) or isinstance(keep, str):
        raise TypeError(f"keep must be a list of integers, or None, got {keep!r}")
    out = tuple(_checks.integer("keep", v, 1) for v in keep)
    if len(out) != stages or any(a < b for a, b in pairwise(out)):
        raise ValueError(
            f"keep must be {stages} numbers that do not increase, one for each of dims; got {tuple(keep)}"
        )
    return out


def plan(keep: tuple[int, ...] | None, stages: int, k: int, n: int) -> list[int]:
    """How many candidates each prefix leaves: at least k, at most n."""
    wanted = keep or tuple(k * 4 ** (stages - i) for i in range(stages))
    return [max(1, min(n, max(k, v))) for v in wanted]


@register
class Funnel(Index):
    """A collection of Matryoshka embeddings, whose prefixes are embeddings themselves.

    A search scans the shortest prefix of all vectors, ranks what it leaves by the next longer one, and so on;
    the last candidates are ranked by whole vectors. With ``metric='cosine'`` each prefix is normalised anew.

    Parameters
    ----------
    d : int
    dims : list of int
        Lengths of the prefixes, increasing, below d.
    keep : list of int, optional
        How many candidates each prefix leaves to the next, not increasing. Default: 4, 16, 64, ... times k,
        counted from the last prefix.
    metric : {'cosine', 'ip', 'l2'}, default 'cosine'
    storage : {'float32', 'float16'}, default 'float32'
        How whole vectors are kept.

    Attributes
    ----------
    keep
        As above; may be set, and given to `search`.

    Notes
    -----
    Memory: whole vectors, and 4 dims[0] bytes each for a copy of the shortest prefix (normalised for cosine),
    so that the scan reads nothing else. A search costs 2 n dims[0] flops a query, and reads of candidates'
    rows.

    References
    ----------
    Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, arXiv 2205.13147 (funnel retrieval).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.random.default_rng(0).standard_normal((1000, 64), dtype=np.float32)
    >>> index = lutra.index.Funnel(64, dims=(16, 32))
    >>> index.add(x)
    >>> index.search(x[:2], k=1).ids.ravel()
    array([0, 1])
    """

    _needs_kernels = ("knn", "rescore")

    def __init__(
        self,
        d: int,
        dims: Sequence[int],
        keep: Sequence[int] | None = None,
        metric: str = "cosine",
        *,
        storage: str = "float32",
    ) -> None:
        super().__init__(d, metric)
        self.dims = check_dims(dims, self.d)
        if storage not in _KEPT:
            raise ValueError(f"storage must be 'float32' or 'float16', got {storage!r}")
        self.storage = storage
        self.keep = keep
        self._rows = {
            "prefix": Rows(HOST, self.dims[0], F32),
            "vectors": Rows(HOST, self.d, _KEPT[storage]),
        }

    @property
    def keep(self) -> tuple[int, ...] | None:
        return self._kept

    @keep.setter
    def keep(self, keep: Sequence[int] | None) -> None:
        self._kept = check_keep(keep, len(self.dims))

    def train(self, x: Any, progress: bool | None = None) -> None:
        """Nothing: prefixes need no training. ``x`` is checked, so that code for any index runs."""
        check_matrix(x, "x", self.d)

    def _encode(self, x, out, first):
        home = self._home or HOST
        out["prefix"][:] = self._first(home, x)
        with np.errstate(over="ignore"):
            out["vectors"][:] = x
        if self.storage == "float16" and not home.all_finite(out["vectors"]):
            row = int(np.flatnonzero(~HOST.bring(home.xp.isfinite(out["vectors"])).all(1))[0])
            raise ValueError(f"x[{first + row}] holds a value beyond float16: take storage='float32'")

    def _first(self, home, x):
        prefix = home.kind.dense(x[:, : self.dims[0]])
        return home.normalise(prefix) if self.metric == "cosine" else prefix

    def search(
        self, q: Any, k: int = 10, *, filter: Any = None, keep: Sequence[int] | None = None
    ) -> Neighbors:
        """The k best vectors for each query, of those that the prefixes leave.

        Parameters
        ----------
        q, k, filter
            As in `Flat.search`.
        keep : list of int, default: the attribute of that name
            Never less than k is kept.

        Returns
        -------
        scores, ids : arrays, shape (nq, k)
            As from `Flat.search`: scores are those of whole vectors.
        """
        kept = self._kept if keep is None else check_keep(keep, len(self.dims))
        return self._answer(q, k, filter, kept=kept)

    def _search(self, q, k, keep, kept):
        home = self._home or HOST
        counts = plan(kept, len(self.dims), k, self.ntotal)
        options = {} if keep is None else {"filter": keep}
        metric, first = "ip" if self.metric == "cosine" else self.metric, self._rows["prefix"].view
        candidates = scan.knn(self._first(home, q), first, counts[0], metric, **options).ids
        return narrow(home, q, self._rows["vectors"].view, candidates, k, self.dims, counts, self.metric)

    def _reconstruct(self, positions):
        return (self._home or HOST).kind.cast(self._rows["vectors"].view[positions], F32)

    def _config(self):
        return {
            "d": self.d, "dims": list(self.dims), "keep": None if self._kept is None else list(self._kept),
            "metric": self.metric, "storage": self.storage,
        }  # fmt: skip

    def _restore(self, file: File, n: int, mmap: bool) -> None:
        prefix, mapped = file.tensor("prefix", "F32", (n, self.dims[0]), mmap=mmap)
        self._rows["prefix"] = Rows.of(prefix, F32, mapped=mapped)
        vectors, mapped = file.tensor("vectors", _NAMES[self.storage], (n, self.d), mmap=mmap)
        self._rows["vectors"] = Rows.of(vectors, _KEPT[self.storage], mapped=mapped)


def narrow(home, q, vectors, candidates, k, dims, counts, metric):
    """The stages behind the first: the longer prefixes of the candidates, then whole vectors."""
    for width, count in zip(dims[1:], counts[1:]):
        part, prefixes = home.kind.dense(q[:, :width]), vectors[:, :width]
        if home is HOST:
            _, candidates = rescore_fetched(part, prefixes.__getitem__, candidates, count, metric)
        else:
            _, candidates = rescore_converted(home, part, prefixes, candidates, count, metric)
    return scan.rescore(q, vectors, candidates, k, metric)


def funnel(
    queries: Any,
    vectors: Any,
    k: int = 10,
    dims: Sequence[int] = (64,),
    keep: Sequence[int] | None = None,
    metric: str = "cosine",
) -> Neighbors:
    """Search arrays by ever longer prefixes: `Funnel` without an index.

    Parameters
    ----------
    queries : array, shape (nq, d), float32, float16, bfloat16, float64, uint8 or int8
    vectors : array, shape (n, d), likewise
    k : int, default 10
    dims, keep, metric
        As for `Funnel`.

    Returns
    -------
    scores, ids : arrays, shape (nq, k)
        In the library and on the device of ``queries``, where the search runs; ids are rows of ``vectors``.

    Raises
    ------
    TypeError, ValueError
        As `Funnel` and its search.

    Notes
    -----
    The shortest prefix is copied at each call; an index copies it once.
    """
    native = check_matrix(queries, "queries")
    d = native.shape[1]
    x = check_matrix(vectors, "vectors")
    if x.shape[1] != d:
        raise ValueError(f"vectors has {x.shape[1]} columns, queries has {d}; they must be equal")
    k = _checks.integer("k", k, 1)
    _checks.choice("metric", metric, _METRICS)
    prefixes = check_dims(dims, d)
    counts = plan(check_keep(keep, len(prefixes)), len(prefixes), k, x.shape[0])
    home = home_of(native, "queries")
    q = to_float32(home, native, "queries", finite=not home.kind.cuda)
    x = home.bring(x)
    if home.kind.code(x) == F64:
        x = home.kind.cast(x, F32)
    first, start = (home.kind.dense(home.kind.cast(a[:, : prefixes[0]], F32)) for a in (x, q))
    candidates = scan.knn(start, first, counts[0], metric).ids
    results = narrow(home, q, x, candidates, k, prefixes, counts, metric)
    return Neighbors(*deliver(home, results, queries))
