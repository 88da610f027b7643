"""Cases of rows that are drawn, chosen, pooled or transplanted: docs/senses.md and docs/vocabulary.md."""

from __future__ import annotations

from functools import partial

import numpy as np

from .. import address, gather, reference, vocab
from . import data, expect
from .case import Case, Prepared


def _random_rows(dim: int, quick: bool) -> Prepared:
    import torch

    batch, length = (32, 128) if quick else (64, 512)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50_000, (batch, length)))
    sequences = torch.arange(batch)

    def check():
        got = address.random_rows(ids[:2], dim, sequences[:2], seed=1)
        want = reference.address.random_rows(
            ids[:2].numpy(), dim, sequences[:2].numpy(), seed=1, dtype="float64"
        )
        expect.close(got, want, atol=2e-6, rtol=0, what="rows")

    return Prepared(
        ours=lambda: address.random_rows(ids, dim, sequences, seed=1),
        check=check,
        peers={"torch": lambda: torch.randn(batch, length, dim)},
        bytes=4.0 * batch * length * dim,
        work=batch * length,
        unit="tokens",
    )


def _senses(dim: int, each: int, training: bool, quick: bool) -> Prepared:
    import torch

    tokens, n = (5_000, 2_048) if quick else (50_000, 8_192)
    table = torch.from_numpy(data.vectors(tokens, each * dim)).view(tokens, each, dim)
    table = table.clone().requires_grad_(training)
    ids = [torch.from_numpy(i[:, 0]) for i in data.bag_ids(tokens, n, 1, 8)]
    context = torch.from_numpy(data.vectors(n, dim, seed=2))
    grad = torch.from_numpy(data.vectors(n, dim, seed=3))
    mine, theirs = data.fresh(ids), data.fresh(ids)

    def by_torch(x):
        rows = table[x]
        best = torch.bmm(rows, context.unsqueeze(2)).squeeze(2).argmax(1)
        return rows[torch.arange(n), best]

    def run(function, x):
        if not training:
            return function(x)
        table.grad = None
        function(x).backward(grad)
        return table.grad

    def ours(x):
        return gather.senses(table, x, context).vectors

    return Prepared(
        ours=lambda: run(ours, mine()),
        check=lambda: expect.close(run(ours, ids[0]), run(by_torch, ids[0]), what="senses"),
        peers={"torch": lambda: run(by_torch, theirs())},
        bytes=4.0 * n * dim * each,
        flops=2.0 * n * dim * each,
        work=n,
        unit="tokens",
    )


def _byte_words(mode: str, quick: bool) -> Prepared:
    import torch
    from torch.nn import functional as F

    from .. import nn

    text = "\n".join(data.texts(100_000 if quick else 1_000_000)).encode()
    layer = nn.ByteWordPooling(64, mode).requires_grad_(False)
    raw = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    offsets = address.word_offsets(raw)
    owner = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())

    def by_torch():
        rows, out = F.embedding(raw.int(), layer.weight), torch.zeros(len(offsets) - 1, 64)
        if mode == "mean":
            return out.index_add(0, owner, rows) / offsets.diff().unsqueeze(1)
        score = rows @ layer.query / 8
        e = (score - score.max()).exp()
        weights = e / out.new_zeros(len(out)).index_add(0, owner, e)[owner]
        return out.index_add(0, owner, rows * weights.unsqueeze(1))

    return Prepared(
        ours=lambda: layer(raw, offsets),
        check=lambda: expect.close(layer(raw, offsets), by_torch(), atol=1e-4, what="words"),
        peers={"torch": by_torch},
        work=len(text),
        unit="B",
    )


def _focus(quick: bool) -> Prepared:
    common, new, aux, dim = (2_000, 500, 64, 64) if quick else (20_000, 4_000, 300, 384)
    vectors, _ = data.clustered(common + new, aux, 1)
    rows = data.vectors(common, dim)
    old = {f"t{i}": i for i in range(common)}
    target = {**old, **{f"n{i}": common + i for i in range(new)}}

    def ours():
        return vocab.transplant(rows, old, target, "focus", auxiliary=vectors).rows[common:]

    def by_numpy():  # the whole matrix of similarities
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vocab.sparsemax(unit[common:] @ unit[:common].T) @ rows

    return Prepared(
        ours=ours,
        check=lambda: expect.close(ours(), by_numpy(), atol=1e-4, what="rows"),
        peers={"numpy": by_numpy},
        flops=2.0 * new * common * aux,
        work=new,
        unit="tokens",
    )


TORCH = ("torch",)
CASES = [
    Case("random_rows, 384", "tokens", partial(_random_rows, 384), needs=TORCH),
    Case("random_rows, 64", "tokens", partial(_random_rows, 64), needs=TORCH),
    Case("senses, 4 of 384", "tokens", partial(_senses, 384, 4, False), needs=TORCH),
    Case("senses, 8 of 64", "tokens", partial(_senses, 64, 8, False), needs=TORCH),
    Case("senses, 8 of 64, forward and backward", "tokens", partial(_senses, 64, 8, True), needs=TORCH),
    Case("words of bytes, mean", "tokens", partial(_byte_words, "mean"), needs=TORCH),
    Case("words of bytes, attention", "tokens", partial(_byte_words, "attention"), needs=TORCH),
    Case("FOCUS", "tokens", _focus),
]
