"""Every test in this folder needs a GPU; most run with torch tensors and with CuPy arrays."""

from __future__ import annotations

import os
from pathlib import Path

import gpu_arrays
import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.cuda)
    few = int(os.environ.get("LUTRA_SANITIZE_CASES", "0"))
    if few:  # compute-sanitizer is slow: so many cases of each test, spread over its parameters
        tests = {}
        for item in items:
            if item.get_closest_marker("sanitize"):
                op = item.callspec.params.get("name") if hasattr(item, "callspec") else None
                tests.setdefault((item.path, getattr(item, "originalname", item.name), op), []).append(item)
        chosen = {id(cases[i * len(cases) // few]) for cases in tests.values() for i in range(few)}
        items[:] = [item for item in items if id(item) in chosen]


@pytest.fixture(params=["torch", "cupy"])
def gpu(request):
    """A library that has arrays on the GPU; see gpu_arrays.py."""
    return gpu_arrays.library(request.param)


@pytest.fixture
def gpu_torch():
    return gpu_arrays.library("torch")
