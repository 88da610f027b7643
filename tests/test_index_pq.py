"""lutra.index.PQ: codes, search, refinement, quality beside FAISS on real data, bad input."""

import numpy as np
import pytest

import lutra
from lutra.index import PQ, Flat, refine
from lutra.index._home import Home
from lutra.reference import scan as reference

pytestmark = pytest.mark.filterwarnings("ignore:.* points for .* centroids")

METRICS = ("ip", "l2", "cosine")


def vectors(n, d, seed=0):
    """Clustered, so that codes mean something."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((40, d))
    return (centers[rng.integers(0, 40, n)] + 0.3 * rng.standard_normal((n, d))).astype(np.float32)


def trained(d=16, m=4, bits=5, metric="l2", n=600, **options):
    index = PQ(d, m, bits, metric, **options)
    index.train(vectors(n, d, 7), n_iter=5)
    return index


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def recall(found, want):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), want.tolist())])


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("d,m", [(1, 1), (6, 6), (15, 3), (32, 2), (17, 17)])
def test_codes_are_those_of_the_nearest_centroids(d, m, bits):
    index = trained(d, m, bits)
    x = vectors(90, d, 3)
    codes = index.encode(x)
    assert codes.shape == (90, m) and codes.dtype == np.uint8
    books = index.codebooks.astype(np.float64)
    assert books.shape == (m, 2**bits, d // m)
    gaps = ((x.reshape(90, m, 1, d // m) - books[None]) ** 2).sum(-1)
    np.testing.assert_allclose(
        np.take_along_axis(gaps, codes[..., None].astype(int), 2)[..., 0], gaps.min(2), atol=1e-5
    )
    decoded = index.decode(codes)
    want = np.stack([index.codebooks[j][codes[:, j]] for j in range(m)], 1).reshape(90, d)
    np.testing.assert_array_equal(decoded, want)
    index.add(x)
    np.testing.assert_array_equal(index.reconstruct(np.arange(90)), want)


@pytest.mark.parametrize("metric", METRICS)
def test_search_ranks_the_coded_vectors(metric):
    index = trained(metric=metric)
    x, q = vectors(500, 16, 1), vectors(9, 16, 2)
    index.add(x, ids=np.arange(500) * 3)
    scores, ids = index.search(q, 20)
    decoded = index.reconstruct(index.ids)
    query = unit(q) if metric == "cosine" else q
    every = reference.pairwise(
        query.astype(np.float64), decoded.astype(np.float64), "l2" if metric == "l2" else "ip"
    )
    np.testing.assert_allclose(np.take_along_axis(every, ids // 3, 1), scores, rtol=1e-4, atol=1e-4)
    best = np.sort(every, 1)[:, :20] if metric == "l2" else -np.sort(-every, 1)[:, :20]
    np.testing.assert_allclose(scores, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kept", ["float32", "float16"])
def test_refined_scores_are_exact(metric, kept):
    index = trained(metric=metric, refine=kept)
    x, q = vectors(500, 16, 1), vectors(9, 16, 2)
    index.add(x, ids=np.arange(500) * 3)
    exact = Flat(16, metric)
    exact.add(x.astype(kept), ids=np.arange(500) * 3)
    everything = index.search(q, 10, refine=50)  # all 500 are candidates
    np.testing.assert_array_equal(everything.ids, exact.search(q, 10).ids)
    np.testing.assert_allclose(everything.scores, exact.search(q, 10).scores, rtol=1e-4, atol=1e-4)
    coarse, fine = index.search(q, 10, refine=0), index.search(q, 10)
    np.testing.assert_array_equal(fine.ids, index.search(q, 10, refine=4).ids)
    truth = exact.search(q, 10).ids
    assert recall(fine.ids, truth) > recall(coarse.ids, truth)
    np.testing.assert_array_equal(index.reconstruct(index.ids), x.astype(kept).astype(np.float32))


@pytest.mark.parametrize("metric", METRICS)
def test_fewer_vectors_than_k(metric):
    index = trained(metric=metric, refine="float16")
    q = vectors(3, 16)
    worst = np.inf if metric == "l2" else -np.inf
    for factor in (0, 4):
        with pytest.raises(ValueError, match="this PQ is empty"):
            index.search(q, 5, refine=factor)
    index.add(vectors(2, 16, 1), ids=[8, 6])
    for factor in (0, 1, 4):
        scores, ids = index.search(q, 5, refine=factor)
        assert (np.sort(ids[:, :2], 1) == [6, 8]).all() and (ids[:, 2:] == -1).all()
        assert (scores[:, 2:] == worst).all() and np.isfinite(scores[:, :2]).all()


def test_cosine_ignores_length_and_takes_zero_vectors():
    x = vectors(200, 16, 1)
    index, scaled = trained(metric="cosine"), trained(metric="cosine")
    factors = np.float32(2.0) ** np.random.default_rng(0).integers(-60, 60, (200, 1))
    index.add(x)
    scaled.add(x * factors)  # squares of these leave float32
    np.testing.assert_array_equal(index._rows["codes"].view, scaled._rows["codes"].view)
    np.testing.assert_array_equal(index.search(x[:5], 3).ids, scaled.search(x[:5] * factors[:5], 3).ids)
    zero = np.zeros((1, 16), np.float32)
    index.add(zero)
    np.testing.assert_array_equal(index.search(zero, 3).scores, 0)


def test_remove_and_add_again():
    index = trained(refine="float16")
    x = vectors(100, 16, 1)
    index.add(x)
    assert index.remove_ids(np.arange(10, 60)) == 50
    left = np.r_[0:10, 60:100]
    np.testing.assert_array_equal(index.ids, left)
    np.testing.assert_array_equal(index.search(x[left], 1, refine=50).ids[:, 0], left)
    np.testing.assert_array_equal(index._rows["codes"].view, index.encode(x[left]))
    index.add(x[10:60], ids=np.arange(10, 60))
    np.testing.assert_array_equal(index.search(x, 1, refine=100).ids[:, 0], np.arange(100))


def test_additions_in_parts_are_one_addition(monkeypatch):
    x = vectors(1000, 16, 1)
    whole = trained(refine="float32")
    whole.add(x)
    monkeypatch.setattr(lutra.index.pq, "_ENCODE", 7)
    monkeypatch.setattr(lutra.index.base, "_PART", 4 * 16 * 33)
    parts = trained(refine="float32")
    parts.add(x.astype(np.float64))
    for name in ("codes", "vectors"):
        np.testing.assert_array_equal(whole._rows[name].view, parts._rows[name].view)


def test_a_bad_row_in_a_late_part_changes_nothing(monkeypatch):
    monkeypatch.setattr(lutra.index.base, "_PART", 4 * 16 * 33)
    index = trained(refine="float16")
    index.add(vectors(10, 16, 1))
    for value, match in [(np.nan, r"x\[77, 3\] is nan"), (7e4, r"x\[77\] holds a value beyond float16")]:
        x = vectors(100, 16, 2)
        x[77, 3] = value
        with pytest.raises(ValueError, match=match):
            index.add(x)
        assert len(index) == 10
    index.add(vectors(5, 16, 3))
    np.testing.assert_array_equal(index.ids, np.arange(15))
    np.testing.assert_array_equal(index._rows["codes"].view[10:], index.encode(vectors(5, 16, 3)))


def test_training_is_deterministic(threads):
    x = vectors(3000, 8)
    books = []
    for n in (0, 1):
        lutra.set_num_threads(n)
        index = PQ(8, 2, 6, seed=3)
        index.train(x, n_iter=6)
        books.append(index.codebooks)
    np.testing.assert_array_equal(*books)
    other = PQ(8, 2, 6, seed=4)
    other.train(x, n_iter=6)
    assert not np.array_equal(books[0], other.codebooks)


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    x = vectors(400, 16, 1)
    index = PQ(16, 4, 5, refine="float16")
    index.train(torch.from_numpy(x).bfloat16())
    index.add(torch.from_numpy(x))
    want = index.search(x[:3], 4)
    scores, ids = index.search(torch.from_numpy(x[:3]), 4)
    assert isinstance(scores, torch.Tensor) and isinstance(ids, torch.Tensor)
    np.testing.assert_array_equal(ids.numpy(), want.ids)
    codes = index.encode(torch.from_numpy(x[:3]))
    assert codes.dtype == torch.uint8 and index.decode(codes).dtype == torch.float32
    np.testing.assert_array_equal(codes.numpy(), index.encode(x[:3]))


@pytest.mark.parametrize("metric", METRICS)
def test_homes_other_than_numpy(metric):
    """The way of arrays on a GPU, with torch's CPU tensors in their place."""
    torch = pytest.importorskip("torch")
    from lutra._arrays import torch_kind

    x, q = vectors(600, 16, 1), vectors(5, 16, 2)
    want, index = (PQ(16, 4, 5, metric, refine="float16") for _ in range(2))
    index._move(Home(torch_kind(False), torch.empty(0)))
    for i in (want, index):
        i.train(x)
        i.add(x, ids=np.arange(600)[::-1])
        i.remove_ids(np.arange(100, 200))
    assert isinstance(index.codebooks, torch.Tensor)
    np.testing.assert_allclose(index.codebooks.numpy(), want.codebooks, atol=1e-5)
    for factor in (0, 4):
        for queries in (q, torch.from_numpy(q)):
            scores, ids = index.search(queries, 10, refine=factor)
            assert type(scores) is type(ids) is type(queries)
            np.testing.assert_allclose(
                np.asarray(scores), want.search(q, 10, refine=factor).scores, atol=1e-3
            )
            assert recall(np.asarray(ids), want.search(q, 10, refine=factor).ids) > 0.95
    np.testing.assert_array_equal(index.reconstruct(want.ids), want.reconstruct(want.ids))
    codes = want.encode(x)
    np.testing.assert_allclose(index.decode(codes), want.decode(codes), atol=1e-5)


