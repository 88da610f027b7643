"""lutra.index.Shards: results of one index, on one device or many."""

from __future__ import annotations

import numpy as np
import pytest

from lutra import quant
from lutra.index import HNSW, IVF, PQ, Binary, Codes, Flat, MultiVector, Shards

pytestmark = pytest.mark.filterwarnings("ignore:.* (points|vectors) for .* centroids")


def integers(n, d, seed=0):
    """Their scores are exact, and full of ties."""
    return np.random.default_rng(seed).integers(-3, 4, (n, d)).astype(np.float32)


MAKE = {
    "flat l2": lambda: Flat(8, "l2"),
    "flat ip": lambda: Flat(8, "ip"),
    "pq": lambda: PQ(8, 4, 4),
    "ivf": lambda: IVF(8, 5, nprobe=3),
    "ivf cosine": lambda: IVF(8, 5, quant.SQ(8), "cosine", nprobe=5),
    "codes": lambda: Codes(quant.PQ(8, 4, 8)),
    "binary": lambda: Binary(8),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_one_index(kind, count):
    x, q = integers(400, 8), integers(9, 8, 1)
    ids = np.random.default_rng(2).permutation(9000)[:400]
    want, index = MAKE[kind](), MAKE[kind]()
    for one in (want, index):
        if hasattr(one, "train"):
            one.train(x)
        one.add(x, ids)
    shards = Shards(index, ["cpu"] * count)
    assert len(shards.shards) == count and shards.ntotal == len(shards) == 400
    np.testing.assert_array_equal(shards.ids, ids)
    keep = ids[::3]
    for k in (1, 10, 500):
        for filter in (None, keep):
            got, one = shards.search(q, k, filter=filter), want.search(q, k, filter=filter)
            np.testing.assert_array_equal(got.scores, one.scores)
            np.testing.assert_array_equal(got.ids, one.ids)
    np.testing.assert_array_equal(shards.reconstruct(ids[5:9]), want.reconstruct(ids[5:9]))
    assert shards.remove_ids([*ids[::7], 12345678]) == want.remove_ids([*ids[::7], 12345678])
    np.testing.assert_array_equal(shards.search(q, 10).ids, want.search(q, 10).ids)


def test_documents_of_many_vectors(tmp_path):
    rng = np.random.default_rng(0)
    ends = np.concatenate([[0], np.cumsum(rng.integers(1, 9, 90))])
    tokens, q = integers(ends[-1], 8), integers(35, 8, 1).reshape(5, 7, 8)
    one, index = (MultiVector(8, "float32", repetitions=2, k_sim=2, d_proj=4) for _ in range(2))
    for each in (one, index):
        each.add((tokens[: ends[60]], ends[:61]), np.arange(60) * 3)
    shards = Shards(index, ["cpu"] * 3)
    for each in (one, shards):
        each.add(tokens[ends[60] :], np.arange(60, 90) * 3, ptr=ends[60:] - ends[60])
    assert [shard.ntotal for shard in shards.shards] == [30, 30, 30]
    for options in ({"generator": "all"}, {"filter": np.arange(0, 270, 6), "generator": "all"}):
        want, got = one.search(q, 4, **options), shards.search(q, 4, **options)
        np.testing.assert_array_equal(got.scores, want.scores)
        np.testing.assert_array_equal(got.ids, want.ids)
    got, want = shards.search(list(q), 4, candidates=9).scores, one.search(list(q), 4, candidates=9).scores
    assert (got.sum(1) >= want.sum(1)).all()
    for a, b in zip(shards.reconstruct([6, 267, 3]), one.reconstruct([6, 267, 3])):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(shards.reconstruct(6), one.reconstruct(6))
    shards.save(tmp_path / "s")
    back = Shards.load(tmp_path / "s", ["cpu"])
    np.testing.assert_array_equal(
        back.search(q, 4, generator="all").ids, one.search(q, 4, generator="all").ids
    )


def test_adding_fills_evenly():
    index = Flat(3, "l2")
    index.add(integers(10, 3))
    shards = Shards(index, ["cpu"] * 3)
    shards.add(integers(20, 3, 1))
    assert [shard.ntotal for shard in shards.shards] == [10, 10, 10]
    shards.add(integers(1, 3), ids=[77])
    shards.add(integers(2, 3))
    assert sorted(shards.ids) == [*range(30), 77, 78, 79]
    with pytest.raises(ValueError, match=r"ids\[1\] is 77, which is in the index"):
        shards.add(integers(2, 3), ids=[1000, 77])
    with pytest.raises(ValueError, match="one id is needed for each"):
        shards.add(integers(2, 3), ids=[1])
    assert shards.nbytes > 0 and "Flat" in repr(shards) and shards.devices == ["cpu"] * 3


def test_files(tmp_path):
    index = IVF(8, 4, nprobe=4)
    index.train(integers(200, 8))
    index.add(integers(200, 8))
    shards = Shards(index, ["cpu"] * 3)
    want = shards.search(integers(5, 8, 1), 4)
    shards.save(tmp_path / "s")
    back = Shards.load(tmp_path / "s", ["cpu"])
    np.testing.assert_array_equal(back.search(integers(5, 8, 1), 4).ids, want.ids)
    Shards(back.shards[0], ["cpu"]).save(tmp_path / "s")
    assert len(Shards.load(tmp_path / "s", ["cpu"]).shards) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no shards"):
        Shards.load(tmp_path / "empty", ["cpu"])


def test_errors():
    with pytest.raises(TypeError, match="lutra index"):
        Shards(3, ["cpu"])
    with pytest.raises(TypeError, match="list of one device"):
        Shards(Flat(3), "cpu")
    with pytest.raises(TypeError, match="list of one device"):
        Shards(Flat(3), [])
    with pytest.raises(ValueError, match="not trained"):
        Shards(IVF(3, 2), ["cpu"])
    with pytest.raises(ValueError, match="is empty"):
        Shards(Flat(3), ["cpu", "cpu"]).search(integers(1, 3))
    with pytest.raises(NotImplementedError, match="HNSW is for the CPU"):
        Shards(HNSW(3), ["cuda"])
    shards = Shards(Flat(3), ["cpu", "cpu"])
    shards.add(integers(4, 3))
    with pytest.raises(IndexError, match=r"ids\[1\] is 9"):
        shards.reconstruct([0, 9])
    np.testing.assert_array_equal(shards.reconstruct(2), integers(4, 3)[2])


def test_torch_queries_get_torch_results():
    torch = pytest.importorskip("torch")
    index = Flat(4)
    index.add(integers(50, 4))
    shards = Shards(index, ["cpu", "cpu"])
    found = shards.search(torch.from_numpy(integers(3, 4, 1)), 5)
    assert torch.is_tensor(found.ids)
    np.testing.assert_array_equal(found.ids.numpy(), shards.search(integers(3, 4, 1), 5).ids)
