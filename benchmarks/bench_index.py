"""Benchmarks of `lutra.index`: building, training, searching, saving and loading, beside FAISS.

Made vectors have the spectrum that embeddings have: clusters, and dimensions of falling variance. The real
sets of LUTRA_DATA (or ../shared/data) are used where they are; without them those benchmarks are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import lutra
from lutra.bench import Prepared
from lutra.index import PQ, Flat, load

D, M = 128, 16


@pytest.fixture(scope="module")
def rows(full):
    return 1_000_000 if full else 100_000


@pytest.fixture(scope="module")
def x(rows):
    rng = np.random.default_rng(0)
    spread = (np.arange(1, D + 1) ** -0.5).astype(np.float32)
    centers = rng.standard_normal((1000, D), dtype=np.float32) * spread
    x = centers[rng.integers(0, 1000, rows)]
    for i in range(0, rows, 65536):  # in parts: the noise needs no array of its own size
        part = x[i : i + 65536]
        part += 0.5 * spread * rng.standard_normal(part.shape, dtype=np.float32)
    return x


@pytest.fixture(scope="module")
def q(x):
    noise = np.random.default_rng(1).standard_normal((1000, D), dtype=np.float32)
    return x[:: len(x) // 1000][:1000] + 0.05 * noise


@pytest.fixture(scope="module")
def sample(x, full):
    """What PQ is trained on: in full 256 points for each centroid are taken from it."""
    return x if full else x[:20_000]


@pytest.fixture(scope="module")
def trained(sample):
    index = PQ(D, M, refine="float16")
    index.train(sample, progress=False)
    return index


@pytest.fixture(scope="module")
def filled(trained, x):
    trained.add(x)
    return trained


@pytest.fixture(scope="module")
def faiss():
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(lutra.get_num_threads())
    return faiss


@pytest.fixture(scope="module")
def faiss_pq(faiss, x, sample):
    index = faiss.IndexPQ(D, M, 8)
    index.train(sample)
    index.add(x)
    return index


@pytest.fixture(scope="module")
def data():
    """The folder of real data."""
    for place in (os.environ.get("LUTRA_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"):
        if place and Path(place, "README.md").is_file():
            return Path(place)
    pytest.skip("no real data here: neither LUTRA_DATA nor ../shared/data")


def recall(found, want):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), want.tolist())])


def test_flat_add(measure, x, faiss):
    """One addition of everything to an empty index: limited by reading and writing memory."""

    def ours():
        index = Flat(D, "l2")
        index.add(x)
        return index

    def theirs():
        index = faiss.IndexFlatL2(D)
        index.add(x)
        return index

    def check():
        np.testing.assert_array_equal(ours().reconstruct([0, len(x) - 1]), x[[0, -1]])

    measure(Prepared(ours, check, {"faiss": theirs}, bytes=2 * x.nbytes))


@pytest.mark.parametrize("ids", ["default", "random"])
def test_flat_add_one_by_one(measure, x, faiss, ids):
    """2,000 additions of one vector: the cost of a call, and growth that is not quadratic."""
    n = 2000
    own = np.random.default_rng(0).permutation(10 * n)[:n] if ids == "random" else None

    def ours():
        index = Flat(D, "l2")
        for i in range(n):
            index.add(x[i : i + 1], None if own is None else own[i : i + 1])
        return index

    def theirs():
        index = faiss.IndexFlatL2(D) if own is None else faiss.IndexIDMap2(faiss.IndexFlatL2(D))
        for i in range(n):
            if own is None:
                index.add(x[i : i + 1])
            else:
                index.add_with_ids(x[i : i + 1], own[i : i + 1])

    def check():
        index = ours()
        np.testing.assert_array_equal(index.reconstruct(index.ids), x[:n])

    measure(Prepared(ours, check, {"faiss": theirs}))


@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_flat_search(measure, x, q, faiss, batch):
    index = Flat(D, "l2")
    index.add(x, ids=np.arange(len(x))[::-1])
    theirs = faiss.IndexFlatL2(D)
    theirs.add(x)

    def check():
        found = len(x) - 1 - index.search(q[:batch], 10).ids
        assert recall(found, theirs.search(q[:batch], 10)[1]) > 0.999

    measure(
        Prepared(
            lambda: index.search(q[:batch], 10),
            check,
            {"faiss": lambda: theirs.search(q[:batch], 10)},
            bytes=x.nbytes,
            flops=3.0 * batch * x.size,
        )
    )


def test_pq_train(measure, sample, faiss):
    """k-means in 16 sub-spaces of 8 dimensions, 256 centroids, up to 256 points for each, 25 iterations."""

    def ours():
        index = PQ(D, M)
        index.train(sample, progress=False)
        return index

    def theirs():
        index = faiss.IndexPQ(D, M, 8)
        index.train(sample)
        return index

    some = sample[:: len(sample) // 20_000]

    def check():
        other, index = theirs(), ours()
        gap = np.square(other.sa_decode(other.sa_encode(some)) - some).sum(1).mean()
        assert np.square(index.decode(index.encode(some)) - some).sum(1).mean() < 1.01 * gap

    measure(Prepared(ours, check, {"faiss": theirs}, flops=2.0 * D * 256 * 25 * min(len(sample), 65536)))


def test_pq_encode(measure, x, trained, faiss_pq):
    part = x[:50_000]

    def check():
        gap = np.square(faiss_pq.sa_decode(faiss_pq.sa_encode(part)) - part).sum(1).mean()
        assert np.square(trained.decode(trained.encode(part)) - part).sum(1).mean() < 1.02 * gap

    measure(
        Prepared(
            lambda: trained.encode(part),
            check,
            {"faiss": lambda: faiss_pq.sa_encode(part)},
            flops=2.0 * 256 * part.size,
        )
    )


@pytest.mark.parametrize("batch", [1, 16, 1000])
@pytest.mark.parametrize("refine", [0, 4])
def test_pq_search(measure, x, q, filled, faiss, faiss_pq, batch, refine):
    part = q[:batch]
    peers = {"faiss": lambda: faiss_pq.search(part, 10)}
    if refine:
        wrapped = faiss.IndexRefineFlat(faiss_pq, faiss.swig_ptr(x))
        wrapped.k_factor = refine
        peers = {"faiss": lambda: wrapped.search(part, 10)}

    def check():
        some = q[::2]
        exact = lutra.scan.knn(some, x, 10, "l2").ids
        ours = recall(filled.search(some, 10, refine=refine).ids, exact)
        other = wrapped if refine else faiss_pq
        assert ours > recall(other.search(some, 10)[1], exact) - 0.03  # seeds differ

    # a look-up table of 256 floats a sub-space, then one addition a code
    measure(
        Prepared(
            lambda: filled.search(part, 10, refine=refine),
            check,
            peers,
            bytes=M * len(x),
            flops=batch * (M * len(x) + 3.0 * D * 256),
        )
    )


def test_save(measure, x, tmp_path):
    """Write, sync and rename; the disk's speed more than ours."""
    index = Flat(D)
    index.add(x)

    def check():
        index.save(tmp_path / "index")
        np.testing.assert_array_equal(load(tmp_path / "index").reconstruct([0, len(x) - 1]), x[[0, -1]])

    measure(Prepared(lambda: index.save(tmp_path / "index"), check))


