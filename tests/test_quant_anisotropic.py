"""PQ with the anisotropic loss (AVQ): recall of inner products, residuals, files."""

from __future__ import annotations

import numpy as np
import pytest

from lutra import _backend, address, quant
from lutra.bench.data import clustered
from lutra.index import IVF, load
from lutra.quant import _anisotropic
from lutra.reference.quant import pq_encode

pytestmark = pytest.mark.filterwarnings("ignore:.*advisable")


def loss(x, decoded, directions, threshold):
    unit, more = _anisotropic.weights(directions, threshold)
    r = x - decoded
    return (np.square(r).sum(1) + more * np.square((r * unit).sum(1))).mean()


def recall(x, q, decoded):
    exact, coded = (np.argsort(-(q @ rows.T), 1)[:, :10] for rows in (x, decoded))
    return np.mean([len(set(a) & set(b)) for a, b in zip(exact, coded)]) / 10


def test_recall_rises():
    n = 3000 if _backend.core is None else 20000
    x, q = clustered(n, 64, queries=100)
    plain = quant.PQ(64, 32, 4).train(x)
    along = quant.PQ(64, 32, 4).train(x, loss="anisotropic")
    same = quant.PQ(64, 32, 4, loss="anisotropic").train(x)
    np.testing.assert_array_equal(same.codebooks, along.codebooks)
    decoded = [a.decode(a.encode(x)) for a in (plain, along)]
    assert loss(x, decoded[1], x, 0.2) < 0.95 * loss(x, decoded[0], x, 0.2)
    assert np.square(x - decoded[1]).sum() > np.square(x - decoded[0]).sum()
    assert recall(x, q, decoded[1]) > recall(x, q, decoded[0]) + 0.02


def test_no_step_raises_the_loss():
    x = clustered(2000, 24, queries=1)[0]
    books = quant.PQ(24, 8, 4).train(x, n_iter=2).codebooks
    unit, more = _anisotropic.weights(x, 0.3)
    losses = []
    for _ in range(4):
        entries = pq_encode(x, books, None, 0.3, 5)
        losses.append(loss(x, books[np.arange(8), entries].reshape(-1, 24), x, 0.3))
        books = _anisotropic.update(x.astype(np.float64), unit, more, entries, books)
        losses.append(loss(x, books[np.arange(8), entries].reshape(-1, 24), x, 0.3))
    assert (np.diff(losses) <= 1e-6).all()
    assert losses[-1] < 0.95 * losses[0]


def test_update_is_the_minimum():
    """The gradient of the loss by the last sub-space's centroids, which were chosen last, is 0."""
    x = clustered(500, 6, queries=1)[0].astype(np.float64)
    books = quant.PQ(6, 3, 2).train(x).codebooks
    unit, more = _anisotropic.weights(x, 0.5)
    entries = pq_encode(x.astype(np.float32), books, None, 0.5, 5)
    books = _anisotropic.update(x, unit, more, entries, books).astype(np.float64)
    r = x - books[np.arange(3), entries].reshape(-1, 6)
    gradient = r[:, 4:] + (more * (r * unit).sum(1))[:, None] * unit[:, 4:]
    for c in range(4):
        np.testing.assert_allclose(gradient[entries[:, 2] == c].sum(0), 0, atol=1e-3)


@pytest.mark.parametrize("kind", (quant.PQ, quant.OPQ))
def test_residuals(kind, tmp_path):
    x = clustered(2000, 16, queries=1)[0]
    centroids = x[:20]
    left = x - centroids[np.argmin(np.square(x[:, None] - centroids).sum(-1), 1)]
    quantizer = kind(16, 8, 4).train(left, loss="anisotropic", threshold=0.5, directions=x)
    codes = quantizer.encode(left, directions=x)
    plain = kind(16, 8, 4).train(left)
    losses = [loss(left, a, x, 0.5) for a in (quantizer.decode(codes), plain.decode(plain.encode(left)))]
    assert losses[0] < 0.9 * losses[1]
    quantizer.save(tmp_path / "file")
    loaded = quant.load(tmp_path / "file")
    np.testing.assert_array_equal(loaded.encode(left, directions=x), codes)
    assert not np.array_equal(loaded.encode(left), codes)
    np.testing.assert_array_equal(quantizer.encode(left[7:9], directions=x[7:9]), codes[7:9])


