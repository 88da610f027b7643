"""lutra.mine against brute force in float64: CSLS, hard negatives, pairs, duplicates."""

import numpy as np
import pytest

import lutra
from lutra.index import Flat
from lutra.mine import _source, csls, deduplicate, hard_negatives, paraphrase_mining

METRICS = ("cosine", "ip", "l2")


def vectors(n, d=16, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def matrix(a, b, metric="cosine"):
    """All scores; greater is better (l2: negated distances)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if metric == "l2":
        return -((a[:, None] - b[None]) ** 2).sum(-1)
    if metric == "cosine":
        a, b = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300) for v in (a, b))
    return a @ b.T


def flat(x, metric="cosine", ids=None):
    index = Flat(x.shape[1], metric)
    index.add(x, ids)
    return index


@pytest.fixture(params=("whole", "blocks"))
def blocks(request, monkeypatch):
    """In one block, and in many small ones."""
    if request.param == "blocks":
        monkeypatch.setattr(_source, "BLOCK", 2000)


# ---- CSLS
def brute_csls(q, x, k, neighbourhood, background=None):
    c = matrix(q, x)
    back = c if background is None else matrix(background, x)
    r_queries = -np.sort(-c, axis=1)[:, :neighbourhood].mean(1)
    r_rows = -np.sort(-back, axis=0)[:neighbourhood].mean(0)
    key = 2 * c - r_queries[:, None] - r_rows[None]
    order = np.argsort(-key, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(key, order, 1), order


@pytest.mark.parametrize("neighbourhood", [1, 10, 1000])
def test_csls(simd_level, blocks, neighbourhood):
    q, x = vectors(61), vectors(203, seed=1) * 3
    x[:5] += 2 * q.mean(0)  # hubs
    scores, ids = csls(q, x, 7, neighbourhood)
    want, order = brute_csls(q, x, 7, neighbourhood)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-5)
    assert scores.dtype == np.float32 and ids.dtype == np.int64
    scores, ids = csls(q[:3], x, 7, neighbourhood, background=q)
    want, order = brute_csls(q[:3], x, 7, neighbourhood, q)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-5)


def test_csls_of_an_index(blocks):
    q, x = vectors(40), vectors(60, seed=1)
    ids = np.random.default_rng(3).permutation(1000)[:60]
    got = csls(q, flat(x, ids=ids), 8)  # 64 candidates: all of them
    want, order = brute_csls(q, x, 8, 10)
    np.testing.assert_array_equal(got.ids, ids[order])
    np.testing.assert_allclose(got.scores, want, rtol=1e-4, atol=1e-5)
    few = csls(q, flat(x[:3]), 5)
    assert (few.ids[:, 3:] == -1).all() and np.isneginf(few.scores[:, 3:]).all()
    few = csls(q, x[:3], 5)
    assert (few.ids[:, 3:] == -1).all() and np.isneginf(few.scores[:, 3:]).all()
    with pytest.raises(ValueError, match="index of metric 'l2'; CSLS needs 'cosine'"):
        csls(q, flat(x, "l2"))
    with pytest.raises(ValueError, match="background has no rows"):
        csls(q, x, background=q[:0])
    with pytest.raises(ValueError, match="neighbourhood must be >= 1"):
        csls(q, x, neighbourhood=0)
    with pytest.raises(ValueError, match="queries has 5 columns; d = 16 is needed"):
        csls(q[:, :5], x)


def test_csls_puts_hubs_in_their_place():
    """Translation by a rotation, with noise and a shift that makes some targets near to everything."""
    rng = np.random.default_rng(0)
    source = rng.standard_normal((400, 20)).astype(np.float32)
    target = (source + 0.9 * rng.standard_normal((400, 20))).astype(np.float32)
    target[:40] = target[:40] * 0.2 + source.mean(0) + 0.5
    source += 0.5
    right = np.arange(400)
    plain = (lutra.scan.knn(source, target, 1, "cosine").ids[:, 0] == right).mean()
    assert (csls(source, target, 1).ids[:, 0] == right).mean() > plain + 0.02


# ---- hard negatives
def brute_negatives(q, x, positives, metric, wanted, low, high, **limits):
    key = matrix(q, x, metric)
    sign = -1 if metric == "l2" else 1
    out = []
    for i, right in enumerate(positives):
        order = [j for j in np.argsort(-key[i], kind="stable") if j not in right]
        for p in right:
            kept = []
            for j in order[low:high]:
                bad = False
                if limits.get("max_score") is not None:
                    bad |= key[i, j] > limits["max_score"] * sign
                if limits.get("min_score") is not None:
                    bad |= key[i, j] < limits["min_score"] * sign
                if limits.get("absolute_margin") is not None:
                    bad |= key[i, j] > key[i, p] - limits["absolute_margin"]
                if limits.get("relative_margin") is not None:
                    bad |= key[i, j] > key[i, p] - abs(key[i, p]) * limits["relative_margin"]
                if not bad:
                    kept.append(j)
            out.append((i, p, kept[:wanted] if wanted else kept))
    return out


LIMITS = [
    {},
    {"max_score": 0.4},
    {"min_score": 0.1, "max_score": 0.5},
    {"absolute_margin": 0.05},
    {"relative_margin": 0.1},
    {"relative_margin": 0.02, "absolute_margin": 0.01, "max_score": 0.6},
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("limits", LIMITS)
def test_hard_negatives(blocks, metric, limits):
    x = vectors(150)
    rng = np.random.default_rng(1)
    q = x[:30] + 0.8 * vectors(30, seed=2)
    if metric == "l2":
        limits = {
            n: v * (40 if "score" in n else 10 if n == "absolute_margin" else 1) for n, v in limits.items()
        }
        if "min_score" in limits:
            limits["min_score"], limits["max_score"] = limits["max_score"], limits["min_score"]
    positives = [[i, *rng.integers(30, 150, i % 3)] for i in range(30)]
    positives[4] = []
    positives = [sorted(set(p)) for p in positives]
    got = hard_negatives(q, x, positives, num_negatives=4, range_min=2, range_max=17, metric=metric, **limits)
    want = brute_negatives(q, x, positives, metric, 4, 2, 17, **limits)
    assert got.queries.tolist() == [i for i, _, _ in want]
    assert got.positives.tolist() == [p for _, p, _ in want]
    assert [[j for j in row if j >= 0] for row in got.negatives.tolist()] == [n for _, _, n in want]
    key = matrix(q, x, metric) * (-1 if metric == "l2" else 1)
    np.testing.assert_allclose(got.positive_scores, key[got.queries, got.positives], rtol=1e-4, atol=1e-5)
    there = got.negatives >= 0
    np.testing.assert_allclose(
        got.scores[there], key[got.queries[:, None], got.negatives][there], rtol=1e-4, atol=1e-5
    )
    assert np.isinf(got.scores[~there]).all()
    triplets = [(i, p, j) for i, p, n in want for j in n]
    assert sorted(map(tuple, got.triplets().tolist())) == sorted(triplets)


def test_random_negatives(blocks):
    x, q = vectors(150), vectors(50, seed=2)
    right = np.arange(50)
    options = {"num_negatives": 3, "range_min": 5, "range_max": 30, "sampling": "random"}
    a, b, c = (hard_negatives(q, x, right, seed=seed, **options) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.negatives, b.negatives)
    assert (a.negatives != c.negatives).any()
    assert (np.diff(a.scores, axis=1) <= 0).all() and (a.negatives >= 0).all()
    everything = brute_negatives(q, x, right[:, None].tolist(), "cosine", None, 5, 30)
    for row, (_, _, allowed) in zip(a.negatives, everything):
        assert len(set(row)) == 3 and set(row) <= set(allowed)
    counts = np.zeros(25)  # each rank is as likely as another
    for seed in range(40):
        got = hard_negatives(q, x, right, seed=seed, **options)
        for row, (_, _, allowed) in zip(got.negatives, everything):
            counts[[allowed.index(j) for j in row]] += 1
    assert counts.min() > 150 and counts.max() < 340  # 240 on average


def test_hard_negatives_of_an_index_and_few_documents():
    x, q = vectors(40), vectors(10, seed=2)
    ids = np.random.default_rng(3).permutation(1000)[:40]
    plain = hard_negatives(q, x, np.arange(10))
    index = hard_negatives(q, flat(x, ids=ids), ids[:10])
    np.testing.assert_array_equal(index.negatives, ids[plain.negatives])
    np.testing.assert_array_equal(index.positives, ids[:10])
    few = hard_negatives(q, x[:3], np.zeros(10, int), num_negatives=5)
    assert (few.negatives[:, 2:] == -1).all() and (np.sort(few.negatives[:, :2]) == [1, 2]).all()
    padded = np.full((10, 3), -1)
    padded[:, 0] = np.arange(10)
    np.testing.assert_array_equal(hard_negatives(q, x, padded).negatives, plain.negatives)
    assert hard_negatives(q[:0], x, []).negatives.shape == (0, 3)


def test_hard_negatives_bad_input():
    x, q = vectors(40), vectors(10, seed=2)
    right = np.arange(10)
    with pytest.raises(ValueError, match=r"positives has shape \(9,\), queries has 10 rows"):
        hard_negatives(q, x, right[:9])
    with pytest.raises(ValueError, match="positives has 1 entries, queries has 10 rows"):
        hard_negatives(q, x, [[1]])
    with pytest.raises(IndexError, match=r"positives holds 40; rows must lie in \[0, 40\)"):
        hard_negatives(q, x, right + 40)
    with pytest.raises(IndexError, match="positives holds 40, which is not in the index"):
        hard_negatives(q, flat(x), right + 40)
    with pytest.raises(ValueError, match="range_max must be greater than range_min = 5, got 5"):
        hard_negatives(q, x, right, range_min=5, range_max=5)
    with pytest.raises(ValueError, match="sampling must be one of 'top', 'random'; got 'best'"):
        hard_negatives(q, x, right, sampling="best")
    with pytest.raises(ValueError, match="absolute_margin must be a number >= 0, got -1"):
        hard_negatives(q, x, right, absolute_margin=-1)
    with pytest.raises(TypeError, match="max_score must be a number, got 'high'"):
        hard_negatives(q, x, right, max_score="high")
    with pytest.raises(ValueError, match="metric is 'ip', but documents is an index of 'cosine'"):
        hard_negatives(q, flat(x), right, metric="ip")


# ---- pairs
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("top_k", "max_pairs"), [(5, 40), (200, 10_000), (3, 10_000)])
def test_paraphrase_mining(blocks, metric, top_k, max_pairs):
    x = vectors(90)
    x[80:] = x[:10] + 0.01 * vectors(10, seed=7)
    key = matrix(x, x, metric)
    np.fill_diagonal(key, -np.inf)
    near = np.zeros_like(key, bool)
    np.put_along_axis(near, np.argsort(-key, axis=1, kind="stable")[:, :top_k], True, 1)
    near = np.triu((near | near.T) & np.isfinite(key), 1)
    got = paraphrase_mining(x, top_k, max_pairs, metric=metric)
    want = np.sort(key[near])[::-1][:max_pairs]
    assert len(got.scores) == len(want)
    sign = -1 if metric == "l2" else 1
    np.testing.assert_allclose(got.scores * sign, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(key[got.i, got.j], got.scores * sign, rtol=1e-4, atol=1e-4)
    assert (got.i < got.j).all() and near[got.i, got.j].all()
    assert len(np.unique(got.i * 90 + got.j)) == len(got.i)
    limit = float(np.median(got.scores))
    some = paraphrase_mining(x, top_k, max_pairs, metric=metric, min_score=limit)
    np.testing.assert_array_equal(some.scores, got.scores[got.scores * sign >= np.float32(limit) * sign])
    ids = np.random.default_rng(3).permutation(1000)[:90]
    index = paraphrase_mining(flat(x, metric, ids), top_k, max_pairs)
    np.testing.assert_array_equal(index.i, ids[got.i])
    np.testing.assert_array_equal(index.j, ids[got.j])


def test_paraphrase_mining_edges():
    for n in (0, 1):
        assert [len(v) for v in paraphrase_mining(vectors(n))] == [0, 0, 0]
    same = paraphrase_mining(np.ones((30, 4), np.float32), top_k=5)  # oneself is not among the first six
    assert (same.i != same.j).all() and len(same.i) > 0
    with pytest.raises(ValueError, match="top_k must be >= 1"):
        paraphrase_mining(vectors(3), 0)
    with pytest.raises(ValueError, match="min_score is NaN"):
        paraphrase_mining(vectors(3), min_score=float("nan"))
    with pytest.raises(ValueError, match=r"x\[1, 0\] is nan"):
        x = vectors(3)
        x[1, 0] = np.nan
        paraphrase_mining(x)


# ---- duplicates
def components(near):
    """Lowest member of each connected component, by plain search."""
    n = len(near)
    label = np.full(n, -1)
    for i in range(n):
        if label[i] < 0:
            stack = [i]
            while stack:
                j = stack.pop()
                if label[j] < 0:
                    label[j] = i
                    stack.extend(np.flatnonzero(near[j]))
    return label


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("quantile", [0.9, 0.99, 0.999])
def test_deduplicate(blocks, metric, quantile):
    x = vectors(150, 6)
    x[100:140] = x[:40] + 0.1 * vectors(40, 6, 4)
    x[140:] = x[7]
    x[50:90] = x[3] + 0.1 * vectors(40, 6, 5)  # more duplicates than the first search looks at
    x[90:92] = 0
    key = matrix(x, x, metric)
    values = np.unique(key)
    at = np.searchsorted(values, np.quantile(key, quantile))
    near = values[max(0, at - 60) : at + 60]  # the limit lies in the widest gap, out of the reach of rounding
    at = np.diff(near).argmax()
    limit = (near[at] + near[at + 1]) / 2
    want = components(key >= limit)
    got = deduplicate(x, limit * (-1 if metric == "l2" else 1), metric=metric)
    np.testing.assert_array_equal(got.representative, want)
    np.testing.assert_array_equal(got.keep, np.unique(want))
    ids = np.random.default_rng(3).permutation(1000)[:150]
    index = deduplicate(flat(x, metric, ids), limit * (-1 if metric == "l2" else 1))
    lowest = np.array([ids[want == w].min() for w in want])
    np.testing.assert_array_equal(index.representative, lowest)
    np.testing.assert_array_equal(index.keep, ids[ids == lowest])


def test_deduplicate_many_equal_vectors():
    x = np.repeat(vectors(3), 2000, axis=0)
    x[5] = 0
    x[9] = 0  # the cosine with a zero vector is 0: no duplicates of each other
    keep, representative = deduplicate(x, 0.9)
    np.testing.assert_array_equal(keep, [0, 5, 9, 2000, 4000])
    assert (representative[2000:4000] == 2000).all() and representative[1] == 0


def test_deduplicate_edges():
    for n in (0, 1):
        assert deduplicate(vectors(n)).keep.tolist() == list(range(n))
    torch = pytest.importorskip("torch")
    x = vectors(20)
    x[9] = x[2]
    assert deduplicate(torch.tensor(x).half(), 0.999).representative[9] == 2
    with pytest.raises(ValueError, match="threshold is NaN"):
        deduplicate(x, float("nan"))
    with pytest.raises(TypeError, match="threshold must be a number, got 'high'"):
        deduplicate(x, "high")
    with pytest.raises(ValueError, match="metric must be one of 'ip', 'l2', 'cosine'; got 'l1'"):
        deduplicate(x, metric="l1")


def test_real_descriptions(data_folder):
    """Descriptions of Debian's packages: translations and variants of one package are near-duplicates."""
    x = np.load(data_folder / "debian_docs_f16.npy")[:2500]
    pairs = paraphrase_mining(x, 5, 1000)
    assert pairs.scores[0] > 0.98 and len(pairs.i) == 1000
    keep, representative = deduplicate(x, 0.97)
    assert 2400 < len(keep) < 2500
    assert representative[pairs.j[0]] == representative[pairs.i[0]] <= pairs.i[0]
    q = np.load(data_folder / "debian_queries_f16.npy")[:2500]
    plain = lutra.scan.knn(q.astype(np.float32), x.astype(np.float32), 1).ids[:, 0] == np.arange(2500)
    assert (csls(q, x, 1).ids[:, 0] == np.arange(2500)).mean() > plain.mean()
