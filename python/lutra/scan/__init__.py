"""Scan: queries and a stored collection in; the scores and the best k of them out."""

from .._results import Neighbors, RangeResult
from ._binary import binary, rescore_bits
from ._fast_scan import fast_scan, pack4, unpack4
from ._knn import knn, rescore
from ._lookups import lookups, lookups_topk, pq_logits
from ._maxsim import maxsim, maxsim_padded
from ._maxsim_tokens import ResidualTokens
from ._packed_logits import packed_logits, packed_topk
from ._pq import pq
from ._range import range_search
from ._screen import Screen, knn_screened, quantize_int8

__all__ = [
    "Neighbors",
    "RangeResult",
    "ResidualTokens",
    "Screen",
    "binary",
    "fast_scan",
    "knn",
    "knn_screened",
    "lookups",
    "lookups_topk",
    "maxsim",
    "maxsim_padded",
    "pack4",
    "packed_logits",
    "packed_topk",
    "pq",
    "pq_logits",
    "quantize_int8",
    "range_search",
    "rescore",
    "rescore_bits",
    "unpack4",
]
