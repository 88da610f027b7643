"""update_rows and update_bags: an optimizer's step on the touched rows of a table, in place."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import _checks
from .._arrays import BF16, F32, F64, FLOATS, I32, I64, NAMES, NUMPY, U8, call, is_torch, kind_of
from ..reference import row_update as reference
from . import _spread
from ._bag import (
    MODES,
    _bag_argmax,
    _bag_backward_rows,
    _explain,
    _ids,
    _layout,
    _mixed,
    _padding,
    _ptr,
    _to_numpy,
    _weights,
)

RULES = {"sgd": 0, "momentum": 1, "adagrad": 2, "rowwise_adagrad": 3, "adam": 4}
#: The names of each rule's state.
STATES = {
    "sgd": (),
    "momentum": ("momentum_buffer",),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
}
#: The default ``eps``: torch's, and FBGEMM's for the row-wise one.
EPS = {"sgd": 0.0, "momentum": 0.0, "adagrad": 1e-10, "rowwise_adagrad": 1e-8, "adam": 1e-8}


class Step(NamedTuple):
    """The numbers of one step, as csrc/gather/row_update.h wants them (``a``, ``b`` of adam: 1 - beta)."""

    lr: float
    shrink: float = 1.0
    a: float = 0.0
    b: float = 0.0
    eps: float = 0.0
    scale: float = 1.0


def adam_step(lr, betas, eps, step, weight_decay=0.0, sparse=True):
    """Adam's numbers at its ``step`` (from 1): as torch's SparseAdam, or as Adam (``sparse`` False).

    They differ in where eps goes: SparseAdam adds it to the root before the bias correction.
    """
    first, second = 1 - betas[0] ** step, 1 - betas[1] ** step
    scale = 1.0 if sparse else second**-0.5
    size = lr * second**0.5 / first if sparse else lr / first
    return Step(size, 1 - lr * weight_decay, 1 - betas[0], 1 - betas[1], eps, scale)


def row_state(table: Any, optimizer: str) -> dict[str, Any]:
    """The state that `update_rows` and `update_bags` keep for a table: zeros.

    Parameters
    ----------
    table : array, shape (rows, dim)
    optimizer : {'sgd', 'momentum', 'adagrad', 'rowwise_adagrad', 'adam'}

    Returns
    -------
    dict of arrays
        float32 (float64 for a float64 table), whatever the type of the table: 'momentum' has
        ``momentum_buffer`` (rows, dim), 'adagrad' ``sum`` (rows, dim), 'rowwise_adagrad' ``sum`` (rows,),
        'adam' ``exp_avg`` and ``exp_avg_sq`` (rows, dim); 'sgd' nothing.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.gather.row_state(np.zeros((3, 2), np.float32), "rowwise_adagrad")
    {'sum': array([0., 0., 0.], dtype=float32)}
    """
    _checks.choice("optimizer", optimizer, RULES)
    kind = kind_of(table, "table")
    _checks.ndim(table, "table", 2)
    code = _checks.dtype(kind, table, "table", (*FLOATS, F64))
    shape = tuple(table.shape)[:1] if optimizer == "rowwise_adagrad" else tuple(table.shape)
    wide = F64 if code == F64 else F32
    if is_torch(table):
        import torch

        dtype = torch.float64 if wide == F64 else torch.float32
        return {name: torch.zeros(shape, dtype=dtype, device=table.device) for name in STATES[optimizer]}
    import numpy as np

    if kind is not NUMPY:
        state = {name: kind.empty(shape, wide, table) for name in STATES[optimizer]}
        for array in state.values():
            array[...] = 0
        return state
    return {name: np.zeros(shape, np.float64 if wide == F64 else np.float32) for name in STATES[optimizer]}


def update_rows(
    table: Any,
    rows: Any,
    grads: Any,
    optimizer: str = "sgd",
    state: dict[str, Any] | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float | None = None,
    step: int = 1,
    seed: int | None = None,
) -> None:
    """One step of an optimizer on the touched rows of a table, in place.

    Parameters
    ----------
    table : array, shape (rows, dim), float32, float16, bfloat16 or float64
        Updated in place; C-contiguous and writable.
    rows : array, shape (n,), int32 or int64
        The touched rows, in any order. A row that is named several times gets the sum of its gradients (in
        their order), as one gradient.
    grads : array, shape (n, dim), floating point
        Their gradients.
    optimizer : {'sgd', 'momentum', 'adagrad', 'rowwise_adagrad', 'adam'}
    state : dict of arrays
        What `row_state` gave; updated in place. None for 'sgd'.
    lr : float
    weight_decay : float, default 0
        Decoupled (as in AdamW), of the touched rows only: they are multiplied by ``1 - lr * weight_decay``.
    momentum : float, default 0.9
        'momentum' only. Lazy: a row that is not touched keeps its buffer and is not moved by it.
    betas : (float, float)
        'adam' only, whose moments are lazy too, as in ``torch.optim.SparseAdam``.
    eps : float, optional
        1e-10 for 'adagrad', 1e-8 for 'rowwise_adagrad' and 'adam'.
    step : int, default 1
        The number of this step, from 1: for the bias correction of 'adam'.
    seed : int, optional
        bfloat16 tables only: results are rounded up or down at random, with the probability that keeps the
        mean, rather than to nearest, which loses updates below half a unit of the last of its 8 bits. To be
        another number at every step.

    Raises
    ------
    IndexError
        A row outside the table.
    TypeError, ValueError
        A wrong type, dtype, shape, state or option. Nothing was updated.

    Notes
    -----
    Arithmetic and state are float32 (float64 for float64 tables). Deterministic: the same bits whatever the
    number of threads. On CUDA one call sorts, sums and updates, without waiting for the device; ids out of
    range are left out there. float64 in torch, and on CUDA 'rowwise_adagrad' of rows longer than 512
    (float32), take torch's operations.

    'rowwise_adagrad' keeps one number a row, the sum over steps of the mean of the gradient's squares
    (FBGEMM, DLRM: Naumov et al., arXiv 1906.00091).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> table = np.ones((4, 2), np.float32)
    >>> lutra.gather.update_rows(table, np.array([3, 1, 3]), np.ones((3, 2), np.float32), lr=0.25)
    >>> table[:, 0]
    array([1.  , 0.75, 1.  , 0.5 ], dtype=float32)
    """
    _refuse_leaf(table)
    numbers = _numbers(optimizer, lr, weight_decay, momentum, betas, eps, step)
    s0, s1 = _state(table, optimizer, state)
    arrays = (table, rows, grads, s0, s1)
    call("update_rows", _update_rows, arrays, (optimizer, list(numbers), _seed(seed)))


def update_bags(
    table: Any,
    grad: Any,
    ids: Any,
    offsets: Any = None,
    weights: Any = None,
    *,
    optimizer: str = "sgd",
    state: dict[str, Any] | None = None,
    lr: float,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float | None = None,
    step: int = 1,
    seed: int | None = None,
) -> None:
    """Backward and update of `bag` in one: the gradient of the table is never written.

    Ids are sorted by row, each row's gradient is summed in registers, and the row and its state are updated
    in place: what `bag_grad` with ``sparse=True`` and `update_rows` do in two.

    Parameters
    ----------
    table : array, shape (rows, dim)
        Updated in place.
    grad : array, shape (bags, dim), floating point
        Gradient of the result of ``bag(table, ids, offsets, weights, ...)``.
    ids, offsets, weights, mode, padding_idx, include_last_offset
        As they were given to `bag`.
    optimizer, state, lr, weight_decay, momentum, betas, eps, step, seed
        As in `update_rows`.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `bag` and `update_rows`. Nothing was updated.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> table = np.ones((4, 2), np.float32)
    >>> lutra.gather.update_bags(table, np.ones((1, 2), np.float32), np.array([[3, 1, 3]]), lr=0.25)
    >>> table[:, 0]
    array([1.  , 0.75, 1.  , 0.5 ], dtype=float32)
    """
    _refuse_leaf(table)
    numbers = _numbers(optimizer, lr, weight_decay, momentum, betas, eps, step)
    s0, s1 = _state(table, optimizer, state)
    argmax = None
    if mode == "max":
        argmax = call("bag_argmax", _bag_argmax, (table, ids, offsets), (padding_idx, include_last_offset))
    arrays = (table, grad, ids, offsets, weights, argmax, s0, s1)
    options = (optimizer, list(numbers), mode, padding_idx, include_last_offset, _seed(seed))
    call("update_bags", _update_bags, arrays, options)


# ---------------------------------------------------------------- checks
def _numbers(optimizer, lr, weight_decay, momentum, betas, eps, step):
    _checks.choice("optimizer", optimizer, RULES)
    lr, weight_decay = not_negative("lr", lr), not_negative("weight_decay", weight_decay)
    eps = EPS[optimizer] if eps is None else not_negative("eps", eps)
    if optimizer == "adam":
        betas = check_betas(betas)
        return adam_step(lr, betas, eps, _checks.integer("step", step, 1), weight_decay)
    if optimizer == "momentum":
        momentum = fraction("momentum", momentum)
    return Step(lr, 1 - lr * weight_decay, momentum, 0.0, eps)


def not_negative(name, value):
    """A finite number >= 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return number


