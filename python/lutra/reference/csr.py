"""Reference of `lutra.gather.bag_csr`."""

from __future__ import annotations

import numpy as np

from . import gather


def rows(indptr, columns, values, ids, dim):
    """Rows ``ids`` of a matrix in compressed sparse rows as (n, dim), float32 or wider."""
    out = np.zeros((len(ids), dim), np.float64 if values.dtype == np.float64 else np.float32)
    for i, r in enumerate(ids):
        part = slice(int(indptr[r]), int(indptr[r + 1]))
        out[i, columns[part]] = values[part]
    return out


def _needed(indptr, columns, values, ids, offsets, dim, include_last_offset):
    """The rows that occur, decoded, and the ids as places among them."""
    gather.check_ids(ids, offsets, len(indptr) - 1, include_last_offset)
    known = np.where((ids >= 0) & (ids < len(indptr) - 1), ids, 0)  # those of no bag may be anything
    touched, local = np.unique(known, return_inverse=True)
    return touched, local.reshape(ids.shape), rows(indptr, columns, values, touched, dim)


def bag_csr(
    values, indptr, columns, ids, offsets=None, weights=None, dim=0, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """Sum or mean of rows; see `lutra.gather.bag_csr`. ``padding_idx`` is not negative."""
    touched, local, dense = _needed(indptr, columns, values, ids, offsets, dim, include_last_offset)
    pad = _padding(touched, padding_idx)
    if not len(touched):
        dense = np.zeros((1, dim), dense.dtype)
    return gather.bag(dense, local, offsets, weights, None, None, mode, pad, include_last_offset)


def bag_csr_grad(
    grad, indptr, columns, ids, offsets=None, weights=None, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """Gradient of the values, (nnz,)."""
    n = len(indptr) - 1
    touched, sums = gather.bag_grad(
        grad, ids, offsets, weights, None, n, mode, padding_idx, include_last_offset, True
    )
    out = np.zeros(len(columns), grad.dtype)
    for r, g in zip(touched, sums):
        part = slice(int(indptr[r]), int(indptr[r + 1]))
        out[part] = g[columns[part]]
    return out


def bag_csr_weight_grad(
    grad, values, indptr, columns, ids, offsets=None, padding_idx=None, include_last_offset=False
):
    """Gradient of the weights, the shape of ids."""
    touched, local, dense = _needed(indptr, columns, values, ids, offsets, grad.shape[1], include_last_offset)
    pad = _padding(touched, padding_idx)
    if not len(touched):
        return np.zeros(ids.shape, dense.dtype)
    return gather.bag_weight_grad(grad, dense, local, offsets, None, None, pad, include_last_offset)


def _padding(touched, padding_idx):
    """The padded id's place among the rows that occur; None where it does not."""
    if padding_idx is None:
        return None
    found = np.flatnonzero(touched == padding_idx)
    return int(found[0]) if len(found) else None
