"""tables: one row out of each of several tables, weighted and summed."""

from __future__ import annotations

from math import prod
from typing import Any

from numpy import ndarray

from .. import _checks
from .._arrays import F32, F64, FLOATS, I32, NUMPY, call, eager, quick
from ..reference import gather as reference

_EMPTY = (0,)
_quick = quick("tables")


def tables(tables: Any, codes: Any, weights: Any = None, bias: Any = None) -> Any:
    """Sum one row of each table: ``bias + sum_k weights[..., k] * tables[k, codes[..., k]]``.

    With `lutra.address.sign_hash` this is the layer of MemoryFormer (`lutra.nn.MemoryLinear`).

    Parameters
    ----------
    tables : array, shape (n_tables, entries, dim), float32, float16, bfloat16 or float64
    codes : array, shape (..., n_tables), int32
        The entry of each table, in [0, entries).
    weights : array, shape (..., n_tables), floating point, optional
        Used as float32 (float64 with float64 tables); 1 where not given.
    bias : array, shape (dim,), the type of tables, optional

    Returns
    -------
    out : array, shape (..., dim), the type of tables
        Accumulated in float32 (float64), k in increasing order.

    Raises
    ------
    IndexError
        A code outside [0, entries). On CUDA, where nothing waits for the device, the token's row of out is
        NaN instead.
    TypeError, ValueError
        A wrong type, dtype or shape.

    Notes
    -----
    Cost: ``n_tables`` random reads of a row per token; with many tokens the tables are read once in slabs
    that stay in the cache. Gradients (torch): to tables, weights and bias, deterministic.

    References
    ----------
    Ding et al., MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers,
    NeurIPS 2024, arXiv 2411.12992.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> t = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    >>> lutra.gather.tables(t, np.array([[0, 1]], np.int32))
    array([[6., 8.]], dtype=float32)
    """
    if type(tables) is ndarray or eager(tables):
        result = _quick(tables, codes, weights, bias)
        if result is not None:
            return result
    return call("tables", _tables, (tables, codes, weights, bias), ())


def _same(kind, tables, name, codes, weights=None, bias=None, grad=None):
    """All arrays are of one library and on one device (cheap where microseconds count)."""
    if kind is NUMPY:
        for a in (codes, weights, bias, grad):
            if a is not None and type(a) is not ndarray:
                break
        else:
            return
    elif kind.name == "torch" and not kind.cuda:
        try:
            for a in (codes, weights, bias, grad):
                if a is not None and not a.is_cpu:
                    break
            else:
                return
        except AttributeError:
            pass
    for a, other in (("codes", codes), ("weights", weights), ("bias", bias), ("grad", grad)):
        if other is not None:
            _checks.same_kind(kind, other, a, tables, name)


