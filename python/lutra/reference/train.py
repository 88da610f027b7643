"""Reference of `lutra.gather.tensor_train`."""

from __future__ import annotations

import numpy as np

from . import gather


def _parts(core1, core2, core3, ids):
    """The slices of the cores that ids ask for, and the indices of the slices."""
    wide = np.float64 if core1.dtype == np.float64 else np.float32
    i2, i3 = len(core2), len(core3)
    a, b, c = ids // (i2 * i3), ids // i3 % i2, ids % i3
    return core1[a].astype(wide), core2[b].astype(wide), core3[c].astype(wide), a, b, c


def rows(core1, core2, core3, ids):
    """Rows ``ids`` (n,) decoded to (n, d1 d2 d3)."""
    x, y, z, _, _, _ = _parts(core1, core2, core3, ids)
    first = np.einsum("nir,nrjs->nijs", x, y)
    dim = x.shape[1] * y.shape[2] * z.shape[1]
    return np.einsum("nijs,nks->nijk", first, z).reshape(len(ids), dim)


def _needed(core1, core2, core3, ids, offsets, rows_, padding_idx, include_last_offset):
    gather.check_ids(ids, offsets, rows_, include_last_offset)
    known = np.where((ids >= 0) & (ids < rows_), ids, 0)  # those of no bag may be anything
    touched, local = np.unique(known, return_inverse=True)
    dense = rows(core1, core2, core3, touched)
    if not len(touched):
        dense = np.zeros(
            (1, core1.shape[1] * core2.shape[2] * core3.shape[1]),
            np.float64 if core1.dtype == np.float64 else np.float32,
        )
    pad = None
    if padding_idx is not None and (touched == padding_idx).any():
        pad = int((touched == padding_idx).argmax())
    return touched, local.reshape(ids.shape), dense, pad


def tensor_train(
    core1, core2, core3, ids, offsets=None, weights=None, rows=0, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """Sum or mean of rows; see `lutra.gather.tensor_train`. ``padding_idx`` is not negative."""
    _, local, dense, pad = _needed(core1, core2, core3, ids, offsets, rows, padding_idx, include_last_offset)
    return gather.bag(dense, local, offsets, weights, None, None, mode, pad, include_last_offset)


def tensor_train_grad(
    grad, core1, core2, core3, ids, offsets=None, weights=None, rows=0, mode="sum", padding_idx=None,
    include_last_offset=False,
):  # fmt: skip
    """Gradients of the cores."""
    touched, sums = gather.bag_grad(
        grad, ids, offsets, weights, None, rows, mode, padding_idx, include_last_offset, True
    )
    x, y, z, a, b, c = _parts(core1, core2, core3, touched)
    g = sums.reshape(len(touched), x.shape[1], y.shape[2], z.shape[1]).astype(x.dtype)
    first = np.einsum("nir,nrjs->nijs", x, y)
    to_first = np.einsum("nijk,nks->nijs", g, z)
    out = [np.zeros(core.shape, x.dtype) for core in (core1, core2, core3)]
    np.add.at(out[0], a, np.einsum("nijs,nrjs->nir", to_first, y))
    np.add.at(out[1], b, np.einsum("nir,nijs->nrjs", x, to_first))
    np.add.at(out[2], c, np.einsum("nijk,nijs->nks", g, first))
    return tuple(out)


def tensor_train_weight_grad(
    grad, core1, core2, core3, ids, offsets=None, rows=0, padding_idx=None, include_last_offset=False
):
    """Gradient of the weights, the shape of ids."""
    touched, local, dense, pad = _needed(
        core1, core2, core3, ids, offsets, rows, padding_idx, include_last_offset
    )
    if not len(touched):
        return np.zeros(ids.shape, dense.dtype)
    return gather.bag_weight_grad(grad, dense, local, offsets, None, None, pad, include_last_offset)
