"""Where an index keeps its arrays, and how the arrays of its callers get there and back.

Arrays in the memory of the host are kept as NumPy arrays, whatever library they come from (torch's CPU
tensors are viewed, not copied, on the way in and out). Arrays on a GPU stay in the library and on the device
that the first of them came with.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import isfinite
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import (
    BF16,
    F16,
    F32,
    F64,
    I8,
    NUMPY,
    U8,
    Kind,
    _adopt,
    _hand_back,
    is_native,
    kind_of,
    to_cupy,
    type_name,
)
from .._ranges import ranges

VECTOR_CODES = (F32, F16, BF16, F64, U8, I8)  # 8-bit integers are exact in float32


class Home:
    """An array library on one device.

    Attributes
    ----------
    kind : Kind
    anchor : array
        An empty array that carries the device.
    xp : module
        numpy, torch or cupy.
    """

    def __init__(self, kind: Kind, anchor: Any) -> None:
        self.kind = kind
        self.anchor = anchor
        self.xp: Any = sys.modules[kind.name]

    def __reduce__(self):
        return _home_of_device, (self.device, self.kind.name)

    def __deepcopy__(self, memo):
        return self

    @property
    def device(self) -> str:
        """'cpu', 'cuda:0', ..."""
        if not self.kind.cuda:
            return "cpu"
        return str(self.anchor.device) if self.kind.name == "torch" else f"cuda:{self.anchor.device.id}"

    def empty(self, shape: tuple[int, ...], code: int) -> Any:
        if code == BF16 and self.kind.name == "cupy":
            raise TypeError(
                "CuPy has no bfloat16: import torch before the index moves to the GPU, or take float16"
            )
        return self.kind.empty(shape, code, self.anchor)

    def full(self, shape: tuple[int, ...], value: int, code: int) -> Any:
        a = self.empty(shape, code)
        a[...] = value
        return a

    def bring(self, a: Any) -> Any:
        """A native array of any library and device as an array of this home, with its own dtype.

        bfloat16 becomes float32 on the way from one library to another, where that is exact.
        """
        kind = kind_of(a, "array")
        if self.kind is NUMPY:
            return a if kind is NUMPY else kind.to_numpy(a)
        if self.kind.name == "torch":
            if kind.name == "torch":
                return a.detach().to(self.anchor.device)
            if kind is NUMPY:
                dense = np.require(NUMPY.to_numpy(a), requirements=["C", "W"])
                return self.xp.from_numpy(dense).to(self.anchor.device)
            return self.xp.from_dlpack(a).to(self.anchor.device)
        if kind.cuda:
            return to_cupy(a, self.anchor.device)
        with self.anchor.device:
            return self.xp.asarray(kind.to_numpy(a))

    def positions(self, a: np.ndarray) -> Any:
        """int64 positions, made on the host, for indexing arrays of this home."""
        return a if self.kind is NUMPY else self.bring(a)

    def all_finite(self, a: Any) -> bool:
        if self.kind is not NUMPY:
            return bool(self.xp.isfinite(a).all())
        # A sum is NaN or infinite where a value is; it may also overflow, so it can only acquit.
        if a.size <= 8192 and a.dtype == np.float32:
            return isfinite(np.vdot(a, a)) or bool(np.isfinite(a).all())
        with np.errstate(over="ignore", invalid="ignore"):
            return isfinite(a.sum(dtype=np.float32)) or bool(np.isfinite(a).all())

    # ---- streams
    def wait(self) -> None:
        """Wait for all work on the device, of any stream."""
        if self.kind.cuda and self.kind.name == "torch":
            self.xp.cuda.synchronize(self.anchor.device)
        elif self.kind.cuda:
            self.anchor.device.synchronize()

    def here(self) -> Any:
        """A context for work on the home's device: CuPy works on the current one, wherever its arrays lie."""
        return self.anchor.device if self.kind.name == "cupy" else nullcontext()

    def following(self, like: Any) -> Any:
        """A context, `here`, in which work goes to the stream that is current for the library of ``like``.

        There is something to do where the libraries differ: with a caller's CuPy arrays and an index of torch
        tensors on one device, torch works on CuPy's stream.
        """
        kind = kind_of(like, "q") if is_native(like) else None
        if kind is None or not self.kind.cuda or not kind.cuda or kind.name == self.kind.name:
            return self.here()
        number = self.anchor.device.index if self.kind.name == "torch" else self.anchor.device.id
        if kind.name == "cupy":
            if like.device.id != number:
                return nullcontext()
            stream = sys.modules["cupy"].cuda.get_current_stream(number).ptr
            torch = self.xp
            return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self.anchor.device))
        if like.device.index != number:
            return self.here()
        stream = sys.modules["torch"].cuda.current_stream(number).cuda_stream
        return self._on_stream(self.xp.cuda.ExternalStream(stream, number))

    @contextmanager
    def _on_stream(self, stream: Any) -> Iterator[None]:
        with self.here(), stream:  # a stream of CuPy is current on its own device only
            yield

    # ---- integers whose counts the host knows
    def ranges(self, begins: Any, lengths: np.ndarray) -> Any:
        """`lutra._ranges.ranges` of NumPy arrays, as an array of this home."""
        if self.kind is NUMPY:
            return ranges(begins, lengths)
        stops = np.cumsum(lengths)
        total = int(stops[-1]) if len(stops) else 0
        numbers = self.arange(total)
        if total == 0:
            return numbers
        return numbers + self.bring(begins - (stops - lengths))[self.after(self.bring(stops), numbers)]

    def repeat(self, values: np.ndarray, lengths: np.ndarray) -> Any:
        """Each of the values (NumPy, int64) so many times, as an array of this home."""
        if self.kind is NUMPY:
            return np.repeat(values, lengths)
        stops = np.cumsum(lengths)
        numbers = self.arange(int(stops[-1]) if len(stops) else 0)
        return self.bring(values)[self.after(self.bring(stops), numbers)] if len(numbers) else numbers

    def after(self, increasing: Any, values: Any) -> Any:
        """How many of ``increasing`` are <= each value."""
        if self.kind.name == "torch":
            return self.xp.searchsorted(increasing, values, right=True)
        return self.xp.searchsorted(increasing, values, side="right")

    def bincount(self, a: Any, length: int) -> np.ndarray:
        """How often 0, 1, ..., length - 1 occur; on the host."""
        if not len(a):  # in which CuPy 13 counts nothing, but raises
            return np.zeros(length, np.int64)
        return HOST.bring(self.xp.bincount(a, minlength=length))

    def nonzero(self, a: Any) -> Any:
        """Where a 1-d array is true."""
        return self.xp.nonzero(a, as_tuple=True)[0] if self.kind.name == "torch" else self.xp.nonzero(a)[0]

    # ---- what the three libraries call by different names
    def arange(self, n: int) -> Any:
        if self.kind.name == "torch":  # made where it is needed: a copy from the host would wait for the GPU
            return self.xp.arange(n, device=self.anchor.device)
        if self.kind is NUMPY:
            return np.arange(n)
        with self.anchor.device:
            return self.xp.arange(n)

    def sort(self, a: Any) -> Any:
        """The last axis in increasing order."""
        return self.xp.sort(a).values if self.kind.name == "torch" else self.xp.sort(a)

    def argsort(self, a: Any, bound: int) -> Any:
        """The stable order of integers in [0, bound)."""
        if self.kind is NUMPY:  # which sorts narrow integers by radix: 20 times as fast
            return a.astype(np.min_scalar_type(bound - 1), copy=False).argsort(kind="stable")
        return self.xp.argsort(a, stable=True) if self.kind.name == "torch" else self.xp.argsort(a)

    def normalise(self, x: Any) -> Any:
        """Rows (float32) with unit norm; zero rows stay zero."""
        xp = self.xp
        # Scaled first: squares of very large or small values leave float32's range.
        largest = xp.amax(abs(x), axis=1, keepdims=True)
        x = x / xp.where(largest > 0, largest, 1)
        norms = xp.sqrt((x * x).sum(1)[:, None])
        return self.kind.cast(x / xp.where(norms > 0, norms, 1), F32)


