"""Files of vectors: .npy and .npz, single vectors or the token vectors of documents and queries."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..index._home import check_ids
from ..index._tokens import as_tokens

#: How the arrays of documents and of queries may begin, best first.
PREFIXES = {
    "document": ("doc_", "docs_", "document_", "documents_", "passage_", "passages_", ""),
    "query": ("query_", "queries_", "q_", ""),
}
_MASKS = ("mask", "attention_mask")
HELP = (
    "an .npy file with an array (n, d), or an .npz file with one (and 'ids', if wanted); for token vectors "
    "an .npz file with 'tokens' (n, d) and 'ptr' (documents + 1,), or an array (documents, length, d) and "
    "'mask'"
)


class Vectors(NamedTuple):
    """What a file holds.

    Attributes
    ----------
    x : numpy.ndarray, shape (n, d)
        Vectors, or the tokens of all documents.
    ptr : numpy.ndarray, shape (documents + 1,), int64, or None for single vectors
    ids : numpy.ndarray, shape (n,) or (documents,), int64, or None
    what : str
        The arrays' names, for messages.
    """

    x: np.ndarray
    ptr: np.ndarray | None
    ids: np.ndarray | None
    what: str

    @property
    def size(self) -> int:
        """Vectors, or documents."""
        return len(self.x) if self.ptr is None else len(self.ptr) - 1

    def describe(self) -> str:
        if self.ptr is None:
            return f"{self.size} vectors of {self.x.shape[1]} dimensions"
        return f"{self.size} documents with {len(self.x)} vectors of {self.x.shape[1]} dimensions"


def load_arrays(path: Path) -> Any:
    """An array, mapped, of an .npy file, or an open .npz; a ValueError that names the file otherwise."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if "pickle" in str(error).lower():  # what NumPy says of a file that is none of its own, too
            error = ValueError("no .npy or .npz file, or one of Python objects, which are not read")
        raise ValueError(f"{path}: {error}") from None


def read(path: Path, role: str, array: str | None = None) -> Vectors:
    """The vectors of a file.

    Parameters
    ----------
    path : Path
    role : {'document', 'query'}
        Which arrays are meant where a file holds both.
    array : str, optional
        The name of an array of an .npz file, or what comes before 'tokens' and 'ptr' in two of them.

    Raises
    ------
    OSError, ValueError, TypeError
        The file cannot be read, or does not hold what it should; the message says what it holds.
    """
    loaded = load_arrays(path)
    if isinstance(loaded, np.ndarray):
        if array is not None:
            raise ValueError(f"{path} is an .npy file, whose array has no name: leave --array out")
        return _checked(path, loaded, None, None, None, path.name)
    with loaded as file:
        try:
            return _read_npz(path, file, role, array)
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: truncated or damaged ({error})") from None


def _read_npz(path: Path, file: Any, role: str, array: str | None) -> Vectors:
    shapes = {name: _shape(path, file, name) for name in file.files}
    name, prefix = _choose(path, shapes, role, array)
    ids = next((file[n] for n in (f"{prefix}ids", "ids") if n in shapes), None)
    ptr = file[f"{prefix}ptr"] if name == f"{prefix}tokens" else None
    mask = None
    if len(shapes[name]) == 3:
        mask = next((file[n] for end in _MASKS for n in (f"{prefix}{end}", end) if n in shapes), None)
    return _checked(path, file[name], ptr, mask, ids, name)


def _choose(path: Path, shapes: dict[str, tuple[int, ...]], role: str, array: str | None) -> tuple[str, str]:
    """The name of the array of vectors, and what its companions' names begin with."""
    pairs = [n[:-6] for n in shapes if n.endswith("tokens") and f"{n[:-6]}ptr" in shapes]
    beside = [n for n in shapes if n.rpartition("_")[2] in ("ids", "ptr", "mask")]
    matrices = [n for n, shape in shapes.items() if len(shape) in (2, 3) and n not in beside]
    held = ", ".join(f"{n} {shape}" for n, shape in shapes.items()) or "no arrays"
    if array is not None:
        for prefix in (array, f"{array}_"):
            if prefix in pairs:
                return f"{prefix}tokens", prefix
        if array not in matrices:
            raise ValueError(f"{path} has no vectors under the name {array!r}; it holds {held}")
        return array, _prefix_of(array, role)
    for prefix in PREFIXES[role]:
        if prefix in pairs:
            return f"{prefix}tokens", prefix
    for prefix in PREFIXES[role]:
        fitting = [n for n in matrices if n.startswith(prefix) or n == prefix.rstrip("_")]
        if len(fitting) == 1:
            return fitting[0], _prefix_of(fitting[0], role)
    if len(pairs) == 1 and not matrices:
        return f"{pairs[0]}tokens", pairs[0]
    if matrices or pairs:
        raise ValueError(f"{path} holds several arrays of vectors; name one with --array. It holds {held}")
    raise ValueError(f"{path} holds no vectors. Needed: {HELP}. It holds {held}")


def _prefix_of(name: str, role: str) -> str:
    return next((p for p in PREFIXES[role] if p and name.startswith(p)), "")


def _shape(path: Path, file: Any, name: str) -> tuple[int, ...]:
    """The shape of an array of an .npz file, by its header alone."""
    with file.zip.open(f"{name}.npy") as entry:
        first = np.lib.format.read_magic(entry) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        return read(entry)[0]


def _checked(path: Path, x: np.ndarray, ptr: Any, mask: Any, ids: Any, what: str) -> Vectors:
    try:
        if ptr is not None:
            x, ptr = as_tokens((x, ptr))
        elif x.ndim == 3:
            x, ptr = as_tokens(x, mask=mask)
        elif x.ndim != 2:
            raise ValueError(f"an array of shape {x.shape}; needed is {HELP}")
        ids = None if ids is None else check_ids(ids)
        made = Vectors(x, ptr, ids, what)
        if ids is not None and ids.shape != (made.size,):
            raise ValueError(f"{made.describe()}, and ids of shape {ids.shape}")
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None
    return made
