"""ResidualTokens: token vectors as a centroid and a few bits a dimension, as PLAID stores them."""

from __future__ import annotations

from typing import Any, NamedTuple


class ResidualTokens(NamedTuple):
    """Token vectors as residual codes; `lutra.quant.ResidualQuantizer` makes them, `maxsim` scores them.

    Token i is ``centroids[centroid_ids[i]] + values[code of each dimension]``, divided by its norm where
    ``normalize`` is set. The code of dimension j is bits [j b, (j + 1) b) of a row of ``codes``, the lowest
    bits of a byte first, where ``values`` has 2**b entries.

    Attributes
    ----------
    codes : array, shape (n, ceil(d * b / 8)), uint8
    centroid_ids : array, shape (n,), int32
    centroids : array, shape (nc, d), float32
    values : array, shape (2**b,), float32, with b of 1, 2, 4 or 8
    normalize : bool
    """

    codes: Any
    centroid_ids: Any
    centroids: Any
    values: Any
    normalize: bool