def _check(tables, codes, weights, bias=None):
    """Checks of shapes, which need no data: the output's shape."""
    shape, lead = tables.shape, codes.shape
    if len(shape) != 3:
        _checks.ndim(tables, "tables", 3)
    if len(lead) == 0 or lead[-1] != shape[0]:
        raise ValueError(
            f"codes has shape {tuple(lead)}; its last axis must be the number of tables, {shape[0]}"
        )
    if weights is not None and weights.shape != lead:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; it must be that of codes, {tuple(lead)}")
    if bias is not None and tuple(bias.shape) != (shape[2],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({shape[2]},)")
    return (*lead[:-1], shape[2])


def _floats(kind, a, wanted):
    """Weights as a contiguous array of type ``wanted``."""
    if a is None:
        return None
    if kind.code(a) != wanted:
        _checks.dtype(kind, a, "weights", (*FLOATS, F64))
        a = kind.cast(a, wanted)
    return kind.dense(a)


def _explain(kind, codes, entries):
    reference._check_codes(kind.to_numpy(codes), entries)
    raise IndexError("codes changed while the kernel ran")


def _tables(kind, tables, codes, weights=None, bias=None):
    _same(kind, tables, "tables", codes, weights, bias)
    code = kind.code(tables)
    if code not in FLOATS:
        code = _checks.dtype(kind, tables, "tables", (*FLOATS, F64))
    if kind.code(codes) != I32:
        _checks.dtype(kind, codes, "codes", (I32,))
    shape = _check(tables, codes, weights, bias)
    if bias is not None and kind.code(bias) != code:
        _checks.dtype(kind, bias, "bias", (code,))
    codes = kind.dense(codes)
    n_tables, entries, dim = tables.shape
    if weights is not None:
        weights = _floats(kind, weights, F64 if code == F64 else F32)
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "tables")
        flat = (prod(shape[:-1]), n_tables)
        out = reference.tables(
            kind.to_numpy(tables),
            kind.to_numpy(codes).reshape(flat),
            None if weights is None else kind.to_numpy(weights).reshape(flat),
            None if bias is None else kind.to_numpy(bias),
        )
        return kind.from_numpy(out.reshape(shape), code, tables)
    tables = kind.dense(tables)
    if bias is not None:
        bias = kind.dense(bias)
    out = kind.empty(shape, code, tables)
    ptr = kind.ptr
    bad = kind.kernels.tables(
        ptr(tables), code, n_tables, entries, dim, ptr(codes), None if weights is None else ptr(weights),
        None if bias is None else ptr(bias), prod(shape[:-1]), ptr(out), *kind.launch(tables),
    )  # fmt: skip
    if bad != -1 and not kind.cuda:
        _explain(kind, codes, entries)
    return out


def _tables_backward(kind, grad, tables, codes, weights=None, need_tables=True, need_weights=True):
    """Gradients of tables and weights (float32, or float64 for float64 tables); empty where not needed."""
    _same(kind, grad, "grad", codes, weights, tables)
    code = _checks.dtype(kind, tables, "tables", (*FLOATS, F64))
    _checks.dtype(kind, grad, "grad", (code,))
    _checks.dtype(kind, codes, "codes", (I32,))
    shape = _check(tables, codes, weights)
    if tuple(grad.shape) != tuple(shape):
        raise ValueError(f"grad has shape {tuple(grad.shape)}; it must be {tuple(shape)}")
    n_tables, entries, dim = tables.shape
    tokens = prod(shape[:-1])
    codes, grad = kind.dense(codes), kind.dense(grad)
    wide = F64 if code == F64 else F32
    weights = _floats(kind, weights, wide)
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "tables_backward")
        to_tables, to_weights = reference.tables_backward(
            kind.to_numpy(grad).reshape(tokens, dim),
            kind.to_numpy(tables),
            kind.to_numpy(codes).reshape(tokens, n_tables),
            None if weights is None else kind.to_numpy(weights).reshape(tokens, n_tables),
            need_tables,
            need_weights,
        )
        return (
            kind.from_numpy(to_tables, code, tables) if need_tables else kind.empty(_EMPTY, code, tables),
            kind.from_numpy(to_weights.reshape(tuple(codes.shape)), wide, tables)
            if need_weights
            else kind.empty(_EMPTY, wide, tables),
        )
    tables = kind.dense(tables)
    to_tables = kind.empty((n_tables, entries, dim) if need_tables else _EMPTY, code, tables)
    to_weights = kind.empty(tuple(codes.shape) if need_weights else _EMPTY, F32, tables)
    ptr = kind.ptr
    scratch = kind.scratch("tables_backward", tables, tokens, n_tables, dim)
    bad = kind.kernels.tables_backward(
        ptr(tables), code, n_tables, entries, dim, ptr(codes), None if weights is None else ptr(weights),
        tokens, ptr(grad), ptr(to_tables) if need_tables else None, ptr(to_weights) if need_weights else None,
        *kind.launch(tables, scratch),
    )  # fmt: skip
    if bad != -1 and not kind.cuda:
        _explain(kind, codes, entries)
    return to_tables, to_weights
