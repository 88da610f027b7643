"""FGrams, count_fgrams and longest_match against dictionaries."""

import copy
import pickle

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.address import longest_match
from lutra.address._key_table import Counts, KeyTable, lookup
from lutra.reference import fgrams as reference
from lutra.vocab import FGrams, count_fgrams

rng = np.random.default_rng(0)


def some_ngrams(size, longest, vocabulary=6, closed=False):
    """Distinct n-grams; not closed: most of their ends are no n-grams."""
    out = {}
    while len(out) < size:
        n = int(rng.integers(2, longest + 1))
        g = tuple(rng.integers(0, vocabulary, n).tolist())
        for k in range(2, n + 1) if closed else [n]:
            out[g[-k:]] = None
    return list(out)[:size]


@pytest.mark.parametrize("n", [0, 1, 2, 17, 63, 64, 65, 97, 20_000])
def test_match(n, simd_level, threads):
    ngrams = some_ngrams(300, 5)
    fgrams = FGrams(ngrams)
    tokens = rng.integers(0, 6, n).astype(np.int32 if n % 2 else np.int64)
    cuts = np.sort(rng.integers(0, n + 1, 7))
    offsets = np.concatenate([[0], cuts])  # with empty sequences
    for where in (None, offsets):
        got, want = longest_match(tokens, fgrams, where), reference.longest_match(tokens, ngrams, where)
        assert got.ids.dtype == np.int64 and got.lengths.dtype == np.int32
        assert np.array_equal(got.ids, want[0]) and np.array_equal(got.lengths, want[1])


def test_match_of_rows_and_strides():
    ngrams = some_ngrams(200, 4)
    fgrams = FGrams(ngrams)
    tokens = rng.integers(0, 6, (3, 7, 40))
    want = reference.longest_match(tokens, ngrams)
    assert np.array_equal(longest_match(tokens, fgrams).ids, want[0])
    part = tokens[:, ::2, ::3]
    assert np.array_equal(longest_match(part, fgrams).ids, reference.longest_match(part, ngrams)[0])
    assert longest_match(tokens[:, :0], fgrams).ids.shape == (3, 0, 40)
    assert longest_match(tokens[..., :0], fgrams).ids.shape == (3, 7, 0)
    assert (longest_match(tokens, FGrams([])).ids == -1).all()


def test_large_tokens_and_chains(monkeypatch):
    top = (1 << 30) - 1
    ngrams = [(top, top), (0, top, top), (top, 0), (0, 0), (0, 0, 0, 0)]
    tokens = np.array([0, top, top, 0, 0, 0, 0, 0])
    assert np.array_equal(
        longest_match(tokens, FGrams(ngrams)).ids, reference.longest_match(tokens, ngrams)[0]
    )
    # full buckets, so that most keys have gone on to other ones
    monkeypatch.setattr("lutra.address._key_table.PER_BUCKET", 4)
    keys = rng.permutation(10_000)[:4_000]
    table = KeyTable(4_000)
    assert table.insert(keys, np.arange(4_000)) == -1
    assert np.array_equal(lookup(np.arange(10_000), table.buckets)[keys], np.arange(4_000))
    assert (lookup(np.arange(-1, 10_000), table.buckets) >= 0).sum() == 4_000


def test_table_is_the_references(simd_level):
    keys, values = rng.integers(0, 1 << 62, 3_000), rng.integers(0, 1 << 31, 3_000)
    table = KeyTable(3_000)
    assert table.insert(keys, values) == -1
    want = reference.empty_table(len(table.buckets))
    assert reference.insert(keys, values, want) == -1
    assert np.array_equal(table.buckets, want)
    asked = np.concatenate([keys, keys + 1, [-1]])
    assert np.array_equal(lookup(asked, want), reference.lookup(asked, want))
    assert table.insert(keys[5:6], values[5:6]) == 0


@pytest.mark.parametrize("size", [0, 1, 7, 60, 100_000])
@pytest.mark.parametrize("longest", [2, 3, 5])
def test_counts(size, longest):
    tokens = np.minimum(rng.zipf(1.5, 1_000), 25)
    rows = tokens.reshape(20, 50).astype(np.uint16)
    for given, parts in ((tokens, [tokens]), (rows, rows), ([tokens, rows], [tokens, *rows])):
        got = count_fgrams(given, size, longest, separator=7)
        want = reference.count_fgrams(parts, size, longest, 2, 7)
        assert list(zip(got, got.counts.tolist())) == want and got.lost == 0


def test_counts_in_small_chunks(monkeypatch, tmp_path):
    tokens = np.minimum(rng.zipf(1.5, 800), 12)
    want = list(count_fgrams([tokens, tokens.reshape(4, 200)], 500, 4))
    np.save(tmp_path / "a.npy", tokens.astype(np.uint16))
    np.save(tmp_path / "b.npy", tokens.reshape(4, 200))
    monkeypatch.setattr("lutra.vocab._fgram_counts._CHUNK", 37)
    assert list(count_fgrams([tmp_path / "a.npy", tmp_path / "b.npy"], 500, 4)) == want


