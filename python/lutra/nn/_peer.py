"""PEER: a layer of very many experts of one neuron each, chosen by product keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..gather import bag, row_dots
from ._autocast import autocast_output
from ._product_keys import ProductKeyQueries, flat_inputs


class PEER(torch.nn.Module):
    """Parameter-efficient expert retrieval: of ``num_sub_keys ** 2`` neurons each head runs k.

    An expert is a neuron: a row u of ``down`` and a row v of ``up``. With the gates g, the softmax over a
    head's k scores::

        out = sum over heads and k of g_i * activation(<u_i, x>) * v_i

    Parameters
    ----------
    in_features : int
    out_features : int, optional
        Default in_features.
    num_sub_keys : int, default 256
        n; there are n * n experts.
    heads : int, default 8
    k : int, default 16
        Experts of a head.
    key_dim : int, optional
        Size of a head's query, even; default in_features.
    activation : callable, default torch.nn.functional.gelu
    gates : {'softmax', 'sigmoid'}, default 'softmax'
    query_norm : {'batch', 'layer', None}, default 'batch'
    query_bias : bool, default True
    sparse : bool, default False
        The gradients of both tables are sparse tensors of the touched rows.
    device, dtype : optional

    Attributes
    ----------
    chooser : ProductKeyQueries
    down : Parameter, shape (n * n, in_features)
        From N(0, 1 / in_features).
    up : Parameter, shape (n * n, out_features)
        From N(0, 1 / (heads * k)).

    Notes
    -----
    Input (..., in_features), output (..., out_features). A token reads heads * k rows of each table, forward
    and backward; no rows are copied: the products are `lutra.gather.row_dots`, the sum `lutra.gather.bag`.
    ``attach`` of `lutra.optim` has no form of this layer: use ``sparse=True`` with its optimizers.

    References
    ----------
    He, Mixture of A Million Experts, 2024, arXiv 2407.04153.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.PEER(64, num_sub_keys=32, heads=2, k=4, key_dim=16)
    >>> layer(torch.randn(3, 64)).shape
    torch.Size([3, 64])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        num_sub_keys: int = 256,
        heads: int = 8,
        k: int = 16,
        key_dim: int | None = None,
        *,
        activation: Callable[[Tensor], Tensor] = torch.nn.functional.gelu,
        gates: str = "softmax",
        query_norm: str | None = "batch",
        query_bias: bool = True,
        sparse: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.chooser = ProductKeyQueries(
            in_features, num_sub_keys, heads, k, key_dim, query_norm, query_bias, device, dtype
        )
        self.in_features = in_features
        self.out_features = _checks.integer(
            "out_features", in_features if out_features is None else out_features, 1
        )
        _checks.choice("gates", gates, {"softmax": 0, "sigmoid": 1})
        if not callable(activation):
            raise TypeError(f"activation must be callable, got {activation!r}")
        self.activation, self.gates, self.sparse = activation, gates, bool(sparse)
        factory = {"device": device, "dtype": dtype}
        experts = self.chooser.num_sub_keys**2
        self.down = torch.nn.Parameter(torch.empty(experts, in_features, **factory))
        self.up = torch.nn.Parameter(torch.empty(experts, self.out_features, **factory))
        self._draw()

    def _draw(self) -> None:
        torch.nn.init.normal_(self.down, std=self.in_features**-0.5)
        torch.nn.init.normal_(self.up, std=(self.chooser.heads * self.chooser.k) ** -0.5)

    def reset_parameters(self) -> None:
        """Draw everything anew."""
        self.chooser.reset_parameters()
        self._draw()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, (..., out_features), for inputs (..., in_features)."""
        flat = flat_inputs(x, self.in_features)
        scores, ids = self.chooser(flat)
        gates = scores.softmax(-1) if self.gates == "softmax" else scores.sigmoid()
        length = self.chooser.heads * self.chooser.k
        ids = ids.reshape(-1, length)
        if flat.dtype != self.down.dtype and torch.float64 in (flat.dtype, self.down.dtype):
            flat = flat.to(self.down.dtype)
        hidden = self.activation(row_dots(self.down, ids, flat, sparse_grad=self.sparse))
        weights = gates.reshape(-1, length) * hidden
        out = bag(self.up, ids, weights=weights, sparse_grad=self.sparse)
        return autocast_output(out).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"gates={self.gates!r}, sparse={self.sparse}"
        )
