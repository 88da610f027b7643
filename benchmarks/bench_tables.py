"""Compressed tables: what each format keeps, how fast it is, and how a model trains with it.

``python benchmarks/bench_tables.py`` runs everything (about three quarters of an hour on two cores), ``--only
quality`` a section, ``--quick`` all of it on small tables, ``--formats pq int4`` some formats (of ``--only
methods``: some methods). ``--json FILE`` keeps the rows in the place of those it held of the same formats and
sections, ``--plot FOLDER`` draws size against error (with ``--only`` and nothing after it: of the rows in
``FILE``).

``pytest benchmarks/bench_tables.py`` runs the quick form, whose figures are asserted, and the cases of
`lutra.bench.cases_tables`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import time
from pathlib import Path

import pytest
from real_data import data_folder
from tables import quality, recipes, speed, training

import lutra


def sections(quick: bool, names: list[str] | None):
    folder = data_folder()
    table = functools.cache(lambda: quality.real_table(folder, quick))  # not read where it is not needed
    return {
        "quality": (lambda: quality.rows(table(), names), quality.line),
        "known": (lambda: quality.known_points(table()), quality.line),
        "speed": (lambda: speed.rows(quick, names), speed.line),
        "training": (lambda: training.rows(folder, quick, names), training.line),
        "methods": (lambda: recipes.rows(folder, quick, names), training.line),
    }


# ---------------------------------------------------------------- the quick form, asserted
CODES = ["int8", "int4", "pq", "low_rank"]


def test_case(case, run_case):
    run_case(case)


def test_quality():
    table = quality.real_table(data_folder(), True)
    found = list(quality.rows(table, CODES, (0.5, 0.125)))
    errors = {(r["format"], r["budget"]): r["error"] for r in found}
    for (name, share), error in errors.items():
        assert error < 1, (name, share)
        if share == 0.125 and (name, 0.5) in errors:
            assert errors[name, 0.5] <= error + 1e-6, name
    assert errors["int8", 0.5] < 1e-3


def test_known_points():
    table = quality.real_table(data_folder(), True)
    points = list(quality.known_points(table))
    for ours, peer in itertools.pairwise(points):
        if peer["format"].startswith(("FAISS", "NumPy")):
            assert ours["error"] <= 1.03 * peer["error"] + 1e-6, (ours, peer)


def test_speed():
    pytest.importorskip("torch")
    for row in speed.rows(True, CODES):  # the results are compared in it
        assert row["forward"] > 0


def test_training():
    pytest.importorskip("torch")
    found = {r["format"]: r for r in training.rows(data_folder(), True, ["int8", "low_rank"])}
    dense, nothing = found["dense"]["scratch"], found["dense layers alone"]["scratch"]
    assert dense < nothing - 0.3
    for name in ("int8", "low_rank"):
        assert found.get(name) is None or found[name]["tuned"] < nothing - 0.5 * (nothing - dense), name


# ---------------------------------------------------------------- all of it
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=["quality", "known", "speed", "training", "methods"])
    parser.add_argument("--formats", nargs="+", help="some formats")
    parser.add_argument("--quick", action="store_true", help="small tables")
    parser.add_argument("--json", type=Path, help="add to this file (sections measured anew are replaced)")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write tables_quality.svg there")
    options = parser.parse_args()
    kept = {}
    for name, (rows, line) in sections(options.quick, options.formats).items():
        if options.only is not None and name not in options.only:
            continue
        print(f"== {name}")
        kept[name] = []
        for row in rows():
            kept[name].append(row)
            print(line(row), flush=True)
    before = {}
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text())
    if options.json and kept:
        if options.formats:
            kept = {name: merged(before.get(name, []), rows) for name, rows in kept.items()}
        about = {
            "machine": platform.processor() or platform.machine(), "simd": lutra.simd_level(),
            "threads": lutra.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "quick": options.quick,
        }  # fmt: skip
        if "note" in before.get("about", {}):
            about["note"] = before["about"]["note"]
        options.json.write_text(json.dumps({**before, "about": about, **kept}, indent=1) + "\n")
    table = kept.get("quality") or before.get("quality")
    if options.plot and table:
        quality.plot(table, options.plot / "tables_quality.svg")


def merged(before: list[dict], rows: list[dict]) -> list[dict]:
    """Rows measured before, but of the formats that were measured anew."""
    anew = {row["format"] for row in rows}
    return [row for row in before if row["format"] not in anew] + rows


if __name__ == "__main__":
    main()
