"""The command line: what the commands print, and what is said where an extra is missing."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import lutra
from lutra import _backend
from lutra.cli.app import app

runner = CliRunner()


def lutra_command(*arguments, **environment):
    """``python -m lutra`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lutra", *arguments],
        env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---------------------------------------------------------------- the skeleton
def test_help_names_the_commands():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("info", "demo", "bench", "compress", "index", "search"):
        assert command in result.output


def test_unknown_commands_fail():
    assert runner.invoke(app, ["dream"]).exit_code != 0


def test_a_missing_extra_is_named():
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'typer' else find(name, *a)\n"
        "import lutra.cli\nlutra.cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "typer" in result.stderr
    assert "pip install 'lutra[cli]'" in result.stderr


# ---------------------------------------------------------------- info
def test_info_as_a_table():
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    for word in (
        lutra.__version__,
        "backend cpu",
        "backend cuda",
        "reference",
        "SIMD level",
        "threads",
        "numpy",
    ):
        assert word in result.output
    assert lutra.simd_level() in result.output


def test_info_as_json():
    result = runner.invoke(app, ["info", "--json"])
    facts = json.loads(result.output)
    assert facts["lutra"] == lutra.__version__
    assert facts["threads"] == lutra.get_num_threads()
    assert facts["simd"]["level"] == lutra.simd_level()
    assert facts["backends"]["cpu"]["available"] == (_backend.core is not None)
    cuda = facts["backends"]["cuda"]
    assert cuda["available"] == bool(facts["gpus"]) == _backend.cuda_status()[0]
    assert cuda["available"] or cuda["reason"]
    assert facts["libraries"]["numpy"]


def test_info_says_why_a_backend_is_missing():
    result = lutra_command("info", "--json", LUTRA_BACKEND="reference")
    facts = json.loads(result.stdout)
    assert facts["backends"]["cpu"] == {"available": False, "reason": "LUTRA_BACKEND=reference"}
    assert facts["simd"] == {"level": "none", "best": None}
    assert "LUTRA_BACKEND=reference" in lutra_command("info", LUTRA_BACKEND="reference").stdout


def test_info_imports_nothing_heavy():
    code = (
        "import sys\nfrom lutra.cli import info\ninfo.show()\n"
        "heavy = {'torch', 'cupy', 'faiss'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
