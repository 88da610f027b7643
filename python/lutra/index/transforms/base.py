"""Transform: what maps vectors before they reach an index; its files."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ... import _checks
from ..._arrays import F32
from .. import _files
from .._home import HOST, Home, check_matrix, deliver, home_of, to_float32

PART = 1 << 14  # rows that are transformed at a time

#: The classes that `load` knows, by their names.
KINDS: dict[str, type[Transform]] = {}


class Transform:
    """Base class: maps vectors of ``d_in`` values to vectors of ``d_out``.

    Arrays of any library are taken and given back in it. The work is done in float64 and rounded once to
    float32, so that a vector's result does not depend on those beside it: on the CPU, or by the array's own
    library where it lies on a GPU.

    Attributes
    ----------
    d_in, d_out : int
    """

    d_in: int
    d_out: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not cls.__name__.startswith("_"):
            KINDS[cls.__name__] = cls

    def __init__(self, d_in: int, d_out: int | None = None) -> None:
        self.d_in = _checks.integer("d_in", d_in, 1)
        self.d_out = self.d_in if d_out is None else _checks.integer("d_out", d_out, 1)

    # ---- what a kind of transform defines
    @property
    def is_trained(self) -> bool:
        """Whether it can be applied."""
        return True

    def _learn(self, x: Any) -> None:
        """Learn from a checked native matrix."""

    def _map(self, x: np.ndarray) -> np.ndarray:
        """float32 rows to float32 (or float64) rows."""
        raise NotImplementedError

    def _map_on_gpu(self, home: Home, x: Any) -> Any:
        """`_map` of rows of a home on a GPU; here on the CPU, which means to wait."""
        return home.bring(np.ascontiguousarray(self._map(HOST.bring(x)), np.float32))

    def _back(self, y: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON values."""
        return {"d_in": self.d_in, "d_out": self.d_out}

    @classmethod
    def _of_config(cls, config: dict[str, Any]) -> Transform:
        """A transform as `_config` described it, its trained state still to come."""
        return cls(**config)

    def _tensors(self) -> dict[str, np.ndarray]:
        """The trained state: float64 arrays; empty where there is none."""
        return {}

    def _layout(self) -> dict[str, tuple[int, ...]]:
        """The shapes that `_tensors` has once trained."""
        return {}

    def _assign(self, tensors: dict[str, np.ndarray]) -> None:
        """Take over what `_tensors` gave, shapes checked and values finite."""

    # ---- the interface
    def train(self, x: Any, *, progress: bool | None = None) -> Transform:
        """Learn from a sample of vectors, shape (n, d_in); the transform itself is returned."""
        self._learn(self._matrix(x, "x", self.d_in))
        return self

    def apply(self, x: Any) -> Any:
        """Transform vectors: (n, d_in) to (n, d_out) float32, of the kind of ``x``.

        Raises
        ------
        TypeError, ValueError
            No array, a wrong dtype or shape, NaN or infinities (the row is named), no training yet.
        """
        return self._apply(x, True)

    def _apply(self, x: Any, finite: bool) -> Any:
        """`apply`; with ``finite`` False nothing waits for a GPU to look for NaN, where x is there."""
        native = self._matrix(x, "x", self.d_in)
        home = home_of(native)
        if home is HOST or not self.is_trained:
            return self._run(x, "x", self.d_in, self.d_out, self._map)
        rows = to_float32(home, native, "x", finite=finite)
        return deliver(home, (home.kind.cast(self._map_on_gpu(home, rows), F32),), x)[0]

    def inverse(self, y: Any) -> Any:
        """Back to the original space: (n, d_out) to (n, d_in) float32, of the kind of ``y``.

        Exact where nothing is lost; else the vector that `apply` would have left nearest to it (projections),
        or ``y`` itself (`Normalize`, whose norms are gone).
        """
        return self._run(y, "y", self.d_out, self.d_in, self._back)

    def __call__(self, x: Any) -> Any:
        """The same as `apply`."""
        return self.apply(x)

    def _matrix(self, x: Any, name: str, d: int) -> Any:
        native = check_matrix(x, name)
        if native.shape[1] != d:
            raise ValueError(f"{name} has {native.shape[1]} columns; {type(self).__name__} needs {d}")
        return native

    def _run(self, x: Any, name: str, d: int, width: int, function: Any) -> Any:
        native = self._matrix(x, name, d)
        if not self.is_trained:
            raise ValueError(f"this {type(self).__name__} is not trained: call train(x) with a sample first")
        out = np.empty((native.shape[0], width), np.float32)
        for i in range(0, native.shape[0], PART):
            out[i : i + PART] = function(to_float32(HOST, native[i : i + PART], name, i))
        return deliver(HOST, (out,), x)[0]

    @property
    def nbytes(self) -> int:
        """Bytes of what was learnt."""
        return sum(a.nbytes for a in self._tensors().values())

    def __repr__(self) -> str:
        config = ", ".join(f"{name}={value!r}" for name, value in self._config().items())
        return f"{type(self).__name__}({config}{'' if self.is_trained else ', not trained'})"

    # ---- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a safetensors file, as indexes are; `load` opens it."""
        tensors, config = to_file(self)
        _files.write(path, tensors, _files.describe("Transform", {"transform": config}))


def to_file(transform: Transform, prefix: str = "transform") -> tuple[list[_files.Tensor], dict[str, Any]]:
    """Tensors and description of a transform, for a file."""
    tensors = [_files.Tensor.of_array(f"{prefix}.{name}", a) for name, a in transform._tensors().items()]
    return tensors, {
        "kind": type(transform).__name__,
        "config": transform._config(),
        "trained": transform.is_trained,
    }


def of_file(file: _files.File, described: Any, prefix: str = "transform") -> Any:
    """A transform as `to_file` described it; a ValueError that names the file where that is not sound."""
    if not isinstance(described, dict) or not isinstance(described.get("config"), dict):
        file.fail("the metadata do not describe a transform")
    kind = KINDS.get(str(described.get("kind")))
    if kind is None:
        file.fail(f"a transform of kind {described.get('kind')!r}; this lutra knows {', '.join(KINDS)}")
    assert kind is not None
    try:
        transform = kind._of_config(described["config"])
        if described.get("trained") is True or kind.__name__ == "Chain":  # whose parts may be, each by itself
            tensors = {}
            for name, shape in transform._layout().items():
                tensors[name], _ = file.tensor(f"{prefix}.{name}", "F64", shape, mmap=False)
                if not np.isfinite(tensors[name]).all():
                    raise ValueError(f"the tensor {prefix}.{name} holds NaN or infinities")
            transform._assign(tensors)
        return transform
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        file.fail(f"the metadata do not describe a transform: {error}", error)


def load(path: str | os.PathLike[str]) -> Any:
    """Load a transform that was saved with ``transform.save(path)``.

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It is damaged, or holds something else; the message names the path.
    """
    path = os.fsdecode(path)
    with open(path, "rb") as opened:
        file = _files.File(path, opened)
        if file.kind != "Transform":
            file.fail(f"this file holds {file.kind!r}, not a transform: lutra.index.load opens indexes")
        transform = of_file(file, file.config.get("transform"))
        file.finish()
    return transform
