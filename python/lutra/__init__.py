"""lutra: fast kernels that turn arithmetic into memory.

Three verbs: `lutra.address` (where to look), `lutra.gather` (the rows found there), `lutra.scan` (the best of
a collection). `lutra.nn` has layers for torch, `lutra.index` collections that are searched and
saved, `lutra.quant` codes of a few bytes a vector, `lutra.compress` tables of embeddings in few bytes,
`lutra.metrics` measures of what a search found.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import address, gather, scan
from ._backend import get_num_threads, set_num_threads, simd_level
from ._version import __version__

if TYPE_CHECKING:
    from . import compress, index, metrics, mine, nn, quant, reference, sent2vec, store, vocab
    from .sent2vec import Sent2Vec
    from .store import VectorStore

_LAZY = (
    "compress", "index", "metrics", "mine", "nn", "quant", "reference", "sent2vec", "store", "torch_ops",
    "vocab",
)  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:  # nn and torch_ops import torch: only when they are asked for
        return importlib.import_module(f"lutra.{name}")
    if name == "VectorStore":
        return importlib.import_module("lutra.store").VectorStore
    if name == "Sent2Vec":
        return importlib.import_module("lutra.sent2vec").Sent2Vec
    raise AttributeError(f"module 'lutra' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY, "Sent2Vec", "VectorStore"])


__all__ = [
    "Sent2Vec", "VectorStore", "__version__", "address", "compress", "gather", "get_num_threads", "index",
    "metrics", "mine", "nn", "quant", "reference", "scan", "sent2vec", "set_num_threads", "simd_level",
    "store", "vocab",
]  # fmt: skip
