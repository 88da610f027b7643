"""Scan: queries and a stored collection in; the scores and the best k of them out."""

from .._results import Neighbors
from ._binary import binary, rescore_bits
from ._knn import knn, rescore
from ._pq import pq

__all__ = ["Neighbors", "binary", "knn", "pq", "rescore", "rescore_bits"]
