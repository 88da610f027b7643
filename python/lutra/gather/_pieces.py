"""bag_pieces: sums and means of rows that are put together from pieces of small tables."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from .. import _checks
from .._arrays import F32, F64, FLOATS, I32, I64, NAMES, U8, call, is_torch, kind_of
from ..reference import gather as reference_bag
from ..reference import pieces as reference
from . import _bag, _spread
from ._plan import leave_out

#: Ids are at most so many where addresses are computed from them.
MOST_ROWS = 1 << 31
PRIME = reference.PRIME
KINDS = {"codes": 0, "digits": 1, "qr": 2, "hash": 3, "robe": 4, "modulo": 5, "blocks": 6}
COMBINE = {"concat": 0, "sum": 1, "product": 2}
_MODES = {"sum": 0, "mean": 1}
_COUNTS = {"codes": 2, "digits": 3, "qr": 2, "robe": 8, "modulo": 1, "blocks": 2}


class Pieces(NamedTuple):
    """Where the pieces of a row lie in the table, and what becomes of them.

    Attributes
    ----------
    kind : str
        How piece j of row x is found (``numbers`` in parentheses; P = 2038074743):

        - 'codes' (m, bits): row ``j 2**bits + code_j(x)``; ``stored`` holds the codes, packed.
        - 'digits' (m, q, t): row ``j t + (x div q**j) mod q``, the last one without ``mod q``.
        - 'qr' (c, n): rows ``x div c`` and ``n + x mod c``; n is the number of quotients.
        - 'hash' (m, n, A_0.., B_0..): row ``((A_j x + B_j) mod P) mod n``.
        - 'robe' (m, n, A, B, C, D, E, F): the elements from ``((A x + B j + C) mod P) mod n`` on, going round
          the end, with a minus sign where ``(D x + E j + F) mod P`` is odd.
        - 'modulo' (n,): row ``x mod n``.
        - 'blocks' (s, n): row ``stored[x div s] s + x mod s``, of n blocks.
    numbers : tuple of int
    width : int
        Columns of a piece.
    combine : {'concat', 'sum', 'product'}
        Concatenated, or added, or (two pieces) multiplied element by element.
    """

    kind: str
    numbers: tuple[int, ...]
    width: int
    combine: str = "concat"

    @property
    def m(self) -> int:
        """Pieces of a row."""
        if self.kind in ("codes", "digits", "hash", "robe"):
            return self.numbers[0]
        return 2 if self.kind == "qr" else 1

    @property
    def table_rows(self) -> int:
        """Rows of the table (robe: its elements)."""
        a = self.numbers
        return {
            "codes": lambda: a[0] << a[1], "digits": lambda: a[0] * a[2], "qr": lambda: a[0] + a[1],
            "hash": lambda: a[1], "robe": lambda: a[1], "modulo": lambda: a[0], "blocks": lambda: a[0] * a[1],
        }[self.kind]()  # fmt: skip

    @property
    def dim(self) -> int:
        """Columns of a row."""
        return self.width * (self.m if self.combine == "concat" else 1)


def bag_pieces(
    table: Any,
    ids: Any,
    offsets: Any = None,
    weights: Any = None,
    *,
    pieces: Pieces,
    rows: int,
    stored: Any = None,
    piece_weights: Any = None,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
) -> Any:
    """Sums or means of rows whose pieces lie in small tables, at addresses that are stored or computed.

    Product and residual quantization, quotient and remainder, hash embeddings, ROBE, MEmCom and others are
    all of this kind; the rows themselves are never built.

    Parameters
    ----------
    table : array, float32, float16, bfloat16 or float64
        ``pieces.table_rows`` rows of ``pieces.width`` columns, in any shape (robe: as many elements).
    ids, offsets, weights, padding_idx, include_last_offset
        As `bag`.
    pieces : Pieces
    rows : int
        Ids lie in [0, rows).
    stored : array, optional
        For 'codes': (rows, bytes) uint8, entry j of a row in the bits [j bits, (j + 1) bits), lowest first;
        for 'blocks': (ceil(rows / s),) int32.
    piece_weights : array, shape (rows, m), the type of table, optional
        Factor of each piece of each row; not for 'concat' and 'product'.
    mode : {'sum', 'mean'}, default 'sum'
        For maxima decode rows (bags of one id) and give them to `bag`.

    Returns
    -------
    array, shape (bags, pieces.dim), the type of table

    Raises
    ------
    IndexError
        As `bag`; a stored block that lies outside the table.
    TypeError, ValueError
        A wrong type, dtype, shape or option.

    Notes
    -----
    Accumulated in float32. Gradients (torch): to table, piece_weights and weights, in an order that does not
    depend on the number of threads. Cost of a row: one random read of its code and m reads from the cache
    for code books; m random reads for large tables. float64 takes a composition of torch's ops. CUDA takes
    kinds of at most 64 numbers (hash: 31 pieces); what is out of range makes its bag NaN there.

    References
    ----------
    Jégou et al., PAMI 2011 (PQ); Shi et al., arXiv 1909.02107 (QR); Svenstrup et al., NeurIPS 2017 (hash);
    Desai et al., arXiv 2108.02191 (ROBE); Pansare et al., arXiv 2108.11574 (MEmCom); arXiv 2308.08688
    (digits).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> books = np.arange(8, dtype=np.float32).reshape(2, 2, 2)  # 2 pieces, 2 entries, 2 columns
    >>> codes = np.array([[0b00], [0b01], [0b11]], np.uint8)  # entries (0, 0), (1, 0), (1, 1)
    >>> pieces = lutra.gather.Pieces("codes", (2, 1), width=2)
    >>> lutra.gather.bag_pieces(books, np.array([[1], [2]]), pieces=pieces, rows=3, stored=codes)
    array([[2., 3., 4., 5.],
           [2., 3., 6., 7.]], dtype=float32)
    """
    check_pieces(pieces, rows)
    if is_torch(table) and composes(table):
        return _compose(
            table, ids, offsets, weights, stored, piece_weights, pieces, rows, mode, padding_idx,
            include_last_offset,
        )  # fmt: skip
    arrays = (table, ids, offsets, weights, stored, piece_weights)
    options = (*flat(pieces), rows, mode, padding_idx, include_last_offset)
    return call("bag_pieces", _bag_pieces, arrays, options)


def flat(pieces: Pieces) -> tuple[Any, ...]:
    """The fields as an operator takes them."""
    return pieces.kind, list(pieces.numbers), pieces.width, pieces.combine


# ---------------------------------------------------------------- checks
def check_pieces(pieces: Pieces, rows: int) -> None:
    """ValueError unless the numbers go together."""
    kind, a, width, combine = pieces
    _checks.choice("kind of pieces", kind, KINDS)
    _checks.choice("combine", combine, COMBINE)
    _checks.integer("width", width, 0)
    rows = _checks.integer("rows", rows, 0, None if kind == "codes" else MOST_ROWS)
    count = 2 + 2 * a[0] if kind == "hash" and a else _COUNTS.get(kind, 2)
    if len(a) != count:
        raise ValueError(f"numbers of pieces {kind!r} must be {count}, got {len(a)}")
    for i, n in enumerate(a):
        _checks.integer(f"numbers[{i}]", n, 0)
    if kind == "codes" and not 1 <= a[1] <= 16:
        raise ValueError(f"bits must be in [1, 16], got {a[1]}")
    positive = {"codes": 1, "digits": 3, "qr": 1, "hash": 2, "robe": 2, "modulo": 1, "blocks": 1}[kind]
    for i in range(positive):
        _checks.integer(f"numbers[{i}]", a[i], 1)
    if kind in ("hash", "robe"):
        for i in range(2, len(a)):
            _checks.integer(f"numbers[{i}]", a[i], 0, PRIME - 1)
    if kind == "digits":
        last = max(rows - 1, 0)
        for _ in range(1, a[0]):
            last //= a[1]
        if last >= a[2] or a[1] > a[2]:
            raise ValueError(f"numbers of pieces 'digits', {tuple(a)}: too few for ids below {rows}")
    if kind == "qr" and -(-rows // a[0]) > a[1]:
        raise ValueError(
            f"numbers of pieces 'qr': {rows} rows in parts of {a[0]} have more than {a[1]} quotients"
        )
    if kind == "robe" and width > a[1]:
        raise ValueError(f"width is {width}; it must be at most the {a[1]} elements of the array")
    if kind != "codes" and pieces.table_rows > MOST_ROWS:
        raise ValueError(f"the table has {pieces.table_rows} rows; it must have at most {MOST_ROWS}")
    if combine == "product" and pieces.m != 2:
        raise ValueError(f"combine 'product' is for two pieces, got {pieces.m}")
    if combine == "concat" and kind not in ("codes", "digits", "robe") and pieces.m > 1:
        raise ValueError(f"pieces {kind!r} are not concatenated: combine must be 'sum' or 'product'")
    if kind == "robe" and combine != "concat":
        raise ValueError(f"pieces 'robe' are concatenated; got combine {combine!r}")


def _check(kind, table, stored, piece_weights, pieces, rows):
    """Check the arrays that make rows; the dtype code of the table."""
    code = _checks.dtype(kind, table, "table", (*FLOATS, F64))
    wanted = pieces.table_rows * (1 if pieces.kind == "robe" else pieces.width)
    if prod(table.shape) != wanted:
        shape = f"({wanted},)" if pieces.kind == "robe" else f"({pieces.table_rows}, {pieces.width})"
        raise ValueError(f"table has shape {tuple(table.shape)}; pieces need as many elements as {shape}")
    if pieces.kind in ("codes", "blocks"):
        if stored is None:
            raise ValueError(f"stored is missing: pieces {pieces.kind!r} need it")
        _checks.dtype(kind, stored, "stored", (U8 if pieces.kind == "codes" else I32,))
        a = pieces.numbers
        need = (rows, (a[0] * a[1] + 7) // 8) if pieces.kind == "codes" else (-(-rows // a[0]),)
        if tuple(stored.shape) != need:
            raise ValueError(f"stored has shape {tuple(stored.shape)}; it must be {need}")
    elif stored is not None:
        raise ValueError(f"stored is for pieces 'codes' and 'blocks', not {pieces.kind!r}")
    if piece_weights is not None:
        if pieces.combine != "sum":
            raise ValueError(f"piece_weights go with combine 'sum', got {pieces.combine!r}")
        if _checks.dtype(kind, piece_weights, "piece_weights", (*FLOATS, F64)) != code:
            raise TypeError(f"piece_weights must be {NAMES[code]}, as table is; got {piece_weights.dtype}")
        if tuple(piece_weights.shape) != (rows, pieces.m):
            raise ValueError(
                f"piece_weights has shape {tuple(piece_weights.shape)}; it must be ({rows}, {pieces.m})"
            )
    return code


def composes(table: Any) -> bool:
    """Whether a torch table is served by torch's own ops: float64, nothing compiled, other devices."""
    import torch

    from .. import _backend

    module = _backend.core if table.is_cpu else _backend.cuda if table.is_cuda else None
    return table.dtype == torch.float64 or module is None


