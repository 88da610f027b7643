"""TiedHead: the output layer that multiplies by an embedding's table, compressed or dense."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, _checks, scan
from ..gather._packed import KINDS
from ..scan._packed_logits import fused_tokens
from . import _lookup_loss, _tiles  # noqa: F401  (registers its op)
from ._compressed import Compressed
from ._sampled import sampled_loss
from ._shared import _Shared
from ._top import topk_of_logits, topk_of_scan, topk_of_tiles


class TiedHead(torch.nn.Linear):
    """Logits ``hidden @ table.T + bias``, the table being that of an embedding layer.

    The dense table is never built: formats that can compute logits from what they store do, of the others a
    tile of rows is decoded at a time. The head holds a reference to the embedding and no copy: it follows
    ``.to()``, ``load_state_dict``, ``copy.deepcopy`` and ``pickle`` of the model that has both. The
    embedding's parameters belong to the embedding: they are not among the head's, and not in its state_dict.

    Parameters
    ----------
    embedding : lutra.nn.*Embedding or torch.nn.Embedding
        Its table has shape (out_features, in_features). Tables in training have `MethodHead`.
    bias : None, True or Parameter of shape (num_embeddings,), optional
        True makes one of zeros, of the embedding's dtype.

    Attributes
    ----------
    in_features, out_features : int
        embedding_dim and num_embeddings.
    weight : Parameter
        That of the embedding: the dense table, or of shape (num_embeddings, 0) where it is compressed. It is
        there for libraries that tie, initialise or look at it; logits are computed from the embedding.
    bias : Parameter or None

    Notes
    -----
    A subclass of ``torch.nn.Linear``, for code that asks. The dtype of ``input`` must be the layer's, or that
    of autocast; so is the result. Under ``torch.nn.DataParallel`` replicas would compute with the first
    device's embedding: use DistributedDataParallel.

    Examples
    --------
    >>> import lutra, torch
    >>> embedding = lutra.nn.LowRankEmbedding(1000, 64, rank=8)
    >>> head = lutra.nn.TiedHead(embedding)
    >>> head(torch.randn(2, 3, 64)).shape
    torch.Size([2, 3, 1000])
    """

    def __init__(self, embedding: torch.nn.Embedding, bias: Any = None) -> None:
        if not isinstance(embedding, torch.nn.Embedding):
            raise TypeError(
                "embedding must be a torch.nn.Embedding or one of lutra.nn's, got "
                f"{type(embedding).__qualname__}"
            )
        embedding = _table_of(embedding)
        torch.nn.Module.__init__(self)  # not Linear's: that one allocates the dense table
        # In a tuple, so that the embedding is no submodule of the head: its tensors are in the state_dict
        # once.
        self._tied = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.weight = embedding.weight
        self._known = _text_of(embedding)
        if bias is None or bias is False:
            self.register_parameter("bias", None)
            return
        weight = embedding.weight
        if bias is True:
            bias = torch.zeros(self.out_features, device=weight.device, dtype=weight.dtype)
        elif not isinstance(bias, Tensor):
            raise TypeError(f"bias must be None, True or a Parameter, got {type(bias).__qualname__}")
        elif tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({self.out_features},)")
        self.bias = bias if isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias)

    @property
    def embedding(self) -> torch.nn.Embedding:
        """The layer whose table this is."""
        return self._tied[0]

    def reset_parameters(self) -> None:
        """Zeros in the bias; the table is the embedding's."""
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        layer = self.embedding
        how = layer.format.describe() if isinstance(layer, Compressed) else "dense"
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {how}"

    # ---------------------------------------------------------------- what a call needs
    def _dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype to compute in: the layer's, or autocast's."""
        if autocast(hidden):
            return torch.get_autocast_dtype(hidden.device.type)
        return self.embedding.weight.dtype

    def _flat(self, hidden: Tensor) -> Tensor:
        """``hidden`` as (n, in_features), in the dtype to compute in."""
        if hidden.dim() < 1 or hidden.shape[-1] != self.in_features:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}; its last dimension must be {self.in_features}"
            )
        dtype = self._dtype(hidden)
        if hidden.dtype != dtype:
            if not autocast(hidden) or not hidden.is_floating_point():
                raise TypeError(
                    f"hidden has dtype {hidden.dtype}, the embedding {dtype}; "
                    "they must be equal (or use autocast)"
                )
            hidden = hidden.to(dtype)
        return hidden.reshape(-1, self.in_features)

    def _source(self) -> tuple[list[Tensor], Tensor | None, str, int, int, int]:
        """A compressed table as the operators of `_tiles` take it."""
        layer: Any = self.embedding
        if self._known[0] is not layer.format:  # torch.compile cannot trace json
            self._known = _text_of(layer)
        config = self._known[1]
        pad = -1 if layer.padding_idx is None else layer.padding_idx
        arrays = list(layer._data().values())
        return arrays, layer.padding_row, config, layer.num_embeddings, layer.embedding_dim, pad

    def _rows(self, ids: Tensor) -> Tensor:
        """Rows of the table, differentiable."""
        layer: Any = self.embedding
        if not isinstance(layer, Compressed):
            return F.embedding(ids, layer.weight, sparse=layer.sparse)
        rows = layer.format.gather(layer._data(), layer._shape, ids, layer.sparse)
        if layer.padding_idx is not None:
            rows = torch.where(
                (ids == layer.padding_idx).unsqueeze(1), layer.padding_row.to(rows.dtype), rows
            )
        return rows

    # ---------------------------------------------------------------- logits
    def forward(self, input: Tensor) -> Tensor:
        """Logits, shape (\\*input.shape[:-1], out_features)."""
        layer: Any = self.embedding
        if not isinstance(layer, Compressed):
            return F.linear(input, layer.weight, self.bias)
        hidden = self._flat(input)
        pad, bias = layer.padding_idx, self.bias
        found = self._lookups(hidden)
        own = getattr(layer.format, "logits", None)
        if found is not None:
            tables, codes, bits = found
            out = scan.lookups(tables, codes, bias, bits=bits, dtype=str(hidden.dtype).removeprefix("torch."))
        elif (packed := packed_rows(layer)) is not None:
            codes, kind, group = packed
            out = scan.packed_logits(hidden, codes, bias, kind=kind, group=group)
        elif own is not None:
            out = own(layer._data(), layer._shape, hidden).to(hidden.dtype)
            if bias is not None:
                out = out + bias.to(out.dtype)
        else:
            out = torch.ops.lutra.tiled_logits(hidden, *self._source())
            if bias is not None:
                out = out + bias.to(out.dtype)
            pad = None  # the tile has it
        if pad is not None:
            out[:, pad] = self._pad_logits(hidden)
        return out.reshape(*input.shape[:-1], self.out_features)

    def _lookups(self, hidden: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Tables and codes whose look-ups add up to the logits, where there are some and they are faster."""
        layer: Any = self.embedding
        own = getattr(layer.format, "lookups", None) if isinstance(layer, Compressed) else None
        if own is None or not (hidden.is_cpu or hidden.is_meta or hidden.is_cuda):
            return None
        if hidden.is_cuda:
            m, bits = layer.format.m, layer.format.bits
            if hidden.dtype == torch.float64 or bits not in (1, 2, 4, 8):
                return None
            if m * bits > 8 * _row_bytes(hidden.device.index):
                return None
        return own(layer._data(), layer._shape, hidden) if lookups_pay(layer, hidden) else None

    def _topk_scan(self, hidden: Tensor) -> Any:
        """A function (k, bias) that selects inside the scan, where the format has one."""
        layer: Any = self.embedding
        if not isinstance(layer, Compressed) or not (hidden.is_cpu or hidden.is_cuda):
            return None
        found = self._lookups(hidden)
        if found is not None:
            tables, codes, bits = found
            return lambda k, bias: scan.lookups_topk(tables, codes, k, bias, bits=bits)
        packed = packed_rows(layer)
        if packed is None:
            return None
        codes, kind, group = packed
        cuda, wide = hidden.is_cuda, hidden.dtype == torch.float64
        if (cuda and wide) or hidden.shape[0] > fused_tokens(_backend.core, kind, False, cuda):
            return None
        return lambda k, bias: scan.packed_topk(hidden, codes, k, bias, kind=kind, group=group)

    def _pad_logits(self, hidden: Tensor) -> Tensor:
        """Logits (n,) of the padding row, which the embedding keeps apart."""
        layer: Any = self.embedding
        out = hidden @ layer.padding_row.to(hidden.dtype)
        return out if self.bias is None else out + self.bias[layer.padding_idx].to(out.dtype)

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits and their ids, without writing the others.

        Parameters
        ----------
        hidden : Tensor, shape (..., in_features)
        k : int
            At most out_features.

        Returns
        -------
        values, indices : Tensors, shape (..., k)
            Largest first, equal logits by increasing id. Compared in float32 (float64 for float64), values in
            the dtype of the logits. No gradient.
        """
        k = _checks.integer("k", k, 1, self.out_features)
        with torch.no_grad():
            flat = self._flat(hidden)
            scanned = self._topk_scan(flat)
            if scanned is not None:
                values, ids = topk_of_scan(self, flat, k, scanned)
            elif getattr(getattr(self.embedding, "format", None), "logits", None) is not None:
                # Thin products: to decode rows for a scan takes longer than to write the logits.
                wide = torch.promote_types(flat.dtype, torch.float32)
                values, ids = topk_of_logits(self(flat).to(wide), k)
            else:
                values, ids = topk_of_tiles(self, flat, k)
        shape = (*hidden.shape[:-1], k)
        return values.to(self._dtype(hidden)).reshape(shape), ids.reshape(shape)

    # ---------------------------------------------------------------- losses
    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        """``torch.nn.functional.cross_entropy`` of the logits, which are never written.

        They are computed in tiles of the vocabulary, forward and again backward, so that memory does not grow
        with tokens times vocabulary.

        Parameters
        ----------
        hidden : Tensor, shape (..., in_features)
        targets : Tensor, shape (...), int64
        ignore_index, label_smoothing, reduction
            As torch's. ``reduction`` is 'mean', 'sum' or 'none'.

        Returns
        -------
        Tensor
            float32 (float64 for float64); a scalar, or the shape of targets with 'none'.

        Raises
        ------
        IndexError
            A target outside [0, out_features) that is not ignore_index (on CUDA it is not looked for).
        TypeError, ValueError
            A wrong type, dtype, shape or option.
        """
        _checks.choice("reduction", reduction, {"mean": 0, "sum": 1, "none": 2})
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1]")
        flat = self._flat(hidden)
        labels = check_targets(hidden, targets, self.out_features, ignore_index)
        layer: Any = self.embedding
        found = self._lookups(flat)
        if found is not None:
            tables, codes, bits = found
            pad = -1 if layer.padding_idx is None else layer.padding_idx
            pads = None if pad < 0 else self._pad_logits(flat).to(tables.dtype)
            loss, _ = torch.ops.lutra.lookups_cross_entropy(
                tables, codes, labels, self.bias, pads, bits, pad, float(label_smoothing)
            )
            return reduce(loss, labels != ignore_index, targets.shape, reduction)
        if isinstance(layer, Compressed):
            arrays, pad_row, *table = self._source()
        else:
            arrays, pad_row, table = [layer.weight], None, [_tiles.DENSE, *layer.weight.shape, -1]
        loss, _ = torch.ops.lutra.tiled_cross_entropy(
            flat, labels, arrays, pad_row, self.bias, *table, float(label_smoothing)
        )
        return reduce(loss, labels != ignore_index, targets.shape, reduction)

    def sampled_softmax(
        self, hidden: Tensor, targets: Tensor, num_samples: int, *, distribution: Any = "log_uniform",
        unique: bool = True, remove_accidental_hits: bool = True, ignore_index: int = -100,
        reduction: str = "mean", generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Cross entropy against the target and ``num_samples`` sampled ids, not the whole vocabulary.

        The samples are shared by the tokens of a call. Each logit is corrected by the logarithm of how often
        its id is expected in the sample, so that the gradient's expectation is about the full softmax's. Only
        the rows of targets and samples are decoded, and only they have gradients.

        Parameters
        ----------
        hidden : Tensor, shape (..., in_features)
        targets : Tensor, shape (...), int64
        num_samples : int
        distribution : {'log_uniform', 'uniform'} or Tensor of shape (out_features,), default 'log_uniform'
            log_uniform: ids in the order of falling frequency, P(i) = log((i + 2) / (i + 1)) / log(V + 1). Or
            weights in proportion to the probabilities.
        unique : bool, default True
            Draw without repeats. (The expected counts are then those of as many draws as it took.)
        remove_accidental_hits : bool, default True
            A sample that is a token's target does not count against it.
        ignore_index, reduction
            As `cross_entropy`.
        generator : torch.Generator, optional

        References
        ----------
        Bengio, Senécal, Adaptive importance sampling to accelerate training of a neural probabilistic
        language model, 2008. Jean et al., On using very large target vocabulary for neural machine
        translation, 2015.
        """
        _checks.choice("reduction", reduction, {"mean": 0, "sum": 1, "none": 2})
        num_samples = _checks.integer("num_samples", num_samples, 1, self.out_features if unique else None)
        flat = self._flat(hidden)
        labels = check_targets(hidden, targets, self.out_features, ignore_index)
        used = labels != ignore_index
        loss = sampled_loss(
            self, flat, torch.where(used, labels, 0), num_samples, distribution, unique,
            remove_accidental_hits, generator,
        )  # fmt: skip
        return reduce(loss, used, targets.shape, reduction)