# ---- refine
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_refine(metric, dtype, monkeypatch):
    monkeypatch.setattr(lutra.index._refine, "_PART", 4 * 30 * 8 * 2)  # two queries at a time
    rng = np.random.default_rng(0)
    x = vectors(200, 8, 1).astype(dtype)
    q = vectors(7, 8, 2)
    candidates = rng.integers(-1, 200, (7, 30))  # absent ones and duplicates among them
    x[150:] = x[:50]  # and ties
    candidates[:, :2] = [[155, 5]]
    query = q.astype(dtype) if dtype == "float64" else q
    scores, ids = refine(query, x, candidates, 12, metric)
    want = reference.rescore(query.astype(np.float64), x.astype(np.float64), candidates, 12, metric)
    np.testing.assert_array_equal(ids, want[1])
    np.testing.assert_allclose(scores, want[0], rtol=1e-4, atol=1e-5)
    torch = pytest.importorskip("torch")
    tensors = refine(*map(torch.from_numpy, (query, x, candidates)), 12, metric)
    np.testing.assert_array_equal(tensors.ids.numpy(), ids)
    np.testing.assert_array_equal(tensors.scores.numpy(), scores)


def test_refine_pads_and_refuses():
    x = vectors(20, 4).astype(np.float16)
    q = vectors(2, 4)
    scores, ids = refine(q, x, np.array([[3, -1], [-1, -1]]), 3, "l2")
    np.testing.assert_array_equal(ids, [[3, -1, -1], [-1, -1, -1]])
    assert (scores[ids < 0] == np.inf).all()
    assert refine(q, x[:0], np.full((2, 3), -1), 2).ids.tolist() == [[-1, -1]] * 2
    for wrong in (20, -2):
        with pytest.raises(
            IndexError, match=rf"candidates\[1, 0\] is {wrong}; candidates must be in \[-1, 20\)"
        ):
            refine(q, x, np.array([[3], [wrong]]), 1)
    with pytest.raises(ValueError, match="columns"):
        refine(q, x[:, :3], np.array([[3], [1]]), 1)
    with pytest.raises(ValueError, match="rows"):
        refine(q, x, np.array([[3]]), 1)
    with pytest.raises(TypeError, match="candidates has dtype float32"):
        refine(q, x, np.zeros((2, 1), np.float32), 1)
    with pytest.raises(TypeError, match="vectors has dtype int32"):
        refine(q, x.astype(np.int32), np.array([[3], [1]]), 1)
    with pytest.raises(ValueError, match="metric must be one of"):
        refine(q, x, np.array([[3], [1]]), 1, "dot")
    with pytest.raises(ValueError, match="k must be >= 1"):
        refine(q, x, np.array([[3], [1]]), 0)


