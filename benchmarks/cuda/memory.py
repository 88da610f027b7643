"""Sign hash and the MemoryLinear path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import INPUTS, Case, captured, milliseconds, near

import lutra
import lutra.nn

BITS = 8
ROWS = 1 << BITS
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


def torch_hash(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sign hash in torch's operations."""
    z = x.float().unflatten(-1, (-1, BITS))
    powers = 1 << torch.arange(BITS, device="cuda", dtype=torch.int32)
    return ((z >= 0).int() * powers).sum(-1, dtype=torch.int32), torch.sigmoid(2 * z.abs()).prod(-1)


def composed(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """A memory layer in torch's operations, with its fastest look-up."""
    codes, weights = torch_hash(x)
    ids = codes.long() + torch.arange(len(tables), device="cuda") * ROWS
    flat = tables.view(-1, tables.shape[2])
    return F.embedding_bag(ids, flat, per_sample_weights=weights.to(tables.dtype), mode="sum")


def touched(tokens: int) -> float:
    """How many rows of a table so many tokens read, on average."""
    return ROWS * (1 - (1 - 1 / ROWS) ** tokens)


def forward(d: int, tokens: int, dtype: torch.dtype, graph: bool) -> Case:
    size = 4 if dtype == torch.float32 else 2
    case = Case(
        f"MemoryLinear {d}, {tokens} tokens, {str(dtype)[6:]}{', graph' if graph else ''}",
        None,
        [],
        check=near(*((3e-2, 3e-2) if size == 2 else (1e-3, 1e-4))),
        bytes=d // BITS * touched(tokens) * d * size + 2 * tokens * d * size,
        graph=graph,
        flush=tokens
        <= 16,  # a dense layer's weights would stay in the cache, as they do not between other layers
    )

    def build() -> tuple[Any, ...]:
        layer = lutra.nn.MemoryLinear(d, d, BITS, bias=False, device="cuda", dtype=dtype).requires_grad_(
            False
        )
        linear = torch.nn.Linear(d, d, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        inputs = [(torch.randn(tokens, d, device="cuda", dtype=dtype),) for _ in range(INPUTS)]
        dense = [(x.bfloat16(),) for (x,) in inputs]
        function = captured(linear, dense) if graph else linear
        case.numbers["linear_bf16_ms"] = milliseconds([function], dense, 0.1, case.flush)[0]
        return layer, inputs, lambda x: composed(x, layer.tables)

    case.build = build
    return case


def training(d: int, tokens: int, dtype: torch.dtype) -> Case:
    size = 4 if dtype == torch.float32 else 2
    case = Case(
        f"MemoryLinear {d}, {tokens} tokens, {str(dtype)[6:]}, forward + backward",
        None,
        [],
        # rows read twice, the gradient of all of them written
        bytes=d // BITS * (2 * touched(tokens) + ROWS) * d * size + 4 * tokens * d * size,
    )

    def check(ours: Any, theirs: Any) -> None:
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(
                a, b, rtol=5e-2, atol=float(b.abs().max()) * (2e-2 if size == 2 else 1e-4)
            )

    def build() -> tuple[Any, ...]:
        layer = lutra.nn.MemoryLinear(d, d, BITS, bias=False, device="cuda", dtype=dtype)
        g = torch.randn(tokens, d, device="cuda", dtype=dtype)
        inputs = [(torch.randn(tokens, d, device="cuda", dtype=dtype).requires_grad_(),) for _ in range(3)]
        linear = torch.nn.Linear(d, d, bias=False, device="cuda", dtype=torch.bfloat16)
        dense = [(x.detach().bfloat16().requires_grad_(),) for (x,) in inputs]

        def step(function: Any, leaf: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = function(x)
            return torch.autograd.grad(out, (x, leaf), g.to(out.dtype))

        case.numbers["linear_bf16_ms"] = milliseconds([lambda x: step(linear, linear.weight, x)], dense, 0.1)[
            0
        ]
        theirs = None  # torch has no gradient of embedding_bag's weights in bfloat16
        if dtype == torch.float32:

            def theirs(x: torch.Tensor) -> Any:
                return step(lambda x: composed(x, layer.tables), layer.tables, x)

        return lambda x: step(layer, layer.tables, x), inputs, theirs

    case.build, case.check = build, check
    return case


def cases(scale: int) -> Iterator[Case]:
    def check(ours, theirs):
        assert bool((ours[0] == theirs[0]).all())
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)

    rows, d = 32768 // scale, 4096
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [(torch.randn(rows, d, device="cuda").to(dtype),) for _ in range(3)]
        size = inputs[0][0].element_size()
        yield Case(
            f"sign_hash {rows}x{d} {str(dtype)[6:]}",
            lutra.address.sign_hash,
            inputs,
            torch_hash,
            check,
            bytes=rows * d * (size + 1),
        )
    for d in (4096, 1024, 2048) if scale == 1 else (1024,):
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in TOKENS:
                yield forward(d, tokens, dtype, True)
                if tokens in (1, 256):
                    yield forward(d, tokens, dtype, False)
            for tokens in (1, 256, 1024, 4096):
                yield training(d, tokens, dtype)
