"""``lutra demo``: the texts, their vectors, and the answers."""

import io
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from lutra.cli import demo, stdlib_texts
from lutra.cli.embedding import Fields, HashedText, split_identifier
from lutra.cli.stdlib_texts import Text

CORPUS = [
    Text("zoo", "module", "Animals and where they live.\n\nOtters, badgers, weasels."),
    Text("zoo.Otter", "class", "An otter, which swims in rivers and eats fish."),
    Text("zoo.Otter.feed", "method", "Give the otter a fish."),
    Text("zoo.Badger", "class", "A badger, which digs."),
    Text("bank", "module", "Accounts and transfers of money."),
    Text("bank.transfer_money", "function", "Move an amount from one account to another."),
    Text("bank.Account.close", "method", "Close the account for good."),
    Text("sky", "module", "The weather, hour by hour."),
    Text("sky.forecast", "function", "Predict rain and sunshine for the next days."),
]


@pytest.fixture(scope="module")
def collection():
    return demo.build(CORPUS, lambda description, total: lambda n: None, dim=256)


# ---------------------------------------------------------------- texts
def test_identifiers_are_split():
    assert split_identifier("json.JSONDecoder.raw_decode") == "json JSON Decoder raw decode"
    assert split_identifier("argparse.ArgumentParser") == "argparse Argument Parser"
    assert split_identifier("_x.__y__.bz2") == " x y bz2"


def test_modules_of_every_kind_are_read():
    for name, titles in {
        "textwrap": {
            "textwrap": "module",
            "textwrap.TextWrapper.wrap": "method",
            "textwrap.fill": "function",
        },
        "json": {"json": "module", "json.decoder.JSONDecoder": "class"},  # a package
        "math": {"math": "module", "math.gcd": "function"},  # written in C
        "csv": {"csv.field_size_limit": "function", "csv.Sniffer": "class"},  # half of it in C
        "os": {"os.walk": "function", "os.mkdir": "function"},
    }.items():
        found = {text.title: text.kind for text in stdlib_texts.read_module(name)}
        for title, kind in titles.items():
            assert found.get(title) == kind, title
        assert len(found) == len(stdlib_texts.read_module(name))


def test_nothing_private_or_of_tests_is_read():
    names = stdlib_texts.modules()
    assert not {"idlelib", "lib2to3", "this", "_thread", "posix"} & set(names)
    for name in ("unittest", "collections", "ctypes", "json"):
        for text in stdlib_texts.read_module(name):
            assert not any(part.startswith("_") for part in text.title.split(".")), text.title
            assert ".tests." not in text.title and ".test." not in text.title
            assert text.doc == text.doc.strip() != ""


def test_sources_are_parsed_not_run(tmp_path, monkeypatch):
    (tmp_path / "sound.py").write_text(
        textwrap.dedent('''
        """A module."""
        raise SystemExit("this must not run")
        if True:
            def inside():
                """Behind a condition."""
        class A:
            """A class."""
            async def b(self):
                """A method."""
            def _c(self):
                """Private."""
        def undocumented(): pass
        ''')
    )
    (tmp_path / "broken.py").write_text("def (:")
    monkeypatch.setattr(stdlib_texts.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [text[:2] for text in stdlib_texts.read_module("sound")] == [
        ("sound", "module"), ("sound.inside", "function"), ("sound.A", "class"), ("sound.A.b", "method"),
    ]  # fmt: skip
    assert stdlib_texts.read_module("broken") == []
    assert stdlib_texts.read_module("no_such_module") == []


# ---------------------------------------------------------------- vectors
def test_inner_products_are_those_of_the_bags():
    encoder = HashedText(4096)
    bags = encoder.fit(demo.as_fields(CORPUS))
    questions = encoder.questions(["feed an otter", "money transfer", "rain"])
    dense = np.zeros((2, 9, len(encoder.table)), np.float32)
    for out, part in zip(dense, (bags, questions)):
        rows = np.repeat(np.arange(len(part.offsets) - 1), np.diff(part.offsets))
        np.add.at(out, (rows, part.ids), part.weights)
    exact = dense[1, :3] @ dense[0].T
    got = encoder.embed(questions) @ encoder.embed(bags).T
    norms = np.linalg.norm(dense[1, :3], axis=1)[:, None] * np.linalg.norm(dense[0], axis=1)
    assert np.abs(got - exact).max() <= (6 / np.sqrt(4096) * norms).max()
    assert exact[0].argmax() == got[0].argmax() == 2


def test_rare_features_weigh_more():
    encoder = HashedText(64)
    encoder.fit(demo.as_fields(CORPUS))
    rare, common = (encoder.questions([word]).weights.max() for word in ("forecast", "the"))
    assert rare > common > 0
    assert not encoder.questions(["xylophone"]).weights[:1].any()


def test_importance_scales_a_text():
    encoder = HashedText(64)
    fields = [Fields("a", "one", "", ""), Fields("b", "two", "", "")]
    plain, doubled = encoder.fit(fields), encoder.fit(fields, [1.0, 2.0])
    np.testing.assert_allclose(encoder.embed(doubled), encoder.embed(plain) * [[1], [2]], rtol=1e-6)


# ---------------------------------------------------------------- answers
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "question, module, title",
    [
        ("feed the otter", "zoo", "zoo.Otter.feed"),
        ("transferring money", "bank", "bank.transfer_money"),
        ("will there be rain", "sky", "sky.forecast"),
    ],
)
def test_questions(collection, question, module, title, compressed):
    hits = demo.ask(collection, question, 3, compressed)
    assert hits[0].module == module
    assert title in [text.title for text in hits[0].texts]
    assert len({hit.module for hit in hits}) == len(hits) <= 3
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_question_that_resembles_nothing(collection):
    assert demo.ask(collection, "0x2B?! 42 %%", 5) == []


def test_measurements(collection):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(demo.measurements(collection, seconds=0.05))
    text = console.export_text()
    for row in ("lutra exact", "lutra PQ", "lutra PQ, refined", "NumPy"):
        assert row in text
    assert re.search(r"NumPy.* 1\.000 ", text)
    assert demo.recall(np.array([[1, 2], [3, 9]]), np.array([[2, 1], [3, 4]])) == 0.75


@pytest.mark.slow
@pytest.mark.parametrize(
    "question, accepted",
    [
        ("parse command line arguments", {"argparse"}),
        ("compress a file", {"gzip", "bz2", "zlib"}),
        ("walk a directory tree", {"os", "pathlib"}),
        ("standard deviation", {"statistics"}),
    ],
)
def test_the_command(question, accepted):
    result = subprocess.run(
        [sys.executable, "-m", "lutra", "demo", question],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^│ +[0-9.]+ │ (\w+)", result.stdout, re.MULTILINE)
    assert accepted & set(rows[:3]), result.stdout
    for word in ("recall@10", "lutra PQ, refined", "NumPy", "docstrings", "in all"):
        assert word in result.stdout


def test_an_empty_question_is_refused():
    with pytest.raises(SystemExit, match="empty"):
        demo.show("  ")
