"""Inner products of fixed dimensional encodings approximate Chamfer similarities, as theorem 2.1 of MUVERA
says: for unit vectors within epsilon of the mean over a query's vectors, with a probability that grows with
k_sim, d_proj and repetitions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutra.address import FDE, ball_carving


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def sets(n, d, of_query, of_document, noise, seed=0):
    """Documents, and to each a query whose vectors lie near some of its own."""
    rng = np.random.default_rng(seed)
    documents = unit(rng.normal(size=(n, of_document, d)))
    pick = np.stack([rng.permutation(of_document)[:of_query] for _ in range(n)])
    near = np.take_along_axis(documents, pick[..., None], 1)
    return unit(near + noise * unit(rng.normal(size=near.shape))), documents


def chamfer(queries, documents):
    """The mean over a query's vectors of their greatest inner product."""
    return np.einsum("iqd,jpd->ijqp", queries, documents).max(-1).mean(-1)


def estimate(e, queries, documents):
    (n, q, d), (m, p, _) = queries.shape, documents.shape
    a = e.encode_queries(queries.reshape(-1, d), np.arange(n + 1) * q)
    b = e.encode_documents(documents.reshape(-1, d), np.arange(m + 1) * p)
    return a @ b.T / e.repetitions / q


def rms(x):
    return float((x**2).mean() ** 0.5)


@given(
    k_sim=st.integers(0, 7), repetitions=st.integers(1, 5), d=st.integers(1, 20), of_query=st.integers(1, 9),
    of_document=st.integers(1, 30), seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_never_above_without_a_projection(k_sim, repetitions, d, of_query, of_document, seed):
    """A mean of a document's vectors is no better a match than the best of them: the theorem's upper side."""
    queries, documents = sets(3, d, min(of_query, of_document), of_document, 0.5, seed % 1000)
    e = FDE(d, repetitions, k_sim, projection=None, seed=seed)
    assert (estimate(e, queries, documents) <= chamfer(queries, documents) + 1e-5).all()


@given(seed=st.integers(0, 2**63 - 1), k_sim=st.integers(0, 8), projection=st.sampled_from(["signs", None]))
@settings(max_examples=30, deadline=None)
def test_a_document_of_one_vector_is_exact(seed, k_sim, projection):
    """It fills every block, so that no query vector misses it: exact without a projection, and unbiased to
    1 / sqrt(d_proj repetitions) with one."""
    queries, documents = sets(8, 16, 1, 1, 1.0, seed % 1000)
    e = FDE(16, 32, k_sim, 32, projection=projection, seed=seed)
    error = estimate(e, queries, documents) - chamfer(queries, documents)
    assert rms(error) < (1e-6 if projection is None else 6 / (32 * 32) ** 0.5)


def test_the_theorem():
    """epsilon = 0.3: rarely within it with few partitions, nearly always with many."""
    queries, documents = sets(20, 8, 8, 12, 0.3)
    exact = chamfer(queries, documents)
    found = [
        estimate(FDE(8, repetitions, k, w, seed=1), queries, documents)
        for k, repetitions, w in ((3, 20, 8), (6, 20, 16), (10, 10, 32))
    ]
    shares = [float((abs(x - exact) < 0.3).mean()) for x in found]
    assert shares[0] < 0.5 < shares[1] < 0.95 < shares[2], shares
    assert (found[2].argmax(1) == np.arange(20)).mean() > 0.9  # a query's own document comes first


@pytest.mark.parametrize("seed", [0, 1])
def test_more_partitions_more_exact(seed):
    queries, documents = sets(30, 64, 16, 40, 0.7)
    exact = chamfer(queries, documents)
    errors = [
        estimate(FDE(64, 20, k, projection=None, seed=seed), queries, documents) - exact
        for k in (0, 2, 4, 6, 8)
    ]
    each = [rms(x) for x in errors]
    assert all(a > b for a, b in pairwise(each)), each
    own = [-float(np.diag(x).mean()) for x in errors]  # where there is something to find
    assert own[-1] < 0.7 * own[0]


@pytest.mark.parametrize("projection", ["signs", "count"])
def test_a_projection_costs_as_much_as_its_width_says(projection):
    """Its error is that of an unbiased estimate: it falls with the root of d_proj times repetitions."""
    queries, documents = sets(30, 64, 16, 40, 0.7)

    def error(repetitions, d_proj):
        found = []
        for seed in range(3):
            exact = estimate(FDE(64, repetitions, 4, projection=None, seed=seed), queries, documents)
            e = FDE(64, repetitions, 4, d_proj, projection=projection, seed=seed)
            found.append(estimate(e, queries, documents) - exact)
        assert abs(np.mean(found)) < 3 * rms(np.array(found)) / 3**0.5
        return rms(np.array(found))

    for wide, narrow in ((error(8, 32), error(8, 8)), (error(32, 8), error(8, 8))):
        assert 1.5 < narrow / wide < 2.7


def test_the_final_sketch_is_unbiased():
    queries, documents = sets(30, 32, 8, 20, 0.7)
    dense = estimate(FDE(32, 10, 3, 8), queries, documents)
    errors = [estimate(FDE(32, 10, 3, 8, final_dim=n), queries, documents) - dense for n in (64, 256, 1024)]
    assert rms(errors[0]) > 1.5 * rms(errors[1]) > 1.5 * 1.5 * rms(errors[2])
    assert rms(errors[2]) < 0.1


def test_carved_queries_keep_their_similarity():
    """Vectors near one another mostly share their best match: fewer of them, much the same sum."""
    queries, documents = sets(20, 32, 6, 15, 0.2)
    many = unit(np.repeat(queries, 4, 1) + 0.1 * unit(np.random.default_rng(1).normal(size=(20, 24, 32))))
    exact = chamfer(many, documents)
    tokens, ptr = ball_carving(many.reshape(-1, 32), np.arange(21) * 24)
    assert ptr[-1] < 0.4 * 480
    found = np.array([
        [(tokens[a:b] @ p.T).max(1).sum() / 24 for p in documents] for a, b in pairwise(ptr)
    ])  # fmt: skip
    assert (found <= exact + 1e-5).all()  # a ball's vectors can no longer choose apart
    assert rms(found - exact) < 0.05