# ---------------------------------------------------------------- forward
def _bag_pieces(
    kind, table, ids, offsets=None, weights=None, stored=None, piece_weights=None, source="codes", numbers=(),
    width=0, combine="concat", rows=0, mode="sum", padding_idx=None, include_last_offset=False,
):  # fmt: skip
    pieces = Pieces(source, tuple(numbers), width, combine)
    check_pieces(pieces, rows)  # of an operator called by itself
    _checks.choice("mode", mode, _MODES)
    _bag._same(kind, table, "table", ids, offsets, weights, stored, piece_weights)
    code = _check(kind, table, stored, piece_weights, pieces, rows)
    bags, length = _bag._layout(ids, offsets, include_last_offset)
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    if weights is not None:
        weights = _bag._weights(kind, weights, ids, mode, F64 if code == F64 else F32)
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "bag_pieces")
        given = _bag._to_numpy(kind, table, ids, offsets, weights, stored, piece_weights)
        out = _by_reference(pieces, given, rows, mode, padding_idx, include_last_offset)
        return kind.from_numpy(out, code, table)
    table = kind.dense(table)
    stored, piece_weights = (None if a is None else kind.dense(a) for a in (stored, piece_weights))
    out = kind.empty((bags, pieces.dim), code, table)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    bad = kind.kernels.pieces(
        kind.ptr(ids), id_code, n_ids, _bag._ptr(kind, offsets), include_last_offset, bags, length, padding,
        _MODES[mode], *_source(kind, pieces, rows, stored), COMBINE[combine], kind.ptr(table), code, width,
        _bag._ptr(kind, weights), _bag._ptr(kind, piece_weights), kind.ptr(out), *kind.launch(table),
    )  # fmt: skip
    if bad != -1:
        _explain(kind, ids, offsets, rows, include_last_offset, stored, pieces)
    return out


