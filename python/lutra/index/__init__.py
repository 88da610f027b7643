"""Index: collections of vectors that are searched, changed and saved.

`Flat` searches exactly, `PQ` and `Codes` a compressed copy, `Binary` packed bits or signs, `IVF` the lists
nearest to a query, `HNSW` a graph; `load` opens what their ``save`` wrote. `kmeans`,
`balanced_assignment` and `refine` are parts of them.
"""

from .._results import Neighbors
from . import transforms
from ._kmeans import KMeans, kmeans
from ._kmeans_variants import balanced_assignment
from ._load import load
from ._refine import refine
from .base import Index
from .binary import Binary
from .codes import Codes
from .flat import Flat
from .funnel import Funnel, funnel
from .hnsw import HNSW
from .ivf import IVF
from .pq import PQ
from .transformed import Transformed

__all__ = [
    "HNSW",
    "IVF",
    "PQ",
    "Binary",
    "Codes",
    "Flat",
    "Funnel",
    "Index",
    "KMeans",
    "Neighbors",
    "Transformed",
    "balanced_assignment",
    "funnel",
    "kmeans",
    "load",
    "refine",
    "transforms",
]
