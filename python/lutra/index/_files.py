"""Index files: safetensors, written so that the file under a name is always whole, checked when read.

A file is what the safetensors format says: the length of a header, the header (JSON), the data of the
tensors. The metadata of the header hold ``format`` ('lutra.index'), ``version``, ``kind`` (the class) and
``config`` (JSON). It is written here rather than by the safetensors package for three reasons: rows go to
the file in parts, from a GPU too, without a second copy of the collection; the data begin at a multiple of
64 bytes, so that they can be mapped; and the file is synced before it gets its name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .._arrays import BF16, F16, F32, I8, I32, NUMPY, U8
from ._rows import Rows

FORMAT = "lutra.index"
VERSION = 1
_ALIGN = 64
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors package

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # as NumPy can read them; `_typed` gives them their type
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
#: The format's name of each dtype code of `_arrays`.
NAMES = {F32: "F32", I32: "I32", F16: "F16", BF16: "BF16", I8: "I8", U8: "U8"}


def name_of(dtype: np.dtype[Any]) -> str:
    """The format's name of a NumPy dtype."""
    if dtype.name == "bfloat16":
        return "BF16"
    return next(name for name, known in _DTYPES.items() if known == dtype)


def _typed(a: np.ndarray, name: str) -> np.ndarray:
    return a.view(NUMPY.dtype(BF16)) if name == "BF16" else a