def _source(kind, pieces, rows, stored):
    """A PieceSource, as bindings take it."""
    code_bytes = stored.shape[1] if pieces.kind == "codes" else 0
    return (
        KINDS[pieces.kind], pieces.m, rows, _bag._ptr(kind, stored), code_bytes, list(pieces.numbers),
        pieces.table_rows,
    )  # fmt: skip


def _explain(kind, ids, offsets, rows, include_last_offset, stored, pieces):
    """A kernel met a bad id, offset or block: raise the IndexError that says which."""
    offsets = None if offsets is None else kind.to_numpy(offsets)
    reference_bag.check_ids(kind.to_numpy(ids), offsets, rows, include_last_offset)
    if pieces.kind == "blocks":
        _check_blocks(kind.to_numpy(stored), pieces.numbers[1])
    raise IndexError("ids, offsets or stored changed while the kernel ran")


def _check_blocks(blocks, n):
    bad = (blocks < 0) | (blocks >= n)
    if bad.any():
        i = int(bad.argmax())
        raise IndexError(f"stored[{i}] is {blocks[i]}; it must lie in [0, {n}), the blocks of the table")


def _by_reference(pieces, given, rows, mode, padding_idx, include_last_offset):
    table, ids, offsets, weights, stored, piece_weights = given
    if pieces.kind == "blocks":
        _check_blocks(stored, pieces.numbers[1])
    flat_ids = reference.checked_rows(ids, offsets, rows, include_last_offset)
    table = table.reshape(-1) if pieces.kind == "robe" else table.reshape(pieces.table_rows, pieces.width)
    parts = reference.rows(
        pieces.kind, pieces.numbers, pieces.combine, table, flat_ids, stored, piece_weights, pieces.width
    )
    return _reduce(
        reference_bag.bag, parts, ids, offsets, weights, mode, padding_idx, rows, include_last_offset
    )


