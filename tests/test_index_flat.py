"""lutra.index.Flat: search, ids, adding and removing, array libraries, bad input."""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import lutra
from lutra.index import Flat
from lutra.index._home import HOST, Home

METRICS = ("ip", "l2", "cosine")


def vectors(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def brute(q, x, ids, k, metric):
    """The definition in float64: sort all scores, pad with -1."""
    q, x = q.astype(np.float64), x.astype(np.float64)
    if metric == "l2":
        key = ((q[:, None] - x[None]) ** 2).sum(-1)
    else:
        key = -(q @ x.T)
        if metric == "cosine":
            norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)[None]
            key = np.divide(key, norms, out=np.zeros_like(key), where=norms > 0)
    order = np.argsort(key, axis=1, kind="stable")[:, :k]
    scores, found = np.take_along_axis(key, order, 1), np.asarray(ids)[order]
    short = k - order.shape[1]
    if short > 0:
        scores = np.pad(scores, ((0, 0), (0, short)), constant_values=np.inf)
        found = np.pad(found, ((0, 0), (0, short)), constant_values=-1)
    return (scores if metric == "l2" else -scores), found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n,d,k", [(1, 1, 1), (3, 2, 5), (17, 31, 4), (65, 33, 70), (200, 16, 10)])
def test_search_is_brute_force(metric, n, d, k):
    x, q = vectors(n, d), vectors(7, d, 1)
    ids = np.random.default_rng(2).choice(10**12, n, replace=False)
    index = Flat(d, metric)
    index.add(x, ids)
    scores, found = index.search(q, k)
    want_scores, want = brute(q, x, ids, k, metric)
    assert scores.dtype == np.float32 and found.dtype == np.int64
    np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_empty_index(metric):
    index = Flat(5, metric)
    for _ in range(2):
        assert len(index) == index.ntotal == 0
        with pytest.raises(ValueError, match=r"this Flat is empty: add\(x\) first"):
            index.search(vectors(2, 5), 3)
        index.add(np.empty((0, 5), np.float32))
    index.add(vectors(1, 5))
    assert index.search(np.empty((0, 5), np.float32), 3).ids.shape == (0, 3)
    scores, ids = index.search(vectors(2, 5), 3)
    assert (ids == [0, -1, -1]).all()
    assert (scores[:, 1:] == (np.inf if metric == "l2" else -np.inf)).all()


def test_default_ids_follow_the_largest():
    index = Flat(2)
    index.add(vectors(3, 2))
    index.add(vectors(2, 2), ids=[100, 50])
    index.add(vectors(1, 2))
    np.testing.assert_array_equal(index.ids, [0, 1, 2, 100, 50, 101])
    assert index.remove_ids([101, 0]) == 2
    index.add(vectors(1, 2))  # 101 is not used a second time
    np.testing.assert_array_equal(index.ids, [1, 2, 100, 50, 102])
    index.add(vectors(1, 2), ids=[101])  # but may be given again
    assert index.reconstruct(101).shape == (2,)


@pytest.mark.parametrize("order", ["increasing", "shuffled"])
def test_many_small_additions(order):
    """Growth must not be quadratic: the array moves a logarithmic number of times."""
    ids = np.arange(0, 60_000, 3)
    if order == "shuffled":
        np.random.default_rng(0).shuffle(ids)
    x = vectors(len(ids), 2)
    index = Flat(2, "l2")
    moves, before = 0, None
    for i in range(0, len(ids), 4):
        index.add(x[i : i + 4], ids[i : i + 4])
        array = index._rows["vectors"]._array
        moves += array is not before
        before = array
    assert moves < 40
    np.testing.assert_array_equal(index.ids, ids)
    np.testing.assert_array_equal(index.reconstruct(ids[::-7]), x[::-7])
    with pytest.raises(ValueError, match=r"ids\[1\] is 2997, which is in the index"):
        index.add(x[:2], [1, 2997])


def test_the_index_owns_its_vectors():
    x = vectors(10, 4)
    index = Flat(4, "l2")
    index.add(x)
    before = x.copy()
    x[:] = 0
    np.testing.assert_array_equal(index.reconstruct(np.arange(10)), before)
    index.reconstruct([3])[:] = 7
    np.testing.assert_array_equal(index.reconstruct(3), before[3])


