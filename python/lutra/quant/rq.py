"""RQ: residual quantization, codes that each refine those before."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .. import _checks
from ..index._home import HOST
from ..index._kmeans import lloyd
from ..index._progress import Progress
from . import _bits
from ._kernels import multiply, rq_entries, rq_gram
from .base import Quantizer, Tables, training_matrix
from .pq import pack_entries


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
        Partial codes that are kept while a vector is coded; 1 takes the nearest centroid at each step.
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
    Chen, Guan, Wang, Approximate nearest neighbor search by residual vector quantization, Sensors 2010.
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
        n_iter: int = 25,
        init: str = "random",
        max_points_per_centroid: int | None = 256,
        progress: bool | None = None,
    ) -> RQ:
        """Learn the codebooks, each from what those before leave over.

        Parameters
        ----------
        x, n_iter, init, max_points_per_centroid, progress
            As `PQ.train`.

        Returns
        -------
        RQ
            Itself.

        Raises
        ------
        TypeError, ValueError
            As `PQ.train`.
        """
        n_iter = _checks.integer("n_iter", n_iter, 1)
        _checks.choice("init", init, {"random": 0, "k-means++": 1})
        most = None
        if max_points_per_centroid is not None:
            most = self.ksub * _checks.integer("max_points_per_centroid", max_points_per_centroid, 1)
        points = training_matrix(x, self.d, self.ksub, most, self.seed)
        if len(points) < 39 * self.ksub:
            warnings.warn(
                f"{len(points)} vectors for {self.ksub} centroids; at least {39 * self.ksub} are advisable",
                stacklevel=2,
            )
        books = np.zeros((self.m, self.ksub, self.d), np.float32)
        left = points
        with Progress(self.m * n_iter, "RQ training", progress) as bar:
            for j in range(self.m):
                rng = np.random.default_rng((self.seed, j))
                books[j], _ = lloyd(HOST, left, self.ksub, n_iter, init, False, rng, bar)
                if j + 1 < self.m:
                    so_far = books[: j + 1]
                    left = points - _sum(rq_entries(points, so_far, rq_gram(so_far), self.beam), so_far)
        self._codebooks, self._gram = books, None
        return self

    # ---- codes
    def _encode(self, x: np.ndarray) -> np.ndarray:
        if self._gram is None:
            self._gram = rq_gram(self._books)  # two threads may both do it: the results are the same
        return _bits.pack(rq_entries(x, self._books, self._gram, self.beam), self.bits)

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
    """The sums of the centroids that each row of entries names."""
    total = np.zeros((len(entries), books.shape[2]), np.float32)
    for j, book in enumerate(books):
        total += book[entries[:, j]]
    return total
