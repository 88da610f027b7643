"""What the layers of training methods share, whether they hold a dense table (`_base`) or not (`_stored`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._arrays import torch_kind
from ...gather import bag
from ...gather._spread import worth_spreading
from .._common import has_kernel
from .._embedding import ENOUGH_IDS


class Method:
    """A layer with a method: its classes have torch's arguments, then by name those of ``_method``.

    Their signatures say so, and their docstrings are the method's.
    """

    #: Names of the method's parameters as given, for repr.
    _given: dict[str, Any]
    #: Checks the method's parameters (all by name) and creates its arrays.
    _method: Callable[..., None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and hasattr(cls, "_method"):
            _describe(cls)

    @classmethod
    def _refuse_unknown(cls, method: dict[str, Any]) -> None:
        known = list(inspect.signature(cls._method).parameters)[1:]
        for name in method:
            if name not in known:
                raise TypeError(
                    f"{cls.__name__} got an unknown argument {name!r}; its method has {', '.join(known)}"
                )

    def step(self) -> None:
        """Advance the method's schedule by one step of the optimizer; nothing, for a method without one."""


def _describe(cls: type) -> None:
    """The signature and the docstring of a layer: torch's arguments and the method's."""
    base = inspect.signature(cls.__init__)  # type: ignore[misc]
    own = [p for p in list(base.parameters.values())[1:] if p.kind is not p.VAR_KEYWORD]
    method = list(inspect.signature(cls._method).parameters.values())[1:]  # type: ignore[attr-defined]
    cls.__signature__ = inspect.Signature([*own, *method])  # type: ignore[attr-defined]
    if not cls.__dict__.get("__doc__"):
        theirs = "Embedding" + "Bag" * issubclass(cls, torch.nn.EmbeddingBag)
        first = f"``torch.nn.{theirs}``: its arguments, then by name those of a training method."
        text = next(b.__doc__ or "" for b in cls.__mro__[1:] if issubclass(b, Method))
        cls.__doc__ = f"{first}\n\n    {text}"


def matrix_shape(embeddings: Tensor) -> tuple[int, int]:
    """The shape of a dense table; ValueError where it is none."""
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings must be 2-d, (rows, dim); got shape {tuple(embeddings.shape)}")
    return embeddings.shape[0], embeddings.shape[1]


def take(table: Tensor, index: Tensor, padding: int | None, sparse: bool) -> Tensor | None:
    """Rows of a parameter whose gradient costs what it touches (see `lutra.nn.Embedding`); None where torch's
    own look-up is as good.
    """
    if not (table.requires_grad and torch.is_grad_enabled() and has_kernel(table)):
        return None
    n, (rows, dim) = index.numel(), table.shape
    if sparse:
        pays = n >= ENOUGH_IDS
    else:
        pays = worth_spreading(torch_kind(table.is_cuda), n, rows, dim * table.dtype.itemsize)
    return torch.ops.lutra.embedding(table, index, padding, sparse) if pays else None


def entries_of(rows: Tensor, ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor, int | None]:
    """For bags of ``ids`` whose decoded rows are ``rows`` (ids.numel(), dim), one for each entry.

    Rows, which of them each entry is, and which is the padding: entries of ``padding_idx`` point at a row
    behind the others, which is left out.
    """
    flat, pad = ids.reshape(-1), None
    entries = torch.arange(flat.numel(), device=flat.device)
    if padding_idx is not None:
        pad = flat.numel()
        entries = torch.where(flat == padding_idx, pad, entries)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return rows, entries.reshape(ids.shape), pad


def reduce_bags(
    table: Tensor, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, mode: str,
    padding: int | None, last: bool, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """`lutra.gather.bag`, or torch's where lutra has no kernel."""
    if has_kernel(table):
        return bag(
            table, ids, offsets, weights, mode=mode, padding_idx=padding, include_last_offset=last,
            sparse_grad=sparse,
        )  # fmt: skip
    offsets = offsets if offsets is None else offsets.long()
    return F.embedding_bag(
        ids, table, offsets, mode=mode, per_sample_weights=weights, include_last_offset=last,
        padding_idx=padding, sparse=sparse,
    )  # fmt: skip
