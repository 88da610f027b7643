"""Embeddings that are another embedding: several modules of a model on one compressed table."""

from __future__ import annotations

from typing import Any

import torch

from ._compressed import Compressed


class _Shared(torch.nn.Module):
    """A second place of an embedding in a model.

    Holds a reference to the layer that has the table, and no table of its own: the table's arrays are in the
    state_dict once, under the name of the layer that owns them. ``weight`` is the owner's Parameter, so
    that code which ties or looks at weights finds the two tied.
    """

    def __init__(self, embedding: Any) -> None:
        torch.nn.Module.__init__(self)
        self.weight = embedding.weight  # before _tied: from then on other names are looked for there
        self._tied = (embedding,)  # in a tuple, so that the owner is no submodule of this one

    @property
    def embedding(self) -> Any:
        """The layer that has the table."""
        return self._tied[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_tied" not in self.__dict__:
                raise
            return getattr(self._tied[0], name)  # padding_idx, num_embeddings, format, embed_scale, ...

    def reset_parameters(self) -> None:
        """Nothing: the table is the owner's."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._tied[0](*args, **kwargs)

    def extra_repr(self) -> str:
        return f"shared, {self._tied[0].extra_repr()}"


class SharedEmbedding(_Shared, torch.nn.Embedding):
    """A second place of a compressed Embedding in a model, see `lutra.compress.convert`."""


class SharedEmbeddingBag(_Shared, torch.nn.EmbeddingBag):
    """A second place of a compressed EmbeddingBag in a model, see `lutra.compress.convert`."""


def share(embedding: Any) -> _Shared:
    """Another module on the table of ``embedding``, a compressed layer."""
    if not isinstance(embedding, Compressed):
        raise TypeError(f"embedding must be a compressed layer, got {type(embedding).__qualname__}")
    kind = SharedEmbeddingBag if isinstance(embedding, torch.nn.EmbeddingBag) else SharedEmbedding
    return kind(embedding).train(embedding.training)
