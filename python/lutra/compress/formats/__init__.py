"""Formats of compressed tables, one file each. Importing one registers it."""

from .base import FORMATS, Array, Format, make
from .columns import ColumnPruned
from .low_rank import LowRank
from .mag_svd import MagSVD
from .mixed import MixedDim
from .pq import PQ

__all__ = ["FORMATS", "PQ", "Array", "ColumnPruned", "Format", "LowRank", "MagSVD", "MixedDim", "make"]
