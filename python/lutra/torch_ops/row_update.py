"""``torch.ops.lutra`` for `lutra.gather.update_rows` and `update_bags`, and their steps in torch's own
operations."""

from __future__ import annotations

import torch

from ..gather._update import _outside, _update_bags, _update_rows
from .library import register

_STATE = "Tensor(b!)? s0, Tensor(c!)? s1, str rule, float[] numbers"
register(
    f"update_rows(Tensor(a!) table, Tensor rows, Tensor grads, {_STATE}, int? seed=None) -> ()",
    _update_rows,
    lambda *_: None,
)
register(
    "update_bags(Tensor(a!) table, Tensor grad, Tensor ids, Tensor? offsets, Tensor? weights, "
    # not named mode: torch's functionalization of ops that mutate has an argument of that name itself
    f'Tensor? argmax, {_STATE}, str reduction="sum", int? padding_idx=None, bool include_last_offset=False, '
    "int? seed=None) -> ()",
    _update_bags,
    lambda *_: None,
)


def step(w, g, s0, s1, rule, numbers):
    """One step on whole tensors, in place: w (n, dim) and g of one type, s0 and s1 the state
    (csrc/gather/row_update.h)."""
    lr, shrink, a, b, eps, scale = numbers
    if shrink != 1:
        w.mul_(shrink)
    if rule == "sgd":
        w.add_(g, alpha=-lr)
    elif rule == "momentum":
        s0.mul_(a).add_(g)
        w.add_(s0, alpha=-lr)
    elif rule == "adagrad":
        s0.addcmul_(g, g)
        w.addcdiv_(g, s0.sqrt().add_(eps), value=-lr)
    elif rule == "rowwise_adagrad":
        if g.numel():
            s0.add_(g.square() if g.dim() == 1 else g.square().flatten(1).mean(1))
        rate = (lr / s0.sqrt().add_(eps)).reshape(-1, *[1] * (g.dim() - 1))
        w.sub_(g * rate)
    else:
        s0.lerp_(g, a)
        s1.lerp_(g * g, b)
        w.addcdiv_(s0, s1.sqrt().mul_(scale).add_(eps), value=-lr)


def step_rows(table, rows, grads, s0, s1, rule, numbers, seed):
    """`lutra.gather.update_rows` by torch's operations: on any device, in any floating type."""
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    touched, slot = torch.unique(rows, return_inverse=True)
    if not table.is_cuda and rows.numel() and (int(touched[0]) < 0 or int(touched[-1]) >= table.shape[0]):
        k = int(((rows < 0) | (rows >= table.shape[0])).to(torch.uint8).argmax())
        _outside(rows, k, table.shape[0])
    g = torch.zeros(len(touched), table.shape[1], dtype=wide, device=table.device)
    g.index_add_(0, slot, grads.to(wide))
    table = table.detach()
    w = table[touched].to(wide)
    p0, p1 = (None if s is None else s[touched] for s in (s0, s1))
    step(w, g, p0, p1, rule, numbers)
    for whole, part in zip((s0, s1), (p0, p1)):
        if whole is not None:
            whole[touched] = part
    if seed is not None:
        w = round_bfloat16(w, random_bits(seed, touched, table.shape[1]))
    table[touched] = w.to(table.dtype)


def _signed(n):
    return n - (1 << 64) if n >= 1 << 63 else n


def random_bits(seed, rows, dim):
    """`lutra.reference.row_update.random_bits` on torch tensors (int64, whose products wrap)."""

    def down(x, n, bits=64):  # a logical shift of the low `bits`
        return (x >> n) & ((1 << (bits - n)) - 1)

    x = (rows.long() + 1) * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    x = (x ^ down(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ down(x, 27)) * _signed(0x94D049BB133111EB)
    key = down(x ^ down(x, 31), 32)
    low = 0xFFFFFFFF
    b = (key[:, None] + torch.arange(dim, device=rows.device) * 0x9E3779B9) & low
    b = ((b ^ (b >> 16)) * 0x7FEB352D) & low
    b = ((b ^ (b >> 15)) * 0x846CA68B) & low
    return (b ^ (b >> 16)) >> 16


def round_bfloat16(x, bits):
    """float32 values of which bfloat16 keeps all; see the reference."""
    u = x.view(torch.int32)
    finite = (u & 0x7F800000) != 0x7F800000
    return torch.where(finite, (u + bits.to(torch.int32)) & -0x10000, u).view(torch.float32)
