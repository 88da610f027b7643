"""``torch.ops.lutra`` for `lutra.address.simhash`, `fde` and `ball_carving`, none of which has a gradient;
and the same in torch's own ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..address import _ball_carving as carving
from ..address import _fde as encodings
from ..address import _simhash as hashing
from ..address._fde_encoder import FDE, encoder_of, tables_of
from .library import register

ops = torch.ops.lutra
_DISTANCE = 40  # a distance in the bits above a token's number


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def compose_simhash(x: Tensor, planes: Tensor) -> Tensor:
    """Partitions, on any device."""
    x = _wide(x)
    bits = x @ planes.to(x.dtype) > 0  # (n, k) or (repetitions, n, k)
    number = torch.zeros(bits.shape[:-1], dtype=torch.int32, device=x.device)
    for i in range(bits.shape[-1]):
        number = 2 * number + (bits[..., i] ^ (number & 1))
    return number if number.dim() == 1 else number.T.contiguous()


def _blocks(tokens: Tensor, ptr: Tensor, e: FDE, query: bool) -> tuple[Tensor, Tensor]:
    """Blocks (documents, repetitions, partitions, width) and how many tokens each has."""
    x = _wide(tokens)
    planes, psi, scale, _ = tables_of(e)
    n, documents, number = x.shape[0], ptr.shape[0] - 1, 1 << e.k_sim
    shape = (documents, e.repetitions, number)
    if n == 0:
        return x.new_zeros((*shape, e.width)), ptr.new_zeros(shape)
    partition = compose_simhash(x, torch.from_numpy(planes.copy()).to(x))
    document = torch.searchsorted(ptr, torch.arange(n, device=x.device), right=True) - 1
    bits = torch.arange(number, device=x.device)
    bits = bits ^ (bits >> 1)
    blocks, lengths = [], []
    for r in range(e.repetitions):
        y = x if psi is None else x @ torch.from_numpy(psi[r]).to(x) * scale
        key, order = torch.sort(document * number + partition[:, r], stable=True)
        begin = torch.searchsorted(key, torch.arange(documents * number + 1, device=x.device))
        length = (begin[1:] - begin[:-1]).view(documents, number)
        block = ops.bag(y, order, begin, None, None, None, "sum", None, True).view(documents, number, -1)
        if not query:
            block = block / length.clamp(min=1).unsqueeze(-1)
        if not query and e.fill_empty:
            first = order[begin[:-1].clamp(max=n - 1)].view(documents, number)
            nearest = torch.where(length > 0, first, 1 << 60)[:, bits.argsort()]  # in the order of the bits
            for bit in range(e.k_sim):
                other = nearest.view(documents, -1, 2, 1 << bit).flip(2).reshape(documents, number)
                nearest = torch.minimum(nearest, other + (1 << _DISTANCE))
            nearest = (nearest & ((1 << _DISTANCE) - 1))[:, bits]
            empty = ((length == 0) & (length.sum(1, keepdim=True) > 0)).unsqueeze(-1)
            block = torch.where(empty, y[nearest], block)
        blocks.append(block)
        lengths.append(length)
    return torch.stack(blocks, 1), torch.stack(lengths, 1)


def compose(tokens: Tensor, ptr: Tensor, e: FDE, query: bool) -> Tensor:
    """Encodings, on any device."""
    out = _blocks(tokens, ptr, e, query)[0].flatten(1)
    return out if e.final_dim is None else sketched(out, e)


def sketched(out: Tensor, e: FDE) -> Tensor:
    """The final count-sketch: sums in a fixed order."""
    final = tables_of(e).final
    assert final is not None
    target, sign, length = final
    to, order = torch.sort(torch.from_numpy(target).to(out.device), stable=True)
    begin = torch.searchsorted(to, torch.arange(length + 1, device=out.device, dtype=to.dtype))
    weights = torch.from_numpy(sign).to(out)[order]
    return ops.bag(out.T.contiguous(), order, begin, weights, None, None, "sum", None, True).T.contiguous()


def occupied(dense: Tensor, tokens: Tensor, ptr: Tensor, e: FDE) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of dense encodings that have tokens."""
    planes = torch.from_numpy(e.planes.copy()).to(tokens.device)
    numbers = ops.simhash(tokens, planes).long()
    document = torch.searchsorted(ptr, torch.arange(tokens.shape[0], device=ptr.device), right=True) - 1
    numbers += torch.arange(e.repetitions, device=ptr.device) << e.k_sim
    found = torch.unique(document[:, None] * e.num_blocks + numbers)
    begin = torch.searchsorted(found, torch.arange(ptr.shape[0], device=ptr.device) * e.num_blocks)
    return begin, (found % e.num_blocks).int(), dense.view(-1, e.width)[found]


def compose_blocks(tokens: Tensor, ptr: Tensor, e: FDE) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of queries that have tokens, on any device."""
    blocks, lengths = _blocks(tokens, ptr, e, True)
    row, block = lengths.flatten(1).nonzero(as_tuple=True)
    begin = torch.searchsorted(row, torch.arange(ptr.shape[0], device=row.device))
    return begin, block.int(), blocks.flatten(1, 2)[row, block]


def _simhash_fake(x, planes):
    return x.new_empty(hashing.shape_of(x, planes), dtype=torch.int32)


def _out(tokens):
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32


def _fde_fake(tokens, ptr, *options):
    e = encoder_of(*options[:8])
    return tokens.new_empty((ptr.shape[0] - 1, e.dim), dtype=_out(tokens))


def _fde_blocks_fake(tokens, ptr, *options):
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        ptr.new_empty(ptr.shape),
        ptr.new_empty((found,), dtype=torch.int32),
        tokens.new_empty((found, encoder_of(*options).width), dtype=_out(tokens)),
    )


def _carving_fake(tokens, ptr, threshold):
    found = torch.library.get_ctx().new_dynamic_size()
    return tokens.new_empty((found, tokens.shape[1]), dtype=_out(tokens)), ptr.new_empty(ptr.shape)


_ENCODER = (
    "int d, int repetitions, int k_sim, int d_proj, str? projection, bool fill_empty, int? final_dim, "
    "int seed"
)
register("simhash(Tensor x, Tensor planes) -> Tensor", hashing._simhash, _simhash_fake)
register(f"fde(Tensor tokens, Tensor ptr, {_ENCODER}, bool query=False) -> Tensor", encodings._fde, _fde_fake)
register(
    f"fde_blocks(Tensor tokens, Tensor ptr, {_ENCODER}) -> (Tensor, Tensor, Tensor)",
    encodings._fde_blocks,
    _fde_blocks_fake,
)
register(
    "ball_carving(Tensor tokens, Tensor ptr, float threshold) -> (Tensor, Tensor)",
    carving._ball_carving,
    _carving_fake,
)
