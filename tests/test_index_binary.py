"""lutra.index.Binary: packed bits and vectors in, distances and rescored results out, files."""

import numpy as np
import pytest
import safetensors.numpy

import lutra
from lutra.index import Binary, Flat, load
from lutra.reference import binary as reference


def vectors(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def bits(x, threshold=0.0):
    return np.packbits(x > threshold, axis=1, bitorder="little")


@pytest.mark.parametrize("metric", ["hamming", "jaccard"])
@pytest.mark.parametrize("d", [1, 7, 24, 65])
def test_search_is_the_reference(metric, d):
    x, q = vectors(90, d), vectors(7, d, 1)
    ids = np.random.default_rng(2).choice(10**12, 90, replace=False)
    by_vectors, by_bits = Binary(d, metric), Binary(d, metric)
    by_vectors.add(x, ids)
    dirty = bits(x)
    if d % 8:
        dirty[:, -1] |= 255 << d % 8 & 255  # spare bits are not looked at
    by_bits.add(dirty, ids)
    for k in (1, 10, 100):
        want, positions = reference.binary(bits(q), bits(x), k, metric)
        want_ids = np.where(positions < 0, -1, ids[positions])
        for index in (by_vectors, by_bits):
            for query in (q, bits(q)) if d > 1 else (bits(q),):
                got = index.search(query, k)
                np.testing.assert_array_equal(got.ids, want_ids)
                np.testing.assert_array_equal(got.scores, want)
    np.testing.assert_array_equal(by_bits.reconstruct(ids[:5]), np.where(x[:5] > 0, 1, -1))
    assert by_bits.nbytes == 90 * ((d + 7) // 8 + 8)


def test_rescoring():
    """Each stage against NumPy, with so many candidates that none can be missed."""
    d, n = 40, 60
    x, q = vectors(n, d), vectors(9, d, 1)
    signed = np.where(x > 0.1, 1, -1)
    by_bits = np.argsort(-((q - np.float32(0.1)) @ signed.T), axis=1, kind="stable")
    for refine in ("float32", "float16", "int8"):
        for similarity in ("cosine", "ip", "l2"):
            index = Binary(d, refine=refine, similarity=similarity, threshold=0.1)
            index.add(x)
            got = index.search(q, 5, rescore="bits", refine_factor=20)
            np.testing.assert_array_equal(got.ids, by_bits[:, :5])
            stored = index.reconstruct(np.arange(n))
            np.testing.assert_allclose(stored, x, atol={"float32": 0, "float16": 2e-3, "int8": 0.02}[refine])
            exact = Flat(d, similarity)
            exact.add(stored)
            want = exact.search(q, 5)
            for options in ({}, {"rescore": "vectors"}, {"rescore": "both"}):
                got = index.search(q, 5, refine_factor=20, **options)
                np.testing.assert_array_equal(got.ids, want.ids)
                np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4, atol=1e-5)
    # three stages, each of which must leave k * factor to the next
    got = index.search(q, 3, rescore="both", refine_factor=2)
    for i in range(len(q)):
        first = reference.binary(bits(q[i : i + 1], 0.1), bits(x, 0.1), 12, "hamming")[1][0]
        second = [j for j in by_bits[i] if j in first][:6]
        assert set(got.ids[i]) == set(sorted(second, key=lambda j: ((q[i] - stored[j]) ** 2).sum())[:3])


def test_defaults_and_attributes():
    x, q = vectors(50, 16), vectors(3, 16, 1)
    plain, kept = Binary(16), Binary(16, refine="float32")
    plain.add(x)
    kept.add(x)
    assert plain.rescore is None and kept.rescore == "vectors" and kept.refine_factor == 4
    np.testing.assert_array_equal(plain.search(q, 4).scores, plain.search(bits(q), 4).scores)
    np.testing.assert_allclose(kept.search(x[:5], 1).scores, 1, rtol=1e-5)  # a cosine
    kept.rescore = None
    np.testing.assert_array_equal(kept.search(q, 4).ids, plain.search(q, 4).ids)
    plain.rescore, plain.refine_factor = "bits", 12
    np.testing.assert_array_equal(
        plain.search(q, 4).ids, plain.search(q, 4, rescore="bits", refine_factor=12).ids
    )
    assert plain.search(bits(q), 4).scores.dtype == np.float32  # packed queries: distances


def test_median_thresholds():
    """Vectors away from zero: their signs say nothing, bits above the median half of what a bit can."""
    x = vectors(400, 24) + 5
    index = Binary(24, threshold="median")
    assert not index.is_trained
    with pytest.raises(ValueError, match="this Binary is not trained"):
        index.add(x)
    index.train(x)
    index.add(x)
    np.testing.assert_array_equal(
        index.reconstruct(np.arange(400)), np.where(x > np.median(x, 0).astype(np.float32), 1, -1)
    )
    found = index.search(x[:50], 1, rescore="bits", refine_factor=10).ids[:, 0]
    assert (found == np.arange(50)).mean() > 0.9
    with pytest.raises(ValueError, match="the index holds 400 vectors"):
        index.train(x)


def test_filter_remove_and_add():
    x = vectors(200, 33)
    index = Binary(33, refine="int8")
    index.add(x[:120], ids=np.arange(120) * 3)
    index.add(x[120:], ids=np.arange(1000, 1080))
    allowed = [3, 1001, 1050, 30, 99999]
    for query in (x[:4], bits(x[:4])):
        found = index.search(query, 10, filter=allowed).ids
        assert (np.sort(found, axis=1)[:, -4:] == [3, 30, 1001, 1050]).all() and (found[:, 4:] == -1).all()
    assert index.remove_ids([0, 3, 6, 1079]) == 4
    left = np.setdiff1d(np.concatenate([np.arange(120) * 3, np.arange(1000, 1080)]), [0, 3, 6, 1079])
    np.testing.assert_array_equal(index.ids, left)
    np.testing.assert_array_equal(index.search(x[3:120], 1).ids[:, 0], np.arange(3, 120) * 3)
    assert index.search(x[:2], 300).ids.shape == (2, 300)


def test_torch():
    torch = pytest.importorskip("torch")
    x = vectors(40, 19)
    index = Binary(19)
    index.add(torch.tensor(x))
    for query in (torch.tensor(x[:3]), torch.tensor(bits(x[:3])), torch.tensor(x[:3]).half()):
        got = index.search(query, 2)
        assert isinstance(got.ids, torch.Tensor)
        np.testing.assert_array_equal(got.ids[:, 0].numpy(), [0, 1, 2])


CONFIGS = [
    {},
    {"metric": "jaccard"},
    {"refine": "float32"},
    {"refine": "float16", "similarity": "l2"},
    {"refine": "int8", "threshold": "median"},
    {"threshold": 0.25},
]


@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("mmap", [True, False])
def test_files(tmp_path, options, mmap):
    x = vectors(70, 21)
    index = Binary(21, **options)
    index.train(x)
    index.add(x, ids=np.arange(70) * 2)
    index.save(tmp_path / "index")
    again = load(tmp_path / "index", mmap=mmap)
    assert repr(again) == repr(index) and again.nbytes == index.nbytes
    for query in (x[:6], bits(x[:6])):
        a, b = index.search(query, 9), again.search(query, 9)
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.scores, b.scores)
    if "refine" not in options:
        again.add(bits(x[:3]))
    else:
        again.add(x[:3])
    assert again.ntotal == 73
    Binary(21, **options).save(tmp_path / "empty")
    assert load(tmp_path / "empty").ntotal == 0


