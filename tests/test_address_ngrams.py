"""lutra.address.ngrams and token_ngrams against the reference, and against hashes written down by hand."""

import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutra import _backend
from lutra.address import Ngrams, Vocabulary, ngrams, token_ngrams
from lutra.reference import address as reference

STEP = 116049371
LENGTHS = [1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97]


def fnv1a(data: bytes) -> int:
    """The published algorithm on unsigned bytes: right for ASCII."""
    h = 0x811C9DC5
    for byte in data:
        h = (h ^ byte) * 0x01000193 % 2**32
    return h


def value(word: str) -> int:
    """fastText's int32 of a hash, as uint64."""
    h = fnv1a(word.encode())
    return h + 2**64 - 2**32 if h >= 2**31 else h


def equal(a, b):
    assert a[0].dtype == b[0].dtype == np.int64
    assert a[1].dtype == b[1].dtype == np.int64
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


# ---------------------------------------------------------------- known values
def test_fnv1a_has_its_published_values():
    # the test vectors of the FNV reference code
    assert [fnv1a(w) for w in (b"", b"a", b"foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]


def test_words_are_fnv1a_sign_extended():
    ids = ngrams("foobar a", buckets=2**61, word_ngrams=1).ids
    assert ids.tolist() == [
        (0xFFFFFFFF00000000 | 0xBF9CF968) % 2**61,
        (0xFFFFFFFF00000000 | 0xE40C292C) % 2**61,
    ]
    assert ngrams("the", buckets=1 << 62, word_ngrams=1).ids.tolist() == [value("the") % 2**62]


def test_bytes_beyond_ascii_are_signed():
    # "é" is C3 A9, as signed bytes -61 and -87; by hand from fastText's definition
    h = ((0x811C9DC5 ^ 0xFFFFFFC3) * 0x01000193) % 2**32
    h = ((h ^ 0xFFFFFFA9) * 0x01000193) % 2**32
    expected = (h + 2**64 - 2**32 if h >= 2**31 else h) % 1000
    assert ngrams("é", buckets=1000).ids.tolist() == [expected]
    unsigned = fnv1a("é".encode())
    assert unsigned != h


def test_word_ngrams_roll():
    a, b, c = map(value, ("to", "be", "or"))
    ids = ngrams("to be or", buckets=9973, word_ngrams=3).ids.tolist()
    ab = (a * STEP + b) % 2**64
    abc = (ab * STEP + c) % 2**64
    bc = (b * STEP + c) % 2**64
    assert ids == [v % 9973 for v in (a, b, c, ab, abc, bc)]


def test_character_ngrams_by_hand():
    got = ngrams("Né", buckets=10**6, word_ngrams=0, char_ngrams=(1, 3))
    reference_hash = reference.ngrams("Né", buckets=10**6, word_ngrams=0, char_ngrams=(1, 3))
    equal(got, reference_hash)
    assert len(got.ids) == 2 + 3 + 2  # n, é; <n, né, é>; <né, né>
    ascii_ids = ngrams("ab", buckets=10**6, word_ngrams=0, char_ngrams=(1, 4)).ids.tolist()
    order = ["<a", "<ab", "<ab>", "a", "ab", "ab>", "b", "b>"]
    assert ascii_ids == [fnv1a(s.encode()) % 10**6 for s in order]


def test_a_vocabulary_gives_indices_and_shifts_hashes():
    words = ["to", "be", "question"]
    ids = ngrams("To be, or to question", buckets=1000, word_ngrams=2, vocabulary=words).ids.tolist()
    assert ids == [0, 1, 0, 2] + [3 + (i * STEP + j) % 1000 for i, j in ((0, 1), (1, 0), (0, 2))]
    chars = ngrams("or", buckets=1000, word_ngrams=2, vocabulary=words, char_ngrams=(4, 4)).ids.tolist()
    assert chars == [3 + fnv1a(b"<or>") % 1000]  # an unknown word keeps its characters


def test_tokenizers():
    def count(text, tokenizer):
        return len(ngrams(text, buckets=10, word_ngrams=1, tokenizer=tokenizer).ids)

    assert count("a-b c_d  e\n", "word") == 4
    assert count("a-b c_d  e\n", "whitespace") == 3
    assert count("a\x1cb\x85c\u2003d", "whitespace") == 1  # only ASCII white space divides
    assert count("", "word") == count(" .,", "word") == count(" \t\n\r\v\f", "whitespace") == 0


def test_lowercase_is_pythons():
    texts = ["ÀÉÎ STRASSE", "İstanbul", "ΑΣ", "K"]  # the last is the Kelvin sign
    equal(ngrams(texts, buckets=999), ngrams([t.lower() for t in texts], buckets=999, lowercase=False))
    assert ngrams("K", buckets=999).ids.tolist() == ngrams("k", buckets=999).ids.tolist()
    assert ngrams("A", buckets=999, lowercase=False).ids.tolist() != ngrams("a", buckets=999).ids.tolist()


# ---------------------------------------------------------------- against the reference
texts_ = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])), st.text("aAbBzZ_09 .-\n<>é漢😀", max_size=60)
    ),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(
    texts_,
    st.sampled_from([1, 2, 7, 2**32, 2_000_000, 2**62, 2**61 - 1]),
    st.integers(0, 5),
    st.none() | st.tuples(st.integers(1, 4), st.integers(0, 4)).map(lambda t: (t[0], t[0] + t[1])),
    st.sampled_from(["word", "whitespace"]),
    st.booleans(),
    st.booleans(),
)
def test_equals_the_reference(
    texts, buckets, word_ngrams, char_ngrams, tokenizer, lowercase, with_vocabulary
):
    options = {
        "buckets": buckets, "word_ngrams": word_ngrams, "char_ngrams": char_ngrams, "tokenizer": tokenizer,
        "lowercase": lowercase,
    }  # fmt: skip
    if with_vocabulary:
        words = [w for text in texts for w in (text.lower() if lowercase else text).split()]
        options["vocabulary"] = list(dict.fromkeys(["a", "b", *words[::2]]))
    got = ngrams(texts, **options)
    equal(got, reference.ngrams(texts, **options))
    assert len(got.offsets) == len(texts)
    top = buckets + len(options.get("vocabulary", ()))
    assert not len(got.ids) or (got.ids.min() >= 0 and got.ids.max() < top)


