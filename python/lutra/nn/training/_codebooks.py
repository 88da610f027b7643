"""Codebooks: the nearest entry, first values, and the gradient that passes straight through."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._arrays import torch_kind
from ...address import nearest


class StraightThrough(torch.autograd.Function):
    """``q`` forward; the gradient goes to ``x`` as if nothing had been done to it."""

    @staticmethod
    def forward(ctx, x, q):
        return q.view_as(q)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    """``q`` exactly (and not ``x + (q - x)``, which is rounded), with the gradient of ``x``."""
    return StraightThrough.apply(x, q.detach())


def codes_of(x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """The nearest entry (k, d) of each vector (n, d): int64 (n,), without gradient.

    By `lutra.address.nearest`, which writes no matrix of distances; half precision is searched in float32.
    On a CUDA device that lutra was built without, by torch in blocks.
    """
    x, codebook = x.detach(), codebook.detach()
    if x.dtype != torch.float64:
        x, codebook = x.float(), codebook.float()
    if x.is_cuda and torch_kind(True).kernels is None:
        return torch.cat([x.new_zeros(0).long(), *(_argmin(b, codebook, metric) for b in x.split(1 << 14))])
    return nearest(x, codebook, metric=metric).ids.squeeze(1)


def _argmin(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    products = x @ codebook.T
    if metric == "ip":
        return products.argmax(1)
    return (codebook.square().sum(1) - 2 * products).argmin(1)


@torch.no_grad()
def first_codebook(x: Tensor, k: int, iterations: int = 0) -> Tensor:
    """A codebook (k, d) for vectors (n, d): k of them, drawn with torch's generator, then Lloyd's iterations.

    With fewer than k vectors they repeat, with noise of a thousandth of their size. A centroid without
    vectors takes one of the vectors of the fullest.
    """
    n = x.shape[0]
    if n == 0 or x.is_meta:
        return x.new_zeros(k, x.shape[1]).normal_()
    if n >= k:
        book = x[torch.randperm(n, device=x.device)[:k]].clone()
    else:
        book = x[torch.arange(k, device=x.device) % n].clone()
        book[n:] += torch.randn_like(book[n:]) * (1e-3 * x.float().std(unbiased=False).to(x))
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    for _ in range(iterations):
        codes = codes_of(x, book)
        counts = torch.bincount(codes, minlength=k)
        sums = torch.zeros(k, x.shape[1], dtype=wide.dtype, device=x.device).index_add_(0, codes, wide)
        full = int(counts.argmax())
        means = sums / counts.clamp(min=1).unsqueeze(1)
        empty = (counts == 0).nonzero().squeeze(1)
        if len(empty):
            members = (codes == full).nonzero().squeeze(1)
            means[empty] = wide[members[torch.randint(len(members), (len(empty),), device=x.device)]]
        book = means.to(x)
    return book
