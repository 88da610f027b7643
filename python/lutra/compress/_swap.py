"""Putting compressed layers into a model, and taking them out again."""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import torch

from ..nn._shared import share
from . import _layers
from ._find import Group


class Place(NamedTuple):
    """A change: ``parent._modules[key]`` from old to new."""

    parent: Any
    key: str
    old: Any
    new: Any


def changes(model: Any, group: Group, layer: Any, head: str = "auto") -> list[Place]:
    """What becomes of the modules on one table whose compressed layer is built; nothing is changed yet."""
    from ..nn import OutputHead, TiedHead

    new: dict[str, Any] = {}
    for name, module in group.embeddings.items():
        if not new:
            new[name] = layer
        else:
            new[name] = share(layer)
            _layers.take_hooks(new[name], module)
    heads: dict[int, Any] = {}
    for name, module in group.heads.items():
        if id(module) not in heads:
            if not group.embeddings:
                own = OutputHead(layer, bias=module.bias).train(module.training)
                _layers.adopt(own, module)
            elif head == "dense":
                own = copy.copy(module)
                own._parameters = dict(module._parameters)
                own.weight = torch.nn.Parameter(
                    module.weight.detach().clone(), requires_grad=module.weight.requires_grad
                )
            else:
                own = TiedHead(layer, bias=module.bias).train(module.training)
                _layers.adopt(own, module)
            heads[id(module)] = own
        new[name] = heads[id(module)]
    places = []
    for name, module in new.items():
        module._is_hf_initialized = True
        parent, _, key = name.rpartition(".")
        owner = model.get_submodule(parent)
        places.append(Place(owner, key, owner._modules[key], module))
    return places


def put(places: list[Place], back: bool = False) -> None:
    for place in places:
        place.parent._modules[place.key] = place.old if back else place.new


def is_transformers(model: Any) -> bool:
    """Whether a model is one of Hugging Face transformers, without importing it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)
