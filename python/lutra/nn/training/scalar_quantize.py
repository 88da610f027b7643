"""FSQ and LatentQuantize: every dimension of a vector on a few values of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks
from ._base import Regularized
from ._codebooks import straight_through
from ._groups import check_rate
from .vector_quantize import Quantized, _flat


def scalar_codes(x: Tensor, values: Tensor) -> Tensor:
    """The nearest of each dimension's own values: x (n, dim), values (dim, levels), int64 (n, dim).

    Without gradient; halfway between two values, the smaller. By binary search, log2(levels) steps a number.
    """
    with torch.no_grad():
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        ordered, order = values.detach().to(kind).sort(dim=1, stable=True)
        middle = (ordered[:, 1:] + ordered[:, :-1]) / 2
        place = torch.searchsorted(middle.contiguous(), x.detach().to(kind).T.contiguous())
        return order.gather(1, place).T.contiguous()


def scalar_values(codes: Tensor, values: Tensor) -> Tensor:
    """Values (n, dim) of codes, with a gradient to ``values`` (dim, levels)."""
    return values.gather(1, codes.T).T


def level_values(dim: int, levels: int, like: Tensor) -> Tensor:
    """Evenly spaced in [-1/2, 1/2], the same for each dimension: (dim, levels)."""
    if levels == 1:
        return like.new_zeros(dim, 1)
    return torch.linspace(-0.5, 0.5, levels, device=like.device, dtype=like.dtype).repeat(dim, 1)


class LatentQuantize(Regularized):
    """Each dimension of a vector to the nearest of its own learned values.

    Parameters
    ----------
    dim : int
    levels : int
        Values of each dimension.
    quantization : float, default 0.01
    commitment : float, default 0.01
        `regularization` is ``quantization * mean((v - sg(x))²) + commitment * mean((x - sg(v))²)`` over the
        last call, for numbers x and their values v (sg: no gradient).
    device, dtype : optional

    Attributes
    ----------
    values : Parameter, shape (dim, levels)
        Begin evenly spaced in [-1/2, 1/2].

    Notes
    -----
    Hsu, Dorrell, Whittington, Wu, Finn, Disentanglement via Latent Quantization, NeurIPS 2023 (QLAE). The
    paper relies on strong weight decay on the layers around. Cost: log2(levels) comparisons a number.
    """

    def __init__(
        self, dim: int, levels: int, *, quantization: float = 0.01, commitment: float = 0.01,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim = _checks.integer("dim", dim, 1)
        self.levels = _checks.integer("levels", levels, 1)
        self.quantization = check_rate("quantization", quantization, 0.0, math.inf)
        self.commitment = check_rate("commitment", commitment, 0.0, math.inf)
        like = torch.empty(0, device=device, dtype=dtype)
        self.values = torch.nn.Parameter(level_values(dim, levels, like))

    def forward(self, x: Tensor) -> Quantized:
        """Quantize.

        Parameters
        ----------
        x : Tensor, shape (..., dim), floating point

        Returns
        -------
        values : Tensor, the shape and type of x
        codes : Tensor, shape (..., dim), int64
        """
        flat = _flat(x, self.dim)
        codes = scalar_codes(flat, self.values)
        values = scalar_values(codes, self.values.to(flat.dtype))
        self._loss = None
        if self.training and len(flat):
            self._loss = scalar_loss(flat, values, self.quantization, self.commitment)
        return Quantized(straight_through(flat, values).reshape(x.shape), codes.reshape(x.shape))

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes, both (..., dim)."""
        return scalar_values(codes.reshape(-1, self.dim), self.values).reshape(codes.shape)

    def extra_repr(self) -> str:
        return f"{self.dim}, levels={self.levels}"


def scalar_loss(x: Tensor, values: Tensor, quantization: float, commitment: float) -> Tensor:
    return quantization * F.mse_loss(values, x.detach()) + commitment * F.mse_loss(x, values.detach())


class FSQ(torch.nn.Module):
    """Each dimension bounded and rounded to a fixed number of levels; all together are the code.

    Parameters
    ----------
    levels : sequence of int
        Levels of each dimension, at least 2; their product is the size of the codebook, at most 2^62.
    dim : int, optional
        Dimension of the vectors; where it is not ``len(levels)``, linear layers go from one to the other and
        back.
    device, dtype : optional

    Notes
    -----
    Mentzer, Minnen, Agustsson, Tschannen, Finite Scalar Quantization: VQ-VAE Made Simple, ICLR 2024, as in
    its appendix: ``b = tanh(z + s) h - o`` with ``h = (levels - 1)(1 + eps) / 2``, eps = .001, and for an
    even number of levels o = 1/2, s = atanh(o / h); then rounding, straight through, and division by
    ``levels // 2``, so values lie in [-1, 1]. Nothing to learn and no loss. Cost: a tanh a number.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.FSQ((8, 5, 5))
    >>> values, codes = layer(torch.randn(10, 3))
    >>> bool((layer.decode(codes) == values).all()), layer.codebook_size
    (True, 200)
    """

    level: Tensor
    place: Tensor

    def __init__(self, levels: Any, dim: int | None = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.levels = tuple(_checks.integer("levels", n, 2) for n in levels)
        if not self.levels:
            raise ValueError("levels must hold at least one number")
        self.codebook_size = math.prod(self.levels)
        if self.codebook_size > 1 << 62:
            raise ValueError(f"levels have the product {self.codebook_size}; it must be at most 2^62")
        count = len(self.levels)
        self.dim = count if dim is None else _checks.integer("dim", dim, 1)
        places = [math.prod(self.levels[:i]) for i in range(count)]
        self.register_buffer("level", torch.tensor(self.levels, device=device), persistent=False)
        self.register_buffer("place", torch.tensor(places, device=device), persistent=False)
        self.project_in: torch.nn.Module = torch.nn.Identity()
        self.project_out: torch.nn.Module = torch.nn.Identity()
        if self.dim != count:
            self.project_in = torch.nn.Linear(self.dim, count, device=device, dtype=dtype)
            self.project_out = torch.nn.Linear(count, self.dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Quantized:
        """Quantize.

        Parameters
        ----------
        x : Tensor, shape (..., dim), floating point

        Returns
        -------
        values : Tensor, the shape and type of x
        codes : Tensor, shape (...), int64
            Digits in the mixed radix of the levels, the first dimension the lowest.
        """
        flat = self.project_in(_flat(x, self.dim))
        bounded = self._bound(flat)
        rounded = straight_through(bounded, bounded.round())
        half = self.level // 2
        codes = ((rounded.detach().long() + half) * self.place).sum(1)
        values = self.project_out((rounded / half).to(flat.dtype))
        return Quantized(values.reshape(x.shape).to(x.dtype), codes.reshape(x.shape[:-1]))

    def decode(self, codes: Tensor) -> Tensor:
        """Values (..., dim) of codes (...)."""
        half = self.level // 2
        digits = codes.unsqueeze(-1) // self.place % self.level - half
        own = next(self.parameters(), None)
        return self.project_out(digits.to(torch.get_default_dtype() if own is None else own.dtype) / half)

    def _bound(self, z: Tensor) -> Tensor:
        wide = z if z.dtype == torch.float64 else z.float()
        half = (self.level - 1).to(wide.dtype) * ((1 + 1e-3) / 2)
        offset = (self.level % 2 == 0).to(wide.dtype) * 0.5
        return torch.tanh(wide + torch.atanh(offset / half)) * half - offset

    def extra_repr(self) -> str:
        return f"{self.levels}, dim={self.dim}"
