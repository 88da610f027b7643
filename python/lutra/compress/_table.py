"""Table: the rows of a table in some format."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import F64, FLOATS, _is_cupy, is_torch, kind_of
from ..index import _files
from .formats import Format, make
from .formats.base import Data, Shape

KIND = "Table"


class Table:
    """A compressed table: a format, a shape and the arrays.

    `lutra.gather.bag` takes it in the place of a dense table. Made by `encode` or `Table.load`; arrays are
    NumPy or torch.

    Parameters
    ----------
    format : Format
    shape : (int, int)
        Rows and dimension of the dense table.
    data : dict of arrays
        As ``format.arrays(shape)`` says.
    """

    def __init__(self, format: Format, shape: Shape, data: Data) -> None:
        self.format, self.shape, self.data = format, (int(shape[0]), int(shape[1])), dict(data)
        wanted = format.arrays(self.shape)
        if set(wanted) != set(data):
            raise ValueError(f"data has arrays {sorted(data)}; format {format.name!r} needs {sorted(wanted)}")
        for name, array in wanted.items():
            if tuple(data[name].shape) != array.shape:
                raise ValueError(f"{name} has shape {tuple(data[name].shape)}; it must be {array.shape}")

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.data.values())

    @property
    def ndim(self) -> int:
        return 2

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        dense = self.shape[0] * self.shape[1] * 4
        return (
            f"Table({self.format.describe()}, {self.shape[0]} x {self.shape[1]}, "
            f"{self.nbytes / 1e6:.3g} MB, {self.nbytes / dense:.2%} of float32)"
        )

    def __getitem__(self, ids: Any) -> Any:
        """Rows by an integer or an array of integers, decoded."""
        if isinstance(ids, (int, np.integer)):
            return self[np.array([ids])][0]
        out = self.format.gather(self.data, self.shape, ids.reshape(-1))
        return out.reshape((*ids.shape, self.shape[1]))

    def decode(self) -> Any:
        """The whole table, (rows, dim)."""
        blocks = list(self.format.decode(self.data, self.shape))
        if not blocks:
            return self[np.zeros(0, np.int64)]
        if is_torch(blocks[0]):
            import torch

            return torch.cat(blocks)
        return np.concatenate(blocks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file (whole or not at all)."""
        arrays = {k: to_numpy(v) for k, v in self.data.items()}
        config = {"shape": self.shape, **self.format.config()}
        metadata = {"format": "lutra.compress", "version": "1", "kind": KIND, "config": json.dumps(config)}
        _files.write(
            path, [_files.Tensor.of_array(k, np.ascontiguousarray(v)) for k, v in arrays.items()], metadata
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Table:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            A truncated or foreign file, or arrays that do not fit its format.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "lutra.compress" or metadata.get("kind") != KIND:
                    raise ValueError(f"{os.fsdecode(path)!r} is no table of lutra.compress")
                if metadata.get("version") != "1":
                    raise ValueError(
                        f"{os.fsdecode(path)!r} has version {metadata.get('version')!r}; "
                        "this lutra reads version '1'"
                    )
                config = json.loads(metadata["config"])
                rows, dim = (_checks.integer("shape", n, 0) for n in config.pop("shape"))
                data = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                return cls(make(config), (rows, dim), data)
        except (SafetensorError, KeyError, json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{os.fsdecode(path)!r} is damaged or no table: {error}") from None


def to_numpy(a: Any) -> np.ndarray:
    """An array as NumPy; bfloat16 stays bfloat16 (ml_dtypes)."""
    if is_torch(a):
        import torch

        a = a.detach().cpu()
        if a.dtype == torch.bfloat16:
            import ml_dtypes

            return a.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return a.numpy()
    return a.get() if _is_cupy(a) else np.asarray(a)


def encode(
    table: Any,
    format: str | Format = "int8",
    *,
    counts: Any = None,
    dtype: str = "float32",
    seed: int = 0,
    progress: bool | None = None,
    **parameters: Any,
) -> Table:
    """Compress a dense table.

    Parameters
    ----------
    table : array, shape (rows, dim), floating point
        Finite.
    format : str or Format, default 'int8'
        A name ('pq'), a name with parameters ('pq:m=96,bits=8'), or a format.
    counts : array, shape (rows,), optional
        How often each row is used; formats that can weigh rows by it do.
    dtype : {'float32', 'float16'}, default 'float32'
        What the floats of the format are stored as.
    seed : int, default 0
    progress : bool, optional
        Show a progress bar; default: on a terminal, where it takes long.
    **parameters
        Of the format.

    Returns
    -------
    Table
        Of NumPy arrays, or torch tensors (on the CPU) for a torch table.

    Raises
    ------
    TypeError, ValueError
        A wrong type, shape or parameter; NaN or infinity (the row is named).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.random.default_rng(0).standard_normal((100, 16), dtype=np.float32)
    >>> lutra.compress.encode(x, "low_rank", rank=4)
    Table(low_rank:rank=4, 100 x 16, 0.00186 MB, 29.00% of float32)
    """
    chosen = make(format, **parameters)
    kind = kind_of(table, "table")
    _checks.dtype(kind, table, "table", (*FLOATS, F64))
    _checks.ndim(table, "table", 2)
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be 'float32' or 'float16', got {dtype!r}")
    dense = dense_table(table)
    weights = None if counts is None else check_counts(counts, len(dense))
    data = chosen.encode(dense, weights, seed, progress)
    if dtype == "float16":
        data = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in data.items()}
    if kind.name == "torch":
        import torch

        data = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in data.items()}
    return Table(chosen, dense.shape, data)


def dense_table(table: Any) -> np.ndarray:
    """A dense table as contiguous float32, finite."""
    kind = kind_of(table, "table")
    dense = np.ascontiguousarray(kind.to_numpy(table).astype(np.float32, copy=False))
    bad = ~np.isfinite(dense).all(1)
    if bad.any():
        raise ValueError(f"table[{int(bad.argmax())}] holds NaN or infinity; a table must be finite")
    return dense


def check_counts(counts: Any, rows: int) -> np.ndarray:
    kind = kind_of(counts, "counts")
    counts = kind.to_numpy(counts).astype(np.float64)
    if counts.shape != (rows,):
        raise ValueError(f"counts has shape {counts.shape}; it must be ({rows},), one per row of the table")
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise ValueError("counts must be finite and not negative")
    return counts
