"""Reference of the optimizers' steps on touched rows (`lutra.gather.update_rows` and `update_bags`)."""

from __future__ import annotations

import numpy as np

from .gather import _wide, bag_grad


def random_bits(seed, rows, dim):
    """16 random bits for each value of the rows, (n, dim) uint32: a hash of (seed, row, column)."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        key = ((x ^ (x >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)
        column = np.arange(dim, dtype=np.uint32) * np.uint32(0x9E3779B9)
        b = key[:, None] + column
        b = (b ^ (b >> np.uint32(16))) * np.uint32(0x7FEB352D)
        b = (b ^ (b >> np.uint32(15))) * np.uint32(0x846CA68B)
        return (b ^ (b >> np.uint32(16))) >> np.uint32(16)


def round_bfloat16(x, bits):
    """float32 values of which bfloat16 keeps all: rounded away from zero with the probability of what is "
    "cut off."""
    u = x.astype(np.float32).view(np.uint32)
    finite = (u & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (u + bits) & np.uint32(0xFFFF0000), u).astype(np.uint32).view(np.float32)


def update_rows(table, rows, grads, s0, s1, rule, numbers, seed=None):
    """One step of an optimizer on the rows named, in place; a row named twice gets the sum of its gradients.

    Parameters
    ----------
    table : ndarray, shape (rows, dim)
    rows : ndarray, shape (n,), valid
    grads : ndarray, shape (n, dim)
    s0, s1 : ndarray or None
        The state, see csrc/gather/row_update.h.
    rule : str
        'sgd', 'momentum', 'adagrad', 'rowwise_adagrad' or 'adam'.
    numbers : tuple of float
        (lr, shrink, a, b, eps, scale) of csrc/gather/row_update.h; for 'adam' a and b are 1 - beta.
    seed : int, optional
        Results are rounded randomly to bfloat16 (the table holds such values, as float32).
    """
    touched, slot = np.unique(rows, return_inverse=True)
    kind = np.float64 if table.dtype == np.float64 else np.float32
    lr, shrink, a, b, eps, scale = (kind(n) for n in numbers)
    g = np.zeros((touched.size, table.shape[1]), kind)
    np.add.at(g, slot.reshape(-1), _wide(grads).astype(kind))
    w = table[touched].astype(kind) * shrink
    if rule == "sgd":
        w -= lr * g
    elif rule == "momentum":
        s0[touched] = a * s0[touched] + g
        w -= lr * s0[touched]
    elif rule == "adagrad":
        s0[touched] += g * g
        w -= lr * g / (np.sqrt(s0[touched]) + eps)
    elif rule == "rowwise_adagrad":
        if table.shape[1]:
            s0[touched] += (g * g).mean(1)
        w -= (lr / (np.sqrt(s0[touched]) + eps))[:, None] * g
    else:
        s0[touched] += a * (g - s0[touched])
        s1[touched] += b * (g * g - s1[touched])
        w -= lr * s0[touched] / (scale * np.sqrt(s1[touched]) + eps)
    if seed is not None:
        w = round_bfloat16(w, random_bits(seed, touched, table.shape[1]))
    table[touched] = w.astype(table.dtype)


def update_bags(
    table, grad, ids, offsets, weights, argmax, s0, s1, rule, numbers, mode="sum", padding_idx=None,
    include_last_offset=False, seed=None,
):  # fmt: skip
    """The same from the gradient of a `bag`'s result: `bag_grad`, then `update_rows`."""
    rows, grads = bag_grad(
        _wide(grad),
        ids,
        offsets,
        weights,
        argmax,
        table.shape[0],
        mode,
        padding_idx,
        include_last_offset,
        True,
    )
    update_rows(table, rows, grads, s0, s1, rule, numbers, seed)
