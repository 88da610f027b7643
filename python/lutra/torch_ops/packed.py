"""``torch.ops.lutra`` for packed rows."""

from __future__ import annotations

import torch

from .. import _checks
from ..gather import _packed as packed
from .library import register

ops = torch.ops.lutra


# ---------------------------------------------------------------- pack and unpack
def _pack_fake(table, scale, minimum, kind, group, rounding, seed):
    at = packed.row_layout(table.shape[1], kind, group)
    return table.new_empty((table.shape[0], at.row_bytes), dtype=torch.uint8)


def _unpack_fake(rows, ids, dim, kind, group, dtype):
    _checks.choice("dtype", dtype, packed.OUT_TYPES)
    n = rows.shape[0] if ids is None else ids.shape[0]
    return rows.new_empty((n, dim), dtype=getattr(torch, dtype))


register(
    "pack_rows(Tensor table, Tensor? scale, Tensor? minimum, str kind, int? group, str rounding, int seed) "
    "-> Tensor",
    packed._pack_rows,
    _pack_fake,
)
register(
    "pack_rows_out(Tensor table, Tensor(a!) out, Tensor? ids, Tensor? scale, Tensor? minimum, str kind, "
    "int? group, str rounding, int seed) -> ()",
    packed._pack_rows_out,
    lambda *_: None,
)
register(
    "unpack_rows(Tensor packed, Tensor? ids, int dim, str kind, int? group, str dtype) -> Tensor",
    packed._unpack_rows,
    _unpack_fake,
)
