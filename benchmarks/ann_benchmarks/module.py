"""lutra for ann-benchmarks (github.com/erikbern/ann-benchmarks): copy this folder to algorithms/lutra."""

from __future__ import annotations

from typing import Any

import numpy as np

import lutra

try:
    from ..base.module import BaseANN
except ImportError:  # outside of ann-benchmarks, as in lutra's own tests

    class BaseANN:  # type: ignore[no-redef]
        """What ann-benchmarks expects of an algorithm, as far as it is used here."""

        def done(self) -> None:
            """Called when a run is over."""


_METRICS = {"angular": "cosine", "euclidean": "l2", "hamming": "hamming", "jaccard": "jaccard", "ip": "ip"}


class Lutra(BaseANN):
    """An index by its factory text; the query arguments are nprobe or ef_search, and a refine factor."""

    def __init__(self, metric: str, text: str) -> None:
        if metric not in _METRICS:
            raise ValueError(f"metric must be one of {', '.join(_METRICS)}; got {metric!r}")
        self._metric = _METRICS[metric]
        self._text = text
        self._index: Any = None
        self._arguments: dict[str, int] = {}
        self._found: np.ndarray | None = None

    def fit(self, X: np.ndarray) -> None:
        """Train and fill the index."""
        x = self._input(X)
        d = X.shape[1]
        self._index = lutra.index.factory(self._text, d, self._metric)
        self._index.train(np.asarray(X, np.float32))
        self._index.add(x)

    def _input(self, x: np.ndarray) -> np.ndarray:
        if self._metric in ("hamming", "jaccard"):
            return np.packbits(np.asarray(x, bool), axis=-1, bitorder="little")
        return np.ascontiguousarray(x, np.float32)

    def set_query_arguments(self, width: int, refine_factor: int | None = None) -> None:
        """``width`` is nprobe or ef_search, whichever the index has."""
        self._arguments = {}
        for name in ("nprobe", "ef_search"):
            if hasattr(self._index, name):
                setattr(self._index, name, int(width))
                self._arguments[name] = int(width)
        if refine_factor is not None:
            self._index.refine_factor = int(refine_factor)
            self._arguments["refine_factor"] = int(refine_factor)

    def query(self, v: np.ndarray, n: int) -> np.ndarray:
        """The ids of the n nearest to one vector."""
        return self._index.search(self._input(v)[None], n).ids[0]

    def batch_query(self, X: np.ndarray, n: int) -> None:
        """Search for many vectors at once; `get_batch_results` has the ids."""
        self._found = self._index.search(self._input(X), n).ids

    def get_batch_results(self) -> np.ndarray:
        """The ids that the last `batch_query` found, a row for each vector."""
        assert self._found is not None, "batch_query comes first"
        return self._found

    def get_memory_usage(self) -> float:
        """kB of the index."""
        return self._index.nbytes / 1024 if self._index is not None else 0.0

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self._arguments.items())
        return f"lutra({self._text}{', ' if arguments else ''}{arguments})"
