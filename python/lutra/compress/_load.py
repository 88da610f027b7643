"""load_into: a saved state_dict with compressed tables, into a model as its class builds it."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..nn._compressed import read_format
from . import _layers
from ._attach import attach
from ._find import find
from ._swap import changes, put
from .formats import make

_TAG = ".format_json"


def load_into(model: Any, source: Any) -> Any:
    """Load a checkpoint with compressed tables into a model whose embeddings are dense.

    The embeddings that the checkpoint stores compressed are replaced as `convert` does, then everything is
    loaded. Either all of it or, after any error, nothing.

    Parameters
    ----------
    model : torch.nn.Module
        As its class builds it.
    source : path or dict
        A safetensors file (what ``lutra compress`` writes, or safetensors' ``save_file`` of a state_dict),
        a file of ``torch.save``, or a state_dict.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        Tensors that are missing, left over or of another shape (all are named), an embedding that the model
        does not have, a format that is not known, a damaged file.
    TypeError
        What is no model or no state_dict.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    state = _read(source)
    groups = {name: g for g in find(model) for name in g.embeddings}
    existing = _layers.compressed(model)
    places, built, done = [], {}, set()
    for key in state:
        if not key.endswith(_TAG):
            continue
        name = key.removesuffix(_TAG)
        try:
            format = make(read_format(state[key]))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if name in existing:
            continue  # of the same format, or loading says so
        if name not in groups:
            head, _ = _layers.head_of_table(model, [name])
            if head is None:
                raise ValueError(
                    f"the checkpoint stores {name} compressed; the model has no such embedding with a dense "
                    f"table and no such untied head (its embeddings are {', '.join(groups) or 'none'})"
                )
            groups[name] = head
        if id(groups[name]) in done:
            continue  # a module at two places
        done.add(id(groups[name]))
        device = groups[name].weight.device
        layer = _layers.build(groups[name].module, format, None, name).to_empty(device=device)
        built[name] = layer
        places += changes(model, groups[name], layer)
    problems: list[str] = []
    try:
        put(places)
        whole = _completed(model, state)
        problems = _compare(model, whole)
        if not problems:
            for name, layer in built.items():
                layer.format_json.copy_(state[name + _TAG])
            model.load_state_dict(whole, strict=False)
            _check_padding(model, state)
            attach(model)
    except BaseException:
        put(places, back=True)
        raise
    if problems:
        put(places, back=True)
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"the checkpoint does not fit the model: {shown}")
    return model


def _read(source: Any) -> dict[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file {path!r}")
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # torch.save's
        if zipped:
            source = torch.load(path, map_location="cpu", weights_only=True)
        else:
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                source = load_file(path)
            except SafetensorError as error:
                raise ValueError(f"{path!r} is damaged or no safetensors file: {error}") from None
    if not isinstance(source, dict) or not all(isinstance(v, torch.Tensor) for v in source.values()):
        raise TypeError(f"source must be a path or a state_dict, got {type(source).__qualname__}")
    return source


def _completed(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state with what need not be in a file: tied Parameters under their other names, placeholders."""
    whole = dict(state)
    own = model.state_dict(keep_vars=True)
    by_id: dict[int, list[str]] = {}
    for key, value in own.items():
        by_id.setdefault(id(value), []).append(key)
    for keys in by_id.values():
        there = next((k for k in keys if k in state), None)
        for key in keys:
            if key not in whole and there is not None:
                whole[key] = state[there]
    for key, value in own.items():
        if key not in whole and ((value.dim() == 2 and value.shape[1] == 0) or key.endswith(".padding_row")):
            whole[key] = value.detach()
    return whole


def _compare(model: Any, state: dict[str, Any]) -> list[str]:
    own = model.state_dict()
    out = [f"{key} is missing" for key in own if key not in state]
    out += [f"{key} is left over" for key in state if key not in own]
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            out.append(f"{key} has shape {tuple(state[key].shape)}, the model needs {tuple(value.shape)}")
    return out


def _check_padding(model: Any, state: dict[str, Any]) -> None:
    """A file of ``lutra compress`` knows of no padding: the row is what was encoded."""
    for name, layer in _layers.compressed(model).items():
        if getattr(layer, "padding_row", None) is not None and f"{name}.padding_row" not in state:
            _layers.fill_padding(layer)
