"""tune and auto: what they measure is measured again here, against exact search."""

import warnings

import numpy as np
import pytest

from lutra import _backend, quant
from lutra.index import HNSW, IVF, Codes, Flat, Transformed, Tuned, auto, transforms, tune
from lutra.index.tune import ground_truth, recall_of

pytestmark = pytest.mark.skipif(_backend.core is None, reason="the NumPy reference takes too long")

D = 32


def vectors(n, seed=0, d=D):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((60, d))
    return (centres[rng.integers(0, 60, n)] + 0.6 * rng.standard_normal((n, d))).astype(np.float32)


def exact(x, q, k, metric):
    index = Flat(x.shape[1], metric)
    index.add(x)
    return index.search(q, k).ids


def recall(found, want):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), want.tolist())])


def test_recall_of():
    rng = np.random.default_rng(0)
    found = rng.permutation(40)[:20].reshape(2, 10)
    want = rng.permutation(40)[:10].reshape(2, 5)
    assert recall_of(found, want) == pytest.approx(recall(found, want))
    assert recall_of(np.full((2, 10), -1), want) == 0
    assert recall_of(want, want) == 1


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_ground_truth(metric):
    x, q = vectors(500), vectors(9, 1)
    index = Flat(D, metric)
    ids = np.random.default_rng(0).permutation(500) * 3
    index.add(x, ids)
    np.testing.assert_array_equal(ground_truth(index, q, 7), index.search(q, 7).ids)
    coded = Codes(quant.SQ(D), metric)
    coded.train(x)
    coded.add(x, ids)
    np.testing.assert_array_equal(ground_truth(coded, q, 7, x), index.search(q, 7).ids)
    with pytest.raises(ValueError, match="keeps codes only"):
        ground_truth(coded, q, 7)


KINDS = {
    "IVF": lambda m: IVF(D, 40, None, m),
    "IVF codes": lambda m: IVF(D, 40, quant.PQ(D, 16, 4), m, refine="float32"),
    "Codes": lambda m: Codes(quant.PQ(D, 16, 4), m, refine="float16"),
    "HNSW": lambda m: HNSW(D, 8, m),
    "Transformed": lambda m: Transformed(transforms.RandomRotation(D), IVF(D, 40, None, m)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_tune_reaches_the_recall_and_no_more_than_it_must(kind, metric):
    x, q = vectors(3000), vectors(100, 1)
    index = KINDS[kind](metric)
    index.train(x)
    index.add(x)
    want = exact(x, q, 10, metric)
    tuned = tune(index, q, 0.9, 10, truth=want)
    assert isinstance(tuned, Tuned) and tuned.reached
    assert recall(index.search(q, 10).ids, want) == pytest.approx(tuned.recall) and tuned.recall >= 0.9
    for name, value in tuned.parameters.items():
        assert getattr(index, name) == value
    assert tuned.seconds > 0 and len(tuned.trials) >= 1
    higher = index.tune(q, 0.99, truth=want)
    assert higher.recall >= 0.99
    if "nprobe" in tuned.parameters and "refine_factor" not in tuned.parameters:
        assert tuned.parameters["nprobe"] <= higher.parameters["nprobe"]
        if tuned.parameters["nprobe"] > 1:
            fewer = index.search(q, 10, nprobe=max(1, int(tuned.parameters["nprobe"] / 1.5))).ids
            assert recall(fewer, want) < 0.9


def test_tune_says_when_it_cannot():
    x, q = vectors(3000), vectors(50, 1)
    index = Codes(quant.PQ(D, 4, 4))
    index.train(x)
    index.add(x)
    with pytest.warns(UserWarning, match="out of reach"):
        tuned = tune(index, q, 0.99, vectors=x)
    assert not tuned.reached and tuned.recall < 0.99
    for arguments, match in [
        ({"recall": 1.5}, "recall must be in"),
        ({"recall": 0}, "recall must be"),
        ({"k": 0}, "k must be"),
        ({"truth": np.zeros((50, 3), np.int64)}, "truth must be"),
        ({"vectors": x[:-1]}, "vectors has 2999 rows"),
        ({}, "keeps codes only"),
    ]:
        with pytest.raises(ValueError, match=match):
            tune(index, q, **arguments)
    with pytest.raises(ValueError, match="is empty"):
        tune(Flat(D), q)
    with pytest.raises(ValueError, match="queries has no rows"):
        tune(index, q[:0])


def test_memory():
    from lutra.index.auto import memory_of

    assert memory_of(None, 1000, 10) == np.inf
    for given, want in [
        ("25%", 10_000), ("12.5 %", 5000), (0.25, 10_000), (5000, 5000), (5000.0, 5000), ("5000", 5000),
        ("2GB", 2e9), ("2 GiB", 2**31), ("300mb", 3e8), ("1.5k", 1500), ("1.5 KiB", 1536), (1.0, 40_000),
    ]:  # fmt: skip
        assert memory_of(given, 1000, 10) == want
    for wrong in ("much", "0%", 0, -1, "-5", "GB", "5 XB"):
        with pytest.raises(ValueError, match="memory must be"):
            memory_of(wrong, 1000, 10)
    for wrong in (True, [1], b"5"):
        with pytest.raises(TypeError, match="memory must be"):
            memory_of(wrong, 1000, 10)


@pytest.mark.parametrize("memory, metric", [(None, "cosine"), ("45%", "l2")])
def test_auto_keeps_its_word(memory, metric, capsys):
    n = 5000
    x, q = vectors(n), vectors(100, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = auto(x, 0.9, memory, metric=metric, queries=q)
    assert len(index) == n and index.metric == metric
    want = exact(x, q, 10, metric)
    assert recall(index.search(q, 10).ids, want) >= 0.9
    if memory:
        assert index.nbytes <= 1.02 * 0.45 * 4 * D * n
    said = capsys.readouterr().out
    measured = [t for t in index.tried if t.tuned]
    assert len(measured) >= 2
    for t in measured:
        assert t.text in said
    assert "over all vectors: recall" in said
    assert index.tuned.reached


def test_auto_holds_queries_out_of_the_vectors(capsys):
    x = vectors(2000)
    index = auto(x, 0.95, verbose=False, k=5)
    assert capsys.readouterr().out == ""
    assert recall(index.search(x[:200], 5).ids, exact(x, x[:200], 5, "l2")) >= 0.93
    np.testing.assert_array_equal(index.ids, np.arange(2000))


@pytest.mark.parametrize("given", [True, False])
def test_auto_with_ids(given):
    x = vectors(600)
    ids = np.random.default_rng(1).permutation(600) * 3 + 5
    queries = vectors(50, 2) if given else None
    index = auto(x, ids=ids, queries=queries, verbose=False)
    np.testing.assert_array_equal(index.ids, ids)
    assert index.tuned.recall >= 0.95  # measured by these ids
    q = vectors(50, 3)
    assert recall(index.search(q, 10).ids, ids[exact(x, q, 10, "l2")]) > 0.9


def test_auto_errors():
    x = vectors(300)
    with pytest.raises(ValueError, match="smallest candidate takes"):
        auto(x, memory=300, verbose=False)
    with pytest.raises(ValueError, match="at least 2"):
        auto(x[:1], verbose=False)
    with pytest.raises(ValueError, match="metric must be"):
        auto(x, metric="l1", verbose=False)
    with pytest.raises(ValueError, match="recall must be"):
        auto(x, 1.1, verbose=False)
    with pytest.warns(UserWarning, match="out of reach"):
        auto(vectors(3000), 1.0, "16%", verbose=False)
