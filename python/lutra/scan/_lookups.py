"""lookups: sums of look-ups over packed codes, written out or the largest of them."""

from __future__ import annotations

import contextlib
from typing import Any

from .. import _checks
from .._arrays import BF16, F16, F32, F64, I64, NAMES, U8, call, is_torch
from .._results import Neighbors
from ..reference import scan as reference
from ._knn import _tuple

_RESULTS = {"float32": F32, "float16": F16, "bfloat16": BF16, "float64": F64}


def lookups(tables: Any, codes: Any, bias: Any = None, *, bits: int = 8, dtype: str | None = None) -> Any:
    """Sums of look-ups: ``out[t, i] = bias[i] + sum_j tables[j, t, codes[i, j]]``.

    With ``tables[j, t, c]`` the product of part j of a query t and centroid c of code book j, these are the
    products of the query with all product-quantized rows (see `pq_logits`): the logits of a tied head, say.

    Parameters
    ----------
    tables : array, shape (m, tokens, 2**bits), float32 or float64
    codes : array, shape (n, ceil(m * bits / 8)), uint8
        Entry j of a row is its bits [j * bits, (j + 1) * bits), the lowest first.
    bias : array, shape (n,), float32, optional
    bits : int, default 8
        1 to 8.
    dtype : {'float32', 'float16', 'bfloat16'}, optional
        Of the result; default that of tables.

    Returns
    -------
    array, shape (tokens, n)

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape or option.

    Notes
    -----
    On processors with AVX-512 VBMI entries are rounded to 24 bits of the widest table's range (16 bits where
    the result has 16 bits itself) and summed exactly, which takes a tenth of the time of look-ups in memory;
    elsewhere, and for tables with NaN or infinities, in float32. Gradients (torch): to tables and bias. Cost:
    tokens n m look-ups, 7 vector instructions for 64 of them and each byte of an entry. On CUDA a byte of
    codes is one look-up, 32 a cycle and multiprocessor, for codes of 8, 4, 2 or 1 bits and rows of at most 96
    bytes on an H100, 64 on an A100; others are looked up in memory, at an eighth of that. The gradient to
    tables has a kernel for all codes: each entry's gradients are added in the order of the rows, the same
    bits every time.

    References
    ----------
    André, Kermarrec, Le Scouarnec, Cache locality is not enough: high-performance nearest neighbor search
    with product quantization fast scan, VLDB 2015, for look-ups in registers.
    """
    if dtype is None:
        code = next(
            (c for n, c in _RESULTS.items() if n == str(getattr(tables, "dtype", "")).split(".")[-1]), F32
        )
        dtype = NAMES[code]
    return call("lookups", _lookups, (tables, codes, bias), (bits, dtype))


def lookups_topk(tables: Any, codes: Any, k: int, bias: Any = None, *, bits: int = 8) -> Neighbors:
    """The k largest of `lookups`, without writing the others.

    Parameters
    ----------
    tables, codes, bias, bits
        As `lookups`.
    k : int

    Returns
    -------
    scores, ids : arrays, shape (tokens, k)
        Largest first, equal ones by increasing row. Where k > n the rest is id -1 and score -inf.

    Raises
    ------
    ValueError
        A sum that is NaN (on CUDA it comes first); and as `lookups`.
    TypeError
        As `lookups`; float64 on CUDA.
    """
    return _tuple(Neighbors, call("lookups_topk", _lookups_topk, (tables, codes, bias), (k, bits)))