# ---- quality
@pytest.mark.parametrize("name,m", [("sift5k_5000x128_u8", 16), ("debian_docs_f16", 8)])
def test_quality_on_real_data_is_that_of_faiss(data_folder, name, m):
    faiss = pytest.importorskip("faiss")
    x = np.load(data_folder / f"{name}.npy").astype(np.float32)
    x, q = x[:-400], x[-400:]
    d = x.shape[1]
    exact = Flat(d, "l2")
    exact.add(x)
    truth = exact.search(q, 10).ids
    errors, recalls = {"lutra": [], "faiss": []}, {"lutra": [], "faiss": []}
    for seed in range(3):
        ours = PQ(d, m, seed=seed)
        ours.train(x)
        ours.add(x)
        theirs = faiss.IndexPQ(d, m, 8)
        theirs.pq.cp.seed, theirs.pq.cp.min_points_per_centroid = seed + 1, 1
        theirs.train(x)
        theirs.add(x)
        errors["lutra"].append(np.square(ours.reconstruct(np.arange(len(x))) - x).sum(1).mean())
        errors["faiss"].append(np.square(theirs.reconstruct_n(0, len(x)) - x).sum(1).mean())
        recalls["lutra"].append(recall(ours.search(q, 10).ids, truth))
        recalls["faiss"].append(recall(theirs.search(q, 10)[1], truth))
    assert np.mean(errors["lutra"]) < 1.005 * np.mean(errors["faiss"])
    assert np.mean(recalls["lutra"]) > np.mean(recalls["faiss"]) - 0.01