def fraction(name, value):
    """A number in [0, 1)."""
    number = not_negative(name, value)
    if number >= 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return number


def check_betas(betas):
    """Two numbers in [0, 1)."""
    try:
        first, second = betas
    except (TypeError, ValueError):
        raise TypeError(f"betas must be two numbers in [0, 1), got {betas!r}") from None
    return fraction("betas[0]", first), fraction("betas[1]", second)


def _seed(seed):
    return None if seed is None else _checks.integer("seed", seed, 0, 2**63 - 1)


def _state(table, optimizer, state):
    names = STATES[optimizer]
    given = {} if state is None else state
    if not isinstance(given, dict) or set(given) != set(names):
        has = sorted(given) if isinstance(given, dict) else type(given).__qualname__
        need = f"a dict of {', '.join(names)} (row_state makes it)" if names else "None"
        raise ValueError(f"state of optimizer {optimizer!r} must be {need}; got {has}")
    return tuple(given[n] for n in names) + (None,) * (2 - len(names))


def _check_target(kind, table, s0, s1, rule):
    """The table's dtype code; table and state are such that they can be updated in place."""
    code = _checks.dtype(kind, table, "table", (*FLOATS, F64))
    _checks.ndim(table, "table", 2)
    shape = tuple(table.shape)
    wanted = shape[:1] if rule == "rowwise_adagrad" else shape
    names = STATES[rule]
    for a, name in zip((s0, s1), names):
        _checks.dtype(kind, a, f"state[{name!r}]", (F64 if code == F64 else F32,))
        if tuple(a.shape) != wanted:
            raise ValueError(f"state[{name!r}] has shape {tuple(a.shape)}; it must be {wanted}")
    for a, name in ((table, "table"), *zip((s0, s1), (f"state[{n!r}]" for n in names))):
        if kind is NUMPY:
            fit = a.flags.c_contiguous and a.flags.aligned and a.flags.writeable and a.dtype.isnative
        else:
            fit = kind.dense(a) is a
        if not fit:
            raise ValueError(f"{name} must be contiguous and writable: it is updated in place")
    return code


