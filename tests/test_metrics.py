"""lutra.metrics: against definitions written out, against trec_eval and ranx where they are, at the edges."""

import math

import numpy as np
import pytest

import lutra
from lutra import metrics
from lutra.index._home import HOST, Home
from lutra.metrics._measures import Judged

NAMES = ("recall", "precision", "success", "mrr", "map", "ndcg", "ndcg_exp")


# ---------------------------------------------------------------- the definitions, one query at a time
def brute(found, grades, k):
    """All measures of one query: ``found`` ids, ``grades`` of the relevant ones."""
    seen, gains = set(), []
    for i in list(found)[:k]:
        gains.append(grades.get(i, 0) if i not in seen and grades.get(i, 0) > 0 else 0)
        seen.add(i)
    wanted = sorted((g for g in grades.values() if g > 0), reverse=True)
    ranks = [r for r, g in enumerate(gains, 1) if g]

    def dcg(values, gain):
        return sum(gain(g) / math.log2(r + 1) for r, g in enumerate(values[:k], 1))

    return {
        "recall": len(ranks) / len(wanted),
        "precision": len(ranks) / k,
        "success": float(bool(ranks)),
        "mrr": 1 / ranks[0] if ranks else 0.0,
        "map": sum((i + 1) / r for i, r in enumerate(ranks)) / len(wanted),
        "ndcg": dcg(gains, lambda g: g) / dcg(wanted, lambda g: g),
        "ndcg_exp": dcg(gains, lambda g: 2**g - 1) / dcg(wanted, lambda g: 2**g - 1),
    }


