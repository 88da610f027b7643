"""Attachment: what an attached layer hands its gradients to, in the place of ``weight.grad``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from .._arrays import torch_kind
from ..gather import bag
from ..gather._bag import _bag_argmax, _bag_backward_rows, _bag_weight_grad

WHEN = ("step", "backward")


class Call(NamedTuple):
    """The gradient of one call of a layer, in the arguments of `lutra.gather.update_bags`."""

    grad: Tensor
    ids: Tensor
    offsets: Tensor | None
    weights: Tensor | None
    argmax: Tensor | None
    mode: str
    padding_idx: int | None
    last: bool
    versions: tuple[int, int]

    def check(self) -> None:
        if (self.grad._version, self.ids._version) != self.versions:
            raise RuntimeError(
                "the ids (or the gradient) of an attached layer were modified in place between backward "
                "and step; the update needs them: clone them, or attach with when='backward'"
            )

    def rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """The touched rows and their gradients, in float32."""
        wide = self.grad if self.grad.dtype == torch.float64 else self.grad.float()
        return _bag_backward_rows(
            torch_kind(wide.is_cuda), wide, self.ids, self.offsets, self.weights, self.argmax, rows,
            self.mode, self.padding_idx, self.last,
        )  # fmt: skip


class TableCall(NamedTuple):
    """The gradient of a MemoryLinear's call: grad (tokens, dim), codes and weights (tokens, n_tables)."""

    grad: Tensor
    codes: Tensor
    weights: Tensor
    versions: tuple[int, int]

    def check(self) -> None:
        if (self.grad._version, self.codes._version) != self.versions:
            raise RuntimeError(
                "the codes (or the gradient) of an attached layer were modified in place between backward "
                "and step; the update needs them: clone them, or attach with when='backward'"
            )


def table_of(layer: Any) -> torch.nn.Parameter:
    """The parameter that is attached."""
    return getattr(layer, getattr(layer, "_attached_name", "weight"))


