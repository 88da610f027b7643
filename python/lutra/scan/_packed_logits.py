"""packed_logits: products with all rows of a packed table, written out or the largest of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from .._arrays import BF16, F16, F32, F64, FLOATS, I64, U8, call
from .._results import Neighbors
from ..gather._packed import KINDS, _unpack_rows, check_packed, row_layout
from ..reference import packed as reference_packed
from ..reference import scan as reference
from ._knn import _tuple

#: Up to so many tokens the fused kernel is the faster without integer products (measured, docs/heads.md);
#: beyond, tiles of rows are decoded and multiplied by torch. The first for 16-bit hidden, whose matrix
#: product is faster.
FUSED_HALF, FUSED_FLOAT = 10, 24
#: The same on CUDA for 16-bit hidden (computed, not measured: there the kernel is limited by the packed bytes
#: of every 32 tokens, tiles by the decoded ones once). float32 never pays for a product in float32.
FUSED_HALF_CUDA = 192
_TILE = 1024
_TILE_VALUES = 1 << 24  # on CUDA: 32 MB of 16-bit values stay in the L2 cache
_NAMES = {F32: "float32", F16: "float16", BF16: "bfloat16", F64: "float32"}


def packed_logits(
    hidden: Any, packed: Any, bias: Any = None, *, kind: str = "int8", group: int | None = None
) -> Any:
    """Products of queries with all rows of a packed table, without decoding the table.

    Parameters
    ----------
    hidden : array, shape (tokens, dim), float32, float16, bfloat16 or float64
    packed : array, shape (rows, row_bytes), uint8
        As `lutra.gather.pack_rows` writes it.
    bias : array, shape (rows,), floating point, optional
    kind, group
        As in `lutra.gather.pack_rows`.

    Returns
    -------
    array, shape (tokens, rows), the type of hidden

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape or option.

    Notes
    -----
    On a CPU with AVX-512 VNNI, int8, int4 and int2 codes are multiplied as the integers that they are:
    hidden is rounded to integers of 16 bits (float16, bfloat16) or 24 bits (float32) of each token's largest
    magnitude, sums are exact. An element loses at most 2**-16 (2**-24) of that magnitude, less than a product
    in the type of hidden rounds off, unless one element of a token is some 100 times larger than the rest.
    Otherwise: few tokens: the packed rows are read once, decoded in registers and summed in float32. More:
    tiles of rows are decoded and multiplied by torch's matrix product in hidden's type. Gradients (torch): to
    hidden and bias.

    On CUDA codes are multiplied as they are by tensor cores, which float32 hidden enters as the sum of two
    float16 terms (23 bits of each value). Few tokens: limited by the bytes of packed; the rows are read again
    for every 32 tokens. More than 192 tokens of float16 or bfloat16: tiles of rows are decoded and multiplied
    by torch (CuPy). float64 is multiplied in tiles.
    """
    return call("packed_logits", _packed_logits, (hidden, packed, bias), (kind, group))


def packed_topk(
    hidden: Any, packed: Any, k: int, bias: Any = None, *, kind: str = "int8", group: int | None = None
) -> Neighbors:
    """The k largest of `packed_logits`, without writing the others; float32.

    Returns
    -------
    scores, ids : arrays, shape (tokens, k)
        Largest first, equal ones by increasing row. Where k > rows the rest is id -1 and score -inf.

    Raises
    ------
    ValueError
        A product that is NaN (on CUDA it comes first); and as `packed_logits`.
    TypeError
        As `packed_logits`; float64 on CUDA.
    """
    return _tuple(Neighbors, call("packed_topk", _packed_topk, (hidden, packed, bias), (k, kind, group)))


def _check(kind, hidden, packed, bias, packed_kind, group):
    for a, name, dims in ((hidden, "hidden", 2), (packed, "packed", 2), (bias, "bias", 1)):
        if a is not None:
            _checks.same_kind(kind, a, name, hidden, "hidden")
            _checks.ndim(a, name, dims)
    code = _checks.dtype(kind, hidden, "hidden", (*FLOATS, F64))
    _checks.dtype(kind, packed, "packed", (U8,))
    at = row_layout(hidden.shape[1], packed_kind, group)
    check_packed(kind, packed, at)
    if bias is not None:
        _checks.dtype(kind, bias, "bias", (*FLOATS, F64))
        if bias.shape[0] != packed.shape[0]:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; it must be ({packed.shape[0]},), one a row"
            )
    return code, at


def _run(kind, hidden, packed, bias, packed_kind, at, out, code, k=0, scores=None, ids=None):
    half = kind.code(hidden) != F32
    hidden = kind.dense(kind.cast(hidden, F32) if half else hidden)
    if bias is not None:
        bias = kind.dense(bias if kind.code(bias) == F32 else kind.cast(bias, F32))
    packed = kind.dense(packed)
    number, (tokens, dim), rows = KINDS[packed_kind], hidden.shape, packed.shape[0]
    more = ()
    if kind.cuda:
        scratch = kind.scratch("packed_logits", hidden, tokens, number, rows, dim, at.group, k, half)
        more = half, *kind.launch(hidden, scratch)
    return kind.kernels.packed_logits(
        kind.ptr(hidden), tokens, kind.ptr(packed), number, rows, dim, at.group, at.row_bytes,
        None if bias is None else kind.ptr(bias), None if out is None else kind.ptr(out), code, k,
        None if scores is None else kind.ptr(scores), None if ids is None else kind.ptr(ids), *more,
    )  # fmt: skip


def fused_tokens(kernels: Any, packed_kind: str, half: bool, cuda: bool = False) -> int:
    """Up to how many tokens the fused kernel is the faster; ``half``: of a 16-bit torch tensor."""
    if cuda:
        return FUSED_HALF_CUDA if half else 1 << 62
    if kernels is not None and kernels.packed_in_integers(KINDS[packed_kind]):
        return 1 << 62
    return FUSED_HALF if half else FUSED_FLOAT


def _tiles(kind, hidden, packed, packed_kind, group):
    """(begin, end, rows in the type of hidden); on the CPU the next may overwrite one."""
    code, dim = kind.code(hidden), hidden.shape[1]
    place = None  # one for all, whose pages are there already
    tile = max(_TILE, _TILE_VALUES // max(dim, 1)) if kind.cuda else _TILE
    if kind.kernels is not None and not kind.cuda and code != F64:
        place = kind.empty((min(_TILE, packed.shape[0]), dim), code, hidden)
    for begin in range(0, packed.shape[0], tile):
        end = min(begin + tile, packed.shape[0])
        out = None if place is None else place[: end - begin]
        rows = _unpack_rows(kind, packed[begin:end], None, dim, packed_kind, group, _NAMES[code], out)
        yield begin, end, kind.cast(rows, F64) if code == F64 else rows


def _packed_logits(kind, hidden, packed, bias=None, packed_kind="int8", group=None):
    code, at = _check(kind, hidden, packed, bias, packed_kind, group)
    tokens, rows = hidden.shape[0], packed.shape[0]
    out = kind.empty((tokens, rows), code, hidden)
    fused = kind.kernels is not None and code != F64 and hidden.shape[1] > 0
    half = code != F32 and (kind.cuda or kind.name == "torch")
    if fused and tokens <= fused_tokens(kind.kernels, packed_kind, half, kind.cuda):
        _run(kind, hidden, packed, bias, packed_kind, at, out, code)
        return out
    for begin, end, tile in _tiles(kind, hidden, packed, packed_kind, group):
        if kind.name == "torch" or code != BF16:
            out[:, begin:end] = hidden @ tile.T
        else:  # NumPy has no product of bfloat16
            out[:, begin:end] = (hidden.astype(np.float32) @ tile.astype(np.float32).T).astype(out.dtype)
    return out if bias is None else kind.cast(out + bias, code)


def _packed_topk(kind, hidden, packed, bias=None, k=10, packed_kind="int8", group=None):
    code, at = _check(kind, hidden, packed, bias, packed_kind, group)
    k = _checks.integer("k", k, 1)
    tokens = hidden.shape[0]
    result = F64 if code == F64 else F32
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "packed_topk")
    if kind.kernels is None or code == F64 or not hidden.shape[1]:
        rows = reference_packed.unpack_rows(kind.to_numpy(packed), hidden.shape[1], packed_kind, group)
        scores = reference.packed_logits(
            kind.to_numpy(hidden), rows, None if bias is None else kind.to_numpy(bias)
        )
        scores, ids = reference.topk_of(scores, k, "packed")
        return kind.from_numpy(scores, result, hidden), kind.from_numpy(ids, I64, hidden)
    scores, ids = kind.empty((tokens, k), F32, hidden), kind.empty((tokens, k), I64, hidden)
    bad = _run(kind, hidden, packed, bias, packed_kind, at, None, F32, k, scores, ids)
    if bad >= 0:
        raise ValueError(reference.nan_message("packed", bad))
    return scores, ids


def _packed_logits_backward(kind, grad, packed, dim, packed_kind="int8", group=None):
    """Gradient to hidden: grad (tokens, rows) times the decoded rows, tile by tile."""
    wide = F64 if kind.code(grad) == F64 else F32
    out = grad.new_zeros((grad.shape[0], dim), dtype=kind._dtypes[wide])
    like = grad[:, :0].new_empty((0, dim))
    for begin, end, tile in _tiles(kind, like, packed, packed_kind, group):
        out += grad[:, begin:end] @ tile
    return kind.cast(out, kind.code(grad))
