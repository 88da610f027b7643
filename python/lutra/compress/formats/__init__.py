"""Formats of compressed tables, one file each. Importing one registers it."""

from .base import FORMATS, Array, Format, make
from .columns import ColumnPruned
from .csr import CSR
from .low_rank import LowRank
from .mag_svd import MagSVD
from .mixed import MixedDim
from .packed import FP8, NF4, Int2, Int4, Int8
from .pq import PQ
from .tensor_train import TensorTrain

__all__ = [
    "CSR",
    "FORMATS",
    "FP8",
    "NF4",
    "PQ",
    "Array",
    "ColumnPruned",
    "Format",
    "Int2",
    "Int4",
    "Int8",
    "LowRank",
    "MagSVD",
    "MixedDim",
    "TensorTrain",
    "make",
]
