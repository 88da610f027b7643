"""Format: one way to store a table of rows in fewer bytes.

A format is a frozen dataclass of its parameters and holds no data. The data of a table are a dict of named
arrays (NumPy, torch or CuPy), whose shapes `Format.arrays` gives. Everything else in the package goes through
this class: `lutra.gather.bag`, the layers of `lutra.nn`, tied heads, `lutra.compress.convert`, files and the
chooser. To add a format, write one file with a subclass in this folder and import it in ``__init__.py``; the
battery of tests and benchmarks takes it from the registry.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ... import _checks
from ..._arrays import is_torch

Shape = tuple[int, int]
Data = dict[str, Any]

#: Bytes of an element.
SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1,
}  # fmt: skip


class Array(NamedTuple):
    """One array of a format.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        'float32' stands for the floating point type of the table (a layer in bfloat16 holds bfloat16);
        integer types are what they say.
    trainable : bool
        Gradients flow to it: a Parameter in a layer. Integer arrays never are.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    trainable: bool = True

    def nbytes(self, dtype: str = "float32") -> int:
        return prod(self.shape) * SIZES[dtype if self.dtype == "float32" else self.dtype]


class Format(ABC):
    """A way to store a table (rows, dim).

    Subclasses are frozen dataclasses. They set ``name`` (the word users write: 'pq') and ``layer`` (the
    prefix of the layers' names: 'PQ' for `lutra.nn.PQEmbedding`), and implement `arrays`, `encode`, `rows`,
    `lookup` and `fit`; the others have defaults that are right but may be slow.
    """

    name: ClassVar[str]
    layer: ClassVar[str]
    #: Encoding trains a network, for minutes: a budget tries it only where it is named.
    slow: ClassVar[bool] = False

    # ---------------------------------------------------------------- size
    @abstractmethod
    def arrays(self, shape: Shape) -> dict[str, Array]:
        """The arrays of a table of that shape, all that is stored: codes, codebooks, remaps.

        Raises
        ------
        ValueError
            The format cannot store such a shape; the message names the parameter and what it needs.
        """

    def nbytes(self, shape: Shape, dtype: str = "float32") -> int:
        """Bytes of a table of that shape whose floats are stored as ``dtype``."""
        return sum(a.nbytes(dtype) for a in self.arrays(shape).values())

    @classmethod
    @abstractmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> Format | None:
        """The most exact parameters of this format within ``nbytes``; None where there are none.

        Must never give a format whose `nbytes` is above the limit.
        """

    # ---------------------------------------------------------------- data
    @abstractmethod
    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        """Compress a dense table.

        Parameters
        ----------
        table : ndarray, shape (rows, dim), float32, finite (callers have checked)
        counts : ndarray, shape (rows,), float64, optional
            How often each row is used; formats that can weigh rows by it do.
        seed : int
        progress : bool, optional
            As in `lutra.index`.

        Returns
        -------
        dict of NumPy arrays, exactly as `arrays` says
        """

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        """Arrays to train from: rows about N(0, 1), as torch.nn.Embedding begins.

        The default encodes such a table; formats whose encoding is costly override it.
        """
        rng = np.random.default_rng(seed)
        return self.encode(rng.standard_normal(shape, dtype=np.float32), seed=seed, progress=False)

    @abstractmethod
    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        """The reference, in NumPy: rows ``ids`` (n,) decoded to (n, dim) float32."""

    @abstractmethod
    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        """The same in torch's own ops: ids (n,) int64, valid, to (n, dim).

        Differentiable to the trainable arrays, on any device, in any floating type. It is what runs on
        devices without a kernel and in float64, and the peer that benchmarks compare with.
        """

    # ---------------------------------------------------------------- computing
    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        """Rows ``ids`` (n,) as (n, dim): by a kernel where the format has one.

        NumPy and torch; differentiable in torch. Raises IndexError for an id outside [0, rows). ``sparse``:
        gradients of arrays with a row per table row as sparse tensors, where the format can.
        """
        ids = check_ids(ids, shape[0])
        if is_torch(ids):
            return self.lookup(data, shape, ids)
        return self.rows(data, shape, ids)

    def between(
        self, data: Data, shape: Shape, begin: int, end: int, dtype: Any = None, out: Any = None
    ) -> Any:
        """Rows [begin, end) of a table of torch tensors, differentiable; of torch's ``dtype`` where the
        format gives that for less, else of its own. ``out``, a tensor of it, may be written to and returned.
        """
        import torch

        device = next(iter(data.values())).device
        return self.gather(data, shape, torch.arange(begin, end, device=device), True)

    def bag(
        self,
        data: Data,
        shape: Shape,
        ids: Any,
        offsets: Any = None,
        weights: Any = None,
        *,
        mode: str = "sum",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:
        """`lutra.gather.bag` of this table. The default decodes each entry and reduces."""
        from ... import gather
        from ...gather._plan import leave_out

        flat = ids.reshape(-1)
        rows = self.gather(data, shape, flat, sparse)
        pad = padding_idx
        if pad is not None:
            pad = _checks.integer("padding_idx", pad, -shape[0], shape[0] - 1) % shape[0]
        rows, entries, pad = leave_out(rows, flat, pad)
        return gather.bag(
            rows, entries.reshape(ids.shape), offsets, weights, mode=mode, padding_idx=pad,
            include_last_offset=include_last_offset,
        )  # fmt: skip

    def decode(self, data: Data, shape: Shape, block: int = 1 << 14) -> Iterator[Any]:
        """The whole table in blocks of rows (of the data's library)."""
        like = next(iter(data.values()))
        for begin in range(0, shape[0], block):
            yield self.gather(data, shape, _arange(min(block, shape[0] - begin), like) + begin)

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """The first ``rows`` of the old rows, then the rows of ``values`` (NumPy arrays all).

        Returns the format (its parameters may change) and the data. The default decodes and encodes again;
        formats that can keep the old rows as they are override it.
        """
        old = np.concatenate([np.asarray(b, np.float32) for b in self.decode(data, shape)])[:rows]
        return self, self.encode(np.concatenate([old, values.astype(np.float32)]), seed=seed, progress=False)

    # ---------------------------------------------------------------- heads
    # A format may define ``logits(data, shape, hidden)``: hidden (n, dim) to (n, rows), torch,
    # differentiable, without the dense table. lutra.nn.TiedHead uses it where it is there, else decodes
    # tiles.

    # Or ``lookups(data, shape, hidden)``, where logits are sums of look-ups (`lutra.scan.lookups`): the
    # tables, (m, n, 2**bits) in float32 or wider, differentiable; the packed codes; bits. None where they are
    # not.

    # ---------------------------------------------------------------- text
    def describe(self) -> str:
        """'pq:m=96,bits=8', what `lutra.compress.format` reads."""
        values = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        # None where it is the default is left out; a tuple reads 1/2/3, or 1/
        parts = ",".join(f"{f.name}={_text(v)}" for f, v in values if not (v is None and f.default is None))
        return f"{self.name}:{parts}" if parts else self.name

    def config(self) -> dict[str, Any]:
        """JSON: the name and the parameters."""
        return {"format": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value)) + "/" * (len(value) < 2)
    return str(value)


