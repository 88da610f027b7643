"""Sign hash and the MemoryLinear path."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import INPUTS, Case, milliseconds, near

import lutra


def cases(scale: int) -> Iterator[Case]:
    def torch_hash(x):
        z = x.float().unflatten(-1, (-1, 8))
        powers = 1 << torch.arange(8, device="cuda", dtype=torch.int32)
        return ((z >= 0).int() * powers).sum(-1, dtype=torch.int32), torch.sigmoid(2 * z.abs()).prod(-1)

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

    for d in (1024, 4096 if scale == 1 else 1024):
        n_tables = d // 8
        tables = torch.randn(n_tables, 256, d, device="cuda") * 0.02
        linear = torch.nn.Linear(d, d, device="cuda")
        for tokens in (1, 256, 4096 // scale):
            x = [(torch.randn(tokens, d, device="cuda"),) for _ in range(INPUTS)]

            def layer(x, tables=tables):
                return lutra.gather.tables(tables, *lutra.address.sign_hash(x))

            def composed(x, tables=tables, n_tables=n_tables):
                codes, weights = lutra.address.sign_hash(x)
                out = torch.empty(len(x), tables.shape[2], device="cuda")
                for a, c, w in zip(out.split(64), codes.split(64), weights.split(64)):
                    rows = tables[torch.arange(n_tables, device="cuda"), c.long()]
                    a.copy_(torch.bmm(w[:, None], rows)[:, 0])
                return out

            case = Case(
                f"memory layer {d}, {tokens} tokens",
                layer,
                x,
                composed,
                near(1e-3, 1e-4),
                bytes=min(tokens * n_tables, n_tables * 256) * d * 4 + tokens * d * 8,
            )
            with torch.no_grad():
                case.numbers["linear_ms"] = milliseconds([linear], x, 0.2)[0]
            yield case
        tokens = 4096 // scale
        x = torch.randn(tokens, d, device="cuda")
        codes, weights = lutra.address.sign_hash(x)
        leaf, leaf_w = tables.clone().requires_grad_(), weights.clone().requires_grad_()
        g = torch.randn(tokens, d, device="cuda")

        def backward(codes=codes, leaf=leaf, leaf_w=leaf_w, g=g):
            return torch.autograd.grad(lutra.gather.tables(leaf, codes, leaf_w), (leaf, leaf_w), g)

        yield Case(
            f"memory layer {d}, {tokens} tokens, forward + backward",
            backward,
            [()],
            bytes=3 * leaf.numel() * 4 + 3 * g.numel() * 4,
        )
        del leaf, tables
