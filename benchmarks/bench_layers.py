"""Lookup layers against the dense layers that they replace, and against torch's operations.

``python benchmarks/bench_layers.py`` runs all sections on one thread, ``--threads 2`` on two, ``--only
memory_linear`` a section, ``--quick`` small sizes; ``--json FILE`` keeps the rows. Every result is compared
with the composition in torch before it is timed; the ways take turns; times are medians in milliseconds, of
the process's time on one thread and of wall clock on more.

``pytest benchmarks/bench_layers.py`` runs the quick form. A section is a file in ``layers/``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
from layers import ffn_triggers, memory_attention, memory_linear

import lutra

SECTIONS = {
    "memory_linear": memory_linear,
    "memory_attention": memory_attention,
    "ffn_triggers": ffn_triggers,
}


@pytest.mark.parametrize("name", SECTIONS)
def test_quick(name):
    torch.manual_seed(0)
    for row in SECTIONS[name].rows(True):  # results are compared in it
        assert all(v > 0 for v in row.values() if isinstance(v, float)), row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", type=Path, help="add to this file (sections measured anew are replaced)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name, section in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        print(f"== {name}")
        kept = []
        for row in section.rows(options.quick):
            kept.append(row)
            print(section.line(row), flush=True)
            if options.json:  # after each row: a run that is cut off leaves what it measured
                about = {
                    "machine": platform.processor() or platform.machine(), "simd": lutra.simd_level(),
                    "threads": options.threads, "date": time.strftime("%Y-%m-%d"), "quick": options.quick,
                }  # fmt: skip
                text = json.dumps({**before, "about": about, name: kept}, indent=1)
                options.json.write_text(text + "\n")
        before[name] = kept


if __name__ == "__main__":
    main()
