"""Cases of `lutra.gather`: bags of 20 rows of 64, with fresh ids at every call."""

from __future__ import annotations

from functools import partial

import numpy as np

from .. import gather
from . import data, expect
from .case import Case, Prepared

DIM, LENGTH = 64, 20


def _sizes(quick: bool) -> tuple[int, int]:
    return (200_000, 4096) if quick else (1_000_000, 4096)


def _bag_numpy(quick: bool) -> Prepared:
    rows, bags = _sizes(quick)
    table = data.vectors(rows, DIM)
    ids = data.bag_ids(rows, bags, LENGTH)
    mine, theirs = data.fresh(ids), data.fresh(ids)
    return Prepared(
        ours=lambda: gather.bag(table, mine()),
        check=lambda: expect.close(gather.bag(table, ids[0]), table[ids[0]].sum(1), what="bag"),
        peers={"numpy": lambda: table[theirs()].sum(1)},
        bytes=4.0 * bags * DIM * LENGTH,
        flops=float(bags * DIM * LENGTH),
    )


def _bag_torch(dtype: str, mode: str, quick: bool) -> Prepared:
    import torch
    from torch.nn import functional as F

    rows, bags = _sizes(quick)
    table = torch.from_numpy(data.vectors(rows, DIM)).to(getattr(torch, dtype))
    ids = [torch.from_numpy(i) for i in data.bag_ids(rows, bags, LENGTH)]
    mine, theirs = data.fresh(ids), data.fresh(ids)

    def check():
        picked = table[ids[0]].float()
        want = picked.sum(1) if mode == "sum" else picked.mean(1) if mode == "mean" else picked.amax(1)
        half = dtype != "float32"
        expect.close(
            gather.bag(table, ids[0], mode=mode), want.to(table.dtype),
            rtol=1e-2 if half else 1e-4, atol=1e-2 if half else 1e-5, what="bag",
        )  # fmt: skip

    return Prepared(
        ours=lambda: gather.bag(table, mine(), mode=mode),
        check=check,
        peers={"torch": lambda: F.embedding_bag(theirs(), table, mode=mode)},
        bytes=float(table.element_size() * bags * DIM * LENGTH),
        flops=float(bags * DIM * LENGTH),
    )


def _bag_int8(quick: bool) -> Prepared:
    rows, bags = _sizes(quick)
    full = data.vectors(rows, DIM)
    q = gather.quantize_rows(full, "uint8")
    ids = data.bag_ids(rows, bags, LENGTH)
    mine, theirs = data.fresh(ids), data.fresh(ids)

    def by_numpy(i):
        return (q.minimum[i][..., None] + q.scale[i][..., None] * q.codes[i]).sum(1)

    peers = {"numpy": lambda: by_numpy(theirs())}
    if data.installed("torch") is not None:
        fused = _torch_fused_8bit(q)
        flat = [_flat(i) for i in ids]
        following = data.fresh(flat)
        peers["torch"] = lambda: fused(following())

    def check():
        out = gather.bag(q.codes, ids[0], scale=q.scale, minimum=q.minimum)
        expect.close(out, by_numpy(ids[0]), atol=1e-4, what="bag of 8-bit rows")
        worst = np.abs(out - full[ids[0]].sum(1)).max()  # a step is about 6 / 255, at most half of it is lost
        assert worst < LENGTH * 0.03, f"8-bit rows are off by {worst}"
        if "torch" in peers:
            expect.close(fused(flat[0]), out, atol=1e-3, what="torch's bag of 8-bit rows")

    return Prepared(
        ours=lambda: gather.bag(q.codes, mine(), scale=q.scale, minimum=q.minimum),
        check=check,
        peers=peers,
        bytes=float(bags * LENGTH * (DIM + 8)),
        flops=2.0 * bags * DIM * LENGTH,
    )


def _flat(ids: np.ndarray):
    import torch

    return torch.from_numpy(ids.reshape(-1))


def _torch_fused_8bit(q):
    """torch's own 8-bit bag as a function of flat ids; its rows hold the codes, then scale and minimum."""
    import torch

    tail = np.stack([np.asarray(q.scale), np.asarray(q.minimum)], 1).astype(np.float32).view(np.uint8)
    packed = torch.from_numpy(np.concatenate([np.asarray(q.codes), tail], 1))
    op = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    return lambda flat: op(packed, flat, torch.arange(0, flat.numel(), LENGTH))


def _bag_training(quick: bool) -> Prepared:
    import torch

    from .. import nn

    rows, bags = _sizes(quick)
    weight = torch.from_numpy(data.vectors(rows, DIM).copy())
    ours = nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum", sparse=True)
    peer = torch.nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum", sparse=True)
    ids = [torch.from_numpy(i) for i in data.bag_ids(rows, bags, LENGTH)]
    mine, theirs = data.fresh(ids), data.fresh(ids)
    grad = torch.from_numpy(data.vectors(bags, DIM, seed=3))

    def step(layer, batch):
        layer.weight.grad = None
        layer(batch).backward(grad)
        return layer.weight.grad

    def check():
        got, want = step(ours, ids[0]).coalesce(), step(peer, ids[0]).coalesce()
        expect.equal(got.indices(), want.indices(), what="touched rows")
        expect.close(got.values(), want.values(), what="gradient")

    return Prepared(
        ours=lambda: step(ours, mine()),
        check=check,
        # torch's gradient repeats a row for each look-up; ours is coalesced, which optimizers do first
        peers={
            "torch": lambda: step(peer, theirs()),
            "torch, coalesced": lambda: step(peer, theirs()).coalesce(),
        },
        bytes=2.0 * 4 * bags * DIM * LENGTH,  # the rows are read, their gradients written
        flops=2.0 * bags * DIM * LENGTH,
    )


TORCH = ("torch",)
CASES = [
    Case("bag fp32, NumPy", "gather", _bag_numpy),
    Case("bag fp32", "gather", partial(_bag_torch, "float32", "sum"), needs=TORCH),
    Case("bag bf16", "gather", partial(_bag_torch, "bfloat16", "sum"), needs=TORCH),
    Case("bag fp16", "gather", partial(_bag_torch, "float16", "sum"), needs=TORCH, full_only=True),
    Case("bag fp32, mean", "gather", partial(_bag_torch, "float32", "mean"), needs=TORCH, full_only=True),
    Case("bag fp32, max", "gather", partial(_bag_torch, "float32", "max"), needs=TORCH, full_only=True),
    Case("bag 8-bit rows", "gather", _bag_int8),
    Case("bag fp32, forward and backward, touched rows", "gather", _bag_training, needs=TORCH),
]
