"""Normalisation, prefixes, and several transforms as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..._arrays import F32
from .._home import HOST
from .base import KINDS, Transform, to_file


class Normalize(Transform):
    """Vectors to unit norm; zero vectors stay zero. `inverse` gives what it gets: norms are lost."""

    def __init__(self, d_in: int) -> None:
        super().__init__(d_in)

    def _map(self, x):
        return HOST.normalise(x)

    def _map_on_gpu(self, home, x):
        return home.normalise(x)

    def _back(self, y):
        return y

    def _config(self):
        return {"d_in": self.d_in}


class Truncate(Transform):
    """The first d_out values, normalised or not: what Matryoshka embeddings are made for.

    `inverse` fills up with zeros.
    """

    def __init__(self, d_in: int, d_out: int, normalize: bool = True) -> None:
        super().__init__(d_in, d_out)
        if self.d_out > self.d_in:
            raise ValueError(f"d_out must be at most d_in = {self.d_in}, got {self.d_out}")
        self.normalize = bool(normalize)

    def _map(self, x):
        x = x[:, : self.d_out]
        return HOST.normalise(x) if self.normalize else x

    def _map_on_gpu(self, home, x):
        x = home.kind.dense(x[:, : self.d_out])
        return home.normalise(x) if self.normalize else x

    def _back(self, y):
        return np.pad(y, ((0, 0), (0, self.d_in - self.d_out)))

    def _config(self):
        return {"d_in": self.d_in, "d_out": self.d_out, "normalize": self.normalize}


class Chain(Transform):
    """Transforms one after another, each trained on what the one before it gives."""

    _coming: list[bool] | None = None  # which parts a file has the state of

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)
        if not self.transforms or not all(isinstance(t, Transform) for t in self.transforms):
            raise TypeError("transforms must be a list of transforms, one at least")
        for a, b in zip(self.transforms, self.transforms[1:]):
            if a.d_out != b.d_in:
                raise ValueError(f"{a!r} gives {a.d_out} values, {b!r} takes {b.d_in}")
        super().__init__(self.transforms[0].d_in, self.transforms[-1].d_out)

    @property
    def is_trained(self):
        return all(t.is_trained for t in self.transforms)

    def train(self, x: Any, *, progress: bool | None = None) -> Transform:
        x = self._matrix(x, "x", self.d_in)
        for i, t in enumerate(self.transforms):
            t.train(x, progress=progress)
            if i + 1 < len(self.transforms):
                x = t.apply(x)
        return self

    def _map(self, x):
        for t in self.transforms:
            x = t._map(x).astype(np.float32, copy=False)
        return x

    def _map_on_gpu(self, home, x):
        for t in self.transforms:
            x = home.kind.cast(t._map_on_gpu(home, x), F32)
        return x

    def _back(self, y):
        for t in reversed(self.transforms):
            y = t._back(y).astype(np.float32, copy=False)
        return y

    def _config(self):
        described = [to_file(t)[1] for t in self.transforms]
        return {"transforms": described}

    @classmethod
    def _of_config(cls, config):
        described = config["transforms"]
        chain = cls([KINDS[t["kind"]]._of_config(t["config"]) for t in described])
        chain._coming = [t["trained"] is True for t in described]
        return chain

    def _tensors(self):
        return {f"{i}.{name}": a for i, t in enumerate(self.transforms) for name, a in t._tensors().items()}

    def _layout(self):
        here = self._coming or [t.is_trained for t in self.transforms]
        return {
            f"{i}.{name}": shape
            for i, t in enumerate(self.transforms)
            if here[i]
            for name, shape in t._layout().items()
        }

    def _assign(self, tensors):
        for i, t in enumerate(self.transforms):
            start = f"{i}."
            own = {name[len(start) :]: a for name, a in tensors.items() if name.startswith(start)}
            if own:
                t._assign(own)
