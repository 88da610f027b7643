"""Cases of compressed tables: bags of 20 rows of 64, with fresh ids at every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .. import gather
from . import data, expect
from .case import Case, Prepared

DIM, LENGTH = 64, 20
_TORCH = {
    "int8": ("embedding_bag_byte_prepack", "embedding_bag_byte_rowwise_offsets"),
    "int4": ("embedding_bag_4bit_prepack", "embedding_bag_4bit_rowwise_offsets"),
    "int2": ("embedding_bag_2bit_prepack", "embedding_bag_2bit_rowwise_offsets"),
}


def _sizes(quick: bool) -> tuple[int, int]:
    return (200_000, 4096) if quick else (1_000_000, 4096)


def _packed(kind: str, group: int | None, length: int, quick: bool) -> Prepared:
    """Bags of packed rows against torch's quantized ones, where it has them, else against torch's own ops."""
    import torch
    from torch.nn import functional as F

    from ..gather._packed_torch import decode

    rows, bags = _sizes(quick)
    if length == 1:
        bags *= LENGTH
    packed = gather.pack_rows(torch.from_numpy(data.vectors(rows, DIM)), kind, group)
    ids = [torch.from_numpy(i) for i in data.bag_ids(rows, bags, length, calls=24)]
    mine, theirs = data.fresh(ids), data.fresh(ids)
    offsets = torch.arange(0, bags * length, length)
    peers: dict[str, Callable[[], Any]] = {}

    def ours(i):
        return gather.bag_packed(packed, i, dim=DIM, kind=kind, group=group)

    def composed(i):
        table = decode(packed[i.reshape(-1)], DIM, kind, group)
        if length == 1:
            return table
        return F.embedding_bag(torch.arange(len(table)).view(i.shape), table, mode="sum")

    quantized = None
    if kind in _TORCH and group is None:
        op = getattr(torch.ops.quantized, _TORCH[kind][1], None)
        if op is not None:
            quantized = lambda i: op(packed, i.reshape(-1), offsets)  # noqa: E731
            peers["torch"] = lambda: quantized(theirs())
    peers["torch" if not peers else "torch, composed"] = lambda: composed(theirs())

    def check():
        got = ours(ids[0])
        expect.close(got, composed(ids[0]), atol=1e-3, what=f"bag of {kind} rows")
        if quantized is not None:
            expect.close(got, quantized(ids[0]), atol=1e-3, what=f"torch's bag of {kind} rows")

    return Prepared(
        ours=lambda: ours(mine()),
        check=check,
        peers=peers,
        bytes=float(bags * length * packed.shape[1]),
        flops=2.0 * bags * DIM * length,
    )


def _pack(kind: str, rounding: str, quick: bool) -> Prepared:
    """Packing a table; torch's prepack is the peer where there is one."""
    import torch

    rows = _sizes(quick)[0] // 4
    table = torch.from_numpy(data.vectors(rows, DIM))
    peers = {}
    if kind in _TORCH:
        prepack = getattr(torch.ops.quantized, _TORCH[kind][0])
        peers["torch"] = lambda: prepack(table)

    def check():
        back = gather.unpack_rows(gather.pack_rows(table, kind, rounding=rounding), DIM, kind)
        worst = {"int8": 0.05, "int4": 0.8, "nf4": 0.8}[kind]
        assert float((back - table).abs().max()) < worst, f"{kind} rows are far from the table"

    return Prepared(
        ours=lambda: gather.pack_rows(table, kind, rounding=rounding),
        check=check,
        peers=peers,
        bytes=4.0 * rows * DIM,
        work=4.0 * rows * DIM,
        unit="B",
    )


TORCH = ("torch",)
CASES = [
    Case("bag int8 rows", "tables", partial(_packed, "int8", None, LENGTH), needs=TORCH),
    Case("bag int4 rows", "tables", partial(_packed, "int4", None, LENGTH), needs=TORCH),
    Case("bag int2 rows", "tables", partial(_packed, "int2", None, LENGTH), needs=TORCH),
    Case("bag int4 rows, groups of 32", "tables", partial(_packed, "int4", 32, LENGTH), needs=TORCH),
    Case("bag nf4 rows", "tables", partial(_packed, "nf4", None, LENGTH), needs=TORCH),
    Case("bag fp8 rows", "tables", partial(_packed, "fp8_e4m3", None, LENGTH), needs=TORCH, full_only=True),
    Case("lookup int8 rows", "tables", partial(_packed, "int8", None, 1), needs=TORCH),
    Case("lookup int4 rows", "tables", partial(_packed, "int4", None, 1), needs=TORCH),
    Case("pack int8 rows", "tables", partial(_pack, "int8", "nearest"), needs=TORCH),
    Case("pack int4 rows, stochastic", "tables", partial(_pack, "int4", "stochastic"), needs=TORCH),
    Case("pack nf4 rows", "tables", partial(_pack, "nf4", "nearest"), needs=TORCH, full_only=True),
]
