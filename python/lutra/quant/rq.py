"""RQ: residual quantization, codes that each refine those before."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .. import _checks, address
from ..index._home import HOST
from ..index._kmeans import lloyd
from ..index._progress import Progress
from . import _bits
from ._rotation import multiply
from .base import Quantizer, Tables, training_matrix
from .pq import pack_entries

_BYTES = 128 << 20  # of residuals that are held at a time


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
    vector's norm besides (`norms`). Encoding costs 2 d 2**bits m beam flops a vector, m beam times `PQ`'s.
    Codes are packed as `PQ`'s.

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
                    left = points - _sum(self._search(points, books[: j + 1]), books[: j + 1])
        self._codebooks = books
        return self

    # ---- codes
    def _search(self, x: np.ndarray, books: np.ndarray) -> np.ndarray:
        """Entries (n, stages) of each vector, by beam search through some of the codebooks."""
        n, d = x.shape
        stages = len(books)
        out = np.empty((n, stages), np.uint8)
        step = max(1, _BYTES // (4 * d * self.beam))
        for begin in range(0, n, step):
            part = x[begin : begin + step]
            rows = len(part)
            residuals, chosen = part[:, None], np.empty((rows, 1, 0), np.uint8)
            for book in books:
                width = residuals.shape[1]
                count = min(self.beam, self.ksub)
                scores, ids = address.nearest(residuals.reshape(-1, d), book, count, "l2")
                keep = min(self.beam, width * count)
                order = np.argsort(scores.reshape(rows, -1), axis=1, kind="stable")[:, :keep]
                parent, entry = order // count, np.take_along_axis(ids.reshape(rows, -1), order, 1)
                every = np.arange(rows)[:, None]
                residuals = residuals[every, parent] - book[entry]
                chosen = np.concatenate([chosen[every, parent], entry[:, :, None].astype(np.uint8)], axis=2)
            out[begin : begin + step] = chosen[:, 0]
        return out

    def _encode(self, x: np.ndarray) -> np.ndarray:
        return _bits.pack(self._search(x, self._books), self.bits)

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
        products = multiply(q, np.ascontiguousarray(self._books.reshape(-1, self.d).T))
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
        self._codebooks = tensors["codebooks"]


def _sum(entries: np.ndarray, books: np.ndarray) -> np.ndarray:
    """The sums of the centroids that each row of entries names."""
    total = np.zeros((len(entries), books.shape[2]), np.float32)
    for j, book in enumerate(books):
        total += book[entries[:, j]]
    return total
