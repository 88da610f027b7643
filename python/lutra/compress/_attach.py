"""What knows how to save compressed layers, within a model: models of transformers, StaticEmbeddings."""

from __future__ import annotations

from typing import Any

from . import _layers
from ._static import is_theirs
from ._swap import is_transformers


def attach(model: Any) -> None:
    """Make the parts of a model that other libraries save and load such as keep compressed tables."""
    inner: set[int] = set()
    for module in list(model.modules()):
        if id(module) in inner:
            continue
        if is_transformers(module) and _layers.compressed(module):
            from . import _transformers

            _transformers.attach(module)
            inner |= {id(m) for m in module.modules()}
        elif is_theirs(f"{type(module).__module__}.{type(module).__qualname__}") and _layers.compressed(
            module
        ):
            from .static_embedding import StaticEmbedding

            module.__class__ = StaticEmbedding