def test_remove():
    x = vectors(50, 3)
    index = Flat(3, "l2")
    index.add(x)
    assert index.remove_ids([7, 7, 49, 1000, -5, 7]) == 2  # unknown ids are passed over
    assert len(index) == 48
    left = np.delete(np.arange(50), [7, 49])
    np.testing.assert_array_equal(index.ids, left)
    np.testing.assert_array_equal(index.reconstruct(left), x[left])
    np.testing.assert_array_equal(index.search(x[left], 1).ids[:, 0], left)
    assert index.remove_ids(0) == 1
    assert index.remove_ids([]) == 0
    assert index.remove_ids(np.arange(50)) == 47
    with pytest.raises(ValueError, match="is empty"):
        index.search(x[:1], 2)
    assert len(index) == 0
    index.add(x[:2])
    np.testing.assert_array_equal(index.ids, [50, 51])


def test_remove_gives_memory_back():
    index = Flat(64)
    index.add(vectors(10_000, 64))
    index.remove_ids(np.arange(100, 10_000))
    assert index._rows["vectors"]._array.shape[0] == 100
    assert index.nbytes == 100 * 64 * 4 + 100 * 8


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(np.float16),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(">f4"),
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, 0)[::2],
        lambda x: (x * 20).astype(np.int8),
        lambda x: np.abs(x * 20).astype(np.uint8),
    ],
    ids=["float16", "float64", "big-endian", "fortran", "strided", "int8", "uint8"],
)
def test_dtypes_and_layouts(convert):
    x = convert(vectors(40, 9))
    index = Flat(9, "l2")
    index.add(x)
    exact = np.ascontiguousarray(x.astype(np.float32))
    np.testing.assert_array_equal(index.reconstruct(np.arange(40)), exact)
    scores, ids = index.search(x, 1)
    np.testing.assert_array_equal(scores, 0)
    np.testing.assert_array_equal(exact[ids[:, 0]], exact)


