"""Scans of product-quantized rows, where an index lives."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import scan
from .._arrays import I64
from ..reference.scan import pq_tables
from ..scan._lists import Lists, lut8, query_tables
from ._home import HOST, Home

_TABLES, _TABLES_ON_GPU = 1 << 24, 1 << 28  # bytes that the tables of filtered searches take at a time


def pq_scan(
    home: Home, q: Any, codes: Any, codebooks: Any, k: int, metric: str, keep: Any
) -> tuple[Any, Any]:
    """The k best of codes (n, m), with codebooks (m, ksub, dsub): `lutra.scan.pq` with a filter.

    A filtered scan is that of one list of all rows.
    """
    if keep is None:
        return scan.pq(q, codes, codebooks, k, metric)
    n, (m, ksub, dsub) = len(codes), codebooks.shape
    here = home is HOST
    each = 4 * ksub * m * (dsub if here else 1)
    step = max(1, (_TABLES if here else _TABLES_ON_GPU) // each)
    books = None if here else home.kind.dense(home.xp.swapaxes(codebooks, 1, 2))
    begin, rows = (np.zeros(1, np.int64), np.array([n])) if here else (_one(home, 0), _one(home, n))
    parts = []
    for i in range(0, max(1, len(q)), step):
        part = q[i : i + step]
        if here:
            lut, lists = pq_tables(part, codebooks, metric), Lists(begin, rows, None, n, keep, None)
        else:
            lut = query_tables(part, books, distances=metric == "l2")
            lists = Lists(begin, rows, None, n, keep, home.full((len(part), 1), 0, I64), n, n)
        parts.append(lut8(lut, codes, lists, k, metric))
    xp = np if here else home.xp
    return xp.concatenate([p[0] for p in parts]), xp.concatenate([p[1] for p in parts])


def _one(home: Home, value: int) -> Any:
    return home.full((1,), value, I64)