def _check_seed(seed, code):
    if seed is not None and code != BF16:
        raise ValueError(f"seed is for bfloat16 tables (stochastic rounding); table is {NAMES[code]}")


def _changed(kind, *arrays):
    """Tell autograd that tensors changed in place."""
    if kind.name == "torch":
        for a in arrays:
            if a is not None:
                kind.torch.autograd.graph.increment_version(a)


def _grad_enabled():
    import torch

    return torch.is_grad_enabled()


def _refuse_leaf(table):
    if is_torch(table) and table.requires_grad and _grad_enabled():
        raise RuntimeError("table requires a gradient: update it in place under torch.no_grad()")


# ---------------------------------------------------------------- rows
def _update_rows(kind, table, rows, grads, s0=None, s1=None, rule="sgd", numbers=(), seed=None):
    _mixed(kind, table, "table", {"rows": rows, "grads": grads, "state": s0, "state ": s1})
    code = _check_target(kind, table, s0, s1, rule)
    _check_seed(seed, code)
    _checks.ndim(rows, "rows", 1)
    _checks.dtype(kind, rows, "rows", (I32, I64))
    grad_code = _checks.dtype(kind, grads, "grads", (*FLOATS, F64))
    if tuple(grads.shape) != (rows.shape[0], table.shape[1]):
        raise ValueError(
            f"grads has shape {tuple(grads.shape)}; it must be {(rows.shape[0], table.shape[1])}: "
            "a gradient of the table's dim for each of rows"
        )
    if grad_code == F64 and code != F64:
        grads, grad_code = kind.cast(grads, F32), F32
    if _on_device(kind, code, grad_code, rule, table.shape[1]):
        ids = rows.reshape(-1, 1)  # the same as bags of one id
        return _update_bags(kind, table, grads, ids, None, None, None, s0, s1, rule, numbers, seed=seed)
    rows = kind.dense(kind.cast(rows, I64))
    if kind.kernels is None or code == F64 or kind.cuda:
        return _fall_back(kind, table, rows, grads, s0, s1, rule, numbers, seed)
    grads = kind.dense(grads)
    n, dim = grads.shape
    bad = kind.kernels.row_update(
        kind.ptr(table), code, table.shape[0], dim, _ptr(kind, s0), _ptr(kind, s1), RULES[rule], *numbers,
        seed is not None, seed or 0, n, kind.ptr(rows), 0, None, None, None, None, None, None,
        kind.ptr(grads), grad_code, n, 0,
    )  # fmt: skip
    if bad >= 0:
        _outside(rows, bad, table.shape[0])
    if bad != -1:  # not increasing: the same as bags of one id
        ids = rows.reshape(-1, 1)
        return _update_bags(kind, table, grads, ids, None, None, None, s0, s1, rule, numbers, seed=seed)
    _changed(kind, table, s0, s1)
    return None