def sample(rng, nq, n, most=6, universe=40):
    """Results (nq, n) without repetitions, some padded with -1, and relevance with grades 1 to 3."""
    found = np.stack([rng.permutation(universe)[:n] for _ in range(nq)]).astype(np.int64)
    found[rng.random(nq) < 0.3, n // 2 :] = -1
    grades = [
        {int(i): int(g) for i, g in zip(rng.permutation(universe), rng.integers(1, 4, rng.integers(1, most)))}
        for _ in range(nq)
    ]
    return found, grades


def forms(grades):
    """Binary relevance in each form that is accepted."""
    lists = [sorted(entry) for entry in grades]
    width = max(map(len, lists))
    padded = np.array([entry + [-1] * (width - len(entry)) for entry in lists])
    ptr = np.cumsum([0, *map(len, lists)])
    flat = np.concatenate(lists)
    yield from (lists, [set(entry) for entry in lists], [np.array(entry) for entry in lists], padded)
    yield np.asfortranarray(padded.astype(np.int32))
    yield from ((flat, ptr), (flat[::-1][::-1], list(ptr)), [dict.fromkeys(entry, 1) for entry in lists])
    yield (flat, ptr, np.ones(len(flat)))


@pytest.mark.parametrize("nq, n, k", [(1, 1, 1), (7, 10, 3), (33, 17, 17), (20, 10, 25)])
def test_definitions(nq, n, k):
    rng = np.random.default_rng(nq)
    found, grades = sample(rng, nq, n)
    names = [f"{name}@{k}" for name in NAMES]
    got = metrics.evaluate(found, grades, names, per_query=True)
    means = metrics.evaluate(found, grades, names)
    for name in NAMES:
        expected = [brute(found[i], grades[i], k)[name] for i in range(nq)]
        np.testing.assert_allclose(got[f"{name}@{k}"], expected, rtol=1e-12, atol=1e-15)
        assert means[f"{name}@{k}"] == pytest.approx(np.mean(expected), rel=1e-12)
        assert type(means[f"{name}@{k}"]) is float


def test_every_form_of_relevance_is_the_same():
    found, grades = sample(np.random.default_rng(1), 12, 9)
    names = [f"{name}@5" for name in NAMES]
    expected = metrics.evaluate(found, [dict.fromkeys(entry, 1) for entry in grades], names)
    for i, form in enumerate(forms(grades)):
        assert metrics.evaluate(found, form, names) == expected, i
    assert expected["recall@5"] > 0


def test_graded_and_ragged():
    found, grades = sample(np.random.default_rng(2), 12, 9)
    ptr = np.cumsum([0, *map(len, grades)])
    flat = np.concatenate([list(entry) for entry in grades])
    values = np.concatenate([list(entry.values()) for entry in grades])
    expected = metrics.ndcg_at_k(found, grades, 5, per_query=True)
    np.testing.assert_array_equal(metrics.ndcg_at_k(found, (flat, ptr, values), 5, per_query=True), expected)
    binary = metrics.ndcg_at_k(found, (flat, ptr), 5, per_query=True)
    assert not np.allclose(binary, expected)


def test_each_function_is_its_name():
    found, grades = sample(np.random.default_rng(3), 15, 9)
    names = [
        "recall@4",
        "precision@4",
        "hit_rate@4",
        "mrr@4",
        "ap@4",
        "ndcg@4",
        "ndcg_exp@4",
        "mrr",
        " NDCG@4",
    ]
    values = metrics.evaluate(found, grades, names)
    assert list(values) == names
    assert values["recall@4"] == metrics.recall_at_k(found, grades, 4)
    assert values["precision@4"] == metrics.precision_at_k(found, grades, 4)
    assert values["hit_rate@4"] == metrics.success_at_k(found, grades, 4)
    assert values["mrr@4"] == metrics.mrr(found, grades, 4)
    assert values["ap@4"] == metrics.average_precision(found, grades, 4)
    assert values["ndcg@4"] == values[" NDCG@4"] == metrics.ndcg_at_k(found, grades, 4)
    assert values["ndcg_exp@4"] == metrics.ndcg_at_k(found, grades, 4, gain="exponential")
    assert values["mrr"] == metrics.mrr(found, grades) == metrics.mrr(found, grades, 9)
    assert len(set(values.values())) >= 6


def test_results_of_searches():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((50, 8), dtype=np.float32)
    exact = lutra.scan.knn(x, x, k=10, metric="l2")
    assert metrics.recall_at_k(exact, exact, 10) == metrics.recall_at_k(exact.ids, exact.ids) == 1
    assert metrics.mrr(exact, np.arange(50)) == 1  # itself, of a query the first
    assert metrics.mrr(exact, list(range(50))) == 1
    assert metrics.success_at_k(exact.ids[:, 1:], np.arange(50), 3) == 0


# ---------------------------------------------------------------- peers
TREC = {"recall@5": "recall_5", "precision@5": "P_5", "success@5": "success_5", "mrr": "recip_rank",
        "map@5": "map_cut_5", "map": "map", "ndcg@5": "ndcg_cut_5", "ndcg": "ndcg"}  # fmt: skip


def test_as_trec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    found, grades = sample(np.random.default_rng(5), 40, 12)
    qrels = {f"q{i}": {f"d{j}": g for j, g in entry.items()} for i, entry in enumerate(grades)}
    run = {
        f"q{i}": {f"d{j}": float(100 - r) for r, j in enumerate(row) if j >= 0} for i, row in enumerate(found)
    }
    theirs = pytrec_eval.RelevanceEvaluator(qrels, set(TREC.values())).evaluate(run)
    ours = metrics.evaluate(found, grades, TREC, per_query=True)
    for name, their in TREC.items():
        np.testing.assert_allclose(ours[name], [theirs[f"q{i}"][their] for i in range(40)], atol=1e-9)


@pytest.mark.slow  # it compiles for a minute
def test_as_ranx():
    ranx = pytest.importorskip("ranx")
    found, grades = sample(np.random.default_rng(6), 30, 12)
    qrels = {f"q{i}": {f"d{j}": g for j, g in entry.items()} for i, entry in enumerate(grades)}
    run = {
        f"q{i}": {f"d{j}": float(100 - r) for r, j in enumerate(row) if j >= 0} for i, row in enumerate(found)
    }
    names = {"recall@5": "recall@5", "success@5": "hit_rate@5", "mrr@5": "mrr@5", "map@5": "map@5",
             "ndcg@5": "ndcg@5", "ndcg_exp@5": "ndcg_burges@5"}  # fmt: skip
    theirs = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), list(names.values()))
    ours = metrics.evaluate(found, grades, names)
    for name, their in names.items():
        assert ours[name] == pytest.approx(float(theirs[their]), abs=1e-9), name


