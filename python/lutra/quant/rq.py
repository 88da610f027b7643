"""RQ: residual quantization, codes that each refine those before."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .. import _checks, gather
from ..index._home import HOST, Home
from ..index._kmeans import INITS, lloyd
from ..index._progress import Progress
from . import _bits, _on_cuda
from ._kernels import multiply, rq_entries, rq_extend, rq_gram
from .base import Quantizer, Tables, training_home, training_matrix
from .pq import pack_entries

_STEPS = 10  # numbers of dimensions that k-means goes through
_LEAST = 1 << 14  # points that a small codebook is trained on, too


class RQ(Quantizer):
    """Residual quantization: a vector as the sum of one centroid from each of m codebooks.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    m : int
        Number of codebooks.
    bits : int, default 8
        Bits of a code, 1 to 8; m * bits / 8 bytes a vector, rounded up.
    beam : int, default 5
        Partial codes that are kept while a vector is coded, in training too (FAISS's ``max_beam_size``); 1
        takes the nearest centroid at each step.
    seed : int, default 0
        Of the training.

    Notes
    -----
    <q, x> is the sum of m look-ups, in tables of d rather than d / m dimensions; squared distances need the
    vector's norm besides (`norms`). Encoding works on inner products with all centroids and between them,
    which take (m 2**bits)**2 * 4 bytes of memory: 2 d m 2**bits flops and m**2 beam 2**bits / 2 additions a
    vector. Codes are packed as `PQ`'s.

    References
    ----------
    Chen, Guan, Wang, Approximate nearest neighbor search by residual vector quantization, Sensors 2010. Liu,
    Lu, Shao, Improved residual vector quantization for high-dimensional approximate nearest neighbor search,
    arXiv 1509.05195 (beams, and k-means in ever more dimensions).
    """

    def __init__(self, d: int, m: int, bits: int = 8, *, beam: int = 5, seed: int = 0) -> None:
        super().__init__(d)
        self.m = _checks.integer("m", m, 1)
        self.bits = _checks.integer("bits", bits, 1, 8)
        self.beam = _checks.integer("beam", beam, 1, 256)
        self.seed = _checks.integer("seed", seed, 0)
        self.code_size = _bits.packed_size(self.m, self.bits)
        self.scan = "lut4" if self.bits <= 4 else "lut8"
        self._codebooks: np.ndarray | None = None
        self._gram: np.ndarray | None = None

    @property
    def ksub(self) -> int:
        """Centroids of a codebook: 2**bits."""
        return 1 << self.bits

    @property
    def is_trained(self) -> bool:
        return self._codebooks is not None

    @property
    def codebooks(self) -> np.ndarray | None:
        """The centroids, shape (m, ksub, d), float32; None before training."""
        return self._codebooks

    @property
    def _books(self) -> np.ndarray:
        assert self._codebooks is not None
        return self._codebooks

    def train(
        self,
        x: Any,
        *,
        n_iter: int = 10,
        init: str = "random",
        max_points_per_centroid: int | None = 256,
        progress: bool | None = None,
    ) -> RQ:
        """Learn the codebooks, each from what the partial codes of those before leave over.

        Parameters
        ----------
        x : array, shape (n, d)
            At least 2**bits vectors; 39 * 2**bits and more are advisable.
        n_iter : int, default 10
            Rounds of k-means for each codebook in each of up to 10 growing numbers of dimensions.
        init, progress
            As in `lutra.index.kmeans`; ``init`` is for the fewest dimensions.
        max_points_per_centroid : int or None, default 256
            So many times 2**bits vectors, but up to 16384 at least, are used; of what all partial codes leave
            over a codebook sees a sample of that size. None: all.

        Returns
        -------
        RQ
            Itself.

        Raises
        ------
        TypeError, ValueError
            As `PQ.train`.

        Notes
        -----
        A codebook's k-means starts in the first two principal components of what is left and goes on in ever
        more of them, each time from the centroids so far: with one start in all dimensions most centroids
        would differ in directions that hardly matter. About 6 d 2**bits n_iter flops for a point, a codebook.
        """
        n_iter = _checks.integer("n_iter", n_iter, 1)
        _checks.choice("init", init, INITS)
        most = None
        if max_points_per_centroid is not None:
            each = _checks.integer("max_points_per_centroid", max_points_per_centroid, 1)
            most = max(self.ksub * each, _LEAST)
        points = training_matrix(x, self.d, self.ksub, most, self.seed)
        if len(points) < 39 * self.ksub:
            warnings.warn(
                f"{len(points)} vectors for {self.ksub} centroids; at least {39 * self.ksub} are advisable",
                stacklevel=2,
            )
        home = training_home(x)
        n, every = len(points), self.m * self.ksub
        books, gram = np.zeros((self.m, self.ksub, self.d), np.float32), np.zeros((every, every), np.float32)
        codes, reached = np.empty((n, 1, 0), np.uint8), np.zeros((n, 1), np.float32)
        with Progress(self.m * n_iter * len(_dimensions(self.d)), "RQ training", progress) as bar:
            for j in range(self.m):
                rng = np.random.default_rng((self.seed, j))
                width = codes.shape[1]
                chosen = np.arange(n * width)
                if most is not None and len(chosen) > most:
                    chosen = np.sort(rng.choice(len(chosen), most, replace=False))
                left = points[chosen // width] - _sum(codes.reshape(n * width, j)[chosen], books)
                books[j] = _progressive(left, self.ksub, n_iter, init, rng, bar, home)
                new = slice(j * self.ksub, (j + 1) * self.ksub)
                gram[: new.stop, new] = multiply(books[: j + 1].reshape(-1, self.d), books[j].T)
                if j + 1 < self.m:
                    dots = multiply(points, books[j].T)
                    codes, reached = rq_extend(dots, gram, self.m, self.beam, codes, reached)
        self._codebooks, self._gram = books, gram
        return self

    # ---- codes
    def _encode(self, x: np.ndarray) -> np.ndarray:
        if self._gram is None:
            self._gram = rq_gram(self._books)  # two threads may both do it: the results are the same
        return _bits.pack(rq_entries(x, self._books, self._gram, self.beam), self.bits)

    def _encode_there(self, kind: Any, x: Any) -> Any:
        x = _on_cuda.floats(kind, x) if self.bits in (2, 4, 8) else None
        entries = None if x is None else self._entries_there(kind, x)
        return None if entries is None else _on_cuda.pack(kind, entries, self.bits)

    def _entries_there(self, kind: Any, x: Any) -> Any:
        """Entries (n, m) of finite float32 vectors on a GPU, or None: by the host."""
        if self._gram is None:
            self._gram = rq_gram(self._books)
        return _on_cuda.rq_entries(kind, x, self._books, self._gram, self.beam, self._copies)

    def _decode_there(self, kind: Any, entries: Any) -> Any:
        """Vectors of entries on a GPU."""
        return _on_cuda.rq_vectors(kind, entries, self._books, self._copies)

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        return _sum(self._entries(codes), self._books)

    def _entries(self, codes: np.ndarray) -> np.ndarray:
        return _bits.unpack(codes, self.m, self.bits)

    def pack(self, entries: Any) -> Any:
        """Codes of look-up entries, the inverse of `entries`; see `PQ.pack`."""
        return pack_entries(entries, self.m, self.bits)

    # ---- scanning
    def _tables(self, q: np.ndarray, metric: str) -> Tables | None:
        if metric == "l2":
            return None
        products = multiply(q, self._books.reshape(-1, self.d).T)
        lut = products.reshape(len(q), self.m, self.ksub)
        if self.ksub < 16:
            lut = np.pad(lut, ((0, 0), (0, 0), (0, 16 - self.ksub)))
        return Tables(lut, None)

    # ---- files
    def _config(self) -> dict[str, Any]:
        return {"d": self.d, "m": self.m, "bits": self.bits, "beam": self.beam, "seed": self.seed}

    def _layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"codebooks": ("F32", (self.m, self.ksub, self.d))}

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"codebooks": self._books} if self.is_trained else {}

    def _assign(self, tensors: dict[str, np.ndarray]) -> None:
        self._codebooks, self._gram = tensors["codebooks"], None


def _sum(entries: np.ndarray, books: np.ndarray) -> np.ndarray:
    """The sums of the centroids that each row of entries (n, j) names, of the first j codebooks."""
    j = entries.shape[1]
    if not entries.size:
        return np.zeros((len(entries), books.shape[2]), np.float32)
    rows = entries + np.arange(j, dtype=np.int32) * np.int32(books.shape[1])
    return gather.bag(books[:j].reshape(-1, books.shape[2]), rows, mode="sum")


def _dimensions(d: int) -> list[int]:
    """Numbers of dimensions up to d, each about d**0.1 times the one before."""
    return sorted({round(d ** ((i + 1) / _STEPS)) for i in range(_STEPS)})


def _progressive(
    points: np.ndarray, k: int, n_iter: int, init: str, rng: np.random.Generator, bar: Progress, home: Home
) -> np.ndarray:
    """Centroids (k, d) by k-means, in ``home``, in ever more principal components."""
    mean = points.mean(0, dtype=np.float64).astype(np.float32)
    centred = points - mean
    _, columns = np.linalg.eigh(np.cov(centred.T.astype(np.float64)).reshape(2 * centred.shape[1:]))
    turn = columns[:, ::-1].astype(np.float32)
    rotated = multiply(centred, turn)
    centroids: Any = None
    for d in _dimensions(points.shape[1]):
        start = None if centroids is None else np.pad(centroids, ((0, 0), (0, d - centroids.shape[1])))
        some = home.bring(np.ascontiguousarray(rotated[:, :d]))
        start = None if start is None else home.bring(start)
        found, _ = lloyd(home, some, k, n_iter, init, False, rng, bar, start=start)
        centroids = HOST.bring(found)
    return multiply(centroids, turn.T) + mean
