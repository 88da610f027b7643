"""SQ: scalar quantization, each dimension by itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from . import _bits
from .base import Quantizer, Tables, training_matrix, vectors

_KINDS = {"8bit": 8, "6bit": 6, "4bit": 4, "fp16": 16, "bf16": 16}


class SQ(Quantizer):
    """Scalar quantization: a dimension's value as one of 2**bits equal steps, or as a short float.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    kind : {'8bit', '6bit', '4bit', 'fp16', 'bf16'}, default '8bit'
        Steps between the least and the largest value that each dimension had in training, or 16-bit floats,
        which need no training.

    Notes
    -----
    Value x of a dimension with training range [low, low + width] is coded as floor(x' (2**b - 1)), where
    x' = (x - low) / width is clipped to [0, 1], and decoded as the middle of its step: FAISS's
    QT_8bit, QT_6bit and QT_4bit with the same bytes. '4bit' is scanned in registers with d look-ups
    (``scan`` is 'lut4'), the others by decoding, in registers too.
    """

    def __init__(self, d: int, kind: str = "8bit") -> None:
        super().__init__(d)
        self.bits = _checks.choice("kind", kind, _KINDS)
        self.kind = kind
        self.code_size = _bits.packed_size(self.d, self.bits)
        self.scan, self.m = ("lut4", self.d) if kind == "4bit" else ("decode", 0)
        self._low: np.ndarray | None = None
        self._width: np.ndarray | None = None

    @property
    def _short(self) -> bool:
        return self.bits == 16

    @property
    def is_trained(self) -> bool:
        return self._short or self._low is not None

    def train(self, x: Any, *, progress: bool | None = None) -> SQ:
        """Take each dimension's range from a sample of vectors; 16-bit floats have nothing to learn.

        Parameters
        ----------
        x : array, shape (n, d)
            One vector at least.

        Returns
        -------
        SQ
            Itself.

        Raises
        ------
        TypeError, ValueError
            ``x`` is no matrix of d columns, has no rows, or holds NaN or infinities.
        """
        if self._short:
            vectors(x, "x", self.d)
            return self
        points = training_matrix(x, self.d, 1, None, 0)
        low = points.min(0)
        with np.errstate(over="ignore"):
            width = points.max(0) - low
        if not np.isfinite(width).all():
            column = int(np.flatnonzero(~np.isfinite(width))[0])
            raise ValueError(f"the range of column {column} of x is too large for float32")
        self._low, self._width = low, width
        return self

    # ---- codes
    def _encode(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "fp16":
            with np.errstate(over="ignore"):
                half = x.astype("<f2")
            if not np.isfinite(half).all():
                row, column = (int(v) for v in np.argwhere(~np.isfinite(half))[0])
                raise ValueError(
                    f"x holds {x[row, column]} in column {column}, which is beyond float16: take kind='bf16'"
                )
            return half.view(np.uint8)
        if self.kind == "bf16":
            bits = x.view(np.uint32)
            rounded = bits + (0x7FFF + ((bits >> 16) & 1))  # to the nearest, ties to even
            largest = np.uint32(0x7F7F)  # what would round up to infinity
            short = (rounded >> 16).astype("<u2")
            over = (short & 0x7FFF) > largest
            return np.where(over, (short & 0x8000) | largest, short).astype("<u2").view(np.uint8)
        assert self._low is not None and self._width is not None
        scaled = x - self._low
        with np.errstate(over="ignore"):
            scaled /= np.where(self._width > 0, self._width, np.float32(1))
        np.clip(scaled, 0, 1, out=scaled)
        scaled[:, self._width == 0] = 0
        scaled *= np.float32((1 << self.bits) - 1)
        return _bits.pack(scaled.astype(np.uint8), self.bits)

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        if self.kind == "fp16":
            return np.ascontiguousarray(codes).view("<f2").astype(np.float32)
        if self.kind == "bf16":
            return (np.ascontiguousarray(codes).view("<u2").astype(np.uint32) << 16).view(np.float32)
        assert self._low is not None and self._width is not None
        steps = self._entries(codes).astype(np.float32)
        steps += np.float32(0.5)
        steps /= np.float32((1 << self.bits) - 1)
        steps *= self._width
        steps += self._low
        return steps

    def _entries(self, codes: np.ndarray) -> np.ndarray:
        return _bits.unpack(codes, self.d, self.bits)

    # ---- scanning
    def _tables(self, q: np.ndarray, metric: str) -> Tables:
        assert self._low is not None and self._width is not None
        levels = self._decode(np.repeat(np.arange(16, dtype=np.uint8) * 17, self.code_size).reshape(16, -1))
        levels = np.ascontiguousarray(levels.T)  # whose order the tables take
        lut = np.square(q[:, :, None] - levels) if metric == "l2" else q[:, :, None] * levels
        return Tables(lut, None)

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """step and offset (d,): code c stands for c * step + offset, up to rounding."""
        assert self._low is not None and self._width is not None
        step = self._width.astype(np.float64) / ((1 << self.bits) - 1)
        return step.astype(np.float32), (self._low + step / 2).astype(np.float32)

    # ---- files
    def _config(self) -> dict[str, Any]:
        return {"d": self.d, "kind": self.kind}

    def _layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {} if self._short else {"low": ("F32", (self.d,)), "width": ("F32", (self.d,))}

    def _tensors(self) -> dict[str, np.ndarray]:
        if self._low is None or self._width is None:
            return {}
        return {"low": self._low, "width": self._width}

    def _assign(self, tensors: dict[str, np.ndarray]) -> None:
        if self._short:
            return
        if (tensors["width"] < 0).any():
            raise ValueError("'width' holds a negative value")
        self._low, self._width = tensors["low"], tensors["width"]