def _on_device(kind, code, grad_code, rule, dim):
    """Whether a CUDA kernel sorts, sums and updates."""
    if not kind.cuda or kind.kernels is None or code == F64:
        return False
    if grad_code != code:
        grad_code = F32
    return rule != "rowwise_adagrad" or dim <= kind.kernels.bag_update_columns(code, grad_code, dim)


def _outside(rows, k, height):
    raise IndexError(f"rows[{k}] is {int(rows[k])}; rows must lie in [0, {height}), the rows of the table")


def _fall_back(kind, table, rows, grads, s0, s1, rule, numbers, seed):
    """Without a kernel: the reference on the CPU, torch's own ops on CUDA."""
    if kind.name == "torch" and (kind.cuda or kind.kernels is not None):
        from ..torch_ops.row_update import step_rows

        return step_rows(table, rows, grads, s0, s1, rule, numbers, seed)
    if kind.cuda:
        raise RuntimeError(
            "update_rows and update_bags of CuPy arrays have no kernel for float64, nor for rowwise_adagrad "
            "of rows this long; torch tensors are served"
        )
    flat = kind.to_numpy(rows)
    bad = (flat < 0) | (flat >= table.shape[0])
    if bad.any():
        _outside(rows, int(bad.argmax()), table.shape[0])
    code = kind.code(table)
    host = kind.to_numpy(table)
    host_grads, host_0, host_1 = _to_numpy(kind, grads, s0, s1)
    reference.update_rows(host, flat, host_grads, host_0, host_1, rule, numbers, seed)
    if code == BF16:  # a copy as float32 was updated
        table[...] = kind.from_numpy(host, BF16, table)
    _changed(kind, table, s0, s1)
    return None


