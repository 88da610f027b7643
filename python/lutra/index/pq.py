"""PQ: product quantization, a collection of m bytes a vector."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, address, scan
from .._arrays import F16, F32, I64, U8, kind_of
from .._results import Neighbors
from . import _files
from ._home import HOST, Home, adopt, check_matrix, deliver, home_of, to_float32
from ._kmeans import INITS, lloyd, sample
from ._pq_scan import pq_scan
from ._progress import Progress
from ._refine import refine as refine_candidates
from ._rows import Rows
from .base import Index, register

_KEPT = {"float32": F32, "float16": F16}
_ENCODE = 1 << 14  # rows that are encoded at a time: their sub-vectors stay in the caches
_REFINE = 4
_SELECTED = 1820  # candidates that the quick scan on a GPU finds: 2048 with its spare ones (pq_plan.cuh)


@register
class PQ(Index):
    """A collection compressed by product quantization.

    A vector is cut into m sub-vectors, and each is replaced by the number of the nearest of 2**bits
    centroids, which k-means has learnt. A search compares the exact query with the coded vectors.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    m : int
        Number of sub-vectors, and bytes a vector; divides d.
    bits : int, default 8
        Bits of a code, 1 to 8. A code takes a byte whatever its bits.
    metric : {'l2', 'ip', 'cosine'}, default 'l2'
        As in `Flat`. For cosine the vectors are normalised before they are coded.
    refine : {None, 'float32', 'float16'}, default None
        Keep the vectors too, 4 d or 2 d bytes each, so that a search scores its best candidates exactly.
    seed : int, default 0
        Of the training.

    Notes
    -----
    Memory: m bytes a vector, 2**bits * 4 d for the codebooks, 8 for an id where ids are not simply 0, 1,
    2, ...

    References
    ----------
    Jégou, Douze, Schmid, Product quantization for nearest neighbor search, PAMI 2011.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.random.default_rng(0).standard_normal((20_000, 32), dtype=np.float32)
    >>> index = lutra.index.PQ(32, m=8, refine="float16")
    >>> index.train(x)
    >>> index.add(x)
    >>> index.search(x[:2], k=1).ids.ravel()
    array([0, 1])
    """

    def __init__(
        self,
        d: int,
        m: int,
        bits: int = 8,
        metric: str = "l2",
        *,
        refine: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(d, metric)
        self.m = _checks.integer("m", m, 1)
        if self.d % self.m:
            raise ValueError(f"m must divide d = {self.d}, got {self.m}")
        self.bits = _checks.integer("bits", bits, 1, 8)
        if refine is not None and refine not in _KEPT:
            raise ValueError(f"refine must be None, 'float32' or 'float16', got {refine!r}")
        self.refine = refine
        self.seed = _checks.integer("seed", seed, 0)
        self._codebooks: Any = None
        self._rows = {"codes": Rows(HOST, self.m, U8)}
        if refine is not None:
            self._rows["vectors"] = Rows(HOST, self.d, _KEPT[refine])

    @property
    def ksub(self) -> int:
        """Centroids of a sub-vector: 2**bits."""
        return 1 << self.bits

    @property
    def dsub(self) -> int:
        """Dimension of a sub-vector: d / m."""
        return self.d // self.m

    @property
    def is_trained(self) -> bool:
        return self._codebooks is not None

    @property
    def codebooks(self) -> Any:
        """The centroids, shape (m, ksub, dsub), float32, where the index lives; None before training."""
        return self._codebooks

    @property
    def nbytes(self) -> int:
        return super().nbytes + (4 * self.d * self.ksub if self.is_trained else 0)

    # ---- training
    def train(
        self,
        x: Any,
        *,
        n_iter: int = 25,
        init: str = "random",
        max_points_per_centroid: int | None = 256,
        progress: bool | None = None,
    ) -> None:
        """Learn the codebooks from a sample of vectors.

        Parameters
        ----------
        x : array, shape (n, d)
            At least 2**bits vectors, like those that will be added; 39 * 2**bits and more are advisable. The
            first array that an index is given decides where it lives (see `to`).
        n_iter, init, max_points_per_centroid, progress
            As in `lutra.index.kmeans`.

        Raises
        ------
        TypeError
            ``x`` is no array or has another dtype.
        ValueError
            A shape that does not fit, too few vectors, NaN or infinities (the row is named), or an index that
            holds vectors, whose codes would lose their meaning.

        Warns
        -----
        UserWarning
            Fewer than 39 vectors per centroid.

        Notes
        -----
        Cost: 2 d 2**bits n_iter flops for each of at most 2**bits * max_points_per_centroid vectors. The same
        seed, vectors and backend give the same codebooks, whatever the number of threads.
        """
        with self._changing():
            if self.ntotal:
                raise ValueError(
                    f"the index holds {self.ntotal} vectors coded with its codebooks; train a new one"
                )
            native = check_matrix(x, "x", self.d)
            n_iter = _checks.integer("n_iter", n_iter, 1)
            _checks.choice("init", init, INITS)
            home = self._home or home_of(native)
            rng = np.random.default_rng(self.seed)
            points = sample(home, native, self.ksub, max_points_per_centroid, rng)
            if self.metric == "cosine":
                points = home.normalise(points)
            codebooks = home.empty((self.m, self.ksub, self.dsub), F32)
            with Progress(self.m * n_iter, "PQ training", progress) as bar:
                for j in range(self.m):
                    part = home.kind.dense(points[:, j * self.dsub : (j + 1) * self.dsub])
                    rng = np.random.default_rng((self.seed, j))
                    codebooks[j], _ = lloyd(home, part, self.ksub, n_iter, init, False, rng, bar)
                self._move(home)
                self._codebooks = codebooks

    # ---- codes
    def encode(self, x: Any) -> Any:
        """The codes of vectors: (n, d) to (n, m) uint8, of the kind of ``x``."""
        self._need_training()
        native = check_matrix(x, "x", self.d)
        codes = self._here.empty((native.shape[0], self.m), U8)
        for i in range(0, native.shape[0], _ENCODE):
            part = to_float32(self._here, native[i : i + _ENCODE], "x", i)
            self._encode_part(part, codes[i : i + _ENCODE])
        return deliver(self._here, (codes,), x)[0]

    def decode(self, codes: Any) -> Any:
        """The vectors that codes stand for: (n, m) uint8 to (n, d) float32, of the kind of ``codes``.

        For cosine they stand for normalised vectors.
        """
        self._need_training()
        native = adopt(codes, "codes")
        _checks.dtype(kind_of(native, "codes"), native, "codes", (U8,))
        if len(native.shape) != 2 or native.shape[1] != self.m:
            raise ValueError(f"codes must have shape (n, {self.m}), got {tuple(native.shape)}")
        if self.bits < 8 and native.shape[0] and int(native.max()) >= self.ksub:
            raise ValueError(f"codes hold {int(native.max())}; with {self.bits} bits they are < {self.ksub}")
        return deliver(self._here, (self._decode(self._here.bring(native)),), codes)[0]

    @property
    def _here(self) -> Home:
        assert self._home is not None  # decided by train at the latest
        return self._home

    def _need_training(self) -> None:
        if not self.is_trained:
            raise ValueError("this PQ is not trained: call train(x) with a sample first")

    def _encode_part(self, x, out):
        if self.metric == "cosine":
            x = self._here.normalise(x)
        for j in range(self.m):
            part = x[:, j * self.dsub : (j + 1) * self.dsub]
            out[:, j] = address.nearest(part, self._codebooks[j], 1, "l2").ids[:, 0]

    def _encode(self, x, out, first):
        if self.refine is not None:
            kept = out["vectors"]
            with np.errstate(over="ignore"):
                kept[:] = x
            if self.refine == "float16" and not self._here.all_finite(kept):
                row = int(np.flatnonzero(~np.isfinite(HOST.bring(kept)).all(1))[0])
                raise ValueError(
                    f"x[{first + row}] holds a value beyond float16, in which refine='float16' keeps "
                    "vectors; take refine='float32' or scale the vectors"
                )
        for i in range(0, len(x), _ENCODE):
            self._encode_part(x[i : i + _ENCODE], out["codes"][i : i + _ENCODE])

    def _decode(self, codes):
        vectors = self._codebooks[self._here.arange(self.m), self._here.kind.cast(codes, I64)]
        return vectors.reshape(-1, self.d)

    # ---- searching
    def search(self, q: Any, k: int = 10, refine: int | None = None, *, filter: Any = None) -> Neighbors:
        """The k best vectors for each query.

        Parameters
        ----------
        q, k, filter
            As in `Flat.search`.
        refine : int, optional
            Score the best ``k * refine`` by their codes again, with the vectors that the index keeps, and
            return the best k of those; 0 ranks by codes alone. Default: 4 where the index keeps vectors,
            else 0. On CUDA k * refine is at most 1820, or k where that is more.

        Returns
        -------
        scores, ids : arrays, shape (nq, k)
            As from `Flat.search`. Scores are exact with ``refine``, else those of the coded vectors.

        Raises
        ------
        TypeError, ValueError
            As `Flat.search`; ``refine`` > 0 where the index keeps no vectors; an index that is not trained.

        Notes
        -----
        Cost: 2 d 2**bits flops a query for its tables, then n m look-ups, and k * refine reads of a vector.
        """
        if refine is None:
            refine = 0 if self.refine is None else _REFINE
        refine = _checks.integer("refine", refine, 0)
        if refine and self.refine is None:
            raise ValueError(
                f"refine is {refine}, but the index keeps no vectors: "
                "make it with refine='float32' or 'float16'"
            )
        return self._answer(q, k, filter, refine=refine)

    def _search(self, q, k, keep, refine):
        metric, coded = self.metric, q
        if metric == "cosine":
            metric, coded = "ip", self._here.normalise(q)
        codes = self._rows["codes"].view
        if not refine:
            return self._scan(coded, codes, k, metric, keep)
        count = k * refine
        if self._here.kind.cuda:
            count = max(k, min(count, _SELECTED))
        count = max(1, min(count, self.ntotal))
        candidates = self._scan(coded, codes, count, metric, keep)[1]
        vectors = self._rows["vectors"].view
        if self._here.kind.cuda:
            return scan.rescore(q, vectors, candidates, k, self.metric)
        return refine_candidates(q, vectors, candidates, k, self.metric)

    def _scan(self, q, codes, k, metric, keep):
        return pq_scan(self._here, q, codes, self._codebooks, k, metric, keep)

    def _reconstruct(self, positions):
        kept = self._rows.get("vectors")
        if kept is not None:
            return self._here.kind.cast(kept.view[positions], F32)
        return self._decode(self._rows["codes"].view[positions])

    # ---- moving, saving
    def _move(self, home):
        super()._move(home)
        if self._codebooks is not None:
            self._codebooks = home.bring(self._codebooks)

    def _config(self):
        return {
            "d": self.d, "m": self.m, "bits": self.bits, "metric": self.metric, "refine": self.refine,
            "seed": self.seed,
        }  # fmt: skip

    def _contents(self):
        tensors, metadata = super()._contents()
        if self.is_trained:
            tensors.append(_files.Tensor.of_array("codebooks", HOST.bring(self._codebooks)))
        return tensors, metadata

    def _restore(self, file: _files.File, n: int, mmap: bool) -> None:
        if file.config.get("trained") is True:
            shape = (self.m, self.ksub, self.dsub)
            codebooks, _ = file.tensor("codebooks", "F32", shape, mmap=False)
            if not np.isfinite(codebooks).all():
                file.fail("the codebooks hold NaN or infinities")
            self._codebooks = codebooks
        elif file.config.get("trained") is not False or n:
            file.fail(
                "the metadata 'trained' is not true, but there are vectors"
                if n
                else "no 'trained' in the metadata"
            )
        codes, mapped = file.tensor("codes", "U8", (n, self.m), mmap=mmap)
        if n and self.bits < 8 and int(codes.max()) >= self.ksub:
            row = int(np.flatnonzero((codes >= self.ksub).any(1))[0])
            file.fail(
                f"row {row} of the codes holds {int(codes[row].max())}; "
                f"with {self.bits} bits they are < {self.ksub}"
            )
        self._rows["codes"] = Rows.of(codes, U8, mapped=mapped)
        if self.refine is not None:
            dtype = {"float32": "F32", "float16": "F16"}[self.refine]
            vectors, mapped = file.tensor("vectors", dtype, (n, self.d), mmap=mmap)
            self._rows["vectors"] = Rows.of(vectors, _KEPT[self.refine], mapped=mapped)
