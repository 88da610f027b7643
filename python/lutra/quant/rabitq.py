"""RaBitQ: randomly rotated sign bits with an unbiased estimate of inner products, and more bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from ._kernels import multiply
from ._rotation import check_rotation, random_rotation
from .base import Quantizer, RowTerms, Tables, training_matrix
from .rotated import floats

#: The step of a uniform quantizer of 1 .. 8 bits that is best for normal values (Max, 1960).
_STEPS = (1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
_TRIED = (0.84, 0.92, 1.0, 1.08, 1.18)  # times that step


class RaBitQ(Quantizer):
    """Sign bits of randomly rotated vectors, with factors that make their inner products unbiased.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    bits : int, default 1
        Bits of a dimension, 1 to 8.
    center : bool, default True
        Code differences to the training vectors' mean. False for vectors that are residuals already; their
        codes are 4 bytes shorter.
    seed : int, default 0
        Of the rotation.

    Notes
    -----
    With r = R (x - c), R the rotation and c the mean, a code holds u, an integer below 2**bits for each
    dimension, such that v = u - (2**bits - 1) / 2 has nearly the direction of r; the factor |r|^2 / <v, r>,
    |r|^2, and <c, x - c> (unless ``center`` is False), float32 each. <q, x> is estimated as
    <q, c> + factor <R (q - c), v> + <c, x - c>, which has no bias and an error below `error_bound` |q - c|
    but for rare cases.

    The bits lie in planes, the highest first: ceil(d / 8) bytes each. All are scanned in registers (``scan``
    is 'lut4'), with ceil(d / 4) look-ups a plane. The highest plane by itself is a code of one bit: see
    `first_plane`.

    References
    ----------
    Gao, Long, RaBitQ, SIGMOD 2024 (arXiv 2405.12497). Gao et al., Practical and asymptotically optimal
    quantization of high-dimensional vectors, SIGMOD 2025 (arXiv 2409.09913).
    """

    def __init__(self, d: int, bits: int = 1, *, center: bool = True, seed: int = 0) -> None:
        super().__init__(d)
        self.bits = _checks.integer("bits", bits, 1, 8)
        if not isinstance(center, bool):
            raise TypeError(f"center must be True or False, got {center!r}")
        self.center = center
        self.seed = _checks.integer("seed", seed, 0)
        self._groups = (self.d + 3) // 4
        self._plane = (self.d + 7) // 8
        self.m = self.bits * self._groups
        self.scan = "lut4"
        self.code_size = self.bits * self._plane + (12 if center else 8)
        self._state: dict[str, np.ndarray] = {}

    @property
    def is_trained(self) -> bool:
        return bool(self._state)

    @property
    def mean(self) -> np.ndarray | None:
        """What is subtracted from vectors, shape (d,), float32; None before training."""
        return self._state.get("mean")

    def train(self, x: Any, *, progress: bool | None = None) -> RaBitQ:
        """Draw the rotation and take the mean of a sample of vectors.

        Parameters
        ----------
        x : array, shape (n, d)
            One vector at least.

        Returns
        -------
        RaBitQ
            Itself.

        Raises
        ------
        TypeError, ValueError
            ``x`` is no matrix of d columns, has no rows, or holds NaN or infinities.
        """
        points = training_matrix(x, self.d, 1, None, self.seed)
        mean = points.mean(0, dtype=np.float64) if self.center else np.zeros(self.d)
        self._state = {"rotation": random_rotation(self.d, self.seed), "mean": mean.astype(np.float32)}
        return self

    # ---- codes
    def _encode(self, x: np.ndarray) -> np.ndarray:
        mean = self._state["mean"]
        difference = x - mean
        r = multiply(difference, self._state["rotation"].T)
        u = self._grid(r)
        v = u.astype(np.float32) - np.float32(((1 << self.bits) - 1) / 2)
        squares, products = np.einsum("ij,ij->i", r, r), np.einsum("ij,ij->i", v, r)
        factor = np.divide(squares, products, out=np.zeros_like(squares), where=products > 0)
        planes = [np.packbits((u >> b) & 1, axis=1, bitorder="little") for b in range(self.bits - 1, -1, -1)]
        terms = [factor, squares] + ([np.einsum("ij,j->i", difference, mean)] if self.center else [])
        return np.concatenate([*planes, np.stack(terms, 1).astype("<f4").view(np.uint8)], axis=1)

    def _grid(self, r: np.ndarray) -> np.ndarray:
        """For each row the integers whose direction is nearest to the row's, of those with a few steps."""
        top = 1 << (self.bits - 1)
        positive = r >= 0
        if self.bits == 1:
            return positive.astype(np.uint8)
        magnitude = np.abs(r)
        norms = np.sqrt(np.einsum("ij,ij->i", r, r))[:, None]
        unit = np.sqrt(np.float32(self.d)) / np.where(norms > 0, norms, np.float32(1))
        best = np.full(len(r), -np.inf, np.float32)
        chosen = np.zeros(r.shape, np.uint8)
        for factor in _TRIED:
            scaled = magnitude * (unit / np.float32(_STEPS[self.bits - 1] * factor))
            steps = np.minimum(scaled, np.float32(top - 1)).astype(np.uint8)
            v = steps + np.float32(0.5)
            cosine = np.einsum("ij,ij->i", v, magnitude) / np.sqrt(np.einsum("ij,ij->i", v, v))
            better = cosine > best
            best[better], chosen[better] = cosine[better], steps[better]
        return np.where(positive, top + chosen, top - 1 - chosen).astype(np.uint8)

    def _terms(self, codes: np.ndarray) -> np.ndarray:
        return floats(codes[:, self.bits * self._plane :])

    def _direction(self, codes: np.ndarray) -> np.ndarray:
        """The grid points v (n, d)."""
        planes = codes[:, : self.bits * self._plane].reshape(len(codes), self.bits, self._plane)
        bits = np.unpackbits(planes, axis=2, count=self.d, bitorder="little")
        v = np.full((len(codes), self.d), -((1 << self.bits) - 1) / 2, np.float32)
        for i in range(self.bits):
            v += bits[:, i] * np.float32(1 << (self.bits - 1 - i))
        return v

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        r = self._direction(codes) * self._terms(codes)[:, :1]
        return multiply(r, self._state["rotation"]) + self._state["mean"]

    def _entries(self, codes: np.ndarray) -> np.ndarray:
        planes = codes[:, : self.bits * self._plane].reshape(len(codes), self.bits, self._plane)
        out = np.empty((len(codes), self.bits, 2 * self._plane), np.uint8)
        out[:, :, 0::2] = planes & 15
        out[:, :, 1::2] = planes >> 4
        return out[:, :, : self._groups].reshape(len(codes), self.m)

    # ---- scanning
    def _tables(self, q: np.ndarray, metric: str) -> Tables | None:
        if metric == "l2":
            return None
        mean = self._state["mean"]
        rotated = np.zeros((len(q), 4 * self._groups), np.float32)
        rotated[:, : self.d] = multiply(q - mean, self._state["rotation"].T)
        groups = rotated.reshape(len(q), self._groups, 4)
        signs = ((np.arange(16)[:, None] >> np.arange(4)) & 1).astype(np.float32) - np.float32(0.5)
        low = np.zeros((len(q), self._groups, 16), np.float32)  # of the lowest plane
        for i in range(4):
            low += groups[:, :, i, None] * signs[:, i]
        planes = [low * np.float32(1 << b) for b in range(self.bits - 1, -1, -1)]
        bias = np.einsum("ij,j->i", q, mean) if self.center else None
        return Tables(np.concatenate(planes, axis=1), bias)

    def _row_terms(self, codes: np.ndarray) -> RowTerms:
        terms = self._terms(codes)
        return RowTerms(terms[:, 2].copy() if self.center else None, terms[:, 0].copy())

    def _norms(self, codes: np.ndarray) -> np.ndarray:
        terms, mean = self._terms(codes), self._state["mean"]
        if not self.center:
            return terms[:, 1].copy()
        return terms[:, 1] + 2 * terms[:, 2] + np.float32(mean @ mean)

    # ---- the error bound, and the first plane by itself
    def error_bound(self, codes: Any, epsilon: float = 1.9) -> np.ndarray:
        """How far estimates of inner products may be off, for a query at distance 1 from the mean.

        Parameters
        ----------
        codes : array, shape (n, code_size), uint8
        epsilon : float, default 1.9
            Standard deviations, about: an estimate is off by more for a query in 20 or fewer.

        Returns
        -------
        numpy.ndarray, shape (n,), float32
            |estimate - <q, x>| <= error_bound * |q - mean| holds with high probability over rotations.

        Raises
        ------
        TypeError, ValueError
            As `decode`; an epsilon that is no positive number.
        """
        epsilon = _checks.positive("epsilon", epsilon)
        native = self._check_codes(codes)
        v, terms = self._direction(native), self._terms(native)
        lengths = np.abs(terms[:, 0]) * np.sqrt(np.einsum("ij,ij->i", v, v))  # |r| / cosine of the code
        sine = np.sqrt(np.maximum(np.square(lengths) - terms[:, 1], 0))  # |r| sine / cosine
        return (epsilon / np.sqrt(max(1, self.d - 1)) * sine).astype(np.float32)

    def first_plane(self) -> RaBitQ:
        """The quantizer of one bit whose codes are the highest planes of this one's (see `first_codes`)."""
        self._need_training()
        first = RaBitQ(self.d, 1, center=self.center, seed=self.seed)
        first._state = self._state
        return first

    def first_codes(self, codes: Any) -> np.ndarray:
        """Codes of `first_plane`, made of codes of this quantizer: the highest plane and factors for it.

        Scanning them takes 1 / bits of the look-ups; what their error bounds leave in doubt is then scored by
        the whole codes.

        Raises
        ------
        TypeError, ValueError
            As `decode`.
        """
        native = self._check_codes(codes)
        if self.bits == 1:
            return native.copy()
        v, terms = self._direction(native), self._terms(native)
        # <sign / 2, r> by the direction that all the bits give
        half = np.abs(v).sum(1) / 2
        lengths = np.sqrt(np.einsum("ij,ij->i", v, v))
        terms[:, 0] = np.sqrt(np.maximum(terms[:, 1], 0)) * lengths / half
        return np.concatenate([native[:, : self._plane], terms.astype("<f4").view(np.uint8)], axis=1)

    # ---- files
    def _config(self) -> dict[str, Any]:
        return {"d": self.d, "bits": self.bits, "center": self.center, "seed": self.seed}

    def _layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"rotation": ("F32", (self.d, self.d)), "mean": ("F32", (self.d,))}

    def _tensors(self) -> dict[str, np.ndarray]:
        return dict(self._state)

    def _assign(self, tensors: dict[str, np.ndarray]) -> None:
        check_rotation(tensors["rotation"], "rotation")
        self._state = tensors
