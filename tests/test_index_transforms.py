"""lutra.index.transforms and Transformed."""

import copy
import pickle

import numpy as np
import pytest
import safetensors.numpy

from lutra.index import PQ, Binary, Flat, Transformed, load, transforms
from lutra.index.transforms import (
    PCA,
    Chain,
    Normalize,
    RandomRotation,
    Rotation,
    Truncate,
    Whitening,
)

D = 12


def vectors(n=500, d=D, seed=0):
    """Correlated, of unequal variances, away from zero."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) * np.linspace(0.2, 3, d)
    return (rng.standard_normal((n, d)) @ mix + 4).astype(np.float32)


def every():
    return {
        "normalize": Normalize(D),
        "truncate": Truncate(D, 5),
        "truncate-plain": Truncate(D, 5, normalize=False),
        "pca": PCA(D, 5),
        "pca-whole": PCA(D, D),
        "pca-whiten": PCA(D, 4, whiten=True),
        "pca-no-center": PCA(D, 7, center=False),
        "whitening": Whitening(D),
        "zca": Whitening(D, "zca"),
        "rotation": RandomRotation(D),
        "projection": RandomRotation(D, 7, seed=3),
        "embedding": RandomRotation(D, 20, seed=3),
        "given": Rotation(np.linalg.qr(vectors(D))[0]),
        "chain": Chain([PCA(D, 8), RandomRotation(8), Normalize(8)]),
    }


NAMES = list(every())
LOSSLESS = ("pca-whole", "whitening", "zca", "rotation", "embedding", "given")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_batches_and_inverse(name):
    t, x = every()[name], vectors()
    assert t.train(x) is t and t.is_trained
    y = t.apply(x)
    assert y.shape == (500, t.d_out) and y.dtype == np.float32 and t.d_in == D
    parts = np.concatenate([t.apply(x[:1]), t.apply(x[1:30]), t(x[30:])])
    np.testing.assert_array_equal(parts, y)
    back = t.inverse(y)
    assert back.shape == x.shape and back.dtype == np.float32
    if name in LOSSLESS:
        np.testing.assert_allclose(back, x, atol=2e-3)
    if name != "chain":  # what was lost stays lost: the way there and back is a projection
        np.testing.assert_allclose(t.apply(back), y, atol=5e-3)
    assert t.apply(x[:0]).shape == (0, t.d_out)


@pytest.mark.parametrize("name", NAMES)
def test_files(name, tmp_path):
    t, x = every()[name], vectors()
    t.save(tmp_path / "untrained")
    assert repr(transforms.load(tmp_path / "untrained")) == repr(t)
    t.train(x)
    t.save(tmp_path / "trained")
    again = transforms.load(tmp_path / "trained")
    assert repr(again) == repr(t) and type(again) is type(t)
    np.testing.assert_array_equal(again.apply(x), t.apply(x))
    np.testing.assert_array_equal(again.inverse(t.apply(x)), t.inverse(t.apply(x)))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(t)).apply(x), t.apply(x))
    with pytest.raises(ValueError, match="kind 'Transform'"):
        load(tmp_path / "trained")
    Flat(3).save(tmp_path / "index")
    with pytest.raises(ValueError, match="this file holds 'Flat', not a transform"):
        transforms.load(tmp_path / "index")


def test_pca_is_the_definition():
    x = vectors(900)
    t = PCA(D, 5)
    y = t.train(x).apply(x).astype(np.float64)
    covariance = np.cov(x.T.astype(np.float64))
    values = np.linalg.eigvalsh(covariance)[::-1]
    np.testing.assert_allclose(np.cov(y.T), np.diag(values[:5]), atol=1e-3 * values[0])
    np.testing.assert_allclose(t.explained_variance, values[:5], rtol=1e-5)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-3)
    # no projection of rank 5 leaves less: the rest of the spectrum is what is lost
    lost = ((t.inverse(y.astype(np.float32)) - x) ** 2).sum() / 899
    np.testing.assert_allclose(lost, values[5:].sum(), rtol=1e-3)
    assert (t.matrix[np.arange(5), np.abs(t.matrix).argmax(1)] > 0).all()  # signs are fixed
    sklearn = pytest.importorskip("sklearn.decomposition")
    want = sklearn.PCA(5).fit_transform(x.astype(np.float64))
    np.testing.assert_allclose(np.abs(y), np.abs(want), atol=1e-3)
    uncentred = PCA(D, D, center=False).train(x).apply(x)
    np.testing.assert_allclose(uncentred @ uncentred.T, x @ x.T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "t", [PCA(D, D, whiten=True, eps=0), Whitening(D, eps=0), Whitening(D, "zca", eps=0)]
)
def test_whitened_covariance_is_the_identity(t):
    x = vectors(4000)
    y = t.train(x).apply(x).astype(np.float64)
    np.testing.assert_allclose(np.cov(y.T), np.eye(D), atol=5e-3)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-3)
    # Euclidean distances after it are Mahalanobis distances before it
    inverse = np.linalg.inv(np.cov(x.T.astype(np.float64)))
    difference = (x[:50] - x[50:100]).astype(np.float64)
    want = np.einsum("ij,jk,ik->i", difference, inverse, difference)
    np.testing.assert_allclose(((y[:50] - y[50:100]) ** 2).sum(1), want, rtol=2e-2)


def test_zca_is_symmetric_and_flat_directions_are_not_blown_up():
    x = vectors(2000)
    zca = Whitening(D, "zca").train(x)
    np.testing.assert_allclose(zca.matrix, zca.matrix.T, atol=1e-9)
    x[:, 3] = 7.0
    for t in (Whitening(D), PCA(D, D, whiten=True)):
        assert np.abs(t.train(x).apply(x)).max() < 20
    same = Whitening(D).train(np.ones((5, D), np.float32))
    assert np.isfinite(same.apply(x)).all()


def test_rotations_keep_inner_products():
    x = vectors(60)
    for t in (RandomRotation(D), RandomRotation(D, 20), Rotation(np.linalg.qr(vectors(D))[0])):
        y = t.apply(x)
        np.testing.assert_allclose(y @ y.T, x @ x.T, rtol=1e-4)
    np.testing.assert_array_equal(RandomRotation(D, seed=1).matrix, RandomRotation(D, seed=1).matrix)
    assert np.abs(RandomRotation(D, seed=1).matrix - RandomRotation(D).matrix).max() > 0.1


def test_torch():
    torch = pytest.importorskip("torch")
    x = vectors(40)
    t = PCA(D, 4).train(torch.tensor(x))
    y = t.apply(torch.tensor(x))
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), t.apply(x))
    index = Transformed(t, Flat(4, "l2"))
    index.add(torch.tensor(x))
    assert isinstance(index.search(torch.tensor(x), 1).ids, torch.Tensor)


def test_bad_input(tmp_path):
    x = vectors(20)
    with pytest.raises(ValueError, match="this PCA is not trained: call train"):
        PCA(D, 3).apply(x)
    with pytest.raises(ValueError, match="x has 5 columns; PCA needs 12"):
        PCA(D, 3).train(x[:, :5])
    with pytest.raises(ValueError, match="x has 1 rows; a covariance needs 2"):
        PCA(D, 3).train(x[:1])
    with pytest.raises(ValueError, match="d_out must be at most d_in = 12, got 13"):
        PCA(D, 13)
    with pytest.raises(ValueError, match="kind must be one of 'pca', 'zca'; got 'ica'"):
        Whitening(D, "ica")
    with pytest.raises(ValueError, match=r"eps must be a number in \[0, 1\), got -1"):
        Whitening(D, eps=-1)
    with pytest.raises(ValueError, match="matrix is no rotation"):
        Rotation(x[:D])
    with pytest.raises(ValueError, match=r"gives 3 values, Normalize\(d_in=4\) takes 4"):
        Chain([PCA(D, 3), Normalize(4)])
    with pytest.raises(TypeError, match="transforms must be a list of transforms"):
        Chain([])
    x[3, 2] = np.inf
    with pytest.raises(ValueError, match=r"x\[3, 2\] is inf, which is not finite"):
        Normalize(D).apply(x)
    t = PCA(D, 3).train(vectors(20))
    t.save(tmp_path / "good")
    data = safetensors.numpy.load_file(tmp_path / "good")
    with safetensors.safe_open(tmp_path / "good", "numpy") as file:
        metadata = file.metadata()
    data["transform.a"][0, 0] = np.nan
    safetensors.numpy.save_file(data, tmp_path / "bad", metadata)
    with pytest.raises(ValueError, match=r"do not describe a transform: the tensor transform\.a holds NaN"):
        transforms.load(tmp_path / "bad")
    metadata["config"] = metadata["config"].replace('"PCA"', '"os.system"')
    safetensors.numpy.save_file(data, tmp_path / "bad", metadata)
    with pytest.raises(ValueError, match=r"a transform of kind 'os\.system'"):
        transforms.load(tmp_path / "bad")


# ---- Transformed
def test_transformed_is_the_index_of_transformed_vectors(tmp_path):
    x, q = vectors(), vectors(7, seed=5)
    ids = np.arange(500) * 3 + 1
    for name, t in every().items():
        index = Transformed(t, Flat(t.d_out, "l2"))
        index.train(x)
        index.add(x[:300], ids[:300])
        index.add(x[300:], ids[300:])
        plain = Flat(t.d_out, "l2")
        plain.add(t.apply(x), ids)
        got, want = index.search(q, 6), plain.search(t.apply(q), 6)
        np.testing.assert_array_equal(got.ids, want.ids, err_msg=name)
        np.testing.assert_array_equal(got.scores, want.scores)
        np.testing.assert_array_equal(index.reconstruct(ids[:4]), t.inverse(t.apply(x[:4])))
        np.testing.assert_array_equal(index.reconstruct(4), index.reconstruct([4])[0])
        assert index.d == D and index.ntotal == len(index) == 500 and index.metric == "l2"
        assert index.remove_ids(ids[:2]) == 2 and index.ids.tolist() == ids[2:].tolist()
        index.save(tmp_path / "index")
        for again in (load(tmp_path / "index"), load(tmp_path / "index", mmap=False), copy.deepcopy(index)):
            assert repr(again) == repr(index) and again.nbytes == index.nbytes
            np.testing.assert_array_equal(again.search(q, 6).ids, index.search(q, 6).ids)
            again.add(x[:2])
            assert again.ids[-2:].tolist() == [1499, 1500]


def test_transformed_around_other_kinds(tmp_path):
    x = vectors(900)
    coded = Transformed(PCA(D, 8), PQ(8, 4, bits=4, refine="float16"))
    assert not coded.is_trained
    coded.train(x, n_iter=3, max_points_per_centroid=None)
    coded.add(x)
    bits = Transformed(Chain([Whitening(D), RandomRotation(D)]), Binary(D, refine="int8", similarity="l2"))
    bits.train(x)
    bits.add(x)
    for index, options in ((coded, {"refine": 8}), (bits, {"refine_factor": 30})):
        assert (index.search(x[:50], 1, **options).ids[:, 0] == np.arange(50)).mean() > 0.9
        index.save(tmp_path / "index")
        again = load(tmp_path / "index")
        np.testing.assert_array_equal(again.search(x[:50], 3).ids, index.search(x[:50], 3).ids)
    few = bits.search(x[:5], 6, filter=[4, 7, 100]).ids
    assert (np.sort(few, axis=1) == [-1, -1, -1, 4, 7, 100]).all()
    bits.refine_factor = 9  # a parameter of the index behind
    assert bits.index.refine_factor == 9 == bits.refine_factor
    untrained = Transformed(PCA(D, 8), PQ(8, 4))
    untrained.save(tmp_path / "untrained")
    assert not load(tmp_path / "untrained").is_trained


def test_transformed_bad_input():
    x = vectors(30)
    with pytest.raises(ValueError, match="the transform gives 5 values, the index takes d = 6"):
        Transformed(PCA(D, 5), Flat(6))
    with pytest.raises(TypeError, match=r"transform must be one of lutra\.index\.transforms"):
        Transformed(np.eye(3), Flat(3))
    with pytest.raises(TypeError, match="index must be a lutra index"):
        Transformed(Normalize(3), np.eye(3))
    with pytest.raises(TypeError, match="index is a Transformed already"):
        Transformed(Normalize(3), Transformed(Normalize(3), Flat(3)))
    full = Flat(3)
    full.add(x[:, :3])
    with pytest.raises(ValueError, match="the index holds 30 vectors that did not pass"):
        Transformed(Normalize(3), full)
    index = Transformed(PCA(D, 5), Flat(5))
    for call in (index.add, index.search):
        with pytest.raises(ValueError, match="this Transformed is not trained"):
            call(x)
    index.train(x)
    with pytest.raises(ValueError, match="this Flat is empty"):
        index.search(x)
    index.add(x)
    with pytest.raises(ValueError, match="the index holds 30 transformed vectors"):
        index.train(x)
    with pytest.raises(AttributeError, match="transform cannot be replaced"):
        index.transform = PCA(D, 5)
    with pytest.raises(AttributeError, match="no_such_thing"):
        index.no_such_thing  # noqa: B018
