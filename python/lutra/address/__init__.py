"""Address: vectors, ids or text in; integer codes (and weights) out: where to look."""

from .._results import Neighbors
from ._ball_carving import ball_carving
from ._binarize import binarize
from ._fde import fde
from ._fde_encoder import FDE, BlockRows
from ._fwht import fwht
from ._hash_features import hash_features
from ._longest_match import Matches, longest_match
from ._nearest import nearest
from ._ngrams import Ngrams, Vocabulary, ngrams, token_ngrams
from ._product_keys import ProductKeys, product_keys
from ._random_rows import random_rows
from ._sign_hash import SignHash, sign_hash
from ._simhash import simhash
from ._words import word_offsets
from ._xor_ngrams import xor_ngrams

__all__ = [
    "FDE", "BlockRows", "Matches", "Neighbors", "Ngrams", "ProductKeys", "SignHash", "Vocabulary",
    "ball_carving", "binarize", "fde", "fwht", "hash_features", "longest_match", "nearest", "ngrams",
    "product_keys", "random_rows", "sign_hash", "simhash", "token_ngrams", "word_offsets", "xor_ngrams",
]  # fmt: skip
