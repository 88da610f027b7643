"""Candidates by centroid interaction (PLAID): MaxSim with each token in the place of its centroid."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import scan
from .._ranges import ranges
from ..scan import ResidualTokens

_PROBES = 4  # centroids of a query token whose documents are looked at


class CentroidInteraction:
    """The centroids of each document, and the documents of each centroid.

    A query's candidates are the documents of the centroids nearest to its tokens, by the sum over its tokens
    of the largest product with a centroid of the document (Santhanam et al. 2022, arXiv 2205.09707).
    """

    def __init__(self, docs: ResidualTokens, ptr: np.ndarray) -> None:
        self.n, count, d = len(ptr) - 1, len(docs.centroids), docs.centroids.shape[1]
        owner = np.repeat(np.arange(self.n), np.diff(ptr))
        owner, ids = np.divmod(
            np.unique(owner * count + docs.centroid_ids), count
        )  # a document names one once
        self.ptr = _offsets(owner, self.n)
        # a centroid is a token without a residual
        codes, values = np.zeros((len(ids), (d + 7) // 8), np.uint8), np.zeros(2, np.float32)
        self.tokens = ResidualTokens(codes, ids.astype(np.int32), docs.centroids, values, False)
        self.owners = owner[np.argsort(ids, kind="stable")]
        self.lists = _offsets(ids, count)

    def candidates(self, tokens: Any, ptr: np.ndarray, count: int, keep: np.ndarray | None) -> np.ndarray:
        """Positions (nq, count) of documents, rising, -1 where there are fewer. ``keep``: packed bits."""
        tokens = np.asarray(tokens, np.float32)
        near = scan.knn(tokens, self.tokens.centroids, min(_PROBES, len(self.tokens.centroids))).ids
        query = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr) * near.shape[1])
        begins, lengths = self.lists[near.ravel()], np.diff(self.lists)[near.ravel()]
        documents = self.owners[ranges(begins, lengths)]
        pairs = np.unique(np.repeat(query, lengths) * self.n + documents)
        empty = np.flatnonzero(np.diff(ptr) == 0)  # a query without tokens: all scores are 0
        if len(empty):
            pairs = np.unique(
                np.concatenate([pairs, np.add.outer(empty * self.n, np.arange(self.n)).ravel()])
            )
        query, documents = np.divmod(pairs, max(1, self.n))
        if keep is not None:
            passes = np.unpackbits(keep, bitorder="little")[: self.n].astype(bool)[documents]
            query, documents = query[passes], documents[passes]
        starts = _offsets(query, len(ptr) - 1)
        lists = np.full((len(ptr) - 1, int(np.diff(starts).max(initial=1))), -1)
        lists[query, np.arange(len(query)) - starts[query]] = documents
        if lists.shape[1] > count:
            lists = scan.maxsim(tokens, ptr, self.tokens, self.ptr, candidates=lists, k=count).ids
        return np.sort(lists, 1)


def _offsets(numbers: np.ndarray, n: int) -> np.ndarray:
    """Where each of n numbers begins in a sorted list of them, and the end."""
    return np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=n))])