def test_load_and_first_search(measure, x, q, tmp_path):
    index = Flat(D)
    index.add(x)
    index.save(tmp_path / "index")

    def ours():
        return load(tmp_path / "index").search(q[:1], 10)

    def check():
        np.testing.assert_array_equal(ours().ids, index.search(q[:1], 10).ids)

    measure(Prepared(ours, check, {"read": lambda: load(tmp_path / "index", mmap=False).search(q[:1], 10)}))


@pytest.mark.parametrize("refine", [0, 4])
@pytest.mark.parametrize("name", ["sift5k_5000x128_u8", "oxford5k_fc7pca_5063x128_f32", "debian_docs_f16"])
@pytest.mark.filterwarnings("ignore:.* points for .* centroids")
def test_real_data(benchmark, data, name, refine):
    """Searches of real vectors; extra_info has the recall at 10, FAISS's beside, and the bytes a vector."""
    x = np.load(data / f"{name}.npy").astype(np.float32)
    x, q = x[:-500], x[-500:]
    m = x.shape[1] // 8
    truth = lutra.scan.knn(q, x, 10, "l2").ids
    index = PQ(x.shape[1], m, refine="float16" if refine else None)
    index.train(x, progress=False)
    index.add(x)
    found = benchmark(lambda: index.search(q, 10, refine=refine)).ids
    ours = recall(found, truth)
    benchmark.extra_info.update(recall=round(ours, 4), bytes_a_vector=index.nbytes / len(x))
    faiss = pytest.importorskip("faiss")
    other = faiss.IndexPQ(x.shape[1], m, 8)
    other.pq.cp.min_points_per_centroid = 1
    other.train(x)
    other.add(x)
    if refine:
        other = faiss.IndexRefineFlat(other, faiss.swig_ptr(x))
        other.k_factor = refine
    theirs = recall(other.search(q, 10)[1], truth)
    benchmark.extra_info["faiss_recall"] = round(theirs, 4)
    assert ours > theirs - 0.02
