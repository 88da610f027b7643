"""Quantizers: vectors as codes of a few bytes.

All have one interface, `Quantizer`: ``train``, ``encode``, ``decode``, ``save``; indexes scan their codes by
``entries``, ``tables`` and ``row_terms``. `ResidualQuantizer` is for the token vectors of late interaction.
"""

from .. import index as _index  # noqa: F401  (first: indexes hold quantizers, quantizers use index's helpers)
from ..index._kmeans import KMeans, kmeans
from ._load import build, load
from .base import Quantizer, RowTerms, Tables
from .opq import OPQ
from .pq import PQ
from .rabitq import RaBitQ
from .residual import ResidualQuantizer
from .rotated import RotatedSQ
from .rq import RQ
from .sq import SQ

__all__ = [
    "OPQ", "PQ", "RQ", "SQ", "KMeans", "Quantizer", "RaBitQ", "ResidualQuantizer", "RotatedSQ", "RowTerms",
    "Tables", "build", "kmeans", "load",
]  # fmt: skip
