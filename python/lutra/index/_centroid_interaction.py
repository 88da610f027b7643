"""Candidates by centroid interaction (PLAID): MaxSim with each token in the place of its centroid."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import scan
from .._arrays import F32, I64, U8
from ..scan import ResidualTokens
from ._home import HOST, Home

_PROBES = 4  # centroids of a query token whose documents are looked at


class CentroidInteraction:
    """The centroids of each document, and the documents of each centroid.

    A query's candidates are the documents of the centroids nearest to its tokens, by the sum over its tokens
    of the largest product with a centroid of the document (Santhanam et al. 2022, arXiv 2205.09707).
    """

    def __init__(self, home: Home, docs: ResidualTokens, ptr: np.ndarray) -> None:
        self.home = home
        self.n, count, d = len(ptr) - 1, len(docs.centroids), docs.centroids.shape[1]
        owner = np.repeat(np.arange(self.n), np.diff(ptr))
        pairs = np.unique(owner * count + HOST.bring(docs.centroid_ids))  # a document names one once
        owner, ids = np.divmod(pairs, count)
        self.ptr = home.positions(_offsets(owner, self.n))
        # a centroid is a token without a residual
        codes, values = home.full((len(ids), (d + 7) // 8), 0, U8), home.full((2,), 0, F32)
        numbers = home.bring(ids.astype(np.int32))
        self.tokens = ResidualTokens(codes, numbers, docs.centroids, values, False)
        self.owners = home.positions(owner[np.argsort(ids, kind="stable")])
        self.lists = _offsets(ids, count)
        home.wait()  # other streams may search with it at once

    def candidates(self, tokens: Any, ptr: Any, count: int, keep: Any) -> Any:
        """Positions (nq, count) of documents, rising, -1 where there are fewer. ``keep``: packed bits.

        How many documents the centroids have is known on the host: on a GPU this waits for it.
        """
        home, n, offsets = self.home, max(1, self.n), HOST.bring(ptr)
        tokens, nq = home.kind.cast(tokens, F32), len(offsets) - 1
        near = scan.knn(tokens, self.tokens.centroids, min(_PROBES, len(self.tokens.centroids))).ids
        lists = np.maximum(HOST.bring(near), 0)
        query = np.repeat(np.arange(nq) * n, np.diff(offsets) * lists.shape[1])
        begins, lengths = self.lists[lists.ravel()], np.diff(self.lists)[lists.ravel()]
        pairs = home.repeat(query, lengths) + self.owners[home.ranges(begins, lengths)]
        empty = np.flatnonzero(np.diff(offsets) == 0)  # a query without tokens: all scores are 0
        if len(empty):
            every = np.add.outer(empty * n, np.arange(self.n)).ravel()
            pairs = home.xp.concatenate([pairs, home.positions(every)])
        pairs = home.xp.unique(pairs)
        query, documents = pairs // n, pairs % n
        if keep is not None:
            passes = (keep[documents >> 3] >> home.kind.cast(documents & 7, U8)) & 1
            passes = passes > 0
            query, documents = query[passes], documents[passes]
        counts = home.bincount(query, nq)
        starts = home.positions(np.cumsum(counts) - counts)
        named = home.full((nq, int(counts.max(initial=1))), -1, I64)
        named[query, home.arange(len(query)) - starts[query]] = documents
        if named.shape[1] > count:
            named = scan.maxsim(tokens, ptr, self.tokens, self.ptr, candidates=named, k=count).ids
        return home.sort(named)


def _offsets(numbers: np.ndarray, n: int) -> np.ndarray:
    """Where each of n numbers begins in a sorted list of them, and the end."""
    return np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=n))])
