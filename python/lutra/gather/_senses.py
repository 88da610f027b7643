"""senses: of a token's several rows, the one that fits its context best."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from .. import _checks
from .._arrays import F32, F64, FLOATS, I32, I64, Kind, call
from ..reference import gather as reference

GRADIENTS = {"hard": 0, "straight_through": 1, "softmax": 2}


class Senses(NamedTuple):
    """Result of `senses`."""

    vectors: Any
    senses: Any
    scores: Any


def senses(
    table: Any,
    ids: Any,
    context: Any,
    offsets: Any = None,
    *,
    gradient: str = "hard",
    temperature: float = 1.0,
) -> Senses:
    """The sense of each token with the largest inner product with the token's context vector.

    Parameters
    ----------
    table : array, shape (tokens, senses, dim), or (total, dim) with offsets
        float32, float16, bfloat16 or float64.
    ids : array, shape (...), int32 or int64
        Tokens.
    context : array, shape (..., dim), floating point
        A vector for each token; used in the type of table.
    offsets : array, shape (tokens + 1,), int64 or int32, optional
        For tokens with different numbers of senses: those of token x are the rows
        ``table[offsets[x] : offsets[x + 1]]``. A token that is asked for must have one.
    gradient : {'hard', 'straight_through', 'softmax'}, default 'hard'
        torch only. In each, the chosen row receives the gradient of the result. Besides, with

        - ``'hard'``: context receives none;
        - ``'straight_through'``: context receives the gradient of the result as it is, as if it had been
          quantized (Bengio, Leonard and Courville 2013, arXiv 1308.3432);
        - ``'softmax'``: backwards, the choice is softmax(scores / temperature), so that context and all
          senses of the token learn from it (straight-through Gumbel-softmax without the noise, Jang, Gu and
          Poole 2017, arXiv 1611.01144).
    temperature : float, default 1.0
        Of gradient 'softmax'; positive.

    Returns
    -------
    vectors : array, shape (..., dim), the type of table
        The chosen rows.
    senses : array, shape (...), int64
        Which of the token's senses it is; of equal scores the lowest. A NaN score wins.
    scores : array, shape (...), float32 (float64 for a float64 table)
        Its inner product; without a gradient.

    Raises
    ------
    IndexError
        An id outside [0, tokens).
    TypeError, ValueError
        A wrong type, dtype, shape or option; a token without senses, offsets that leave the table.

    Notes
    -----
    Scores, choice and copy are one pass over the senses of each token; nothing of size (n, senses, dim) is
    written, neither forward nor backward. Cost: reading these rows once. A float64 table is computed by the
    NumPy reference. On CUDA, where nothing waits for the device, an id that is out of range or has no sense
    gives NaN and row -1.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> table = np.eye(4, dtype=np.float32).reshape(2, 2, 4)
    >>> context = np.array([[0, 1, 0, 5]] * 2, np.float32)
    >>> lutra.gather.senses(table, np.array([0, 1]), context).senses
    array([1, 1])
    """
    arrays = (table, ids, context, offsets)
    vectors, rows, scores = call("senses", _senses, arrays, (gradient, temperature))
    if offsets is None:
        return Senses(vectors, rows - ids * table.shape[1], scores)
    inside = (
        ids.clip(0, len(offsets) - 2) if len(offsets) > 1 else ids
    )  # (CUDA: nobody has looked at the ids)
    return Senses(vectors, rows - offsets[inside], scores)


def _check(table: Any, ids: Any, context: Any, offsets: Any, gradient: str, temperature: float) -> int:
    """Checks that need no data; the number of tokens."""
    _checks.choice("gradient", gradient, GRADIENTS)
    _checks.positive("temperature", temperature)
    if offsets is None:
        if len(table.shape) != 3:
            raise ValueError(
                f"table has shape {tuple(table.shape)}; it must be (tokens, senses, dim), or "
                "(total, dim) with offsets"
            )
        tokens = table.shape[0]
        if table.shape[1] == 0:
            raise ValueError(f"table has shape {tuple(table.shape)}; a token needs at least one sense")
    else:
        _checks.ndim(table, "table", 2)
        _checks.ndim(offsets, "offsets", 1)
        if offsets.shape[0] < 1:
            raise ValueError("offsets is empty; it must have an entry more than there are tokens")
        tokens = offsets.shape[0] - 1
    want = (*ids.shape, table.shape[-1])
    if tuple(context.shape) != want:
        raise ValueError(f"context has shape {tuple(context.shape)}; it must be {want}: a vector for each id")
    return tokens


def _senses(
    kind: Kind,
    table: Any,
    ids: Any,
    context: Any,
    offsets: Any = None,
    gradient: str = "hard",
    temperature: float = 1.0,
) -> tuple[Any, Any, Any]:
    """Vectors, rows of the table as (total, dim), scores."""
    for a, name in ((ids, "ids"), (context, "context"), (offsets, "offsets")):
        if a is not None:
            _checks.same_kind(kind, a, name, table, "table")
    code = _checks.dtype(kind, table, "table", (*FLOATS, F64))
    id_code = _checks.dtype(kind, ids, "ids", (I32, I64))
    tokens = _check(table, ids, context, offsets, gradient, temperature)
    if _checks.dtype(kind, context, "context", (*FLOATS, F64)) != code:
        context = kind.cast(context, code)
    if offsets is not None and _checks.dtype(kind, offsets, "offsets", (I32, I64)) != I64:
        offsets = kind.cast(offsets, I64)
    wide = F64 if code == F64 else F32
    if kind.cuda and kind.name == "torch" and (kind.kernels is None or code == F64):
        from ..torch_ops.senses import choose

        return choose(table, ids, context, offsets)
    if kind.kernels is None or code == F64:
        _checks.no_kernel(kind, "senses")
        arrays = [None if a is None else kind.to_numpy(a) for a in (table, ids, context, offsets)]
        vectors, rows, scores = reference.senses(*arrays)
        return (
            kind.from_numpy(vectors, code, ids),
            kind.from_numpy(rows, I64, ids),
            kind.from_numpy(scores, wide, ids),
        )
    table, ids, context = kind.dense(table), kind.dense(ids), kind.dense(context)
    offsets = None if offsets is None else kind.dense(offsets)
    shape, dim = tuple(ids.shape), table.shape[-1]
    vectors = kind.empty((*shape, dim), code, ids)
    rows, scores = kind.empty(shape, I64, ids), kind.empty(shape, F32, ids)
    ptr = kind.ptr
    bad, none = kind.kernels.senses(
        ptr(table), code, prod(table.shape[:-1]), dim, tokens, None if offsets is None else ptr(offsets),
        table.shape[1] if offsets is None else 0, ptr(ids), id_code, prod(shape), ptr(context), ptr(vectors),
        ptr(rows), ptr(scores), *kind.launch(table),
    )  # fmt: skip
    if bad != -1 or none != -1:
        given = None if offsets is None else kind.to_numpy(offsets)
        reference.check_senses(kind.to_numpy(ids), tokens, prod(table.shape[:-1]), given)
        raise IndexError("ids or offsets changed while the kernel ran")
    return vectors, rows, scores
