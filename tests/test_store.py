"""lutra.VectorStore."""

import pickle

import numpy as np
import pytest

import lutra
from lutra import VectorStore, _backend
from lutra.store import _keys, _oov

rng = np.random.default_rng(0)
WORDS = [
    a + b + c
    for a in ("run", "walk", "sing", "paint")
    for b in ("", "n", "s", "er")
    for c in ("", "ing", "s")
]
WORDS = list(dict.fromkeys([*WORDS, "", "two words", "naïve", "日本語", "a\tb"]))
ROWS = rng.standard_normal((len(WORDS), 24)).astype(np.float32)


def cosines(query, rows):
    return rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)


@pytest.fixture(params=["float32", "float16", "int8"])
def store(request):
    return VectorStore.from_arrays(WORDS, ROWS, dtype=request.param)


def test_lookup_and_files(store, tmp_path):
    path = tmp_path / "s.safetensors"
    store.save(path)
    tolerance = {"float32": 0, "float16": 2e-3, "int8": np.abs(ROWS).max() / 254 + 1e-6}[store.dtype]
    for s in (store, VectorStore(path), VectorStore(path, mmap=False), pickle.loads(pickle.dumps(store))):
        assert len(s) == len(WORDS) and list(s) == WORDS and s.dim == 24 and s.dtype == store.dtype
        got = s[WORDS]
        assert got.dtype == np.float32 and np.abs(got - ROWS).max() <= tolerance
        assert np.array_equal(s["naïve"], got[WORDS.index("naïve")])
        assert s.rows_of(["日本語", "nothing", ""]).tolist() == [WORDS.index("日本語"), -1, WORDS.index("")]
        assert "two words" in s and "two" not in s and 3 not in s
        keys, vectors = s[3:9:2]
        assert keys == WORDS[3:9:2] and np.array_equal(vectors, got[3:9:2])
        assert [k for k, _ in s.items()] == WORDS
        assert np.array_equal(s["unheard"], store["unheard"])
        assert s.most_similar("runs", 4) == store.most_similar("runs", 4)
    assert pickle.loads(pickle.dumps(VectorStore(path))).path == str(path)


def test_most_similar(store):
    rows = store[WORDS]
    for query in ("run", ROWS[5], "runningly", ["run", "walks"]):
        if isinstance(query, str):
            vector = store[query]
        elif isinstance(query, list):
            vector = _oov.unit(store[query]).mean(0)
        else:
            vector = query
        scores = cosines(vector, rows)
        order = [i for i in np.argsort(-scores, kind="stable") if not (isinstance(query, (str, list)) and
                 WORDS[i] in ([query] if isinstance(query, str) else query))]  # fmt: skip
        got = store.most_similar(query, 5)
        assert [k for k, _ in got] == [WORDS[i] for i in order[:5]]
        np.testing.assert_allclose([s for _, s in got], scores[order[:5]], atol=1e-5)
    plain = store.most_similar("sing", 3)
    for text in ("Flat", "HNSW8"):
        store.build_index(text)
        indexed = store.most_similar("sing", 3)
        assert [k for k, _ in indexed] == [k for k, _ in plain]
    assert len(store.most_similar("run", 10_000)) == len(WORDS) - 1


def test_similarity_and_doesnt_match():
    base = rng.standard_normal(24)
    rows = np.stack([base + 0.1 * rng.standard_normal(24) for _ in range(4)] + [-base])
    store = VectorStore.from_arrays(list("abcde"), rows)
    assert store.doesnt_match(list("abcde")) == "e"
    assert store.similarity("a", "b") == pytest.approx(cosines(rows[0], rows[1:2])[0], abs=1e-5)
    np.testing.assert_allclose(store.similarity("a", ["b", "e"]), cosines(rows[0], rows[[1, 4]]), atol=1e-5)
    assert store.similarity(rows[0], "a") == pytest.approx(1)


def test_unknown_strings():
    # vectors of stems: what shares a stem is alike
    stems = {s: rng.standard_normal(24) for s in ("run", "walk", "sing", "paint")}
    rows = [next((v for s, v in stems.items() if w.startswith(s)), rng.standard_normal(24)) for w in WORDS]
    store = VectorStore.from_arrays(WORDS, np.stack(rows), ngram_buckets=1 << 14)
    for word, stem in (("walkable", "walk"), ("Painterly", "paint"), ("singer", "sing")):
        scores = {s: cosines(stems[s], store[[word]])[0] for s in stems}
        assert max(scores, key=scores.get) == stem and scores[stem] > 0.7
    norm = np.linalg.norm(rows, axis=1).mean()
    assert np.linalg.norm(store["walkable"]) == pytest.approx(norm, rel=1e-3)
    # no n-gram is known: random, the same each time, and alike only where n-grams are
    plain = VectorStore.from_arrays(WORDS, rows, oov="random")
    assert plain.similarity("qqqqzzzzj", "qqqqzzzzk") > 0.5 > abs(plain.similarity("qqqqzzzz", "vvvvjjjj"))
    for s in (store, plain):
        assert np.array_equal(s["qqqqzzzz"], s["qqqqzzzz"])
        assert np.isfinite(s[" "]).all() and np.isfinite(s[["", "run", "\t"]]).all()
    assert np.array_equal(store["漢"], plain["漢"])  # its n-grams fall on empty rows
    strict = VectorStore.from_arrays(WORDS, rows, oov="error")
    with pytest.raises(KeyError, match="walkable"):
        strict[["run", "walkable"]]