HOST = Home(NUMPY, np.empty(0, np.float32))


def home_of(a: Any, name: str = "x") -> Home:
    """The home that array ``a`` would found."""
    kind = kind_of(a, name)
    return Home(kind, kind.empty((0,), F32, a)) if kind.cuda else HOST


def home_on(device: Any) -> Home:
    """The home on a device: 'cpu', 'cuda', 'cuda:1' or a torch.device."""
    text = str(device)
    kind, _, number = text.partition(":")
    if text == "cpu":
        return HOST
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:<number>', got {device!r}")
    for library in ("torch", "cupy"):
        if library in sys.modules:
            return _home_of_device(text, library)
    try:
        import torch  # noqa: F401
    except ImportError:
        return _home_of_device(text, "cupy")
    return _home_of_device(text, "torch")


def _home_of_device(device: str, library: str) -> Home:
    if device == "cpu":
        return HOST
    if library == "torch":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, and torch finds no CUDA device here")
        return home_of(torch.empty(0, device=device), "device")
    try:
        import cupy
    except ImportError:
        raise ValueError(f"device is {device!r}, which needs torch or CuPy; neither is installed") from None
    with cupy.cuda.Device(int(device.partition(":")[2] or 0)):
        return home_of(cupy.empty(0, np.float32), "device")


