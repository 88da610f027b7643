"""lutra.sklearn: scikit-learn's own checks of estimators, and agreement with its NearestNeighbors.

All checks pass; scikit-learn's KNeighborsTransformer is excused from check_methods_sample_order_invariance.
"""

import pickle
import subprocess
import sys

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn", minversion="1.6")
neighbors = pytest.importorskip("sklearn.neighbors")

from sklearn.base import clone  # noqa: E402
from sklearn.cluster import DBSCAN  # noqa: E402
from sklearn.manifold import Isomap  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from lutra.sklearn import NearestNeighbors  # noqa: E402


def vectors(n, d=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


@parametrize_with_checks([NearestNeighbors(), NearestNeighbors(mode="connectivity", metric="cosine")])
def test_check_estimator(estimator, check):
    check(estimator)


METRICS = [
    ("euclidean", 2), ("sqeuclidean", 2), ("cosine", 2), ("minkowski", 2), ("l2", 2),
    ("manhattan", 2), ("chebyshev", 2), ("minkowski", 1), ("minkowski", np.inf),
]  # fmt: skip


@pytest.mark.parametrize("metric, p", METRICS)
def test_same_as_scikit_learn(metric, p):
    x, q = vectors(200), vectors(33, seed=1)
    ours = NearestNeighbors(n_neighbors=7, metric=metric, p=p).fit(x)
    theirs = neighbors.NearestNeighbors(n_neighbors=7, metric=metric, p=p).fit(x)
    for queries in (q, None):
        distances, ids = ours.kneighbors(queries)
        want, want_ids = theirs.kneighbors(queries)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(distances, want, rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(ours.kneighbors(queries, 3, return_distance=False), want_ids[:, :3])
        radius = float(np.median(want)) + 1e-4
        distances, ids = ours.radius_neighbors(queries, radius)
        want, want_ids = theirs.radius_neighbors(queries, radius, sort_results=True)
        for a, b, c, d in zip(distances, want, ids, want_ids):
            np.testing.assert_array_equal(c, d)
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["connectivity", "distance"])
def test_graphs(mode):
    x, q = vectors(150), vectors(20, seed=1)
    ours = NearestNeighbors(n_neighbors=4, radius=3.0, mode=mode).fit(x)
    theirs = neighbors.NearestNeighbors(n_neighbors=4, radius=3.0).fit(x)
    transformer = neighbors.KNeighborsTransformer(n_neighbors=4, mode=mode)
    for queries in (q, None):
        for ours_, theirs_ in (
            (ours.kneighbors_graph(queries, mode=mode), theirs.kneighbors_graph(queries, mode=mode)),
            (
                ours.radius_neighbors_graph(queries, mode=mode),
                theirs.radius_neighbors_graph(queries, mode=mode),
            ),
        ):
            assert ours_.format == "csr" and ours_.shape == theirs_.shape
            np.testing.assert_allclose(ours_.toarray(), theirs_.toarray(), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        ours.fit_transform(x).toarray(), transformer.fit_transform(x).toarray(), rtol=2e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        ours.transform(q).toarray(), transformer.transform(q).toarray(), rtol=2e-5, atol=1e-6
    )


def test_radius_of_many_and_of_none():
    """More than the first round looks at; and empty rows."""
    x = vectors(1000)
    ours = NearestNeighbors(radius=100).fit(x)
    ids = ours.radius_neighbors(x[:3], return_distance=False)
    assert [sorted(row) for row in ids] == [list(range(1000))] * 3
    ids = ours.radius_neighbors(None, 3.0, return_distance=False)
    theirs = neighbors.NearestNeighbors().fit(x)
    want = theirs.radius_neighbors(None, 3.0, return_distance=False)
    assert [sorted(a) for a in ids] == [sorted(a) for a in want]
    assert max(len(a) for a in ids) > 64
    distances, ids = ours.radius_neighbors(x[:2] + 100, 0.5)
    assert [len(a) for a in ids] == [0, 0] == [len(a) for a in distances]
    assert ours.radius_neighbors_graph(x[:2] + 100, 0.5).nnz == 0


def test_in_pipelines_and_for_precomputed_graphs():
    x = vectors(80)
    want = Isomap(n_neighbors=6).fit_transform(x)
    ours = make_pipeline(NearestNeighbors(n_neighbors=6), Isomap(n_neighbors=6, metric="precomputed"))
    np.testing.assert_allclose(np.abs(ours.fit_transform(x)), np.abs(want), rtol=1e-3, atol=1e-3)
    graph = NearestNeighbors().fit(x).radius_neighbors_graph(x, 2.5, mode="distance")
    labels = DBSCAN(eps=2.5, min_samples=4, metric="precomputed").fit_predict(graph)
    np.testing.assert_array_equal(labels, DBSCAN(eps=2.5, min_samples=4).fit_predict(x))


def test_duplicates_are_neighbours_of_each_other():
    x = np.zeros((9, 3))
    distances, ids = NearestNeighbors(n_neighbors=3).fit(x).kneighbors()
    assert (distances == 0).all()
    assert (ids != np.arange(9)[:, None]).all()
    assert all(len(set(row)) == 3 for row in ids.tolist())


def test_dtypes_names_pickles_and_clones():
    x = vectors(60)
    for dtype in (np.float32, np.float64):
        assert NearestNeighbors().fit(x).kneighbors(x.astype(dtype))[0].dtype == dtype
    ours = NearestNeighbors(n_neighbors=2).fit(x)
    again = pickle.loads(pickle.dumps(ours))
    np.testing.assert_array_equal(again.kneighbors(x)[1], ours.kneighbors(x)[1])
    assert clone(ours).get_params() == ours.get_params()
    assert list(ours.get_feature_names_out()[:2]) == ["nearestneighbors0", "nearestneighbors1"]
    assert ours.effective_metric_ == "l2" and ours.n_samples_fit_ == 60


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"metric": "jaccard-ish"}, "metric must be one of"),
        ({"p": 3}, "p must be 1, 2 or inf"),
        ({"n_neighbors": 0}, "n_neighbors > 0"),
        ({"mode": "weights"}, "mode must be"),
        ({"recall": 0}, "recall must be in"),
        ({"recall": True}, "recall must be in"),
        ({"algorithm": None}, "algorithm must be a string"),
    ],
)
def test_errors_of_the_constructor_come_with_fit(arguments, match):
    estimator = NearestNeighbors(**arguments)
    with pytest.raises(ValueError, match=match):
        estimator.fit(vectors(10))


def test_errors():
    x = vectors(10)
    ours = NearestNeighbors(n_neighbors=5).fit(x)
    with pytest.raises(ValueError, match="n_neighbors <= n_samples_fit, but n_neighbors = 11"):
        ours.kneighbors(x, 11)
    with pytest.raises(ValueError, match="n_neighbors < n_samples_fit, but n_neighbors = 10"):
        ours.kneighbors(n_neighbors=10)
    with pytest.raises(TypeError, match="n_neighbors must be an integer"):
        ours.kneighbors(x, 1.5)
    with pytest.raises(ValueError, match="return_distance must be True"):
        ours.radius_neighbors(x, return_distance=False, sort_results=True)
    with pytest.raises(ValueError, match="radius must be a number"):
        ours.radius_neighbors(x, radius=float("nan"))
    with pytest.raises(ValueError, match="beyond float32"):
        ours.kneighbors(np.full((1, 8), 1e300))
    with pytest.raises(ValueError, match="NaN"):
        ours.kneighbors(np.full((1, 8), np.nan))


def test_lutra_itself_does_not_import_scikit_learn():
    code = (
        "import sys, lutra, lutra.index\n"
        "sys.exit(any(name.split('.')[0] in ('sklearn', 'scipy') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