def _reduce(function, parts, ids, offsets, weights, mode, padding_idx, rows, include_last_offset):
    """Bags of decoded rows ``parts``, one per entry, by ``function``."""
    pad = None if padding_idx is None else padding_idx % max(rows, 1)
    parts, entries, pad = leave_out(parts, ids.reshape(-1), pad)
    offsets = None if offsets is None else offsets.astype("int64")
    return function(
        parts, entries.reshape(ids.shape), offsets, weights, mode=mode, padding_idx=pad,
        include_last_offset=include_last_offset,
    )  # fmt: skip


# ---------------------------------------------------------------- gradients
def _pieces_backward(
    kind, grad, ids, offsets=None, weights=None, stored=None, piece_weights=None, table=None, source="codes",
    numbers=(), width=0, combine="concat", rows=0, mode="sum", padding_idx=None, include_last_offset=False,
):  # fmt: skip
    """Gradient of the table, (table_rows, width); robe: (elements, 1). ``table`` is read for products."""
    if kind.kernels is None:
        raise NotImplementedError(
            "the operator lutra::bag_pieces has a gradient only where lutra is compiled; "
            "lutra.gather.bag_pieces composes torch's ops instead"
        )
    pieces = Pieces(source, tuple(numbers), width, combine)
    code = _checks.dtype(kind, grad, "grad", FLOATS)
    bags, length = _bag._layout(ids, offsets, include_last_offset)
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    grad = kind.dense(grad)
    weights = None if weights is None else _bag._weights(kind, weights, ids, mode, F32)
    stored, piece_weights = (None if a is None else kind.dense(a) for a in (stored, piece_weights))
    n_ids = ids.shape[0] if offsets is not None else bags * length
    where = (
        kind.ptr(ids), id_code, n_ids, _bag._ptr(kind, offsets), include_last_offset, bags, length, padding,
        _MODES[mode], *_source(kind, pieces, rows, stored),
    )  # fmt: skip
    if kind.cuda:
        return _backward_on_cuda(kind, grad, code, where, pieces, table, weights, piece_weights)
    # Residual codes: sums of all rows of the books, unless few are touched.
    summed = combine == "sum" and source == "codes" and piece_weights is None and pieces.numbers[1] <= 8
    summed = summed and n_ids >= 512
    if summed or (combine == "concat" and source in ("codes", "digits")):
        out = _spread.empty(kind, (pieces.table_rows, width), code, grad)
        bad = kind.kernels.pieces_backward(
            *where, summed, width, kind.ptr(grad), code, _bag._ptr(kind, weights), kind.ptr(out)
        )
        if bad != -1:
            _explain(kind, ids, offsets, rows, include_last_offset, stored, pieces)
        return out
    # Pieces of all rows may meet in a row of the table: their addresses are sorted, as ids of bags are.
    n = n_ids * pieces.m
    at = kind.empty((n,), I64, grad)
    signed = source == "robe" or mode == "mean" or weights is not None or piece_weights is not None
    factors = kind.empty((n,), F32, grad) if signed else None
    bad = kind.kernels.piece_addresses(
        *where, code, _bag._ptr(kind, weights), _bag._ptr(kind, piece_weights), kind.ptr(at),
        _bag._ptr(kind, factors),
    )  # fmt: skip
    if bad != -1:
        _explain(kind, ids, offsets, rows, include_last_offset, stored, pieces)
    return _sum_sorted(kind, grad, pieces, at, factors, n, offsets, include_last_offset, bags, length, table)


