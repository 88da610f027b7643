"""The folder of a `Store`: its manifest, the names of its files, its lock."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np

from . import _files

NAME = "manifest.json"
FORMAT = "lutra.index.store"
VERSION = 1
_OURS = re.compile(r"\d{6,18}-(?:base|segment|vectors|removed-\d{1,9})\.safetensors")
_LIMIT = 1 << 26  # bytes of a manifest


@dataclass
class Entry:
    """A part of the store: its index file, how many vectors it holds, and its companions."""

    file: str
    n: int
    removed: str | None = None  # bits of the positions that have been removed since
    vectors: str | None = None  # the vectors as they were added, for compaction


@dataclass
class Manifest:
    generation: int
    next_id: int
    parts: list[Entry]

    def files(self) -> set[str]:
        names = {name for part in self.parts for name in (part.file, part.removed, part.vectors)}
        return {name for name in names if name}


def fail(path: str, problem: str) -> NoReturn:
    raise ValueError(f"{path}: {problem}")


def read(folder: str) -> Manifest:
    """The manifest of a folder; ValueError where it is none, or not sound."""
    path = os.path.join(folder, NAME)
    try:
        with open(path, "rb") as file:
            raw = file.read(_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.exists(folder):
            raise
        fail(folder, f"no store of lutra.index: it has no {NAME}")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        fail(path, "no manifest of lutra.index, or damaged")
    if value.get("version") != VERSION:
        fail(path, f"the version is {value.get('version')!r}, this lutra reads {VERSION}")
    for name in ("generation", "next_id"):
        _number(path, name, value.get(name))
    parts = value.get("parts")
    if not isinstance(parts, list) or not parts:
        fail(path, "'parts' must be a list that is not empty")
    return Manifest(value["generation"], value["next_id"], [_entry(path, part) for part in parts])


def _number(path: str, name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        fail(path, f"{name!r} must be an integer >= 0, it is {value!r}")
    return value


def _entry(path: str, part: Any) -> Entry:
    if not isinstance(part, dict) or part.keys() != {"file", "n", "removed", "vectors"}:
        fail(path, "a part must have file, n, removed and vectors")
    for name in ("file", "removed", "vectors"):
        value = part[name]
        missing = value is None and name != "file"
        if not missing and not (isinstance(value, str) and _OURS.fullmatch(value)):
            fail(path, f"{value!r} is not the name of a file of a store")
    _number(path, "n", part["n"])
    return Entry(**part)


def write(folder: str, manifest: Manifest) -> None:
    """Replace the manifest: from here on the new state is the state."""
    value = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    temporary = os.path.join(folder, f".lutra-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(folder, NAME))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _files._sync_directory(folder)


def sweep(folder: str, keep: set[str]) -> None:
    """Delete what an interrupted writer, or an earlier state, has left."""
    for name in os.listdir(folder):
        if name not in keep and (_OURS.fullmatch(name) or re.fullmatch(r"\.lutra-[0-9a-f]{16}\.tmp", name)):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))


def lock(folder: str) -> int:
    """The writer's lock, which the system takes back when the process ends; BlockingIOError."""
    import fcntl

    descriptor = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise BlockingIOError(error.errno, "another writer has the store open", folder) from None
    return descriptor


# ---- arrays beside the indexes
def save_array(path: str, kind: str, array: np.ndarray) -> None:
    tensor = _files.Tensor.of_array(kind, array)
    _files.write(path, [tensor], _files.describe(f"store {kind}", {}))


def load_array(path: str, kind: str, dtypes: tuple[str, ...], rows: int, columns: int | None) -> np.ndarray:
    """An array of so many rows (and columns), mapped."""
    with open(path, "rb") as opened:
        file = _files.File(path, opened)
        if file.kind != f"store {kind}" or not file.has(kind):
            file.fail(f"this file should hold the {kind} of a store, it says {file.kind!r}")
        entry = file._header[kind]
        if entry["dtype"] not in dtypes:
            file.fail(f"the tensor {kind!r} is {entry['dtype']}, not {' or '.join(dtypes)}")
        shape = (rows,) if columns is None else (rows, columns)
        array, _ = file.tensor(kind, entry["dtype"], shape, mmap=True)
        file.finish()
    return array
