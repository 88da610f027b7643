"""``lutra index``: an index file from a file of vectors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from .. import index as indexes
from . import output, vectors

_PART = 1 << 24  # bytes of vectors that are added at a time


def run(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Build and save; errors are one line and exit with 1."""
    try:
        facts = _run(source, target, as_json, **options)
    except output.ERRORS as error:
        output.fail(error)
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False)
    for name, value in (
        ("written", target),
        ("index", facts["index"]),
        ("holds", facts["holds"]),
        ("memory", output.size_text(facts["nbytes"])),
        ("its size", output.size_text(facts["file_bytes"])),
        ("built in", output.time_text(facts["seconds"])),
    ):
        table.add_row(name, escape(str(value)))
    output.console().print(table)


def _run(source: Path, target: Path, as_json: bool, ids: Path | None = None, array: str | None = None,
         **options: Any) -> dict[str, Any]:  # fmt: skip
    output.check_output(target, [source] if ids is None else [source, ids])
    data = vectors.read(source, "document", array)
    if not data.size:
        raise ValueError(
            f"{source} holds no documents" if data.ptr is not None else f"{source} holds no vectors"
        )
    names = data.ids if ids is None else _ids(ids, data)
    started = time.perf_counter()
    build = _single if data.ptr is None else _multi
    index = build(data, names, verbose=not as_json, **options)
    index.save(target)
    return {
        "output": str(target),
        "index": repr(index),
        "holds": data.describe(),
        "documents": data.size,
        "vectors": len(data.x),
        "d": int(data.x.shape[1]),
        "nbytes": int(index.nbytes),
        "file_bytes": target.stat().st_size,
        "seconds": time.perf_counter() - started,
    }


def _ids(path: Path, data: vectors.Vectors) -> np.ndarray:
    loaded = vectors.load_arrays(path)
    if not isinstance(loaded, np.ndarray):
        raise ValueError(f"{path}: ids are read from an .npy file with one array")
    if loaded.shape != (data.size,) or loaded.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold {data.size} integers, got {loaded.dtype} {loaded.shape}")
    return np.asarray(loaded).astype(np.int64)


def _only(options: dict[str, Any], names: tuple[str, ...], what: str) -> dict[str, Any]:
    """The options of one kind of input that were given; a ValueError for one of the other kind."""
    for name, value in options.items():
        if value is not None and name not in names:
            raise ValueError(f"--{name.replace('_', '-')} is for {what}")
    return {name: value for name, value in options.items() if value is not None}


# ---- single vectors
def _single(data: vectors.Vectors, names: Any, verbose: bool, **options: Any) -> Any:
    given = _only(options, ("factory", "metric", "recall", "memory"), "token vectors (tokens and ptr)")
    metric = given.pop("metric", "ip")
    factory = given.pop("factory", None)
    if factory is None:
        return indexes.auto(
            data.x, given.get("recall", 0.95), given.get("memory"), metric=metric, ids=names, verbose=verbose
        )
    if given:
        raise ValueError(f"--{next(iter(given))} is for an index that is chosen: leave --factory out")
    index = indexes.factory(factory, data.x.shape[1], metric)
    with output.progress() as bars:
        if not index.is_trained:
            task = bars.add_task("train", total=None)
            index.train(data.x)
            bars.remove_task(task)
        task = bars.add_task("add", total=data.size)
        step = max(1, _PART // max(1, data.x[:1].nbytes))
        for i in range(0, data.size, step):
            part = data.x[i : i + step]
            index.add(part, None if names is None else names[i : i + step])
            bars.advance(task, len(part))
    return index


# ---- many vectors a document
def _multi(data: vectors.Vectors, names: Any, verbose: bool, **options: Any) -> Any:
    known = ("factory", "tokens", "repetitions", "k_sim", "d_proj", "candidates", "pool")
    given = _only(options, known, "single vectors")
    x, ptr = data.x, data.ptr
    factor = given.pop("pool", None)
    if factor is not None:
        x, ptr = indexes.pool_tokens(x, ptr, factor)
    factory = given.pop("factory", None)
    if factory is not None:
        given["index"] = factory
    index = indexes.MultiVector(x.shape[1], **given)
    if not index.is_trained:
        index.train(x, ptr=ptr)
    index.add(x, names, ptr=ptr)
    return index