def _backward_on_cuda(kind, grad, code, where, pieces, table, weights, piece_weights):
    """Addresses of all pieces are made, sorted and summed in one call, whatever the kind."""
    if pieces.combine != "product":
        table = None
    elif table is not None:
        table = kind.dense(table)
    out = kind.empty((pieces.table_rows, 1 if pieces.kind == "robe" else pieces.width), code, grad)
    arguments = (
        *where, COMBINE[pieces.combine], pieces.width, _bag._ptr(kind, table), kind.ptr(grad), code,
        _bag._ptr(kind, weights), _bag._ptr(kind, piece_weights), kind.ptr(out),
    )  # fmt: skip
    workspace = kind.empty((kind.kernels.piece_grad(*arguments, None, *kind.launch(grad)),), U8, grad)
    kind.kernels.piece_grad(*arguments, *kind.launch(grad, workspace))
    return out


def _sum_sorted(kind, grad, pieces, at, factors, n, offsets, include_last_offset, bags, length, table):
    """Gradients of bags, times the factors, summed at the addresses ``at`` of their pieces, in order."""
    m, rows, code = pieces.m, pieces.table_rows, kind.code(grad)
    if offsets is not None:
        offsets = kind.cast(offsets, I64) * m
    order, starts, touched, bag_of, count, workspace = _spread.plan_memory(kind, grad, n, rows + 1)
    ptr = kind.ptr
    # The address behind the table is that of padding.
    where = (ptr(at), I64, n, _bag._ptr(kind, offsets), include_last_offset, bags, length * m, rows, 0)
    plan = (ptr(order), ptr(starts), ptr(touched), ptr(bag_of), None, ptr(count))
    kind.kernels.bag_sort(*where, rows + 1, *plan, ptr(workspace), workspace.shape[0])
    if pieces.kind == "robe" or pieces.combine == "product":
        robe = pieces.kind == "robe"
        out = _spread.empty(kind, (rows, 1 if robe else pieces.width), code, grad)
        kind.kernels.piece_sums(
            KINDS[pieces.kind], m, pieces.width, rows, pieces.dim, n, ptr(at), ptr(order), ptr(starts),
            ptr(touched), ptr(bag_of), ptr(count), _bag._ptr(kind, factors),
            None if robe else ptr(kind.dense(table)), ptr(grad), bags, code, ptr(out),
        )  # fmt: skip
        return out
    dim = pieces.width
    few = _spread.few_pages(kind, n, rows, dim * grad.dtype.itemsize)
    height = int(count[0]) if few else rows
    out = kind.empty((height, dim), code, grad) if few else _spread.empty(kind, (rows, dim), code, grad)
    kind.kernels.bag_backward(
        *where, rows, dim, *plan, ptr(grad), code, _bag._ptr(kind, factors), None, not few, ptr(out)
    )
    return _spread.spread(kind, touched[:height], out, rows) if few else out


def _piece_dots(
    kind, grad, table, ids, offsets=None, stored=None, source="codes", numbers=(), width=0, combine="concat",
    rows=0, padding_idx=None, include_last_offset=False,
):  # fmt: skip
    """<grad of the bag, piece j of the row> of each entry: (n_ids, m) float32; (n_ids, 1) for a product."""
    pieces = Pieces(source, tuple(numbers), width, combine)
    code = _checks.dtype(kind, table, "table", FLOATS)
    bags, length = _bag._layout(ids, offsets, include_last_offset)
    padding = _bag._padding(padding_idx, rows)
    ids, offsets, id_code = _bag._ids(kind, ids, offsets)
    grad, table = kind.dense(grad), kind.dense(table)
    _checks.dtype(kind, grad, "grad", (code,))
    stored = None if stored is None else kind.dense(stored)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    dots = kind.empty((n_ids, 1 if combine == "product" else pieces.m), F32, grad)
    bad = kind.kernels.piece_dots(
        kind.ptr(ids), id_code, n_ids, _bag._ptr(kind, offsets), include_last_offset, bags, length, padding,
        _MODES["sum"], *_source(kind, pieces, rows, stored), COMBINE[combine], kind.ptr(table), code, width,
        kind.ptr(grad), kind.ptr(dots), *kind.launch(grad),
    )  # fmt: skip
    if bad != -1:
        _explain(kind, ids, offsets, rows, include_last_offset, stored, pieces)
    return dots


