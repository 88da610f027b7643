"""lutra.vocab: sparsemax, tokens and scripts, transplants."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lutra

vocab = lutra.vocab


# ---------------------------------------------------------------- sparsemax
def is_projection(z, p, tolerance):
    """The conditions of Karush, Kuhn and Tucker, which only the projection on the simplex fulfils."""
    assert p.min() >= 0 and p.sum() == pytest.approx(1, abs=tolerance)
    tau = (z - p)[p > 0]
    assert np.ptp(tau) <= tolerance
    assert (z[p == 0] <= tau.min() + tolerance).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=40))
def test_sparsemax_is_the_projection(scores):
    z = np.array(scores)
    is_projection(z, vocab.sparsemax(z), 1e-9)


def test_sparsemax_of_rows_and_types():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((3, 4, 50)) * 0.2
    p = vocab.sparsemax(z)
    for i in np.ndindex(3, 4):
        is_projection(z[i], p[i], 1e-9)
    single = vocab.sparsemax(z.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, p, atol=1e-6)
    np.testing.assert_allclose(vocab.sparsemax(z + 1e6), p, atol=1e-9)  # a constant changes nothing
    masked = np.where(rng.random(z.shape) < 0.5, -np.inf, z)
    for i in np.ndindex(3, 4):
        inside = np.isfinite(masked[i])
        np.testing.assert_allclose(vocab.sparsemax(masked)[i][inside], vocab.sparsemax(masked[i][inside]))
    assert vocab.sparsemax(np.zeros((0, 3))).shape == (0, 3)
    assert vocab.sparsemax(np.array([2.0, 2.0, 0.0])).tolist() == [0.5, 0.5, 0]
    for bad in (np.array([np.nan, 1]), np.array([np.inf, 1]), np.array([-np.inf]), np.zeros((2, 0))):
        with pytest.raises(ValueError, match="scores"):
            vocab.sparsemax(bad)
    with pytest.raises(TypeError, match="floating point"):
        vocab.sparsemax(np.array([1, 2]))


# ---------------------------------------------------------------- tokens
def test_canonical_tokens():
    assert vocab.canonical_tokens({"play": 0, "##ing": 1, "[CLS]": 2, "##": 3}) == {
        "play": " play", "##ing": "ing", "[CLS]": "[CLS]", "##": " ##",
    }  # fmt: skip
    assert vocab.canonical_tokens(["\u0120play", "ing", "<s>", "\u0120\u00d0\u00b4", "\u00d0"]) == {
        "\u0120play": " play", "ing": "ing", "<s>": "<s>", "\u0120\u00d0\u00b4": " \u0434",
        "\u00d0": "\u00d0",
    }  # fmt: skip
    assert vocab.canonical_tokens(["\u2581play", "ing"]) == {"\u2581play": " play", "ing": "ing"}
    assert vocab.canonical_tokens([]) == {}


def test_byte_alphabet_is_that_of_byte_level_bpe():
    tokenizers = pytest.importorskip("tokenizers")
    from lutra.vocab._tokens import _BYTES

    assert set(_BYTES) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_BYTES.values()) == list(range(256))
    word = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" \u00e9\u4e2d\n")
    assert bytes(_BYTES[c] for piece, _ in word for c in piece).decode() == " \u00e9\u4e2d\n"


def test_scripts():
    for text, script in {
        "hello": "Latin", " \u00e9t\u00e9": "Latin", "\u0434\u043e\u043c": "Cyrillic", "3.14": "Common",
        "": "Common",
        "\u4e2d\u6587": "Han", "\u3042\u30a2\u3042": "Hiragana", "\uff71": "Katakana", "\uff21": "Latin",
        "\u0905\u0930\u0941": "Devanagari", "\uac00": "Hangul", "\u0e01": "Thai", "\u05d0": "Hebrew",
        "\u0645": "Arabic", "\u03b1": "Greek", "a\u0434\u0434": "Cyrillic", "\U0001d400": "Common",
        "\U00017000": "Tangut", "\u1401": "Canadian_Aboriginal", "e\u0301": "Latin", "\u0301": "Common",
    }.items():  # fmt: skip
        assert vocab.script_of(text) == script, text


def test_scripts_are_those_of_unicode():
    regex = pytest.importorskip("regex")
    from lutra.vocab._tokens import _script_of_character as script

    letters = [c for c in map(chr, range(0x110000)) if unicodedata.category(c)[0] in "LM"]
    groups = {}
    for c in letters:
        groups.setdefault(script(c), []).append(c)
    right = 0
    for name, members in groups.items():
        try:
            right += len(regex.findall(rf"\p{{Script={name}}}", "".join(members)))
        except regex.error:
            assert name == "Phaistos"  # one mark, which has no script of its own
    assert right / len(letters) > 0.997


# ---------------------------------------------------------------- transplants
def problem(old=60, new=80, common=40, dim=6, aux=5, seed=0, dtype=np.float32):
    """A table, two vocabularies that share tokens, auxiliary vectors."""
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((old, dim)).astype(dtype)
    source = {f"t{i}": int(j) for i, j in enumerate(rng.permutation(old))}
    names = [f"t{i}" for i in range(common)] + [f"n{i}" for i in range(new - common)]
    target = {t: int(j) for t, j in zip(names, rng.permutation(new))}
    return table, source, target, rng.standard_normal((new, aux)).astype(np.float32)


def focus_by_loop(table, source, target, auxiliary):
    """FOCUS as the paper has it, one token at a time, over all common tokens, in float64."""
    auxiliary = auxiliary.astype(np.float64)
    unit = auxiliary / np.linalg.norm(auxiliary, axis=1, keepdims=True)
    common = [t for t in target if t in source]
    out = np.zeros((len(target), table.shape[1]))
    for token, i in target.items():
        if token in source:
            out[i] = table[source[token]]
        else:
            weights = vocab.sparsemax(np.array([unit[i] @ unit[target[t]] for t in common]))
            out[i] = sum(w * table[source[t]].astype(np.float64) for w, t in zip(weights, common))
    return out


@pytest.mark.parametrize("candidates", [1, 3, 64])
@pytest.mark.parametrize("aux", [2, 5, 300])
def test_focus_is_the_papers(candidates, aux):
    """However few candidates are looked at first: with 300 dimensions all common tokens have a weight."""
    table, source, target, auxiliary = problem(aux=aux)
    got = vocab.transplant(table, source, target, auxiliary=auxiliary, candidates=candidates)
    want = focus_by_loop(table, source, target, auxiliary)
    np.testing.assert_allclose(got.rows, want, atol=2e-5)
    for token, i in target.items():
        assert got.copied_from[i] == source.get(token, -1)
        if token in source:
            assert (got.rows[i] == table[source[token]]).all()
    assert not got.drawn.any()


def test_focus_in_blocks(monkeypatch):
    from lutra.vocab import _transplant

    args = problem(new=200)
    want = vocab.transplant(*args[:3], auxiliary=args[3])
    monkeypatch.setattr(_transplant, "_BLOCK", 7)
    monkeypatch.setattr(_transplant, "_SCORES", 30)
    np.testing.assert_allclose(vocab.transplant(*args[:3], auxiliary=args[3]).rows, want.rows, atol=1e-6)


def test_focus_without_vectors_for_some():
    table, source, target, auxiliary = problem()
    lost = [target["n0"], target["n3"], target["t1"]]
    auxiliary[lost] = 0
    got = vocab.transplant(table, source, target, auxiliary=auxiliary)
    assert set(np.flatnonzero(got.drawn)) == set(lost[:2])
    assert (got.rows[target["t1"]] == table[source["t1"]]).all()
    keep = [t for t in target if t != "t1"]
    want = focus_by_loop(table, {t: source[t] for t in keep if t in source}, target, np.where(
        auxiliary.any(1)[:, None], auxiliary, 1
    ))  # fmt: skip
    for t in keep:
        if t not in ("n0", "n3"):
            np.testing.assert_allclose(got.rows[target[t]], want[target[t]], atol=2e-5)


@pytest.mark.parametrize("method", ["focus", "script", "mean", "random"])
def test_libraries_and_types(method):
    torch = pytest.importorskip("torch")
    table, source, target, auxiliary = problem()
    options = {"auxiliary": auxiliary} if method == "focus" else {}
    want = vocab.transplant(table, source, target, method, **options)
    assert want.rows.dtype == np.float32 and want.rows.shape == (80, 6)
    for dtype, tolerance in (("float64", 1e-5), ("float16", 1e-2), ("bfloat16", 0.1)):
        there = torch.from_numpy(table).to(getattr(torch, dtype))
        got = vocab.transplant(there, source, target, method, **options)
        assert got.rows.dtype == there.dtype
        np.testing.assert_allclose(got.rows.float().numpy(), want.rows, atol=tolerance)
        kept = got.copied_from >= 0
        assert torch.equal(got.rows[kept], there[got.copied_from[kept]])
    for layer in (torch.nn.Embedding.from_pretrained(torch.from_numpy(table)), torch.nn.Linear(6, 60)):
        if isinstance(layer, torch.nn.Linear):  # an untied head
            layer.weight = torch.nn.Parameter(torch.from_numpy(table))
        got = vocab.transplant(layer, source, target, method, **options)
        assert torch.is_tensor(got.rows) and np.array_equal(got.rows.numpy(), want.rows)
    compressed = lutra.compress.encode(table, "low_rank", rank=6)
    got = vocab.transplant(compressed, source, target, method, **options)
    np.testing.assert_allclose(got.rows, want.rows, atol=1e-3)


def test_mean_random_and_gaps():
    table, source, target, _ = problem(old=3000, new=4000, common=20)
    table = table * np.array([1, 2, 3, 4, 5, 6], np.float32) + 7
    mean = vocab.transplant(table, source, target, "mean")
    fresh = mean.copied_from < 0
    np.testing.assert_allclose(mean.rows[fresh], np.broadcast_to(table.mean(0), (3980, 6)), rtol=1e-5)
    assert not mean.drawn.any()
    got = vocab.transplant(table, source, target, "random", seed=3)
    assert (got.drawn == fresh).all()
    np.testing.assert_allclose(got.rows[fresh].mean(0), table.mean(0), atol=0.5)
    np.testing.assert_allclose(got.rows[fresh].std(0), table.std(0), rtol=0.06)
    again = vocab.transplant(table, source, {"x": target["n5"]}, "random", seed=3, rows=4000)
    assert (again.rows[target["n5"]] == got.rows[target["n5"]]).all()  # by seed and id alone
    assert again.drawn.sum() == 4000
    assert not (
        vocab.transplant(table, source, target, "random", seed=4).rows[fresh] == got.rows[fresh]
    ).any()


def test_script_by_script():
    rng = np.random.default_rng(0)
    latin = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)]
    cyrillic = [chr(0x430 + i % 30) + chr(0x430 + i // 30) for i in range(300)]
    source = {t: i for i, t in enumerate([*latin, *cyrillic, "\u05d0"])}
    table = np.concatenate([
        rng.standard_normal((300, 8)) + 5, rng.standard_normal((300, 8)) * 3 - 5, np.full((1, 8), 900.0)
    ]).astype(np.float32)  # fmt: skip
    fresh = [f"z{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(400)]
    fresh += [chr(0x430 + i % 30) * 3 + chr(0x430 + i // 30) for i in range(400)] + ["\u05d1", "\u05d0"]
    got = vocab.transplant(table, source, {t: i for i, t in enumerate(fresh)}, "script")
    for part, rows in ((slice(0, 400), table[:300]), (slice(400, 800), table[300:600])):
        new = got.rows[part]
        assert abs(new.mean() - rows.mean()) < 0.3 and abs(new.std() - rows.std()) < 0.2
    # one Hebrew token is too few to learn from
    assert np.abs(got.rows[800] - table.mean(0)).max() < 6 * table.std(0).max()
    assert not np.allclose(got.rows[800], 900, atol=100) and (got.rows[801] == 900).all()
    few = vocab.transplant(table, source, {"\u05d1": 0}, "script", min_tokens=1)
    assert (few.rows == 900).all() and few.drawn.all()


def test_canonical_match():
    table = np.arange(8, dtype=np.float32).reshape(4, 2)
    source = {"play": 0, "##ing": 1, "##play": 2, "[UNK]": 3}
    target = {"\u0120play": 0, "play": 1, "ing": 2, "\u0120ing": 3, "[UNK]": 4}
    got = vocab.transplant(table, source, target, "mean", match="canonical")
    assert got.copied_from.tolist() == [0, 2, 1, -1, 3]
    assert vocab.transplant(table, source, target, "mean").copied_from.tolist() == [-1, 0, -1, -1, 3]


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"source_vocab": ["a"]}, TypeError, "source_vocab must be a dict"),
        ({"source_vocab": {1: 1}}, TypeError, "got the key 1"),
        ({"source_vocab": {"a": 60}}, IndexError, "source_vocab['a'] is 60; it must lie in [0, 60)"),
        ({"target_vocab": {"a": -1}}, ValueError, "target_vocab['a'] must be >= 0"),
        ({"target_vocab": {"a": 1, "b": 1}}, ValueError, "'b' and 'a' both have the id 1"),
        ({"target_vocab": {"a": 1.0}}, TypeError, "target_vocab['a'] must be an integer"),
        ({"rows": 5}, IndexError, "it must lie in [0, 5)"),
        ({"method": "copy"}, ValueError, "method must be one of 'focus'"),
        ({"method": "mean"}, ValueError, "auxiliary goes with method 'focus'"),
        ({"match": "fuzzy"}, ValueError, "match must be"),
        ({"auxiliary": None}, ValueError, "auxiliary is missing"),
        ({"auxiliary": np.zeros((3, 4), np.float32)}, ValueError, "a row for each of the 80 new ids"),
        ({"auxiliary": np.full((80, 4), np.nan, np.float32)}, ValueError, "auxiliary[0] holds NaN"),
        ({"source_vocab": {"x": 0}}, ValueError, "no token is in both vocabularies"),
        ({"source": np.zeros((3, 4), np.int64)}, TypeError, "source has dtype int64"),
        ({"source": np.zeros(3, np.float32)}, ValueError, "source must be 2-d"),
        ({"candidates": 0}, ValueError, "candidates must be >= 1"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    names = ("source", "source_vocab", "target_vocab", "auxiliary")
    with pytest.raises(error) as caught:
        vocab.transplant(**{**dict(zip(names, problem())), **change})
    assert text in str(caught.value)


def test_without_torch_and_kernels():
    code = (
        "import sys, numpy as np, lutra\n"
        "rows = lutra.vocab.transplant(np.eye(3, dtype=np.float32), {'a': 0, 'b': 1}, {'b': 0, 'c': 1},\n"
        "    auxiliary=np.ones((2, 2), np.float32)).rows\n"
        "assert rows.tolist() == [[0, 1, 0], [0, 1, 0]]\n"
        "assert lutra.vocab.prune(np.eye(3, dtype=np.float32), np.array([0, 1, 1])).kept.tolist() == [1, 2]\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LUTRA_BACKEND": "reference"})


def test_focus_finds_neighbours_of_a_real_table(data_folder):
    """Half of a table's tokens are taken for new: given a rotation of the table as the auxiliary space,
    FOCUS makes rows that are far nearer to the true ones than the mean is."""
    table = np.load(data_folder / "minilm_token_table_30522x384_f16.npy").astype(np.float32)[2000:10000]
    rng = np.random.default_rng(0)
    turned = table @ np.linalg.qr(rng.standard_normal((384, 384)))[0].astype(np.float32)
    target = {f"t{i}": i for i in range(8000)}
    source = {f"t{i}": j for j, i in enumerate(range(0, 8000, 2))}
    hidden = np.arange(1, 8000, 2)

    def cosine(method, **options):
        new = vocab.transplant(table[::2], source, target, method, **options).rows[hidden]
        true = table[hidden]
        return ((new * true).sum(1) / np.linalg.norm(new, axis=1) / np.linalg.norm(true, axis=1)).mean()

    focus, mean = cosine("focus", auxiliary=turned), cosine("mean")
    assert focus > mean + 0.1
