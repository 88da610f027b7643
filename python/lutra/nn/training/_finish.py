"""finish: a trained model with its tables as they are stored."""

from __future__ import annotations

from typing import Any

import torch

from .._tied_head import TiedHead
from ._base import TrainingMethod
from ._head import MethodHead


def finish(model: torch.nn.Module) -> torch.nn.Module:
    """Put the inference layer of its compressed table in the place of every training method of a model.

    ``layer.compressed()`` says the format, ``lutra.nn.<Format>Embedding`` (or ``...EmbeddingBag``) is the
    layer: the same outputs as in eval mode, the same padding_idx and mode. Their floating point arrays are
    Parameters and can be trained on; codes and patterns stay. A method in several places becomes one layer
    in all of them.

    Parameters
    ----------
    model : Module
        Changed in place, all layers or (on an error) none.

    Returns
    -------
    Module
        The model; where it is itself a training method, the new layer.

    Raises
    ------
    ValueError
        A method is not ready, such as AutoDim before `choose`.

    Notes
    -----
    A `MethodHead` on one of the methods becomes a `TiedHead` on the new layer. Any other output layer that
    is tied to the ``weight`` of a method multiplies by that weight, before and after: it goes on holding the
    dense table.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.AutoSrhEmbedding(10, 4, groups=2)
    >>> layer.prune(0.5)
    >>> type(lutra.nn.finish(torch.nn.Sequential(layer))[0]).__name__
    'MixedDimEmbedding'
    """
    made: dict[TrainingMethod, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainingMethod):
            try:
                made[module] = _inference(module)
            except ValueError as error:
                raise ValueError(f"{name or type(module).__name__}: {error}") from error
    if isinstance(model, TrainingMethod):
        return made[model]
    heads: dict[torch.nn.Module, torch.nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, TrainingMethod):
                parent._modules[name] = made[child]
            elif isinstance(child, MethodHead) and child.embedding in made:
                if child not in heads:
                    heads[child] = TiedHead(made[child.embedding], child.bias).train(child.training)
                parent._modules[name] = heads[child]
    return model


def _inference(layer: TrainingMethod) -> torch.nn.Module:
    from .._compressed_layers import layer_class

    table = layer.compressed()
    bag = isinstance(layer, torch.nn.EmbeddingBag)
    names = ["padding_idx", "scale_grad_by_freq"]  # max_norm was of the method's weight, and is in the table
    names += ["mode", "include_last_offset"] if bag else []
    settings: dict[str, Any] = {name: getattr(layer, name) for name in names}
    weight = layer.weight
    cls: Any = layer_class(table.format, bag)
    made = cls.from_table(table, dtype=weight.dtype, device=weight.device, **settings)
    return made.train(layer.training)
