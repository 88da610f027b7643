"""Embedding layers whose table is stored in a format of `lutra.compress`.

For every registered format there is ``lutra.nn.<Layer>Embedding`` and ``lutra.nn.<Layer>EmbeddingBag``, made
here. They are instances of torch's classes, and hold, beside the arrays of the format, two things for others'
code:

- ``weight``, a Parameter of shape (num_embeddings, 0): no memory, but the dtype, device and length that
libraries
  read off an embedding, and something that initialisers and weight tying can be let loose on without harm.
  What multiplies by it fails with an error about shapes; nothing computes with it silently.
- ``format_json``, the format in the state_dict, so that a checkpoint says what it is and a wrong one is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..compress._table import Table, check_counts, dense_table
from ..compress.formats.base import Format, make


class Compressed(torch.nn.Module):
    """What the compressed Embedding and EmbeddingBag share; not a layer itself."""

    format_class: ClassVar[type[Format]]
    format: Format
    _names: tuple[str, ...]
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    #: Settings of torch's layer with their defaults: what `from_table` takes.
    _defaults: ClassVar[dict[str, Any]]
    #: Sets everything up: format, data, rows, dim, the settings, device, dtype.
    _begin: Callable[..., None]

    # ---------------------------------------------------------------- building
    @classmethod
    def from_table(cls, table: Table, *, dtype: Any = None, device: Any = None, **settings: Any) -> Any:
        """A layer from a `lutra.compress.Table`.

        Parameters
        ----------
        table : Table
        dtype, device : optional
        **settings
            As in the constructor: padding_idx, sparse, mode, ...

        Raises
        ------
        TypeError
            A setting that the layer does not have.
        ValueError
            A table in another format.
        """
        unknown = sorted(set(settings) - set(cls._defaults))
        if unknown:
            raise TypeError(f"from_table has no setting {unknown[0]!r}; there are {sorted(cls._defaults)}")
        given = {**cls._defaults, **settings}
        layer = cls.__new__(cls)
        layer._begin(
            table.format,
            table.data,
            *table.shape,
            device=device,
            dtype=dtype,
            **given,
            **cls._taken(table, given),
        )
        return layer

    @classmethod
    def _taken(cls, table: Table, settings: dict[str, Any]) -> dict[str, Any]:
        """What `_begin` takes of a table besides its data."""
        return {}

    def _build(self, format: Format, data: dict[str, Any] | None, device: Any, dtype: Any) -> None:
        """Register the arrays: of ``data`` (NumPy or torch), or fresh ones."""
        self.format = format
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating point type, got {dtype}")
        shape = (self.num_embeddings, self.embedding_dim)
        arrays = format.arrays(shape)
        self._names = tuple(arrays)  # worked out once: a call must not ask the format for its shapes
        meta = device is not None and torch.device(device).type == "meta"
        if data is None and not meta:
            data = format.initial(shape, int(torch.randint(2**31, ())))
        placeholder = torch.empty((self.num_embeddings, 0), device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(placeholder, requires_grad=False)
        for name, array in arrays.items():
            own = dtype if array.dtype == "float32" else getattr(torch, array.dtype)
            if meta:
                value = torch.empty(array.shape, dtype=own, device="meta")
            else:
                value = as_tensor(data[name]).to(device=device, dtype=own)  # type: ignore[index]
            if array.trainable and own.is_floating_point:
                self.register_parameter(name, torch.nn.Parameter(value.contiguous()))
            else:
                self.register_buffer(name, value.contiguous())
        text = json.dumps(format.config(), sort_keys=True).encode()
        self.register_buffer(
            "format_json", torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device=device)
        )

    def _data(self) -> dict[str, Tensor]:
        # getattr, not _parameters: in a replica of DataParallel they are plain attributes
        return {name: getattr(self, name) for name in self._names}

    @property
    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def reset_parameters(self) -> None:
        """Fresh rows, about N(0, 1); zeros in the padding row."""
        fresh = self.format.initial(self._shape, int(torch.randint(2**31, ())))
        with torch.no_grad():
            for name, value in fresh.items():
                getattr(self, name).copy_(as_tensor(value))
            if getattr(self, "padding_row", None) is not None:
                self.padding_row.zero_()

    # ---------------------------------------------------------------- looking at it
    @property
    def nbytes(self) -> int:
        """Bytes of all that stands for the table."""
        pad = getattr(self, "padding_row", None)
        return sum(a.nbytes for a in self._data().values()) + (0 if pad is None else pad.nbytes)

    def to_table(self) -> Table:
        """The table as a `lutra.compress.Table` (its arrays are the layer's, detached)."""
        return Table(self.format, self._shape, {k: v.detach() for k, v in self._data().items()})

    def dense(self) -> Tensor:
        """The dense table, (num_embeddings, embedding_dim), of the layer's dtype. No gradient."""
        with torch.no_grad():
            out = torch.empty(self._shape, dtype=self.weight.dtype, device=self.weight.device)
            begin = 0
            for block in self.format.decode(self._data(), self._shape):
                out[begin : begin + len(block)] = block
                begin += len(block)
            if getattr(self, "padding_row", None) is not None:
                out[self.padding_idx] = self.padding_row
        return out

    def extra_repr(self) -> str:
        share = self.nbytes / max(1, self.num_embeddings * self.embedding_dim * self.weight.element_size())
        text = f"{self.num_embeddings}, {self.embedding_dim}, format={self.format.describe()}"
        text += f", {share:.2%} of dense"
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"

    # ---------------------------------------------------------------- checkpoints
    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        key = f"{prefix}format_json"
        if key in state_dict:
            theirs = read_format(state_dict[key])
            if theirs != self.format.config():
                errors.append(
                    f"{prefix[:-1] or 'the layer'} is stored as {theirs}, "
                    f"this layer is {self.format.config()}: "
                    "build the layer with the checkpoint's format"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    # ---------------------------------------------------------------- computing
    def _rows(self, ids: Tensor) -> Tensor:
        """Rows of flat ids, in the layer's dtype, with max_norm and scale_grad_by_freq."""
        rows = self.format.gather(self._data(), self._shape, ids, self.sparse).to(self.weight.dtype)
        if self.max_norm is not None:
            with torch.no_grad():
                norm = rows.norm(p=self.norm_type, dim=1, keepdim=True)
                factor = torch.where(
                    norm > self.max_norm, self.max_norm / (norm + 1e-7), torch.ones_like(norm)
                )
            rows = rows * factor
        return rows


def as_tensor(a: Any) -> Tensor:
    if isinstance(a, Tensor):
        return a.detach()
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(a).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(a))


def read_format(json_bytes: Tensor) -> dict[str, Any]:
    """The configuration in a ``format_json`` buffer; ValueError where it is none."""
    try:
        config = json.loads(bytes(json_bytes.cpu().numpy().tobytes()))
        return make(config).config()
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"format_json does not hold a format: {error}") from None


def padded_row(padding_idx: int | None, rows: int) -> int | None:
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ValueError(
            f"padding_idx is {padding_idx}; it must lie in [{-rows}, {rows}), the rows of the table"
        )
    return padding_idx % rows


def encoded(
    cls: Any, weight: Tensor, counts: Any, seed: int, progress: bool | None, parameters: dict[str, Any]
):
    """A dense weight in the format of a layer's class: (format, data)."""
    given = parameters.pop("format", None)
    chosen = cls.format_class(**parameters) if given is None else make(given, **parameters)
    if not isinstance(chosen, cls.format_class):
        raise ValueError(f"{cls.__name__} stores {cls.format_class.name!r}, got format {chosen.describe()!r}")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError("embeddings must be a 2-d floating point tensor, (rows, dim)")
    dense = dense_table(weight.detach())
    counts = None if counts is None else check_counts(counts, len(dense))
    return chosen, chosen.encode(dense, counts, seed, progress)
