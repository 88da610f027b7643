"""Formats of compressed tables, one file each. Importing one registers it."""

from .base import FORMATS, Array, Format, make
from .clusters import Clusters
from .columns import ColumnPruned
from .csr import CSR
from .dedup import Dedup
from .dhe import DHE
from .digits import Digits
from .hash import Hash
from .low_rank import LowRank
from .mag_svd import MagSVD
from .memcom import MEmCom
from .mixed import MixedDim
from .opq import OPQ
from .packed import FP8, NF4, Int2, Int4, Int8
from .pq import PQ
from .qr import QR
from .robe import ROBE
from .rq import RQ
from .tensor_train import TensorTrain

__all__ = [
    "CSR",
    "DHE",
    "FORMATS",
    "FP8",
    "NF4",
    "OPQ",
    "PQ",
    "QR",
    "ROBE",
    "RQ",
    "Array",
    "Clusters",
    "ColumnPruned",
    "Dedup",
    "Digits",
    "Format",
    "Hash",
    "Int2",
    "Int4",
    "Int8",
    "LowRank",
    "MEmCom",
    "MagSVD",
    "MixedDim",
    "TensorTrain",
    "make",
]
