"""IVF: vectors in lists around centroids, of which a search looks into a few."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, address
from .._results import Neighbors
from ..scan import _lists
from ..scan._lists import Lists
from . import _files
from ._arena import BLOCK
from ._coded import CodedIndex
from ._home import HOST, check_matrix
from ._kmeans import kmeans
from ._quantizer_files import quantizer_config
from ._soar import second_lists
from .base import register
from .codes import sampled

_PER_LIST = 256  # vectors that a centroid is trained on at most
_SAMPLE = 1 << 17  # vectors that the quantizer is trained on at most


@register
class IVF(CodedIndex):
    """Vectors in lists around centroids; a search looks into the lists that are nearest to its query.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    nlist : int
        Number of lists; about the square root of the collection's size, up to 16 times it.
    quantizer : None, str or Quantizer
        What the lists hold: None or 'float32', 'float16', 'bfloat16', 'int8' (integers) for the vectors as
        rows, exactly scored; or a quantizer of `lutra.quant` for its codes.
    metric : {'l2', 'ip', 'cosine'}, default 'l2'
        As in `Flat`. For cosine the vectors are normalised before they are stored.
    residual : bool, default True
        Code the vectors' differences to their centroids rather than the vectors.
    soar : bool, default False
        Put each vector into a second list too, chosen so that it finds what the first is bad at: better
        recall for the same work, and twice the memory for codes.
    soar_lambda : float, default 1.0
        How much the second residual's part along the first counts.
    refine : {None, 'float32', 'float16', 'bfloat16', 'int8'}, default None
        Keep the vectors too, 4 d, 2 d or d bytes each ('int8': each row by its own scale), so that a search
        scores its best candidates again, exactly (in that precision).
    nprobe : int, default 1
        Lists that a search looks into; the attribute may be changed at any time.
    seed : int, default 0
        Of the training.

    Attributes
    ----------
    nprobe : int
    refine_factor : int
        A search scores the best ``k * refine_factor`` by codes again; 0 ranks by codes alone. Default 4, or
        10 where a code has fewer than 4 bits a dimension; 0 without ``refine``.

    Notes
    -----
    Memory: the codes, 4 bytes a row for its position, 4 for each row term that the quantizer has (squared
    norms for l2 of residuals, factors of RaBitQ), the vectors of ``refine``, 4 nlist d for the centroids, 8
    for an id where ids are not 0, 1, 2, ... Lists begin at multiples of 16 rows. Bulk additions leave no room
    in the lists, small ones up to a quarter; `compact` gives it back.

    At nprobe = nlist every vector is compared. On a GPU the lists are scanned by CUDA kernels, sums of
    look-ups are fp32 there whatever the bits; quantizers but `PQ`, `OPQ` and `RQ` encode on the CPU.
    A `PQ` or `OPQ` of the anisotropic loss is told the vectors' own directions besides their residuals.
    Without ``refine``, `reconstruct` gives what the codes stand for (for cosine: of the normalised vector).

    References
    ----------
    Jégou, Douze, Schmid, Product quantization for nearest neighbor search, PAMI 2011. Sun et al., SOAR:
    improved indexing for approximate nearest neighbor search, NeurIPS 2023.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.random.default_rng(0).standard_normal((10_000, 32), dtype=np.float32)
    >>> index = lutra.index.IVF(32, nlist=100, nprobe=8)
    >>> index.train(x)
    >>> index.add(x)
    >>> index.search(x[:2], k=1).ids.ravel()
    array([0, 1])
    """

    def __init__(
        self,
        d: int,
        nlist: int,
        quantizer: Any = None,
        metric: str = "l2",
        *,
        residual: bool = True,
        soar: bool = False,
        soar_lambda: float = 1.0,
        refine: str | None = None,
        nprobe: int = 1,
        seed: int = 0,
    ) -> None:
        self.nlist = _checks.integer("nlist", nlist, 1, 2**31 - 1)
        self.residual = bool(residual)
        self.soar = bool(soar)
        if self.soar and self.nlist < 2:
            raise ValueError("soar needs two lists at least: nlist is 1")
        self.soar_lambda = _checks.positive("soar_lambda", soar_lambda)
        super().__init__(d, "float32" if quantizer is None else quantizer, metric, refine)
        if self.quantizer == "int8" and metric == "cosine":
            raise ValueError("quantizer='int8' holds integers, and cosine normalises: take 'float16'")
        self.nprobe = _checks.integer("nprobe", nprobe, 1)
        self.seed = _checks.integer("seed", seed, 0)
        self._centroids: np.ndarray | None = None
        self._copied: Any = None  # a home that is not the host, and the centroids there

    @property
    def centroids(self) -> np.ndarray | None:
        """The centroids of the lists, shape (nlist, d), float32; None before training."""
        return None if self._centroids is None else self._centroids.copy()

    @property
    def is_trained(self) -> bool:
        return self._centroids is not None and (isinstance(self.quantizer, str) or self.quantizer.is_trained)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self._centroids is None else self._centroids.nbytes)

    @property
    def list_sizes(self) -> np.ndarray:
        """Rows in each list, shape (nlist,), int64."""
        with self._lock.reading():
            return self._lists.rows.copy() if self.is_trained else np.zeros(self.nlist, np.int64)

    def imbalance_factor(self) -> float:
        """How uneven the lists are, as FAISS measures it: nlist * sum(size^2) / sum(size)^2.

        1 where all lists have the same size; a search looks at so many times as many rows as it would then.
        """
        sizes = self.list_sizes.astype(np.float64)
        total = sizes.sum()
        return float(self.nlist * np.square(sizes).sum() / total**2) if total else 1.0

    def __repr__(self) -> str:
        text = super().__repr__()
        return f"{text[:-1]}, imbalance={self.imbalance_factor():.2f})" if self.ntotal else text

    # ---- what CodedIndex asks
    @property
    def _nlist(self):
        return self.nlist

    @property
    def _residual(self):
        return self.residual

    @property
    def _copies(self):
        return 2 if self.soar else 1

    def _centers(self):
        return self._centroids

    # ---- training
    def train(self, x: Any, *, n_iter: int = 10, progress: bool | None = None) -> None:
        """Learn the centroids, and the quantizer's state from the residuals (or vectors) of a sample.

        Parameters
        ----------
        x : array, shape (n, d)
            At least nlist vectors, like those that will be added; 39 * nlist and more are advisable, 256 *
            nlist are used at most.
        n_iter : int, default 10
            Iterations of k-means for the centroids.
        progress : bool or None
            Progress bars (tqdm): None shows one where it takes more than two seconds, on a terminal.

        Raises
        ------
        TypeError
            ``x`` is no array or has another dtype.
        ValueError
            A shape that does not fit, too few vectors, NaN or infinities (the row is named), or an index that
            holds vectors.

        Warns
        -----
        UserWarning
            Fewer than 39 vectors for each centroid.

        Notes
        -----
        Cost: 2 d nlist n_iter flops for each vector used, and the quantizer's training. The same seed,
        vectors and backend give the same index, whatever the number of threads.
        """
        native = check_matrix(x, "x", self.d)
        with self._changing():
            if self.ntotal:
                raise ValueError(f"the index holds {self.ntotal} vectors in its lists; train a new one")
            home = self._settle(native)
            most = max(_PER_LIST * self.nlist, 0 if isinstance(self.quantizer, str) else _SAMPLE)
            points = self._unit(sampled(native, most, self.seed, home))
            centroids = kmeans(
                points, self.nlist, n_iter=n_iter, spherical=self.metric == "cosine",
                max_points_per_centroid=_PER_LIST, seed=self.seed, progress=progress,
            ).centroids  # fmt: skip
            if not isinstance(self.quantizer, str):
                part = points[:: max(1, len(points) // _SAMPLE)]
                toward = {}
                if self.residual:
                    if self.quantizer._uses_directions:
                        toward["directions"] = part
                    part = part - centroids[address.nearest(part, centroids, 1, "l2").ids[:, 0]]
                self.quantizer.train(part, progress=progress, **toward)
            self._set_centroids(HOST.bring(centroids))

    def _set_centroids(self, centroids: np.ndarray) -> None:
        self._centroids = np.ascontiguousarray(centroids, np.float32)
        blocks = (self.nlist + BLOCK - 1) // BLOCK
        padded = np.zeros((blocks * BLOCK, self.d), np.float32)
        padded[: self.nlist] = self._centroids
        self._coarse_rows = np.ascontiguousarray(padded.reshape(blocks, BLOCK, self.d).transpose(0, 2, 1))
        self._codec = self._arena = self._searcher = self._copied = None

    def _centers_here(self):
        home = self._here
        if home is HOST:
            return self._centroids
        copied = self._copied
        if copied is None or copied[0] is not home:
            copied = self._copied = home, home.bring(self._centroids)
        return copied[1]

    # ---- adding
    def _assign(self, x):
        centroids = self._centers_here()
        assert centroids is not None
        if not self.soar:
            return [address.nearest(x, centroids, 1, "l2").ids[:, 0]]
        return list(second_lists(x, centroids, self.soar_lambda, self._here))

    # ---- searching
    def search(
        self,
        q: Any,
        k: int = 10,
        *,
        filter: Any = None,
        nprobe: int | None = None,
        refine_factor: int | None = None,
    ) -> Neighbors:
        """The k best vectors that the nearest lists hold, for each query.

        Parameters
        ----------
        q, k, filter
            As in `Flat.search`.
        nprobe : int, optional
            Lists to look into, in place of the attribute; more than nlist means all.
        refine_factor : int, optional
            In place of the attribute. On CUDA k * refine_factor is at most 2048 (with ``soar`` 1024), or k
            where that is more.

        Returns
        -------
        scores, ids : arrays, shape (nq, k)
            As from `Flat.search`, padded where the lists hold fewer than k. Scores are those of the coded
            vectors, or exact where they are refined.

        Raises
        ------
        TypeError, ValueError
            As `Flat.search`; ``nprobe`` < 1; a ``refine_factor`` > 0 where the index keeps no vectors.

        Notes
        -----
        Cost: 2 nlist d flops, the scan of about nprobe / nlist of the rows (times the imbalance), and
        k * refine_factor reads of a vector. The queries of a batch that probe a list share its reading.
        """
        return self._answer(q, k, filter, nprobe=nprobe, refine_factor=refine_factor)

    def _search(self, q, k, keep, nprobe, refine_factor):
        factor = self._factor(refine_factor)
        nprobe = self.nprobe if nprobe is None else nprobe
        if type(nprobe) is not int or nprobe < 1:
            nprobe = _checks.integer("nprobe", nprobe, 1)
        return self._find(q, k, keep, min(nprobe, self.nlist), factor)

    def _coarse(self):
        return self._coarse_rows

    def _probe(self, q, nprobe):
        """Scores and numbers of each query's nearest lists, the same for a query alone and in a batch."""
        every = np.zeros((len(q), 1), np.int64)
        lists = Lists(np.zeros(1, np.int64), np.array([self.nlist]), None, self.nlist, None, every)
        return _lists.list_rows(q, self._coarse_rows, lists, nprobe, self._inner)

    # ---- configuration and files
    def _config(self):
        return {
            "d": self.d, "nlist": self.nlist, "quantizer": quantizer_config(self.quantizer),
            "metric": self.metric, "residual": self.residual, "soar": self.soar,
            "soar_lambda": self.soar_lambda, "refine": self.refine, "nprobe": self.nprobe, "seed": self.seed,
            "refine_factor": self.refine_factor,
        }  # fmt: skip

    def _contents(self):
        tensors, metadata = super()._contents()
        if self._centroids is not None:
            tensors.append(_files.Tensor.of_array("centroids", self._centroids))
        return tensors, metadata

    def _restore_trained(self, file):
        super()._restore_trained(file)
        centroids, _ = file.tensor("centroids", "F32", (self.nlist, self.d), mmap=False)
        if not np.isfinite(centroids).all():
            file.fail("the centroids hold NaN or infinities")
        self._set_centroids(centroids)
