"""scikit-learn manners: a nearest-neighbours estimator and transformer on lutra's indexes.

Importing this module imports scikit-learn; ``import lutra`` does not.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:  # pragma: no cover - depends on the environment
    raise ImportError(
        "lutra.sklearn needs scikit-learn 1.6 or later: pip install 'lutra[sklearn]'"
    ) from error

from . import index as _index

__all__ = ["NearestNeighbors"]

# Their names to ours, and how a score becomes a distance.
_METRICS = {
    "euclidean": ("l2", "root"),
    "l2": ("l2", "root"),
    "sqeuclidean": ("l2", "same"),
    "cosine": ("cosine", "one minus"),
    "ip": ("ip", "minus"),
    "inner_product": ("ip", "minus"),
    "manhattan": ("l1", "same"),
    "cityblock": ("l1", "same"),
    "l1": ("l1", "same"),
    "chebyshev": ("linf", "same"),
    "infinity": ("linf", "same"),
    "linf": ("linf", "same"),
    "poincare": ("poincare", "same"),
}
_EXACT = ("auto", "brute", "kd_tree", "ball_tree")
_MODES = ("connectivity", "distance")


class NearestNeighbors(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Nearest neighbours as scikit-learn's `NearestNeighbors` and `KNeighborsTransformer`, on a lutra index.

    Parameters
    ----------
    n_neighbors : int, default 5
    radius : float, default 1.0
        For `radius_neighbors`, in the unit of the metric.
    mode : {'distance', 'connectivity'}, default 'distance'
        What `transform` puts into its graph.
    algorithm : str, default 'auto'
        'auto' and 'brute' search exactly, unless ``recall`` asks for less ('kd_tree' and 'ball_tree', which
        are exact elsewhere, mean the same). Any other text is an index in FAISS's words, as
        `lutra.index.factory` reads them: ``'HNSW32'``, ``'IVF256,PQ32x4fs,RFlat'``.
    recall : float in (0, 1], default 1.0
        Less than 1, with ``algorithm='auto'``: `lutra.index.auto` measures on ``X`` and takes the fastest
        index that finds this share of the true neighbours.
    metric : str, default 'minkowski'
        'euclidean' (or 'l2'), 'sqeuclidean', 'cosine' (1 - cosine), 'manhattan' ('cityblock', 'l1'),
        'chebyshev' ('linf'), 'poincare', 'inner_product' (the negative product), or 'minkowski' with ``p``.
    p : {1, 2, inf}, default 2
        For 'minkowski'.
    n_jobs : int, optional
        Accepted for the sake of callers; searches use lutra's threads (`lutra.set_num_threads`).

    Attributes
    ----------
    index_ : lutra.index.Index
        The filled index; its search parameters (``nprobe``, ``ef_search``) may be set.
    n_samples_fit_, n_features_in_ : int
    effective_metric_ : str
        lutra's name of the metric.

    Notes
    -----
    Vectors are kept and compared in float32; distances come in the dtype of the queries, float32 or float64.
    With an index that is not exact, a row may have fewer neighbours than asked for: id -1, distance inf.

    Examples
    --------
    >>> import numpy as np
    >>> from lutra.sklearn import NearestNeighbors
    >>> x = np.array([[0.0], [1.0], [3.0]])
    >>> NearestNeighbors(n_neighbors=2).fit(x).kneighbors([[1.2]])
    (array([[0.20000005, 1.20000005]]), array([[1, 0]]))
    """

    index_: Any
    n_samples_fit_: int
    effective_metric_: str
    _scale: str

    def __init__(
        self,
        *,
        n_neighbors: int = 5,
        radius: float = 1.0,
        mode: str = "distance",
        algorithm: str = "auto",
        recall: float = 1.0,
        metric: str = "minkowski",
        p: float = 2,
        n_jobs: int | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.radius = radius
        self.mode = mode
        self.algorithm = algorithm
        self.recall = recall
        self.metric = metric
        self.p = p
        self.n_jobs = n_jobs

    # ---- fitting
    def fit(self, X: Any, y: Any = None) -> NearestNeighbors:
        """Build the index.

        Parameters
        ----------
        X : array-like, shape (n, d)
            Dense, finite.
        y : ignored

        Returns
        -------
        NearestNeighbors
            The estimator itself.
        """
        _check_count(self.n_neighbors)
        _check_mode(self.mode)
        if not isinstance(self.algorithm, str):
            raise ValueError(f"algorithm must be a string, got {self.algorithm!r}")
        if isinstance(self.recall, bool) or not isinstance(self.recall, Real) or not 0 < self.recall <= 1:
            raise ValueError(f"recall must be in (0, 1], got {self.recall!r}")
        metric, self._scale = self._effective_metric()
        X = validate_data(self, X, dtype=(np.float64, np.float32), order="C")
        x = _narrow(X, "X")
        if self.algorithm not in _EXACT:
            index = _index.factory(self.algorithm, x.shape[1], metric)
            index.train(x)
            index.add(x)
        elif self.algorithm == "auto" and self.recall < 1:
            index = _index.auto(x, recall=self.recall, metric=metric, k=self.n_neighbors, verbose=False)
        else:
            index = _index.Flat(x.shape[1], metric)
            index.add(x)
        self.index_ = index
        self.effective_metric_ = metric
        self.n_samples_fit_ = len(x)
        self._n_features_out = len(x)
        return self

    def _effective_metric(self) -> tuple[str, str]:
        if self.metric == "minkowski":
            for p, name in ((2, "euclidean"), (1, "manhattan"), (np.inf, "chebyshev")):
                if self.p == p:
                    return _METRICS[name]
            raise ValueError(f"p must be 1, 2 or inf for metric='minkowski', got {self.p!r}")
        try:
            return _METRICS[self.metric]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, ("minkowski", *_METRICS)))
            raise ValueError(f"metric must be one of {known}; got {self.metric!r}") from None

    # ---- neighbours
    def kneighbors(
        self, X: Any = None, n_neighbors: int | None = None, return_distance: bool = True
    ) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """The nearest neighbours of points.

        Parameters
        ----------
        X : array-like, shape (nq, d), optional
            Default: the points of `fit`, none of which counts as its own neighbour.
        n_neighbors : int, optional
            Default: that of the constructor.
        return_distance : bool, default True

        Returns
        -------
        distances : ndarray, shape (nq, n_neighbors)
            Nearest first; only with ``return_distance``.
        ids : ndarray, shape (nq, n_neighbors), int64
            Rows of the fitted ``X``.
        """
        check_is_fitted(self)
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        _check_count(k)
        q, dtype = self._queries(X)
        own = X is None
        if k + own > self.n_samples_fit_:
            raise ValueError(
                f"Expected n_neighbors {'<' if own else '<='} n_samples_fit, but n_neighbors = {k}, "
                f"n_samples_fit = {self.n_samples_fit_}, n_samples = {len(q)}"
            )
        scores, ids = self.index_.search(q, int(k) + own)
        if own:
            scores, ids = _without_self(scores, ids)
        return (self._distances(scores, dtype), ids) if return_distance else ids

    def radius_neighbors(
        self,
        X: Any = None,
        radius: float | None = None,
        return_distance: bool = True,
        sort_results: bool = False,
    ) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """All neighbours within a radius.

        Parameters
        ----------
        X : array-like, shape (nq, d), optional
            As in `kneighbors`.
        radius : float, optional
            Default: that of the constructor. The border belongs to it.
        return_distance : bool, default True
        sort_results : bool, default False
            Needs ``return_distance``; results come nearest first in any case.

        Returns
        -------
        distances, ids : ndarrays of objects, shape (nq,)
            Of each query an array of its own, nearest first.
        """
        check_is_fitted(self)
        if sort_results and not return_distance:
            raise ValueError("return_distance must be True if sort_results is True.")
        distances, ids = self._within(X, radius)
        return (_objects(distances), _objects(ids)) if return_distance else _objects(ids)

    def _within(self, X: Any, radius: float | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        limit = self.radius if radius is None else radius
        if isinstance(limit, bool) or not isinstance(limit, Real) or np.isnan(limit):
            raise ValueError(f"radius must be a number, got {limit!r}")
        q, dtype = self._queries(X)
        distances: list[Any] = [None] * len(q)
        ids: list[Any] = [None] * len(q)
        open_ = np.arange(len(q))
        k = min(64, self.n_samples_fit_)
        while len(open_):  # the nearest 64, then four times as many for those who need them
            scores, found = self.index_.search(q[open_], k)
            far = self._distances(scores, dtype)
            inside = (far <= limit) & (found >= 0)
            done = ~inside[:, -1] if k < self.n_samples_fit_ else np.ones(len(open_), bool)
            for row in np.flatnonzero(done):
                i = open_[row]
                keep = inside[row] & (found[row] != i) if X is None else inside[row]
                distances[i], ids[i] = far[row][keep], found[row][keep]
            open_ = open_[~done]
            k = min(4 * k, self.n_samples_fit_)
        return distances, ids

    def _queries(self, X: Any) -> tuple[np.ndarray, np.dtype[Any]]:
        """Queries in float32, and the dtype for their distances."""
        if X is None:
            q = self.index_.reconstruct(self.index_.ids)
            return q, np.dtype(np.float64)
        X = validate_data(self, X, dtype=(np.float64, np.float32), order="C", reset=False)
        return _narrow(X, "X"), X.dtype

    def _distances(self, scores: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        scores = scores.astype(dtype)
        if self._scale == "root":
            return np.sqrt(np.maximum(scores, 0, out=scores), out=scores)
        if self._scale == "one minus":
            return np.maximum(1 - scores, 0)
        return -scores if self._scale == "minus" else scores

    # ---- graphs
    def kneighbors_graph(
        self,
        X: Any = None,
        n_neighbors: int | None = None,
        mode: str = "connectivity",
    ) -> Any:
        """The graph of nearest neighbours.

        Parameters
        ----------
        X, n_neighbors
            As in `kneighbors`.
        mode : {'connectivity', 'distance'}, default 'connectivity'

        Returns
        -------
        scipy.sparse.csr_matrix, shape (nq, n_samples_fit)
            1 or the distance for each neighbour, a row's entries nearest first.
        """
        _check_mode(mode)
        distances, ids = self.kneighbors(X, n_neighbors)
        there = ids >= 0
        return self._graph(distances[there], ids[there], there.sum(1), mode)

    def radius_neighbors_graph(
        self,
        X: Any = None,
        radius: float | None = None,
        mode: str = "connectivity",
        sort_results: bool = False,
    ) -> Any:
        """The graph of neighbours within a radius; as `kneighbors_graph`. Rows are always sorted."""
        check_is_fitted(self)
        _check_mode(mode)
        distances, ids = self._within(X, radius)
        counts = np.array([len(row) for row in ids], np.int64)
        return self._graph(np.concatenate(distances), np.concatenate(ids), counts, mode)

    def _graph(self, distances: np.ndarray, ids: np.ndarray, counts: np.ndarray, mode: str) -> Any:
        from scipy.sparse import csr_matrix

        starts = np.concatenate([[0], np.cumsum(counts)])
        data = np.ones(len(ids), distances.dtype) if mode == "connectivity" else distances
        return csr_matrix((data, ids, starts), shape=(len(counts), self.n_samples_fit_))

    def transform(self, X: Any) -> Any:
        """The graph of ``n_neighbors`` neighbours (and one more with ``mode='distance'``).

        The one more is because every fitted point is its own first neighbour, as in scikit-learn's
        `KNeighborsTransformer`; what comes after in a pipeline counts on it.

        Parameters
        ----------
        X : array-like, shape (nq, d)

        Returns
        -------
        scipy.sparse.csr_matrix, shape (nq, n_samples_fit)
        """
        check_is_fitted(self)
        return self.kneighbors_graph(X, self.n_neighbors + (self.mode == "distance"), self.mode)

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """`fit`, then `transform` of the same ``X``."""
        return self.fit(X).transform(X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _check_count(k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"n_neighbors must be an integer, got {k!r} of type {type(k).__name__}")
    if k < 1:
        raise ValueError(f"Expected n_neighbors > 0. Got {k}")


def _check_mode(mode: Any) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode must be one of 'connectivity', 'distance'; got {mode!r}")


def _narrow(x: np.ndarray, name: str) -> np.ndarray:
    """float32; the index would refuse what overflows, this says of which array it speaks."""
    with np.errstate(over="ignore"):
        narrow = x.astype(np.float32, copy=False)
    if not np.isfinite(narrow).all():
        raise ValueError(f"{name} holds values beyond float32, in which vectors are compared")
    return narrow


def _without_self(scores: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop from row i the id i, or the last where duplicates have crowded it out."""
    nq, k = ids.shape
    keep = ids != np.arange(nq)[:, None]
    keep[keep.all(1), -1] = False
    return scores[keep].reshape(nq, k - 1), ids[keep].reshape(nq, k - 1)


def _objects(rows: list[np.ndarray]) -> np.ndarray:
    out = np.empty(len(rows), object)
    for i, row in enumerate(rows):
        out[i] = row
    return out
