"""Linear transforms: PCA, whitening, rotations."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import _checks
from ..._arrays import F64
from .._home import HOST, check_matrix, to_float32
from .base import PART, Transform


class _Linear(Transform):
    """y = (x - mean) A^T, and back by B: x = y B^T + mean."""

    _a: np.ndarray | None = None  # (d_out, d_in)
    _b: np.ndarray | None = None  # (d_in, d_out)
    _mean: np.ndarray | None = None  # (d_in,)
    _near: Any = None  # where A (transposed) and the mean are on a GPU, and both

    @property
    def is_trained(self):
        return self._a is not None

    def _set(self, a: np.ndarray, b: np.ndarray, mean: np.ndarray | None = None) -> None:
        self._a, self._b = np.ascontiguousarray(a, np.float64), np.ascontiguousarray(b, np.float64)
        self._mean = np.zeros(self.d_in) if mean is None else np.ascontiguousarray(mean, np.float64)
        self._near = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what lies on a GPU is brought there again."""
        return {**self.__dict__, "_near": None}

    @property
    def matrix(self) -> np.ndarray | None:
        """A (d_out, d_in), float64; None before training."""
        return self._a

    @property
    def mean(self) -> np.ndarray | None:
        """What is subtracted first, (d_in,) float64; None before training."""
        return self._mean

    def _map(self, x):
        assert self._a is not None
        return (x - self._mean) @ self._a.T

    def _map_on_gpu(self, home, x):
        near = self._near
        if near is None or near[0] != (home.kind.name, home.device):
            assert self._a is not None and self._mean is not None
            where = home.kind.name, home.device
            near = where, home.bring(np.ascontiguousarray(self._a.T)), home.bring(self._mean)
            home.wait()  # other streams may use them at once
            self._near = near
        return (home.kind.cast(x, F64) - near[2]) @ near[1]

    def _back(self, y):
        assert self._b is not None
        return y.astype(np.float64) @ self._b.T + self._mean

    def _tensors(self):
        return {} if self._a is None else {"a": self._a, "b": self._b, "mean": self._mean}

    def _layout(self):
        return {"a": (self.d_out, self.d_in), "b": (self.d_in, self.d_out), "mean": (self.d_in,)}

    def _assign(self, tensors):
        self._set(tensors["a"], tensors["b"], tensors["mean"])


def spectrum(x: Any, center: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, eigenvalues (descending) and eigenvectors (rows) of a native matrix's covariance, float64."""
    n, d = x.shape
    if n < 2:
        raise ValueError(f"x has {n} rows; a covariance needs 2 at least")
    mean = np.zeros(d)
    parts = range(0, n, PART)
    if center:
        for i in parts:
            mean += to_float32(HOST, x[i : i + PART], "x", i).sum(0, dtype=np.float64)
        mean /= n
    covariance = np.zeros((d, d))
    for i in parts:
        part = to_float32(HOST, x[i : i + PART], "x", i) - mean
        covariance += part.T @ part
    values, vectors = np.linalg.eigh(covariance / (n - 1))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1].T
    # An eigenvector may be turned round: let its largest value be positive.
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], 1)
    return mean, values, vectors * np.where(largest < 0, -1, 1)


