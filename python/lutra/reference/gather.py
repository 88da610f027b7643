"""Reference of `lutra.gather`."""

from __future__ import annotations

import numpy as np


def _wide(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.float64 else x.astype(np.float32)


def _rows(table, index, scale=None, minimum=None):
    """The rows at ``index`` in float32 (float64 for float64 tables)."""
    rows = _wide(table[index])
    if scale is not None:
        rows = (
            minimum[index].astype(np.float32)[..., None] + scale[index].astype(np.float32)[..., None] * rows
        )
    return rows


def check_ids(ids, offsets, rows, include_last_offset=False):
    """IndexError for the first bad offset, else for the first id of a bag that lies outside [0, rows)."""
    flat, first = ids.reshape(-1), 0
    last = flat.size
    if offsets is not None:
        before = np.concatenate([np.zeros(1, offsets.dtype), offsets[:-1]]) if offsets.size else offsets
        bad = (offsets < before) | (offsets > flat.size)
        if bad.any():
            i = int(bad.argmax())
            raise IndexError(
                f"offsets[{i}] is {offsets[i]}; offsets must not decrease and must lie in [0, {flat.size}], "
                "the number of ids"
            )
        if offsets.size == 0:
            return
        first, last = int(offsets[0]), int(offsets[-1]) if include_last_offset else flat.size
    part = flat[first:last]
    bad = (part < 0) | (part >= rows)
    if bad.any():
        i = int(bad.argmax()) + first
        where = ", ".join(map(str, np.unravel_index(i, ids.shape)))
        raise IndexError(f"ids[{where}] is {flat[i]}; ids must lie in [0, {rows}), the rows of the table")


def _entries(ids, offsets, include_last_offset, padding_idx, rows):
    """(positions, ids, bags) of the entries that count, in order, and the number of bags."""
    check_ids(ids, offsets, rows, include_last_offset)
    flat = ids.reshape(-1).astype(np.int64)
    if offsets is None:
        bags = ids.shape[0]
        bag_of = np.repeat(np.arange(bags), ids.shape[1])
        position = np.arange(flat.size)
    else:
        bags = offsets.size - bool(include_last_offset)
        ends = offsets if include_last_offset else np.append(offsets, flat.size)
        bag_of = np.repeat(np.arange(bags), np.diff(ends))
        position = np.arange(bag_of.size) + (int(offsets[0]) if bags else 0)
    if padding_idx is not None:
        keep = flat[position] != padding_idx % max(rows, 1)
        position, bag_of = position[keep], bag_of[keep]
    return position, flat[position], bag_of, bags


def bag(
    table, ids, offsets=None, weights=None, scale=None, minimum=None, mode="sum", padding_idx=None,
    include_last_offset=False, return_argmax=False,
):  # fmt: skip
    """Sum, mean or maximum of table rows; see `lutra.gather.bag`.

    With ``return_argmax`` (mode 'max') also the ids of the maxima: (bags, dim) int64, -1 in empty bags.
    """
    position, index, bag_of, bags = _entries(ids, offsets, include_last_offset, padding_idx, table.shape[0])
    rows = _rows(table, index, scale, minimum)
    if weights is not None:
        rows = rows * _wide(weights).reshape(-1)[position, None].astype(rows.dtype)
    out = np.zeros((bags, table.shape[1]), rows.dtype)
    argmax = np.full(out.shape, -1, np.int64)
    filled, starts, count = np.unique(bag_of, return_index=True, return_counts=True)
    if filled.size:
        reduce = np.maximum if mode == "max" else np.add
        out[filled] = reduce.reduceat(rows, starts, axis=0)
        if mode == "mean":
            out[filled] /= count[:, None].astype(rows.dtype)
        if return_argmax:
            best = out[bag_of]
            first = np.where((rows == best) | (np.isnan(rows) & np.isnan(best)), position[:, None], ids.size)
            argmax[filled] = ids.reshape(-1)[np.minimum.reduceat(first, starts, axis=0)]
    out = out.astype(np.float32 if scale is not None else table.dtype, copy=False)
    return (out, argmax) if return_argmax else out


def bag_grad(
    grad, ids, offsets=None, weights=None, argmax=None, rows=0, mode="sum", padding_idx=None,
    include_last_offset=False, sparse=False,
):  # fmt: skip
    """Gradient of the table: dense (rows, dim), or with ``sparse`` (touched rows, their gradients)."""
    position, index, bag_of, bags = _entries(ids, offsets, include_last_offset, padding_idx, rows)
    g = _wide(grad)
    touched, slot = np.unique(index, return_inverse=True)
    out = np.zeros((touched.size, g.shape[1]), g.dtype)
    if mode == "max":
        slot_of = np.full(rows + 1, -1)
        slot_of[touched] = np.arange(touched.size)
        b, j = np.nonzero(argmax >= 0)
        np.add.at(out, (slot_of[argmax[b, j]], j), g[b, j])
    else:
        factor = np.ones(position.size, g.dtype)
        if weights is not None:
            factor = _wide(weights).reshape(-1)[position].astype(g.dtype)
        elif mode == "mean":
            factor = (1 / np.maximum(np.bincount(bag_of, minlength=bags), 1).astype(g.dtype))[bag_of]
        np.add.at(out, slot, factor[:, None] * g[bag_of])
    out = out.astype(grad.dtype, copy=False)
    if sparse:
        return touched, out
    dense = np.zeros((rows, g.shape[1]), grad.dtype)
    dense[touched] = out
    return dense


def bag_weight_grad(
    grad, table, ids, offsets=None, scale=None, minimum=None, padding_idx=None, include_last_offset=False
):
    """Gradient of the weights (mode 'sum'): <grad of the bag, row>; the shape of ids."""
    position, index, bag_of, _ = _entries(ids, offsets, include_last_offset, padding_idx, table.shape[0])
    rows = _rows(table, index, scale, minimum)
    out = np.zeros(ids.size, rows.dtype)
    out[position] = (rows * _wide(grad)[bag_of]).sum(1)
    return out.reshape(ids.shape)


def row_dots(table, ids, x):
    """Inner products with chosen rows; see `lutra.gather.row_dots`."""
    return bag_weight_grad(x, table, ids)


def quantize_rows(table, dtype="uint8"):
    """8-bit codes, scale and minimum of each row; see `lutra.gather.quantize_rows`."""
    rows = _wide(table)
    low, high = rows.min(1), rows.max(1)
    # Parts are subtracted, not wholes: a row from -2e38 to 2e38 must not overflow.
    scale = (high / 255 - low / 255).astype(np.float32)
    scale[~(scale > 0)] = (
        1  # a constant row, or one so flat that the step underflows: code 0, exactly its minimum
    )
    codes = np.rint((rows / 2 - low[:, None] / 2) / (scale[:, None] / 2)).clip(0, 255).astype(np.uint8)
    low = low.astype(np.float32)
    if dtype == "int8":
        return (codes.astype(np.int16) - 128).astype(np.int8), scale, low + 128 * scale
    return codes, scale, low


def dequantize_rows(codes, scale, minimum):
    """minimum + scale * codes, float32."""
    return _rows(codes, slice(None), scale, minimum)


def _check_codes(codes, entries):
    bad = (codes < 0) | (codes >= entries)
    if bad.any():
        where = np.unravel_index(int(bad.argmax()), codes.shape)
        raise IndexError(
            f"codes[{', '.join(map(str, where))}] is {codes[where]}; codes must lie in [0, {entries}), "
            "the entries of a table"
        )


def _table_rows(tables, k, codes, scale, minimum):
    """Rows of table k, in float32 (float64)."""
    if scale is None:
        return _rows(tables[k], codes)
    return _rows(tables[k], codes, scale[k], minimum[k])


def tables(tables, codes, weights=None, bias=None, scale=None, minimum=None):
    """One row of each table, weighted and summed; see `lutra.gather.tables`. codes (tokens, n_tables)."""
    n_tables, entries, dim = tables.shape
    _check_codes(codes, entries)
    wide = np.float64 if tables.dtype == np.float64 else np.float32
    out = np.zeros((codes.shape[0], dim), wide)
    if bias is not None:
        out += bias.astype(wide)
    for k in range(n_tables):  # a table at a time: the rows of all together may not fit into memory
        rows = _table_rows(tables, k, codes[:, k], scale, minimum)
        out += rows if weights is None else rows * weights[:, k, None].astype(wide)
    if scale is None:
        return out.astype(tables.dtype, copy=False)
    return out if bias is None else out.astype(bias.dtype, copy=False)


def tables_backward(
    grad, tables, codes, weights=None, need_tables=True, need_weights=True, scale=None, minimum=None
):
    """Gradients of the tables and of the weights (None where not needed)."""
    n_tables, entries, _ = tables.shape
    _check_codes(codes, entries)
    wide = np.float64 if tables.dtype == np.float64 else np.float32
    g = grad.astype(wide)
    grad_tables = np.zeros(tables.shape, tables.dtype) if need_tables else None
    grad_weights = np.zeros(codes.shape, wide) if need_weights else None
    for k in range(n_tables):
        if grad_tables is not None:
            total = np.zeros(tables.shape[1:], wide)
            np.add.at(total, codes[:, k], g if weights is None else g * weights[:, k, None].astype(wide))
            grad_tables[k] = total
        if grad_weights is not None:
            grad_weights[:, k] = (_table_rows(tables, k, codes[:, k], scale, minimum) * g).sum(1)
    return grad_tables, grad_weights


# ---------------------------------------------------------------- senses
def check_senses(ids, tokens, total, offsets=None):
    """IndexError for the first id outside [0, tokens), ValueError for the first token without senses."""

    def at(bad):
        where = np.unravel_index(int(bad.reshape(-1).argmax()), ids.shape)
        return ", ".join(map(str, where)), ids[where]

    bad = (ids < 0) | (ids >= tokens)
    if bad.any():
        where, x = at(bad)
        raise IndexError(f"ids[{where}] is {x}; ids must lie in [0, {tokens}), the tokens of the table")
    if offsets is not None:
        begin, end = offsets[ids], offsets[ids + 1]
        bad = (begin < 0) | (end <= begin) | (end > total)
        if bad.any():
            where, x = at(bad)
            raise ValueError(
                f"ids[{where}] is {x}, whose senses are the rows [{offsets[x]}, {offsets[x + 1]}) by "
                f"offsets; that must be at least one row of the table's {total}"
            )


def senses(table, ids, context, offsets=None):
    """Vectors, rows (of the table as (total, dim)) and scores of `lutra.gather.senses`."""
    if offsets is None:
        tokens, each, _ = table.shape
        offsets = np.arange(tokens + 1, dtype=np.int64) * each
        table = table.reshape(tokens * each, -1)
    check_senses(ids, offsets.size - 1, table.shape[0], offsets)
    wide, flat = _wide(table), ids.reshape(-1).astype(np.int64)
    context = _wide(context).reshape(flat.size, table.shape[1]).astype(wide.dtype)
    rows, scores = np.zeros(flat.size, np.int64), np.zeros(flat.size, wide.dtype)
    for i, x in enumerate(flat):
        score = wide[offsets[x] : offsets[x + 1]] @ context[i]
        best = int(score.argmax())  # the first maximum; the first NaN, where there is one
        rows[i], scores[i] = offsets[x] + best, score[best]
    vectors = table[rows].reshape(*ids.shape, table.shape[1])
    return vectors, rows.reshape(ids.shape), scores.reshape(ids.shape)