def test_zero_vectors_have_cosine_zero():
    index = Flat(3, "cosine")
    index.add(np.array([[0, 0, 0], [1, 0, 0], [-1, 0, 0]], np.float32))
    scores, ids = index.search(np.array([[2, 0, 0], [0, 0, 0]], np.float32), 3)
    np.testing.assert_allclose(scores, [[1, 0, -1], [0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(ids, [[1, 0, 2], [0, 1, 2]])


def test_equal_scores_in_the_order_of_addition():
    index = Flat(2, "ip")
    index.add(np.ones((4, 2), np.float32), ids=[30, 10, 20, 5])
    np.testing.assert_array_equal(index.search(np.ones((1, 2), np.float32), 4).ids, [[30, 10, 20, 5]])


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    x = vectors(30, 8)
    index = Flat(8)
    index.add(torch.from_numpy(x), ids=torch.arange(100, 130))
    assert index.device == "cpu"
    scores, ids = index.search(torch.from_numpy(x[:3]).requires_grad_(), 2)
    want = index.search(x[:3], 2)
    assert isinstance(ids, torch.Tensor) and ids.dtype == torch.int64 and not scores.requires_grad
    np.testing.assert_array_equal(ids.numpy(), want.ids)
    np.testing.assert_array_equal(scores.numpy(), want.scores)
    half = index.search(torch.from_numpy(x[:3]).bfloat16(), 2)
    assert half.scores.dtype == torch.float32
    assert isinstance(index.reconstruct(torch.tensor([101])), torch.Tensor)
    assert isinstance(index.reconstruct([101]), np.ndarray)
    assert index.remove_ids(torch.tensor([101, 102])) == 2


def test_dlpack_in():
    class Foreign:
        """An array of a library that lutra does not know."""

        def __init__(self, a):
            self.a = a

        def __dlpack__(self, **kwargs):
            return self.a.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.a.__dlpack_device__()

    x = vectors(20, 4)
    index = Flat(4, "l2")
    index.add(Foreign(x))
    np.testing.assert_array_equal(index.search(Foreign(x), 1).ids[:, 0], np.arange(20))


@pytest.mark.parametrize("metric", METRICS)
def test_homes_other_than_numpy(metric):
    """The way of a GPU index (arrays of torch, all on their device), with CPU tensors in their place."""
    torch = pytest.importorskip("torch")
    from lutra._arrays import torch_kind

    x, q = vectors(60, 7), vectors(5, 7, 1)
    ids = np.arange(60)[::-1] * 3
    want = Flat(7, metric)
    want.add(x, ids)
    index = Flat(7, metric)
    index._move(Home(torch_kind(False), torch.empty(0)))
    index.add(x[:30], ids[:30])
    index.add(torch.from_numpy(x[30:]), ids[30:])
    for removed in ([], [3, 60, 90]):
        assert index.remove_ids(removed) == want.remove_ids(removed)
        assert isinstance(index._rows["vectors"].view, torch.Tensor)
        for queries in (q, torch.from_numpy(q)):
            scores, found = index.search(queries, 70)
            assert type(scores) is type(found) is type(queries)
            np.testing.assert_array_equal(np.asarray(found), want.search(q, 70).ids)
            np.testing.assert_array_equal(np.asarray(scores), want.search(q, 70).scores)
        np.testing.assert_array_equal(index.reconstruct(want.ids), want.reconstruct(want.ids))
    index._move(HOST)
    np.testing.assert_array_equal(index.search(q, 3).ids, want.search(q, 3).ids)


def test_to():
    index = Flat(3)
    index.add(vectors(4, 3))
    assert index.to("cpu") is index and index.device == "cpu"
    for wrong in ("gpu", "cuda:x", 0, None):
        with pytest.raises(ValueError, match="device must be"):
            index.to(wrong)


def test_copies():
    index = Flat(3, "l2")
    index.add(vectors(4, 3), ids=[4, 2, 9, 0])
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        index.search(vectors(1, 3))
        other.remove_ids(4)
        assert len(index) == 4 and len(other) == 3
        np.testing.assert_array_equal(other.search(vectors(4, 3)[1:], 1).ids[:, 0], [2, 9, 0])


def test_works_without_torch_cupy_and_tqdm():
    script = (
        "import sys\n"
        "for name in ('torch', 'cupy', 'tqdm'): sys.modules[name] = None\n"
        "import numpy as np, lutra\n"
        "index = lutra.index.PQ(4, 2, 2)\n"
        "index.train(np.eye(4, dtype=np.float32).repeat(40, 0))\n"
        "index.add(np.eye(4, dtype=np.float32))\n"
        "print(index.search(np.eye(4, dtype=np.float32), 1).ids.ravel().tolist())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "[0, 1, 2, 3]\n"), done.stderr


def test_describes_itself():
    index = Flat(3, "cosine")
    index.add(vectors(4, 3))
    assert repr(index) == "Flat(d=3, metric='cosine', ntotal=4, device='cpu')"
    assert index.is_trained and index.d == 3 and index.metric == "cosine"
    assert index.nbytes == 4 * 3 * 4
    index.train(vectors(4, 3))
    assert len(index) == 4


X = vectors(4, 3)
NAN = X.copy()
NAN[2, 1] = np.nan
INF = X.copy()
INF[3, 0] = -np.inf


@pytest.mark.parametrize(
    "error,match,args",
    [
        (TypeError, "x must be a NumPy, torch or CuPy array", ([[1, 2, 3]],)),
        (TypeError, "x must be", (None,)),
        (TypeError, "x has dtype int64", (X.astype(np.int64),)),
        (TypeError, "x has dtype complex64", (X.astype(np.complex64),)),
        (ValueError, r"x must be 2-d .* got shape \(3,\); x\[None\]", (X[0],)),
        (ValueError, r"x must be 2-d .* got shape \(1, 4, 3\)", (X[None],)),
        (ValueError, "x has 2 columns; the index has d = 3", (X[:, :2],)),
        (ValueError, r"x\[2, 1\] is nan, which is not finite", (NAN,)),
        (ValueError, r"x\[3, 0\] is -inf, which is not finite", (INF,)),
        (ValueError, r"x\[0, 0\] is 1e\+39, which is too large for float32", (np.full((1, 3), 1e39),)),
        (ValueError, r"ids has shape \(3,\); x has 4 rows", (X, [1, 2, 3])),
        (ValueError, "ids must be 1-d", (X, [[1, 2, 3, 4]])),
        (ValueError, r"ids\[0\] and ids\[3\] are both 4", (X, [4, 2, 3, 4])),
        (ValueError, r"ids\[1\] is -2", (X, [4, -2, 3, 1])),
        (ValueError, r"ids\[2\] is 77, which is in the index", (X, [4, 2, 77, 1])),
        (ValueError, "less than 2\\*\\*63", (X, np.array([1, 2, 3, 2**63], np.uint64))),
        (ValueError, "less than 2\\*\\*63", (X, [1, 2, 3, 2**63 - 1])),
        (TypeError, "ids must be integers", (X, [1.0, 2.0, 3.0, 4.0])),
        (TypeError, "ids must be integers", (X, ["a", "b", "c", "d"])),
        (TypeError, "ids must be integers", (X, [1, 2, 3, 2**70])),
        (TypeError, "ids must be integers", (X, [True, False, True, False])),
    ],
)
def test_bad_additions_change_nothing(error, match, args):
    index = Flat(3, "l2")
    index.add(vectors(1, 3, 5), ids=[77])
    with pytest.raises(error, match=match):
        index.add(*args)
    np.testing.assert_array_equal(index.ids, [77])
    np.testing.assert_array_equal(index.reconstruct(77), vectors(1, 3, 5)[0])
    index.add(X)
    np.testing.assert_array_equal(index.ids, [77, 78, 79, 80, 81])


@pytest.mark.parametrize(
    "error,match,args",
    [
        (TypeError, "q must be", ([[1.0, 2.0, 3.0]],)),
        (TypeError, "q has dtype", (X.astype(np.int32),)),
        (ValueError, "q has 2 columns", (X[:, :2],)),
        (ValueError, r"q must be 2-d .*q\[None\] makes", (X[0],)),
        (ValueError, r"q\[2, 1\] is nan", (NAN,)),
        (ValueError, r"q\[3, 0\] is -inf", (INF,)),
        (ValueError, "k must be >= 1, got 0", (X, 0)),
        (ValueError, "k must be >= 1, got -3", (X, -3)),
        (TypeError, "k must be an integer", (X, 2.0)),
        (TypeError, "k must be an integer", (X, True)),
    ],
)
def test_bad_searches(error, match, args):
    index = Flat(3)
    index.add(X)
    with pytest.raises(error, match=match):
        index.search(*args)


def test_other_bad_input():
    for d in (0, -1, 2**31):
        with pytest.raises(ValueError, match="d must be"):
            Flat(d)
    with pytest.raises(TypeError, match="d must be an integer"):
        Flat(3.0)
    for metric in ("L2", "euclid", None, 1):
        with pytest.raises(ValueError, match="metric must be one of"):
            Flat(3, metric)
    index = Flat(3)
    index.add(X, ids=[5, 6, 7, 8])
    with pytest.raises(IndexError, match=r"ids\[1\] is 9, which is not in the index"):
        index.reconstruct([5, 9])
    with pytest.raises(IndexError, match="ids is -1, which is not in the index"):
        index.reconstruct(-1)
    with pytest.raises(TypeError, match="ids must be integers"):
        index.remove_ids(["a"])
    with pytest.raises(ValueError, match="x has 4 columns"):
        index.train(vectors(3, 4))


def test_the_largest_ids():
    index = Flat(1)
    top = 2**63 - 2
    index.add(np.ones((1, 1), np.float32), ids=[top])
    assert index.search(np.ones((1, 1), np.float32), 1).ids[0, 0] == top
    with pytest.raises(ValueError, match="exceed int64"):
        index.add(np.ones((1, 1), np.float32))


def test_results_do_not_depend_on_threads():
    x, q = vectors(3000, 24), vectors(40, 24, 1)
    index = Flat(24, "l2")
    index.add(x)
    results = []
    for n in (1, 2):
        lutra.set_num_threads(n)
        results.append(index.search(q, 10))
    lutra.set_num_threads(0)
    np.testing.assert_array_equal(results[0].scores, results[1].scores)
    np.testing.assert_array_equal(results[0].ids, results[1].ids)