# ---------------------------------------------------------------- bags
def _update_bags(
    kind, table, grad, ids, offsets=None, weights=None, argmax=None, s0=None, s1=None, rule="sgd", numbers=(),
    mode="sum", padding_idx=None, include_last_offset=False, seed=None,
):  # fmt: skip
    _mixed(
        kind, table, "table",
        {"grad": grad, "ids": ids, "offsets": offsets, "weights": weights, "state": s0, "state ": s1},
    )  # fmt: skip
    mode_code = _checks.choice("mode", mode, MODES)
    code = _check_target(kind, table, s0, s1, rule)
    _check_seed(seed, code)
    grad_code = _checks.dtype(kind, grad, "grad", (*FLOATS, F64))
    rows, dim = table.shape
    bags, length = _layout(ids, offsets, include_last_offset)
    if tuple(grad.shape) != (bags, dim):
        raise ValueError(
            f"grad has shape {tuple(grad.shape)}; it must be {(bags, dim)}, (bags, dim of the table)"
        )
    if grad_code == F64 and code != F64:
        grad, grad_code = kind.cast(grad, F32), F32
    padding = _padding(padding_idx, rows)
    ids, offsets, id_code = _ids(kind, ids, offsets)
    if weights is not None:
        weights = _weights(kind, weights, ids, mode, F64 if code == F64 else F32)
    if argmax is None and _on_device(kind, code, grad_code, rule, dim):
        where = (
            kind.ptr(ids), id_code, ids.shape[0] if offsets is not None else bags * length,
            _ptr(kind, offsets), include_last_offset, bags, length, padding, mode_code,
        )  # fmt: skip
        return _update_on_cuda(
            kind, table, code, grad, grad_code, where, weights, s0, s1, rule, numbers, seed
        )
    if kind.kernels is None or code == F64 or kind.cuda:
        wide = kind.cast(grad, F64 if code == F64 else F32)
        touched, values = _bag_backward_rows(
            kind, wide, ids, offsets, weights, argmax, rows, mode, padding_idx, include_last_offset
        )
        if _on_device(kind, code, F32, rule, dim):  # maxima
            return _update_rows(kind, table, touched, values, s0, s1, rule, numbers, seed)
        return _fall_back(kind, table, touched, values, s0, s1, rule, numbers, seed)
    grad = kind.dense(grad)
    n_ids = ids.shape[0] if offsets is not None else bags * length
    order, starts, touched, bag_of, count, workspace = _spread.plan_memory(kind, grad, n_ids, rows)
    bag_scale = kind.empty((bags,), F32, grad) if mode == "mean" else None
    ptr = kind.ptr
    bad = kind.kernels.bag_sort(
        ptr(ids), id_code, n_ids, _ptr(kind, offsets), include_last_offset, bags, length, padding, mode_code,
        rows, ptr(order), ptr(starts), ptr(touched), ptr(bag_of), _ptr(kind, bag_scale), ptr(count),
        ptr(workspace), workspace.shape[0],
    )  # fmt: skip
    if bad != -1:
        _explain(kind, ids, offsets, rows, include_last_offset)
    kind.kernels.row_update(
        ptr(table), code, rows, dim, _ptr(kind, s0), _ptr(kind, s1), RULES[rule], *numbers, seed is not None,
        seed or 0, int(count[0]), ptr(touched), n_ids, ptr(starts), ptr(order), ptr(bag_of),
        _ptr(kind, bag_scale), _ptr(kind, weights), _ptr(kind, argmax), ptr(grad), grad_code, bags, mode_code,
    )  # fmt: skip
    _changed(kind, table, s0, s1)
    return None


def _update_on_cuda(kind, table, code, grad, grad_code, where, weights, s0, s1, rule, numbers, seed):
    """Sort, sum and update in one call; ids out of range are left out. Nothing waits for the device."""
    if grad_code != code and grad_code != F32:
        grad, grad_code = kind.cast(grad, F32), F32
    grad, ptr = kind.dense(grad), kind.ptr
    rows, dim = table.shape
    n_ids, bags, padding, mode = where[2], where[5], where[7], where[8]
    weights = _ptr(kind, weights)
    size = kind.kernels.bag_update_workspace(
        n_ids, where[3], bags, padding, mode, code, dim, weights, *kind.launch(table)
    )
    workspace = kind.empty((size,), U8, table)
    kind.kernels.bag_update(
        *where, ptr(table), code, rows, dim, _ptr(kind, s0), _ptr(kind, s1), RULES[rule], *numbers,
        seed is not None, seed or 0, weights, ptr(grad), grad_code, *kind.launch(table, workspace),
    )  # fmt: skip
    _changed(kind, table, s0, s1)