def pq_logits(hidden: Any, codes: Any, codebooks: Any, bias: Any = None, *, bits: int = 8) -> Any:
    """Products of queries with product-quantized rows: the logits of a table of codes.

    Parameters
    ----------
    hidden : array, shape (tokens, m * dsub), float32 (torch: or float16, bfloat16, float64)
    codes : array, shape (n, ceil(m * bits / 8)), uint8
    codebooks : array, shape (m, 2**bits, dsub), the type of hidden
    bias : array, shape (n,), float32, optional
    bits : int, default 8

    Returns
    -------
    array, shape (tokens, n), the type of hidden

    Notes
    -----
    ``S[j, c] = <codebooks[j, c], hidden_j>``, then `lookups`. Cost: 2 tokens 2**bits m dsub flops and tokens
    n m look-ups, against 2 tokens n m dsub flops of the dense product. Gradients (torch): to hidden,
    codebooks and bias.
    """
    for a, name, dims in ((hidden, "hidden", 2), (codebooks, "codebooks", 3)):
        _checks.ndim(a, name, dims)
    m, _, dsub = codebooks.shape
    if hidden.shape[1] != m * dsub:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, codebooks {tuple(codebooks.shape)}: hidden must have "
            f"m * dsub = {m * dsub} columns"
        )
    return lookups(
        pq_tables(hidden, codebooks), codes, bias, bits=bits, dtype=str(hidden.dtype).split(".")[-1]
    )


def full_precision(like: Any) -> Any:
    """A context in which autocast leaves products as they are: tables are float32 or wider."""
    import torch

    known = like.is_cpu or like.is_cuda
    return torch.autocast(like.device.type, enabled=False) if known else contextlib.nullcontext()


def pq_tables(hidden: Any, codebooks: Any) -> Any:
    """``S[j, t, c] = <codebooks[j, c], hidden[t, j]>``, (m, tokens, 2**bits), in float32 or float64."""
    m, _, dsub = codebooks.shape
    tokens = hidden.shape[0]
    if is_torch(hidden):
        wide = hidden.new_empty(0).float() if hidden.element_size() < 4 else hidden
        hidden, codebooks = hidden.to(wide.dtype), codebooks.to(wide.dtype)
        with full_precision(hidden):
            return hidden.reshape(tokens, m, dsub).transpose(0, 1) @ codebooks.transpose(1, 2)
    return hidden.reshape(tokens, m, dsub).swapaxes(0, 1) @ codebooks.swapaxes(1, 2)


# ---------------------------------------------------------------- checks and calls
def _check(kind, tables, codes, bias, bits):
    bits = _checks.integer("bits", bits, 1, 8)
    for a, name, dims in ((tables, "tables", 3), (codes, "codes", 2), (bias, "bias", 1)):
        if a is not None:
            _checks.same_kind(kind, a, name, tables, "tables")
            _checks.ndim(a, name, dims)
    code = _checks.dtype(kind, tables, "tables", (F32, F64))
    _checks.dtype(kind, codes, "codes", (U8,))
    m, tokens, entries = tables.shape
    n, size = codes.shape
    if m < 1 or entries != 1 << bits or size != (m * bits + 7) // 8:
        raise ValueError(
            f"tables {tuple(tables.shape)} and codes {tuple(codes.shape)} must have shapes "
            f"(m, tokens, {1 << bits}) and (n, ceil(m * {bits} / 8)) for bits = {bits}"
        )
    if bias is not None:
        _checks.dtype(kind, bias, "bias", (F32, F16, BF16, F64))
        if bias.shape[0] != n:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; it must be ({n},), one for each row of codes"
            )
    return code, m, tokens, n, size


def _strided(kind, tables):
    """Tables whose entries lie side by side, and the strides of look-ups and tokens."""
    if kind.name == "torch":
        if tables.stride(2) != 1 or min(tables.stride()) < 0:
            tables = tables.contiguous()
        return tables, tables.stride(0), tables.stride(1)
    tables = kind.dense(tables)
    return tables, tables.shape[1] * tables.shape[2], tables.shape[2]


def _ready(kind, tables, codes, bias):
    tables, sj, st = _strided(kind, tables)
    if bias is not None:
        bias = kind.dense(kind.cast(bias, F32) if kind.code(bias) != F32 else bias)
    return tables, sj, st, kind.dense(codes), bias


