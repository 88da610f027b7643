"""Vector stores: strings and their vectors in a file that opens at once."""

from ._store import Entries, VectorStore

__all__ = ["Entries", "VectorStore"]
