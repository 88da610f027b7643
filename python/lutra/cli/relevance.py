"""Files that say what is relevant to each query."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from . import vectors

HELP = (
    "an .npy file with ids, (queries,) or (queries, r) padded with -1; an .npz file with 'ids' and 'ptr' "
    "(and 'grades'); a .json file with a list of an id, of ids or of {id: grade} for each query; or lines "
    "'query 0 id grade' as trec_eval has them, queries counted from 0"
)


def read_relevance(path: Path, nq: int) -> Any:
    """What `lutra.metrics` takes as ``relevant`` for ``nq`` queries; a ValueError that names the file."""
    if path.suffix == ".json":
        return _json(path)
    with open(path, "rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return np.asarray(vectors.load_arrays(path))
    if start[:4] == b"PK\x03\x04":
        return _npz(path)
    return _trec(path, nq)


def _npz(path: Path) -> Any:
    with vectors.load_arrays(path) as file:
        names = file.files
        if "ids" in names and "ptr" in names:
            return tuple(file[name] for name in ("ids", "ptr", "grades") if name in names)
        if len(names) == 1 or "ids" in names:  # what lutra search --output wrote, too
            return file["ids" if "ids" in names else names[0]]
        raise ValueError(f"{path} holds {', '.join(names)}; needed is {HELP}")


def _json(path: Path) -> Any:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(loaded, list):
        raise ValueError(f"{path} must hold a list with an entry for each query; needed is {HELP}")
    try:
        return [
            {int(name): grade for name, grade in entry.items()} if isinstance(entry, dict) else entry
            for entry in loaded
        ]
    except ValueError as error:
        raise ValueError(f"{path}: ids must be integers ({error})") from None


def _trec(path: Path, nq: int) -> list[dict[int, float]]:
    """Lines of query, anything, id and grade."""
    found: list[dict[int, float]] = [{} for _ in range(nq)]
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                words = line.split()
                if not words:
                    continue
                try:
                    if len(words) != 4:
                        raise ValueError(f"{len(words)} words, not 4")
                    query, name, grade = int(words[0]), int(words[2]), float(words[3])
                    if not 0 <= query < nq:
                        raise ValueError(f"query {query}, of {nq} that are searched (from 0 on)")
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}; needed is {HELP}") from None
                found[query][name] = grade
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not understood; needed is {HELP}") from None
    return found