def _table_of(embedding: Any) -> Any:
    """The layer that has the table of an embedding; TypeError where none has one to multiply by."""
    from .training import MethodEmbedding

    name = type(embedding).__qualname__
    if isinstance(embedding, _Shared):
        return embedding.embedding
    if isinstance(embedding, MethodEmbedding):
        raise TypeError(
            f"embedding is a {name}, a table in training whose weight is not its rows: use "
            "lutra.nn.MethodHead(embedding), which lutra.nn.finish makes a TiedHead"
        )
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    if not isinstance(embedding, Compressed) and tuple(embedding.weight.shape) != shape:
        raise TypeError(
            f"embedding is a {name}, which holds no table of shape {shape} to multiply by; use a dense "
            "embedding or one in a format of lutra.compress"
        )
    return embedding


def _text_of(layer: Any) -> tuple[Any, str]:
    """A layer's format, and it as text."""
    format = getattr(layer, "format", None)
    return format, "" if format is None else json.dumps(format.config(), sort_keys=True)


# Nanoseconds on one core of a Zen 4, of the ways to a logit (benchmarks/bench_heads.py): of a look-up, of a
# multiply-add of the matrix product, and of decoding a value, which all tokens share.
_LOOKUP, _PRODUCT, _DECODE = {4: 0.076, 2: 0.055}, {4: 0.029, 2: 0.009}, 0.33
# Picoseconds on an H100 by its limits (nothing of it is measured): 32 look-ups a cycle and multiprocessor,
# the rates of matrix products, 3 bytes of memory traffic a value.
_CUDA_LOOKUP, _CUDA_PRODUCT, _CUDA_DECODE = 0.14, {4: 0.039, 2: 0.0027}, 1.0


