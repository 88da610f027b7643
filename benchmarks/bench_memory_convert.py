"""Linear layers converted to memory layers: how much of the output's squared error remains.

``python benchmarks/bench_memory_convert.py`` prints the table of docs/memoryformer.md (some minutes on one
core); ``--quick`` a small case. Inputs: normal values, the rows of a real embedding table (MiniLM's tokens)
and real sentence embeddings (Debian descriptions), through a random map and through the least-squares map
from descriptions to their summaries. Without real data only the first is run.

``pytest benchmarks/bench_memory_convert.py`` checks the quick form.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from real_data import data_folder  # noqa: E402

import lutra.nn  # noqa: E402


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


def errors(quick: bool):
    """Rows (case, method, tables, held-back error, calibration error, seconds)."""
    for name, layer, x in cases(quick):
        tables = layer.in_features // 8
        for method in ("rotation", "tree"):
            for count in (tables, 2 * tables):
                begin = time.process_time()
                made = lutra.nn.MemoryLinear.from_linear(layer, x, method, num_tables=count)
                report = made.conversion_error
                seconds = time.process_time() - begin
                yield name, method, count, report["held_back"], report["calibration"], seconds


def test_more_tables_leave_less():
    found = list(errors(quick=True))
    assert len(found) == 4
    for few, many in (found[:2], found[2:]):
        assert many[3] < few[3] < 0.6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    print("| inputs | method | tables | error held back | calibration | s |\n|---|---|---|---|---|---|")
    for name, method, count, held, seen, seconds in errors(parser.parse_args().quick):
        print(f"| {name} | {method} | {count} | {held:.1%} | {seen:.1%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
