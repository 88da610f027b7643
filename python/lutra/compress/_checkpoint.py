"""Checkpoints as safetensors: read without copying, written whole or not at all. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..index import _files
from ._choose import bfloat16_bits

#: Floating types of safetensors that can be compressed, as `Format.nbytes` names them.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ORDER = (
    "C128",
    "C64",
    "F64",
    "I64",
    "U64",
    "F32",
    "I32",
    "U32",
    "F16",
    "BF16",
    "I16",
    "U16",
)  # wide ones first
_BLOCK = 1 << 24


class Stored(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int

    def raw(self) -> np.ndarray:
        """Its bytes, mapped."""
        if not self.nbytes:
            return np.zeros(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))

    def values(self) -> np.ndarray:
        """Its values as float32."""
        stored = np.frombuffer(self.raw(), _NUMPY[self.dtype]).reshape(self.shape)
        if self.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


class Out(NamedTuple):
    """A tensor to be written; ``parts`` gives its bytes in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    parts: Callable[[], Iterable[Any]]

    @classmethod
    def copy(cls, tensor: Stored) -> Out:
        def parts() -> Iterator[Any]:
            raw = tensor.raw()
            for begin in range(0, tensor.nbytes, _BLOCK):
                yield raw[begin : begin + _BLOCK].data

        return cls(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, parts)

    @classmethod
    def array(cls, name: str, values: np.ndarray, dtype: str | None = None) -> Out:
        """Of an array; floats are stored as ``dtype``."""
        if values.dtype.kind == "f" and dtype is not None:
            values, kind = narrowed(values, dtype), dtype
        else:
            kind = _files.name_of(values.dtype)
        values = np.ascontiguousarray(values)
        data = values.reshape(-1).view(np.uint8) if values.size else values.reshape(-1)
        return cls(name, kind, values.shape, values.nbytes, lambda: (data.data,) if values.size else ())


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """Floats as the array of a safetensors type (bfloat16 as its bits)."""
    if dtype == "BF16":
        return bfloat16_bits(values.astype(np.float32))
    return values.astype(_NUMPY[dtype])


class Checkpoint:
    """The tensors of a safetensors file, or of a folder as Hugging Face writes it.

    Attributes
    ----------
    tensors : dict of name to Stored
    metadata : dict of str to str
    folder : Path or None
    files : list of Path
        The files that hold weights.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        place = Path(path)
        self.folder = place if place.is_dir() else None
        self.files = _weight_files(place)
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        for file in self.files:
            tensors, metadata = _header(file)
            double = set(tensors) & set(self.tensors)
            if double:
                raise ValueError(f"{file}: the tensor {sorted(double)[0]!r} is in another file too")
            self.tensors.update(tensors)
            self.metadata.update(metadata)

    def config(self) -> dict[str, Any]:
        """config.json of a folder."""
        file = None if self.folder is None else self.folder / "config.json"
        if file is None or not file.is_file():
            return {}
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: no JSON ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{file}: no JSON object")
        return config


def _weight_files(place: Path) -> list[Path]:
    if not place.exists():
        raise FileNotFoundError(f"no file or folder {str(place)!r}")
    if not place.is_dir():
        return [place]
    index = place / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: no index of weight files ({error})") from None
        files = [place / Path(name).name for name in names]  # of this folder, whatever the index says
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise ValueError(f"{index} names {missing[0]}, which is not there")
        return files
    found = sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(
            f"{place} holds {len(found)} safetensors files and no model.safetensors.index.json: name a file"
        )
    return found


def _header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="numpy"):  # checks offsets, dtypes and shapes
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = Stored(name, entry["dtype"], shape, str(path), 8 + length + begin, end - begin)
    return tensors, metadata


def write(path: str | os.PathLike[str], tensors: Iterable[Out], metadata: dict[str, str]) -> int:
    """Write a safetensors file, whole or not at all; returns its size."""
    rank = {name: i for i, name in enumerate(_ORDER)}
    order = sorted(tensors, key=lambda t: (rank.get(t.dtype, len(_ORDER)), t.name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for t in order:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)

    def parts() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little")
        yield text
        for t in order:
            written = 0
            for part in t.parts():
                yield part
                written += len(part)
            if written != t.nbytes:
                raise RuntimeError(f"{t.name}: {written} bytes in the place of {t.nbytes}")

    _files.write_bytes(path, parts())
    return 8 + len(text) + end


def same_file(one: str | os.PathLike[str], two: str | os.PathLike[str]) -> bool:
    return os.path.realpath(one) == os.path.realpath(two) or (
        os.path.exists(one) and os.path.exists(two) and os.path.samefile(one, two)
    )


def expected_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return prod(shape) * np.dtype(_NUMPY[dtype]).itemsize
