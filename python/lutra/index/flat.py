"""Flat: exact search."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, scan
from .._arrays import BF16, F16, F32, I8, U8, kind_of
from .._results import RangeResult
from ..scan import _screen
from ._files import NAMES, File
from ._home import HOST, adopt, check_matrix, deliver, home_of, to_float32
from ._rows import Rows
from ._screened import Screened
from .base import Index, register

_STORAGE = {"float32": F32, "float16": F16, "bfloat16": BF16, "int8": I8, "uint8": U8}
_DISTANCES = ("l2", "l1", "linf", "poincare")
_WHOLE = {I8: (-128, 127), U8: (0, 255)}


@register
class Flat(Index):
    """A collection that is searched exactly.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    metric : {'ip', 'l2', 'cosine', 'l1', 'linf', 'poincare'}, default 'ip'
        As for `lutra.scan.knn`: ``'ip'`` and ``'cosine'`` are similarities, larger is better (cosine is 0
        where a norm is 0); the others are distances, smaller is better (``'l2'`` is squared).
        ``'poincare'`` takes vectors and queries of norm < 1.
    dtype : {'float32', 'float16', 'bfloat16', 'int8', 'uint8'}, default 'float32'
        What vectors are stored as. Half precision rounds them (float16 refuses what is beyond 65504); the
        8-bit types hold whole numbers in their range and refuse others: scale and round first, or see
        `lutra.quant`. bfloat16 needs the package ml_dtypes.
    screen : None or 'int8', default None
        ``'int8'``: keep a copy of 8-bit codes too, which searches scan instead of the vectors; see
        `lutra.scan.knn_screened`. The results are the same, in a fifth to a half of the time. For 'ip', 'l2'
        and 'cosine', d <= 65536, vectors of norm < 1e15. Not used by `range_search`, nor where k is more than
        an eighth of the collection.

    Notes
    -----
    Vectors are kept as they were added (cosine normalises nothing): 4, 2 or 1 bytes a value, and 8 for an id
    where ids are not simply 0, 1, 2, ..., and d + 8 for the codes of ``screen``. A search costs what
    `lutra.scan.knn` costs: 2 n d flops a query, or one read of the collection where queries are few, and so
    less for narrow types; or what `lutra.scan.knn_screened` costs. Scores are exact for the values as they
    are stored.

    On a GPU: CuPy has no bfloat16, and a query outside the ball of 'poincare' raises nothing: its scores are
    NaN.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> index = lutra.index.Flat(2, metric="l2")
    >>> index.add(np.array([[0, 0], [3, 4]], np.float32), ids=[10, 20])
    >>> index.search(np.array([[0, 1]], np.float32), k=2)
    Neighbors(scores=array([[ 1., 18.]], dtype=float32), ids=array([[10, 20]]))
    >>> index.range_search(np.array([[0, 1]], np.float32), radius=4).ids
    array([10])
    """

    _metrics = _checks.EXACT_METRICS

    def __init__(
        self, d: int, metric: str = "ip", *, dtype: str = "float32", screen: str | None = None
    ) -> None:
        super().__init__(d, metric)
        if screen is not None:
            _checks.choice("screen", screen, {"int8": 0})
            _checks.choice("metric of a screened index", metric, _screen.METRICS)
            _checks.integer("d of a screened index", self.d, 1, _screen.MAX_DIMS)
        self.screen = screen
        self._screened: Screened | None = None  # the codes, where there is a kernel
        self._code = _checks.choice("dtype", dtype, _STORAGE)
        self.dtype = dtype
        try:
            self._rows = {"vectors": Rows(HOST, self.d, self._code)}
        except ImportError as error:
            raise ImportError(
                "dtype 'bfloat16' needs the package ml_dtypes: pip install ml_dtypes"
            ) from error

    def train(self, x: Any, progress: bool | None = None) -> None:
        """Nothing: an exact index needs no training. ``x`` is checked, so that code for any index runs."""
        check_matrix(x, "x", self.d)

    def _encode(self, x, out, first):
        if self._code == F32 and self.metric != "poincare":
            out["vectors"][:] = x
            return
        home = self._home or HOST
        if self._code in _WHOLE:
            low, high = _WHOLE[self._code]
            good = (x >= low) & (x <= high) & (x == home.xp.round(x))
            self._refuse(home, x, good, first, f"{self.dtype} holds whole numbers from {low} to {high}")
        with np.errstate(over="ignore"):  # reported below
            out["vectors"][:] = x if home is HOST else home.kind.cast(x, self._code)
        stored = out["vectors"]
        if self._code in (F16, BF16):
            good = home.xp.isfinite(home.kind.cast(stored, F32))
            self._refuse(home, x, good, first, f"which is too large for {self.dtype}")
        if self.metric == "poincare":
            _in_ball(home, stored, "x", first)

    def _refuse(self, home, x, good, first, why):
        if not bool(good.all()):
            row, column = divmod(int(HOST.bring(good).argmin()), self.d)
            raise ValueError(f"x[{row + first}, {column}] is {float(x[row, column])}; {why}")

    # ---- the codes of a screened index
    def _code_from(self, first):
        """Code the rows from number ``first`` on; those before are coded, or are no longer what they were."""
        home = self._home or HOST
        if self.screen is None or home.kind.kernels is None:
            return
        if self._screened is None:
            self._screened, first = Screened(self.d, self.metric == "cosine", home), 0
        self._screened.set(self._rows["vectors"].view, min(first, self._screened.n))

    def _added(self, first, count):
        self._code_from(first)

    def _removed(self, keep, before):
        moved = np.flatnonzero(keep != np.arange(len(keep)))
        self._code_from(int(moved[0]) if len(moved) else len(keep))

    def _move(self, home):
        super()._move(home)
        if self._screened is not None and home.kind.kernels is None:
            self._screened = None
        elif self._screened is not None and self._screened.home is not home:
            self._screened = self._screened.to(home)
        elif self._screened is None and self._ids.n:
            self._code_from(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays (vectors, codes, ids), without room to grow.

        What is mapped from a file counts too, although the system may keep it on disk.
        """
        return super().nbytes + (0 if self._screened is None else self._screened.nbytes)

    def measure_recall(self, q: Any, k: int = 10) -> float:
        """The share of the k nearest vectors that `search` finds, measured against a scan of all vectors.

        Parameters
        ----------
        q : array, shape (nq, d)
            Queries, as for `search`.
        k : int, default 10

        Returns
        -------
        float
            In [0, 1]. A vector that is as near as the k-th, but for 1e-6 of its score, counts as found. An
            index without ``screen`` has recall 1 by definition; with it, 1 is what the bounds promise.

        Notes
        -----
        Costs an exact search besides the measured one.
        """
        found, exact = self.search(q, k), self._answer(q, k, exact=True)
        got, want = (HOST.bring(adopt(a.scores, "scores")) for a in (found, exact))
        if want.size == 0:
            return 1.0
        last = want[:, -1:]
        slack = 1e-6 * np.abs(np.where(np.isfinite(want), want, 0)).max(1, keepdims=True)
        with np.errstate(invalid="ignore"):
            good = got <= last + slack if self.metric in _DISTANCES else got >= last - slack
        return float(good.mean())

    def _search(self, q, k, keep, exact=False):
        self._check_queries(q)
        if self._screened is not None and not exact and k * 8 <= self._ids.n:
            return self._screened.search(q, self._rows["vectors"].view, k, self.metric, keep)
        return scan.knn(q, self._rows["vectors"].view, k, self.metric, filter=keep)

    def _check_queries(self, q):
        if self.metric == "poincare" and not (self._home or HOST).kind.cuda:  # there nothing waits to look
            _in_ball(HOST, q, "q", 0)

    def range_search(self, q: Any, radius: float, *, filter: Any = None) -> RangeResult:
        """All vectors within a radius of each query.

        Parameters
        ----------
        q : array, shape (nq, d)
            As for `search`.
        radius : float
            Vectors with score >= radius for 'ip' and 'cosine', <= radius for the distances ('l2' is squared).
        filter : optional
            Which ids may be found, as for `search`.

        Returns
        -------
        offsets : array, shape (nq + 1,), int64
            What was found for query i is at ``offsets[i] : offsets[i + 1]`` of the others.
        scores : array, shape (offsets[-1],), float32
            Best first within a query.
        ids : array, shape (offsets[-1],), int64

        Raises
        ------
        TypeError, ValueError
            As `search`, and for a radius that is no number.

        Notes
        -----
        See `lutra.scan.range_search`. On a GPU the call waits for it: how many results there are is known
        only then.
        """
        with self._lock.reading():
            native = check_matrix(q, "q", self.d)
            home = self._home or home_of(native, "q")
            with home.following(native):
                part = to_float32(home, native, "q", finite=not kind_of(native, "q").cuda)
                if not self._ids.n:
                    self._nothing()
                self._check_queries(part)
                keep = None if filter is None else self._keep(home, filter)
                view = self._rows["vectors"].view
                offsets, scores, positions = scan.range_search(part, view, radius, self.metric, filter=keep)
                return RangeResult(*deliver(home, (offsets, scores, self._ids.of(home, positions)), q))

    def _reconstruct(self, positions):
        return (self._home or HOST).kind.cast(self._rows["vectors"].view[positions], F32)

    def _config(self):
        config = {"d": self.d, "metric": self.metric}
        if self._code != F32:
            config["dtype"] = self.dtype
        return config if self.screen is None else {**config, "screen": self.screen}

    def _contents(self):
        tensors, metadata = super()._contents()
        return tensors + ([] if self._screened is None else self._screened.tensors()), metadata

    def _restore(self, file: File, n: int, mmap: bool) -> None:
        vectors, mapped = file.tensor("vectors", NAMES[self._code], (n, self.d), mmap=mmap)
        self._rows["vectors"] = Rows.of(vectors, self._code, mapped=mapped)
        if file.has("screen_codes"):
            if self.screen is None:
                file.fail("it holds the codes of a screen, and its config names none")
            self._screened = Screened(self.d, self.metric == "cosine")
            self._screened.restore(file, n, mmap)
        elif n:
            self._code_from(0)  # saved by a machine without the kernel, or from a GPU


def _in_ball(home, x, name, first):
    """Vectors of a metric that is defined in the open unit ball."""
    square = np.square(home.kind.to_numpy(x), dtype=np.float64).sum(1)
    outside = np.flatnonzero(square >= 1)
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"{name}[{row + first}] has norm {square[row] ** 0.5:.6g}; for 'poincare' norms must be < 1"
        )
