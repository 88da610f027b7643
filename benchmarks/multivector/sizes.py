"""Smaller documents: residual codes of tokens, tokens pooled and tokens left out, all ranked by MaxSim.

Columns are those of `quality`; ``error`` is the mean squared error of the tokens, of norm 1, that codes
stand for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

import lutra
from lutra.index import pool_tokens, prune_tokens
from lutra.quant import ResidualQuantizer

from . import quality
from .quality import Bench, K


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    b = Bench(quick)

    def ranked(what: str, tokens: Any, ptr: np.ndarray, nbytes: float, **more: Any) -> dict[str, Any]:
        return b.row(what, lambda: lutra.scan.maxsim(b.q, b.qp, tokens, ptr, k=K), nbytes, **more)

    yield ranked("all tokens, float32", b.d, b.dp, b.d.nbytes)
    for bits in (2,) if quick else (1, 2, 4, 8):
        for levels in ("quantiles", "lloyd"):
            quantizer = ResidualQuantizer(b.d.shape[1], bits)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quantizer.train(b.d, levels=levels, progress=False)
            tokens = quantizer.encode(b.d)
            error = np.square(quantizer.decode(tokens) - b.d).sum(1).mean()
            size = quantizer.code_size * len(b.d) + quantizer.centroids.nbytes  # type: ignore[union-attr]
            yield ranked(f"{bits} bits, {levels}", tokens, b.dp, size, error=float(error))
    for factor in (2,) if quick else (2, 3, 4, 6):
        for normalize in (True, False):
            tokens, ptr = pool_tokens(b.d, b.dp, factor, normalize=normalize, progress=False)
            what = f"pooled by {factor}" + ("" if normalize else ", plain means")
            yield ranked(what, tokens, ptr, tokens.nbytes)
        for by in ("similarity", "first"):
            tokens, ptr = prune_tokens(b.d, b.dp, 1 / factor, by, progress=False)
            yield ranked(f"1/{factor} of the tokens, {by}", tokens, ptr, tokens.nbytes)


def expect(found: list[dict[str, Any]]) -> None:
    """Values of least error err less than quantiles; pooling keeps more than leaving out."""
    by = {row["what"]: row for row in found}
    assert by["all tokens, float32"]["recall"] == 1.0
    assert by["2 bits, lloyd"]["error"] < 0.8 * by["2 bits, quantiles"]["error"]
    assert by["pooled by 2"]["recall"] > by["1/2 of the tokens, first"]["recall"]


def line(row: dict[str, Any]) -> str:
    error = f", error {row['error']:.4f}" if "error" in row else ""
    return quality.line(row) + error
