"""Linear layers converted to memory layers: how much of the output's squared error remains.

Inputs: normal values, the rows of a real embedding table (MiniLM's tokens) and real sentence embeddings
(Debian descriptions), through a random map and through the least-squares map from descriptions to their
summaries. Without real data only the first is run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from real_data import data_folder

import lutra.nn


def linear(weight):
    """A Linear layer of these weights."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def cases(quick: bool):
    """(name, linear layer, inputs)."""
    generator = torch.Generator().manual_seed(0)
    width, rows = (32, 1500) if quick else (384, 8288)
    weight = torch.randn(width, width, generator=generator) / width**0.5
    yield "normal values, random map", linear(weight), torch.randn(rows, width, generator=generator)
    folder = None if quick else data_folder()
    if folder is None:
        return
    table = torch.from_numpy(np.load(folder / "minilm_token_table_30522x384_f16.npy")).float()
    yield "token table, random map", linear(weight), table[torch.randperm(30522, generator=generator)[:20000]]
    docs = torch.from_numpy(np.load(folder / "debian_docs_f16.npy")).float()
    queries = torch.from_numpy(np.load(folder / "debian_queries_f16.npy")).float()
    fitted = torch.linalg.solve(docs.t() @ docs + torch.eye(384), docs.t() @ queries).t()
    yield "descriptions, random map", linear(weight), docs
    yield "descriptions, map to summaries", linear(fitted), docs


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Errors of conversions, relative and squared, held back and seen; seconds of the process."""
    for name, layer, x in cases(quick):
        tables = layer.in_features // 8
        for method in ("rotation", "tree"):
            for count in (tables, 2 * tables):
                begin = time.process_time()
                report = lutra.nn.MemoryLinear.from_linear(
                    layer, x, method, num_tables=count
                ).conversion_error
                yield {
                    "inputs": name, "method": method, "tables": count, **report,
                    "seconds": time.process_time() - begin,
                }  # fmt: skip


def expect(found: list[dict[str, Any]]) -> None:
    """More tables leave less."""
    assert len(found) == 4
    for few, many in (found[:2], found[2:]):
        assert many["held_back"] < few["held_back"] < 0.6


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['inputs']} | {row['method']} | {row['tables']} | {row['held_back']:.1%} | "
        f"{row['calibration']:.1%} | {row['seconds']:.0f} |"
    )
