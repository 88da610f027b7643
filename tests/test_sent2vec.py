"""lutra.Sent2Vec: the kernel against the reference, the reference against finite differences."""

import json
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

import lutra
from lutra import Sent2Vec, VectorStore, _backend
from lutra.reference import sent2vec as reference
from lutra.sent2vec import _training

compiled = pytest.mark.skipif(_backend.core is None, reason="no compiled module")


# ---------------------------------------------------------------- the step
def test_step_goes_down_the_gradient():
    """Against central differences, with a row twice in the context and a negative drawn twice."""
    rng = np.random.default_rng(0)
    rows, output = rng.standard_normal((9, 5)), rng.standard_normal((6, 5))
    bag, target, negatives, lr = [0, 3, 3, 7, 5], 2, [4, 1, 4], 0.3

    def loss(rows, output):
        h = rows[bag].mean(0)
        return np.log1p(np.exp(-output[target] @ h)) + sum(np.log1p(np.exp(output[n] @ h)) for n in negatives)

    new_rows, new_output = rows.copy(), output.copy()
    assert reference.step(new_rows, new_output, bag, target, negatives, lr) == pytest.approx(
        loss(rows, output)
    )
    for which, before, after in ((0, rows, new_rows), (1, output, new_output)):
        for at in np.ndindex(before.shape):
            ends = []
            for e in (1e-5, -1e-5):
                moved = [rows.copy(), output.copy()]
                moved[which][at] += e
                ends.append(loss(*moved))
            assert after[at] - before[at] == pytest.approx(-lr * (ends[0] - ends[1]) / 2e-5, abs=1e-8)


def test_context_is_the_sentence_without_the_target():
    words, n_words, buckets = [3, 5, 3, 7], 10, 1000

    def gram(*values):
        h = values[0]
        for v in values[1:]:
            h = (h * 116049371 + v) % 2**64
        return n_words + h % buckets

    assert reference.context(words, 1, set(), n_words, buckets, 1) == [3, 0, 3, 7]
    assert reference.context(words, 1, set(), n_words, buckets, 2) == [
        3, 0, 3, 7, gram(3, 0), gram(0, 3), gram(3, 7),
    ]  # fmt: skip
    assert reference.context(words, 1, {3}, n_words, buckets, 3) == [
        3, 0, 3, 7, gram(3, 0), gram(3, 0, 3), gram(0, 3),
    ]  # fmt: skip
    # nothing dropped, no target: what inference takes
    ids = lutra.address.token_ngrams(np.array([words]), order=3, buckets=buckets, first_bucket=n_words).ids
    whole = reference.context(words, -1, set(), n_words, buckets, 3)
    assert sorted(ids.tolist()) == sorted(whole)


def test_draws():
    """Negatives follow their distribution and words are targets as often as they should."""
    weights = np.array([1.0, 5, 0.5, 3, 0.001])
    alias = reference.alias_table(weights)
    r = np.array([next(reference.draws(7, i)) for i in range(40_000)], np.uint64)
    column = ((r >> np.uint64(32)) * np.uint64(5)) >> np.uint64(32)
    entry = alias[column.astype(int)]
    low = np.uint64(0xFFFFFFFF)
    word = np.where((r & low) < (entry & low), column, entry >> np.uint64(32))
    share = np.bincount(word.astype(int), minlength=5) / len(r)
    assert np.abs(share - weights / weights.sum()).max() < 0.01
    keep = _training.keep_thresholds(np.array([100, 1000, 5]), 10_000, 1e-3, 10)
    assert keep.tolist() == [0, int((0.1**0.5 + 0.1) * 2**32), int((0.01**0.5 + 0.01) * 2**32), 0]
    assert _training.keep_thresholds(np.array([100]), 200, 0, 0).tolist() == [0, 2**32]