def test_refine_on_real_text_vectors(data_folder):
    docs = np.load(data_folder / "debian_docs_f16.npy")
    queries = np.load(data_folder / "debian_queries_f16.npy")[::8]
    index = PQ(384, 48, metric="cosine", refine="float16")
    index.train(docs)
    index.add(docs)
    exact = Flat(384, "cosine")
    exact.add(docs)
    truth = exact.search(queries, 10).ids
    assert recall(index.search(queries, 10, refine=0).ids, truth) > 0.7
    assert recall(index.search(queries, 10, refine=4).ids, truth) > 0.97
    own = (index.search(queries, 10).ids == np.arange(0, len(docs), 8)[:, None]).any(1).mean()
    assert own > 0.86  # 0.89 by exact search


# ---- states and bad input
def test_describes_itself():
    index = PQ(16, 4, 5, refine="float16")
    assert repr(index) == (
        "PQ(d=16, m=4, bits=5, metric='l2', refine='float16', seed=0, ntotal=0, device='cpu', not trained)"
    )
    assert not index.is_trained and index.codebooks is None and index.nbytes == 0
    assert (index.ksub, index.dsub) == (32, 4)
    index.train(vectors(600, 16))
    assert index.is_trained and "not trained" not in repr(index)
    index.add(vectors(10, 16))
    assert index.nbytes == 10 * (4 + 32) + 4 * 32 * 4 * 4


def test_few_vectors_are_warned_of_once():
    index = PQ(16, 4, 5)
    with pytest.warns(UserWarning, match="600 points for 32 centroids; at least 1248") as seen:
        index.train(vectors(600, 16))
    assert len(seen) == 1 and seen[0].filename == __file__


