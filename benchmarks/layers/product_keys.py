"""Product keys, and the layers on them, against the same in torch's own ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import turns


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds of the selection, then of a layer's step (forward and backward)."""
    yield from selection(quick)
    yield from layers(quick)


def selection(quick: bool) -> Iterator[dict[str, Any]]:
    import torch

    import lutra
    from lutra.torch_ops.product_keys import compose

    torch.manual_seed(0)
    sizes = [(128, 8), (512, 32), (1024, 64)]
    for tokens in (1, 64) if quick else (1, 16, 64, 512, 4096):
        for n, k in sizes[:2] if quick else sizes:
            q, keys = torch.randn(tokens, 128), torch.randn(2, n, 64)
            ours, theirs = lutra.address.product_keys(q, keys, k), compose(q, keys, k)
            assert torch.allclose(ours.scores, theirs[0], rtol=1e-4, atol=1e-4)
            assert (ours.ids == theirs[1]).float().mean() > 0.99
            yield turns(
                {"what": "product_keys", "tokens": tokens, "n": n, "k": k},
                lambda q=q, keys=keys, k=k: lutra.address.product_keys(q, keys, k),
                lambda q=q, keys=keys, k=k: compose(q, keys, k),
                quick,
            )


def layers(quick: bool) -> Iterator[dict[str, Any]]:
    import torch

    import lutra.nn
    from lutra.torch_ops.product_keys import compose

    embed = torch.nn.functional.embedding
    n, width = (64, 64) if quick else (512, 256)

    def memory(layer, x):
        scores, ids = compose(
            layer.chooser.norm(layer.chooser.query(x)).view(len(x), 4, -1), layer.chooser.keys, 32
        )
        return torch.nn.functional.embedding_bag(
            ids.reshape(len(x), -1), layer.values.weight,
            per_sample_weights=scores.softmax(-1).reshape(len(x), -1), mode="sum",
        )  # fmt: skip

    def peer(layer, x):
        scores, ids = compose(
            layer.chooser.norm(layer.chooser.query(x)).view(len(x), 4, -1), layer.chooser.keys, 32
        )
        hidden = layer.activation((embed(ids, layer.down) * x[:, None, None]).sum(-1)) * scores.softmax(-1)
        return (embed(ids, layer.up) * hidden.unsqueeze(-1)).sum((1, 2))

    options = {"num_sub_keys": n, "heads": 4, "k": 32, "key_dim": 128}
    for name, kind, composed in (
        ("ProductKeyMemory", lutra.nn.ProductKeyMemory, memory), ("PEER", lutra.nn.PEER, peer),
    ):  # fmt: skip
        torch.manual_seed(0)
        layer = kind(width, sparse=True, **options)
        for tokens in (16,) if quick else (16, 512):
            x = torch.randn(tokens, width)
            assert torch.allclose(layer(x), composed(layer, x), rtol=1e-3, atol=1e-3)

            def step(function, layer=layer, x=x):
                layer.zero_grad()
                function(x).sum().backward()

            yield turns(
                {"what": f"{name} step", "tokens": tokens, "n": n, "k": 32},
                lambda step=step, layer=layer: step(layer),
                lambda step=step, layer=layer, composed=composed: step(lambda y: composed(layer, y)),
                quick,
            )


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['what']:<22} {row['tokens']:>5} tokens, n {row['n']:>5}, k {row['k']:>3}: "
        f"{row['ours']:>9.3f} ms, torch ops {row['torch']:>9.3f} ({row['ratio']:>5.1f}x)"
    )


def expect(found: list[dict[str, Any]]) -> None:
    """Selections of several tokens are faster than torch's expression, also at small sizes."""
    for row in found:
        if row["what"] in ("product_keys", "encode, evaluation") and row["tokens"] > 1:
            assert row["ratio"] > 1, row
