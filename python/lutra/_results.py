"""Named tuples that several ops return."""

from __future__ import annotations

from typing import Any, NamedTuple


class Neighbors(NamedTuple):
    """The best k of a collection for each query, best first.

    Attributes
    ----------
    scores : array, shape (nq, k), float32
        -inf (ip, cosine) or +inf (l2) where there is no neighbour.
    ids : array, shape (nq, k), int64
        -1 where there is no neighbour.
    """

    scores: Any
    ids: Any
