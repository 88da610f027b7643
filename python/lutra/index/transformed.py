"""Transformed: an index of transformed vectors."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import numpy as np

from .._results import Neighbors
from . import _files
from .base import KINDS, Index, register
from .transforms.base import Transform, of_file, to_file

_OWN = ("transform", "index")


@register
class Transformed(Index):
    """A transform in front of an index: vectors and queries pass it, ids and scores do not.

    Parameters
    ----------
    transform : Transform
        See `lutra.index.transforms`.
    index : Index
        Of vectors of ``transform.d_out`` values. Its own metric ranks the transformed vectors: distances
        between whitened vectors are Mahalanobis distances, for example, and a PCA that subtracts the mean
        changes cosines.

    Attributes
    ----------
    transform, index
        As given. Parameters of the index (``refine_factor``, ``nprobe``, ...) can be read and set here too.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> from lutra.index import Flat, Transformed
    >>> from lutra.index.transforms import PCA
    >>> x = np.random.default_rng(0).standard_normal((1000, 64), dtype=np.float32)
    >>> index = Transformed(PCA(64, 16), Flat(16, "l2"))
    >>> index.train(x)
    >>> index.add(x)
    >>> index.search(x[:2], k=1).ids.ravel()
    array([0, 1])
    """

    transform: Transform
    index: Index

    def __init__(self, transform: Transform, index: Index) -> None:
        if not isinstance(transform, Transform):
            raise TypeError(f"transform must be one of lutra.index.transforms, got {transform!r}")
        if not isinstance(index, Index):
            raise TypeError(f"index must be a lutra index, got {index!r}")
        if isinstance(index, Transformed):
            raise TypeError("index is a Transformed already: make one transform of two with Chain")
        if index.d != transform.d_out:
            raise ValueError(f"the transform gives {transform.d_out} values, the index takes d = {index.d}")
        if index.ntotal:
            raise ValueError(f"the index holds {index.ntotal} vectors that did not pass the transform")
        object.__setattr__(self, "transform", transform)
        object.__setattr__(self, "index", index)

    # Whatever is not about the transform is about the index.
    def __getattr__(self, name: str) -> Any:
        if name in _OWN or name.startswith("__"):  # not there yet, while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.index, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            raise AttributeError(f"{name} cannot be replaced; make a new Transformed")
        setattr(self.index, name, value)

    def __getstate__(self):
        return {name: self.__dict__[name] for name in _OWN}

    def __setstate__(self, state):
        self.__dict__.update(state)

    @property
    def d(self) -> int:  # type: ignore[override]
        """Dimension of the vectors before the transform."""
        return self.transform.d_in

    @property
    def metric(self) -> str:  # type: ignore[override]
        """That of the index, between transformed vectors."""
        return self.index.metric

    @property
    def is_trained(self) -> bool:
        return self.transform.is_trained and self.index.is_trained

    @property
    def ntotal(self) -> int:
        return self.index.ntotal

    def __len__(self) -> int:
        return len(self.index)

    @property
    def ids(self) -> np.ndarray:
        return self.index.ids

    @property
    def device(self) -> str:
        return self.index.device

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.transform.nbytes

    def __repr__(self) -> str:
        return f"Transformed({self.transform!r}, {self.index!r})"

    def train(self, x: Any, **options: Any) -> None:
        """Train the transform, then the index on what it gives.

        Parameters
        ----------
        x : array, shape (n, d)
        **options
            For the index.
        """
        if self.ntotal:
            raise ValueError(f"the index holds {self.ntotal} transformed vectors; train a new one")
        self.transform.train(x)
        self.index.train(self.transform.apply(x), **options)  # type: ignore[attr-defined]

    def add(self, x: Any, ids: Any = None) -> None:
        self._need_training()
        self.index.add(self.transform.apply(x), ids)

    def search(self, q: Any, k: int = 10, *, filter: Any = None, **options: Any) -> Neighbors:
        """The k best vectors for each query; ``options`` are those of the index's own search."""
        self._need_training()
        return self.index.search(self.transform._apply(q, False), k, filter=filter, **options)

    def reconstruct(self, ids: Any) -> Any:
        """The stored vectors of some ids, taken back to the original space as far as that goes."""
        vectors = self.index.reconstruct(ids)
        one = len(vectors.shape) == 1
        back = self.transform.inverse(vectors[None] if one else vectors)
        return back[0] if one else back

    def remove_ids(self, ids: Any) -> int:
        return self.index.remove_ids(ids)

    def to(self, device: Any) -> Index:
        self.index.to(device)
        return self

    def _need_training(self) -> None:
        if not self.is_trained:
            raise ValueError("this Transformed is not trained: call train(x) with a sample first")

    # ---- files
    def save(self, path: str | os.PathLike[str]) -> None:
        with self.index._lock.reading():
            _files.write(path, *self._contents())

    def _config(self):
        inside = json.loads(self.index._contents()[1]["config"])
        kind = type(self.index).__name__
        return {"transform": to_file(self.transform)[1], "index": {"kind": kind, "config": inside}}

    def _contents(self):
        tensors = [*self.index._contents()[0], *to_file(self.transform)[0]]
        config = self._config()
        shared = {name: config["index"]["config"][name] for name in ("n", "next_id")}
        return tensors, _files.describe("Transformed", {**config, **shared, "trained": self.is_trained})

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> Index:
        inner = config["index"]
        if inner["kind"] == cls.__name__:
            raise ValueError("a Transformed in a Transformed")
        arguments = {
            name: value for name, value in inner["config"].items() if name not in ("n", "next_id", "trained")
        }
        blank = cls.__new__(cls)
        blank.__dict__["index"] = KINDS[inner["kind"]]._from_config(arguments)
        return blank

    def _restore(self, file: _files.File, n: int, mmap: bool) -> None:
        self.__dict__["transform"] = of_file(file, file.config.get("transform"))
        if self.transform.d_out != self.index.d:
            file.fail(f"the transform gives {self.transform.d_out} values, the index takes {self.index.d}")
        inside = copy.copy(file)  # the same file, read with the configuration of the index
        inside.config = file.config["index"]["config"]
        self.index._restore(inside, n, mmap)