# ---------------------------------------------------------------- edges
def test_queries_with_nothing_to_find():
    found = np.array([[1, 2], [1, 2], [1, 2]])
    for relevant in ([[2], [], [9]], [{2: 1}, {1: 0}, {9: 2}], np.array([[2, -1], [-1, -1], [9, -1]])):
        assert metrics.mrr(found, relevant) == 0.25
        assert metrics.mrr(found, relevant, empty="zero") == pytest.approx(0.5 / 3)
        np.testing.assert_array_equal(metrics.mrr(found, relevant, per_query=True), [0.5, np.nan, 0])
        np.testing.assert_array_equal(metrics.mrr(found, relevant, per_query=True, empty="zero"), [0.5, 0, 0])
        assert metrics.ndcg_at_k(found, relevant, empty="zero") == pytest.approx(1 / math.log2(3) / 3)
    for relevant in ([[], [], []], np.full((3, 2), -1), np.empty((3, 0), np.int64)):
        with pytest.raises(ValueError, match="no query has a relevant id"):
            metrics.recall_at_k(found, relevant)
        assert metrics.recall_at_k(found, relevant, empty="zero") == 0
        assert np.isnan(metrics.recall_at_k(found, relevant, per_query=True)).all()
    with pytest.raises(ValueError, match="no queries"):
        metrics.recall_at_k(np.empty((0, 5), np.int64), [])