def in_lists(kind, x, **options):
    quantizer = kind(16, 8, 4, loss="anisotropic", threshold=0.5)
    index = IVF(16, 10, quantizer, options.pop("metric", "ip"), **options)
    index.train(x)
    index.add(x)
    return index


@pytest.mark.parametrize("kind", (quant.PQ, quant.OPQ))
@pytest.mark.parametrize("metric", ("ip", "cosine"))
def test_lists_pass_the_directions_on(kind, metric, tmp_path):
    x = clustered(2000, 16, queries=1)[0]
    index = in_lists(kind, 2 * x if metric == "cosine" else x, metric=metric)
    centroids = index.centroids
    middle = centroids[address.nearest(x, centroids, 1, "l2").ids[:, 0]]
    same = kind(16, 8, 4, loss="anisotropic", threshold=0.5).train(x - middle, directions=x)
    np.testing.assert_allclose(same.codebooks, index.quantizer.codebooks, atol=1e-5)
    decoded = index.quantizer.decode(index.quantizer.encode(x - middle, directions=x))
    found = index.reconstruct(np.arange(len(x)))
    close = (np.abs(found - middle - decoded) < 1e-5).all(1)
    assert close.mean() > 0.99  # of equally good codes either may be chosen where x was rounded again
    blind = index.quantizer.decode(index.quantizer.encode(x - middle))
    assert (np.abs(blind - decoded) > 1e-3).any(1).mean() > 0.1
    index.save(tmp_path / "file")
    loaded = load(tmp_path / "file")
    index.add(x[:50] + 0.01)
    loaded.add(x[:50] + 0.01)
    rows = np.arange(len(x), len(x) + 50)
    np.testing.assert_array_equal(loaded.reconstruct(rows), index.reconstruct(rows))


@pytest.mark.parametrize("soar", (False, True))
def test_directions_lower_the_error_along_the_vector(monkeypatch, soar):
    x, q = clustered(3000, 16, queries=50)

    def along(index):
        found = index.search(q, 10, nprobe=10)
        assert (found.ids >= 0).all()
        return np.square(((x - index.reconstruct(np.arange(len(x)))) * x).sum(1)).mean()

    informed = along(in_lists(quant.PQ, x, soar=soar))
    monkeypatch.setattr(quant.PQ, "_uses_directions", False)
    assert informed < 0.7 * along(in_lists(quant.PQ, x, soar=soar))


def test_no_directions_without_residuals(monkeypatch):
    x = clustered(1000, 16, queries=1)[0]
    index = in_lists(quant.PQ, x, residual=False)
    np.testing.assert_allclose(
        index.reconstruct(np.arange(99)), index.quantizer.decode(index.quantizer.encode(x[:99])), atol=1e-6
    )


def test_errors():
    x = clustered(100, 8, queries=1)[0]
    plain = quant.PQ(8, 4, 2)
    with pytest.raises(ValueError, match="loss must be one of"):
        quant.PQ(8, 4, 2, loss=None)
    with pytest.raises(ValueError, match="loss must be one of 'l2', 'anisotropic'; got 'l1'"):
        plain.train(x, loss="l1")
    with pytest.raises(ValueError, match="threshold must be a positive finite number, got -1"):
        plain.train(x, loss="anisotropic", threshold=-1)
    with pytest.raises(ValueError, match="directions are for loss='anisotropic'"):
        plain.train(x, directions=x)
    with pytest.raises(ValueError, match="directions has 99 rows, x has 100"):
        plain.train(x, loss="anisotropic", directions=x[1:])
    with pytest.raises(ValueError, match="trained with loss='anisotropic'"):
        plain.train(x).encode(x, directions=x)
    along = quant.PQ(8, 4, 2, loss="anisotropic").train(x)
    assert along.loss == "anisotropic"
    with pytest.raises(ValueError, match="x has 100 rows, directions 3"):
        along.encode(x, directions=x[:3])