def test_damaged_files(tmp_path):
    index = Binary(21, refine="int8")
    index.add(vectors(9, 21))
    index.save(tmp_path / "index")
    with safetensors.safe_open(tmp_path / "index", "numpy") as file:
        metadata = file.metadata()
    good = safetensors.numpy.load_file(tmp_path / "index")

    def damaged(problem, **changes):
        tensors = {**good, **changes}
        safetensors.numpy.save_file(
            {name: a for name, a in tensors.items() if a is not None}, tmp_path / "bad", metadata
        )
        with pytest.raises(ValueError, match=problem):
            load(tmp_path / "bad")

    damaged("bits behind d = 21", codes=good["codes"] | 128)
    damaged(r"'codes' is U8 \(8, 3\)", codes=good["codes"][:8].copy())
    damaged("the scales must be finite", scales=-good["scales"])
    damaged("the tensor 'scales' is missing", scales=None)


def test_bad_input():
    with pytest.raises(ValueError, match="metric must be one of 'hamming', 'jaccard'; got 'l2'"):
        Binary(8, "l2")
    with pytest.raises(ValueError, match="refine must be None, 'float32', 'float16' or 'int8', got 'fp8'"):
        Binary(8, refine="fp8")
    with pytest.raises(TypeError, match="threshold must be a number or 'median', got 'mean'"):
        Binary(8, threshold="mean")
    with pytest.raises(ValueError, match="threshold must be finite"):
        Binary(8, threshold=float("nan"))
    index = Binary(24)
    with pytest.raises(ValueError, match="this Binary is empty"):
        index.search(vectors(1, 24))
    with pytest.raises(ValueError, match="x has 23 columns; the index takes vectors of d = 24 values, or"):
        index.add(vectors(3, 23))
    with pytest.raises(ValueError, match=r"x\[1, 2\] is nan"):
        bad = vectors(3, 24)
        bad[1, 2] = np.nan
        index.add(bad)
    index.add(vectors(5, 24))
    with pytest.raises(ValueError, match="rescore is 'vectors', but the index keeps no vectors"):
        index.search(vectors(1, 24), rescore="vectors")
    with pytest.raises(ValueError, match="rescore is 'bits', but q holds packed bits"):
        index.search(bits(vectors(1, 24)), rescore="bits")
    with pytest.raises(ValueError, match="rescore must be one of 'bits', 'vectors', 'both'; got 'exact'"):
        index.search(vectors(1, 24), rescore="exact")
    with pytest.raises(ValueError, match="refine_factor must be >= 1, got 0"):
        index.search(vectors(1, 24), rescore="bits", refine_factor=0)
    with pytest.raises(ValueError, match="k must be >= 1"):
        index.search(bits(vectors(1, 24)), 0)
    kept = Binary(24, refine="float16")
    with pytest.raises(ValueError, match="x holds packed bits, but refine='float16' keeps vectors"):
        kept.add(bits(vectors(2, 24)))
    with pytest.raises(ValueError, match=r"x\[1\] holds a value beyond float16"):
        kept.add(np.array([[1.0] * 24, [1e6] * 24], np.float32))
    assert kept.ntotal == 0


def test_real_embeddings(data_folder):
    """Half the exact neighbours by bits, nearly all of them after each way to rescore."""
    x = np.load(data_folder / "debian_docs_f16.npy").astype(np.float32)
    q = np.load(data_folder / "debian_queries_f16.npy")[:500].astype(np.float32)
    truth = lutra.scan.knn(q, x, 10).ids
    index = Binary(384, refine="int8")
    index.add(x)

    def recall(**options):
        found = index.search(q, 10, **options).ids
        return np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth)]) / 10

    plain = recall(rescore=None)
    assert 0.5 < plain < recall(rescore="bits") < recall(rescore="vectors")
    assert recall(rescore="vectors", refine_factor=10) > 0.95
