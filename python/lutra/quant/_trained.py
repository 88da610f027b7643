"""Trained: what quantizers have in common whatever their codes are: parameters, a state, a file."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from ..index import _files


class Trained(ABC):
    """What has parameters, learns a state, and is saved with both."""

    @property
    @abstractmethod
    def is_trained(self) -> bool:
        """Whether ``encode`` and ``decode`` may be called."""

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""

    @abstractmethod
    def _layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type ('F32', 'U8', ...) and shape of each tensor of the trained state."""

    @abstractmethod
    def _tensors(self) -> dict[str, np.ndarray]:
        """The trained state; empty before training."""

    @abstractmethod
    def _assign(self, tensors: dict[str, np.ndarray]) -> None:
        """Take over a state whose types and shapes are right; a ValueError where its values cannot be."""

    # ---- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the quantizer to a file that `lutra.quant.load` reads, in one step: the old file or the new.

        Raises
        ------
        OSError
            The file cannot be written; what was there is as it was.
        """
        tensors = [_files.Tensor.of_array(name, a) for name, a in self._tensors().items()]
        config = {**self._config(), "trained": self.is_trained}
        _files.write(path, tensors, _files.describe(f"quantizer {type(self).__name__}", config))

    def _restore(self, tensors: dict[str, np.ndarray]) -> None:
        """Take over a trained state; a ValueError that says which tensor does not fit."""
        layout = self._layout()
        if tensors.keys() != layout.keys():
            raise ValueError(f"the state of {type(self).__name__} is {sorted(layout)}, got {sorted(tensors)}")
        for name, (dtype, shape) in layout.items():
            a = tensors[name]
            if a.shape != shape or a.dtype != _files._DTYPES[dtype]:
                raise ValueError(f"{name!r} must be {dtype} {shape}, got {a.dtype} {a.shape}")
            if a.dtype.kind == "f" and not np.isfinite(a).all():
                raise ValueError(f"{name!r} holds NaN or infinities")
        self._assign({name: np.ascontiguousarray(a) for name, a in tensors.items()})

    def _need_training(self) -> None:
        if not self.is_trained:
            raise ValueError(f"this {type(self).__name__} is not trained: call train(x) with a sample first")

    def __repr__(self) -> str:
        text = ", ".join(f"{name}={value!r}" for name, value in self._config().items())
        return f"{type(self).__name__}({text})"
