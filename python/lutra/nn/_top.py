"""The largest logits of a tied head, tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import scan
from . import _tiles
from ._compressed import Compressed


def topk_of_tiles(head: Any, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids), each (n, k), values in float32 or wider; equal ones by increasing id."""
    layer = head.embedding
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(layer, Compressed):
        arrays, pad_row, *rest = head._source()
    else:
        arrays, pad_row, rest = [layer.weight], None, [_tiles.DENSE, *layer.weight.shape, -1]
    table = _tiles.source(*rest)
    query = hidden.to(wide)
    if head.bias is not None:  # one more column, which every query weighs by one
        query = torch.cat([query, query.new_ones(len(query), 1)], 1)
    best = None
    for begin, end in table.ranges(wide):
        tile = table.tile(arrays, pad_row, begin, end, wide)
        if head.bias is not None:
            tile = torch.cat([tile, head.bias[begin:end].to(wide).unsqueeze(1)], 1)
        found = best_of(query, tile, min(k, end - begin), begin)
        best = found if best is None else merge(best, found, k)
    assert best is not None
    return best


def best_of(query: Tensor, tile: Tensor, k: int, begin: int) -> tuple[Tensor, Tensor]:
    if query.is_cpu or query.dtype == torch.float32:
        values, ids = scan.knn(query, tile, k, metric="ip")
    else:
        values, ids = torch.sort(query @ tile.T, dim=1, descending=True, stable=True)
        values, ids = values[:, :k], ids[:, :k]
    return values, ids + begin


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two selections; the ids of the second are all larger."""
    values, ids = torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order[:, :k])


def topk_of_scan(head: Any, hidden: Tensor, k: int, scan_of: Any) -> tuple[Tensor, Tensor]:
    """The same where a scan selects: ``scan_of(k, bias)``."""
    pad, bias = head.embedding.padding_idx, head.bias
    if pad is None:
        return scan_of(k, bias)
    # The padding row is kept apart: out of the scan, then in by its own logit.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    bias = hidden.new_zeros(head.out_features, dtype=wide) if bias is None else bias.to(wide, copy=True)
    bias[pad] = -torch.inf
    values, ids = scan_of(k, bias)
    values = torch.cat([values, head._pad_logits(hidden).to(values.dtype).unsqueeze(1)], 1)
    ids = torch.cat([ids, torch.full_like(ids[:, :1], pad)], 1)
    ids, order = torch.sort(ids, dim=1)
    values, best = torch.sort(values.gather(1, order), dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, best[:, :k])


def topk_of_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same of logits that are there, (n, rows)."""
    values = logits.new_empty((len(logits), k))
    ids = torch.empty((len(logits), k), dtype=torch.int64, device=logits.device)
    for row, least in enumerate(torch.topk(logits, k).values[:, -1]):
        # torch takes any of equal ones: all that reach the k-th, by id, in a stable order
        found = (logits[row] >= least).nonzero().flatten()
        best, order = torch.sort(logits[row, found], descending=True, stable=True)
        values[row], ids[row] = best[:k], found[order[:k]]
    return values, ids
