"""compress_file and decompress_file: checkpoints with compressed tables, without the model or torch."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import _choose, _static
from ._checkpoint import FLOATS, Checkpoint, Out, Stored, expected_bytes, narrowed, same_file, write
from ._choose import Job, Option
from ._planning import encode_all, entry_of, kinds_of, not_tried, within
from ._report import Report
from .formats import Format, make
from .formats.base import Data

KEY = "lutra.compress"
VERSION = 1
_TABLE = re.compile(r"emb|(^|[._])(wte|shared|tokens?|vocab)($|[._])", re.IGNORECASE)
_NO_TABLE = re.compile(
    r"(^|[._])(w?pe|pos|position\w*|token_type\w*|segment\w*|relative\w*|lm_head|embed_out|\w*norm|\w*proj\w*|head"
    r"|\w*position_embedd?ings?)$",
    re.IGNORECASE,
)
#: Output layers, whose weight (vocabulary, dim) `lutra.nn.OutputHead` computes with.
_HEAD = re.compile(r"(^|[._])(lm_head|embed_out|output|output_projection|unembed\w*|decoder)$")


def find_head(tensors: dict[str, Stored], tables: list[str], min_rows: int) -> list[str]:
    """The untied output head: by name, a matrix of at least as many rows as a table has. What equals a table
    is tied to it, and follows it anyway.
    """
    sizes = [tensors[t].shape[0] for t in tables if t in tensors] or [min_rows]
    found = [
        name
        for name, tensor in tensors.items()
        if is_head(name) and len(tensor.shape) == 2 and tensor.dtype in FLOATS and name not in tables
        if min(sizes) <= tensor.shape[0] > tensor.shape[1] > 0
    ]
    untied = [n for n in found if not any(_equal(tensors[n], tensors[t]) for t in tables if t in tensors)]
    if not found:
        raise ValueError(
            "head='compressed': no tensor looks like an untied output head (lm_head.weight, "
            "embed_out.weight); a tied one follows its embedding; name another with tensors= (--tensor)"
        )
    return untied


def is_head(name: str) -> bool:
    """Whether a tensor is the weight of an output layer, by its name."""
    return name.endswith(".weight") and _HEAD.search(name.removesuffix(".weight")) is not None


def find_tables(tensors: dict[str, Stored], min_rows: int) -> list[str]:
    """Tensors that look like tables of embeddings: by name, two dimensions, many rows."""
    out = []
    for name, tensor in tensors.items():
        if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
            continue
        module = name.removesuffix(".weight")
        last = ".".join(module.split(".")[-2:])
        rows, dim = tensor.shape
        if rows >= max(min_rows, dim) and dim and _TABLE.search(last) and not _NO_TABLE.search(module):
            out.append(name)
    return out


def jobs_of(
    path: Any, tensors: list[str] | None, min_rows: int, head: str = "auto"
) -> tuple[Checkpoint, list[Job]]:
    """A checkpoint and its tables."""
    if head not in ("auto", "compressed"):
        raise ValueError(f"head must be 'auto' or 'compressed', got {head!r}")
    checkpoint = Checkpoint(path)
    if KEY in checkpoint.metadata:
        raise ValueError(f"{path} is compressed already; `lutra decompress` gives the dense tables back")
    names = find_tables(checkpoint.tensors, min_rows) if tensors is None else list(dict.fromkeys(tensors))
    if not names:
        large = [
            f"{n} {t.shape[0]} x {t.shape[1]}" for n, t in checkpoint.tensors.items() if len(t.shape) == 2
        ]
        raise ValueError(
            f"{path} has no tensor that looks like a table of embeddings of {min_rows} rows or more; "
            f"name one with tensors= (--tensor). Tensors of two dimensions: {', '.join(large[:8]) or 'none'}"
        )
    if head == "compressed":
        names += find_head(checkpoint.tensors, names, min_rows)
    jobs: list[Job] = []
    for name in names:
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            near = [n for n in checkpoint.tensors if name in n][:5]
            raise ValueError(
                f"{path} has no tensor {name!r}" + (f"; there is {', '.join(near)}" if near else "")
            )
        if len(tensor.shape) != 2 or tensor.dtype not in FLOATS or not min(tensor.shape):
            raise ValueError(
                f"{name} is {tensor.dtype} {tensor.shape}; a table has two dimensions and floats"
            )
        table = tensor.values()
        bad = ~np.isfinite(table).all(1)
        if bad.any():
            raise ValueError(f"{name}: row {int(bad.argmax())} holds NaN or infinity")
        jobs.append(Job(name, table, None, FLOATS[tensor.dtype]))
    return checkpoint, jobs


def compress_file(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str | Format | None = None,
    *,
    budget: float | int | str | None = None,
    tensors: Iterable[str] | None = None,
    head: str = "auto",
    formats: Any = None,
    min_rows: int = 1000,
    seed: int = 0,
    progress: bool | None = None,
    **parameters: Any,
) -> Report:
    """Compress the embedding tables of a safetensors file; the other tensors are copied.

    Parameters
    ----------
    path : path
        A safetensors file, or a folder as transformers' save_pretrained writes it (one file or several).
    output : path
        The new file, or folder. Never the input. In a folder, config.json says how the tables are stored, so
        that ``from_pretrained`` loads it once lutra.compress is imported; of a file, `load_into` takes the
        tensors.
    format, budget, formats, seed, progress, **parameters
        As in `convert`; shares are of the tables' bytes. Scored by the error of the rows.
    tensors : list of str, optional
        Names of the tables; default: those of at least ``min_rows`` rows whose names say that they are
        embeddings. That of an output layer ('lm_head.weight') may be among them.
    head : {'auto', 'compressed'}, default 'auto'
        With 'compressed' an untied output layer ('lm_head.weight', 'embed_out.weight') is compressed as
        well, for a `lutra.nn.OutputHead`. One that is tied, or holds the values of a table, follows it.
    min_rows : int, default 1000

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        No table, a budget that no format can meet, NaN (tensor and row are named), a damaged file, an output
        that is the input.
    """
    if format is None and budget is None:
        raise ValueError("give a format or a budget")
    _check_output(path, output)
    checkpoint, jobs = jobs_of(path, None if tensors is None else list(tensors), min_rows, head)
    limit, tried, unfit = None, [], []
    if budget is None:
        options = encode_all(jobs, format, parameters, seed, progress)
    else:
        limit = _choose.parse_budget(budget, sum(job.dense for job in jobs))
        kinds = kinds_of(format, formats, parameters)
        options, attempts = within(jobs, kinds, limit, seed, progress)
        unfit = not_tried(kinds, attempts)
        tried = [entry_of(j, o, o is best) for j, each, best in zip(jobs, attempts, options) for o in each]
    outs, metadata, config = _compressed(checkpoint, jobs, options)
    _write(checkpoint, output, outs, metadata, config)
    return Report([entry_of(job, option) for job, option in zip(jobs, options)], tried, limit, unfit=unfit)


def _compressed(
    checkpoint: Checkpoint, jobs: list[Job], options: list[Option]
) -> tuple[list[Out], dict[str, str], dict[str, Any]]:
    """The tensors of the new file, its metadata and what config.json says."""
    kept = dict(checkpoint.tensors)
    outs: list[Out] = []
    tables, spec = [], {}
    for job, option in zip(jobs, options):
        if option.format is None:
            continue
        tensor = kept.pop(job.name)
        prefix = job.name.removesuffix(".weight") + (".table" if is_head(job.name) else "")
        twins = [n for n, t in kept.items() if _equal(t, tensor)]  # a tied head that was saved as well
        for name in twins:
            del kept[name]
        arrays = {f"{prefix}.{k}": v for k, v in option.data.items()}
        clash = set(arrays) & set(kept)
        if clash:
            raise ValueError(f"{sorted(clash)[0]!r} is the name of another tensor of the file")
        outs += [Out.array(name, value, tensor.dtype) for name, value in arrays.items()]
        text = json.dumps(option.format.config(), sort_keys=True).encode()
        outs.append(Out.array(f"{prefix}.format_json", np.frombuffer(text, np.uint8)))
        # A stand-in, over whose shape others' loaders stumble; StaticEmbedding's would take it for the table.
        if list(checkpoint.tensors) != [_static.TABLE]:
            outs.append(Out(f"{prefix}.weight", tensor.dtype, (tensor.shape[0], 0), 0, tuple))
        entry = {"tensor": job.name, "prefix": prefix, "dtype": tensor.dtype, "shape": list(tensor.shape)}
        entry |= {"twins": twins, "arrays": sorted(option.data), **option.format.config()}
        tables.append(entry)
        spec[prefix] = option.format.config()
    outs += [Out.copy(t) for t in kept.values()]
    metadata = {**checkpoint.metadata, KEY: json.dumps({"version": VERSION, "tables": tables})}
    return outs, metadata, {"quant_method": "lutra", "version": 1, "tables": spec}


def _equal(one: Stored, two: Stored) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    a, b, step = one.raw(), two.raw(), 1 << 24
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, one.nbytes, step))


def decompress_file(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> list[str]:
    """Write the dense tables of a compressed file (or folder) back, in the types they had.

    Returns
    -------
    list of str
        The names of the tables.

    Raises
    ------
    ValueError
        A file that `compress_file` has not written, or one that is damaged.
    """
    _check_output(path, output)
    checkpoint = Checkpoint(path)
    if KEY not in checkpoint.metadata:
        raise ValueError(f"{path} holds no tables of lutra.compress")
    kept = dict(checkpoint.tensors)
    outs: list[Out] = []
    names = []
    try:
        described = json.loads(checkpoint.metadata[KEY])
        if described["version"] != VERSION:
            raise ValueError(f"version {described['version']!r}; this lutra reads {VERSION}")
        for entry in described["tables"]:
            names.append(entry["tensor"])
            outs += _dense(kept, entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the tables cannot be read: {error}") from error
    outs += [Out.copy(t) for t in kept.values()]
    metadata = {k: v for k, v in checkpoint.metadata.items() if k != KEY}
    _write(checkpoint, output, outs, metadata, None)
    return names


def _dense(kept: dict[str, Stored], entry: dict[str, Any]) -> list[Out]:
    """One table (and its twins), decoded while it is written."""
    rows, dim = (int(n) for n in entry["shape"])
    prefix, dtype = entry["prefix"], entry["dtype"]
    own = {"tensor", "prefix", "dtype", "shape", "twins", "arrays"}
    format = make({k: v for k, v in entry.items() if k not in own})
    data: Data = {}
    for key, array in format.arrays((rows, dim)).items():
        stored = kept.pop(f"{prefix}.{key}", None)
        if stored is None:
            raise ValueError(f"the tensor {prefix}.{key} is missing")
        if stored.shape != array.shape:
            raise ValueError(f"{prefix}.{key} has shape {stored.shape}; it must be {array.shape}")
        if array.dtype == "float32":
            data[key] = stored.values()
        else:
            data[key] = np.frombuffer(stored.raw(), np.dtype(array.dtype)).reshape(array.shape)
    for key in ("format_json", "weight", "padding_row"):
        kept.pop(f"{prefix}.{key}", None)

    def parts() -> Iterator[Any]:
        for block in format.decode(data, (rows, dim)):
            yield (
                np.ascontiguousarray(narrowed(np.asarray(block, np.float32), dtype))
                .reshape(-1)
                .view("u1")
                .data
            )

    nbytes = expected_bytes((rows, dim), dtype)
    return [Out(name, dtype, (rows, dim), nbytes, parts) for name in (entry["tensor"], *entry["twins"])]


# ---------------------------------------------------------------- places
def _check_output(path: Any, output: Any) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"no file or folder {os.fsdecode(path)!r}")
    if same_file(path, output):
        raise ValueError(f"the output {os.fsdecode(output)!r} is the input; give another name")
    if os.path.isdir(path):
        if os.path.exists(output):
            raise ValueError(f"{os.fsdecode(output)!r} is there already; a folder is written anew")
    elif os.path.isdir(output):
        raise ValueError(f"{os.fsdecode(output)!r} is a folder; the output of a file is a file")
    parent = os.path.dirname(os.path.realpath(output))
    if not os.path.isdir(parent):
        raise FileNotFoundError(f"no folder {parent!r} to write to")


def _write(
    checkpoint: Checkpoint,
    output: Any,
    outs: list[Out],
    metadata: dict[str, str],
    spec: dict[str, Any] | None,
) -> None:
    """The file; of a folder, what else it holds as well."""
    if checkpoint.folder is None:
        write(output, outs, metadata)
        return
    config = checkpoint.config()
    method = config.get("quantization_config", {}).get("quant_method", "lutra")
    if method != "lutra":
        raise ValueError(f"{checkpoint.folder} is quantized already, by {method!r}")
    target = os.path.realpath(output)
    weights = {f.name for f in checkpoint.files} | {"model.safetensors.index.json"}
    temporary = Path(os.path.dirname(target)) / f".lutra-{secrets.token_hex(8)}.tmp"
    others = _sentence_transformer(checkpoint, spec)
    parts = {p for e in _static.modules(checkpoint.folder) or [] for p in Path(e["path"]).parts[:1]}
    temporary.mkdir()
    try:
        for file in sorted(checkpoint.folder.iterdir()):
            if file.is_file() and file.name not in (*weights, "config.json", _static.CONFIG):
                shutil.copyfile(file, temporary / file.name)
            elif file.name in parts and file.is_dir():  # further modules of a SentenceTransformer
                shutil.copytree(file, temporary / file.name)
        for name, text in others.items():
            (temporary / name).write_text(text)
        write(temporary / "model.safetensors", outs, {"format": "pt", **metadata})
        if config:
            if spec is not None:
                config["quantization_config"] = spec
            else:
                config.pop("quantization_config", None)
            (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sentence_transformer(checkpoint: Checkpoint, spec: dict[str, Any] | None) -> dict[str, str]:
    """Files of a saved StaticEmbedding that say how its table is stored."""
    assert checkpoint.folder is not None
    if spec is None:
        return _static.rename(checkpoint.folder, None)
    table = checkpoint.tensors.get(_static.TABLE)
    if table is None or list(spec["tables"]) != ["embedding"]:
        return {}
    return _static.rename(checkpoint.folder, {"shape": list(table.shape), "dtype": FLOATS[table.dtype]})