@pytest.mark.parametrize("n", LENGTHS)
def test_many_texts(n):
    rng = np.random.default_rng(n)
    alphabet = np.array(list("abcdefgh   ABC_.é漢"))
    texts = ["".join(rng.choice(alphabet, size)) for size in rng.integers(0, 200, n)]
    options = {"buckets": 4099, "word_ngrams": 3, "char_ngrams": (3, 5)}
    equal(ngrams(texts, **options), reference.ngrams(texts, **options))


def test_the_number_of_threads_changes_nothing():
    if _backend.core is None:
        pytest.skip("the reference has one thread")
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 500, size))) for size in rng.integers(0, 300, 400)]
    before = _backend.core.num_threads()
    results = []
    for threads in (1, 2, 5):
        _backend.core.set_num_threads(threads)
        results.append(ngrams(texts, char_ngrams=(2, 4), buckets=10**7))
    _backend.core.set_num_threads(before)
    for result in results[1:]:
        equal(result, results[0])
    equal(results[0], reference.ngrams(texts, char_ngrams=(2, 4), buckets=10**7))


def test_two_python_threads_at_once():
    texts = ["some words, repeated " * 50] * 200
    expected = ngrams(texts)
    results = []
    workers = [threading.Thread(target=lambda: results.append(ngrams(texts))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        equal(result, expected)


# ---------------------------------------------------------------- what is accepted
def test_kinds_of_sequences():
    expected = ngrams(["one two", "three"], buckets=100)
    assert isinstance(expected, Ngrams)
    equal(ngrams(("one two", "three"), buckets=100), expected)
    equal(ngrams(np.array(["one two", "three"]), buckets=100), expected)
    equal(ngrams(np.array(["one two", "three"], dtype=object), buckets=100), expected)
    assert ngrams("one two", buckets=100).offsets.tolist() == [0]


def test_empty_input():
    result = ngrams([], buckets=5)
    assert result.ids.shape == result.offsets.shape == (0,)
    assert ngrams(["", "a", "", ""], buckets=5, word_ngrams=1).offsets.tolist() == [0, 0, 1, 1]
    assert len(ngrams("a", vocabulary=[], buckets=5).ids) == 0
    equal(
        ngrams(["", "a b"], vocabulary=["a", "b", ""]),
        reference.ngrams(["", "a b"], vocabulary=["a", "b", ""]),
    )


def test_a_text_with_nul_and_a_long_one():
    texts = ["a\x00b", "x" * 100_000, "y " * 50_000]
    equal(ngrams(texts, char_ngrams=(3, 3)), reference.ngrams(texts, char_ngrams=(3, 3)))


def test_prepared_vocabulary():
    words = [f"w{i}" for i in range(1000)]
    vocabulary = Vocabulary(words)
    assert len(vocabulary) == 1000
    assert list(vocabulary) == words
    texts = ["w1 w5 w999 w1000", "nothing", "W7 w0"]
    equal(ngrams(texts, vocabulary=vocabulary), ngrams(texts, vocabulary=words))
    again = pickle.loads(pickle.dumps(vocabulary))
    equal(ngrams(texts, vocabulary=again), ngrams(texts, vocabulary=words))


# ---------------------------------------------------------------- what is not
@pytest.mark.parametrize(
    "bad, place, got",
    [
        (["a", None], r"texts\[1\]", "NoneType"),
        (["a", "b", b"c"], r"texts\[2\]", "bytes"),
        ([1, "a"], r"texts\[0\]", "int"),
        ([["a"]], r"texts\[0\]", "list"),
        ({"a": 1}, "texts", "dict"),
        ({"a"}, "texts", "set"),
        (b"bytes", "texts", "bytes"),
        (None, "texts", "NoneType"),
        (3.5, "texts", "float"),
        ((t for t in ["a"]), "texts", "generator"),
        (np.array([["a"]]), "texts", "ndarray"),
        (np.array([1, 2]), r"texts\[0\]", "int64"),
    ],
)
def test_wrong_types(bad, place, got):
    with pytest.raises(TypeError, match=f"{place} must be .*{got}"):
        ngrams(bad)


@pytest.mark.parametrize("lowercase", [True, False])
def test_lone_surrogates(lowercase):
    with pytest.raises(ValueError, match=r"texts\[1\] holds a lone surrogate, U\+D83D at 2"):
        ngrams(["fine 😀", "ab\ud83d"], lowercase=lowercase)
    with pytest.raises(ValueError, match=r"lone surrogate"):
        ngrams("a", vocabulary=["\udc00"])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"buckets": 0}, ValueError, "buckets must be"),
        ({"buckets": 2**63}, ValueError, "buckets must be"),
        ({"buckets": 10.0}, TypeError, "buckets must be an integer"),
        ({"word_ngrams": -1}, ValueError, "word_ngrams must be"),
        ({"word_ngrams": True}, TypeError, "word_ngrams must be an integer"),
        ({"char_ngrams": 3}, TypeError, "char_ngrams must be"),
        ({"char_ngrams": (1, 2, 3)}, TypeError, "char_ngrams must be"),
        ({"char_ngrams": (0, 2)}, ValueError, r"char_ngrams\[0\] must be"),
        ({"char_ngrams": (3, 2)}, ValueError, r"char_ngrams\[1\] must be"),
        ({"tokenizer": "bpe"}, ValueError, "tokenizer must be one of 'word', 'whitespace'"),
        ({"tokenizer": None}, ValueError, "tokenizer must be one of"),
        ({"lowercase": "no"}, TypeError, "lowercase must be a bool"),
        ({"vocabulary": "abc"}, TypeError, "vocabulary must be a sequence of str"),
        ({"vocabulary": {"a": 1}}, TypeError, "vocabulary must be a sequence of str"),
        ({"vocabulary": ["a", 1]}, TypeError, r"vocabulary\[1\] must be a str"),
        ({"vocabulary": ["a", "b", "a"]}, ValueError, "'a' is at 0 and at 2"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        ngrams(["a b"], **options)


# ---------------------------------------------------------------- tokens
def ragged(rng, texts, high=1000, dtype=np.int64):
    lengths = rng.integers(0, 9, texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(dtype)
    return rng.integers(0, high, lengths.sum()).astype(dtype), offsets


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("order", [1, 2, 3, 7])
@pytest.mark.parametrize("unigrams", [True, False])
def test_tokens_equal_the_reference(simd_level, n, order, unigrams):
    rng = np.random.default_rng(n)
    for first in (0, 1000):
        options = {"order": order, "buckets": 4099, "first_bucket": first, "unigrams": unigrams}
        square = rng.integers(0, 1000, (n, 6))
        equal(token_ngrams(square, **options), reference.token_ngrams(square, **options))
        tokens, offsets = ragged(rng, n)
        equal(token_ngrams(tokens, offsets, **options), reference.token_ngrams(tokens, offsets, **options))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6), max_size=6),
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 1000, 2**32, 2**62, 2**61 - 1]),
    st.booleans(),
)
def test_any_tokens(rows, order, buckets, unigrams):
    tokens = np.array([t for row in rows for t in row], np.int64)
    offsets = np.cumsum([0, *map(len, rows)])[:-1].astype(np.int64)
    options = {"order": order, "buckets": buckets, "unigrams": unigrams}
    equal(token_ngrams(tokens, offsets, **options), reference.token_ngrams(tokens, offsets, **options))