def test_ngram_rows_are_means():
    keys = ["abc", "abcd", "xyz"]
    unit = _oov.unit(rng.standard_normal((3, 8)).astype(np.float32))
    table = _oov.bucket_rows(keys, unit, 50)
    sums, counts = np.zeros((50, 8)), np.zeros(50)
    for key, row in zip(keys, unit):
        for i in lutra.reference.ngrams.ngrams([key], buckets=50, word_ngrams=0, char_ngrams=(3, 6))[0]:
            sums[i] += row
            counts[i] += 1
    np.testing.assert_allclose(table, sums / np.maximum(counts, 1)[:, None], atol=2e-3)


def test_text(tmp_path):
    path = tmp_path / "v.vec"
    plain = [w for w in WORDS if "\n" not in w and w]
    store = VectorStore.from_arrays(plain, ROWS[: len(plain)])
    store.save_text(path)
    again = VectorStore.from_text(path)
    assert list(again) == plain and np.array_equal(again[plain], store[plain])
    assert list(VectorStore.from_text(path, limit=3)) == plain[:3]
    path.write_text("a 1 2\nb 3 4\na 5 6\n")  # no first line, and a key twice
    store = VectorStore.from_text(path)
    assert list(store) == ["a", "b"] and store["a"].tolist() == [1, 2]
    short = ("5 2\na 1 2\n", "ends after 1 of 5")
    for text, problem in (("a 1 2\nb 3\n", "line 2"), ("a 1 x\n", "line 1"), short):
        path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            VectorStore.from_text(path)


def test_gensim_like():
    class KeyedVectors:
        index_to_key, vectors = WORDS, ROWS

    assert np.array_equal(VectorStore.from_gensim(KeyedVectors)[WORDS], ROWS)
    with pytest.raises(TypeError, match="KeyedVectors"):
        VectorStore.from_gensim(3)


@pytest.mark.skipif(_backend.core is None, reason="compares the kernel")
def test_keys_without_compiled_code(monkeypatch):
    keys = _keys.Keys.of(WORDS)
    asked = [*WORDS, "no", "nö"]
    found = keys.find(asked)
    assert found.tolist() == [*range(len(WORDS)), -1, -1]
    monkeypatch.setattr(_backend, "core", None)
    again = _keys.Keys.of(WORDS)
    assert np.array_equal(again.buckets, keys.buckets) and again.find(asked).tolist() == found.tolist()


def test_equal_hashes(monkeypatch):
    real = _keys.hash_strings

    def equal(texts, seed, name="keys"):
        return real(texts, seed) if seed else np.zeros(len(texts), np.int64)

    monkeypatch.setattr(_keys, "hash_strings", equal)
    keys = _keys.Keys.of(["a", "b"])
    assert keys.seed == 1 and keys.find(["b", "a", "c"]).tolist() == [1, 0, -1]


def test_damaged_files(tmp_path):
    path = tmp_path / "s.safetensors"
    VectorStore.from_arrays(WORDS, ROWS).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"s\.safetensors"):
        VectorStore(path)
    store = VectorStore.from_arrays(WORDS, ROWS)
    store.keys.offsets[:] = rng.integers(-(2**60), 2**60, len(WORDS) + 1)  # what no check at opening reads
    store.save(path)
    assert set(VectorStore(path).rows_of(WORDS).tolist()) <= {-1, *range(len(WORDS))}
    lutra.index.Flat(4).save(path)
    with pytest.raises(ValueError, match="not a vector store"):
        VectorStore(path)
    with pytest.raises(FileNotFoundError):
        VectorStore(tmp_path / "none")


def test_bad_input():
    with pytest.raises(ValueError, match="'a' is at 0 and at 2"):
        VectorStore.from_arrays(["a", "b", "a"], np.ones((3, 2)))
    with pytest.raises(TypeError, match=r"keys\[1\] must be a str, got int"):
        VectorStore.from_arrays(["a", 1], np.ones((2, 2)))
    with pytest.raises(ValueError, match="lone surrogate"):
        VectorStore.from_arrays(["\ud800"], np.ones((1, 2)))
    with pytest.raises(ValueError, match="a row a key"):
        VectorStore.from_arrays(["a"], np.ones((2, 2)))
    for dtype, value in (("float32", np.nan), ("float16", 1e6), ("int8", np.inf), ("int8", np.nan)):
        with pytest.raises(ValueError, match=r"vectors\[1\], of 'b', is not finite"):
            VectorStore.from_arrays(["a", "b"], [[1.0, 2.0], [value, 1.0]], dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be one of"):
        VectorStore.from_arrays(["a"], np.ones((1, 2)), dtype="int4")
    store = VectorStore.from_arrays(["a"], np.ones((1, 2)))
    with pytest.raises(TypeError, match="a key is a str"):
        store[3]
    with pytest.raises(ValueError, match="query has shape"):
        store.most_similar(np.ones(3))
    empty = VectorStore.from_arrays([], np.ones((0, 2)))
    assert empty.most_similar([1.0, 2.0]) == [] and empty["a"].shape == (2,) and len(empty) == 0
