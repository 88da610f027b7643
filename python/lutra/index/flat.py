"""Flat: exact search."""

from __future__ import annotations

from typing import Any

from .. import scan
from .._arrays import F32
from ._files import File
from ._home import HOST, check_matrix
from ._rows import Rows
from .base import Index, register


@register
class Flat(Index):
    """A collection that is searched exactly.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    metric : {'ip', 'l2', 'cosine'}, default 'ip'
        ``'ip'``: inner product, larger is better; ``'l2'``: squared Euclidean distance, smaller is better;
        ``'cosine'``: inner product over both norms, 0 where a norm is 0.

    Notes
    -----
    Vectors are kept as float32, as they were added (cosine normalises nothing): 4 d bytes each, and 8 for an
    id where ids are not simply 0, 1, 2, ... A search costs what `lutra.scan.knn` costs: 2 n d flops a query,
    or one read of the collection where queries are few.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> index = lutra.index.Flat(2, metric="l2")
    >>> index.add(np.array([[0, 0], [3, 4]], np.float32), ids=[10, 20])
    >>> index.search(np.array([[0, 1]], np.float32), k=2)
    Neighbors(scores=array([[ 1., 18.]], dtype=float32), ids=array([[10, 20]]))
    """

    def __init__(self, d: int, metric: str = "ip") -> None:
        super().__init__(d, metric)
        self._rows = {"vectors": Rows(HOST, self.d, F32)}

    def train(self, x: Any, progress: bool | None = None) -> None:
        """Nothing: an exact index needs no training. ``x`` is checked, so that code for any index runs."""
        check_matrix(x, "x", self.d)

    def _encode(self, x, out, first):
        out["vectors"][:] = x

    def _search(self, q, k, keep):
        if keep is None:
            return scan.knn(q, self._rows["vectors"].view, k, self.metric)
        options: dict[str, Any] = {"filter": keep}
        return scan.knn(q, self._rows["vectors"].view, k, self.metric, **options)

    def _reconstruct(self, positions):
        return self._rows["vectors"].view[positions]

    def _config(self):
        return {"d": self.d, "metric": self.metric}

    def _restore(self, file: File, n: int, mmap: bool) -> None:
        vectors, mapped = file.tensor("vectors", "F32", (n, self.d), mmap=mmap)
        self._rows["vectors"] = Rows.of(vectors, F32, mapped=mapped)
