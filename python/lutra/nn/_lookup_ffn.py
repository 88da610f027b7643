"""LookupFFN: a transformer's feed-forward layer replaced by one hash and one look-up."""

from __future__ import annotations

import torch
from torch import Tensor

from ._memory_linear import MemoryLinear


class LookupFFN(torch.nn.Module):
    """The feed-forward layer of LookupFFN: normalise, project, hash, sum the rows of the tables.

    ``num_tables * bits`` projections of the normalised input are hashed by their signs, and the output is the
    weighted sum of one row of each table: no hidden layer, no activation function.

    Parameters
    ----------
    dim : int
        Size of the last axis of the input.
    out_features : int, optional
        ``dim`` where not given.
    num_tables : int, optional
        ``dim / bits``, rounded up, where not given. The paper's models of width 512 have 64 and 128.
    bits : int, default 8
    projection : {'hadamard', 'dense'}, default 'hadamard'
        `HadamardProjection`, of ``dim log dim`` cost, or `torch.nn.Linear`.
    score : {'scaled', 'prob', 'none'}, default 'scaled'
        'scaled' is the published code's weight.
    norm : bool, default True
        A LayerNorm before the projection. False where the input is normalised already.
    bias : bool, default True
    temperature, learn_temperature, device, dtype
        As in `MemoryLinear`.

    Attributes
    ----------
    norm : LayerNorm or None
    memory : MemoryLinear

    Notes
    -----
    The published code's fast projection has block-diagonal matrices between four transforms and adds 0.3
    of the input; here the matrices are diagonal. It is added to the residual by the caller.

    References
    ----------
    Zeng et al., LookupFFN: Making Transformers Compute-lite for CPU inference, ICML 2023.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.LookupFFN(48, num_tables=10, bits=6)
    >>> layer(torch.randn(2, 5, 48)).shape
    torch.Size([2, 5, 48])
    """

    def __init__(
        self,
        dim: int,
        out_features: int | None = None,
        *,
        num_tables: int | None = None,
        bits: int = 8,
        projection: str = "hadamard",
        score: str = "scaled",
        norm: bool = True,
        bias: bool = True,
        temperature: float = 1.0,
        learn_temperature: bool | str = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if projection not in ("dense", "hadamard"):
            raise ValueError(f"projection must be 'hadamard' or 'dense'; got {projection!r}")
        self.memory = MemoryLinear(
            dim, dim if out_features is None else out_features, bits, bias, score, temperature=temperature,
            learn_temperature=learn_temperature, projection=projection, num_tables=num_tables, device=device,
            dtype=dtype,
        )  # fmt: skip
        self.norm = torch.nn.LayerNorm(dim, device=device, dtype=dtype) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """The output, shape (..., out_features), for ``x`` of shape (..., dim)."""
        return self.memory(x if self.norm is None else self.norm(x))
