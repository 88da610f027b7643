"""The lookup layers: their speed against the dense layers they replace and against torch's operations, and
what they are good for.

``python benchmarks/bench_layers.py`` runs all sections on one thread (hours: ``twins`` trains language
models), ``--threads 2`` on two, ``--only memory_linear`` some, ``--quick`` small sizes; ``--json FILE`` keeps
the rows, ``--plots FOLDER`` draws. Results are compared with the composition in torch before they are timed;
the ways take turns; times are medians in milliseconds, of the process's time on one thread and of wall clock
on more.

``pytest benchmarks/bench_layers.py`` runs the quick form. A section is a file in ``layers/``: ``rows(quick)``
and ``line(row)``, or ``lines(quick)`` of text; ``expect(rows)`` asserts what quick rows must show.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from layers import (
    converted,
    embeddings,
    ffn_triggers,
    memory_attention,
    memory_linear,
    ngrams,
    product_keys,
    sent2vec,
    sparse,
    store,
    twins,
)
from real_data import data_folder

import lutra

SECTIONS = {
    "memory_linear": memory_linear,
    "converted": converted,
    "product_keys": product_keys,
    "sparse": sparse,
    "embeddings": embeddings,
    "memory_attention": memory_attention,
    "ffn_triggers": ffn_triggers,
    "ngrams": ngrams,
    "store": store,
    "sent2vec": sent2vec,
    "twins": twins,
}
NEEDS = {"embeddings": ["scipy"], "twins": ["matplotlib"]}


def rows_of(section: Any, quick: bool) -> Iterator[dict[str, Any]]:
    """The rows of a section; lines of text as rows."""
    if hasattr(section, "rows"):
        yield from section.rows(quick)
    else:
        yield from ({"line": line} for line in section.lines(quick))


@pytest.mark.parametrize("name", SECTIONS)
def test_quick(name):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    if name == "embeddings" and data_folder() is None:
        pytest.skip("no real data here")
    torch.manual_seed(0)
    section = SECTIONS[name]
    found = list(rows_of(section, True))  # results are compared in it
    assert found
    for row in found:
        assert all(v >= 0 for v in row.values() if isinstance(v, float)), row
    if hasattr(section, "expect"):
        section.expect(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", type=Path, help="add to this file (sections measured anew are replaced)")
    parser.add_argument("--plots", type=Path, help="a folder for the sections' pictures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lutra.set_num_threads(options.threads)
    torch.manual_seed(0)
    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name, section in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        print(f"== {name}")
        kept = []
        for row in rows_of(section, options.quick):
            kept.append(row)
            print(row["line"] if "line" in row else section.line(row), flush=True)
            if options.json:  # after each row: a run that is cut off leaves what it measured
                about = {
                    "machine": platform.processor() or platform.machine(), "simd": lutra.simd_level(),
                    "threads": options.threads, "date": time.strftime("%Y-%m-%d"), "quick": options.quick,
                }  # fmt: skip
                text = json.dumps({**before, "about": about, name: kept}, indent=1)
                options.json.write_text(text + "\n")
        before[name] = kept
        if options.plots and hasattr(section, "plot"):
            section.plot(options.plots)


if __name__ == "__main__":
    main()
