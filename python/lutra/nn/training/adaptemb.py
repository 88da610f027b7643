"""AdaptEmb: frequent rows have a row of their own, the others share hashed ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _checks
from ._stored import Remapped, StoredEmbedding, StoredEmbeddingBag, hashed


class _AdaptEmb(Remapped):
    """AdaptEmb: frequent ids have a row of their own, the others share hashed ones.

    Parameters
    ----------
    counts : array of shape (num_embeddings,), optional
        How often each id occurs; the ``own`` most frequent get rows of their own (of equals the first). None:
        the first ids are taken for the most frequent, as in vocabularies that are sorted so.
    own : int, optional
        Rows for frequent ids; default num_embeddings / 16.
    shared : int, optional
        Rows that the others share, by a hash; default num_embeddings / 16.
    seed : int, optional
        Of the hash; default from torch's generator. A buffer.

    Notes
    -----
    Memory, `nbytes`: ``(own + shared) * dim`` values and the remap, four bytes an id. Rows of ``table`` are
    [0, own) the frequent ones, then the shared ones, then the padding's. Cost: one look-up more for each id;
    bags are reduced by `lutra.gather.bag`, gradients are those of ``table`` (``sparse=True``: its touched
    rows). With ``max_norm`` the rows of ``table`` are renormalised in place, as torch does.

    References
    ----------
    The hybrid of full and hashed rows by frequency: AdaptEmb in the survey of Li et al., Embedding
    Compression in Recommender Systems, ACM Computing Surveys 2024 (arXiv 2408.02304).
    """

    def _method(
        self, counts: Any = None, own: int | None = None, shared: int | None = None, seed: int | None = None
    ) -> None:
        n = self.num_embeddings
        own = max(1, n // 16) if own is None else _checks.integer("own", own, 0, n)
        shared = max(1, n // 16) if shared is None else _checks.integer("shared", shared, 1)
        self.own, self.shared = own, shared
        self._given = {"own": own, "shared": shared}
        self._seed(seed)
        device = self.weight.device
        if counts is None:
            order = torch.arange(n, device=device)
        else:
            counts = torch.as_tensor(np.asarray(counts) if not isinstance(counts, Tensor) else counts)
            if counts.shape != (n,):
                raise ValueError(f"counts has shape {tuple(counts.shape)}; it must be ({n},), one per id")
            order = torch.sort(counts.to(device), descending=True, stable=True).indices
        remap = hashed(torch.arange(n, device=device), self._seed_number(), shared) + own
        remap[order[:own]] = torch.arange(own, device=device)
        self.register_buffer("remap", remap.int())
        self._make(own + shared)

    def _index(self, ids: Tensor) -> Tensor:
        return self.remap[ids].long()

    def _fill(self, dense: Tensor) -> None:
        self._fill_means(dense)


class AdaptEmbedding(_AdaptEmb, StoredEmbedding):
    pass


class AdaptEmbeddingBag(_AdaptEmb, StoredEmbeddingBag):
    pass
