"""Cases of `lutra.nn`: MemoryLinear against a dense layer, and against its formula in torch operations."""

from __future__ import annotations

from functools import partial

from . import data, expect
from .case import Case, Prepared
from .cases_address import torch_sign_hash

BITS = 8


def torch_memory_linear(x, tables, bias):
    """The layer's formula in torch operations: the sign hash, then one embedding_bag over all tables."""
    import torch

    n_tables, entries, dim = tables.shape
    codes, weights = torch_sign_hash(x, BITS)
    rows = codes + torch.arange(n_tables) * entries
    out = torch.nn.functional.embedding_bag(
        rows, tables.view(-1, dim), mode="sum", per_sample_weights=weights
    )
    return out + bias


def _memory_linear(d: int, tokens: int, quick: bool) -> Prepared:
    import torch

    from .. import nn

    layer = nn.MemoryLinear(d, d, bits=BITS).requires_grad_(False)
    dense = torch.nn.Linear(d, d).requires_grad_(False)
    inputs = [torch.from_numpy(data.vectors(tokens, d, seed=s)) for s in range(8 if tokens == 1 else 2)]
    mine, linear, formula = (data.fresh(inputs) for _ in range(3))

    n_tables = d // BITS

    def check():
        few = torch.linspace(0, tokens - 1, min(tokens, 4)).long()
        codes, weights = torch_sign_hash(inputs[0][few].double(), BITS)
        rows = layer.tables.view(-1, d)[codes + torch.arange(n_tables) * 2**BITS]
        want = (rows * weights[..., None]).sum(1) + layer.bias  # in float64
        expect.close(layer(inputs[0])[few], want, atol=1e-4, what="MemoryLinear")
        expect.close(torch_memory_linear(inputs[0][few], layer.tables, layer.bias), want, atol=1e-4)

    return Prepared(
        ours=lambda: layer(mine()),
        check=check,
        peers={
            "torch": lambda: torch_memory_linear(formula(), layer.tables, layer.bias),
            "nn.Linear": lambda: dense(linear()),
        },
        # every token asks for n_tables rows; a table is read at most once where many tokens share it
        bytes=4.0 * n_tables * d * min(tokens, 1 << BITS),
        flops=2.0 * tokens * n_tables * d,
        work=tokens,
        unit="tokens",
    )


def _case(d: int, tokens: int, full_only: bool) -> Case:
    name = f"MemoryLinear {d}, {tokens} token{'s' if tokens > 1 else ''}"
    return Case(name, "nn", partial(_memory_linear, d, tokens), needs=("torch",), full_only=full_only)


CASES = [
    _case(1024, 1, False),
    _case(1024, 16, True),
    _case(1024, 1024, False),
    _case(4096, 1, True),
    _case(4096, 1024, True),
]
