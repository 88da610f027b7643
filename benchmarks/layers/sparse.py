"""TopKSAE against the same with the dense activations written, in torch's own ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import turns
from .product_keys import expect as expect
from .product_keys import line as line  # the same form


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds of encode (evaluation, and as in training), decode, and a step (forward and backward)."""
    import torch

    import lutra.nn

    d, sizes = (128, [(16384, 32)]) if quick else (384, [(8192, 32), (32768, 32), (32768, 128), (10**6, 64)])
    for n, k in sizes:
        torch.manual_seed(0)
        layer = lutra.nn.TopKSAE(d, n, k, sparse=True)
        for tokens in (1, 64) if quick or n == 10**6 else (1, 64, 512):
            x = torch.randn(tokens, d)

            def dense(x, layer=layer, k=k):
                centred = x - layer.decoder_bias
                return torch.topk(torch.relu(torch.addmm(layer.bias, centred, layer.weight.T)), k)

            def decode(values, ids, layer=layer):
                out = torch.nn.functional.embedding_bag(
                    ids, layer.decoder, per_sample_weights=values, mode="sum"
                )
                return out + layer.decoder_bias

            def step(function, layer=layer):
                layer.zero_grad()
                function().square().sum().backward()

            about = {"tokens": tokens, "n": n, "k": k}
            with torch.no_grad():
                for mode in ("evaluation", "training"):
                    layer.train(mode == "training")
                    codes, want = layer.encode(x), dense(x)
                    assert torch.allclose(codes.values, want.values, rtol=1e-3, atol=1e-4)
                    if mode == "evaluation":  # enough inputs for the codes that it keeps
                        layer.encode(x.repeat(128, 1))
                    yield turns(
                        {"what": f"encode, {mode}", **about},
                        lambda layer=layer, x=x: layer.encode(x),
                        lambda dense=dense, x=x: dense(x),
                        quick,
                    )
                yield turns(
                    {"what": "decode", **about},
                    lambda layer=layer, codes=codes: layer.decode(codes),
                    lambda decode=decode, codes=codes: decode(*codes),
                    quick,
                )
            yield turns(
                {"what": "SAE step", **about},
                lambda step=step, layer=layer, x=x: step(lambda: layer(x)[0]),
                lambda step=step, dense=dense, decode=decode, x=x: step(lambda: decode(*dense(x))),
                quick,
            )
