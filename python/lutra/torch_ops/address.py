"""``torch.ops.lutra`` for `lutra.address`."""

from __future__ import annotations

import torch

from ..address import _fwht as hadamard
from ..address import _ngrams as grams
from ..address import _sign_hash as sign
from .library import gradient, register


def _weights_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- sign_hash
def _fake(x, bits=8, score="prob", temperature=1.0):
    _, tables = sign._sign_hash_shape(x, bits, score, temperature)
    shape = (*x.shape[:-1], tables)
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=_weights_dtype(x))


def _backward(ctx, _, grad_weights):
    (x,) = ctx.saved_tensors
    return torch.ops.lutra.sign_hash_backward(grad_weights, x, *ctx.options), None, None, None


def _setup(ctx, inputs, output):
    x, *ctx.options = inputs
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(output[0])


register(
    'sign_hash(Tensor x, int bits=8, str score="prob", float temperature=1.0) -> (Tensor, Tensor)',
    sign._sign_hash,
    _fake,
)
register(
    "sign_hash_backward(Tensor grad_weights, Tensor x, int bits, str score, float temperature) -> Tensor",
    sign._sign_hash_backward,
    lambda grad_weights, x, bits, score, temperature: torch.empty_like(
        x, memory_format=torch.contiguous_format
    ),
)
gradient("sign_hash", _backward, _setup)


# ---- fwht (its own gradient)
def _fwht_fake(x, scale=1.0):
    hadamard._fwht_length(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fwht_setup(ctx, inputs, output):
    ctx.scale = inputs[1]


register("fwht(Tensor x, float scale=1.0) -> Tensor", hadamard._fwht, _fwht_fake)
gradient("fwht", lambda ctx, grad: (torch.ops.lutra.fwht(grad, ctx.scale), None), _fwht_setup)


# ---- token_ngrams (integers: no gradient)
def _token_ngrams_fake(tokens, offsets, order, buckets, first_bucket=0, unigrams=True):
    grams._token_ngrams_shape(tokens, offsets, order, buckets, first_bucket, unigrams)
    if offsets is None:
        texts, length = tokens.shape
        longest = torch.sym_min(length, order)
        each = (longest - 1) * (length + 1) - (longest + 2) * (longest - 1) // 2 + (length if unigrams else 0)
        size = texts * each
    else:
        texts = offsets.shape[0]
        size = torch.library.get_ctx().new_dynamic_size()
    return tokens.new_empty((size,), dtype=torch.int64), tokens.new_empty((texts,), dtype=torch.int64)


register(
    "token_ngrams(Tensor tokens, Tensor? offsets, int order, int buckets, int first_bucket=0, "
    "bool unigrams=True) -> (Tensor, Tensor)",
    grams._token_ngrams,
    _token_ngrams_fake,
)
