"""Compressed layers in the place of a model's dense ones, and how they change their number of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..nn._compressed import Compressed, as_tensor
from ..nn._compressed_layers import layer_class
from ._find import untied_head
from ._mixed import mixed
from ._table import to_numpy
from .formats import Format

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def plain(module: Any) -> bool:
    """Whether a module looks rows up as torch does, so that a layer of ours does all that it does."""
    from .. import nn

    ours = (nn.Embedding, nn.EmbeddingBag)
    return isinstance(module, ours) or type(module).forward in (
        torch.nn.Embedding.forward,
        torch.nn.EmbeddingBag.forward,
    )


def build(module: Any, format: Format, data: dict[str, Any] | None, name: str) -> Any:
    """The compressed layer in the place of a dense ``nn.Embedding`` or ``nn.EmbeddingBag``; of an
    ``nn.Linear`` its table.

    ``data`` None makes one on the meta device, for what is loaded from a file.
    """
    bag = isinstance(module, torch.nn.EmbeddingBag)
    cls: Any = layer_class(format, bag)
    layer = cls.__new__(cls)
    weight = module.weight
    if isinstance(module, torch.nn.Linear):
        device = "meta" if data is None else weight.device
        layer._begin(format, data, *weight.shape, None, None, 2.0, False, False, device, weight.dtype)
        return layer.train(module.training).requires_grad_(weight.requires_grad)
    settings = {
        "max_norm": module.max_norm, "norm_type": module.norm_type, "sparse": module.sparse,
        "scale_grad_by_freq": module.scale_grad_by_freq, "padding_idx": module.padding_idx,
        "device": "meta" if data is None else weight.device, "dtype": weight.dtype,
    }  # fmt: skip
    if bag:
        settings.update(mode=module.mode, include_last_offset=module.include_last_offset)
    elif module.padding_idx is not None and data is not None:
        settings["padding_row"] = weight[module.padding_idx].detach().clone()
    layer._begin(format, data, module.num_embeddings, module.embedding_dim, **settings)
    adopt(layer, module)
    layer.train(module.training)
    if not weight.requires_grad:
        layer.requires_grad_(False)
    if data is not None and not plain(module):
        check_subclass(layer, module, name)
    return layer


def adopt(layer: Any, module: Any) -> None:
    """Take over what else ``module`` has: its class, its hooks, attributes that others have set."""
    standard = (torch.nn.Embedding, torch.nn.EmbeddingBag, torch.nn.Linear)
    if type(module) not in standard and not type(module).__module__.startswith("lutra.nn"):
        layer.__class__ = mixed(type(module), type(layer))  # its forward calls ours as super().forward
    take_hooks(layer, module)
    for key, value in module.__dict__.items():
        if key not in layer.__dict__:
            layer.__dict__[key] = value
    for kind in ("_buffers", "_modules"):
        for key, value in getattr(module, kind).items():
            getattr(layer, kind).setdefault(key, value)
    layer._non_persistent_buffers_set |= module._non_persistent_buffers_set


def take_hooks(layer: Any, module: Any) -> None:
    for key in _HOOKS:
        if key in module.__dict__:  # the same dicts: handles that remove a hook go on working
            layer.__dict__[key] = module.__dict__[key]


def check_subclass(layer: Any, module: Any, name: str) -> None:
    """A subclass with a forward of its own works on our layer only if it looks rows up by super().forward."""
    old = module.__class__.__new__(module.__class__)
    old.__dict__.update(module.__dict__)
    old._parameters = {**module._parameters, "weight": torch.nn.Parameter(layer.dense(), requires_grad=False)}
    ids = torch.arange(min(17, len(module.weight)), device=module.weight.device)
    if isinstance(module, torch.nn.EmbeddingBag):
        ids = ids.reshape(1, -1)
    try:
        with torch.no_grad():  # forward itself: hooks must not see this
            want, got = old.forward(ids), layer.forward(ids)
            close = torch.allclose(want.float(), got.float(), rtol=1e-2, atol=1e-5)
    except Exception as error:
        raise TypeError(
            f"{name} is a {type(module).__qualname__}, whose forward does not work on a compressed "
            f"table: {error}"
        ) from error
    if not close:
        raise TypeError(
            f"{name} is a {type(module).__qualname__}, whose forward gives other values on a "
            "compressed table; "
            "it must look rows up by super().forward"
        )


# ---------------------------------------------------------------- resizing
def resize(layer: Any, rows: int, values: np.ndarray) -> None:
    """Make a compressed layer ``rows`` long, in place; ``values`` (NumPy) are the rows that are added.

    Parameters stay trainable where they were. What refers to the layer's Parameters (optimizers) has to be
    built anew, as after torch's own resizing.
    """
    shape = layer._shape
    data = {}
    for key, value in layer._data().items():
        array = to_numpy(value)
        data[key] = array.astype(np.float32) if value.is_floating_point() else array
    format, fresh = layer.format.resize(data, shape, values.astype(np.float32), min(rows, shape[0]))
    fits = {k: v.shape for k, v in format.arrays((rows, shape[1])).items()}
    if {k: v.shape for k, v in fresh.items()} != fits:
        raise RuntimeError(f"{format.name}: resized arrays do not fit the format")  # a bug of the format
    trainable = {k: getattr(layer, k).requires_grad for k in data}
    some = any(trainable.values())
    weight, arrays = layer.weight, format.arrays((rows, shape[1]))
    for key in data:
        delattr(layer, key)
    for key, array in arrays.items():
        own = weight.dtype if array.dtype == "float32" else getattr(torch, array.dtype)
        value = as_tensor(fresh[key]).to(device=weight.device, dtype=own).contiguous()
        if array.trainable and own.is_floating_point:
            parameter = torch.nn.Parameter(value, requires_grad=trainable.get(key, some))
            layer.register_parameter(key, parameter)
        else:
            layer.register_buffer(key, value)
    layer.format, layer.num_embeddings, layer._names = format, rows, tuple(arrays)
    layer.weight = torch.nn.Parameter(weight.new_empty((rows, 0)), requires_grad=weight.requires_grad)
    text = json.dumps(format.config(), sort_keys=True).encode()
    layer.format_json = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(weight.device)
    if layer.padding_idx is not None and layer.padding_idx >= rows:
        layer.padding_idx = None
        if getattr(layer, "padding_row", None) is not None:
            layer.padding_row = None


def fill_padding(layer: Any) -> None:
    """Give a layer the padding row that its file does not have: what was encoded."""
    ids = torch.tensor([layer.padding_idx], device=layer.weight.device)
    with torch.no_grad():
        row = layer.format.gather(layer._data(), layer._shape, ids)[0]
        layer.padding_row = row.to(layer.weight.dtype).clone()  # the old one may be on the meta device


def followers(model: Any, layer: Any) -> Iterator[Any]:
    """The heads and shared embeddings of a model that compute with a layer's table."""
    for module in model.modules():
        tied = module.__dict__.get("_tied")
        if tied and tied[0] is layer:
            yield module


def follow(model: Any, layer: Any) -> None:
    """After a layer has changed its size: the sizes and weights of what shares its table."""
    for module in followers(model, layer):
        module.weight = layer.weight
        if isinstance(module, torch.nn.Linear):
            grown = layer.num_embeddings - module.out_features
            module.out_features = layer.num_embeddings
            if module.bias is not None and len(module.bias) != layer.num_embeddings:
                # The same Parameter, for others may hold it (BERT's cls.predictions.bias).
                module.bias.data = torch.nn.functional.pad(module.bias.data, (0, grown))


def head_of_table(model: Any, names: list[str]) -> tuple[Any, str]:
    """The untied head, still dense, whose table has one of these names in a checkpoint, and that name."""
    for name in names:
        if name.endswith(".table"):
            found = untied_head(model, name.removesuffix(".table"))
            if found is not None:
                return found, name
    return None, ""


def compressed(model: Any) -> dict[str, Compressed]:
    """The compressed layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Compressed)}
