"""MemoryLinear: a dense layer replaced by hashed table look-ups."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._arrays import eager, quick, torch_kind, type_name
from ..address._sign_hash import SCORES
from ..torch_ops import ops, plain
from ._memory_ops import memory_linear

_quick = quick("memory_linear")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class MemoryLinear(torch.nn.Module):
    """The memory layer of MemoryFormer: a linear layer's place filled by table look-ups.

    The input is cut into ``in_features / bits`` chunks. The signs of a chunk choose one row of the chunk's
    own table, its magnitudes give the row a weight (`lutra.address.sign_hash`), and the output is the
    weighted sum of the rows plus a bias::

        out = bias + sum_k weight_k * tables[k, code_k]

    Parameters
    ----------
    in_features : int
        Size of the last axis of the input; a multiple of ``bits``.
    out_features : int
        Size of the last axis of the output.
    bits : int, default 8
        Values per chunk, 1 to 16. A table has ``2**bits`` rows.
    bias : bool, default True
    score : {'prob', 'scaled'}, default 'prob'
        The weight of a row, see `lutra.address.sign_hash`.
    temperature : float, default 1.0
        Softness of the weight; positive.
    device, dtype : optional
        Of the parameters; float32, float16, bfloat16 or float64 (slow: the NumPy reference computes it).

    Attributes
    ----------
    tables : Parameter, shape (in_features / bits, 2**bits, out_features)
        Initialised from N(0, 0.02).
    bias : Parameter, shape (out_features,), or None
        Initialised with zeros.

    Raises
    ------
    ValueError
        ``in_features`` is not a multiple of ``bits``, or an argument is out of range.

    Notes
    -----
    Input: (..., in_features), float32, float16, bfloat16 or float64, of any of these whatever the type of
    the tables. Output: (..., out_features) of the tables' type; under ``torch.autocast`` of autocast's (the
    tables are used as they are: casting all of them for the sake of a few rows would cost more than the
    layer).

    Cost at one token: ``in_features / bits`` rows are read instead of ``in_features``, so 1 / bits of a dense
    layer's memory traffic and arithmetic, for ``2**bits / bits`` times its parameters. Gradients go to the
    tables (dense), the bias and, through the weights, the input.

    References
    ----------
    Ding et al., MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers,
    NeurIPS 2024, arXiv 2411.12992.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.MemoryLinear(64, 32)
    >>> layer(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 32])
    """

    __constants__ = ("bits", "in_features", "out_features", "score", "temperature")

    in_features: int
    out_features: int
    bits: int
    score: str
    temperature: float
    tables: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 8,
        bias: bool = True,
        score: str = "prob",
        *,
        temperature: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _checks.integer("in_features", in_features, 0)
        self.out_features = _checks.integer("out_features", out_features, 0)
        self.bits = _checks.integer("bits", bits, 1, 16)
        if self.in_features % self.bits:
            raise ValueError(f"in_features is {in_features}; it must be a multiple of bits = {bits}")
        _checks.choice("score", score, SCORES)
        self.score = score
        self.temperature = _checks.positive("temperature", temperature)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in _DTYPES:
            raise TypeError(f"dtype is {dtype}; it must be float32, float16, bfloat16 or float64")
        shape = (self.in_features // self.bits, 2**self.bits, self.out_features)
        self.tables = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables from N(0, 0.02), set the bias to zero."""
        torch.nn.init.normal_(self.tables, std=0.02)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, shape (..., out_features) for ``x`` of shape (..., in_features)."""
        tables, bias = self.tables, self.bias
        if eager(x) and not torch.is_autocast_enabled("cpu"):
            out = _quick(x, tables, bias, self.bits, self.score, self.temperature)
            if out is not None:
                return out
        if x.dtype is not tables.dtype:
            x = self._of_one_precision(x, tables)
        if plain(x, tables, bias):
            kind = torch_kind(x.is_cuda)
            out = memory_linear(kind, x, tables, bias, self.bits, self.score, self.temperature)[0]
        else:
            out = ops.memory_linear(x, tables, bias, self.bits, self.score, self.temperature)[0]
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device) and out.dtype is not torch.float64:
            return out.to(torch.get_autocast_dtype(device))
        return out

    @staticmethod
    def _of_one_precision(x: Tensor, tables: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch tensor, got {type_name(x)}")
        if torch.float64 in (x.dtype, tables.dtype) and x.is_floating_point():
            return x.to(tables.dtype)  # float64 has no kernel: both steps in float64, or none
        return x

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"bias={self.bias is not None}, score={self.score!r}, temperature={self.temperature:g}"
        )
