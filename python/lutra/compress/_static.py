"""What lutra knows of sentence-transformers without importing it: see `static_embedding`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Beside the weights: how large the table is.
CONFIG = "lutra_table.json"
VERSION = 1
#: What modules.json names, theirs (of any version) and ours.
OURS = "lutra.compress.static_embedding.StaticEmbedding"
_THEIRS = "sentence_transformers.", ".StaticEmbedding"
#: The table's name in a StaticEmbedding's file.
TABLE = "embedding.weight"


def is_theirs(name: str) -> bool:
    """Whether a class of this name is their StaticEmbedding."""
    return name.startswith(_THEIRS[0]) and name.endswith(_THEIRS[1])


def modules(folder: Path) -> list[dict[str, Any]] | None:
    """modules.json of a saved SentenceTransformer; None where there is none."""
    file = folder / "modules.json"
    if not file.is_file():
        return None
    try:
        entries = json.loads(file.read_text())
        if all(isinstance(e["type"], str) and isinstance(e["path"], str) for e in entries):
            return entries
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the modules of a SentenceTransformer ({error!r})") from None
    raise ValueError(f"{file}: not the modules of a SentenceTransformer")


def rename(folder: Path, table: dict[str, Any] | None) -> dict[str, str]:
    """The files of a saved SentenceTransformer whose root is a StaticEmbedding, as they must be with a
    compressed ``table`` (its shape and dtype), or (None) with a dense one: text by name, where that differs.
    """
    entries = modules(folder)
    first = next((e for e in entries or [] if e["path"] in ("", ".")), None)
    if first is None or not (is_theirs(first["type"]) or first["type"] == OURS):
        return {}
    if table is None:
        config = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
        first["type"] = config.get("replaces", "sentence_transformers.models.StaticEmbedding")
        return {"modules.json": json.dumps(entries, indent=2)}
    config = {"version": VERSION, **table, "replaces": first["type"]}
    first["type"] = OURS
    return {"modules.json": json.dumps(entries, indent=2), CONFIG: json.dumps(config, indent=2) + "\n"}
