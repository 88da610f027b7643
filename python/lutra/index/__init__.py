"""Index: collections of vectors that are searched, changed and saved.

`Flat` searches exactly, `PQ` and `Codes` a compressed copy, `Binary` packed bits or signs, `Blocks` encodings
by queries that have some of their blocks only, `IVF` the lists nearest to a query, `HNSW` a graph,
`MultiVector` documents of many vectors, `Shards` any of them on several devices; `load` opens what their
``save`` wrote. `kmeans`, `balanced_assignment` and `refine` are parts of them.
"""

from .._results import Neighbors
from . import _factory_steps as _steps  # noqa: F401  (its transform is one that files may hold)
from . import transforms
from ._faiss import read_faiss, to_faiss, write_faiss
from ._kmeans import KMeans, kmeans
from ._kmeans_variants import balanced_assignment
from ._load import load
from ._pool_tokens import pool_tokens
from ._prune_tokens import prune_tokens
from ._refine import refine
from ._tokens import as_tokens
from .auto import auto
from .base import Index
from .binary import Binary
from .blocks import Blocks
from .codes import Codes
from .factory import factory
from .flat import Flat
from .funnel import Funnel, funnel
from .hnsw import HNSW
from .ivf import IVF
from .multivector import MultiVector
from .pq import PQ
from .segments import Store, compact, create
from .segments import open_store as open
from .shards import Shards
from .transformed import Transformed
from .tune import Tuned, tune

__all__ = [
    "HNSW",
    "IVF",
    "PQ",
    "Binary",
    "Blocks",
    "Codes",
    "Flat",
    "Funnel",
    "Index",
    "KMeans",
    "MultiVector",
    "Neighbors",
    "Shards",
    "Store",
    "Transformed",
    "Tuned",
    "as_tokens",
    "auto",
    "balanced_assignment",
    "compact",
    "create",
    "factory",
    "funnel",
    "kmeans",
    "load",
    "open",
    "pool_tokens",
    "prune_tokens",
    "read_faiss",
    "refine",
    "to_faiss",
    "transforms",
    "tune",
    "write_faiss",
]
