"""Named tuples that several ops return."""

from __future__ import annotations

from typing import Any, NamedTuple


class Neighbors(NamedTuple):
    """The best k of a collection for each query, best first.

    Attributes
    ----------
    scores : array, shape (nq, k), float32
        -inf (ip, cosine) or +inf (distances) where there is no neighbour.
    ids : array, shape (nq, k), int64
        -1 where there is no neighbour.
    """

    scores: Any
    ids: Any


class RangeResult(NamedTuple):
    """All of a collection within a radius of each query, best first.

    Attributes
    ----------
    offsets : array, shape (nq + 1,), int64
        What was found for query i is at ``offsets[i] : offsets[i + 1]`` of the others (FAISS's ``lims``).
    scores : array, shape (offsets[-1],), float32
    ids : array, shape (offsets[-1],), int64
    """

    offsets: Any
    scores: Any
    ids: Any
