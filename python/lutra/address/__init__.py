"""Address: vectors, ids or text in; integer codes (and weights) out: where to look."""

from ._sign_hash import SignHash, sign_hash

__all__ = ["SignHash", "sign_hash"]
