"""``torch.ops.lutra`` for `lutra.scan.lookups` and `lookups_topk`."""

from __future__ import annotations

import torch

from ..scan._lookups import _lookups, _lookups_backward, _lookups_topk
from .library import gradient, register


def _setup(ctx, inputs, output):
    tables, codes, bias, ctx.bits, _ = inputs
    ctx.m, ctx.dtype = tables.shape[0], tables.dtype
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(codes)


def _backward(ctx, grad):
    (codes,) = ctx.saved_tensors
    to_tables = to_bias = None
    if ctx.needs_input_grad[0]:
        to_tables = torch.ops.lutra.lookups_backward(grad, codes, ctx.m, ctx.bits).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        to_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias)
    return to_tables, None, to_bias, None, None


def _fake_backward(grad, codes, m, bits=8):
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty((m, grad.shape[0], 1 << bits), dtype=dtype)


def _fake_topk(tables, codes, bias=None, k=10, bits=8):
    shape = (tables.shape[1], k)
    return tables.new_empty(shape), tables.new_empty(shape, dtype=torch.int64)


register(
    'lookups(Tensor tables, Tensor codes, Tensor? bias=None, int bits=8, str dtype="float32") -> Tensor',
    _lookups,
    lambda tables, codes, bias=None, bits=8, dtype="float32": tables.new_empty(
        (tables.shape[1], codes.shape[0]), dtype=getattr(torch, dtype)
    ),
)
register(
    "lookups_backward(Tensor grad, Tensor codes, int m, int bits=8) -> Tensor",
    _lookups_backward,
    _fake_backward,
)
register(
    "lookups_topk(Tensor tables, Tensor codes, Tensor? bias=None, int k=10, int bits=8) -> (Tensor, Tensor)",
    _lookups_topk,
    _fake_topk,
)
gradient("lookups", _backward, _setup)