def test_tokens_are_what_ngrams_hashes():
    vocabulary = ["to", "be", "or", "not"]
    texts = ["to be or not to be", "or", "not be"]
    tokens = np.array([[vocabulary.index(w) for w in texts[0].split()]])
    a = ngrams(texts[0], vocabulary=vocabulary, word_ngrams=4, buckets=77)
    b = token_ngrams(tokens, order=4, buckets=77, first_bucket=4)
    assert a.ids.tolist() == b.ids.tolist()


def test_large_tokens_use_every_thread():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50_000, (300, 97))
    got = token_ngrams(tokens, order=3, buckets=10**6, first_bucket=50_000)
    equal(got, reference.token_ngrams(tokens, order=3, buckets=10**6, first_bucket=50_000))


def test_token_layouts_and_dtypes():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 99, (12, 10))
    expected = token_ngrams(tokens[::2, ::3].copy(), buckets=50)
    equal(token_ngrams(tokens[::2, ::3], buckets=50), expected)
    equal(token_ngrams(tokens.astype(np.int32)[::2, ::3], buckets=50), expected)
    equal(token_ngrams(tokens.astype(">i8")[::2, ::3], buckets=50), expected)
    flat, offsets = ragged(rng, 7, dtype=np.int32)
    equal(
        token_ngrams(flat, offsets, buckets=50),
        token_ngrams(flat.astype(np.int64), offsets.astype(np.int64), buckets=50),
    )
    for shape in ((0, 4), (4, 0), (0, 0)):
        result = token_ngrams(np.zeros(shape, np.int64), buckets=9)
        assert result.ids.shape == (0,)
        assert result.offsets.tolist() == [0] * shape[0]
    assert token_ngrams(np.zeros(0, np.int64), np.zeros(0, np.int64), buckets=9).offsets.shape == (0,)
    assert token_ngrams(np.zeros(0, np.int64), np.zeros(3, np.int64), buckets=9).offsets.tolist() == [0, 0, 0]


