"""Cross entropy of logits that are sums of look-ups, as a torch operator.

As in `_tiles`, the logits of a tile of the vocabulary live only as long as the tile. Tokens are taken in
blocks too: a tile's logits, and their gradients, are (block of tokens, tile of rows).
"""

from __future__ import annotations

from typing import Any

import torch

from ..scan._lookups import _lookups, _lookups_backward
from ..torch_ops.library import gradient, register

ops = torch.ops.lutra

TOKENS = 512
#: Fewer rows would make the tables of gradients, (m, tokens, 2**bits), the larger part of the work.
ROWS = 16384


#: Logits of a tile, where there are few tokens.
LOGITS = 4 << 20


def _tiles(n: int, tokens: int):
    step = max(ROWS, LOGITS // max(tokens, 1))
    return ((b, min(b + step, n)) for b in range(0, n, step))


def _logits(kind, tables, codes, bias, begin, end, bits, pad, pad_logits):
    dtype = "float64" if tables.dtype == torch.float64 else "float32"
    part = None if bias is None else bias[begin:end]
    out = _lookups(kind, tables, codes[begin:end], part, bits, dtype)
    if pad_logits is not None and begin <= pad < end:
        out[:, pad - begin] = pad_logits
    return out


def _loss(kind, tables, codes, targets, bias, pad_logits, bits, pad, smoothing):
    n, tokens = codes.shape[0], targets.shape[0]
    lse = tables.new_full((tokens,), -torch.inf)
    picked, mean = tables.new_zeros((tokens,)), tables.new_zeros((tokens,))
    for t0 in range(0, tokens, TOKENS):
        some = slice(t0, t0 + TOKENS)
        few, labels = tables[:, some], targets[some]
        pads = None if pad_logits is None else pad_logits[some]
        for begin, end in _tiles(n, labels.shape[0]):
            logits = _logits(kind, few, codes, bias, begin, end, bits, pad, pads)
            lse[some] = torch.logaddexp(lse[some], torch.logsumexp(logits, 1))
            here = (labels >= begin) & (labels < end)
            place = (labels - begin).clamp(0, end - begin - 1).unsqueeze(1)
            picked[some] += torch.where(here, logits.gather(1, place).squeeze(1), 0)
            if smoothing:
                mean[some] += logits.sum(1) / n
    return lse - (1 - smoothing) * picked - smoothing * mean, lse


def _loss_backward(kind, grad, tables, codes, targets, lse, bias, pad_logits, bits, pad, smoothing):
    n, tokens = codes.shape[0], targets.shape[0]
    to_tables = torch.empty_like(tables, memory_format=torch.contiguous_format)
    to_bias = lse.new_zeros((0 if bias is None else n,))
    to_pad = torch.zeros_like(lse)
    for t0 in range(0, tokens, TOKENS):
        some = slice(t0, t0 + TOKENS)
        few, labels, weight = tables[:, some], targets[some], grad[some].to(lse.dtype).unsqueeze(1)
        pads = None if pad_logits is None else pad_logits[some]
        sums = few.new_zeros(few.shape)
        for begin, end in _tiles(n, labels.shape[0]):
            p = _logits(kind, few, codes, bias, begin, end, bits, pad, pads)
            p.sub_(lse[some].unsqueeze(1)).exp_()
            if smoothing:
                p -= smoothing / n
            here = (labels >= begin) & (labels < end)
            place = (labels - begin).clamp(0, end - begin - 1).unsqueeze(1)
            target = torch.where(here, 1 - smoothing, 0.0).to(p.dtype).unsqueeze(1)
            p.scatter_(1, place, p.gather(1, place) - target)
            p *= weight
            if pads is not None and begin <= pad < end:
                to_pad[some] = p[:, pad - begin]
                p[:, pad - begin] = 0
            if bias is not None:
                to_bias[begin:end] += p.sum(0)
            _lookups_backward(kind, p, codes[begin:end], tables.shape[0], bits, sums)
        to_tables[:, some] = sums
    return to_tables, to_bias, to_pad


register(
    "lookups_cross_entropy(Tensor tables, Tensor codes, Tensor targets, Tensor? bias, Tensor? pad_logits, "
    "int bits, int pad, float smoothing) -> (Tensor, Tensor)",
    _loss,
    lambda tables, codes, targets, *_: (
        tables.new_empty((targets.shape[0],)),
        tables.new_empty((targets.shape[0],)),
    ),
)
register(
    "lookups_cross_entropy_backward(Tensor grad, Tensor tables, Tensor codes, Tensor targets, Tensor lse, "
    "Tensor? bias, Tensor? pad_logits, int bits, int pad, float smoothing) -> (Tensor, Tensor, Tensor)",
    _loss_backward,
    lambda grad, tables, codes, targets, lse, bias=None, *_: (
        torch.empty_like(tables, memory_format=torch.contiguous_format),
        lse.new_empty((0 if bias is None else codes.shape[0],)),
        torch.empty_like(lse),
    ),
)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    tables, codes, targets, bias, pad_logits, ctx.bits, ctx.pad, ctx.smoothing = inputs
    ctx.has = (bias is not None, pad_logits is not None)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(
        tables, codes, targets, output[1], *(t for t in (bias, pad_logits) if t is not None)
    )


def _backward(ctx: Any, grad: Any, _: Any) -> Any:
    tables, codes, targets, lse, *rest = ctx.saved_tensors
    bias = rest.pop(0) if ctx.has[0] else None
    pad_logits = rest.pop(0) if ctx.has[1] else None
    to_tables, to_bias, to_pad = ops.lookups_cross_entropy_backward(
        grad, tables, codes, targets, lse, bias, pad_logits, ctx.bits, ctx.pad, ctx.smoothing
    )
    return (
        to_tables, None, None, None if bias is None else to_bias.to(bias.dtype),
        None if pad_logits is None else to_pad, None, None, None,
    )  # fmt: skip


gradient("lookups_cross_entropy", _backward, _setup)