def test_repeated_ids_count_once():
    found = np.array([[4, 4, 4, 5], [4, 5, 5, 4]])
    np.testing.assert_array_equal(metrics.hits(found, [[4, 5]] * 2), [[1, 0, 0, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(
        metrics.precision_at_k(found, [[4, 5, 5]] * 2, 3, per_query=True), [1 / 3, 2 / 3]
    )
    assert metrics.recall_at_k(found, [[4, 5, 4]] * 2) == 1
    graded = (np.array([4, 4, 5]), np.array([0, 3]), np.array([1, 3, 1]))  # the highest grade of the two
    assert metrics.ndcg_at_k(np.array([[4, 5]]), graded) == 1
    assert metrics.ndcg_at_k(np.array([[5, 4]]), graded) == pytest.approx(
        (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    )


def test_hits_of_what_was_not_found():
    assert not metrics.hits(np.full((3, 2), -1), [[-1], [0], []]).any()
    assert metrics.hits(np.empty((2, 0), np.int64), [[1], [2]]).shape == (2, 0)
    assert metrics.recall_at_k(np.empty((2, 0), np.int64), [[1], [2]]) == 0
    assert metrics.mrr(np.empty((2, 0), np.int64), [[1], [2]]) == metrics.ndcg_at_k(
        np.empty((2, 0), np.int64), [[1], [2]]
    )


def test_large_ids():
    big = 2**62
    found = np.array([[big, big + 1], [big + 1, 3]])
    assert metrics.recall_at_k(found, [[big + 1], [big]], per_query=True).tolist() == [1, 0]
    grades = [{big: 1, big + 1: 2}, {3: 1}]
    assert metrics.ndcg_at_k(found[:, ::-1], grades, per_query=True).tolist() == [1, 1]


@pytest.mark.parametrize("order", ["F", "strided"])
def test_memory_order(order):
    found, grades = sample(np.random.default_rng(8), 12, 9)
    wide = np.zeros((12, 18), np.int64)
    wide[:, ::2] = found
    other = np.asfortranarray(found) if order == "F" else wide[:, ::2]
    np.testing.assert_array_equal(metrics.hits(other, grades), metrics.hits(found, grades))


# ---------------------------------------------------------------- libraries
def test_torch():
    torch = pytest.importorskip("torch")
    found, grades = sample(np.random.default_rng(9), 12, 9)
    for dtype in (torch.int64, torch.int32):
        ids = torch.from_numpy(found).to(dtype)
        hits = metrics.hits(ids, grades)
        assert isinstance(hits, torch.Tensor) and hits.dtype == torch.bool
        np.testing.assert_array_equal(hits.numpy(), metrics.hits(found, grades))
    padded = torch.tensor([[max(entry), -1] for entry in grades])
    value = metrics.mrr(torch.from_numpy(found), padded)
    assert value == metrics.mrr(found, padded.numpy()) and type(value) is float
    values = metrics.mrr(torch.from_numpy(found), [torch.tensor([max(e)]) for e in grades], per_query=True)
    assert isinstance(values, torch.Tensor) and values.dtype == torch.float64


def test_what_a_gpu_computes():
    """The same code with torch's functions, here on the CPU."""
    torch = pytest.importorskip("torch")
    from lutra._arrays import torch_kind

    home = Home(torch_kind(False), torch.empty(0))
    found, grades = sample(np.random.default_rng(10), 21, 9)
    found[3, 4] = found[3, 0]
    for relevant in (grades, *forms(grades), [{}] * 21):
        ours = Judged(torch.from_numpy(found), relevant, home=home)
        theirs = Judged(found, relevant, home=HOST)
        assert isinstance(ours.grades, torch.Tensor)
        for k in (1, 4, 9, 20):
            for name, extra in [
                ("recall", ()), ("precision", ()), ("success", ()), ("reciprocal_rank", ()),
                ("average_precision", ()), ("ndcg", ("linear",)), ("ndcg", ("exponential",)),
            ]:  # fmt: skip
                a, b = (getattr(judged, name)(k, *extra) for judged in (ours, theirs))
                np.testing.assert_allclose(a.numpy(), b, rtol=1e-12)


@pytest.mark.cuda
def test_cuda():
    torch = pytest.importorskip("torch")
    found, grades = sample(np.random.default_rng(11), 21, 9)
    ids = torch.from_numpy(found).cuda()
    for relevant in (grades, *forms(grades)):
        ours = metrics.evaluate(ids, relevant, NAMES, per_query=True)
        for name, values in metrics.evaluate(found, relevant, NAMES, per_query=True).items():
            assert ours[name].is_cuda
            np.testing.assert_allclose(ours[name].cpu().numpy(), values, rtol=1e-12)


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "ids must be", lambda f: metrics.mrr([[1]], [[1]])),
        (TypeError, "ids must hold integers", lambda f: metrics.mrr(f.astype(np.float32), [[1], [2]])),
        (ValueError, r"ids must be \(nq, k\)", lambda f: metrics.mrr(f[0], [[1], [2]])),
        (TypeError, "relevant must be an array", lambda f: metrics.mrr(f, None)),
        (TypeError, "relevant must be an array", lambda f: metrics.mrr(f, {0: [1]})),
        (TypeError, "relevant must hold integers", lambda f: metrics.mrr(f, np.ones((2, 2)))),
        (ValueError, "for 3 queries, ids has 2", lambda f: metrics.mrr(f, np.ones((3, 2), int))),
        (ValueError, "for 1 queries, ids has 2", lambda f: metrics.mrr(f, [[1]])),
        (ValueError, "shape", lambda f: metrics.mrr(f, np.ones((2, 2, 2), int))),
        (TypeError, "'a'", lambda f: metrics.mrr(f, [["a"], [1]])),
        (TypeError, "1.5", lambda f: metrics.mrr(f, [[1.5], [1]])),
        (TypeError, r"relevant\[1\]", lambda f: metrics.mrr(f, [[1], "12"])),
        (TypeError, r"relevant\[1\] is {id: grade}", lambda f: metrics.mrr(f, [[1], {1: 1}])),
        (TypeError, "grades", lambda f: metrics.mrr(f, [{1: "x"}, {1: 1}])),
        (ValueError, "NaN", lambda f: metrics.mrr(f, [{1: float("nan")}, {1: 1}])),
        (ValueError, "ptr must rise", lambda f: metrics.mrr(f, (np.arange(3), np.array([0, 2, 1])))),
        (ValueError, "ptr must rise", lambda f: metrics.mrr(f, (np.arange(3), np.array([0, 1, 2])))),
        (ValueError, "for 1 queries", lambda f: metrics.mrr(f, (np.arange(3), np.array([0, 3])))),
        (ValueError, "as a tuple", lambda f: metrics.mrr(f, (1, 2, 3, 4))),
        (ValueError, "k must be >= 1", lambda f: metrics.recall_at_k(f, [[1], [2]], 0)),
        (TypeError, "k must be an integer", lambda f: metrics.recall_at_k(f, [[1], [2]], 1.0)),
        (ValueError, "gain", lambda f: metrics.ndcg_at_k(f, [[1], [2]], gain="cubic")),
        (ValueError, "empty", lambda f: metrics.mrr(f, [[1], [2]], empty="none")),
        (ValueError, "'accuracy' is not known", lambda f: metrics.evaluate(f, [[1], [2]], "accuracy")),
        (ValueError, "'mrr@0' is not known", lambda f: metrics.evaluate(f, [[1], [2]], ["mrr@0"])),
        (TypeError, "metrics must be names", lambda f: metrics.evaluate(f, [[1], [2]], [3])),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call(np.array([[1, 2], [3, 4]]))
