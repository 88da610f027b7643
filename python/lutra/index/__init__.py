"""Index: collections of vectors that are searched, changed and saved.

`Flat` searches exactly, `PQ` a compressed copy; `load` opens what their ``save`` wrote. `kmeans` and `refine`
are the parts that they are made of.
"""

from .._results import Neighbors
from . import transforms
from ._kmeans import KMeans, kmeans
from ._load import load
from ._refine import refine
from .base import Index
from .binary import Binary
from .flat import Flat
from .pq import PQ
from .transformed import Transformed

__all__ = [
    "PQ", "Binary", "Flat", "Index", "KMeans", "Neighbors", "Transformed", "kmeans", "load", "refine",
    "transforms",
]  # fmt: skip
