"""What the project's files say about each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from covering import covering

import lutra

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_version():
    """The installed package, its project file and the changelog speak of the same version."""
    version = re.search(r'^version = "(.+)"$', text("pyproject.toml"), re.M)[1]
    assert lutra.__version__ in (version, "0.0.0.dev0")  # the latter: a build in the source tree
    assert re.search(rf"^## \[{re.escape(version)}\]", text("CHANGELOG.md"), re.M)


@pytest.mark.parametrize("end", [r"\.venv/bin/pytest", r'\.venv/bin/lutra demo ".*"'])
def test_readme_has_the_command_that_ci_runs(end):
    commands = re.findall(rf"^python3 -m venv \.venv && .*{end}$", text("README.md"), re.M)
    assert len(commands) == 1
    assert "-c constraints.txt" in commands[0]  # torch must be pinned: a loose one brings CUDA packages
    assert end in text(".ci/run")


def test_pins_of_the_hooks_are_those_of_the_constraints():
    pins = dict(re.findall(r'"([a-z-]+)==([\d.]+)"', text(".pre-commit-config.yaml")))
    constraints = text("constraints.txt")
    assert {"ruff", "clang-format", "mypy"} <= set(pins)
    for name, version in pins.items():
        assert re.search(rf"^{name}=={re.escape(version)}\b", constraints, re.M), name


def test_every_kernel_source_has_its_contract():
    for path in (ROOT / "csrc").glob("*/*.c[cu]"):
        if path.parent.name in ("address", "gather", "scan", "probe"):
            first = next(line for line in path.read_text().splitlines() if line.startswith("#include"))
            header = re.match(r'#include "(.+)"', first)
            assert header and (ROOT / "csrc" / header[1]).is_file(), f"{path.name} starts with {first}"


def test_readme_has_no_open_figures():
    for name in ("README.md", "docs/design.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        assert "TODO" not in text(name), name


def test_what_is_left_where_nothing_is_compiled():
    """Each value of each parameter, not each combination."""
    cases = [{("size", i), ("dtype", j)} for i in range(5) for j in range(3)]
    chosen = [cases[i] for i in covering(cases)]
    assert len(chosen) == 5 and set().union(*chosen) == set().union(*cases)
    assert covering([{("size", i)} for i in range(4)]) == [0, 1, 2, 3]