I = np.arange(6)  # noqa: E741


@pytest.mark.parametrize(
    "tokens, offsets, options, error, message",
    [
        (I, None, {}, ValueError, "tokens is 1-d: it needs offsets"),
        (I.reshape(2, 3), np.array([0, 1]), {}, ValueError, "takes no offsets"),
        (I.reshape(1, 2, 3), None, {}, ValueError, "tokens must be 2-d"),
        (I.reshape(2, 3) * 1.0, None, {}, TypeError, "tokens has dtype float64"),
        (I.reshape(2, 3).astype(np.uint8), None, {}, TypeError, "tokens has dtype uint8"),
        ([[1, 2]], None, {}, TypeError, "tokens must be a NumPy"),
        (I, [0, 1], {}, TypeError, "offsets must be a NumPy"),
        (I, np.array([0.0]), {}, TypeError, "offsets has dtype float64"),
        (I, np.array([[0]]), {}, ValueError, "offsets must be 1-d"),
        (I, np.array([1, 2]), {}, ValueError, r"offsets\[0\] must be 0"),
        (I, np.array([0, 4, 2]), {}, ValueError, r"offsets\[1\] is 4, offsets\[2\] is 2"),
        (I, np.array([0, 7]), {}, ValueError, r"offsets\[1\] is 7; tokens has only 6"),
        (I, np.zeros(0, np.int64), {}, ValueError, "offsets is empty"),
        (I.reshape(2, 3), None, {"order": 0}, ValueError, "order must be"),
        (I.reshape(2, 3), None, {"buckets": 0}, ValueError, "buckets must be"),
        (I.reshape(2, 3), None, {"first_bucket": -1}, ValueError, "first_bucket must be"),
        (I.reshape(2, 3), None, {"unigrams": 1}, TypeError, "unigrams must be a bool"),
        (I.reshape(2, 3), None, {"first_bucket": 5}, IndexError, r"tokens\[1, 2\] is 5"),
        (-I, np.array([0]), {"first_bucket": 5}, IndexError, r"tokens\[1\] is -1"),
    ],
)
def test_wrong_tokens(tokens, offsets, options, error, message):
    with pytest.raises(error, match=message):
        token_ngrams(tokens, offsets, **{"buckets": 10, **options})


