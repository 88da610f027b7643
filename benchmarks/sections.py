"""Benchmarks in sections: ``rows(quick)`` and ``line(row)``, or ``lines(quick)`` of text; ``expect(rows)``
asserts what quick rows must show, ``plot(folder)`` draws.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import lutra


def rows_of(section: Any, quick: bool) -> Iterator[dict[str, Any]]:
    """The rows of a section; lines of text as rows."""
    if hasattr(section, "rows"):
        yield from section.rows(quick)
    else:
        yield from ({"line": line} for line in section.lines(quick))


def check_quick(section: Any) -> None:
    """A test: the quick form, in which results are compared, and what it must show."""
    torch.manual_seed(0)
    found = list(rows_of(section, True))
    assert found
    for row in found:
        assert all(v >= 0 for v in row.values() if isinstance(v, float)), row
    if hasattr(section, "expect"):
        section.expect(found)


def run(sections: dict[str, Any], about: str) -> None:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=about.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=sections, metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", type=Path, help="add to this file (sections measured anew are replaced)")
    parser.add_argument("--plots", type=Path, help="a folder for the sections' pictures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lutra.set_num_threads(options.threads)
    torch.manual_seed(0)
    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name, section in sections.items():
        if options.only and name not in options.only:
            continue
        print(f"== {name}")
        kept = []
        for row in rows_of(section, options.quick):
            kept.append(row)
            print(row["line"] if "line" in row else section.line(row), flush=True)
            if options.json:  # after each row: a run that is cut off leaves what it measured
                machine = {
                    "machine": platform.processor() or platform.machine(), "simd": lutra.simd_level(),
                    "threads": options.threads, "date": time.strftime("%Y-%m-%d"), "quick": options.quick,
                }  # fmt: skip
                text = json.dumps({**before, "about": machine, name: kept}, indent=1)
                options.json.write_text(text + "\n")
        before[name] = kept
        if options.plots and hasattr(section, "plot"):
            section.plot(options.plots)
