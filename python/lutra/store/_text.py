"""Reading word vectors as text: fastText's .vec, word2vec's text, GloVe's."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..index._progress import Progress


def read(
    path: str | os.PathLike[str], limit: int | None = None, progress: bool | None = None
) -> tuple[list[str], np.ndarray]:
    """Keys and vectors, (n, dim) float32, of lines ``key number ... number``.

    The first line may say how many lines and numbers there are (word2vec, fastText) or be the first vector
    (GloVe). A key may hold spaces: the numbers are the last ones of a line. A key that was there before is
    left out, as fastText and gensim do.

    Raises
    ------
    ValueError
        A line that is not as the first; its number is named.
    """
    where = os.fsdecode(path)
    keys: dict[str, None] = {}
    rows: list[np.ndarray] = []
    expected, dim = None, None
    with open(where, "rb") as file, Progress(os.path.getsize(where), "vectors", progress) as bar:
        for number, line in enumerate(file, 1):
            bar.tick(len(line))
            parts = line.rstrip(b"\r\n").rstrip(b" ").split(b" ")
            if number == 1 and len(parts) == 2 and all(p.isdigit() for p in parts):
                expected, dim = int(parts[0]), int(parts[1])
                continue
            if parts == [b""]:
                continue
            dim = len(parts) - 1 if dim is None else dim
            try:
                if len(parts) <= dim or dim < 1:
                    raise ValueError(f"it has {len(parts)} parts, a key and {dim} numbers are needed")
                row = np.array(parts[len(parts) - dim :], dtype="S").astype(np.float32)
                key = b" ".join(parts[: len(parts) - dim]).decode()
            except ValueError as error:
                raise ValueError(f"{where}, line {number}: {error}") from None
            if key not in keys:
                keys[key] = None
                rows.append(row)
            if limit is not None and len(rows) >= limit:
                break
        else:
            if expected is not None and number - 1 < expected:
                raise ValueError(f"{where}: it ends after {number - 1} of {expected} lines")
    return list(keys), np.array(rows, np.float32).reshape(len(rows), dim or 0)


def write(path: str | os.PathLike[str], keys: Any, rows: Any, dim: int) -> None:
    """The same form, with the first line; rows(begin, end) gives float32."""
    from ..index import _files

    def parts():
        yield f"{len(keys)} {dim}\n".encode()
        for begin in range(0, len(keys), 4096):
            block = rows(begin, begin + 4096)
            names = keys[begin : begin + 4096]
            yield "".join(f"{k} {' '.join(map(repr, r))}\n" for k, r in zip(names, block.tolist())).encode()

    for key in keys:
        if "\n" in key or "\r" in key:
            raise ValueError(f"the key {key!r} holds a line break, which this form cannot")
    _files.write_bytes(path, parts())
