"""``lutra index`` and ``lutra search``: from files of vectors to results and metrics."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import lutra
from lutra import _backend
from lutra.cli.app import app


def run(*arguments, code=0):
    """What a command prints; it must exit with ``code``."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "140"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def fails(*arguments):
    """The one line that a command fails with."""
    text = run(*arguments, code=1)
    assert text.startswith("lutra: ") and text.count("\n") == 1, text
    return text


@pytest.fixture
def files(tmp_path):
    """40 vectors around 10 places, and a query at each place; the four of place i are relevant to query i."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((10, 16)).astype(np.float32)
    docs = np.repeat(queries, 4, 0) + 0.1 * rng.standard_normal((40, 16)).astype(np.float32)
    np.save(tmp_path / "docs.npy", docs)
    np.save(tmp_path / "queries.npy", queries)
    np.save(tmp_path / "relevant.npy", np.arange(40).reshape(10, 4))
    np.savez(tmp_path / "named.npz", docs=docs, ids=np.arange(40) * 10 + 3)
    (tmp_path / "texts.tsv").write_text("".join(f"name{i}\tabout [{i}]\n" for i in range(40)))
    tokens = np.concatenate([docs, rng.standard_normal((5, 16)).astype(np.float32)])
    ptr = np.array([*range(0, 41, 4), 45])  # ten documents of 4 tokens, one of 5
    np.savez(
        tmp_path / "tokens.npz", doc_tokens=tokens.astype(np.float16), doc_ptr=ptr,
        query_tokens=np.repeat(queries, 2, 0), query_ptr=np.arange(0, 21, 2),
    )  # fmt: skip
    return tmp_path


@pytest.fixture
def index(files):
    run("index", files / "docs.npy", "-o", files / "x.lutra", "--factory", "Flat", "--metric", "l2")
    return files / "x.lutra"


# ---------------------------------------------------------------- building
def test_index_says_what_it_built(files):
    text = run("index", files / "docs.npy", "-o", files / "x.lutra", "--factory", "Flat")
    for part in ("x.lutra", "Flat(d=16, metric='ip', ntotal=40", "40 vectors of 16 dimensions", "KiB"):
        assert part in text
    loaded = lutra.index.load(files / "x.lutra")
    np.testing.assert_array_equal(loaded.reconstruct(np.arange(40)), np.load(files / "docs.npy"))


def test_index_as_json(files):
    facts = json.loads(
        run(
            "index",
            files / "docs.npy",
            "-o",
            files / "x.lutra",
            "--factory",
            "PQ4x2",
            "--metric",
            "l2",
            "--json",
        )
    )
    loaded = lutra.index.load(files / "x.lutra")
    assert facts["index"] == repr(loaded) and loaded.metric == "l2" and type(loaded).__name__ == "Codes"
    assert facts["documents"] == facts["vectors"] == 40 and facts["d"] == 16
    assert facts["nbytes"] == loaded.nbytes and facts["file_bytes"] == (files / "x.lutra").stat().st_size


def test_ids(files):
    run("index", files / "named.npz", "-o", files / "a", "--factory", "Flat")
    np.save(files / "ids.npy", np.arange(40)[::-1])
    run("index", files / "named.npz", "-o", files / "b", "--factory", "Flat", "--ids", files / "ids.npy")
    np.testing.assert_array_equal(lutra.index.load(files / "a").ids, np.arange(40) * 10 + 3)
    np.testing.assert_array_equal(lutra.index.load(files / "b").ids, np.arange(40)[::-1])


@pytest.mark.skipif(_backend.core is None, reason="the NumPy reference takes too long")
def test_chosen_by_measuring(files):
    text = run("index", files / "named.npz", "-o", files / "x.lutra", "--recall", "0.9", "--memory", "100%")
    assert "recall 0.9" in text  # the table of what was tried
    loaded = lutra.index.load(files / "x.lutra")
    assert loaded.nbytes <= 1.02 * 4 * 16 * 40 + 8 * 40
    np.testing.assert_array_equal(loaded.ids, np.arange(40) * 10 + 3)
    out = run("index", files / "docs.npy", "-o", files / "y.lutra", "--json")
    assert json.loads(out)["documents"] == 40


def test_parts_change_nothing(files, monkeypatch):
    from lutra.cli import build, search

    run("index", files / "named.npz", "-o", files / "whole", "--factory", "Flat")
    monkeypatch.setattr(build, "_PART", 64 * 7)
    run("index", files / "named.npz", "-o", files / "parts", "--factory", "Flat")
    assert (files / "whole").read_bytes() == (files / "parts").read_bytes()
    expected = run("search", files / "whole", files / "docs.npy", "--json")
    monkeypatch.setattr(search, "_parts", lambda data: [(i, min(i + 7, 40)) for i in range(0, 40, 7)])
    got = run("search", files / "whole", files / "docs.npy", "--json")
    assert json.loads(got)["ids"] == json.loads(expected)["ids"] and len(json.loads(got)["ids"]) == 40


# ---------------------------------------------------------------- searching
def test_results(files, index):
    exact = lutra.index.load(index).search(np.load(files / "queries.npy"), 3)
    facts = json.loads(run("search", index, files / "queries.npy", "-k", 3, "--json"))
    assert facts["ids"] == exact.ids.tolist() and facts["queries"] == 10 and facts["k"] == 3
    np.testing.assert_allclose(facts["scores"], exact.scores, rtol=1e-6)
    assert "metrics" not in facts
    text = run("search", index, files / "queries.npy", "-k", 3, "-o", files / "out.npz")
    with np.load(files / "out.npz") as out:
        np.testing.assert_array_equal(out["ids"], exact.ids)
        np.testing.assert_array_equal(out["scores"], exact.scores)
    assert "the first 5 of 10 queries" in text and "10 queries, k = 3" in text and "out.npz" in text
    rows = re.findall(r"│ +(\d*) │ +(\d) │ +([\d.]+) │ +(\d+) │", text)
    assert [int(row[3]) for row in rows] == exact.ids[:5].ravel().tolist()


def test_texts(files, index):
    (files / "questions.txt").write_text("".join(f"where is [bold]{i}\n" for i in range(10)))
    text = run(
        "search", index, files / "queries.npy", "-k", 2, "--show", 2, "--texts", files / "texts.tsv",
        "--query-texts", files / "questions.txt",
    )  # fmt: skip
    best = lutra.index.load(index).search(np.load(files / "queries.npy")[:2], 2).ids
    for i in best.ravel():
        assert f"name{i} | about [{i}]" in text
    assert "where is [bold]1" in text and "where is [bold]2" not in text
    (files / "short.txt").write_text("x" * 500)
    text = run("search", index, files / "docs.npy", "-k", 1, "--show", 3, "--texts", files / "short.txt")
    assert "x…" in text and max(map(len, text.splitlines())) <= 140


def test_k_beyond_the_index(files, index):
    facts = json.loads(run("search", index, files / "queries.npy", "-k", 50, "--json"))
    assert facts["ids"][0][40:] == [-1] * 10 and facts["scores"][0][40:] == [None] * 10
    assert run("search", index, files / "queries.npy", "-k", 50, "--show", 1).count("│") == 5 * 40


def test_metrics(files, index):
    text = run("search", index, files / "queries.npy", "-k", 4, "--relevant", files / "relevant.npy")
    for name in ("ndcg@10", "mrr@10", "recall@100", "success@10"):
        assert re.search(rf"│ {name} +│ +1\.0000 │", text), text
    assert "mean of 10 queries" in text and "k = 100" in text
    rows = re.findall(r"│ +(\d*) │ +(\d+) │ +([\d.]+) │ +(\d+) │", text)
    assert max(int(row[1]) for row in rows) == 4  # a metric's k is not the table's
    wanted = ["--metrics", "recall@2, precision@8", "--json"]
    relevant = np.load(files / "relevant.npy")
    for name, write in FORMS.items():
        write(files / name, relevant)
        facts = json.loads(run("search", index, files / "queries.npy", "--relevant", files / name, *wanted))
        assert facts["metrics"] == {"recall@2": 0.5, "precision@8": 0.5}, name


def _ragged(path, a):
    with open(path, "wb") as file:
        np.savez(file, ids=a.ravel(), ptr=np.arange(0, 41, 4))


FORMS = {
    "a.npy": lambda path, a: np.save(path, a),
    "lists.json": lambda path, a: path.write_text(json.dumps(a.tolist())),
    "grades.json": lambda path, a: path.write_text(json.dumps([{str(i): 1 for i in row} for row in a])),
    "ragged.npz": _ragged,
    "one.npz": lambda path, a: np.savez(path, truth=a),
    "qrels.txt": lambda path, a: path.write_text(
        "".join(f"{q} 0 {i} 2\n" for q, row in enumerate(a) for i in row) + "\n3 0 0 0\n"
    ),
}


def test_results_are_relevance_for_another_index(files, index):
    """How much a compressed index finds of what the exact one does."""
    run("search", index, files / "queries.npy", "-k", 5, "-o", files / "exact.npz")
    facts = json.loads(
        run(
            "search",
            index,
            files / "queries.npy",
            "--relevant",
            files / "exact.npz",
            "--metrics",
            "recall@5",
            "--json",
        )
    )
    assert facts["metrics"] == {"recall@5": 1.0}


def test_stores(files):
    with lutra.index.create(files / "store", lutra.index.Flat(16, "l2")) as store:
        store.add(np.load(files / "docs.npy"))
        store.commit()
    facts = json.loads(run("search", files / "store", files / "queries.npy", "-k", 1, "--json"))
    assert [row[0] // 4 for row in facts["ids"]] == list(range(10))


# ---------------------------------------------------------------- many vectors a document
def test_tokens(files):
    text = run("index", files / "tokens.npz", "-o", files / "m.lutra")
    assert "11 documents with 45 vectors of 16 dimensions" in text
    loaded = lutra.index.load(files / "m.lutra")
    assert isinstance(loaded, lutra.index.MultiVector) and loaded.ntotal == 11
    np.save(files / "own.npy", np.arange(10))
    facts = json.loads(
        run(
            "search",
            files / "m.lutra",
            files / "tokens.npz",
            "-k",
            3,
            "--json",
            "--relevant",
            files / "own.npy",
        )
    )
    assert [row[0] for row in facts["ids"]] == list(range(10)) and facts["metrics"]["mrr@10"] == 1
    text = run("search", files / "m.lutra", files / "tokens.npz", "--candidates", 3, "-k", 2, "--show", 10)
    assert text.count("│") == 5 * 20


def test_options_of_tokens(files):
    run(
        "index", files / "tokens.npz", "-o", files / "m.lutra", "--factory", "Flat", "--tokens", "int8",
        "--k-sim", 2, "--repetitions", 3, "--d-proj", 4, "--candidates", 7, "--pool", 2,
    )  # fmt: skip
    loaded = lutra.index.load(files / "m.lutra")
    assert loaded.tokens == "int8" and loaded.candidates == 7 and loaded.ntokens == 2 * 10 + 3
    assert loaded.encoder.dim == 3 * 4 * 4 and type(loaded.index).__name__ == "Flat"


def test_padded_tokens(files):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 5, 16)).astype(np.float32)
    mask = np.arange(5) < rng.integers(1, 6, (6, 1))
    np.savez(files / "padded.npz", embeddings=x, attention_mask=mask.astype(int), ids=np.arange(6) + 100)
    text = run("index", files / "padded.npz", "-o", files / "m.lutra")
    assert f"6 documents with {mask.sum()} vectors" in text
    facts = json.loads(run("search", files / "m.lutra", files / "padded.npz", "-k", 1, "--json"))
    assert facts["ids"] == [[i + 100] for i in range(6)]


def test_kinds_must_fit(files, index):
    assert "single vectors" in fails("search", index, files / "tokens.npz")
    assert "--candidates" in fails("search", index, files / "queries.npy", "--candidates", 5)
    assert "--metric is for single vectors" in fails(
        "index", files / "tokens.npz", "-o", files / "m", "--metric", "l2"
    )
    run("index", files / "tokens.npz", "-o", files / "m.lutra")
    assert "query_tokens" in fails("search", files / "m.lutra", files / "queries.npy")


# ---------------------------------------------------------------- what an .npz file holds
def test_arrays_are_found_and_named(files):
    docs = np.load(files / "docs.npy")
    np.savez(files / "both.npz", doc_vectors=docs, query_vectors=docs[:5, :], doc_ids=np.arange(40) + 7)
    run("index", files / "both.npz", "-o", files / "x", "--factory", "Flat", "--metric", "l2")
    assert lutra.index.load(files / "x").ids[0] == 7
    facts = json.loads(run("search", files / "x", files / "both.npz", "-k", 1, "--json"))
    assert facts["ids"] == [[7 + i] for i in range(5)]
    np.savez(files / "many.npz", a=docs, b=docs[:7])
    text = fails("index", files / "many.npz", "-o", files / "x", "--factory", "Flat")
    assert "--array" in text and "b (7, 16)" in text
    run("index", files / "many.npz", "-o", files / "x", "--factory", "Flat", "--array", "b")
    assert lutra.index.load(files / "x").ntotal == 7
    assert "'c'" in fails("index", files / "many.npz", "-o", files / "x", "--array", "c")


# ---------------------------------------------------------------- bad input
def test_bad_files(files, index):
    before = index.read_bytes()
    (files / "text.npy").write_text("no array at all")
    np.save(files / "flat.npy", np.zeros(5))
    np.save(files / "objects.npy", np.array([{}, 3], object), allow_pickle=True)
    np.save(files / "nan.npy", np.full((3, 16), np.nan, np.float32))
    np.save(files / "words.npy", np.array([["a", "b"]]))
    np.save(files / "none.npy", np.empty((0, 16), np.float32))
    np.savez(files / "scalars.npz", a=3, ids=np.arange(3))
    np.savez(files / "badptr.npz", tokens=np.zeros((4, 16), np.float32), ptr=[0, 3, 2, 4])
    np.savez(files / "badids.npz", x=np.zeros((4, 16), np.float32), ids=np.arange(3))
    whole = (files / "tokens.npz").read_bytes()
    (files / "cut.npz").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[200:230] = bytes(30)
    (files / "damaged.npz").write_bytes(damaged)
    for name, words in {
        "missing.npy": "No such file", "text.npy": "no .npy or .npz", "flat.npy": "shape (5,)",
        "objects.npy": "Python objects", "nan.npy": "nan", "words.npy": "dtype", "none.npy": "no vectors",
        "scalars.npz": "holds no vectors", "badptr.npz": "ptr must rise", "badids.npz": "ids of shape (3,)",
        "cut.npz": "cut.npz", "damaged.npz": "damaged.npz",
    }.items():  # fmt: skip
        text = fails("index", files / name, "-o", index, "--factory", "Flat")
        assert words in text, text
        assert index.read_bytes() == before
    assert sorted(p.name for p in files.iterdir() if p.name.startswith(".")) == []


def test_bad_options(files, index):
    docs, queries, relevant = (
        files / "docs.npy",
        files / "queries.npy",
        ["--relevant", files / "relevant.npy"],
    )
    for words, command in {
        "does not exist": ("index", docs, "-o", files / "no" / "x"),
        "is a folder": ("index", docs, "-o", files),
        "is read by this command": ("index", docs, "-o", docs),
        "factory text": ("index", docs, "-o", files / "y", "--factory", "Fast"),
        "metric": ("index", docs, "-o", files / "y", "--factory", "Flat", "--metric", "ham"),
        "leave --factory out": ("index", docs, "-o", files / "y", "--factory", "Flat", "--memory", "9MB"),
        "--tokens is for token vectors": ("index", docs, "-o", files / "y", "--tokens", "int8"),
        "recall": ("index", docs, "-o", files / "y", "--recall", 2),
        "must hold 40 integers": ("index", docs, "-o", files / "y", "--factory", "Flat", "--ids", queries),
        "has no name": ("index", docs, "-o", files / "y", "--array", "x"),
        "No such file": ("search", files / "none.lutra", queries),
        "not a safetensors file": ("search", files / "tokens.npz", queries),
        "--relevant": ("search", index, queries, "--metrics", "mrr"),
        "'precison@3' is not known": ("search", index, queries, *relevant, "--metrics", "precison@3"),
        "for 10 queries, ids has 40": ("search", index, docs, *relevant),
        "UTF-8": ("search", index, queries, "--texts", files / "tokens.npz"),
    }.items():  # fmt: skip
        assert words in fails(*command)
        assert not (files / "y").exists()
    np.save(files / "narrow.npy", np.zeros((2, 5), np.float32))
    assert "5 columns" in fails("search", index, files / "narrow.npy")
    assert "is read by this command" in fails("search", index, queries, "-o", index)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", "0 0 5\n", "line 1: 3 words, not 4"),
        ("a.txt", "0 0 5 1\n12 0 5 1\n", "line 2: query 12, of 10"),
        ("a.txt", "q1 0 5 1\n", "line 1"),
        ("a.json", "{}", "must hold a list"),
        ("a.json", "[1, 2", "no JSON"),
        ("a.json", '[{"x": 1}]', "ids must be integers"),
        ("a.json", "[[1]]", "for 1 queries, ids has 10"),
    ],
)
def test_bad_relevance(files, index, name, content, words):
    (files / name).write_text(content)
    assert words in fails("search", index, files / "queries.npy", "--relevant", files / name)
