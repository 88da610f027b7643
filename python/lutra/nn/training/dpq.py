"""DPQ and MGQE: rows from codebooks that are learned with the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks
from ._base import BLOCK, MethodEmbedding, MethodEmbeddingBag, TrainingMethod
from ._codebooks import codes_of, first_codebook, straight_through
from ._groups import check_rate, row_order
from ._pq import pq_bytes, pq_table

if TYPE_CHECKING:
    from ...compress import Table

VARIANTS = {"vq": 0, "softmax": 1}
EPS = 1e-5


class Choice(torch.autograd.Function):
    """``(hard + p - sg(p)) @ values`` for the entries that are taken, without a tensor of ones and zeros."""

    @staticmethod
    def forward(ctx, p, entries, values):
        ctx.save_for_backward(values)
        return entries.view_as(entries)

    @staticmethod
    def backward(ctx, grad):
        (values,) = ctx.saved_tensors
        # The gradient to values is that of hard, and flows through entries.
        return torch.einsum("nmd,mkd->nmk", grad, values), grad, None


class DPQ(TrainingMethod):
    """Differentiable product quantization: each of m parts of a row is an entry of its codebook.

    ``weight`` holds the queries; what is looked up is quantized, and after training only codes and codebooks
    are kept.

    Parameters
    ----------
    m : int, default 16
        Parts of a row; divides embedding_dim.
    k : int, default 256
        Entries of a codebook, at most 256 (what format 'pq' stores).
    variant : {'vq', 'softmax'}, default 'vq'
        'vq': the entry nearest to the query; the gradient of the result goes straight through to the query,
        and codebooks learn from `regularization` alone. 'softmax': the entry whose key has the largest
        product with the query; forward one entry, backward the softmax over all, which gives gradients to
        queries, keys and values; keys and values are two codebooks.
    shared : bool, default False
        One codebook for all parts. (Format 'pq' stores it m times.)
    commitment : float, default 0.25
        'vq': `regularization` is ``mean((c - sg(q))²) + commitment * mean((sg(c) - q)²)`` over the last
        call, for queries q and their entries c (sg: no gradient). 'softmax': ``-commitment * mean(log p)``
        of the entries taken.
    temperature : float, default 1.0
        Of the softmax.
    normalize : bool, default True
        'softmax': products are batch-normalised for each part and entry, so that all are used.

    Notes
    -----
    Chen, Li, Sun, Differentiable Product Quantization for End-to-End Embedding Compression, ICML 2020. The
    commitment terms are those of the published code (the paper has the first term of 'vq' only); products
    have the paper's sign (the published code's 'dot' metric takes the smallest product), and are normalised
    for each part and entry where it pools the parts.

    First codebooks are drawn from the queries; `fit_codebooks` draws again, after the queries were set from
    elsewhere.

    Cost of a step for n ids: 'vq' 2 n k dim flops (`lutra.address.nearest`) and a look-up; 'softmax' about 6
    n k dim flops and n m k floats of memory. The gradient is that of a plain embedding.

    Becomes: 'pq'.
    """

    codebook: torch.nn.Parameter
    keys: torch.nn.Parameter
    running_mean: Tensor
    running_var: Tensor

    def _method(
        self, *, m: int = 16, k: int = 256, variant: str = "vq", shared: bool = False,
        commitment: float = 0.25, temperature: float = 1.0, normalize: bool = True,
    ) -> None:  # fmt: skip
        dim = self.embedding_dim
        self.m = _checks.integer("m", m, 1, dim)
        if dim % self.m:
            raise ValueError(f"m is {m}; it must divide embedding_dim, {dim}")
        self.k = _checks.integer("k", k, 1, 256)
        _checks.choice("variant", variant, VARIANTS)
        self.variant, self.shared = variant, bool(shared)
        self.commitment = check_rate("commitment", commitment, 0.0, math.inf)
        self.temperature = _checks.positive("temperature", temperature)
        self.normalize = bool(normalize)
        shape = (1 if self.shared else self.m, self.k, dim // self.m)
        like = self.weight.detach()
        self.codebook = torch.nn.Parameter(like.new_empty(shape))
        if variant == "softmax":
            self.keys = torch.nn.Parameter(like.new_empty(shape))
            self.register_buffer("running_mean", like.new_zeros(self.m * self.k))
            self.register_buffer("running_var", like.new_ones(self.m * self.k))
        self.fit_codebooks()

    @torch.no_grad()
    def fit_codebooks(self, iterations: int = 0) -> None:
        """Draw codebooks from the queries, then run so many of Lloyd's iterations ('vq').

        Parameters
        ----------
        iterations : int, default 0
        """
        _checks.integer("iterations", iterations, 0)
        parts = self.weight.detach().reshape(self.num_embeddings, self.m, self.embedding_dim // self.m)
        for j, book in enumerate(self.codebook):
            x = parts.reshape(-1, parts.shape[2]) if self.shared else parts[:, j]
            book.copy_(first_codebook(x, self.k, iterations))
            if self.variant == "softmax":
                self.keys[j].copy_(first_codebook(x, self.k))

    def codes(self, ids: Tensor | None = None) -> Tensor:
        """The codes of rows (of all rows, by default): int64 (n, m)."""
        if ids is None:
            every = torch.arange(self.num_embeddings, device=self.weight.device)
            return torch.cat([self.codes(block) for block in every.split(BLOCK)])
        raw = self.weight.detach()[ids]
        return self._codes(raw.reshape(len(ids), self.m, self.embedding_dim // self.m), ids)

    def _codes(self, x: Tensor, ids: Tensor) -> Tensor:
        """Codes (n, m) of queries (n, m, d)."""
        metric, book = "l2", self.codebook.detach()
        if self.variant == "softmax":
            # (<q, key> - mean) / std is a product too: of (q, 1) and (key / std, -mean / std)
            metric, book = "ip", self.keys.detach()
            if self.normalize:
                scale = (self.running_var + EPS).rsqrt().reshape(self.m, self.k, 1)
                bias = -scale * self.running_mean.reshape(self.m, self.k, 1)
                book = torch.cat([book * scale, bias], 2)
                x = F.pad(x.detach(), (0, 1), value=1.0)
        if book.shape[0] == 1:
            return self._search(x.reshape(-1, x.shape[2]), book[0], metric, ids).reshape(x.shape[:2])
        return torch.stack([self._search(x[:, j], book[j], metric, ids) for j in range(self.m)], 1)

    def _search(self, x: Tensor, book: Tensor, metric: str, ids: Tensor) -> Tensor:
        return codes_of(x, book, metric)

    def _decode(self, codes: Tensor) -> Tensor:
        """Entries (n, m, d) of codes, with a gradient to the codebook."""
        books = self.codebook
        if len(books) > 1:
            codes = codes + torch.arange(self.m, device=codes.device) * self.k
        return F.embedding(codes, books.reshape(-1, books.shape[2]))

    def _transform(self, raw: Tensor, ids: Tensor, training: bool) -> Tensor:
        x = raw.reshape(raw.shape[0], self.m, self.embedding_dim // self.m)
        if self.variant == "softmax" and training:
            return self._soften(x).reshape(raw.shape)
        entries = self._decode(self._codes(x, ids))
        if training and len(x):
            pull = F.mse_loss(entries, x.detach())
            self._loss = pull + self.commitment * F.mse_loss(x, entries.detach())
        if self.variant == "softmax":
            return entries.reshape(raw.shape)
        return straight_through(raw, entries.reshape(raw.shape))

    def _soften(self, x: Tensor) -> Tensor:
        """One entry forward, the softmax over all backward."""
        keys, values = (b.expand(self.m, -1, -1) for b in (self.keys, self.codebook))
        response = torch.einsum("nmd,mkd->nmk", x, keys)
        if self.normalize:
            flat = F.batch_norm(
                response.flatten(1), self.running_mean, self.running_var, training=len(x) > 1, eps=EPS
            )
            response = flat.reshape(response.shape)
        codes = response.detach().argmax(2)
        p = torch.softmax(response / self.temperature, 2)
        if len(x):
            taken = p.gather(2, codes.unsqueeze(2))
            self._loss = -self.commitment * torch.log(taken + 1e-10).mean()
        return Choice.apply(p, self._decode(codes), values.detach())

    def _table(self) -> Table:
        return pq_table(self, self.codes(), self.codebook.detach())

    def nbytes_compressed(self) -> int:
        return pq_bytes(self, self.m, self.k)


class MGQE(DPQ):
    """Multi-granular quantized embeddings: DPQ; rare rows see only the first entries of codebooks.

    Parameters
    ----------
    m, k, shared, commitment
        As for DPQ ('vq').
    tail_k : int, default 64
        Entries that rare rows see, at most k.
    head : float, default 0.1
        Share of the rows that see all k: the most frequent.
    counts : array, shape (num_embeddings,), optional
        How often each row is used. Without it rows are taken as ordered by frequency, the most frequent
        first.

    Notes
    -----
    Kang, Cheng, Chen, Yi, Lin, Hong, Chi, Learning Multi-granular Quantized Embeddings for Large-Vocab
    Categorical Features in Recommender Systems, 2020: two groups, codebooks shared, the number of centroids
    varied, as the paper recommends. The codes of rare rows would fit in fewer bits; format 'pq' stores all
    in log2(k), and `nbytes_compressed` says so. What remains is the gain in quality: few, well trained
    entries for rare rows.

    Cost of a step: (1 + tail_k / k) of DPQ's search, since both searches are done for each id (sizes that do
    not depend on the data suit compilers and devices).

    Becomes: 'pq'.
    """

    frequent: Tensor

    def _method(  # type: ignore[override]
        self, *, m: int = 16, k: int = 256, tail_k: int = 64, head: float = 0.1, counts: Any = None,
        shared: bool = False, commitment: float = 0.25,
    ) -> None:  # fmt: skip
        _checks.integer("k", k, 1, 256)
        self.tail_k = _checks.integer("tail_k", tail_k, 1, k)
        self.head = check_rate("head", head)
        order = row_order(self.num_embeddings, counts)
        frequent = torch.zeros(self.num_embeddings, dtype=torch.bool)
        frequent[torch.from_numpy(order[: round(self.head * self.num_embeddings)])] = True
        self.register_buffer("frequent", frequent.to(self.weight.device))
        super()._method(m=m, k=k, shared=shared, commitment=commitment)

    def _search(self, x: Tensor, book: Tensor, metric: str, ids: Tensor) -> Tensor:
        frequent = self.frequent[ids].repeat_interleave(len(x) // max(1, len(ids)))
        return torch.where(frequent, codes_of(x, book, metric), codes_of(x, book[: self.tail_k], metric))


class DPQEmbedding(DPQ, MethodEmbedding):
    pass


class DPQEmbeddingBag(DPQ, MethodEmbeddingBag):
    pass


class MGQEEmbedding(MGQE, MethodEmbedding):
    pass


class MGQEEmbeddingBag(MGQE, MethodEmbeddingBag):
    pass
