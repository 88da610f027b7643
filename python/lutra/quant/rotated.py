"""RotatedSQ: a random rotation, then scalar codes with one codebook for all dimensions."""

from __future__ import annotations

from math import erf, sqrt
from typing import Any

import numpy as np

from .. import _checks
from . import _bits
from ._kernels import multiply
from ._rotation import check_rotation, random_rotation
from .base import Quantizer, RowTerms, Tables, training_matrix

_POINTS = 1 << 15  # vectors that the levels are learnt from
_ROUNDS = 60


class RotatedSQ(Quantizer):
    """Scalar codes of randomly rotated vectors, with one codebook that all dimensions share.

    A vector less the mean is rotated and divided by its norm, after which every dimension has nearly the same
    distribution, whatever the data: one list of 2**bits levels, the best for that distribution, serves all.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    bits : int, default 4
        Bits of a dimension, 1 to 8; d * bits / 8 bytes a vector and 4 for its scale.
    seed : int, default 0
        Of the rotation and the training sample.

    Notes
    -----
    The levels are those of Lloyd and Max for the sample's rotated values. A vector's scale is such that what
    its code stands for is as long as the vector is. There is little to learn: a few thousand vectors do.

    Up to 4 bits a row is scanned in registers with d look-ups (``scan`` is 'lut4'), beyond by tables in
    the cache ('lut8'). A query costs 2 d**2 flops for its rotation.

    References
    ----------
    Zandieh, Daliri, Hadian, Mirrokni, TurboQuant: online vector quantization with near-optimal distortion
    rate, arXiv 2504.19874. Max, Quantizing for minimum distortion, 1960.
    """

    def __init__(self, d: int, bits: int = 4, *, seed: int = 0) -> None:
        super().__init__(d)
        self.bits = _checks.integer("bits", bits, 1, 8)
        self.seed = _checks.integer("seed", seed, 0)
        self.m = self.d
        self.scan = "lut4" if self.bits <= 4 else "lut8"
        self._packed = _bits.packed_size(self.d, self.bits)
        self.code_size = self._packed + 4
        self._state: dict[str, np.ndarray] = {}

    @property
    def is_trained(self) -> bool:
        return bool(self._state)

    @property
    def levels(self) -> np.ndarray | None:
        """The shared codebook, shape (2**bits,), float32, ascending; None before training."""
        return self._state.get("levels")

    def train(self, x: Any, *, progress: bool | None = None) -> RotatedSQ:
        """Draw the rotation, take the mean and learn the levels from a sample of vectors.

        Parameters
        ----------
        x : array, shape (n, d)
            One vector at least, a few thousand are enough; at most 32768, drawn by the seed, are used.

        Returns
        -------
        RotatedSQ
            Itself.

        Raises
        ------
        TypeError, ValueError
            ``x`` is no matrix of d columns, has no rows, or holds NaN or infinities.
        """
        points = training_matrix(x, self.d, 1, _POINTS, self.seed)
        rotation = random_rotation(self.d, self.seed)
        mean = points.mean(0, dtype=np.float64).astype(np.float32)
        values, norms = self._normal(points, mean, rotation.T)
        levels = lloyd_max(values[norms > 0].ravel(), 1 << self.bits)
        self._state = {"rotation": rotation, "mean": mean, "levels": levels}
        return self

    def _normal(self, x: np.ndarray, mean: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rotated vectors with a mean square of 1 a dimension, and their norms; zeros stay zeros."""
        rotated = multiply(x - mean, turn)
        norms = np.sqrt(np.einsum("ij,ij->i", rotated, rotated))
        factor = np.divide(np.sqrt(np.float32(self.d)), norms, out=np.zeros_like(norms), where=norms > 0)
        return rotated * factor[:, None], norms

    # ---- codes
    def _encode(self, x: np.ndarray) -> np.ndarray:
        state, levels = self._state, self._state["levels"]
        values, norms = self._normal(x, state["mean"], state["rotation"].T)
        entries = np.searchsorted((levels[1:] + levels[:-1]) / 2, values.ravel()).reshape(values.shape)
        chosen = levels[entries]
        lengths = np.sqrt(np.einsum("ij,ij->i", chosen, chosen))
        scale = np.divide(norms, lengths, out=np.zeros_like(norms), where=lengths > 0).astype("<f4")
        packed = _bits.pack(entries.astype(np.uint8), self.bits)
        return np.concatenate([packed, scale[:, None].view(np.uint8)], axis=1)

    def _scale(self, codes: np.ndarray) -> np.ndarray:
        return floats(codes[:, self._packed :])[:, 0]

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        values = self._state["levels"][self._entries(codes)] * self._scale(codes)[:, None]
        return multiply(values, self._state["rotation"]) + self._state["mean"]

    def _entries(self, codes: np.ndarray) -> np.ndarray:
        return _bits.unpack(codes[:, : self._packed], self.m, self.bits)

    # ---- scanning
    def _tables(self, q: np.ndarray, metric: str) -> Tables | None:
        if metric == "l2":
            return None
        levels = self._state["levels"]
        rotated = multiply(q, self._state["rotation"].T)
        lut = np.zeros((len(q), self.m, max(16, len(levels))), np.float32)
        np.multiply(rotated[:, :, None], levels, out=lut[:, :, : len(levels)])
        return Tables(lut, np.einsum("ij,j->i", q, self._state["mean"]))

    def _row_terms(self, codes: np.ndarray) -> RowTerms:
        return RowTerms(None, self._scale(codes))

    def _screen(self) -> tuple[np.ndarray, float] | None:
        levels = self._state["levels"]
        half = len(levels) // 2
        # Few dimensions have too few signs. The highest bit must be the sign.
        if self.d < 64 or not 2 <= self.bits <= 4 or not levels[half - 1] < 0 < levels[half]:
            return None
        return levels, best_sign_value(levels, (levels[1:] + levels[:-1]) / 2)

    # ---- files
    def _config(self) -> dict[str, Any]:
        return {"d": self.d, "bits": self.bits, "seed": self.seed}

    def _layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "rotation": ("F32", (self.d, self.d)), "mean": ("F32", (self.d,)),
            "levels": ("F32", (1 << self.bits,)),
        }  # fmt: skip

    def _tensors(self) -> dict[str, np.ndarray]:
        return dict(self._state)

    def _assign(self, tensors: dict[str, np.ndarray]) -> None:
        check_rotation(tensors["rotation"], "rotation")
        if (np.diff(tensors["levels"]) < 0).any():
            raise ValueError("'levels' do not ascend")
        self._state = tensors


def floats(data: np.ndarray) -> np.ndarray:
    """The float32 values in columns of bytes; what is not finite, as only a damaged code has it, as 0."""
    values = np.ascontiguousarray(data).view("<f4").astype(np.float32, copy=False)
    return np.where(np.isfinite(values), values, np.float32(0))


def best_sign_value(values: np.ndarray, edges: np.ndarray) -> float:
    """E v^2 / E |v| for the values (ascending) of a normal variable cut at edges.

    With +-this for v, by its sign, the inner product with a vector of the same direction is right on average.
    """
    below = np.array([0.0, *(0.5 * (1 + erf(e / sqrt(2))) for e in edges), 1.0])
    share = np.diff(below)
    return float((share * np.square(values)).sum() / max((share * np.abs(values)).sum(), 1e-30))


def lloyd_max(values: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` levels that represent values (1-d) with the least mean square error, ascending."""
    if values.size == 0:
        return np.linspace(-1, 1, count, dtype=np.float32)
    values = np.sort(values).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    levels = np.interp((np.arange(count) + 0.5) / count * (values.size - 1), np.arange(values.size), values)
    for _ in range(_ROUNDS):
        edges = np.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], edges, [values.size]])
        counts = np.diff(edges)
        new = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), levels)
        if np.array_equal(new, levels):
            break
        levels = new
    return np.sort(levels).astype(np.float32)
