"""row_dots: inner products of a vector with chosen rows of a table."""

from __future__ import annotations

from typing import Any

from .. import _checks
from .._arrays import F64, FLOATS, Kind, call
from ._bag import _bag_weight_grad


def row_dots(table: Any, ids: Any, x: Any, *, sparse_grad: bool = False) -> Any:
    """Inner products of each vector with its rows of a table.

    ``out[b, i] = <table[ids[b, i]], x[b]>``: what `bag` is for sums of rows. No rows are copied.

    Parameters
    ----------
    table : array, shape (rows, dim), float32, float16, bfloat16 or float64
    ids : array, shape (n, length), int32 or int64
    x : array, shape (n, dim), floating point
    sparse_grad : bool, default False
        torch: the gradient of table is a sparse tensor of the touched rows.

    Returns
    -------
    array, shape (n, length), float32 (float64 where an array is float64)

    Raises
    ------
    IndexError
        An id outside [0, rows); the message names its position.
    TypeError, ValueError
        A wrong type, dtype or shape, arrays of different libraries.

    Notes
    -----
    Cost: one read of the rows named. Gradient (torch): to table, touched rows only (summed in the order of
    the ids, the same bits for any number of threads), and x.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> table = np.arange(6, dtype=np.float32).reshape(3, 2)
    >>> lutra.gather.row_dots(table, np.array([[2, 0]]), np.array([[1, 10]], np.float32))
    array([[54., 10.]], dtype=float32)
    """
    return call("row_dots", _row_dots, (table, ids, x), (sparse_grad,))


def _check(table: Any, ids: Any, x: Any) -> None:
    _checks.ndim(table, "table", 2)
    _checks.ndim(ids, "ids", 2)
    want = (ids.shape[0], table.shape[1])
    if tuple(x.shape) != want:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be {want}: a vector of the table's width for each row of "
            "ids"
        )


def _row_dots(kind: Kind, table: Any, ids: Any, x: Any, sparse_grad: bool = False) -> Any:
    _checks.same_kind(kind, ids, "ids", table, "table")
    _checks.same_kind(kind, x, "x", table, "table")
    _checks.dtype(kind, table, "table", (*FLOATS, F64))
    _checks.dtype(kind, x, "x", (*FLOATS, F64))
    _check(table, ids, x)
    if kind.cuda and kind.code(table) == F64:
        return (table[ids] * x.unsqueeze(1).to(table.dtype)).sum(-1)
    return _bag_weight_grad(kind, x, table, ids)
