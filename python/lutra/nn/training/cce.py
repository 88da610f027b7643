"""CCE: sums of hashed sub-tables, re-clustered while they train."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ... import _checks
from ...gather import bag
from ._stored import Stored, StoredEmbedding, StoredEmbeddingBag, hashed


class _CCE(Stored):
    """CCE: rows are sums of a clustered and a hashed entry in each of ``chunks`` chunks of columns.

    Parameters
    ----------
    k : int, optional
        Entries of each of the ``2 * chunks`` sub-tables; default num_embeddings / 64, at least 2.
    chunks : int, default 4
        Chunks of columns; a divisor of embedding_dim.
    every : int, optional
        `step` clusters after so many steps of the optimizer. None: only when `cluster` is called.
    until : int, optional
        The step after which `step` no longer clusters.
    points : int, default 256
        k-means is run on at most ``points * k`` ids, drawn at random.
    seed : int, optional
        Of hashes and clusterings; default from torch's generator. A buffer.

    Notes
    -----
    In chunk i row x is ``tables[i, pointers[i, x]] + tables[i, k + hash_i(x)]``. `cluster` runs k-means on
    these sums: centroids become the first ``k`` entries, assignments the pointers, the second ``k`` entries
    zero, and their hashes new ones. So rows that training made alike go on together, and those that a hash
    had thrown together can part.

    Memory, `nbytes`: ``2 * k * dim`` values and ``chunks`` pointers an id, of 2 bytes up to k = 32,768, else
    4. The optimizer's state does not know of a clustering. Look-ups are `lutra.gather.bag` of two entries a
    chunk.

    References
    ----------
    Tsang and Ahle, Clustering the Sketch: Dynamic Compression for Embedding Tables, NeurIPS 2023 (arXiv
    2210.05974).
    """

    def _method(
        self,
        k: int | None = None,
        chunks: int = 4,
        every: int | None = None,
        until: int | None = None,
        points: int = 256,
        seed: int | None = None,
    ) -> None:
        n, dim = self.num_embeddings, self.embedding_dim
        self.k = max(2, n // 64) if k is None else _checks.integer("k", k, 1)
        self.chunks = _checks.integer("chunks", chunks, 1)
        if dim % chunks:
            raise ValueError(f"chunks is {chunks}; it must divide embedding_dim, {dim}")
        self.every = None if every is None else _checks.integer("every", every, 1)
        self.until = None if until is None else _checks.integer("until", until, 0)
        self.points = _checks.integer("points", points, 1)
        self._given = {"k": self.k, "chunks": chunks}
        self._seed(seed)
        device, ids = self.weight.device, torch.arange(n, device=self.weight.device)
        kind = torch.int16 if self.k <= 1 << 15 else torch.int32
        first = torch.stack([hashed(ids, self._hash(i, -1), self.k) for i in range(chunks)])
        self.register_buffer("pointers", first.to(kind))
        self.register_buffer("clusterings", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int64))
        self._round: int | None = 0
        self.tables = torch.nn.Parameter(self._fresh(chunks, 2 * self.k, dim // chunks) * 0.5**0.5)
        if self.padding_idx is not None:
            self.register_buffer("padding_row", torch.zeros(dim, device=device, dtype=self.weight.dtype))

    def _hash(self, chunk: int, at: int) -> int:
        """The seed of a chunk's hash after ``at`` clusterings (-1: that of its first pointers)."""
        return self._seed_number() * 1_000_003 + (at + 1) * self.chunks + chunk

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._round = None

    def _entries(self, ids: Tensor) -> Tensor:
        """(n, chunks, 2) entries of the tables, stacked."""
        if self._round is None:
            self._round = int(self.clusterings)
        out = torch.empty(len(ids), self.chunks, 2, dtype=torch.int64, device=ids.device)
        for i in range(self.chunks):
            base = i * 2 * self.k
            out[:, i, 0] = self.pointers[i, ids].long() + base
            out[:, i, 1] = hashed(ids, self._hash(i, self._round), self.k) + (base + self.k)
        return out

    def _values(self, ids: Tensor) -> Tensor:
        flat = self.tables.reshape(-1, self.tables.shape[2])
        rows = bag(flat, self._entries(ids).view(-1, 2)).reshape(len(ids), self.embedding_dim)
        if self.padding_idx is not None:
            rows = torch.where((ids == self.padding_idx).unsqueeze(1), self.padding_row, rows)
        return rows

    def _rows(self, ids: Tensor) -> Tensor:
        return self._values(ids)

    # ---------------------------------------------------------------- clustering
    @torch.no_grad()
    def cluster(self) -> None:
        """Cluster the rows of every chunk, and begin with new hashes. Cost: k-means, and a pass over all
        ids.
        """
        dense = self.dense()
        if self.padding_idx is not None:  # not a row of the tables
            dense[self.padding_idx] = dense[(self.padding_idx + 1) % len(dense)]
        self._cluster(dense)

    def _cluster(self, dense: Tensor) -> None:
        from ...address import nearest
        from ...index import kmeans

        self._round = int(self.clusterings) + 1
        width = self.embedding_dim // self.chunks
        for i in range(self.chunks):
            x = dense[:, i * width : (i + 1) * width].float().contiguous()
            k = min(self.k, len(x))
            with warnings.catch_warnings():  # of few points for k: then a centroid is a point
                warnings.simplefilter("ignore", UserWarning)
                found = kmeans(
                    x, k, n_iter=10, max_points_per_centroid=self.points, progress=False,
                    seed=self._hash(i, self._round) % 2**31,
                ).centroids  # fmt: skip
            self.pointers[i] = nearest(x, found).ids.reshape(-1).to(self.pointers.dtype)
            self.tables[i] = 0
            self.tables[i, :k] = found.to(self.tables.dtype)
        self.clusterings.fill_(self._round)

    def _fill(self, dense: Tensor) -> None:
        self._cluster(dense)
        if self.padding_idx is not None:
            self.padding_row.copy_(dense[self.padding_idx])

    def reset_parameters(self) -> None:
        """Fresh tables: rows about N(0, 1)."""
        with torch.no_grad():
            self.tables.normal_(std=0.5**0.5)

    def step(self) -> None:
        """Count a step of the optimizer; `cluster` after every ``every``-th, up to ``until``."""
        self.steps += 1
        steps = int(self.steps)
        if self.every and steps % self.every == 0 and (self.until is None or steps <= self.until):
            self.cluster()


class CCEEmbedding(_CCE, StoredEmbedding):
    pass


class CCEEmbeddingBag(_CCE, StoredEmbeddingBag):
    pass