def test_untrained():
    index = PQ(16, 4)
    for call in (index.add, index.search, index.encode):
        with pytest.raises(ValueError, match="not trained"):
            call(vectors(3, 16))
    with pytest.raises(ValueError, match="not trained"):
        index.decode(np.zeros((1, 4), np.uint8))
    with pytest.raises(IndexError):
        index.reconstruct(0)
    assert index.remove_ids(0) == 0


def test_bad_training():
    index = PQ(16, 4)
    with pytest.raises(ValueError, match="x has 255 rows; at least 256"):
        index.train(vectors(255, 16))
    with pytest.raises(ValueError, match="x has 8 columns"):
        index.train(vectors(300, 8))
    with pytest.raises(TypeError, match="x must be"):
        index.train(None)
    bad = vectors(300, 16)
    bad[299, 15] = np.inf
    with pytest.raises(ValueError, match=r"x\[299, 15\] is inf"):
        index.train(bad)
    assert not index.is_trained
    for name, value in [("n_iter", 0), ("init", "x"), ("max_points_per_centroid", -1)]:
        with pytest.raises(ValueError, match=f"{name} must be"):
            index.train(vectors(300, 16), **{name: value})
    index = trained()
    before = index.codebooks
    index.train(vectors(700, 16, 5))  # may be repeated while it is empty
    assert not np.array_equal(before, index.codebooks)
    index.add(vectors(1, 16))
    with pytest.raises(ValueError, match="holds 1 vectors"):
        index.train(vectors(700, 16))


@pytest.mark.parametrize(
    "error,match,args,options",
    [
        (ValueError, "m must divide d = 16, got 3", (16, 3), {}),
        (ValueError, "m must be >= 1", (16, 0), {}),
        (ValueError, r"bits must be in \[1, 8\], got 9", (16, 4, 9), {}),
        (ValueError, r"bits must be in \[1, 8\], got 0", (16, 4, 0), {}),
        (TypeError, "bits must be an integer", (16, 4, "8"), {}),
        (ValueError, "metric must be one of", (16, 4, 8, "dot"), {}),
        (ValueError, "refine must be None, 'float32' or 'float16', got 'int8'", (16, 4), {"refine": "int8"}),
        (ValueError, "refine must be", (16, 4), {"refine": True}),
        (ValueError, "seed must be >= 0", (16, 4), {"seed": -1}),
    ],
)
def test_bad_construction(error, match, args, options):
    with pytest.raises(error, match=match):
        PQ(*args, **options)


def test_bad_searches_and_codes():
    index = trained()
    index.add(vectors(10, 16))
    with pytest.raises(ValueError, match="refine is 4, but the index keeps no vectors"):
        index.search(vectors(1, 16), 3, refine=4)
    kept = trained(refine="float32")
    for wrong, error in [(-1, ValueError), (2.0, TypeError), (True, TypeError)]:
        with pytest.raises(error, match="refine must be"):
            kept.search(vectors(1, 16), 3, refine=wrong)
    with pytest.raises(ValueError, match="k must be >= 1"):
        index.search(vectors(1, 16), 0)
    with pytest.raises(ValueError, match=r"codes must have shape \(n, 4\), got \(3, 5\)"):
        index.decode(np.zeros((3, 5), np.uint8))
    with pytest.raises(ValueError, match="codes hold 32; with 5 bits they are < 32"):
        index.decode(np.full((3, 4), 32, np.uint8))
    with pytest.raises(TypeError, match="codes has dtype int64"):
        index.decode(np.zeros((3, 4), np.int64))


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_filter(metric):
    index = trained(metric=metric, refine="float32")
    x, q = vectors(400, 16, 1), vectors(9, 16, 2)
    ids = np.arange(400) * 2 + 1
    index.add(x, ids)
    for factor in (0, 3):
        every, want = index.search(q, 400, refine=factor).ids, np.random.default_rng(0).choice(ids, 50, False)
        got = index.search(q, 60, refine=factor, filter=want)
        for found, order in zip(got.ids, every):
            np.testing.assert_array_equal(found[:50], order[np.isin(order, want)])
            assert (found[50:] == -1).all()
