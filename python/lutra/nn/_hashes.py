"""What a memory layer puts before its tables: projections of the input, and hashing by trees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from ..address import fwht
from ._autocast import autocasts


class HadamardProjection(torch.nn.Module):
    """A dense projection's place taken by diagonals and fast Walsh-Hadamard transforms: ``n log n`` a block.

    The input is padded with zeros to the next power of two n. A block maps it to ``H D_f ... H D_2 H D_1 x``
    with the orthogonal transform H (`lutra.address.fwht`) and learnable diagonals; as many blocks as
    ``out_features`` need are laid side by side, and a bias is added.

    Parameters
    ----------
    in_features, out_features : int
    factors : int, default 3
        Diagonals (and transforms) of a block.
    bias : bool, default True
    device, dtype : optional

    Attributes
    ----------
    diagonals : Parameter, shape (blocks, factors, n)
        Initialised with random signs, which makes a block orthogonal (three factors are as good as a random
        rotation for hashing: Yu et al.), times ``sqrt(n / in_features)`` in the last one: inputs of unit
        variance give outputs of unit variance.
    bias : Parameter, shape (out_features,), or None
        Initialised with zeros.

    References
    ----------
    Yu et al., Orthogonal Random Features, NeurIPS 2016, arXiv 1610.09072 (HD products). Zeng et al.,
    LookupFFN: Making Transformers Compute-lite for CPU inference, ICML 2023, who put block-diagonal
    matrices where the diagonals are here.

    Examples
    --------
    >>> import torch
    >>> from lutra.nn import HadamardProjection
    >>> HadamardProjection(48, 100)(torch.zeros(3, 48)).shape
    torch.Size([3, 100])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        factors: int = 3,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _checks.integer("in_features", in_features, 1)
        self.out_features = _checks.integer("out_features", out_features, 1)
        self.factors = _checks.integer("factors", factors, 1)
        self.width = 1 << (self.in_features - 1).bit_length()
        shape = (-(-self.out_features // self.width), self.factors, self.width)
        self.diagonals = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random signs in the diagonals, zeros in the bias."""
        self.diagonals.bernoulli_(0.5).mul_(2).sub_(1)
        self.diagonals[:, -1] *= math.sqrt(self.width / self.in_features)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The projection, shape (..., out_features), of ``x`` of shape (..., in_features)."""
        diagonals = self.diagonals
        device = x.device.type
        if autocasts(device):
            dtype = torch.get_autocast_dtype(device)
            x, diagonals = x.to(dtype), diagonals.to(dtype)
        blocks = diagonals.shape[0]
        x = torch.nn.functional.pad(x, (0, self.width - self.in_features)).unsqueeze(-2)
        for i in range(self.factors):
            x = fwht(x * diagonals[:, i], self.width**-0.5)
        z = x.flatten(-2)
        if self.out_features != blocks * self.width:
            z = z[..., : self.out_features]
        return z if self.bias is None else z + self.bias.to(z.dtype)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, factors={self.factors}, "
            f"bias={self.bias is not None}"
        )


PROJECTIONS = ("dense", "hadamard")


def make_projection(kind: str | None, in_features: int, out_features: int, **options):
    """The module behind a layer's ``projection`` argument; None for None."""
    if kind is None:
        return None
    if kind == "dense":
        return torch.nn.Linear(in_features, out_features, **options)
    if kind == "hadamard":
        return HadamardProjection(in_features, out_features, **options)
    raise ValueError(f"projection must be None, 'dense' or 'hadamard'; got {kind!r}")


def tree_codes(x: Tensor, dims: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves that the trees of MADDNESS send vectors to.

    Parameters
    ----------
    x : Tensor, shape (..., tables * size)
        Tree k sees values ``[k * size, (k + 1) * size)``.
    dims : Tensor, shape (tables, bits), int64
        The value that level l of tree k looks at.
    thresholds : Tensor, shape (tables, 2**bits - 1)
        Of the nodes, level by level: those of level l begin at ``2**l - 1``. Right where value >= threshold.

    Returns
    -------
    codes : Tensor, shape (..., tables), int32
        The leaf; the root's decision is its highest bit.
    weights : Tensor, shape (..., tables), float32 (float64 for float64 x)
        1; NaN where the tree's values hold a NaN.
    """
    tables, bits = dims.shape
    z = x.detach().reshape(-1, tables, x.shape[-1] // tables)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = z.gather(2, dims.expand(z.shape[0], tables, bits)).to(wide)
    flat = thresholds.reshape(-1).to(wide)
    first = torch.arange(tables, device=x.device) * thresholds.shape[1]
    code = torch.zeros(z.shape[:2], dtype=torch.int64, device=x.device)
    for level in range(bits):
        limit = flat[first + ((1 << level) - 1) + code]
        code = 2 * code + (values[:, :, level] >= limit)
    weights = torch.where(z.isnan().any(-1), float("nan"), 1.0).to(wide)
    shape = (*x.shape[:-1], tables)
    return code.to(torch.int32).reshape(shape), weights.reshape(shape)