class Tensor(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def of_rows(cls, name: str, rows: Rows) -> Tensor:
        return cls(name, NAMES[rows.code], (rows.n, rows.width), rows.parts)

    @classmethod
    def of_array(cls, name: str, array: np.ndarray) -> Tensor:
        return cls(name, name_of(array.dtype), array.shape, lambda: (array,))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


def describe(kind: str, config: dict[str, Any]) -> dict[str, str]:
    """The metadata of a file."""
    return {"format": FORMAT, "version": str(VERSION), "kind": kind, "config": json.dumps(config)}


# ---- writing
def write(path: str | os.PathLike[str], tensors: Iterable[Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    write_bytes(path, _serialize(tensors, metadata))


def write_bytes(path: str | os.PathLike[str], parts: Iterable[Any]) -> None:
    """Write a file under a temporary name beside ``path``, sync it and rename it."""
    path = os.fsdecode(path)
    target = os.path.realpath(path)  # through a link: the file behind it is replaced, not the link
    directory = os.path.dirname(target)
    temporary = os.path.join(directory, f".lutra-{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(temporary, flags, _mode_of(target))
    except OSError as error:
        error.filename = path  # the name that the caller knows
        raise
    try:
        with open(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one that matters
            os.unlink(temporary)
        raise
    _sync_directory(directory)


def _mode_of(target: str) -> int:
    """Permissions for the new file: those of the one it replaces."""
    try:
        return os.stat(target).st_mode & 0o777
    except OSError:
        return 0o666


def _sync_directory(directory: str) -> None:
    """Make the new name durable; file systems without such a sync are passed over."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _serialize(tensors: Iterable[Tensor], metadata: dict[str, str]) -> Iterator[Any]:
    # Wide values first, so that each tensor is aligned to its own values.
    order = sorted(tensors, key=lambda t: (-_DTYPES[t.dtype].itemsize, t.name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for t in order:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    yield len(text).to_bytes(8, "little")
    yield text
    for t in order:
        dtype = _DTYPES[t.dtype]
        for part in t.parts():
            if t.dtype == "BF16":  # a buffer of it can be made of no other library's arrays
                part = part.astype(NUMPY.dtype(BF16), copy=False).view(dtype)
            yield np.ascontiguousarray(part, dtype).data.cast("B") if part.size else b""


# ---- reading
class File:
    """An open index file: its kind and configuration, and its tensors on demand.

    Every problem is a ValueError that names the path.
    """

    def __init__(self, path: str | os.PathLike[str], file: Any) -> None:
        self.path = os.fsdecode(path)
        self._file = file
        self._header, self._start = self._read_header()
        self._validate()
        metadata = self._header.pop("__metadata__", None) or {}  # a null passes for a missing one
        if metadata.get("format") != FORMAT:
            self.fail(
                "this is a safetensors file, but not one of lutra.index (metadata 'format' says otherwise)"
            )
        version = metadata.get("version", "")
        if not (version.isascii() and version.isdigit() and 0 < len(version) < 10):
            self.fail(f"the version of the format is {version!r}, not a number")
        if int(version) != VERSION:
            newer = "written by a newer lutra: update it" if int(version) > VERSION else "not supported"
            self.fail(f"the version of the format is {version}, this lutra reads version {VERSION} ({newer})")
        self.kind = str(metadata.get("kind"))
        try:
            self.config = json.loads(metadata.get("config", ""))
        except (ValueError, RecursionError):
            self.config = None
        if not isinstance(self.config, dict):
            self.fail("the metadata 'config' is no JSON object")
        self._unread = set(self._header)

    def expect(self, kind: str, what: str) -> None:
        """Refuse a file of another kind; ``what`` is the one wanted, in words."""
        if self.kind != kind:
            self.fail(f"it holds {self.kind!r}, not {what}")

    def fail(self, problem: str, cause: BaseException | None = None) -> NoReturn:
        raise ValueError(f"{self.path}: {problem}") from cause

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            self.fail(f"not an index file: it holds {size} bytes, less than the shortest header")
        if length > _HEADER_LIMIT:
            self.fail("not a safetensors file (its first 8 bytes are no header length)")
        if length > size - 8:
            text = self._file.read(1)
            what = "truncated" if text == b"{" else "not a safetensors file, or truncated"
            self.fail(f"{what}: the header should end at byte {8 + length}, the file has {size}")
        try:
            header = json.loads(self._file.read(length))
            end = max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
            missing = 8 + length + end - size
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            self.fail("not a safetensors file (its header is not what the format prescribes)", error)
        if missing > 0:
            self.fail(f"truncated: the tensors should end at byte {8 + length + end}, the file has {size}")
        return header, 8 + length

    def _validate(self) -> None:
        """The checks of the safetensors package: known dtypes, no overlaps, no gaps, shapes that fit."""
        import safetensors

        try:
            with safetensors.safe_open(self.path, framework="numpy"):
                pass
        except safetensors.SafetensorError as error:
            self.fail(f"not a valid safetensors file: {error}", error)

    def integer(self, name: str, low: int = 0) -> int:
        """An integer of the configuration."""
        value = self.config.get(name)
        if type(value) is not int or not low <= value < 2**63:
            self.fail(f"{name!r} in the metadata must be an integer >= {low}, it is {value!r}")
        return value

    def has(self, name: str) -> bool:
        return name in self._header

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...], *, mmap: bool) -> tuple[np.ndarray, bool]:
        """A tensor, and whether it is a view of the file; its dtype and shape must be as given."""
        self._unread.discard(name)
        entry = self._header.get(name)
        if entry is None:
            self.fail(f"the tensor {name!r} is missing")
        if entry["dtype"] != dtype or tuple(entry["shape"]) != shape:
            self.fail(
                f"the tensor {name!r} is {entry['dtype']} {tuple(entry['shape'])}; "
                f"by the metadata it must be {dtype} {shape}"
            )
        offset = self._start + entry["data_offsets"][0]
        numpy_dtype = _DTYPES[dtype]
        if prod(shape) == 0:
            return _typed(np.empty(shape, numpy_dtype), dtype), False
        if mmap and offset % numpy_dtype.itemsize == 0:
            view = np.memmap(self._file, numpy_dtype, "r", offset, shape)
            return _typed(view.view(np.ndarray), dtype), True
        self._file.seek(offset)
        values = np.fromfile(self._file, numpy_dtype, prod(shape))
        if values.size != prod(shape):
            self.fail(f"truncated while it was read (tensor {name!r})")
        return _typed(values.reshape(shape), dtype), False

    def finish(self) -> None:
        """Refuse tensors that nobody has asked for."""
        if self._unread:
            self.fail(f"unexpected tensors: {', '.join(sorted(map(repr, self._unread)))}")
