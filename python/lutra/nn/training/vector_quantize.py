"""VectorQuantize and ResidualVQ: vectors to entries of codebooks, with the gradient straight through."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks
from ._base import Regularized
from ._codebooks import codes_of, first_codebook, straight_through
from ._groups import check_rate


class Quantized(NamedTuple):
    """What a layer of vectors gives: the values that stand for them, and their codes."""

    values: Tensor
    codes: Tensor


class VectorQuantize(Regularized):
    """Vectors to their nearest entries of a codebook.

    Parameters
    ----------
    dim : int
    codebook_size : int
    decay : float, optional
        In [0, 1): the codebook is the moving average of the vectors assigned to its entries, updated in
        forward, in training. None: it is a Parameter and learns from `regularization`.
    commitment : float, default 0.25
        `regularization` is ``mean((c - sg(x))²) + commitment * mean((x - sg(c))²)`` over the last call, for
        vectors x and their entries c (sg: no gradient); with ``decay`` the second term only.
    cosine : bool, default False
        Vectors and entries are normalised; values are unit vectors.
    revive : float, default 0.0
        With ``decay``: entries whose moving count of vectors is below this are replaced by vectors of the
        call.
    first_batch : bool, default True
        The first call in training draws the codebook from its vectors (and 10 iterations of Lloyd).
    device, dtype : optional

    Attributes
    ----------
    codebook : Parameter, or with ``decay`` a buffer, shape (codebook_size, dim)

    Notes
    -----
    van den Oord, Vinyals, Kavukcuoglu, Neural Discrete Representation Learning, 2017, and its appendix for
    moving averages (with counts smoothed by 1e-5); revival as in Dhariwal et al., Jukebox, 2020; unit
    vectors as in Yu et al., Vector-quantized Image Modeling with Improved VQGAN, 2022. The gradient of the
    values is that of the vectors, straight through.

    Cost: 2 n codebook_size dim flops in `lutra.address.nearest`; no matrix of distances is written.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.VectorQuantize(8, 16)
    >>> values, codes = layer(torch.randn(4, 5, 8))
    >>> values.shape, codes.shape
    (torch.Size([4, 5, 8]), torch.Size([4, 5]))
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(
        self, dim: int, codebook_size: int, *, decay: float | None = None, commitment: float = 0.25,
        cosine: bool = False, revive: float = 0.0, first_batch: bool = True, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim = _checks.integer("dim", dim, 1)
        self.codebook_size = _checks.integer("codebook_size", codebook_size, 1)
        self.decay = None if decay is None else check_rate("decay", decay)
        if self.decay == 1:
            raise ValueError("decay is 1.0; it must be below 1, or the codebook would never change")
        self.commitment = check_rate("commitment", commitment, 0.0, math.inf)
        self.revive = check_rate("revive", revive, 0.0, math.inf)
        if self.revive and self.decay is None:
            raise ValueError("revive needs the moving counts of decay: give decay, such as 0.99")
        self.cosine, self.first_batch = bool(cosine), bool(first_batch)
        book = torch.randn(codebook_size, dim, device=device, dtype=dtype)
        if self.decay is None:
            self.codebook = torch.nn.Parameter(book)
        else:
            self.register_buffer("codebook", book)
            self.register_buffer("counts", torch.ones(codebook_size, device=device))
            self.register_buffer("sums", book.clone() if dtype == torch.float64 else book.float().clone())
        self.register_buffer("started", torch.tensor(not first_batch, device=device))

    def forward(self, x: Tensor) -> Quantized:
        """Quantize.

        Parameters
        ----------
        x : Tensor, shape (..., dim), floating point

        Returns
        -------
        values : Tensor, the shape and type of x
        codes : Tensor, shape (...), int64
        """
        flat = _flat(x, self.dim)
        if self.cosine:
            flat = F.normalize(flat, dim=1)
        if self.training and self.first_batch and len(flat) and not self.started:
            self._begin(flat)
        book = self._entries()
        codes = codes_of(flat, book)
        values = F.embedding(codes, book.to(flat.dtype))
        self._loss = None
        if self.training and len(flat):
            self._loss = self.commitment * F.mse_loss(flat, values.detach())
            if self.decay is None:
                self._loss = self._loss + F.mse_loss(values, flat.detach())
            else:
                self._update(flat.detach(), codes)
        return Quantized(straight_through(flat, values).reshape(x.shape), codes.reshape(x.shape[:-1]))

    def decode(self, codes: Tensor) -> Tensor:
        """Values (..., dim) of codes (...)."""
        return F.embedding(codes, self._entries())

    def _entries(self) -> Tensor:
        return F.normalize(self.codebook, dim=1) if self.cosine else self.codebook

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        book = first_codebook(x.detach(), self.codebook_size, 10)
        self.codebook.copy_(book)
        if self.decay is not None:
            self.sums.copy_(book)
            self.counts.fill_(1)
        self.started.fill_(True)

    @torch.no_grad()
    def _update(self, x: Tensor, codes: Tensor) -> None:
        """Moving averages of counts and sums; the codebook is their quotient."""
        k, x = self.codebook_size, x.to(self.sums.dtype)
        number = torch.bincount(codes, minlength=k).to(self.counts.dtype)
        total = torch.zeros_like(self.sums).index_add_(0, codes, x)
        self.counts.lerp_(number, 1 - self.decay)  # type: ignore[operator]
        self.sums.lerp_(total, 1 - self.decay)  # type: ignore[operator]
        if self.revive:
            dead = (self.counts < self.revive).nonzero().squeeze(1)
            if len(dead):
                self.sums[dead] = x[torch.randint(len(x), (len(dead),), device=x.device)] * self.revive
                self.counts[dead] = self.revive
        whole = self.counts.sum()
        smooth = (self.counts + 1e-5) / (whole + k * 1e-5) * whole
        book = self.sums / smooth.unsqueeze(1)
        self.codebook.copy_(F.normalize(book, dim=1) if self.cosine else book)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.codebook_size}, decay={self.decay}, cosine={self.cosine}"


