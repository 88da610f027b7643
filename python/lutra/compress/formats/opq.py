"""Optimized product quantization: a rotation, then codes of parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..._arrays import is_torch
from ...quant import OPQ as Quantizer
from ...quant._kernels import multiply
from ...quant._rotation import random_rotation
from ._books import quiet_train
from .base import Array, Data, Shape, register
from .pq import PQ

ROTATIONS = 20


@register
@dataclass(frozen=True)
class OPQ(PQ):
    """`PQ` of rotated rows: ``row = coded @ rotation``, with a rotation that is learnt for the codes.

    Ge, He, Ke, Sun, Optimized Product Quantization, CVPR 2013. Since a sum of rotated rows is the rotated
    sum, a bag costs one product with the rotation, not one a row. The rotation takes dim**2 floats.

    Parameters
    ----------
    m, bits
        As `PQ`.
    """

    name: ClassVar[str] = "opq"
    layer: ClassVar[str] = "OPQ"

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return {**super().arrays(shape), "rotation": Array((shape[1], shape[1]))}

    def _train(
        self, x: np.ndarray, seed: int, progress: bool | None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        quantizer = Quantizer(x.shape[1], self.m, self.bits, seed=seed)
        trained = quiet_train(quantizer, x, progress, rotations=ROTATIONS)
        return trained.codebooks, {"rotation": trained.rotation}

    def _coded(self, x: np.ndarray, data: Data) -> np.ndarray:
        return multiply(x, np.asarray(data["rotation"], np.float32).T)

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        return {**super().initial(shape, seed), "rotation": random_rotation(shape[1], seed)}

    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        return super().rows(data, shape, ids) @ data["rotation"].astype(np.float32)

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        return super().lookup(data, shape, ids) @ data["rotation"]

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        out = super().bag(
            data, shape, ids, offsets, weights, mode=mode, padding_idx=padding_idx,
            include_last_offset=include_last_offset, sparse=sparse,
        )  # fmt: skip
        if mode not in ("sum", "mean"):
            return out  # of rows that are turned already
        rotation = data["rotation"]
        if is_torch(out):
            return out @ rotation
        return (out.astype(np.float32) @ rotation.astype(np.float32)).astype(out.dtype)