def check_ids(ids: Any, rows: int) -> Any:
    """``ids`` as int64, or an error: TypeError for other than integers, IndexError for those outside [0,
    rows).

    On CUDA, and where torch.compile traces, values are not looked at: nothing may wait for the device there.
    """
    if is_torch(ids):
        import torch

        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"ids has dtype {str(ids.dtype).removeprefix('torch.')}; it must be int64 or int32"
            )
        ids = ids.long()
        if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling() and not _traced(ids):
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < 0 or high >= rows:
                position = int(((ids < 0) | (ids >= rows)).reshape(-1).to(torch.uint8).argmax())
                raise IndexError(
                    f"ids[{position}] is {int(ids.reshape(-1)[position])}; it must be in [0, {rows})"
                )
        return ids
    if not isinstance(ids, np.ndarray):
        raise TypeError(f"ids must be a NumPy array or a torch tensor, got {type(ids).__qualname__}")
    if ids.dtype not in (np.int64, np.int32):
        raise TypeError(f"ids has dtype {ids.dtype}; it must be int64 or int32")
    ids = ids.astype(np.int64, copy=False)
    bad = (ids < 0) | (ids >= rows)
    if bad.any():
        position = int(bad.reshape(-1).argmax())
        raise IndexError(f"ids[{position}] is {ids.reshape(-1)[position]}; it must be in [0, {rows})")
    return ids


def _traced(ids: Any) -> bool:
    """Whether a tensor has no values to look at: a subclass (FakeTensor), a meta or a functorch tensor."""
    import torch

    return type(ids) not in (
        torch.Tensor,
        torch.nn.Parameter,
    ) or torch._C._functorch.is_functorch_wrapped_tensor(ids)


def _arange(n: int, like: Any) -> Any:
    if is_torch(like):
        import torch

        return torch.arange(n, device=like.device)
    return np.arange(n)


# ---------------------------------------------------------------- registry
FORMATS: dict[str, type[Format]] = {}


def register(cls: type[Format]) -> type[Format]:
    """Class decorator: makes a format known by its name."""
    if cls.name in FORMATS:
        raise ValueError(f"a format named {cls.name!r} is registered already")
    FORMATS[cls.name] = cls
    return cls


def make(spec: str | Format | dict[str, Any], **parameters: Any) -> Format:
    """A format from its name and parameters, from text or from `Format.config`.

    Parameters
    ----------
    spec : str, Format or dict
        'pq', 'pq:m=96,bits=8', a format (given back), or what `Format.config` gave.
    **parameters
        Parameters of the format, over those in ``spec``.

    Raises
    ------
    ValueError
        An unknown name or parameter (the message lists those there are).

    Examples
    --------
    >>> import lutra
    >>> lutra.compress.format("low_rank", rank=32).describe()
    'low_rank:rank=32'
    """
    if isinstance(spec, Format):
        return dataclasses.replace(spec, **parameters) if parameters else spec  # type: ignore[type-var]
    if isinstance(spec, dict):
        given = {k: v for k, v in spec.items() if k != "format"}
        name = spec.get("format")
    else:
        name, _, text = str(spec).partition(":")
        given = dict(_parse(item, spec) for item in text.split(",") if item)
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(sorted(FORMATS))}; got {name!r}")
    cls = FORMATS[name]
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    given.update(parameters)
    for key in given:
        if key not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"format {name!r} has no parameter {key!r}; its parameters: {has}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _parse(item: str, spec: Any) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"format {spec!r}: {item!r} must read parameter=value")
    if "/" in value:
        return key.strip(), tuple(_value(v) for v in value.split("/") if v.strip())
    return key.strip(), _value(value)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"None": None, "True": True, "False": False}.get(text.strip(), text.strip())
