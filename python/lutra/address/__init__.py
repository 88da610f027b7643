"""Address: vectors, ids or text in; integer codes (and weights) out: where to look."""

from .._results import Neighbors
from ._nearest import nearest
from ._sign_hash import SignHash, sign_hash

__all__ = ["Neighbors", "SignHash", "nearest", "sign_hash"]
