"""README's examples run as written, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_examples(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    # what the text beside them says
    assert names["sentences"].shape == (2, 64)
    assert names["codes"].shape == (100_000, 16)
    assert len(names["index"]) == 100_000 and names["found"].shape == (5, 10)
    np.testing.assert_array_equal(np.asarray(names["found"])[:, 0], np.arange(5))  # each vector finds itself
    assert (names["even"].ids % 2 == 0).all() and (names["exact"].screen, len(names["pairs"]) > 0) == (
        "int8",
        True,
    )
    assert names["best"].ids[0, 0] == 7 and names["chamfer"].shape == (1, 500)
    assert names["chamfer"].argmax() == 0
    assert names["layer"].tables.grad is not None
    assert names["bag"].weight.grad.is_sparse
    assert names["model"](torch.tensor([1, 2])).shape == (2, 1024)
    assert names["sums"].shape == (8, 256)
    assert names["ids"].shape == (2, 10)
    assert isinstance(names["lm"]["embed"], torch.nn.Embedding)
    assert names["lm"]["embed"].nbytes <= 0.125 * 50_000 * 128 * 4