def adopt(a: Any, name: str) -> Any:
    """``a`` as a NumPy, torch or CuPy array; a TypeError that names the argument where it is none."""
    a = a if is_native(a) else _adopt(a)
    kind_of(a, name)
    return a


def deliver(home: Home, results: tuple[Any, ...], like: Any) -> tuple[Any, ...]:
    """Results of ``home`` in the library and on the device of ``like``, the caller's own array."""
    if type(like) is np.ndarray and home is HOST:
        return results
    native = adopt(like, "like")
    kind = kind_of(native, "like")
    if kind.name == "torch" and not kind.cuda:
        if home.kind.name == "torch":
            results = tuple(r.cpu() for r in results)
        else:
            torch = sys.modules["torch"]
            results = tuple(torch.from_numpy(HOST.bring(r)) for r in results)
    else:
        target = home_of(native, "like")
        results = tuple(target.bring(r) for r in results)
    return results if is_native(like) else tuple(_hand_back(r, like) for r in results)


def check_matrix(a: Any, name: str, d: int | None = None) -> Any:
    """A caller's matrix of vectors as a native array, with the right shape and an acceptable dtype."""
    native = adopt(a, name)
    if len(native.shape) != 2:
        hint = f"; {name}[None] makes one vector a matrix" if len(native.shape) == 1 else ""
        raise ValueError(f"{name} must be 2-d (vectors, dimensions), got shape {tuple(native.shape)}{hint}")
    if d is not None and native.shape[1] != d:
        raise ValueError(f"{name} has {native.shape[1]} columns; the index has d = {d}")
    _checks.dtype(kind_of(native, name), native, name, VECTOR_CODES)
    return native


def to_float32(home: Home, part: Any, name: str, rows: Any = 0, *, finite: bool = True) -> Any:
    """Some rows of a checked matrix as float32 rows in ``home``, NaN and infinities refused.

    ``rows`` gives the number of the first of them, or the number of each, for the message.
    """
    part = home.bring(part)
    if home.kind.code(part) == F32:
        result = part
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # reported below
            result = home.kind.cast(part, F32)
    if finite and not home.all_finite(result):
        values, before = home.kind.to_numpy(result), home.kind.to_numpy(part)
        bad = ~np.isfinite(values)
        row = int(np.flatnonzero(bad.any(1))[0])
        column = int(np.flatnonzero(bad[row])[0])
        value, number = before[row, column], row + rows if isinstance(rows, int) else int(rows[row])
        why = "too large for float32" if np.isfinite(value) else "not finite"
        raise ValueError(f"{name}[{number}, {column}] is {value}, which is {why}; vectors must be finite")
    return result


def check_ids(ids: Any, name: str = "ids") -> np.ndarray:
    """User ids as a 1-d (or 0-d) int64 NumPy array, which may be the caller's own memory."""
    if type(ids) is np.ndarray and ids.dtype == np.int64 and ids.ndim <= 1:
        return ids
    if is_native(ids) or hasattr(ids, "__dlpack__"):
        native = adopt(ids, name)
        a = kind_of(native, name).to_numpy(native)
    else:
        try:
            a = np.asarray(ids)
        except (ValueError, OverflowError) as error:
            raise TypeError(f"{name} must be integers: {error}") from None
        a = a.astype(np.int64) if a.size == 0 and a.dtype == np.float64 else a  # an empty list
    if a.dtype.kind not in "iu":
        what = type_name(ids) if a.dtype == object else f"dtype {a.dtype}"
        raise TypeError(f"{name} must be integers (an array, a list or an int), got {what}")
    if a.ndim > 1:
        raise ValueError(f"{name} must be 1-d, got shape {a.shape}")
    if a.dtype == np.uint64 and a.size and int(a.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {int(a.max())}; ids must be less than 2**63")
    return a.astype(np.int64, copy=False)