@torch.compiler.assume_constant_result
def _row_bytes(device: int | None) -> int:
    """The longest rows of codes that a GPU's shared memory has tables for; longer ones are slow."""
    if _backend.cuda is None:
        return 64  # an A100's
    return _backend.cuda.lookups_row_bytes(torch.cuda.current_device() if device is None else device)


def lookups_pay(layer: Any, hidden: Tensor) -> bool:
    """Whether look-ups are faster than decoding tiles and multiplying by them."""
    tokens, size = max(hidden.shape[0], 1), min(hidden.element_size(), 4)
    if hidden.is_cuda:
        product = layer.embedding_dim * (_CUDA_PRODUCT[size] + _CUDA_DECODE / tokens)
        return layer.format.m * _CUDA_LOOKUP <= product
    product = layer.embedding_dim * (_PRODUCT[size] + _DECODE / tokens)
    return layer.format.m * _LOOKUP[size] <= product


def packed_rows(layer: Any) -> tuple[Tensor, str, int | None] | None:
    """The packed rows of a layer's table, their kind and their group, where it is stored so."""
    kind = getattr(layer.format, "kind", None)
    return (layer.codes, kind, layer.format.columns) if kind in KINDS and hasattr(layer, "codes") else None


def autocast(hidden: Tensor) -> bool:
    return (hidden.is_cpu or hidden.is_cuda) and torch.is_autocast_enabled(hidden.device.type)


def check_targets(hidden: Tensor, targets: Tensor, rows: int, ignore_index: int) -> Tensor:
    """Targets as (n,) int64."""
    if targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}; it must be int64")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; hidden has {tuple(hidden.shape)}: "
            f"it must be {tuple(hidden.shape[:-1])}"
        )
    flat = targets.reshape(-1)
    if flat.is_cpu and not torch.compiler.is_compiling() and flat.numel():
        wrong = ((flat < 0) | (flat >= rows)) & (flat != ignore_index)
        if bool(wrong.any()):
            place = int(wrong.to(torch.uint8).argmax())
            raise IndexError(f"targets[{place}] is {int(flat[place])}; it must be in [0, {rows})")
    return flat


def reduce(loss: Tensor, used: Tensor, shape: Any, reduction: str) -> Tensor:
    loss = torch.where(used, loss, 0)
    if reduction == "none":
        return loss.reshape(shape)
    return loss.sum() / used.sum() if reduction == "mean" else loss.sum()
