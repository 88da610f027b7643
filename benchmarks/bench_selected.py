"""Layers that select: product keys, ProductKeyMemory, PEER and TopKSAE, against torch's own ops.

``python benchmarks/bench_selected.py`` prints all of it (two minutes), ``--only sparse`` a section,
``--quick`` small sizes. ``pytest benchmarks/bench_selected.py`` runs the quick form, whose results are
compared and asserted.
"""

from __future__ import annotations

import argparse

import pytest
from layers import embeddings, product_keys, sparse
from real_data import data_folder

import lutra

SECTIONS = {"product_keys": product_keys, "sparse": sparse, "embeddings": embeddings}


@pytest.mark.parametrize("name", ["product_keys", "sparse"])
def test_section(name):
    pytest.importorskip("torch")
    for row in SECTIONS[name].rows(True):  # the results are compared in it
        if row["what"] in ("product_keys", "encode, evaluation") and row["tokens"] > 1:
            assert row["ratio"] > 1, row


def test_embeddings():
    pytest.importorskip("torch")
    pytest.importorskip("scipy")  # of the families
    if data_folder() is None:
        pytest.skip("no real data here")
    found = list(embeddings.rows(True))
    assert found[0]["fvu"] < 0.6 and found[0]["rebuilt"] > 0.5 * found[0]["own text in 10"]
    steered = {r["word"]: r["hits"] for r in found if r["what"] == "steer"}
    assert all(h[1.5] > h[None] for h in steered.values()), steered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    lutra.set_num_threads(options.threads)
    for name, section in SECTIONS.items():
        if options.only is None or name in options.only:
            print(f"== {name} ({options.threads} threads, {lutra.simd_level()})")
            for row in section.rows(options.quick):
                print(section.line(row), flush=True)


if __name__ == "__main__":
    main()