# ---------------------------------------------------------------- the kernel
def corpus(n_words, lengths, seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = (1 + (n_words - 1) * rng.random(offsets[-1]) ** 2).astype(np.int32)
    return tokens, offsets


def run(kernel, dim, lengths, *, order=2, buckets=50, n_words=12, dropout=2, negatives=3, threads=1, lr=0.2):
    """The tables after two epochs, by the kernel or by the reference."""
    tokens, offsets = corpus(n_words, lengths)
    rng = np.random.default_rng(1)
    rows, output = _training.empty_rows(n_words + buckets, dim), _training.empty_rows(n_words, dim)
    rows[:, :dim] = rng.standard_normal((n_words + buckets, dim)) / dim**0.5
    output[:, :dim] = rng.standard_normal((n_words, dim)) / dim**0.5
    keep = np.array([0] + [2**32 if w % 3 else 2**31 for w in range(1, n_words)], np.int64)
    alias = reference.alias_table(np.arange(1.0, n_words))
    n, last, losses = len(tokens), len(lengths), []
    for epoch in range(2):
        if kernel:
            loss, count, bad = _backend.core.sent2vec(
                rows, output, n_words, buckets, rows.shape[1], tokens, n, offsets, 0, last, order, dropout,
                negatives, keep, alias, lr, 2.0 * n, epoch * n, 5, threads,
            )  # fmt: skip
            assert bad == -1
        else:
            loss, count = reference.train(
                rows, output, tokens, offsets, 0, last, n_words=n_words, buckets=buckets, order=order,
                dropout=dropout, negatives=negatives, keep=keep, alias=alias, lr=lr, total=2 * n,
                before=epoch * n, seed=5,
            )  # fmt: skip
        losses.append((loss, count))
    assert not rows[:, dim:].any() and not output[:, dim:].any()
    return rows[:, :dim], output[:, :dim], losses


LENGTHS = (0, 1, 2, 3, 7, 1, 20, 0, 5)


def compare(dim, lengths=LENGTHS, **options):
    rows, output, losses = run(True, dim, lengths, **options)
    want_rows, want_output, want_losses = run(False, dim, lengths, **options)
    assert np.abs(rows - want_rows).max() < 2e-5 and np.abs(output - want_output).max() < 2e-5
    for got, want in zip(losses, want_losses):
        assert got[1] == want[1] and got[0] == pytest.approx(want[0], rel=1e-5)
    assert sum(count for _, count in losses) > 0


@compiled
@pytest.mark.parametrize("dim", (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97))
def test_kernel_dims(dim, simd_level):
    compare(dim)


@compiled
@pytest.mark.parametrize("order", (1, 2, 3, 5))
@pytest.mark.parametrize("dropout", (0, 1, 4, 100))
def test_kernel_contexts(order, dropout, simd_level):
    compare(20, order=order, dropout=dropout)


@compiled
@pytest.mark.parametrize("buckets", (1, 2, 7))
def test_kernel_where_hashes_meet(buckets, simd_level):
    """n-grams with one row: of the sentence, of the target's place, of both."""
    compare(17, buckets=buckets, order=3, lengths=(3, 30, 2, 9))


@compiled
@pytest.mark.parametrize(("negatives", "n_words"), [(1, 3), (5, 3), (40, 4), (10, 30)])
def test_kernel_negatives(negatives, n_words, simd_level):
    """Few words: negatives come many times, and are drawn again where they are the target."""
    compare(9, negatives=negatives, n_words=n_words, lr=0.05)


@compiled
def test_kernel_long_sentences():
    compare(8, lengths=(700, 1, 40), n_words=200, buckets=3000, lr=0.05)


@compiled
def test_kernel_bad_token():
    tokens, offsets = corpus(9, (5, 5))
    tokens[7] = 9
    tables = [_training.empty_rows(9 + 5, 4), _training.empty_rows(9, 4)]
    alias, keep = reference.alias_table(np.ones(8)), np.full(9, 2**32)
    arguments = [*tables, 9, 5, 16, tokens, 10, offsets, 0, 2, 2, 0, 1, keep, alias, 0.1, 10.0, 0, 0]
    assert _backend.core.sent2vec(*arguments, 1)[2] == 7
    with pytest.raises(ValueError, match="sentence 1"):
        arguments[6] = 9
        _backend.core.sent2vec(*arguments, 1)


# ---------------------------------------------------------------- learning
def topics(n=400, seed=0):
    """Sentences of one of four topics, each with 12 words of its own among 20 that all use."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 4, n)
    sentences = []
    for t in topic:
        own = [f"topic{t}_{i}" for i in rng.integers(0, 12, 5)]
        words = own + [f"common{i}" for i in rng.integers(0, 20, 5)]
        sentences.append(" ".join(rng.permutation(words)))
    return sentences, topic


def same_topic_first(model, sentences, topic):
    """How often a sentence's nearest neighbour by cosine has its topic."""
    v = model.transform(sentences)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    scores = v @ v.T
    np.fill_diagonal(scores, -2)
    return (topic[scores.argmax(1)] == topic).mean()


SMALL = {"dim": 16, "buckets": 2000, "min_count": 1, "negatives": 5, "subsample": 0}


@pytest.mark.parametrize("threads", (1, 2))
def test_learns_topics(threads):
    sentences, _ = topics(400 if _backend.core else 60)
    unseen, unseen_topic = topics(100, seed=1)
    epochs = 20 if _backend.core else 3
    model = Sent2Vec(**SMALL, epochs=epochs, threads=threads).fit(sentences)
    assert model.loss_[-1] < (0.75 if _backend.core else 1) * model.loss_[0]
    if _backend.core is None:
        return
    assert same_topic_first(model, unseen, unseen_topic) > 0.95
    untrained = Sent2Vec(**SMALL, epochs=1, lr=1e-9).fit(sentences)
    assert same_topic_first(untrained, unseen, unseen_topic) < 0.9
    near = [word for word, _ in model.most_similar("topic2_3", 5)]
    assert len(near) == 5 and all(word.startswith("topic2_") for word in near) and "topic2_3" not in near


@compiled
def test_same_bits():
    sentences, _ = topics(150)
    models = [Sent2Vec(**SMALL, epochs=2, seed=s).fit(sentences) for s in (3, 3, 4)]
    assert np.array_equal(models[0].table_, models[1].table_) and models[0].loss_ == models[1].loss_
    assert not np.array_equal(models[0].table_, models[2].table_)


# ---------------------------------------------------------------- the estimator
@pytest.fixture(scope="module")
def model():
    sentences = ["the cat sat", "the dog sat down", "", "a cat", "naïve 日本 cat dog"] * 3
    return Sent2Vec(dim=9, buckets=100, min_count=2, epochs=2, negatives=2, lr=0.05).fit(sentences)


def test_transform(model):
    assert model.words_ == ["cat", "the", "sat", "dog", "down", "a", "naïve", "日本"]  # ties: the first seen
    assert model.counts_.tolist() == [9, 6, 6, 6, 3, 3, 3, 3]
    table, index = model.table_, {w: i + 1 for i, w in enumerate(model.words_)}
    assert table.shape == (1 + len(index) + 100, 9) and model.output_.shape == (1 + len(index), 9)
    texts = ["the cat", "", "unheard", "unheard dog", ["naïve", "日本", "cat"], "<PLACEHOLDER>"]
    got = model.transform(texts)
    for text, vector in zip(texts, got):
        words = [index[w] for w in (text.split() if isinstance(text, str) else text) if w in index]
        rows = reference.context(words, -1, set(), 1 + len(index), 100, 2)
        want = table[rows].mean(0) if rows else np.zeros(9)
        assert np.allclose(vector, want, atol=1e-6)
    assert np.array_equal(model.embed("the cat"), got[0]) and not got[1].any() and not got[5].any()
    assert got.dtype == np.float32 and model.transform([]).shape == (0, 9)
    assert np.array_equal(model.vectors_[2], table[3])


def test_sources_of_sentences(tmp_path):
    lines = ["the cat sat", "the\tdog  sat", "", "The cat"] * 4
    (tmp_path / "s.txt").write_text("\n".join(lines) + "\r\n", encoding="utf-8")
    options = {**SMALL, "epochs": 1, "lowercase": True}
    models = [
        Sent2Vec(**options).fit(source)
        for source in (lines, [line.split() for line in lines], tmp_path / "s.txt", str(tmp_path / "s.txt"))
    ]
    for m in models:
        assert m.words_ == ["the", "cat", "sat", "dog"] and m.counts_.tolist() == [12, 8, 8, 4]
        assert np.array_equal(m.table_, models[0].table_)
    assert np.array_equal(models[0].embed("THE cat"), models[0].embed(["the", "cat"]))
    assert Sent2Vec(**SMALL, epochs=1, max_words=2).fit(lines).words_ == ["the", "cat"]


def test_manners_of_scikit_learn(model):
    base = pytest.importorskip("sklearn.base")
    copy = base.clone(model)
    assert copy.get_params() == model.get_params() and not hasattr(copy, "words_")
    assert copy.set_params(dim=4).dim == 4
    with pytest.raises(ValueError, match="'width'"):
        copy.set_params(width=3)
    with pytest.raises(ValueError, match="epochs"):
        copy.set_params(dim=5, epochs=0)
    assert copy.dim == 4 and repr(Sent2Vec(dim=5)) == "Sent2Vec(dim=5)"
    with pytest.raises(ValueError, match="call fit"):
        copy.transform(["a"])
    sentences = ["a b c", "b c d"] * 5
    two = Sent2Vec(**SMALL, epochs=1)
    assert np.array_equal(two.fit_transform(sentences), two.transform(sentences))


def test_files(model, tmp_path):
    path, texts = tmp_path / "m.safetensors", ["the cat sat", "dog"]
    model.save(path)
    want = model.transform(texts)
    for m in (Sent2Vec.load(path), Sent2Vec.load(path, mmap=False), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(m.transform(texts), want) and m.get_params() == model.get_params()
        assert (
            m.words_ == model.words_ and m.loss_ == model.loss_ and np.array_equal(m.output_, model.output_)
        )
        assert np.array_equal(m.counts_, model.counts_)
    Sent2Vec.load(path).save(path)  # a mapped one onto itself
    assert np.array_equal(Sent2Vec.load(path).transform(texts), want)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"truncated|not a valid"):
        Sent2Vec.load(path)
    size = int.from_bytes(data[:8], "little")
    for old, new, match in (
        (b'"version":"1"', b'"version":"7"', "version"), (b'"sent2vec"', b'"sent2vex"', "sent2vex"),
    ):  # fmt: skip
        assert old in data[: 8 + size]
        path.write_bytes(data.replace(old, new, 1))
        with pytest.raises(ValueError, match=match):
            Sent2Vec.load(path)
    header = json.loads(data[8 : 8 + size])
    config = json.loads(header["__metadata__"]["config"])
    for key, value in (("rows", config["rows"] + 1), ("dim", 8), ("params", {"dim": -1}), ("loss", None)):
        header["__metadata__"]["config"] = json.dumps({**config, key: value})
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 64)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        with pytest.raises(ValueError, match=r"m\.safetensors"):
            Sent2Vec.load(path)
    VectorStore.from_arrays(["a"], np.ones((1, 2))).save(path)
    with pytest.raises(ValueError, match="'vector store', not a Sent2Vec"):
        Sent2Vec.load(path)


