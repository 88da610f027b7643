"""An optimizer's step on the rows of several tables that codes touched, in place (for `lutra.optim`)."""

from __future__ import annotations

from typing import Any

from .._arrays import F64, FLOATS, I64, U8
from ._tables import _explain
from ._update import RULES, _changed, _check_seed, _check_target, _ptr, _update_bags


def _flat(kind, tables, codes, weights):
    """The tables as one of rows, and codes as the ids of its rows."""
    n_tables, entries, dim = tables.shape
    codes = codes.reshape(-1, n_tables)
    first = kind.torch.arange(n_tables, device=codes.device) * entries
    weights = None if weights is None else weights.reshape(-1, n_tables)
    return tables.view(n_tables * entries, dim), kind.cast(codes, I64) + first, weights


def _kernel(kind, tables, code, grad, codes, weights, s0, s1, rule, numbers, seed, squares):
    """Whether the kernel served the call; that of CUDA leaves few tokens and mixed types to others."""
    n_tables, entries, dim = tables.shape
    grad, codes, weights = kind.dense(grad), kind.dense(codes), kind.dense(weights)
    arguments = (
        kind.ptr(tables), code, n_tables, entries, dim, _ptr(kind, s0), _ptr(kind, s1), RULES[rule], *numbers,
        seed is not None, seed or 0, kind.ptr(codes), kind.ptr(weights), grad.shape[0], kind.ptr(grad),
        kind.code(grad), _ptr(kind, squares),
    )  # fmt: skip
    if kind.cuda:
        where = kind.launch(tables)
        wanted = kind.kernels.tables_update_workspace(*arguments, *where)
        if not wanted:
            return False
        scratch = kind.empty((wanted,), U8, tables)
        kind.kernels.tables_update(*arguments, kind.ptr(scratch), *where)
        return True
    bad = kind.kernels.tables_update(*arguments)
    if bad != -1:
        _explain(kind, codes, entries)
    return True


def _served(kind, code, grad):
    return kind.kernels is not None and code != F64 and kind.code(grad) in FLOATS


def _update_tables(kind, tables, grad, codes, weights, s0, s1, rule, numbers, seed=None) -> None:
    """tables (n_tables, entries, dim), torch; grad (tokens, dim); codes, weights (tokens, n_tables)."""
    n_tables, entries, dim = tables.shape
    rows = n_tables * entries
    flat = tables.view(rows, dim)
    s0, s1 = (None if s is None else s.view(rows) if s.dim() == 2 else s.view(rows, dim) for s in (s0, s1))
    code = _check_target(kind, flat, s0, s1, rule)
    _check_seed(seed, code)
    given = grad, codes, weights, s0, s1, rule, numbers, seed, None
    if _served(kind, code, grad) and _kernel(kind, tables, code, *given):
        _changed(kind, tables, s0, s1)
        return None
    flat, ids, weights = _flat(kind, tables, codes, weights)
    return _update_bags(kind, flat, grad, ids, None, weights, None, s0, s1, rule, numbers, seed=seed)


def _tables_square(kind, tables, grad, codes, weights) -> Any:
    """The sum of the squares of the tables' gradient, a 0-d float64 tensor: nothing of its size is made."""
    code = kind.code(tables)
    if _served(kind, code, grad):
        squares = kind.torch.empty(tables.shape[0], dtype=kind.torch.float64, device=tables.device)
        numbers = 0.0, 1.0, 0.0, 0.0, 0.0, 1.0
        if _kernel(kind, tables, code, grad, codes, weights, None, None, "sgd", numbers, None, squares):
            return squares.sum()
    from ._bag import _bag_backward_rows

    flat, ids, weights = _flat(kind, tables, codes, weights)
    wide = grad if code == F64 else grad.float()
    values = _bag_backward_rows(kind, wide, ids, None, weights, None, flat.shape[0])[1]
    return values.double().square().sum()
