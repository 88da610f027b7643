"""IVF and Codes as state machines: whatever was added and removed, a search of all lists is exact."""

import tempfile
import warnings
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lutra import _backend
from lutra.index import IVF, Codes, load
from lutra.quant import PQ, SQ

D = 4
COORDINATES = st.integers(-4, 4)  # small integers: scores are exact in float32, and full of ties
VECTOR = st.lists(COORDINATES, min_size=D, max_size=D)


def exact_quantizer(bits=8):
    """Codes that are their vectors: a codebook of the nine values for each coordinate."""
    quantizer = PQ(D, D, bits)
    values = np.zeros((D, 1 << bits, 1), np.float32)
    values[:, :9, 0] = np.arange(-4, 5)
    values[:, 9:] = 100
    quantizer._assign({"codebooks": values})
    return quantizer


def exact_scalar(kind):
    """Scalar codes whose steps are 1 wide and have integers in the middle."""
    quantizer = SQ(D, kind)
    steps = np.full(D, (1 << quantizer.bits) - 1, np.float32)
    quantizer._assign({"low": np.full(D, -4.5, np.float32), "width": steps})
    return quantizer


class Model(RuleBasedStateMachine):
    @initialize(
        metric=st.sampled_from(["ip", "l2"]),
        kind=st.sampled_from(["rows", "soar", "codes", "refined", "flat", "scalar", "flat scalar", "codes6"]),
        nlist=st.sampled_from([2, 5, 40]),
    )
    def begin(self, metric, kind, nlist):
        self.folder = tempfile.TemporaryDirectory()
        self.metric, self.rows, self.next = metric, {}, 0
        if kind in ("flat", "flat scalar"):
            self.index = Codes(exact_quantizer() if kind == "flat" else exact_scalar("6bit"), metric)
            return
        arguments = {
            "rows": {}, "soar": {"soar": True}, "codes": {"quantizer": exact_quantizer(), "residual": False},
            "scalar": {"quantizer": exact_scalar("8bit"), "residual": False},
            "codes6": {"quantizer": exact_quantizer(6), "residual": False},
            "refined": {"quantizer": PQ(D, 2, 4), "refine": "float16", "soar": True},
        }[kind]  # fmt: skip
        self.index = IVF(D, nlist, metric=metric, nprobe=nlist, **arguments)
        sample = np.random.default_rng(nlist).integers(-4, 5, (200, D)).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind in ("codes", "codes6", "scalar"):  # the quantizer is there already
                self.index._set_centroids(sample[:nlist])
            else:
                self.index.train(sample)
        if kind == "refined":
            self.index.refine_factor = 10**6

    def teardown(self):
        if hasattr(self, "folder"):
            del self.index
            self.folder.cleanup()

    def put(self, vectors):
        self.index.add(np.array(vectors, np.float32).reshape(-1, D))
        for vector in vectors:
            self.rows[self.next] = vector
            self.next += 1

    @rule(vectors=st.lists(VECTOR, max_size=5))
    def add(self, vectors):
        self.put(vectors)

    @rule(vector=VECTOR, times=st.integers(10, 60))
    def add_many_of_one(self, vector, times):  # which all go to one list
        self.put([vector] * times)

    @rule(seed=st.integers(0, 9), count=st.integers(20, 150))
    def add_many(self, seed, count):
        self.put(np.random.default_rng(seed).integers(-4, 5, (count, D)).tolist())

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def remove_some(self, data):
        ids = data.draw(st.lists(st.sampled_from(list(self.rows)), unique=True, min_size=1, max_size=20))
        assert self.index.remove_ids(ids) == len(ids)
        for i in ids:
            del self.rows[i]

    @rule(low=st.integers(0, 200), high=st.integers(0, 400))
    def remove_a_range(self, low, high):
        gone = [i for i in self.rows if low <= i < high]
        assert self.index.remove_ids(np.arange(low, max(low, high))) == len(gone)
        for i in gone:
            del self.rows[i]

    @rule()
    def compact(self):
        self.index.compact()
        assert self.index._lists.tight

    @rule(mmap=st.booleans())
    def save_and_load(self, mmap):
        path = Path(self.folder.name, "index")  # over the file that may be mapped
        self.index.save(path)
        self.index = load(path, mmap=mmap)

    @precondition(lambda self: self.rows)
    @rule(q=VECTOR, k=st.integers(1, 60), odd=st.booleans())
    def search(self, q, k, odd):
        x = np.array(list(self.rows.values()), np.float32)
        ids = np.array(list(self.rows))
        q = np.array(q, np.float32)
        key = np.square(x - q).sum(1) if self.metric == "l2" else -(x @ q)
        order = np.argsort(key, kind="stable")
        if odd:
            order = order[ids[order] % 2 == 1]
        order = order[:k]
        got = self.index.search(q[None], k, filter=(lambda i: i % 2 == 1) if odd else None)
        assert got.ids[0, : len(order)].tolist() == ids[order].tolist()
        assert (got.ids[0, len(order) :] == -1).all()
        assert got.scores[0, : len(order)].tolist() == np.abs(key[order]).tolist() or self.metric == "ip"

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def reconstruct(self, data):
        ids = data.draw(st.lists(st.sampled_from(list(self.rows)), min_size=1, max_size=5))
        # the middle of a scalar code's step is rounded
        assert self.index.reconstruct(ids).round(5).tolist() == [self.rows[i] for i in ids]

    @invariant()
    def holds_what_it_should(self):
        if hasattr(self, "index"):
            assert self.index.ids.tolist() == list(self.rows)
            if self.index.is_trained:
                arena = self.index._lists
                assert arena.total == len(self.rows) * self.index._copies
                rows, _ = arena.where()
                if arena.positions is not None:
                    assert np.bincount(arena.positions[rows], minlength=len(self.rows)).tolist() == [
                        self.index._copies
                    ] * len(self.rows)
                    # the others are marked as no rows, and room stays bounded
                    assert (arena.positions >= 0).sum() == len(rows)
                assert arena.size <= 1.6 * arena.total + 16 * 130 + 16 * self.index._nlist


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=50 if _backend.core else 10, stateful_step_count=25, deadline=None)