def test_words_go_elsewhere(model, tmp_path):
    model.save_text(tmp_path / "w.vec")
    store = VectorStore.from_text(tmp_path / "w.vec")
    assert list(store) == model.words_ and np.array_equal(store[model.words_], model.vectors_)
    assert np.array_equal(model.to_vector_store(oov="error")["cat"], model.embed("cat"))


def test_form_of_the_original(model, tmp_path):
    path = tmp_path / "m.bin"
    model.save_epfml(path)
    m = Sent2Vec.from_epfml(path)
    assert np.array_equal(m.transform(["the cat sat down"]), model.transform(["the cat sat down"]))
    assert m.words_ == model.words_ and np.array_equal(m.output_, model.output_)
    assert (m.dim, m.word_ngrams, m.buckets, m.negatives) == (9, 2, 100, 2)
    unigrams = Sent2Vec(**SMALL, word_ngrams=1, epochs=1).fit(["a b c"] * 3)
    unigrams.save_epfml(tmp_path / "u.bin")
    assert np.array_equal(Sent2Vec.from_epfml(tmp_path / "u.bin").table_, unigrams.table_)
    data = path.read_bytes()
    head = 8 + 12 * 4 + 8
    cases = [
        (data[:7], "not a model"), (b"x" + data[1:], "not a model"),
        (data[:4] + b"\x0c" + data[5:], "version 11"),
        (data[:36] + struct.pack("<i", 3) + data[40:], "supervised"), (data[:-1], "truncated in the output"),
        (data[: head + 40], "truncated in word"), (data[:20], "truncated"),
        (data[: head + 20] + struct.pack("<q", 3) + data[head + 28 :], "pruned"),
        (data[:8] + struct.pack("<i", 10) + data[12:], "input matrix is"),
        (data.replace(b"<PLACEHOLDER>", b"<PLACEHOLDES>"), "first word"),
    ]  # fmt: skip
    for damaged, match in cases:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=match):
            Sent2Vec.from_epfml(path)
    word = model.words_[0].encode() + b"\0"
    path.write_bytes(data.replace(word, b"\xff" + word[1:], 1))  # no UTF-8: a word that no text holds
    assert Sent2Vec.from_epfml(path).words_[0].endswith(" #1")