def test_tokens_outside_the_vocabulary_may_be_hashed():
    options = {"buckets": 10, "first_bucket": 5, "unigrams": False}
    equal(token_ngrams(I.reshape(2, 3), **options), reference.token_ngrams(I.reshape(2, 3), **options))


# ---------------------------------------------------------------- torch
def test_torch_tensors():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    tokens, offsets = ragged(rng, 9)
    for t, o in ((tokens, offsets), (rng.integers(0, 9, (4, 5)), None)):
        got = token_ngrams(
            torch.from_numpy(t),
            None if o is None else torch.from_numpy(o),
            order=3,
            buckets=50,
            first_bucket=1000,
        )
        assert isinstance(got.ids, torch.Tensor)
        equal(
            tuple(a.numpy() for a in got),
            reference.token_ngrams(t, o, order=3, buckets=50, first_bucket=1000),
        )
    with pytest.raises(TypeError, match="offsets"):
        token_ngrams(torch.from_numpy(tokens), offsets, buckets=50)


@pytest.mark.parametrize("square", [True, False])
def test_torch_op(square):
    torch = pytest.importorskip("torch")
    import lutra.torch_ops  # noqa: F401

    rng = np.random.default_rng(3)
    tokens, offsets = (rng.integers(0, 9, (4, 5)), None) if square else ragged(rng, 5)
    t, o = torch.from_numpy(tokens), None if square else torch.from_numpy(offsets)
    torch.library.opcheck(torch.ops.lutra.token_ngrams, (t, o, 3, 100, 1000, True))
    torch.library.opcheck(torch.ops.lutra.token_ngrams, (t, o, 2, 100, 0, False))


def test_torch_compile():
    torch = pytest.importorskip("torch")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def bags(tokens):
        result = token_ngrams(tokens, order=3, buckets=100, first_bucket=50)
        return result.ids + 1, result.offsets

    for shape in ((3, 4), (5, 9), (2, 1)):
        tokens = torch.arange(shape[0] * shape[1]).reshape(shape)
        ids, offsets = bags(tokens)
        expected = reference.token_ngrams(tokens.numpy(), order=3, buckets=100, first_bucket=50)
        equal((ids.numpy() - 1, offsets.numpy()), expected)
