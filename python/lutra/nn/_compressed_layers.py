"""The two layers of every registered format."""

from __future__ import annotations

from ..compress.formats import FORMATS, Format
from ._compressed_bag import CompressedEmbeddingBag
from ._compressed_embedding import CompressedEmbedding


def make_layers(cls: type[Format], module: str) -> dict[str, type]:
    """The two layers of a format, by their names."""
    made = {}
    for base, suffix in ((CompressedEmbedding, "Embedding"), (CompressedEmbeddingBag, "EmbeddingBag")):
        name = f"{cls.layer}{suffix}"
        doc = (base.__doc__ or "").replace("{name}", f"{cls.name!r}")
        made[name] = type(name, (base,), {"format_class": cls, "__module__": module, "__doc__": doc})
    return made


def layer_class(format: Format, bag: bool = False) -> type:
    """The Embedding (or EmbeddingBag) of a format, out of `lutra.nn`."""
    from .. import nn

    return getattr(nn, f"{format.layer}Embedding{'Bag' if bag else ''}")


#: Names of all layers made here.
LAYERS: dict[str, type] = {}
for _format in FORMATS.values():
    LAYERS.update(make_layers(_format, "lutra.nn"))