def test_counts_with_little_memory():
    tokens = np.concatenate([rng.integers(0, 300, 30_000), np.tile([1, 2, 3, 4], 500)])
    exact = dict(zip(*[(f := count_fgrams(tokens, 10**6, 3)), f.counts.tolist()]))
    small = Counts(1_000)
    for part in np.array_split(tokens, 50):
        small.add(part[:-1] << 32 | part[1:])
        assert len(small) <= 1_000
    keys, counts = small.most(1)
    assert small.lost > 0
    for key, n in zip(keys.tolist(), counts.tolist()):
        true = sum(int(((p[:-1] << 32 | p[1:]) == key).sum()) for p in np.array_split(tokens, 50))
        assert true - small.lost <= n <= true
    few = count_fgrams(tokens, 10, 3, max_candidates=2_000)
    assert {(1, 2), (2, 3), (3, 4), (1, 2, 3)} <= set(few)
    for g, n in zip(few, few.counts.tolist()):
        assert exact[g] - few.lost <= n <= exact[g]


def test_find_and_contains():
    ngrams = some_ngrams(100, 4)
    fgrams = FGrams(ngrams)
    assert fgrams.find(ngrams).tolist() == list(range(100))
    absent = [g for g in some_ngrams(300, 5) if g not in set(ngrams)]
    assert (fgrams.find(absent) == -1).all() and (fgrams.find([(1,), (1, 2, 3, 4, 5, 6)]) == -1).all()
    assert ngrams[3] in fgrams and absent[0] not in fgrams and fgrams[3] == ngrams[3]
    assert list(fgrams.most_frequent(10)) == ngrams[:10]


def test_files(tmp_path):
    fgrams = count_fgrams(rng.integers(0, 9, 5_000), 200, 4)
    path = tmp_path / "f.safetensors"
    fgrams.save(path)
    tokens = rng.integers(0, 9, 1_000)
    want = longest_match(tokens, fgrams)
    for mmap in (True, False):
        again = FGrams.load(path, mmap=mmap)
        assert again == fgrams and again.counts.tolist() == fgrams.counts.tolist()
        for f in (again, pickle.loads(pickle.dumps(again)), copy.deepcopy(again)):
            assert np.array_equal(longest_match(tokens, f).ids, want.ids)
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=r"f\.safetensors"):
        FGrams.load(path)
    lutra.index.Flat(4).save(path)
    with pytest.raises(ValueError, match="not an FGrams"):
        FGrams.load(path)


def test_bad_input():
    with pytest.raises(ValueError, match=r"ngrams\[2\] is \(1, 2\), which is there twice"):
        FGrams([(1, 2), (3, 4), (1, 2)])
    with pytest.raises(ValueError, match=r"ngrams\[0\] has 1 tokens"):
        FGrams([(1,)])
    for bad in ([(1, 1 << 30)], [(1, -1, 2)], np.array([[-1, 2, 3]])):
        with pytest.raises((IndexError, ValueError)):
            FGrams(bad)
    with pytest.raises(ValueError, match="counts must be 1 integers"):
        FGrams([(1, 2)], [1, 2])
    fgrams = FGrams([(1, 2)])
    with pytest.raises(IndexError, match=r"tokens\[1\] is -1"):
        longest_match(np.array([1, -1]), fgrams)
    with pytest.raises(TypeError, match="vocabulary must be a"):
        longest_match(np.array([1]), {})
    with pytest.raises(ValueError, match="offsets go with 1-d"):
        longest_match(np.array([[1]]), fgrams, np.array([0]))
    with pytest.raises(TypeError, match="dtype"):
        longest_match(np.array([1.0]), fgrams)
    with pytest.raises(TypeError, match="iterator"):
        count_fgrams(iter([np.arange(3)]), 5)
    with pytest.raises(TypeError, match=r"tokens\[0\] must be"):
        count_fgrams([np.ones(3)], 5)
    with pytest.raises(IndexError, match="holds -2"):
        count_fgrams(np.array([1, -2]), 5)


def test_torch():
    torch = pytest.importorskip("torch")
    from lutra.address._longest_match import composition

    ngrams = some_ngrams(300, 5)
    fgrams = FGrams(ngrams)
    tokens = torch.from_numpy(rng.integers(0, 6, (4, 50)))
    want = reference.longest_match(tokens.numpy(), ngrams)
    got = longest_match(tokens, fgrams)
    assert np.array_equal(got.ids, want[0]) and np.array_equal(got.lengths, want[1])
    on_device = composition(tokens, np.arange(0, 201, 50), fgrams.table_for(tokens), 300, 5)
    assert np.array_equal(on_device[0], want[0]) and np.array_equal(on_device[1], want[1])
    offsets = torch.tensor([0, 20, 20])
    got = longest_match(tokens[0], fgrams, offsets)
    assert np.array_equal(got.ids, reference.longest_match(tokens[0].numpy(), ngrams, offsets.numpy())[0])
    torch.library.opcheck(
        torch.ops.lutra.longest_match, (tokens, None, fgrams.table_for(tokens), 300, 5),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


@pytest.mark.skipif(_backend.core is None, reason="compares the kernel")
def test_without_compiled_code(monkeypatch):
    from lutra.address import _longest_match as op

    ngrams = some_ngrams(300, 5)
    fgrams = FGrams(ngrams)
    tokens = rng.integers(0, 6, 200)
    got = op._walk(tokens, np.array([0, 77, 200]), fgrams.buckets, 300, 5)
    want = longest_match(tokens, fgrams, np.array([0, 77]))
    assert np.array_equal(got[0], want.ids) and np.array_equal(got[1], want.lengths)
    counted = count_fgrams(tokens, 50, 4)
    monkeypatch.setattr(_backend, "core", None)
    assert np.array_equal(FGrams(ngrams).buckets, fgrams.buckets)
    assert list(count_fgrams(tokens, 50, 4)) == list(counted)
