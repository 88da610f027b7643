"""ProductKeyMemory: a large table of values that is read at its best product keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..address import product_keys
from ._autocast import autocast_output
from ._embedding_bag import EmbeddingBag

QUERY_NORMS: dict[Any, int] = {"batch": 0, "layer": 1, None: 2}


class ProductKeyQueries(torch.nn.Module):
    """What the layers on product keys share: an input becomes heads of queries, which choose keys.

    Parameters
    ----------
    in_features, num_sub_keys, heads, k, key_dim, query_norm, query_bias, device, dtype
        As in `ProductKeyMemory`.

    Attributes
    ----------
    query : Linear(in_features, heads * key_dim)
    norm : BatchNorm1d(heads * key_dim), LayerNorm(key_dim) or None
    keys : Parameter, shape (heads, 2, num_sub_keys, key_dim / 2)
    """

    def __init__(
        self, in_features: int, num_sub_keys: int, heads: int, k: int, key_dim: int | None,
        query_norm: str | None, query_bias: bool, device: Any, dtype: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = _checks.integer("in_features", in_features, 1)
        self.num_sub_keys = _checks.integer("num_sub_keys", num_sub_keys, 1, 65535)
        self.heads = _checks.integer("heads", heads, 1)
        self.k = _checks.integer("k", k, 1)
        if k > num_sub_keys:
            raise ValueError(f"k is {k}; it must be at most num_sub_keys = {num_sub_keys}")
        self.key_dim = _checks.integer("key_dim", in_features if key_dim is None else key_dim, 2)
        if self.key_dim % 2:
            raise ValueError(f"key_dim is {self.key_dim}; it must be even: a half for each set of sub-keys")
        _checks.choice("query_norm", query_norm, QUERY_NORMS)
        self.query_norm = query_norm
        factory = {"device": device, "dtype": dtype}
        width = self.heads * self.key_dim
        self.query = torch.nn.Linear(self.in_features, width, bias=query_bias, **factory)
        self.norm: torch.nn.Module | None = None
        if query_norm == "batch":
            self.norm = torch.nn.BatchNorm1d(width, **factory)
        elif query_norm == "layer":
            self.norm = torch.nn.LayerNorm(self.key_dim, **factory)
        shape = (self.heads, 2, self.num_sub_keys, self.key_dim // 2)
        self.keys = torch.nn.Parameter(torch.empty(shape, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sub-keys uniform within 1 / sqrt(key_dim / 2), the rest as torch's layers do."""
        self.query.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        bound = (self.key_dim // 2) ** -0.5
        torch.nn.init.uniform_(self.keys, -bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (float32 or float64) and ids of chosen keys, (n, heads, k), for inputs (n, in_features)."""
        q = self.query(x)
        if self.query_norm == "batch":
            q = self.norm(q)  # type: ignore[misc]
        q = q.view(-1, self.heads, self.key_dim)
        if self.query_norm == "layer":
            q = self.norm(q)  # type: ignore[misc]
        keys = self.keys
        if torch.float64 in (q.dtype, keys.dtype) and q.dtype != keys.dtype:
            q = q.to(keys.dtype)
        return product_keys(q, keys, self.k)

    def extra_repr(self) -> str:
        return (
            f"num_sub_keys={self.num_sub_keys}, heads={self.heads}, k={self.k}, key_dim={self.key_dim}, "
            f"query_norm={self.query_norm!r}"
        )


def flat_inputs(x: Tensor, in_features: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch tensor, got {type(x).__name__}")
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must be in_features = {in_features}")
    return x.reshape(-1, in_features)


class ProductKeyMemory(torch.nn.Module):
    """A memory layer: of ``num_sub_keys ** 2`` values each head sums the k whose product keys fit best.

    ::

        q = norm(query(x))                                  # heads queries of key_dim
        scores, ids = lutra.address.product_keys(q, keys, k)
        out = sum over heads and k of softmax(scores) * values[ids]

    With ``gated=True`` (Memory+) ``out = output(out * silu(gate(x)))``.

    Parameters
    ----------
    in_features : int
    out_features : int, optional
        Default in_features.
    num_sub_keys : int, default 256
        n; there are n * n values.
    heads : int, default 4
    k : int, default 32
        Values of a head.
    key_dim : int, optional
        Size of a head's query, even; default in_features.
    value_dim : int, optional
        Width of the table; default out_features. Where they differ, a linear map follows.
    values : EmbeddingBag, Parameter or ProductKeyMemory, optional
        A table to share: that of another layer, or any of shape (n * n, value_dim).
    gated : bool, default False
        Memory+: the result is gated by the input and mapped.
    query_norm : {'batch', 'layer', None}, default 'batch'
        'batch' is Lample's batch normalisation of all queries' features, 'layer' normalises each query.
    query_bias : bool, default True
    dropout : float, default 0.0
        Of the softmax's weights.
    sparse : bool, default False
        The gradient of the table is a sparse tensor of the touched rows. (Also with False only these are
        summed; the rest is zeros.)
    device, dtype : optional

    Attributes
    ----------
    chooser : ProductKeyQueries
        The query map, its normalisation and the sub-keys.
    values : EmbeddingBag
        The table is ``values.weight``, from N(0, 1 / value_dim). ``optimizer.attach(layer.values)`` of
        `lutra.optim` updates it in place, without a gradient of its size.
    gate, output : Linear or None

    Raises
    ------
    ValueError
        An argument out of range, a table of another shape, an input of another width.

    Notes
    -----
    Input (..., in_features), output (..., out_features). Cost of a token: the query map, 2 n key_dim
    multiply-adds a head, and heads * k rows of the table. Under autocast the query map and gate run in half
    precision; scores, softmax and the sum of rows are float32.

    References
    ----------
    Lample et al., Large Memory Layers with Product Keys, NeurIPS 2019, arXiv 1907.05242. Berges et al.,
    Memory Layers at Scale, 2024, arXiv 2412.09764.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> first = lutra.nn.ProductKeyMemory(64, num_sub_keys=32, heads=2, k=8, key_dim=16, gated=True)
    >>> second = lutra.nn.ProductKeyMemory(64, num_sub_keys=32, heads=2, k=8, key_dim=16, values=first)
    >>> second(first(torch.randn(2, 5, 64))).shape
    torch.Size([2, 5, 64])
    """

    values: EmbeddingBag

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        num_sub_keys: int = 256,
        heads: int = 4,
        k: int = 32,
        key_dim: int | None = None,
        value_dim: int | None = None,
        *,
        values: Any = None,
        gated: bool = False,
        query_norm: str | None = "batch",
        query_bias: bool = True,
        dropout: float = 0.0,
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
        if isinstance(values, ProductKeyMemory):
            values = values.values
        given = values.weight if isinstance(values, torch.nn.EmbeddingBag) else values
        if value_dim is None:
            value_dim = self.out_features if given is None else given.shape[-1]
        self.value_dim = _checks.integer("value_dim", value_dim, 1)
        self.values = self._table(values, given, sparse, device, dtype)
        self.gated, self.dropout = bool(gated), torch.nn.Dropout(dropout)
        self.gate: torch.nn.Linear | None = None
        self.output: torch.nn.Linear | None = None
        factory = {"bias": False, "device": device, "dtype": dtype}
        if gated:
            self.gate = torch.nn.Linear(in_features, self.value_dim, **factory)
        if gated or self.value_dim != self.out_features:
            self.output = torch.nn.Linear(self.value_dim, self.out_features, **factory)

    def _table(self, values: Any, given: Any, sparse: bool, device: Any, dtype: Any) -> EmbeddingBag:
        shape = (self.chooser.num_sub_keys**2, self.value_dim)
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(
                f"values has shape {tuple(given.shape)}; for num_sub_keys = {self.chooser.num_sub_keys} and "
                f"value_dim = {self.value_dim} it must be {shape}"
            )
        if isinstance(values, EmbeddingBag):
            if values.mode != "sum":
                raise ValueError(f"values has mode {values.mode!r}; it must be 'sum'")
            return values
        if given is not None and not isinstance(given, torch.nn.Parameter):
            raise TypeError(
                "values must be a lutra.nn.EmbeddingBag, a torch.nn.Parameter or a ProductKeyMemory, got "
                f"{type(values).__name__}"
            )
        table = EmbeddingBag(
            *shape, mode="sum", sparse=sparse, device="meta" if given is not None else device, dtype=dtype
        )
        if given is not None:
            table.weight = given
        else:
            torch.nn.init.normal_(table.weight, std=self.value_dim**-0.5)
        return table

    def reset_parameters(self) -> None:
        """Draw everything anew, the table too where it is shared."""
        self.chooser.reset_parameters()
        torch.nn.init.normal_(self.values.weight, std=self.value_dim**-0.5)
        for linear in (self.gate, self.output):
            if linear is not None:
                linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, (..., out_features), for inputs (..., in_features)."""
        flat = flat_inputs(x, self.in_features)
        scores, ids = self.chooser(flat)
        weights = self.dropout(scores.softmax(-1))
        length = self.chooser.heads * self.chooser.k
        out = self.values(ids.reshape(-1, length), per_sample_weights=weights.reshape(-1, length))
        if self.gate is not None:
            gate = torch.nn.functional.silu(self.gate(flat))
            out = out.to(gate.dtype) * gate
        if self.output is not None:
            out = self.output(out)
        return autocast_output(out).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"value_dim={self.value_dim}, gated={self.gated}"
        )
