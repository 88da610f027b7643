"""What all training methods share: two layers, and the interface for losses, schedules, compression."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...compress.formats.base import check_ids
from .._common import ScaleByFrequency, check_bags
from .._embedding import Embedding
from .._embedding_bag import EmbeddingBag
from ._scaffold import Method, entries_of, matrix_shape, reduce_bags, take

if TYPE_CHECKING:
    from ...compress import Table

#: Rows that whole-table passes (`table`, `compressed`, `sparsity`) transform at a time.
BLOCK = 1 << 14


class Regularized(torch.nn.Module):
    """A layer with losses of its own, found by `lutra.nn.regularization`.

    A loss that depends on the batch is kept in ``_loss`` by ``forward`` (in training only) until the next
    call. It is part of a graph, so it is left out of copies and pickles.
    """

    _loss: Tensor | None = None

    def regularization(self) -> Tensor:
        """What to add to the training loss, a scalar: of the last call or of the parameters."""
        if self._loss is not None:
            return self._loss
        like = next(self.parameters(), None)
        return torch.zeros(()) if like is None else like.new_zeros(())

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_loss"}


def regularization(model: torch.nn.Module) -> Tensor:
    """The sum of ``regularization()`` over the layers of a model that have it, each layer once.

    Parameters
    ----------
    model : Module

    Returns
    -------
    Tensor, scalar
        0 where no layer has one. On the device of the first such layer.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> layer = lutra.nn.AutoSrhEmbedding(10, 4, groups=2, l1=0.5)
    >>> float(lutra.nn.regularization(torch.nn.Sequential(layer)).detach())
    4.0
    """
    losses, seen = [], set()

    def visit(module: torch.nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        own = getattr(type(module), "regularization", None)
        if own is not None:  # and what is inside it is its own affair
            losses.append(own(module))
            return
        for child in module.children():
            visit(child)

    visit(model)
    if not losses:
        return torch.zeros(())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def step_schedules(model: torch.nn.Module) -> None:
    """Call ``step()`` of every training method in a model; once after each step of the optimizer.

    Parameters
    ----------
    model : Module
    """
    for module in model.modules():
        if isinstance(module, Method):
            module.step()


class TrainingMethod(Method, Regularized):
    """A table ``weight`` (num_embeddings, embedding_dim) and a transform of the rows that are looked up.

    A method implements ``_method`` (its parameters), ``_transform`` and ``_table``. All of `regularization`,
    `step`, `sparsity`, `table`, `nbytes_compressed` and `compressed` work on every method.
    """

    weight: torch.nn.Parameter
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    # ---------------------------------------------------------------- to implement
    # besides `_method`; ``weight`` is there already when it runs
    def _transform(self, raw: Tensor, ids: Tensor, training: bool) -> Tensor:
        """Rows ``raw`` = weight[ids] (n, dim) as the method gives them out."""
        raise NotImplementedError

    def _table(self) -> Table:
        """The rows of eval mode in a format of `lutra.compress`."""
        raise NotImplementedError

    # ---------------------------------------------------------------- the interface
    @torch.no_grad()
    def table(self) -> Tensor:
        """The dense table as eval mode gives it, (num_embeddings, embedding_dim), without gradient."""
        return torch.cat([self.weight[:0], *(rows for _, rows in self._blocks())])

    def rows(self) -> Tensor:
        """All rows as a call gives them in the present mode, with gradients: for heads (see `MethodHead`)."""
        self._loss = None
        self._renorm()
        every = torch.arange(self.num_embeddings, device=self.weight.device)
        return self._transform(self.weight, every, self.training)

    def sparsity(self) -> float:
        """Share of zeros in `table`, in [0, 1]. A pass over the whole table."""
        zeros = sum(int((rows == 0).sum()) for _, rows in self._blocks())
        return zeros / max(1, self.weight.numel())

    def nbytes_compressed(self) -> int:
        """Bytes of `compressed` as the layer is now, all arrays counted: a pass over the table at most."""
        return self.compressed().nbytes

    def compressed(self) -> Table:
        """The table of eval mode as a `lutra.compress.Table` of torch tensors.

        ``lutra.nn.<Format>Embedding.from_table`` takes it and gives the same rows.
        """
        with torch.no_grad():
            self._renorm()
            return self._table()

    @classmethod
    def from_embedding(cls, module: torch.nn.Module, **method: Any) -> Any:
        """A layer of the same table and options as an ``nn.Embedding`` (or ``nn.EmbeddingBag``).

        Parameters
        ----------
        module : nn.Embedding or nn.EmbeddingBag
            Its weight is copied.
        **method
            Parameters of the method.
        """
        names = ["padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"]
        kind = torch.nn.Embedding
        if issubclass(cls, torch.nn.EmbeddingBag):
            names += ["mode", "include_last_offset"]
            kind = torch.nn.EmbeddingBag
        if not isinstance(module, kind):
            raise TypeError(f"module must be a torch.nn.{kind.__name__}, got {type(module).__qualname__}")
        weight = module.weight.detach().clone()
        return cls(*weight.shape, _weight=weight, **{k: getattr(module, k) for k in names}, **method)

    # ---------------------------------------------------------------- within
    def _begin(self, method: dict[str, Any]) -> None:
        self._given = method
        self._method(**method)

    def _renorm(self, ids: Tensor | None = None) -> None:
        """max_norm: in place, of the rows visited (or all), before the look-up, as torch does."""
        if self.max_norm is not None:
            ids = torch.arange(self.num_embeddings, device=self.weight.device) if ids is None else ids
            torch.embedding_renorm_(self.weight.detach(), ids, self.max_norm, self.norm_type)

    def _rows(self, ids: Tensor) -> Tensor:
        """Valid ids (n,) to (n, dim), with gradients."""
        self._loss = None
        self._renorm(ids)
        rows = self._transform(self._take(self.weight, ids, self.padding_idx), ids, self.training)
        if self.padding_idx is not None:  # no gradient to what rows share (thresholds, codebooks) either
            rows = torch.where((ids == self.padding_idx).unsqueeze(1), rows.detach(), rows)
        return rows

    def _take(self, table: Tensor, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """Rows of a parameter that has one per row of the table; its gradient costs what it touches.

        Dense gradients of a large table are written in the touched rows only (see `lutra.nn.Embedding`),
        sparse ones hold each touched row once.
        """
        if table.requires_grad and torch.is_grad_enabled():
            if self.scale_grad_by_freq:
                table = ScaleByFrequency.apply(table, ids, self.sparse)
            rows = take(table, ids, padding_idx, self.sparse)
            if rows is not None:
                return rows
            if not self.sparse and padding_idx is None:  # its gradient has less fixed cost than embedding's
                return table.index_select(0, ids)
        return F.embedding(ids, table, padding_idx, sparse=self.sparse)

    @torch.no_grad()
    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The rows of eval mode in blocks: (first row, rows)."""
        self._renorm()
        for begin in range(0, self.num_embeddings, BLOCK):
            raw = self.weight[begin : begin + BLOCK]
            ids = torch.arange(begin, begin + len(raw), device=raw.device)
            yield begin, self._transform(raw, ids, False)

    def extra_repr(self) -> str:
        own = [f"{k}={v}" for k, v in self._given.items() if isinstance(v, (int, float, str, tuple))]
        return ", ".join([super().extra_repr(), *own])