# ---------------------------------------------------------------- composition in torch's ops
def addresses(pieces: Pieces, ids: Any, stored: Any = None) -> tuple[Any, Any]:
    """`lutra.reference.pieces.addresses` in torch: (n, m) int64, and signs or None. Nothing exceeds int64."""
    import torch

    x, a = ids.long().reshape(-1, 1), pieces.numbers
    j = torch.arange(pieces.m, device=ids.device)
    if pieces.kind == "codes":
        m, bits = a
        codes = stored[x[:, 0]]
        if bits == 8:
            entries = codes[:, :m].long()
        else:
            padded, first = torch.nn.functional.pad(codes, (0, 2)).long(), j * bits
            byte = first // 8
            word = padded[:, byte] | padded[:, byte + 1] << 8 | padded[:, byte + 2] << 16
            entries = word >> first % 8 & (1 << bits) - 1
        return entries + (j << bits), None
    if pieces.kind == "digits":
        m, q, t = a
        digits = []
        for i in range(m):
            above = x // q if i + 1 < m else 0 * x  # the last digit is all that is left
            digits.append(i * t + x - above * q)
            x = above
        return torch.cat(digits, 1), None
    if pieces.kind == "qr":
        return torch.cat([x // a[0], a[1] + x % a[0]], 1), None
    if pieces.kind == "hash":
        m = a[0]
        factor, shift = (torch.tensor(v, device=ids.device) for v in (a[2 : 2 + m], a[2 + m :]))
        return (factor * (x % PRIME) + shift) % PRIME % a[1], None
    if pieces.kind == "robe":
        _, n, h, chunk, shift, sign_h, sign_chunk, sign_shift = a
        x = x % PRIME
        odd = (sign_h * x + sign_chunk * j + sign_shift) % PRIME % 2
        return (h * x + chunk * j + shift) % PRIME % n, 1 - 2 * odd
    if pieces.kind == "modulo":
        return x % a[0], None
    return stored[x // a[0]].long() * a[0] + x % a[0], None


def compose_rows(pieces: Pieces, table: Any, ids: Any, stored: Any = None, piece_weights: Any = None) -> Any:
    """Rows (n, dim) in torch's own ops, differentiable: what kernels are compared with."""
    import torch

    index, signs = addresses(pieces, ids, stored)
    if pieces.kind == "robe":
        at = (index[..., None] + torch.arange(pieces.width, device=ids.device)) % pieces.table_rows
        parts = table.reshape(-1)[at]
    else:
        parts = table.reshape(pieces.table_rows, pieces.width)[index]
    if signs is not None:
        parts = parts * signs[..., None]
    if piece_weights is not None:
        parts = parts * piece_weights[ids][..., None]
    if pieces.combine == "concat":
        return parts.reshape(parts.shape[0], pieces.dim)
    return parts.sum(1) if pieces.combine == "sum" else parts[:, 0] * parts[:, 1]


def _compose(
    table, ids, offsets, weights, stored, piece_weights, pieces, rows, mode, padding_idx, include_last_offset
):
    from ..compress.formats.base import check_ids

    _checks.choice("mode", mode, _MODES)
    _check(kind_of(table, "table"), table, stored, piece_weights, pieces, rows)
    flat_ids = check_ids(ids.reshape(-1), rows)
    parts = compose_rows(pieces, table, flat_ids, stored, piece_weights)
    pad = None if padding_idx is None else _bag._padding(padding_idx, rows)
    parts, entries, pad = leave_out(parts, flat_ids, pad)
    return _bag.bag(
        parts, entries.reshape(ids.shape), offsets, weights, mode=mode, padding_idx=pad,
        include_last_offset=include_last_offset,
    )  # fmt: skip
