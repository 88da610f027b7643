"""Binary: a collection of packed bits, given as such or as the signs of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, address, scan
from .._arrays import F16, F32, I8, U8, kind_of
from .._results import Neighbors
from ..reference.binary import signs
from ..scan._binary import BINARY_METRICS
from . import _files
from ._compact import rescore_fetched
from ._home import HOST, Home, adopt, check_matrix, deliver, to_float32
from ._refine import refine as refine_candidates
from ._refine import rescore_converted
from ._rows import Rows
from .base import Index, register

_KEPT = {"float32": F32, "float16": F16, "int8": U8}
_SIMILARITIES = {"ip": 0, "l2": 1, "cosine": 2}
_RESCORE = {"bits": 1, "vectors": 2, "both": 3}


@register
class Binary(Index):
    """A collection of bits that is searched by Hamming or Jaccard distance.

    It takes rows of packed bits, or vectors, of which it keeps the signs: 32 times fewer bytes than float32.
    A search with a vector can rank the nearest by bits again: by the vector's inner product with their signs,
    which needs nothing more, or by vectors that the index keeps besides.

    Parameters
    ----------
    d : int
        Number of bits, which is the dimension of the vectors.
    metric : {'hamming', 'jaccard'}, default 'hamming'
        As in `lutra.scan.binary`.
    refine : {None, 'float32', 'float16', 'int8'}, default None
        Keep the vectors too: 4 d, 2 d or d + 4 bytes each (int8 with a scale for each vector).
    similarity : {'cosine', 'ip', 'l2'}, default 'cosine'
        What vectors are ranked by where they are kept.
    threshold : float or 'median', default 0.0
        A bit says whether the value exceeds it; ``'median'``: that of each dimension, which `train` finds.

    Attributes
    ----------
    rescore : {None, 'bits', 'vectors', 'both'}
        What `search` ranks the candidates of a vector by unless it is told: ``'vectors'`` where the index
        keeps them, else None, the distance of bits.
    refine_factor : int, 4
        Candidates for each result that is asked for, at each stage.

    Notes
    -----
    Memory: d / 8 bytes a vector, the vectors that are kept, and 8 for an id where ids are not simply 0, 1, 2,
    ...

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.random.default_rng(0).standard_normal((1000, 64), dtype=np.float32)
    >>> index = lutra.index.Binary(64)
    >>> index.add(x)
    >>> index.search(x[:2], k=1)
    Neighbors(scores=array([[0.],
           [0.]], dtype=float32), ids=array([[0],
           [1]]))
    """

    _needs_kernels = ("binary", "binarize", "rescore_bits")
    _metrics = BINARY_METRICS

    def __init__(
        self,
        d: int,
        metric: str = "hamming",
        *,
        refine: str | None = None,
        similarity: str = "cosine",
        threshold: float | str = 0.0,
    ) -> None:
        super().__init__(d, metric)
        if refine is not None and refine not in _KEPT:
            raise ValueError(f"refine must be None, 'float32', 'float16' or 'int8', got {refine!r}")
        _checks.choice("similarity", similarity, _SIMILARITIES)
        if threshold != "median":
            if isinstance(threshold, (bool, str)) or not isinstance(threshold, (int, float, np.number)):
                raise TypeError(f"threshold must be a number or 'median', got {threshold!r}")
            if not np.isfinite(threshold):
                raise ValueError(f"threshold must be finite, got {threshold}")
            threshold = float(threshold)
        self.refine = refine
        self.similarity = similarity
        self.threshold = threshold
        self.rescore = None if refine is None else "vectors"
        self.refine_factor = 4
        self._limits: np.ndarray | None = None  # float32 (d,), what values are compared with
        self._copied: Any = None  # a home that is not the host, and the limits there
        if not isinstance(threshold, str):
            self._limits = np.full(self.d, threshold, np.float32)
        self._rows = {"codes": Rows(HOST, (self.d + 7) // 8, U8)}
        if refine is not None:
            self._rows["vectors"] = Rows(HOST, self.d, _KEPT[refine])
        if refine == "int8":
            self._rows["scales"] = Rows(HOST, 1, F32)

    @property
    def is_trained(self) -> bool:
        return self._limits is not None

    @property
    def nbytes(self) -> int:
        return super().nbytes + (4 * self.d if self.threshold == "median" and self.is_trained else 0)

    def train(self, x: Any, progress: bool | None = None) -> None:
        """Find the median of each dimension for ``threshold='median'``; else x is only checked.

        Parameters
        ----------
        x : array, shape (n, d)
            A sample of the vectors; packed bits need no training, nor can they give any.
        """
        native = check_matrix(x, "x", self.d)
        with self._changing():
            if self.threshold != "median":
                return
            if self.ntotal:
                raise ValueError(f"the index holds {self.ntotal} vectors cut at its medians; train a new one")
            if native.shape[0] == 0:
                raise ValueError("x has no rows; medians need one at least")
            self._limits = np.median(to_float32(HOST, native, "x"), axis=0).astype(np.float32)
            self._copied = None

    # ---- what comes in
    def _take(self, a: Any, name: str) -> tuple[Any, bool]:
        """A caller's matrix, and whether it holds packed bits."""
        native = adopt(a, name)
        width = (self.d + 7) // 8
        if len(native.shape) == 2 and native.shape[1] == width and kind_of(native, name).code(native) == U8:
            return native, True
        if len(native.shape) == 2 and native.shape[1] != self.d:
            raise ValueError(
                f"{name} has {native.shape[1]} columns; the index takes vectors of d = {self.d} values, or "
                f"uint8 rows of {width} packed bytes"
            )
        return check_matrix(native, name, self.d), False

    def _clean(self, home: Home, packed: Any) -> Any:
        """Packed bits in a home with nothing in the spare bits of the last byte."""
        packed = home.bring(packed)
        if self.d % 8:
            packed = packed.clone() if home.kind.name == "torch" else packed.copy()
            packed[:, -1] &= (1 << self.d % 8) - 1
        return packed

    @property
    def _here(self) -> Home:
        return self._home or HOST

    def _limits_here(self, home: Home) -> Any:
        """The thresholds in a home."""
        if home is HOST:
            return self._limits
        copied = self._copied
        if copied is None or copied[0] is not home:
            copied = home, home.bring(self._limits)
            home.wait()  # other streams may use them at once
            self._copied = copied
        return copied[1]

    def _move(self, home: Home) -> None:
        super()._move(home)
        self._copied = None

    def add(self, x: Any, ids: Any = None) -> None:
        """Add vectors or packed bits.

        Parameters
        ----------
        x : array, shape (n, d), any float type or int8; or (n, ceil(d / 8)), uint8
            Vectors, of which the signs are kept; or packed bits in little order, as `lutra.address.binarize`
            makes them, where the index keeps no vectors.
        ids
            As in `Flat.add`.

        Raises
        ------
        TypeError, ValueError
            As `Flat.add`; packed bits for an index that keeps vectors.
        """
        native, packed = self._take(x, "x")
        with self._changing():
            if packed:
                self._add_packed(native, ids)
            else:
                self._add(native, ids)

    def _add_packed(self, native: Any, ids: Any) -> None:
        if self.refine is not None:
            raise ValueError(f"x holds packed bits, but refine={self.refine!r} keeps vectors: add those")
        count = native.shape[0]
        new = self._ids.check_new(ids, count)
        home = self._settle(native)
        self._rows["codes"].room(count)[:] = self._clean(home, native)
        self._rows["codes"].grow(count)
        self._ids.add(new, count)

    def _encode(self, x, out, first):
        home = self._here
        xp = home.xp
        out["codes"][:] = address.binarize(x, self._limits_here(home))
        if self.refine == "int8":
            scale = xp.amax(abs(x), 1)[:, None] / np.float32(127)
            out["scales"][:] = scale
            steps = xp.round(x / xp.where(scale > 0, scale, 1))
            out["vectors"].view(xp.int8)[:] = steps if home is HOST else home.kind.cast(steps, I8)
        elif self.refine is not None:
            with np.errstate(over="ignore"):
                out["vectors"][:] = x
            if self.refine == "float16" and not home.all_finite(out["vectors"]):
                row = int(np.flatnonzero(~np.isfinite(HOST.bring(out["vectors"])).all(1))[0])
                raise ValueError(f"x[{first + row}] holds a value beyond float16: take refine='float32'")

    # ---- searching
    def search(
        self,
        q: Any,
        k: int = 10,
        *,
        filter: Any = None,
        rescore: str | None = "default",
        refine_factor: int | None = None,
    ) -> Neighbors:
        """The k nearest for each query.

        Parameters
        ----------
        q : array, shape (nq, d), any float type or int8; or (nq, ceil(d / 8)), uint8
            Vectors or packed bits.
        k, filter
            As in `Flat.search`.
        rescore : {'default', None, 'bits', 'vectors', 'both'}
            What ranks the candidates: None, their distance in bits; ``'bits'``, the inner product of q (less
            the thresholds) with their signs; ``'vectors'``, the similarity with the vectors that the index
            keeps; ``'both'``, one after the other. The default is the attribute of that name. Packed queries
            are ranked by distance only.
        refine_factor : int, default: the attribute of that name
            The nearest k * refine_factor are ranked again; with ``'both'`` as many for each of the k *
            refine_factor that the second stage leaves to the third.

        Returns
        -------
        scores, ids : arrays, shape (nq, k)
            As from `Flat.search`. Scores are those of the last stage: distances (smaller is better, +inf
            where there is no neighbour), inner products with signs (larger is better, -inf), or similarities.

        Raises
        ------
        TypeError, ValueError
            As `Flat.search`; ``rescore`` by vectors where none are kept, or for packed queries.

        Notes
        -----
        Cost: `lutra.scan.binary`, then nq k refine_factor reads of a row for each further stage.
        """
        native, packed = self._take(q, "q")
        if rescore == "default":
            rescore = None if packed else self.rescore
        if rescore is not None:
            _checks.choice("rescore", rescore, _RESCORE)
        if rescore in ("vectors", "both") and self.refine is None:
            raise ValueError(
                f"rescore is {rescore!r}, but the index keeps no vectors: make it with refine='int8', "
                "'float16' or 'float32'"
            )
        factor = self.refine_factor if refine_factor is None else refine_factor
        factor = _checks.integer("refine_factor", factor, 1)
        if not packed:
            return self._answer(q, k, filter, rescore=rescore, factor=factor)
        if rescore is not None:
            raise ValueError(f"rescore is {rescore!r}, but q holds packed bits; it needs vectors")
        k = _checks.integer("k", k, 1)
        with self._lock.reading():
            if not self.ntotal:
                self._nothing()
            home = self._here
            with home.following(native):
                keep = None if filter is None else self._keep(home, filter)
                scores, positions = self._nearest(self._clean(home, native), k, keep)
                return Neighbors(*deliver(home, (scores, self._ids.of(home, positions)), q))

    def _nearest(self, bits: Any, k: int, keep: Any) -> Neighbors:
        return scan.binary(bits, self._rows["codes"].view, k, self.metric, filter=keep)

    def _search(self, q, k, keep, rescore, factor):
        home = self._here
        limits = self._limits_here(home)
        bits = address.binarize(q, limits)
        if rescore is None:
            return self._nearest(bits, k, keep)
        wanted = min(k * factor * (factor if rescore == "both" else 1), self.ntotal)
        candidates = self._nearest(bits, wanted, keep).ids
        if rescore != "vectors":
            wanted = k if rescore == "bits" else min(k * factor, self.ntotal)
            scores, candidates = scan.rescore_bits(q - limits, self._rows["codes"].view, candidates, wanted)
            if rescore == "bits":
                return scores, candidates
        if home is not HOST and self.refine == "int8":
            vectors, scales = self._rows["vectors"].view.view(home.xp.int8), self._rows["scales"].view
            return rescore_converted(home, q, vectors, candidates, k, self.similarity, scales)
        if self.refine == "int8" and self.similarity == "cosine":  # which scales do not change
            return scan.rescore(q, self._rows["vectors"].view.view(np.int8), candidates, k, "cosine")
        if self.refine == "int8":
            return rescore_fetched(q, self._vectors_at, candidates, k, self.similarity)
        return refine_candidates(q, self._rows["vectors"].view, candidates, k, self.similarity)

    def _vectors_at(self, positions):
        vectors, home = self._rows["vectors"].view[positions], self._here
        if self.refine == "int8":
            return vectors.view(home.xp.int8) * self._rows["scales"].view[positions]
        return home.kind.cast(vectors, F32)

    def reconstruct(self, ids: Any) -> Any:
        """What is stored for some ids.

        Parameters
        ----------
        ids : int, or list or array of int, shape (n,)

        Returns
        -------
        array, float32, shape (d,) for an int, else (n, d)
            The vectors where the index keeps them, else their signs: 1 for a set bit, -1 for another.
            (``lutra.address.binarize`` makes packed bits of them.)

        Raises
        ------
        IndexError
            An id that is not in the index.
        """
        return super().reconstruct(ids)

    def _reconstruct(self, positions):
        if self.refine is not None:
            return self._vectors_at(positions)
        return self._here.bring(signs(HOST.bring(self._rows["codes"].view[positions]), self.d))

    # ---- files
    def _config(self):
        return {
            "d": self.d, "metric": self.metric, "refine": self.refine, "similarity": self.similarity,
            "threshold": self.threshold,
        }  # fmt: skip

    def _contents(self):
        tensors, metadata = super()._contents()
        if self.threshold == "median" and self._limits is not None:
            tensors.append(_files.Tensor.of_array("thresholds", self._limits))
        return tensors, metadata

    def _restore(self, file: _files.File, n: int, mmap: bool) -> None:
        if self.threshold == "median" and file.config.get("trained") is True:
            limits, _ = file.tensor("thresholds", "F32", (self.d,), mmap=False)
            if not np.isfinite(limits).all():
                file.fail("the thresholds hold NaN or infinities")
            self._limits = limits
        elif self.threshold == "median" and n:
            file.fail("the metadata 'trained' is not true, but there are vectors")
        width = (self.d + 7) // 8
        codes, mapped = file.tensor("codes", "U8", (n, width), mmap=mmap)
        if n and self.d % 8 and int(codes[:, -1].max()) >> self.d % 8:
            file.fail(f"a row of the codes has bits behind d = {self.d}")
        self._rows["codes"] = Rows.of(codes, U8, mapped=mapped)
        if self.refine is not None:
            dtype = {"float32": "F32", "float16": "F16", "int8": "U8"}[self.refine]
            vectors, mapped = file.tensor("vectors", dtype, (n, self.d), mmap=mmap)
            self._rows["vectors"] = Rows.of(vectors, _KEPT[self.refine], mapped=mapped)
        if self.refine == "int8":
            scales, mapped = file.tensor("scales", "F32", (n, 1), mmap=mmap)
            if n and not (np.isfinite(scales).all() and scales.min() >= 0):
                file.fail("the scales must be finite and not negative")
            self._rows["scales"] = Rows.of(scales, F32, mapped=mapped)
