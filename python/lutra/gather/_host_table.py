"""Bags on a GPU of a table in page-locked host memory, which the kernel reads over the bus (torch)."""

from __future__ import annotations

from typing import Any

import torch

from .. import _backend, _checks
from .._arrays import F32, FLOATS, I64, torch_kind
from ._bag import MODES, _bag_backward_rows, _ids, _layout, _padding, _ptr, _weights


def readable(table: torch.Tensor) -> bool:
    """Whether kernels can read a table of the host."""
    if _backend.cuda is None or not table.is_cpu or torch_kind(True).code(table) not in FLOATS:
        return False
    return table.is_contiguous() and table.is_pinned()


def _where(table, ids, offsets, last, padding_idx, mode):
    """The bags as bindings take them, and their arrays, which must outlive the call."""
    kind = torch_kind(True)
    for a, name in ((ids, "ids"), (offsets, "offsets")):
        if a is not None:
            _checks.same_kind(kind, a, name, ids, "ids")
    bags, length = _layout(ids, offsets, last)
    padding = _padding(padding_idx, table.shape[0])
    ids, offsets, id_code = _ids(kind, ids, offsets)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    where = (
        ids.data_ptr(), id_code, n_ids, _ptr(kind, offsets), last, bags, length, padding, MODES[mode]
    )  # fmt: skip
    return kind, where, (ids, offsets)


def host_bag(
    table: torch.Tensor, ids: torch.Tensor, offsets: Any = None, weights: Any = None, mode: str = "sum",
    padding_idx: int | None = None, last: bool = False, want_argmax: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`lutra.gather.bag` on the device of ids; with ``want_argmax`` the ids behind the maxima."""
    kind, where, held = _where(table, ids, offsets, last, padding_idx, mode)
    code = kind.code(table)
    if weights is not None:
        weights = _weights(kind, weights, ids, mode, F32)
    (rows, dim), bags = table.shape, where[5]
    out = kind.empty((bags, dim), code, ids)
    argmax = kind.empty((bags, dim), I64, ids) if want_argmax else None
    kind.kernels.bag(
        *where, table.data_ptr(), code, rows, dim, None, None, _ptr(kind, weights), out.data_ptr(),
        _ptr(kind, argmax), *kind.launch(ids),
    )  # fmt: skip
    del held
    return out if argmax is None else argmax


def _weight_grad(grad, table, ids, offsets, padding_idx, last):
    kind, where, held = _where(table, ids, offsets, last, padding_idx, "sum")
    code, (rows, dim) = kind.code(table), table.shape
    result = kind.empty(tuple(ids.shape), F32, ids)
    grad = kind.dense(kind.cast(grad, code))
    kind.kernels.bag_weight_grad(
        *where, table.data_ptr(), code, rows, dim, None, None, grad.data_ptr(), code, result.data_ptr(),
        *kind.launch(ids),
    )  # fmt: skip
    del held
    return result


class HostBag(torch.autograd.Function):
    """`host_bag` with gradients: of the table, on the host, of touched rows or dense; and of the weights.

    ``skip`` is the padding of the forward pass, ``frozen`` that of the backward pass: an embedding gives the
    padding row but does not train it.
    """

    @staticmethod
    def forward(ctx, table, ids, offsets, weights, mode, skip, frozen, last, sparse):
        ctx.options = mode, skip, frozen, last, sparse
        ctx.shape = table.shape
        reads = mode == "max" or (weights is not None and ctx.needs_input_grad[3])
        ctx.save_for_backward(table if reads else None, ids, offsets, weights)
        return host_bag(table, ids, offsets, weights, mode, skip, last)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        table, ids, offsets, weights = ctx.saved_tensors
        mode, skip, frozen, last, sparse = ctx.options
        to_table = to_weights = None
        if ctx.needs_input_grad[0]:
            argmax = host_bag(table, ids, offsets, None, mode, skip, last, True) if mode == "max" else None
            rows, values = _bag_backward_rows(
                torch_kind(True), grad, ids, offsets, weights, argmax, ctx.shape[0], mode, frozen, last
            )
            rows, values = rows.cpu(), values.cpu()
            if sparse:
                to_table = torch.sparse_coo_tensor(
                    rows.unsqueeze(0), values, ctx.shape, check_invariants=False, is_coalesced=True
                )
            else:
                to_table = values.new_zeros(ctx.shape)
                to_table[rows] = values
        if weights is not None and ctx.needs_input_grad[3]:
            to_weights = _weight_grad(grad, table, ids, offsets, skip, last).to(weights.dtype)
        return to_table, None, None, to_weights, None, None, None, None, None
