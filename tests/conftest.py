"""Fixtures that the tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import emulation
import pytest
from covering import covering

if emulation.folder():  # before torch and lutra are imported
    emulation.start()

from lutra import _backend

LEVELS = ("portable", "avx2", "avx512")


def levels() -> tuple[str, ...]:
    """The SIMD levels that this machine runs; ``('none',)`` where there is no CPU module."""
    if _backend.core is None:
        return ("none",)
    return LEVELS[: LEVELS.index(_backend.core.best_simd_level()) + 1]


@pytest.fixture(autouse=True)
def seeded():
    """torch's default generator starts every test alike: no test depends on which ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(params=levels())
def simd_level(request):
    """Runs a test at every SIMD level of this machine."""
    if _backend.core is None:
        yield request.param
        return
    before = _backend.core.simd_level()
    _backend.core.set_simd_level(request.param)
    yield request.param
    _backend.core.set_simd_level(before)


@pytest.fixture(params=(True, False), ids=("features", "plain"))
def features(request):
    """With and without the instructions beyond a SIMD level (AVX-512 VNNI, VBMI, BF16)."""
    if _backend.core is None:
        if not request.param:
            pytest.skip("no compiled module")
        yield request.param
        return
    _backend.core.use_features(request.param)
    yield request.param
    _backend.core.use_features(True)


@pytest.fixture(params=(1, 2, 3))
def threads(request):
    """Runs a test with several numbers of threads."""
    if _backend.core is None and request.param > 1:
        pytest.skip("the reference runs on one thread")
    if _backend.core is not None:
        _backend.core.set_num_threads(request.param)
    yield request.param
    if _backend.core is not None:
        _backend.core.set_num_threads(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, LUTRA_DATA or shared/data beside the checkout; skips where there is none."""
    if _backend.core is None:
        pytest.skip("real data takes the NumPy reference too long")
    places = [os.environ.get("LUTRA_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    for place in places:
        if place and Path(place, "README.md").is_file():
            return Path(place)
    pytest.skip("no real data here: neither LUTRA_DATA nor ../shared/data")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption(
        "--product",
        action="store_true",
        help="run all combinations of parameters where nothing is compiled too, not each value once",
    )


def pytest_collection_modifyitems(config, items):
    if _backend.core is None and not config.getoption("--product"):
        each_value_once(config, items)
    runs, reason = _backend.cuda_status()
    no_cuda = pytest.mark.skip(reason=f"needs CUDA: {reason}")
    not_now = pytest.mark.skip(reason="slow: only with --slow")
    slow = config.getoption("--slow")
    for item in items:
        if not runs and item.get_closest_marker("cuda"):  # keywords hold the folders' names too
            item.add_marker(no_cuda)
        if not slow and item.get_closest_marker("slow"):
            item.add_marker(not_now)


def each_value_once(config, items):
    """Without a kernel a combination of size, dtype and mode has no code of its own: deselect cases, but let
    each parameter of each test keep each of its values. Of a test marked ``traces``, leave one case."""
    groups: dict = {}
    for item in items:
        if hasattr(item, "callspec"):
            groups.setdefault((item.path, item.cls, item.originalname), []).append(item)
    dropped = set()
    for group in groups.values():
        kept = [0]
        if not group[0].get_closest_marker("traces"):
            kept = covering([{(k, _value(v)) for k, v in item.callspec.params.items()} for item in group])
        dropped.update(set(group).difference(group[i] for i in kept))
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def _value(value):
    """What tells a parameter's values apart: themselves where they are plain, else which objects they are."""
    plain = isinstance(value, (str, int, float, tuple, type(None)))
    return (type(value), repr(value)) if plain else id(value)