def _lookups(kind, tables, codes, bias=None, bits=8, dtype="float32"):
    code, m, tokens, n, size = _check(kind, tables, codes, bias, bits)
    result = _checks.choice("dtype", dtype, _RESULTS)
    if kind.kernels is None or F64 in (code, result):
        if kind.name == "torch":
            return _composed(tables, codes, bias, bits).to(kind._dtypes[result])
        _checks.no_kernel(kind, "lookups")
        arrays = [None if a is None else kind.to_numpy(a) for a in (tables, codes, bias)]
        return kind.from_numpy(reference.lookups(arrays[0], arrays[1], bits, arrays[2]), result, tables)
    tables, sj, st, codes, bias = _ready(kind, tables, codes, bias)
    out = kind.empty((tokens, n), result, tables)
    kind.kernels.lookups(
        kind.ptr(tables), st, sj, tokens, m, bits, kind.ptr(codes), n, size,
        None if bias is None else kind.ptr(bias), kind.ptr(out), result, 0, None, None,
        *kind.launch(tables, kind.scratch("lookups", tables, tokens, n, bits, size, 0)),
    )  # fmt: skip
    return out


def _lookups_topk(kind, tables, codes, bias=None, k=10, bits=8):
    code, m, tokens, n, size = _check(kind, tables, codes, bias, bits)
    k = _checks.integer("k", k, 1)
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "lookups_topk")
        arrays = [None if a is None else kind.to_numpy(a) for a in (tables, codes, bias)]
        scores, ids = reference.lookups_topk(arrays[0], arrays[1], k, bits, arrays[2])
        return kind.from_numpy(scores, code, tables), kind.from_numpy(ids, I64, tables)
    tables, sj, st, codes, bias = _ready(kind, tables, codes, bias)
    scores, ids = kind.empty((tokens, k), F32, tables), kind.empty((tokens, k), I64, tables)
    bad = kind.kernels.lookups(
        kind.ptr(tables), st, sj, tokens, m, bits, kind.ptr(codes), n, size,
        None if bias is None else kind.ptr(bias), None, F32, k, kind.ptr(scores), kind.ptr(ids),
        *kind.launch(tables, kind.scratch("lookups", tables, tokens, n, bits, size, k)),
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(reference.nan_message("codes", bad))
    return scores, ids


def _lookups_backward(kind, grad, codes, m, bits=8, into=None):
    """Gradient to the tables, (m, tokens, 2**bits) in float32; ``into``: added to that."""
    tokens, n = grad.shape
    code = _checks.dtype(kind, grad, "grad", (F32, F16, BF16, F64))
    if kind.kernels is None or code == F64:
        if kind.name == "torch":
            found = _composed_backward(grad, codes, m, bits)
        else:
            _checks.no_kernel(kind, "lookups_backward")
            found = reference.lookups_backward(kind.to_numpy(grad), codes, m, bits)
        if into is None:
            return found
        into += found
        return into
    out = kind.empty((m, tokens, 1 << bits), F32, grad) if into is None else into
    if kind.name != "torch" or grad.stride(1) != 1 or grad.stride(0) < n:
        grad = kind.dense(grad)
    ldg = grad.stride(0) if kind.name == "torch" else n
    codes = kind.dense(codes)
    kind.kernels.lookups_backward(
        kind.ptr(grad), code, ldg, tokens, m, bits, kind.ptr(codes), n, codes.shape[1],
        kind.ptr(out), 1 << bits, tokens << bits, into is not None,
        *kind.launch(grad, kind.scratch("lookups_backward", grad, tokens, m, bits, n)),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- in torch's own ops: float64
def _entries(codes, m, bits):
    """(n, m) int64 of packed codes."""
    import torch

    bit = torch.arange(m, device=codes.device) * bits
    wide = torch.nn.functional.pad(codes, (0, 1)).to(torch.int64)
    low, high = wide[:, bit >> 3], wide[:, (bit >> 3) + 1]
    return ((low | high << 8) >> (bit & 7)) & ((1 << bits) - 1)


def _composed(tables, codes, bias, bits):
    entries = _entries(codes, tables.shape[0], bits)
    out = tables.new_zeros((tables.shape[1], codes.shape[0]))
    for j in range(tables.shape[0]):
        out += tables[j][:, entries[:, j]]
    return out if bias is None else out + bias.to(out.dtype)


def _composed_backward(grad, codes, m, bits):
    import torch

    entries = _entries(codes, m, bits)
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    out = grad.new_zeros((m, grad.shape[0], 1 << bits))
    for j in range(m):
        out[j].index_add_(1, entries[:, j], grad)
    return out