class ResidualVQ(Regularized):
    """Vectors to sums of entries of several codebooks, each quantizing what the ones before leave.

    Parameters
    ----------
    dim : int
    num_quantizers : int
    codebook_size : int
    **options
        Of each `VectorQuantize` (not ``cosine``: what is left over is not a direction).

    Notes
    -----
    Zeghidour, Luebs, Omran, Skoglund, Tagliasacchi, SoundStream: An End-to-End Neural Audio Codec, 2021.
    Cost: num_quantizers times that of `VectorQuantize`.
    """

    def __init__(self, dim: int, num_quantizers: int, codebook_size: int, **options: Any) -> None:
        super().__init__()
        if options.get("cosine"):
            raise ValueError("cosine has no meaning here: residuals are not directions")
        number = _checks.integer("num_quantizers", num_quantizers, 1)
        self.dim = _checks.integer("dim", dim, 1)
        self.layers = torch.nn.ModuleList(
            VectorQuantize(dim, codebook_size, **options) for _ in range(number)
        )

    def forward(self, x: Tensor) -> Quantized:
        """Quantize.

        Parameters
        ----------
        x : Tensor, shape (..., dim), floating point

        Returns
        -------
        values : Tensor, the shape and type of x
        codes : Tensor, shape (..., num_quantizers), int64
        """
        flat = _flat(x, self.dim)
        rest, total, codes = flat, torch.zeros_like(flat), []
        for layer in self.layers:
            values, code = layer(rest)
            rest = rest - values.detach()
            total = total + values.detach()
            codes.append(code)
        shape = (*x.shape[:-1], len(self.layers))
        return Quantized(straight_through(flat, total).reshape(x.shape), torch.stack(codes, 1).reshape(shape))

    def decode(self, codes: Tensor) -> Tensor:
        """Values (..., dim) of codes (..., num_quantizers)."""
        return sum(layer.decode(codes[..., i]) for i, layer in enumerate(self.layers))

    def regularization(self) -> Tensor:
        """The sum over the quantizers."""
        return torch.stack([layer.regularization() for layer in self.layers]).sum()


def _flat(x: Tensor, dim: int) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() < 1 or x.shape[-1] != dim:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be {dim}")
    return x.reshape(-1, dim)
