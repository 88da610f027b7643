"""PQ: product quantization."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import U8, _foreign, _hand_back, kind_of
from ..index._home import HOST, Home, adopt, deliver, to_float32
from ..index._kmeans import INITS, lloyd
from ..index._progress import Progress
from . import _bits, _on_cuda
from ._anisotropic import fit
from ._kernels import pq_entries, pq_vectors
from .base import PART, Quantizer, Tables, training_home, training_matrix, vectors

_LOSSES = {"l2": 0, "anisotropic": 1}
_LONGEST = 8192  # dimensions for the anisotropic loss on CUDA: two vectors lie in shared memory


class PQ(Quantizer):
    """Product quantization: each of m sub-vectors is replaced by the nearest of 2**bits centroids.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    m : int
        Number of sub-vectors; divides d.
    bits : int, default 8
        Bits of a sub-vector's code, 1 to 8; m * bits / 8 bytes a vector, rounded up.
    loss : {'l2', 'anisotropic'}, default 'l2'
        What codebooks and codes are chosen for: the least error of the vectors, or the least error of their
        inner products with queries that find them (anisotropic vector quantization, AVQ). The latter raises
        the recall of inner products and cosines, not of distances.
    threshold : float, default 0.2
        For the anisotropic loss: the inner product of unit vectors beyond which errors matter. For vectors
        that are not of unit norm take 0.2 to 0.3 times their norm.
    seed : int, default 0
        Of the training.

    Notes
    -----
    Codes are packed as FAISS packs them: entry j takes the bits [j bits, (j + 1) bits) of a code, the least
    significant bit of a byte first. Up to 4 bits they are scanned in registers (``scan`` is 'lut4'), beyond
    by tables in the cache ('lut8').

    References
    ----------
    Jégou, Douze, Schmid, Product quantization for nearest neighbor search, PAMI 2011. Guo et al.,
    Accelerating large-scale inference with anisotropic vector quantization, ICML 2020 (arXiv 1908.10396).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.random.default_rng(0).standard_normal((20_000, 32), dtype=np.float32)
    >>> quantizer = lutra.quant.PQ(32, m=16, bits=4).train(x)
    >>> quantizer.encode(x[:5]).shape
    (5, 8)
    """

    def __init__(
        self, d: int, m: int, bits: int = 8, *, loss: str = "l2", threshold: float = 0.2, seed: int = 0
    ) -> None:
        super().__init__(d)
        self.m = _checks.integer("m", m, 1)
        if self.d % self.m:
            raise ValueError(f"m must divide d = {self.d}, got {self.m}")
        self.bits = _checks.integer("bits", bits, 1, 8)
        self.seed = _checks.integer("seed", seed, 0)
        self.code_size = _bits.packed_size(self.m, self.bits)
        self.scan = "lut4" if self.bits <= 4 else "lut8"
        self._codebooks: np.ndarray | None = None
        self.loss, self.threshold = self._check_loss(loss, threshold)

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
    def codebooks(self) -> np.ndarray | None:
        """The centroids, shape (m, ksub, dsub), float32; None before training."""
        return self._codebooks

    @property
    def _books(self) -> np.ndarray:
        assert self._codebooks is not None
        return self._codebooks

    # ---- training
    def train(
        self,
        x: Any,
        *,
        n_iter: int = 25,
        init: str = "random",
        max_points_per_centroid: int | None = 256,
        loss: str | None = None,
        threshold: float | None = None,
        directions: Any = None,
        progress: bool | None = None,
    ) -> PQ:
        """Learn the codebooks from a sample of vectors.

        Parameters
        ----------
        x : array, shape (n, d)
            At least 2**bits vectors; 39 * 2**bits and more are advisable.
        n_iter, init, max_points_per_centroid, progress
            As in `lutra.index.kmeans`, which is run in each sub-space.
        loss, threshold : optional
            Instead of the constructor's, from now on.
        directions : array, shape (n, d), optional
            For the anisotropic loss of residuals: the vectors themselves, along which inner products are
            taken. `encode` needs them too then.

        Returns
        -------
        PQ
            Itself.

        Raises
        ------
        TypeError
            ``x`` is no array or has another dtype.
        ValueError
            A shape that does not fit, too few vectors, NaN or infinities (the row is named).

        Warns
        -----
        UserWarning
            Fewer than 39 vectors per centroid.

        Notes
        -----
        Cost: 2 d 2**bits n_iter flops for each of at most 2**bits * max_points_per_centroid vectors.
        """
        n_iter = _checks.integer("n_iter", n_iter, 1)
        self._check_init(init)
        loss, threshold = self._training_loss(loss, threshold, directions)
        home = training_home(x) if loss == "l2" else HOST
        points = self._sample(x, max_points_per_centroid, home)
        toward = points if directions is None else self._sample_directions(directions, x, len(points))
        with Progress(self.m * n_iter + (n_iter if loss != "l2" else 0), "PQ training", progress) as bar:
            books = self._kmeans(points, n_iter, init, bar, home)
            if loss != "l2":
                books = fit(points, toward, books, threshold, n_iter, bar)
        self._codebooks, self.loss, self.threshold = books, loss, threshold
        return self

    def _sample_directions(self, directions: Any, x: Any, most: int) -> np.ndarray:
        """The same rows of ``directions`` as `_sample` has taken of ``x``."""
        if len(directions) != len(x):
            raise ValueError(f"directions has {len(directions)} rows, x has {len(x)}; they must be as many")
        return training_matrix(directions, self.d, self.ksub, most, self.seed)

    @staticmethod
    def _check_init(init: str) -> None:
        _checks.choice("init", init, INITS)

    @staticmethod
    def _check_loss(loss: str, threshold: float) -> tuple[str, float]:
        _checks.choice("loss", loss, _LOSSES)
        return loss, _checks.positive("threshold", threshold)

    def _training_loss(self, loss: str | None, threshold: float | None, directions: Any) -> tuple[str, float]:
        loss = self.loss if loss is None else loss
        threshold = self.threshold if threshold is None else threshold
        if directions is not None and loss != "anisotropic":
            raise ValueError("directions are for loss='anisotropic'")
        return self._check_loss(loss, threshold)

    def _sample(self, x: Any, max_points_per_centroid: int | None, home: Home = HOST) -> Any:
        most = None
        if max_points_per_centroid is not None:
            most = self.ksub * _checks.integer("max_points_per_centroid", max_points_per_centroid, 1)
        points = training_matrix(x, self.d, self.ksub, most, self.seed, home)
        if len(points) < 39 * self.ksub:
            warnings.warn(
                f"{len(points)} vectors for {self.ksub} centroids; at least {39 * self.ksub} are advisable",
                stacklevel=3,
            )
        return points

    def _kmeans(self, points: Any, n_iter: int, init: str, bar: Progress, home: Home = HOST) -> np.ndarray:
        """Codebooks, by k-means in ``home``, from points there or on the host."""
        books = np.empty((self.m, self.ksub, self.dsub), np.float32)
        for j in range(self.m):
            part = home.kind.dense(home.bring(points[:, j * self.dsub : (j + 1) * self.dsub]))
            rng = np.random.default_rng((self.seed, j))
            centroids, _ = lloyd(home, part, self.ksub, n_iter, init, False, rng, bar)
            books[j] = HOST.bring(centroids)
        return books

    # ---- codes
    def encode(self, x: Any, *, directions: Any = None, progress: bool | None = None) -> Any:
        """The codes of vectors, as `Quantizer.encode`.

        ``directions`` (n, d), for codebooks of the anisotropic loss only: the vectors whose residuals
        ``x`` are.
        """
        if directions is None:
            return super().encode(x, progress=progress)
        self._need_training()
        if self.loss != "anisotropic":
            raise ValueError("directions are for codebooks that were trained with loss='anisotropic'")
        native, toward = vectors(x, "x", self.d), vectors(directions, "directions", self.d)
        if native.shape != toward.shape:
            raise ValueError(
                f"x has {native.shape[0]} rows, directions {toward.shape[0]}; they must be as many"
            )
        kind = kind_of(native, "x")
        beside = kind.cuda and kind_of(toward, "directions") is kind and toward.device == native.device
        if beside and kind.kernels is not None:
            there = self._encode_there(kind, native, toward)
            if there is not None:
                return _hand_back(there, x) if _foreign(x) else there
        codes = np.empty((native.shape[0], self.code_size), np.uint8)
        with Progress(len(codes), f"{type(self).__name__} encoding", progress) as bar:
            for i in range(0, len(codes), PART):
                part = to_float32(HOST, native[i : i + PART], "x", i)
                along = to_float32(HOST, toward[i : i + PART], "directions", i)
                codes[i : i + PART] = self._encode(part, along)
                bar.tick(len(part))
        return deliver(HOST, (codes,), x)[0]

    @property
    def _uses_directions(self) -> bool:
        return self.loss == "anisotropic"

    def _encode(self, x: np.ndarray, directions: np.ndarray | None = None) -> np.ndarray:
        return _bits.pack(self._entries_of(x, directions), self.bits)

    def _encode_there(self, kind: Any, x: Any, directions: Any = None) -> Any:
        if self.bits not in (2, 4, 8):
            return None
        x = _on_cuda.floats(kind, x)
        if directions is not None:
            directions = _on_cuda.floats(kind, directions)
            if directions is None:
                return None
        entries = None if x is None else self._entries_there(kind, x, directions)
        return None if entries is None else _on_cuda.pack(kind, entries, self.bits)

    def _entries_there(self, kind: Any, x: Any, directions: Any = None) -> Any:
        """Entries (n, m) of finite float32 vectors on a GPU, or None: by the host."""
        threshold = self.threshold if self.loss == "anisotropic" else 0.0
        if threshold and self.d > _LONGEST:
            return None
        if directions is not None:
            directions = kind.dense(self._turned_there(kind, directions))
        turned = kind.dense(self._turned_there(kind, x))
        return _on_cuda.pq_entries(kind, turned, self._books, self._copies, directions, threshold)

    def _books_there(self, kind: Any, like: Any) -> Any:
        """The codebooks on the GPU on which ``like`` lies."""
        return self._copies.get(kind, "books", self._books, like)

    def _decode_there(self, kind: Any, entries: Any) -> Any:
        """Vectors of entries on a GPU."""
        return _on_cuda.pq_vectors(kind, entries, self._books, self._copies)

    def _turned_there(self, kind: Any, x: Any) -> Any:
        """Vectors on a GPU as the codebooks see them."""
        return x

    def _entries_of(self, x: np.ndarray, directions: np.ndarray | None) -> np.ndarray:
        return pq_entries(x, self._books, directions, self.threshold if self.loss == "anisotropic" else 0.0)

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        return pq_vectors(self._entries(codes), self._books)

    def _entries(self, codes: np.ndarray) -> np.ndarray:
        return _bits.unpack(codes, self.m, self.bits)

    def pack(self, entries: Any) -> Any:
        """Codes of look-up entries, the inverse of `entries`: (n, m) uint8 to (n, code_size) uint8.

        Raises
        ------
        TypeError, ValueError
            No uint8 array of m columns.
        IndexError
            An entry that is not below 2**bits.
        """
        return pack_entries(entries, self.m, self.bits)

    # ---- scanning
    def _tables(self, q: np.ndarray, metric: str) -> Tables:
        # One dimension of the sub-vectors at a time: a query's table never depends on the rest of its batch,
        # as it would with a library's matrix product.
        nq = len(q)
        lut = np.zeros((nq, self.m, max(16, self.ksub)), np.float32)
        parts = q.reshape(nq, self.m, self.dsub)
        used = lut[:, :, : self.ksub]
        for i in range(self.dsub):
            q_i, c_i = parts[:, :, i, None], self._books[None, :, :, i]
            used += np.square(q_i - c_i) if metric == "l2" else q_i * c_i
        return Tables(lut, None)

    # ---- files
    def _config(self) -> dict[str, Any]:
        return {
            "d": self.d, "m": self.m, "bits": self.bits, "loss": self.loss, "threshold": self.threshold,
            "seed": self.seed,
        }  # fmt: skip

    def _layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"codebooks": ("F32", (self.m, self.ksub, self.dsub))}

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"codebooks": self._books} if self.is_trained else {}

    def _assign(self, tensors: dict[str, np.ndarray]) -> None:
        self._codebooks = tensors["codebooks"]


def pack_entries(entries: Any, m: int, bits: int) -> Any:
    """`PQ.pack` for m entries of so many bits."""
    native = adopt(entries, "entries")
    _checks.dtype(kind_of(native, "entries"), native, "entries", (U8,))
    if len(native.shape) != 2 or native.shape[1] != m:
        raise ValueError(f"entries must have shape (n, {m}), got {tuple(native.shape)}")
    host = HOST.bring(native)
    if bits < 8 and host.size and int(host.max()) >= 1 << bits:
        row, j = (int(v) for v in np.argwhere(host >= 1 << bits)[0])
        raise IndexError(f"entries[{row}, {j}] is {host[row, j]}; with {bits} bits they are < {1 << bits}")
    return deliver(HOST, (_bits.pack(host, bits),), entries)[0]
