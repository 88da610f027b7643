"""The package without its compiled modules: it is built without a compiler, and every op runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Every public op on small arrays; prints what came out, to be compared between the backends.
PROGRAM = """
import numpy as np
import lutra
from lutra import address, gather, index, scan

rng = np.random.default_rng(0)
x, c = rng.standard_normal((33, 24), dtype=np.float32), rng.standard_normal((7, 24), dtype=np.float32)
table, ids = rng.standard_normal((50, 5), dtype=np.float32), rng.integers(0, 50, (9, 4))

def show(name, *arrays):
    for a in arrays:
        a = np.asarray(a)
        print(name, a.shape, a.dtype, np.round(a.astype(np.float64), 3).ravel().tolist())

show("sign_hash", *address.sign_hash(x))
show("nearest", *address.nearest(x, c, 2))
show("ngrams", *address.ngrams(["one two, two three", "", "four"], char_ngrams=(3, 4)))
show("token_ngrams", *address.token_ngrams(ids, order=3, buckets=1000))
show("product_keys", *address.product_keys(x, c[:6].reshape(2, 3, 24)[..., :12].copy(), 3))
for mode in ("sum", "mean", "max"):
    show("bag", gather.bag(table, ids, mode=mode))
rows = gather.quantize_rows(table)
show("quantize_rows", *rows)
show("bag uint8", gather.bag(rows.codes, ids, scale=rows.scale, minimum=rows.minimum))
show("bag_grad", gather.bag_grad(np.ones((9, 5), np.float32), ids, rows=50))
tables, codes = rng.standard_normal((3, 16, 5), dtype=np.float32), rng.integers(0, 16, (4, 3), dtype=np.int32)
show("tables", gather.tables(tables, codes))
for metric in ("ip", "l2", "cosine"):
    show("knn", *scan.knn(c, x, 5, metric))
    show("rescore", *scan.rescore(c, x, np.arange(35).reshape(7, 5) % 33, 3, metric))
books, small = rng.standard_normal((3, 16, 8), dtype=np.float32), rng.integers(0, 16, (33, 3), dtype=np.uint8)
show("pq", *scan.pq(c, small, books, 5))
flat = index.Flat(24, "l2")
flat.add(x)
show("Flat", *flat.search(c, 4))
"""


def output(**environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LUTRA_")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_every_op_gives_the_same_on_the_reference():
    reference, default = output(LUTRA_BACKEND="reference"), output()
    assert len(reference) == len(default) > 25
    for a, b in zip(reference, default):
        head_a, values_a = a.split(" [", 1)
        head_b, values_b = b.split(" [", 1)
        assert head_a == head_b
        numbers = [[float(v) for v in values.rstrip("]").split(", ") if v] for values in (values_a, values_b)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-3), head_a


@pytest.mark.slow
def test_pure_wheel_is_built_without_a_compiler(tmp_path):
    """LUTRA_PURE_PYTHON=1: a wheel for every platform, with no compiled module; a compiler would fail."""
    environment = {**os.environ, "LUTRA_PURE_PYTHON": "1", "CC": "/bin/false", "CXX": "/bin/false"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lutra/py.typed" in names and "lutra/reference/scan.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc"))]
