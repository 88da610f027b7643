"""tables: one row out of each of several tables, weighted and summed."""

from __future__ import annotations

from math import prod
from typing import Any

from numpy import ndarray

from .. import _checks
from .._arrays import F32, F64, FLOATS, I8, I32, NUMPY, U8, call, eager, quick
from ..reference import gather as reference
from ._spread import empty, few_pages, zeros

_EMPTY = (0,)
_FEW = 32  # fewer tokens than this need no workspace on CUDA
_quick = quick("tables")


def tables(
    tables: Any, codes: Any, weights: Any = None, bias: Any = None, scale: Any = None, minimum: Any = None
) -> Any:
    """Sum one row of each table: ``bias + sum_k weights[..., k] * tables[k, codes[..., k]]``.

    With `lutra.address.sign_hash` this is the layer of MemoryFormer (`lutra.nn.MemoryLinear`).

    Parameters
    ----------
    tables : array, shape (n_tables, entries, dim), float32, float16, bfloat16, float64 or int8
    codes : array, shape (..., n_tables), int32
        The entry of each table, in [0, entries).
    weights : array, shape (..., n_tables), floating point, optional
        Used as float32 (float64 with float64 tables); 1 where not given.
    bias : array, shape (dim,), the type of tables (any of the floating types for int8 ones), optional
    scale, minimum : array, shape (n_tables, entries), float32
        For int8 tables only, as `lutra.gather.quantize_rows` gives them for each row: the row is
        ``minimum + scale * code``.

    Returns
    -------
    out : array, shape (..., dim), the type of tables; of int8 ones the type of bias, or else float32
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
    that stay in the cache. Gradients (torch): to tables (not to int8 ones), weights and bias, deterministic.

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
        result = _quick(tables, codes, weights, bias) if scale is None and minimum is None else None
        if result is not None:
            return result
    return call("tables", _tables, (tables, codes, weights, bias, scale, minimum), ())


def _same(kind, tables, name, codes, weights=None, bias=None, grad=None, scale=None, minimum=None):
    """All arrays are of one library and on one device (cheap where microseconds count)."""
    if kind is NUMPY:
        for a in (codes, weights, bias, grad, scale, minimum):
            if a is not None and type(a) is not ndarray:
                break
        else:
            return
    elif kind.name == "torch" and not kind.cuda:
        try:
            for a in (codes, weights, bias, grad, scale, minimum):
                if a is not None and not a.is_cpu:
                    break
            else:
                return
        except AttributeError:
            pass
    named = {
        "codes": codes,
        "weights": weights,
        "bias": bias,
        "grad": grad,
        "scale": scale,
        "minimum": minimum,
    }
    for a, other in named.items():
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


def _check_rows(kind, tables, scale, minimum):
    """The dtype code of tables; scale and minimum are there for int8 tables, and only for them."""
    code = kind.code(tables)
    if code not in (*FLOATS, F64, I8):
        _checks.dtype(kind, tables, "tables", (*FLOATS, F64, I8))
    if code != I8:
        if scale is not None or minimum is not None:
            raise ValueError("scale and minimum are for int8 tables; tables has another dtype")
        return code
    for name, a in (("scale", scale), ("minimum", minimum)):
        if a is None:
            raise ValueError(f"int8 tables need {name}, one number for each row: quantize_rows gives it")
        _checks.dtype(kind, a, name, (F32,))
        if tuple(a.shape) != tuple(tables.shape[:2]):
            raise ValueError(
                f"{name} has shape {tuple(a.shape)}; it must be {tuple(tables.shape[:2])}: a number a row"
            )
    return code


def _result_code(kind, code, bias):
    """The dtype code of a result: that of the tables; for int8 ones of the bias, or else float32."""
    if bias is None:
        return F32 if code == I8 else code
    return _checks.dtype(kind, bias, "bias", FLOATS if code == I8 else (code,))


def _launch(kind, tables, code, tokens):
    """Trailing arguments of the kernels on CUDA (workspace, device, stream), and what to hold until then."""
    if not kind.cuda:
        return (), None
    where = kind.launch(tables)
    if tokens < _FEW:
        return (None, *where), None
    wanted = kind.kernels.tables_workspace(tokens, *tables.shape, code, *where)
    scratch = kind.empty((wanted,), U8, tables) if wanted else None
    return (None if scratch is None else kind.ptr(scratch), *where), scratch


def _tables(kind, tables, codes, weights=None, bias=None, scale=None, minimum=None, result=None):
    _same(kind, tables, "tables", codes, weights, bias, scale=scale, minimum=minimum)
    code = _check_rows(kind, tables, scale, minimum)
    if kind.code(codes) != I32:
        _checks.dtype(kind, codes, "codes", (I32,))
    shape = _check(tables, codes, weights, bias)
    result = _result_code(kind, code, bias) if result is None or bias is not None else result
    if code == I8 and result == F64:
        return kind.cast(_tables(kind, tables, codes, weights, None, scale, minimum, F32), F64)
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
            None if scale is None else kind.to_numpy(scale),
            None if minimum is None else kind.to_numpy(minimum),
        )
        return kind.from_numpy(out.reshape(shape), result, tables)
    tables = kind.dense(tables)
    if bias is not None:
        bias = kind.dense(bias)
    if scale is not None:
        scale, minimum = kind.dense(scale), kind.dense(minimum)
    out = kind.empty(shape, result, tables)
    ptr, tokens = kind.ptr, prod(shape[:-1])
    launch, _scratch = _launch(kind, tables, code, tokens)
    bad = kind.kernels.tables(
        ptr(tables), code, n_tables, entries, dim, ptr(codes), None if weights is None else ptr(weights),
        None if bias is None else ptr(bias), tokens, ptr(out), result,
        None if scale is None else ptr(scale), None if scale is None else ptr(minimum), *launch,
    )  # fmt: skip
    if bad != -1 and not kind.cuda:
        _explain(kind, codes, entries)
    return out


def _tables_backward(
    kind, grad, tables, codes, weights=None, need_tables=True, need_weights=True, scale=None, minimum=None
):
    """Gradients of tables and weights (float32, or float64 for float64 tables); empty where not needed.

    int8 tables have no gradient; grad may then be of any floating type.
    """
    _same(kind, grad, "grad", codes, weights, tables, scale=scale, minimum=minimum)
    code = _check_rows(kind, tables, scale, minimum)
    if code == I8 and kind.code(grad) == F64:
        grad = kind.cast(grad, F32)
    grad_code = _checks.dtype(kind, grad, "grad", FLOATS if code == I8 else (code,))
    _checks.dtype(kind, codes, "codes", (I32,))
    shape = _check(tables, codes, weights)
    if tuple(grad.shape) != tuple(shape):
        raise ValueError(f"grad has shape {tuple(grad.shape)}; it must be {tuple(shape)}")
    if code == I8 and need_tables:
        raise TypeError("int8 tables have no gradient")
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
            None if scale is None else kind.to_numpy(scale),
            None if minimum is None else kind.to_numpy(minimum),
        )
        return (
            kind.from_numpy(to_tables, code, tables)
            if need_tables
            else kind.empty(_EMPTY, grad_code, tables),
            kind.from_numpy(to_weights.reshape(tuple(codes.shape)), wide, tables)
            if need_weights
            else kind.empty(_EMPTY, wide, tables),
        )
    tables = kind.dense(tables)
    if scale is not None:
        scale, minimum = kind.dense(scale), kind.dense(minimum)
    # Few tokens touch few rows: the others lie on fresh pages of the system, which are zero and cost nothing.
    row_bytes = dim * tables.dtype.itemsize
    spread = need_tables and few_pages(kind, tokens * n_tables, n_tables * entries, row_bytes)
    whole = (n_tables, entries, dim) if need_tables else _EMPTY
    to_tables = (zeros if spread else empty)(kind, whole, grad_code, tables)
    to_weights = kind.empty(tuple(codes.shape) if need_weights else _EMPTY, F32, tables)
    ptr = kind.ptr
    sizes = tokens, n_tables, entries, dim, grad_code
    scratch = (
        kind.scratch("tables_backward", tables, *sizes, ptr(grad)) if need_tables and kind.cuda else None
    )
    launch = (None if scratch is None else ptr(scratch), *kind.launch(tables)) if kind.cuda else ()
    bad = kind.kernels.tables_backward(
        ptr(tables), code, n_tables, entries, dim, ptr(codes), None if weights is None else ptr(weights),
        tokens, ptr(grad), ptr(to_tables) if need_tables else None, ptr(to_weights) if need_weights else None,
        grad_code, None if scale is None else ptr(scale), None if scale is None else ptr(minimum), spread,
        *launch,
    )  # fmt: skip
    if bad != -1 and not kind.cuda:
        _explain(kind, codes, entries)
    return to_tables, to_weights
