"""What the emulator says of data races in kernels (csrc/emulate/races.h), where there are some and where not.

The module that `tests/cuda` run with is too large for this; tests/race_cases.cu has the kernels and a main().
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
FINE = {
    "neighbours warp", "neighbours block", "rounds", "blocks_meet atomic", "bytes apart",
    "all_write the same", "copies", "producer", "named", "tile",
}  # fmt: skip
RACES = {
    "neighbours nothing": "a race in shared memory",
    "neighbours shuffle": "a race in shared memory",
    "other_warp": "a race in shared memory",
    "rounds without": "a race in shared memory",
    "blocks_meet plain": "a race in global memory",
    "bytes the same": "of another block",
    "all_write their own": "a race in shared memory",
    "copies without": "a race in shared memory",
    "producer without": "a race in shared memory",
    "tile without": "no fence_async in shared memory",
    "behind": "an access behind the shared memory",
}

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("g++") or not SOURCES.is_dir(),
    reason="the emulator needs an x86-64 machine, g++ and the sources",
)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What was printed of each case."""
    folder = tmp_path_factory.mktemp("races")
    common = [
        "g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-march=x86-64-v3", "-Wno-unknown-pragmas",
        "-fPIC", "-DLUTRA_EMULATE=1", "-DLUTRA_EMULATE_RACES=1", f"-I{SOURCES / 'emulate'}", f"-I{SOURCES}",
    ]  # fmt: skip
    cases = ["-xc++", "-fsanitize=thread", "-g1", HERE / "race_cases.cu"]
    for name, source in (
        ("cases", cases),
        *((s, [SOURCES / "emulate" / f"{s}.cc"]) for s in ("machine", "races")),
    ):
        subprocess.run([*common, "-c", *source, "-o", folder / f"{name}.o"], check=True)
    objects = [folder / f"{name}.o" for name in ("cases", "machine", "races")]
    subprocess.run(["g++", *objects, "-ldl", "-o", folder / "cases"], check=True)
    printed = subprocess.run([folder / "cases"], check=True, capture_output=True, text=True).stdout
    return dict(line.split("\t") for line in printed.splitlines())


def test_all_cases_ran(said):
    assert set(said) == FINE | set(RACES)


@pytest.mark.parametrize("case", sorted(FINE))
def test_nothing_is_said_of_what_is_right(said, case):
    assert said[case] == "nothing"


@pytest.mark.parametrize("case", RACES)
def test_races_are_named_with_their_lines(said, case):
    assert RACES[case] in said[case]
    if shutil.which("addr2line"):
        assert "race_cases.cu:" in said[case]