class Attachment:
    """One weight whose gradients go straight to an optimizer.

    Not copied: the copy of a layer (deepcopy, pickle) is an ordinary layer.
    """

    def __init__(self, optimizer: Any, weight: torch.nn.Parameter, when: str, owner: Any = None) -> None:
        self.optimizer, self.weight, self.when = optimizer, weight, when
        self.owner = owner  # a layer whose table is not its weight (nn.training's packed ones)
        self.layers: WeakSet[torch.nn.Module] = WeakSet()
        self.pending: list[Call] | list[TableCall] = []
        self.used = False  # when='backward': this step has seen its update

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def check(self, layer: torch.nn.Module) -> None:
        if table_of(layer) is not self.weight:
            raise RuntimeError(
                f"the weight of this {type(layer).__name__} is not the one that was attached (it was "
                "replaced, or this is a replica): detach the layer, and attach it again"
            )

    def embedding(self, layer: torch.nn.Module, ids: Tensor) -> Tensor:
        self.check(layer)
        return _Embedding.apply(layer.weight, self, ids, layer.padding_idx, layer.scale_grad_by_freq)

    def bag(
        self, layer: torch.nn.Module, ids: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        self.check(layer)
        last = layer.include_last_offset and offsets is not None
        return _Bag.apply(
            layer.weight, self, ids, offsets, weights, layer.mode, layer.padding_idx, last,
            layer.scale_grad_by_freq,
        )  # fmt: skip

    def stored(
        self, layer: Any, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None,
        mode: str | None = None, last: bool = False,
    ) -> Tensor:  # fmt: skip
        """Rows, or with ``mode`` bags, of a layer that holds its table packed."""
        self.check(layer)
        return _Stored.apply(layer.weight, self, layer, ids, offsets, weights, mode, last)

    def take_tables(self, layer: torch.nn.Module) -> Callable[[Tensor, Tensor, Tensor], None]:
        """What the gradient of a MemoryLinear is handed to."""
        self.check(layer)

        def take(grad: Tensor, codes: Tensor, weights: Tensor) -> None:
            self.take(TableCall(grad, codes, weights, (grad._version, codes._version)))

        return take

    def take(self, call: Call | TableCall) -> None:
        """A backward pass has come to the layer."""
        if self.when == "step":
            self.pending.append(call)  # type: ignore[arg-type]
            return
        if self.used:
            raise RuntimeError(
                "a second gradient for an attached table before optimizer.step(): with when='backward' the "
                "first has updated the table already. Accumulated gradients, a layer that is called twice "
                "and a second backward through one graph need attach(layer, when='step')"
            )
        self.optimizer._update_attached(self.weight, [call])
        self.used = True


def merge_tables(calls: list[TableCall]) -> TableCall:
    """Several calls of one layer as one of all their tokens."""
    if len(calls) == 1:
        return calls[0]
    grad, codes, weights = (torch.cat(parts) for parts in list(zip(*calls))[:3])
    return calls[0]._replace(grad=grad, codes=codes, weights=weights)


def merge(calls: list[Call]) -> Call | None:
    """Several calls as one, where their layouts allow it: bags of one length, of one mode."""
    first = calls[0]
    for c in calls:
        if (
            c.offsets is not None
            or c.argmax is not None
            or c.ids.shape[1] != first.ids.shape[1]
            or (c.weights is None) != (first.weights is None)
            or (c.mode, c.padding_idx) != (first.mode, first.padding_idx)
        ):
            return None
    weights = None if first.weights is None else torch.cat([c.weights for c in calls])
    grad, ids = torch.cat([c.grad for c in calls]), torch.cat([c.ids for c in calls])
    return first._replace(grad=grad, ids=ids, weights=weights)


def by_frequency(call: Call) -> Call:
    """A call (of mode 'sum' or 'mean') with the gradient of each row divided by how often its id occurs."""
    ids, wide = call.ids, torch.float64 if call.grad.dtype == torch.float64 else torch.float32
    _, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    weights = counts[inverse].to(wide).reciprocal()
    if call.weights is not None:
        weights *= call.weights
    if call.mode == "mean":  # over its entries that are no padding
        real = torch.ones_like(weights) if call.padding_idx is None else (ids != call.padding_idx).to(wide)
        if call.offsets is None:
            weights /= real.sum(1, keepdim=True).clamp(min=1)
        else:
            ends = (
                call.offsets if call.last else torch.cat([call.offsets, call.offsets.new_tensor([len(ids)])])
            )
            of, entries = torch.repeat_interleave(ends.diff()), slice(int(ends[0]), int(ends[-1]))
            sizes = real.new_zeros(len(ends)).index_add_(0, of, real[entries])
            weights[entries] /= sizes.clamp(min=1)[of]
    return call._replace(weights=weights, mode="sum")


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, attachment, ids, padding_idx, frequency):
        ctx.attachment, ctx.padding_idx, ctx.frequency = attachment, padding_idx, frequency
        ctx.save_for_backward(ids)
        return torch.embedding(weight, ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        versions = grad._version, ids._version
        grad = grad.reshape(-1, grad.shape[-1])
        call = Call(grad, ids.reshape(-1, 1), None, None, None, "sum", ctx.padding_idx, False, versions)
        ctx.attachment.take(by_frequency(call) if ctx.frequency else call)
        return (None,) * 5


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, attachment, ids, offsets, weights, mode, padding_idx, last, frequency):
        ctx.attachment, ctx.options, ctx.frequency = attachment, (mode, padding_idx, last), frequency
        reads = mode == "max" or ctx.needs_input_grad[4]
        ctx.save_for_backward(weight if reads else None, ids, offsets, weights)
        return bag(
            weight, ids, offsets, weights, mode=mode, padding_idx=padding_idx, include_last_offset=last
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        table, ids, offsets, weights = ctx.saved_tensors
        mode, padding_idx, last = ctx.options
        kind = torch_kind(grad.is_cuda)
        argmax = to_weights = None
        if mode == "max":
            argmax = _bag_argmax(kind, table, ids, offsets, padding_idx, last)
        if ctx.needs_input_grad[4]:
            to_weights = _bag_weight_grad(kind, grad, table, ids, offsets, None, None, padding_idx, last)
            to_weights = to_weights.to(weights.dtype)
        held = None if weights is None else weights.detach()
        versions = grad._version, ids._version
        call = Call(grad, ids, offsets, held, argmax, mode, padding_idx, last, versions)
        ctx.attachment.take(by_frequency(call) if ctx.frequency else call)
        return None, None, None, None, to_weights, None, None, None, None


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, attachment, layer, ids, offsets, weights, mode, last):
        ctx.attachment, ctx.layer, ctx.options = attachment, layer, (mode, last)
        reads = mode == "max" or ctx.needs_input_grad[5]
        ctx.save_for_backward(layer.packed if reads else None, ids, offsets, weights)
        if mode is None:
            return layer._values(ids)
        return layer._reduce(ids, offsets, weights, mode, last)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        packed, ids, offsets, weights = ctx.saved_tensors
        (mode, last), layer = ctx.options, ctx.layer
        versions, padding = (grad._version, ids._version), layer.padding_idx
        if mode is None:
            call = Call(grad, ids.reshape(-1, 1), None, None, None, "sum", padding, False, versions)
            ctx.attachment.take(by_frequency(call) if layer.scale_grad_by_freq else call)
            return (None,) * 8
        kind, argmax, to_weights = torch_kind(grad.is_cuda), None, None
        if packed is not None:
            rows, entries, pad = layer._entries(ids)
            if mode == "max":
                entry = _bag_argmax(kind, rows, entries, offsets, pad, last)
                argmax = torch.where(entry >= 0, ids.reshape(-1)[entry.clamp(min=0)], -1)
            if ctx.needs_input_grad[5]:
                to_weights = _bag_weight_grad(kind, grad, rows, entries, offsets, None, None, pad, last)
                to_weights = to_weights.to(weights.dtype)
        held = None if weights is None else weights.detach()
        call = Call(grad, ids, offsets, held, argmax, mode, padding, last, versions)
        ctx.attachment.take(by_frequency(call) if layer.scale_grad_by_freq else call)
        return None, None, None, None, None, to_weights, None, None