def test_bad_input(tmp_path):
    for options, error, match in (
        ({"lr": float("nan")}, ValueError, "lr"), ({"lr": 0}, ValueError, "lr"),
        ({"dim": 0}, ValueError, "dim"),
        ({"dim": 2.5}, TypeError, "dim"), ({"word_ngrams": 65}, ValueError, "word_ngrams"),
        ({"subsample": -1}, ValueError, "subsample"), ({"threads": 0}, ValueError, "threads"),
        ({"seed": -1}, ValueError, "seed"), ({"max_words": 1}, ValueError, "max_words"),
        ({"lowercase": 1}, TypeError, "lowercase"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            Sent2Vec(**options)
    m = Sent2Vec(**SMALL, epochs=1)
    for sentences, error, match in (
        ([], ValueError, "corpus is empty"), (["", " "], ValueError, "corpus is empty"),
        (["a", "b"], ValueError, "nothing to learn"), (3, TypeError, "sentences"),
        (b"a b", TypeError, "bytes"),
        (["a b", 3], TypeError, r"sentences\[1\]"), ([["a b"]], ValueError, "'a b' is not one word"),
        ([["a", ""]], ValueError, "not one word"), (["a \ud800"], ValueError, "surrogate"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            m.fit(sentences)
    with pytest.raises(ValueError, match=r"min_count = 5 times.*occurs 3 times"):
        Sent2Vec(min_count=5).fit(["a b"] * 3)
    with pytest.raises(ValueError, match="nothing to learn"):
        Sent2Vec(**{**SMALL, "min_target_count": 9}).fit(["a b"] * 3)
    with pytest.raises(FileNotFoundError):
        m.fit(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"one two\ncaf\xe9 two\n")
    with pytest.raises(ValueError, match=r"latin\.txt, line 2"):
        m.fit(tmp_path / "latin.txt")
    with pytest.raises(FloatingPointError, match="too large"), np.errstate(all="ignore"):
        Sent2Vec(**{**SMALL, "lr": 1e30, "epochs": 3}).fit(["a b c d", "b c d a"] * 20)
    assert not hasattr(m, "words_")
    m.fit(["a b c"] * 3)
    for query, error, match in (
        ("zz", KeyError, "zz"),
        (np.zeros(3), ValueError, "shape"),
        ("a", ValueError, "k"),
    ):
        with pytest.raises(error, match=match):
            m.most_similar(query, 0 if match == "k" else 3)
    with pytest.raises(TypeError, match="sequence"):
        m.transform("a b")


def test_import_needs_no_torch():
    program = "import sys, lutra; lutra.Sent2Vec; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
