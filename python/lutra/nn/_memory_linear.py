"""MemoryLinear: a dense layer replaced by hashed table look-ups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks
from .._arrays import eager, quick, torch_kind, type_name
from ..address import sign_hash
from ..address._sign_hash import SCORES
from ..gather import quantize_rows
from ..gather import tables as gather_tables
from ..torch_ops import ops, plain
from ._autocast import autocast_output, autocasts
from ._hashes import make_projection, tree_codes
from ._memory_ops import TouchedLayer, TouchedRows, memory_linear

_quick = quick("memory_linear")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SCORES = {**SCORES, "none": -1}
_HASHES = {"sign": 0, "tree": 1}


class MemoryLinear(torch.nn.Module):
    """The memory layer of MemoryFormer: a linear layer's place filled by table look-ups.

    The input is cut into ``in_features / bits`` chunks. The signs of a chunk choose one row of the chunk's
    own table, its magnitudes give the row a weight (`lutra.address.sign_hash`), and the output is the
    weighted sum of the rows plus a bias::

        out = bias + sum_k weight_k * tables[k, code_k]

    Parameters
    ----------
    in_features : int
        Size of the last axis of the input; a multiple of ``bits`` unless there is a projection.
    out_features : int or sequence of int
        Size of the last axis of the output. Several sizes make several outputs that share the hash, such as
        queries, keys and values: ``forward`` returns a tuple, and the rows of all lie side by side, so that
        one look-up fetches them.
    bits : int, default 8
        Values per chunk, 1 to 16. A table has ``2**bits`` rows.
    bias : bool, default True
    score : {'prob', 'scaled', 'none'}, default 'prob'
        The weight of a row, see `lutra.address.sign_hash`; with 'none' it is 1 and the input gets no
        gradient.
    temperature : float, default 1.0
        Softness t of the weight; positive.
    learn_temperature : bool or {'layer', 'table'}, default False
        Train the temperature, one for the layer (True) or one for each table. The parameter is its logarithm:
        it stays positive, and a step of an optimizer scales it.
    projection : {None, 'dense', 'hadamard'}, default None
        Hash ``z = projection(x)`` in place of x, as LookupFFN does: a `torch.nn.Linear`, or a
        `HadamardProjection` of ``n log n`` cost.
    num_tables : int, optional
        Number of tables, free where there is a projection; ``in_features / bits`` otherwise.
    hash : {'sign', 'tree'}, default 'sign'
        With 'tree' the row is the leaf of a balanced tree of ``bits`` levels over the ``in_features /
        num_tables`` values of a chunk (MADDNESS). The trees are buffers (split_dims, thresholds); rows have
        weight 1, and the input gets no gradient.
    init_std : float, default 0.02
        Of the tables' initial values.
    sparse : bool, default False
        The gradient of the tables is a sparse tensor (2 sparse dimensions) of the rows that a call touched,
        for optimizers that take these (those of `lutra.optim`, ``torch.optim.SparseAdam``, ``SGD``): with few
        tokens a step costs what it touches. `lutra.optim`'s ``attach`` makes no gradient at all.
    device, dtype : optional
        Of the parameters; float32, float16, bfloat16 or float64 (slow: the NumPy reference computes it).

    Attributes
    ----------
    tables : Parameter, shape (num_tables, 2**bits, sum of out_features)
        Initialised from N(0, init_std); 0.02 is that of the published code of MemoryFormer and LookupFFN.
    bias : Parameter, shape (sum of out_features,), or None
        Initialised with zeros.
    log_temperature : Parameter, shape () or (num_tables, 1)
        Only where it is learned.
    projection : Module or None
        Initialised as torch does (dense), or to be orthogonal (hadamard).
    conversion_error : dict or None
        What `from_linear` measured.

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

    NaN: a chunk that holds one has a NaN weight, so the token's whole output is NaN, whatever the score and
    the hash. An infinite value counts as a sure sign (weight 1 with 'prob', infinite with 'scaled').

    Cost at one token: ``num_tables`` rows are read instead of ``in_features``, without a projection 1 / bits
    of a dense layer's memory traffic and arithmetic, for ``2**bits / bits`` times its parameters. Gradients
    go to the tables (dense unless ``sparse``), the bias and, through the weights, the input and the
    temperature. With
    ``w = S**s * p``, S the sum of a chunk's magnitudes, p the product of the sigmoids, s = 0 (prob) or 1
    (scaled), w is homogeneous of degree s in (z, t), so ``t dw/dt = s w - sum_i z_i dw/dz_i``; it is computed
    as ``t**s w(z / t, 1)``.

    References
    ----------
    Ding et al., MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers,
    NeurIPS 2024, arXiv 2411.12992. Zeng et al., LookupFFN: Making Transformers Compute-lite for CPU
    inference, ICML 2023. Blalock and Guttag, Multiplying Matrices Without Multiplying, ICML 2021,
    arXiv 2106.10860 (MADDNESS).

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.MemoryLinear(64, 32)
    >>> layer(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 32])
    >>> q, k, v = lutra.nn.MemoryLinear(64, (64, 64, 32))(torch.randn(5, 64))
    >>> v.shape
    torch.Size([5, 32])
    """

    __constants__ = ("bits", "in_features", "score", "sparse")

    #: Set by `lutra.optim`'s ``attach``.
    _attachment: Any = None
    _attached_name = "tables"
    #: Layers that were pickled before there was such an argument have none.
    sparse: bool = False

    in_features: int
    out_features: int | tuple[int, ...]
    bits: int
    score: str
    tables: Tensor
    bias: Tensor | None
    log_temperature: Tensor
    conversion_error: dict[str, float] | None = None
    scale: Tensor
    minimum: Tensor
    split_dims: Tensor
    thresholds: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        bits: int = 8,
        bias: bool = True,
        score: str = "prob",
        *,
        temperature: float = 1.0,
        learn_temperature: bool | str = False,
        projection: str | None = None,
        num_tables: int | None = None,
        hash: str = "sign",
        init_std: float = 0.02,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _checks.integer("in_features", in_features, 0)
        if isinstance(out_features, Sequence) and not isinstance(out_features, (str, bytes)):
            self.out_features = tuple(_checks.integer("out_features", n, 0) for n in out_features)
            if not self.out_features:
                raise ValueError("out_features is empty; it must be an integer or several")
            width = sum(self.out_features)
        else:
            width = self.out_features = _checks.integer("out_features", out_features, 0)
        _checks.choice("score", score, _SCORES)
        _checks.choice("hash", hash, _HASHES)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in _DTYPES:
            raise TypeError(f"dtype is {dtype}; it must be float32, float16, bfloat16 or float64")
        self.bits = _bits(bits, width, dtype)
        self.hash = hash
        self.score = "none" if hash == "tree" else score
        self.num_tables = self._number_of_tables(num_tables, projection)
        self._temperature = _checks.positive("temperature", temperature)
        self.init_std = _checks.positive("init_std", init_std)
        self.sparse = bool(sparse)
        if learn_temperature not in (False, True, "layer", "table"):
            raise ValueError(
                f"learn_temperature must be False, True, 'layer' or 'table'; got {learn_temperature!r}"
            )
        if learn_temperature and self.score == "none":
            raise ValueError(
                "learn_temperature needs a score: with 'none' (and trees) there is no temperature"
            )
        self.learn_temperature = "layer" if learn_temperature is True else learn_temperature
        options = {"device": device, "dtype": dtype}
        self.projection = make_projection(
            projection, self.in_features, self.num_tables * self.bits, **options
        )
        tables = torch.empty((self.num_tables, 2**self.bits, width), **options)
        _ask_for_huge_pages(tables)
        self.tables = torch.nn.Parameter(tables)
        self.register_parameter("bias", torch.nn.Parameter(torch.empty(width, **options)) if bias else None)
        if learn_temperature:
            shape = (self.num_tables, 1) if learn_temperature == "table" else ()
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            self.log_temperature = torch.nn.Parameter(torch.empty(shape, device=device, dtype=wide))
        if hash == "tree":
            shape = (self.num_tables, self.bits)
            self.register_buffer("split_dims", torch.zeros(shape, dtype=torch.int64, device=device))
            shape = (self.num_tables, 2**self.bits - 1)
            self.register_buffer("thresholds", torch.zeros(shape, dtype=torch.float32, device=device))
        self.quantized = False
        self.reset_parameters()

    def _number_of_tables(self, num_tables, projection):
        if num_tables is not None:
            num_tables = _checks.integer("num_tables", num_tables, 1)
        if projection is not None:
            if self.hash == "tree":
                raise ValueError("hash='tree' looks at the values themselves: projection must be None")
            return num_tables or -(-self.in_features // self.bits)
        if self.hash == "tree":
            number = num_tables or max(1, self.in_features // self.bits)
            if self.in_features % number:
                raise ValueError(
                    f"in_features is {self.in_features}; it must be a multiple of num_tables = {number}"
                )
            return number
        if self.in_features % self.bits:
            below, above = (
                self.in_features // self.bits * self.bits,
                -(-self.in_features // self.bits) * self.bits,
            )
            raise ValueError(
                f"in_features is {self.in_features}; it must be a multiple of bits = {self.bits} "
                f"(such as {below} or {above}), or the layer needs a projection"
            )
        number = self.in_features // self.bits
        if num_tables not in (None, number):
            raise ValueError(
                f"num_tables is {num_tables}; without a projection it is in_features / bits = {number}"
            )
        return number

    def reset_parameters(self) -> None:
        """Draw the tables from N(0, init_std), zero the bias, start temperature and projection anew."""
        if self.quantized:
            raise TypeError("the tables are quantized; they can no longer be initialised")
        torch.nn.init.normal_(self.tables, std=self.init_std)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)
        if self.learn_temperature:
            torch.nn.init.constant_(self.log_temperature, math.log(self._temperature))
        if self.projection is not None:
            self.projection.reset_parameters()

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: a number, or where it is learned a tensor of shape () or (num_tables, 1)."""
        return self.log_temperature.exp() if self.learn_temperature else self._temperature

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The output, shape (..., out_features), or a tuple of them, for ``x`` of (..., in_features)."""
        out = self._quickly(x)
        if out is None:
            out = self._usually(x)
        return out if type(self.out_features) is int else out.split(self.out_features, -1)

    def _quickly(self, x: Tensor) -> Tensor | None:
        """Inference in one call of the kernels, or None: at one token each attribute of a module counts."""
        if self.projection is not None or self.learn_temperature or self.score == "none":
            return None
        if not eager(x) or x.is_cuda or torch.is_autocast_enabled("cpu"):
            return None
        own, kept = self._parameters, self._buffers
        tables = kept.get("tables") if self.quantized else own.get("tables")
        return _quick(
            x, tables, own.get("bias"), self.bits, self.score, self._temperature,
            kept.get("scale"), kept.get("minimum"),
        )  # fmt: skip

    def _usually(self, x: Tensor) -> Tensor:
        ordinary = not (self.learn_temperature or self.quantized or self.score == "none" or self._touches())
        if ordinary and self.projection is None:
            return self._sum_rows(x)
        return self._general(x, ordinary)

    def _sum_rows(self, x: Tensor) -> Tensor:
        """Hash and look-up in one call: fixed temperature, a score, tables of a floating-point type."""
        tables, bias = self.tables, self.bias
        if eager(x) and not (x.is_cuda or torch.is_autocast_enabled("cpu")):
            out = _quick(x, tables, bias, self.bits, self.score, self._temperature, None, None)
            if out is not None:
                return out
        if x.dtype is not tables.dtype:
            x = self._of_one_precision(x, tables)
        if plain(x, tables, bias):
            kind = torch_kind(x.is_cuda)
            out = memory_linear(kind, x, tables, bias, self.bits, self.score, self._temperature, keep=False)[
                0
            ]
        else:
            out = ops.memory_linear(x, tables, bias, self.bits, self.score, self._temperature)[0]
        return autocast_output(out)

    @staticmethod
    def _of_one_precision(x: Tensor, tables: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch tensor, got {type_name(x)}")
        if torch.float64 in (x.dtype, tables.dtype) and x.is_floating_point():
            return x.to(tables.dtype)  # float64 has no kernel: both steps in float64, or none
        return x

    def _general(self, x: Tensor, ordinary: bool) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch tensor, got {type_name(x)}")
        if not x.is_floating_point():
            raise TypeError(
                f"x has dtype {str(x.dtype).removeprefix('torch.')}; it must be of a floating-point type"
            )
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; its last axis must be in_features = {self.in_features}"
            )
        if self.projection is not None:
            weight = next(self.projection.parameters())
            if x.dtype is not weight.dtype and not autocasts(x.device.type):
                x = x.to(weight.dtype)
            x = self.projection(x)
            if ordinary:
                return self._sum_rows(x)
        elif not self.quantized:
            x = self._of_one_precision(x, self.tables)
        elif eager(x) and self.score in SCORES and not (self.learn_temperature or autocasts("cpu")):
            arguments = x, self.tables, self.bias, self.bits, self.score, self._temperature
            out = _quick(*arguments, self.scale, self.minimum)
            if out is not None:
                return out
        if self._touches() and self.score in SCORES and not self.learn_temperature:
            options = self.bits, self.score, self._temperature
            out = TouchedLayer.apply(self.tables, self._take(), x, self.bias, *options)
            return autocast_output(out)
        codes, weights = self._hash(x)
        if not self.quantized:
            out = self._gather(codes, weights)
        else:
            out = gather_tables(self.tables, codes, weights, self.bias, self.scale, self.minimum)
        return autocast_output(out)

    def _gather(self, codes: Tensor, weights: Tensor) -> Tensor:
        if self._touches():
            return TouchedRows.apply(self.tables, self._take(), codes, weights, self.bias)
        return gather_tables(self.tables, codes, weights, self.bias)

    def _touches(self) -> bool:
        """Whether the tables' gradient is wanted, and not as a dense tensor."""
        wanted = self._attachment is not None or self.sparse
        return wanted and self.tables.requires_grad and torch.is_grad_enabled()

    def _take(self) -> Any:
        return None if self._attachment is None else self._attachment.take_tables(self)

    def _hash(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and weights of what is to be hashed."""
        if self.hash == "tree":
            return tree_codes(x, self.split_dims, self.thresholds)
        if self.score == "none":
            codes, weights = sign_hash(x.detach(), self.bits)
            return codes, weights * 0 + 1  # NaN stays NaN
        if not self.learn_temperature:
            return sign_hash(x, self.bits, self.score, self._temperature)
        t = self.log_temperature.exp()
        z = x.to(t.dtype) if x.dtype is not torch.float64 else x
        if self.learn_temperature == "table":
            z = (z.unflatten(-1, (self.num_tables, self.bits)) / t).flatten(-2)
            t = t.squeeze(-1)
        else:
            z = z / t
        codes, weights = sign_hash(z, self.bits, self.score)
        return codes, weights * t if self.score == "scaled" else weights

    @torch.no_grad()
    def quantize_(self) -> MemoryLinear:
        """Store the tables in 8 bits for inference, in place: a quarter of float32's memory and traffic.

        Each row gets a scale and a minimum of its own (`lutra.gather.quantize_rows`), 8 bytes beside its
        ``out_features``; ``tables`` becomes an int8 buffer and takes no gradient any more. To load such a
        checkpoint, call this on a layer of the same arguments first. Returns the layer.
        """
        if self.quantized:
            return self
        tables, width = self.tables.detach(), self.tables.shape[2]
        codes, scale, minimum = quantize_rows(tables.reshape(-1, width).float(), "int8")
        del self.tables
        self.register_buffer("tables", codes.view(tables.shape))
        self.register_buffer("scale", scale.view(tables.shape[:2]))
        self.register_buffer("minimum", minimum.view(tables.shape[:2]))
        self.quantized = True
        return self

    def _apply(self, fn, recurse=True):
        """`to`, `half` and the like, which leave a row's scale and a tree's thresholds in float32."""
        wide = {n: b for n, b in self._buffers.items() if b is not None and b.dtype is torch.float32}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            after = self._buffers[name]
            if after is not None and after.dtype is not torch.float32:
                self._buffers[name] = before.to(after.device)
        return self

    @classmethod
    def from_linear(cls, linear, calibration_inputs, method: str = "rotation", **options) -> MemoryLinear:
        """A trained `torch.nn.Linear` (or several of one input) as a memory layer.

        ``options``: bits, num_tables, score, temperature, held_back, ridge, iterations, seed; they, the two
        methods ('rotation', 'tree') and the report (`conversion_error`) are explained at
        ``lutra.nn._memory_convert.convert_linear`` and in docs/memoryformer.md.
        """
        from ._memory_convert import convert_linear

        return convert_linear(cls, linear, calibration_inputs, method, **options)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"bias={self.bias is not None}, score={self.score!r}"
        )
        if self.learn_temperature:
            text += f", learn_temperature={self.learn_temperature!r}"
        elif self.score != "none":
            text += f", temperature={self._temperature:g}"
        if self.projection is not None or self.hash == "tree":
            text += f", num_tables={self.num_tables}"
        if self.hash == "tree":
            text += ", hash='tree'"
        if self.sparse:
            text += ", sparse=True"
        return text + (", quantized" if self.quantized else "")


def _ask_for_huge_pages(tables: Tensor) -> None:
    """Rows that lie anywhere are found through far fewer entries of the processor's page tables."""
    if type(tables) is Tensor and tables.is_cpu and _backend.core is not None:
        _backend.core.huge_pages(tables.data_ptr(), tables.nbytes)


def _bits(bits, width, dtype) -> int:
    """``bits``, checked; the error says what a table of more would take."""
    if isinstance(bits, int) and not isinstance(bits, bool) and bits > 16:
        size = torch.empty((), dtype=dtype).element_size()
        taken = f"{2.0**bits * width * size / 1e9:,.3g} GB" if bits < 512 else "more than any machine has"
        raise ValueError(
            f"bits must be in [1, 16], got {bits}: one table of 2**{bits} rows of {width} values "
            f"would take {taken}"
        )
    return _checks.integer("bits", bits, 1, 16)