class MethodEmbedding(TrainingMethod, Embedding):
    """``torch.nn.Embedding`` with a training method; the base class of `lutra.nn`'s.

    Arguments are those of ``torch.nn.Embedding``, then the method's by name.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        sparse: bool = False, _weight: Tensor | None = None, _freeze: bool = False, device: Any = None,
        dtype: Any = None, **method: Any,
    ) -> None:  # fmt: skip
        self._refuse_unknown(method)
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            _weight, _freeze, device, dtype,
        )  # fmt: skip
        self._begin(method)

    def forward(self, input: Tensor) -> Tensor:
        """The rows, shape (\\*input.shape, embedding_dim).

        Raises
        ------
        TypeError, IndexError
            Ids of another type than int64 or int32, or outside [0, num_embeddings).
        """
        ids = check_ids(input, self.num_embeddings)
        return self._rows(ids.reshape(-1)).reshape(*ids.shape, self.embedding_dim)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        sparse: bool = False, **method: Any,
    ) -> Any:  # fmt: skip
        """A layer from a dense table, as ``nn.Embedding.from_pretrained``; ``freeze`` the table."""
        rows, dim = matrix_shape(embeddings)
        return cls(
            rows, dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, embeddings, freeze,
            **method,
        )  # fmt: skip


class MethodEmbeddingBag(TrainingMethod, EmbeddingBag):
    """``torch.nn.EmbeddingBag`` with a training method; the base class of `lutra.nn`'s.

    Arguments are those of ``torch.nn.EmbeddingBag``, then the method's by name. Every entry of a bag is
    transformed, then `lutra.gather.bag` reduces.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
        _weight: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
        device: Any = None, dtype: Any = None, **method: Any,
    ) -> None:  # fmt: skip
        self._refuse_unknown(method)
        super().__init__(
            num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse, _weight,
            include_last_offset, padding_idx, device, dtype,
        )  # fmt: skip
        self._begin(method)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Bags of rows, (bags, embedding_dim); arguments and errors as `lutra.nn.EmbeddingBag`."""
        check_bags(self, input, offsets, per_sample_weights)
        ids = check_ids(input, self.num_embeddings)
        rows, entries, pad = entries_of(self._rows(ids.reshape(-1)), ids, self.padding_idx)
        last = self.include_last_offset and offsets is not None
        return reduce_bags(rows, entries, offsets, per_sample_weights, self.mode, pad, last)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
        include_last_offset: bool = False, padding_idx: int | None = None, **method: Any,
    ) -> Any:  # fmt: skip
        """A layer from a dense table, as ``nn.EmbeddingBag.from_pretrained``; ``freeze`` the table."""
        rows, dim = matrix_shape(embeddings)
        layer = cls(
            rows, dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse, embeddings,
            include_last_offset, padding_idx, **method,
        )  # fmt: skip
        layer.weight.requires_grad_(not freeze)
        return layer
