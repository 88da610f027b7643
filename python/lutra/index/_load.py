"""load: an index from its file."""

from __future__ import annotations

import os
from typing import Any

from ._files import File
from ._home import HOST
from ._ids import Ids
from .base import KINDS, Index


def load(path: str | os.PathLike[str], device: Any = None, *, mmap: bool = True) -> Any:
    """Load an index that was saved with ``index.save(path)``.

    Parameters
    ----------
    path : str or path-like
    device : {'cpu', 'cuda', 'cuda:0', ...} or torch.device, optional
        Where the index shall live; default the CPU.
    mmap : bool, default True
        Map the vectors and codes from the file rather than read them: loading takes no time, and the system
        keeps in memory what searches use, once for all processes. The file must then not be changed in place
        (``save`` over it is safe: it puts a new file under the name). Adding to the index or removing from
        it copies them. False reads everything.

    Returns
    -------
    Index
        Of the kind that was saved.

    Raises
    ------
    FileNotFoundError, OSError
        The file cannot be opened.
    ValueError
        The file is truncated, is not of this format or of a newer version, or does not fit together; the
        message names the path and what is wrong.

    Notes
    -----
    The sizes, dtypes, ids, codebooks and codes are checked; the values of vectors are not read. Nothing in a
    file is ever executed.
    """
    path = os.fsdecode(path)  # a TypeError for what is no path, such as the number of an open file
    with open(path, "rb") as opened:
        file = File(path, opened)
        kind = KINDS.get(file.kind)
        if kind is None:
            file.fail(f"an index of kind {file.kind!r}; this lutra knows {', '.join(sorted(KINDS))}")
        n, following = file.integer("n"), file.integer("next_id")
        index = _construct(kind, file)
        index._restore(file, n, mmap)
        ids = file.tensor("ids", "I64", (n,), mmap=False)[0] if file.has("ids") else None
        try:
            index._ids = Ids.load(ids, n, following)
        except ValueError as error:
            file.fail(str(error), error)
        file.finish()
    index._home = HOST
    return index if device is None else index.to(device)


def _construct(kind: type[Index], file: File) -> Any:
    """An empty index of the configuration that the file has."""
    arguments = {
        name: value for name, value in file.config.items() if name not in ("n", "next_id", "trained")
    }
    try:
        return kind._from_config(arguments)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        file.fail(f"the metadata do not describe an index: {error}", error)
