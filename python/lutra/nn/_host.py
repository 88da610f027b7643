"""HostEmbedding and HostEmbeddingBag: a dense table that stays in host memory, or in a file."""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import warnings
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..compress._table import to_numpy
from ..gather import bag
from ..gather._host_table import HostBag, readable
from ..index import _files
from ._common import IDS, ScaleByFrequency
from ._embedding_ops import ops

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Host(torch.nn.Module):
    """What the two layers share; not a layer itself."""

    table: Tensor
    path: str | None
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool
    pin: bool

    def _begin(
        self, rows, dim, padding_idx, limits, sparse, table, path, name, pin, device, dtype, freeze
    ):  # fmt: skip
        torch.nn.Module.__init__(self)
        self.max_norm, self.norm_type, self.scale_grad_by_freq = limits
        self.sparse = sparse
        self.path, self._name, self.pin = None if path is None else os.fspath(path), name, bool(pin)
        if path is not None:
            if table is not None:
                raise ValueError("give a table or a path, not both")
            table, self._name = open_table(path, name)
            if rows is not None and tuple(table.shape) != (rows, dim):
                raise ValueError(
                    f"{self.path!r} holds {tuple(table.shape)}; the layer was asked for ({rows}, {dim})"
                )
        elif table is None:
            table = torch.randn(rows, dim, dtype=dtype or torch.get_default_dtype())
        self.num_embeddings, self.embedding_dim = table.shape
        if padding_idx is not None:
            if not -self.num_embeddings <= padding_idx < self.num_embeddings:
                raise ValueError(
                    f"padding_idx is {padding_idx}; it must lie in "
                    f"[{-self.num_embeddings}, {self.num_embeddings}), the rows of the table"
                )
            padding_idx %= self.num_embeddings
        self.padding_idx = padding_idx
        # not a Parameter, which module.to(device) would move
        self.table = table if path is not None else table.requires_grad_(not freeze)
        empty = torch.empty((self.num_embeddings, 0), device=device, dtype=dtype or table.dtype)
        self.weight = torch.nn.Parameter(empty, requires_grad=False)

    @property
    def mapped(self) -> bool:
        """Whether the table is a file's."""
        return self.path is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.table.nbytes

    def save(self, path: str | os.PathLike[str], name: str = "weight") -> None:
        """Write the table to a safetensors file (whole or not at all), for ``path=`` of another layer."""
        array = to_numpy(self.table.detach())
        _files.write(path, [_files.Tensor.of_array(name, array)], {"format": "pt"})

    def extra_repr(self) -> str:
        where = f"path={self.path!r}" if self.mapped else "in host memory"
        text = f"{self.num_embeddings}, {self.embedding_dim}, {where}"
        usual = {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False}
        own = {k: getattr(self, k) for k in usual}
        return text + "".join(f", {k}={v!r}" for k, v in own.items() if v != usual[k])

    def reset_parameters(self) -> None:
        """Fresh rows, N(0, 1); zeros in the padding row. A table in a file stays as it is."""
        if not self.mapped:
            with torch.no_grad():
                self.table.normal_()
                if self.padding_idx is not None:
                    self.table[self.padding_idx] = 0

    # ---------------------------------------------------------------- checkpoints, copies
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.mapped:
            destination[f"{prefix}table"] = self.table if keep_vars else self.table.detach()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        key = f"{prefix}table"
        if key in state_dict and not self.mapped:
            given = state_dict[key]
            if given.shape != self.table.shape:
                errors.append(f"{key} has shape {tuple(given.shape)}; it must be {tuple(self.table.shape)}")
            else:
                with torch.no_grad():
                    self.table.copy_(given)
        elif strict and not self.mapped:
            missing.append(key)
        rest = {k: v for k, v in state_dict.items() if k != key or self.mapped}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if key in unexpected and not self.mapped:
            unexpected.remove(key)

    def __getstate__(self):
        state = self.__dict__.copy()
        if self.mapped:
            del state["table"]  # a copy maps the file again
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.mapped:
            self.table, _ = open_table(self.path, self._name)

    def pin_table(self) -> None:
        """Move the table to page-locked memory (once, which takes a second for some 4 GB).

        From then on a call with ids on a GPU has its rows read by the GPU's kernel, over the bus and as many
        bytes as are needed: ids are not brought to the host, and nothing waits for the device. Ids out of
        range give NaN then. Gradients of the table come to the host, and the backward pass waits for them;
        after a forward pass alone, wait for the device before the table is changed. Not with ``max_norm``,
        and with ``scale_grad_by_freq`` only where the table is not trained: such calls take the other way.

        Raises
        ------
        ValueError
            A table in a file.
        RuntimeError
            There is no CUDA device.
        """
        if self.mapped:
            raise ValueError(
                "the table is in a file, whose pages cannot be locked: give it to the layer as a tensor"
            )
        if not self.table.is_pinned():
            self.table.data = self.table.data.contiguous().pin_memory()

    # ---------------------------------------------------------------- computing
    def _by_kernel(self, ids: Tensor) -> bool:
        """Whether a kernel on the device of the ids reads the table itself."""
        if not ids.is_cuda or self.max_norm is not None or (self.scale_grad_by_freq and self._trains()):
            return False
        return readable(self.table) and not torch.compiler.is_compiling()

    def _trains(self) -> bool:
        return self.table.requires_grad and torch.is_grad_enabled()

    def _limited(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A table in which rows are no longer than max_norm, and ids into it.

        The rows of a table in memory are shortened where they are, as torch does; of a file those that are
        asked for are copied.
        """
        if self.max_norm is None:
            return self.table, ids
        if not self.mapped:
            if ids.numel():
                torch.embedding_renorm_(self.table.detach(), ids.contiguous(), self.max_norm, self.norm_type)
            return self.table, ids
        some, places = torch.unique(ids, return_inverse=True)
        rows = self.table.detach()[some]
        if len(some):
            torch.embedding_renorm_(rows, torch.arange(len(some)), self.max_norm, self.norm_type)
        return rows, places.to(ids.dtype)

    def _send(self, rows: Tensor, device: torch.device) -> Tensor:
        """Rows on the device of the ids, in the dtype of the model."""
        rows = rows.to(self.weight.dtype)
        if device.type == "cpu":
            return rows
        if self.pin and device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(device, non_blocking=True)


class HostEmbedding(Host, torch.nn.Embedding):
    """``torch.nn.Embedding`` whose table stays in host memory, or in a mapped file.

    The rest of the model may be on a GPU: ids are brought to the host, rows are looked up there, and only
    these rows are sent to the device of the ids (from pinned memory, without waiting); or, after
    `pin_table`, the GPU reads them itself. ``module.to(device)`` moves nothing of the table,
    ``module.to(dtype)`` changes the dtype of the rows that are given, not that of the table.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        May be left out with ``path``.
    padding_idx, max_norm, norm_type, scale_grad_by_freq
        As in ``torch.nn.Embedding``: with ``max_norm`` the rows that a call reads are shortened in the table.
        Those of a file are not: shortened copies are given.
    sparse : bool, default True
        The gradient of the table holds the rows touched only. It stays on the host. (torch refuses
        ``scale_grad_by_freq`` with ``sparse``; here they go together.)
    path : path, optional
        A safetensors file, mapped: it opens in milliseconds whatever its size, pages are read when rows in
        them are, and the table is not trained. The file is never written.
    name : str, optional
        The tensor in the file; not needed where it holds a single one of two axes.
    pin : bool, default True
        Send rows to CUDA from pinned memory.
    device, dtype
        ``device`` for nothing but what the layer reports as ``weight.device``.

    Attributes
    ----------
    table : Tensor, (num_embeddings, embedding_dim), on the host
        Not among ``parameters()``, since whoever takes those moves them: give it to an optimizer by name,
        ``lutra.optim.Adagrad([layer.table])`` or ``torch.optim.SparseAdam([layer.table])``.

    Notes
    -----
    ``state_dict`` holds the table as ``table`` where it is in memory. Of a mapped table it holds nothing: the
    file is the checkpoint, and copies and pickles of the layer map it again. An id out of range is an
    IndexError.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.HostEmbedding(10, 3)
    >>> layer(torch.tensor([[1, 2, 1]])).sum().backward()
    >>> layer.table.grad.coalesce().indices()
    tensor([[1, 2]])
    """

    def __init__(
        self, num_embeddings: int | None = None, embedding_dim: int | None = None,
        padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, sparse: bool = True, device: Any = None, dtype: Any = None, *,
        path: Any = None, name: str | None = None, pin: bool = True,
    ) -> None:  # fmt: skip
        check_sizes(num_embeddings, embedding_dim, path)
        limits = max_norm, norm_type, scale_grad_by_freq
        self._begin(
            num_embeddings, embedding_dim, padding_idx, limits, sparse, None, path, name, pin, device, dtype,
            False,
        )  # fmt: skip
        if self.padding_idx is not None and not self.mapped:
            with torch.no_grad():
                self.table[self.padding_idx] = 0

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        sparse: bool = True, *, pin: bool = True,
    ) -> HostEmbedding:  # fmt: skip
        """A layer with a dense table, which is taken over if it is on the host and copied there if not."""
        layer = cls.__new__(cls)
        table = embeddings.detach().cpu()
        limits = max_norm, norm_type, scale_grad_by_freq
        layer._begin(
            None, None, padding_idx, limits, sparse, table, None, None, pin, embeddings.device,
            embeddings.dtype, freeze,
        )  # fmt: skip
        return layer

    @classmethod
    def from_embedding(cls, embedding: torch.nn.Embedding, *, pin: bool = True) -> HostEmbedding:
        """A layer with a copy of an ``nn.Embedding``'s table and its settings, but ``sparse=True``."""
        weight = embedding.weight
        layer = cls.from_pretrained(
            weight.detach().clone(), not weight.requires_grad, embedding.padding_idx, embedding.max_norm,
            embedding.norm_type, embedding.scale_grad_by_freq, pin=pin,
        )  # fmt: skip
        return layer.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """The rows, (\\*input.shape, embedding_dim), on the device of the ids."""
        if self._by_kernel(input):
            _check_type(input)
            rows = HostBag.apply(
                self.table,
                input.reshape(-1, 1),
                None,
                None,
                "sum",
                None,
                self.padding_idx,
                False,
                self.sparse,
            )
            return rows.to(self.weight.dtype).reshape(*input.shape, self.embedding_dim)
        ids = on_host(input, self.num_embeddings)
        table, ids = self._limited(ids)
        if self._trains():
            if self.scale_grad_by_freq:
                table = ScaleByFrequency.apply(table, ids, self.sparse)
            rows = ops.embedding(table, ids, self.padding_idx, self.sparse)
        else:
            rows = bag(table, ids.reshape(-1, 1)).reshape(*ids.shape, self.embedding_dim)
        return self._send(rows, input.device)


class HostEmbeddingBag(Host, torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` whose table stays in host memory, or in a mapped file.

    Bags are summed on the host (`lutra.gather.bag`) and only these are sent to the device of the ids.
    Parameters and attributes as `HostEmbedding` and ``torch.nn.EmbeddingBag``: entries equal to
    ``padding_idx`` are left out of the bags, and the gradient of mode 'max' is dense.
    """

    def __init__(
        self, num_embeddings: int | None = None, embedding_dim: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        mode: str = "mean", sparse: bool = True, include_last_offset: bool = False,
        padding_idx: int | None = None, device: Any = None, dtype: Any = None, *, path: Any = None,
        name: str | None = None, pin: bool = True,
    ) -> None:  # fmt: skip
        check_sizes(num_embeddings, embedding_dim, path)
        limits = max_norm, norm_type, scale_grad_by_freq
        self._begin(
            num_embeddings, embedding_dim, padding_idx, limits, sparse, None, path, name, pin, device, dtype,
            False,
        )  # fmt: skip
        self._bags(mode, include_last_offset)
        if self.padding_idx is not None and not self.mapped:
            with torch.no_grad():
                self.table[self.padding_idx] = 0

    def _bags(self, mode, include_last_offset):
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be one of 'sum', 'mean', 'max'; got {mode!r}")
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = True,
        include_last_offset: bool = False, padding_idx: int | None = None, *, pin: bool = True,
    ) -> HostEmbeddingBag:  # fmt: skip
        """A layer with a dense table, which is taken over if it is on the host and copied there if not."""
        layer = cls.__new__(cls)
        table = embeddings.detach().cpu()
        limits = max_norm, norm_type, scale_grad_by_freq
        layer._begin(
            None, None, padding_idx, limits, sparse, table, None, None, pin, embeddings.device,
            embeddings.dtype, freeze,
        )  # fmt: skip
        layer._bags(mode, include_last_offset)
        return layer

    @classmethod
    def from_embedding(cls, embedding: torch.nn.EmbeddingBag, *, pin: bool = True) -> HostEmbeddingBag:
        """A layer with a copy of an ``nn.EmbeddingBag``'s table and its settings, but ``sparse=True``."""
        weight = embedding.weight
        layer = cls.from_pretrained(
            weight.detach().clone(), not weight.requires_grad, embedding.max_norm, embedding.norm_type,
            embedding.scale_grad_by_freq, embedding.mode, include_last_offset=embedding.include_last_offset,
            padding_idx=embedding.padding_idx, pin=pin,
        )  # fmt: skip
        return layer.train(embedding.training)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Bags of rows, (bags, embedding_dim), on the device of the ids."""
        if self.mode == "max" and self.scale_grad_by_freq:
            raise ValueError("mode 'max' does not support scale_grad_by_freq")
        if self._by_kernel(input):
            _check_type(input)
            padding = self.padding_idx
            out = HostBag.apply(
                self.table, input, offsets, per_sample_weights, self.mode, padding, padding,
                self.include_last_offset and offsets is not None, self.sparse and self.mode != "max",
            )  # fmt: skip
            return out.to(self.weight.dtype)
        changes = self.max_norm is not None or self.scale_grad_by_freq
        ids = on_host(input, self.num_embeddings if changes else None)  # else the bag checks
        others = [None if a is None else a.cpu() for a in (offsets, per_sample_weights)]
        table, places = self._limited(ids)
        padding = self.padding_idx
        if padding is not None and places is not ids:  # numbers of copies
            padding = len(table)
            places = torch.where(ids == self.padding_idx, padding, places)
            table = torch.cat([table, table.new_zeros(1, self.embedding_dim)])
        if self.scale_grad_by_freq and self._trains():
            table = ScaleByFrequency.apply(table, ids, self.sparse)
        out = bag(
            table, places, *others, mode=self.mode, padding_idx=padding,
            include_last_offset=self.include_last_offset and offsets is not None,
            sparse_grad=self.sparse and self.mode != "max",
        )  # fmt: skip
        return self._send(out, input.device)


def check_sizes(rows: int | None, dim: int | None, path: Any) -> None:
    if path is None and (rows is None or dim is None):
        raise TypeError("num_embeddings and embedding_dim are missing; they may be left out with path only")
    if (rows is None) != (dim is None):
        raise TypeError("give num_embeddings and embedding_dim, or neither")


def _check_type(ids: Tensor) -> None:
    if ids.dtype not in IDS:
        raise TypeError(f"input has dtype {ids.dtype}; it must be int64 or int32")


def on_host(ids: Tensor, rows: int | None) -> Tensor:
    _check_type(ids)
    ids = ids.cpu()
    if rows is not None and ids.numel():
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= rows:
            raise IndexError(f"input holds {low if low < 0 else high}; ids must lie in [0, {rows})")
    return ids


def open_table(path: Any, name: str | None = None) -> tuple[Tensor, str]:
    """A tensor of two axes of a safetensors file, mapped, and its name.

    The mapping is private: what is written to the tensor, by mistake, reaches no file and crashes nothing.
    (Outside Linux it is for reading only.)
    """
    where = os.fspath(path)
    with open(where, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {k: v for k, v in header.items() if len(v["shape"]) == 2 and v["dtype"] in _DTYPES}
            if name is None and len(found) != 1:
                raise ValueError(
                    f"it holds {len(found)} floating point tensors of two axes; name one of {sorted(found)}"
                )
            name = next(iter(found)) if name is None else name
            if name not in found:
                raise ValueError(f"it has no floating point tensor {name!r} of two axes, but {sorted(found)}")
            entry = found[name]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            if end - begin != prod(shape) * dtype.itemsize or begin < 0 or 8 + length + end > size:
                raise ValueError("it is cut off or damaged")
            if (8 + length + begin) % dtype.itemsize:
                raise ValueError(f"{name!r} does not begin at a multiple of its itemsize; save it again")
        except (struct.error, KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{where!r} cannot be mapped: {error}") from None
        if not prod(shape):
            return torch.empty(shape, dtype=dtype), name
        pages = _map(file.fileno())
    with warnings.catch_warnings():  # where the mapping had to be for reading only
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        table = torch.frombuffer(pages, dtype=dtype, count=prod(shape), offset=8 + length + begin)
    return table.view(shape), name


def _map(file: int) -> mmap.mmap:
    """The whole file. A private mapping is counted as memory unless it asks not to be."""
    if sys.platform == "linux":
        try:
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            return mmap.mmap(file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:  # a system that grants no more than it has
            pass
    return mmap.mmap(file, 0, access=mmap.ACCESS_READ)