class PCA(_Linear):
    """Projection on the d_out directions of largest variance.

    Parameters
    ----------
    d_in, d_out : int
        d_out at most d_in.
    whiten : bool, default False
        Divide each component by its standard deviation.
    center : bool, default True
        Subtract the mean, as FAISS and scikit-learn do. Squared distances do not see it; inner products and
        cosines do: with ``center=False`` they are kept as well as d_out allows.
    eps : float, default 1e-6
        Added to each variance before ``whiten`` divides, as a share of the largest.

    Attributes
    ----------
    explained_variance : array, shape (d_out,), or None
    """

    def __init__(
        self, d_in: int, d_out: int, whiten: bool = False, *, center: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__(d_in, d_out)
        if self.d_out > self.d_in:
            raise ValueError(f"d_out must be at most d_in = {self.d_in}, got {self.d_out}")
        self.whiten, self.center, self.eps = bool(whiten), bool(center), _small("eps", eps)
        self.explained_variance: np.ndarray | None = None

    def _learn(self, x):
        mean, values, vectors = spectrum(x, self.center)
        scale = _deviations(values, self.eps)[: self.d_out] if self.whiten else np.ones(self.d_out)
        rows = vectors[: self.d_out]
        self._set(rows / scale[:, None], rows.T * scale, mean)
        self.explained_variance = values[: self.d_out]

    def _config(self):
        return {**super()._config(), "whiten": self.whiten, "center": self.center, "eps": self.eps}

    def _tensors(self):
        variance = self.explained_variance
        return {} if variance is None else {**super()._tensors(), "variance": np.ascontiguousarray(variance)}

    def _layout(self):
        return {**super()._layout(), "variance": (self.d_out,)}

    def _assign(self, tensors):
        super()._assign(tensors)
        self.explained_variance = tensors["variance"]


class Whitening(_Linear):
    """Vectors whose covariance is the identity.

    Parameters
    ----------
    d_in : int
    kind : {'pca', 'zca'}, default 'pca'
        ``'pca'`` leaves the components in the order of their variance; ``'zca'`` turns them back, so that
        each vector stays as near to itself as whitening allows.
    eps : float, default 1e-6
        Added to each variance, as a share of the largest: directions without variance are not blown up.

    References
    ----------
    Su et al., Whitening Sentence Representations for Better Semantics and Faster Retrieval, arXiv 2103.15316.
    Kessy, Lewin, Strimmer, Optimal Whitening and Decorrelation, The American Statistician 2018.
    """

    def __init__(self, d_in: int, kind: str = "pca", *, eps: float = 1e-6) -> None:
        super().__init__(d_in)
        _checks.choice("kind", kind, {"pca": 0, "zca": 1})
        self.kind, self.eps = kind, _small("eps", eps)

    def _learn(self, x):
        mean, values, vectors = spectrum(x, True)
        scale = _deviations(values, self.eps)
        a, b = vectors / scale[:, None], vectors.T * scale
        if self.kind == "zca":
            a, b = vectors.T @ a, b @ vectors
        self._set(a, b, mean)

    def _config(self):
        return {"d_in": self.d_in, "kind": self.kind, "eps": self.eps}


class RandomRotation(_Linear):
    """A random orthonormal matrix: it spreads what a vector holds evenly over its values.

    ``d_out`` below d_in projects (and loses), above it embeds. Nothing is trained.
    """

    def __init__(self, d_in: int, d_out: int | None = None, *, seed: int = 0) -> None:
        super().__init__(d_in, d_out)
        self.seed = _checks.integer("seed", seed, 0)
        size = max(self.d_in, self.d_out)
        q, r = np.linalg.qr(np.random.default_rng(self.seed).standard_normal((size, size)))
        q = (q * np.sign(np.diag(r)))[: self.d_out, : self.d_in]  # the signs make it uniform
        self._set(q, q.T)

    def _config(self):
        return {**super()._config(), "seed": self.seed}

    @classmethod
    def _of_config(cls, config):  # a file brings the matrix
        blank = _blank(cls, config)
        blank.seed = _checks.integer("seed", config["seed"], 0)
        return blank


class Rotation(_Linear):
    """A given matrix with orthonormal rows or columns, such as OPQ finds.

    Parameters
    ----------
    matrix : array, shape (d_out, d_in)
        y = matrix x.
    """

    def __init__(self, matrix: Any) -> None:
        native = check_matrix(matrix, "matrix")
        a = to_float32(HOST, native, "matrix").astype(np.float64)
        super().__init__(a.shape[1], a.shape[0])
        gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
        worst = float(np.abs(gram - np.eye(len(gram))).max())
        if worst > 1e-3:
            raise ValueError(
                f"matrix is no rotation: its rows (or columns) are orthonormal up to {worst:.3g} only"
            )
        self._set(a, a.T)

    @classmethod
    def _of_config(cls, config):
        return _blank(cls, config)


def _blank(cls: type[Transform], config: dict[str, Any]) -> Any:
    blank = cls.__new__(cls)
    Transform.__init__(blank, config["d_in"], config["d_out"])
    return blank


def _small(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def _deviations(values: np.ndarray, eps: float) -> np.ndarray:
    """Standard deviations to divide by; 1 where there is no variance at all."""
    deviations = np.sqrt(values + eps * values[0])
    return np.where(deviations > 0, deviations, 1)
