"""Any sequence of changes, saves and loads, against a dict of vectors."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lutra.index import PQ, Blocks, Flat, load

D = 3
COORDINATES = st.integers(-4, 4)  # small integers: scores are exact in float32, and full of ties
VECTOR = st.lists(COORDINATES, min_size=D, max_size=D)
IDS = st.integers(0, 60) | st.integers(2**62, 2**62 + 9)


class Model(RuleBasedStateMachine):
    """An index and what it should hold: a dict from id to vector, in the order of addition."""

    @initialize(metric=st.sampled_from(["ip", "l2"]), kind=st.sampled_from(["flat", "pq", "blocks"]))
    def begin(self, metric, kind):
        self.folder = tempfile.TemporaryDirectory()
        self.metric = "ip" if kind == "blocks" else metric
        self.next = 0
        self.rows = {}
        if kind == "blocks":
            self.index = Blocks(D, 1, "float16")
        elif kind == "pq":
            # A codebook of nine exact values for each coordinate, so that a code is its vector.
            self.index = PQ(D, D, bits=4, metric=metric)
            values = np.resize(np.arange(-4, 5), 16)[:, None].astype(np.float32)
            self.index._codebooks = np.repeat(values[None], D, 0)
        else:
            self.index = Flat(D, metric)

    def teardown(self):
        if hasattr(self, "folder"):
            del self.index
            self.folder.cleanup()

    @rule(vectors=st.lists(VECTOR, max_size=6))
    def add(self, vectors):
        if self.next > 2**62:
            assert self.next < 2**63 - 1000
        self.index.add(np.array(vectors, np.float32).reshape(-1, D))
        for vector in vectors:
            self.rows[self.next] = vector
            self.next += 1

    @rule(pairs=st.dictionaries(IDS, VECTOR, max_size=6))
    def add_with_ids(self, pairs):
        ids = list(pairs)
        x = np.array([pairs[i] for i in ids], np.float32).reshape(-1, D)
        if self.rows.keys() & pairs.keys():
            with pytest.raises(ValueError, match="which is in the index"):
                self.index.add(x, ids)
            return
        self.index.add(x, ids)
        self.rows.update(pairs)
        self.next = max([self.next, *(i + 1 for i in ids)])

    @rule(ids=st.lists(IDS, max_size=8))
    def remove(self, ids):
        known = self.rows.keys() & set(ids)
        assert self.index.remove_ids(ids) == len(known)
        for i in known:
            del self.rows[i]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def remove_some_that_are_there(self, data):
        ids = data.draw(st.lists(st.sampled_from(list(self.rows)), unique=True, min_size=1))
        assert self.index.remove_ids(np.array(ids)) == len(ids)
        for i in ids:
            del self.rows[i]

    @rule(mmap=st.booleans())
    def save_and_load(self, mmap):
        path = Path(self.folder.name, "index")  # over the file that may be mapped
        self.index.save(path)
        self.index = load(path, mmap=mmap)
        assert list(Path(self.folder.name).iterdir()) == [path]

    @rule(ids=st.lists(IDS, min_size=1, max_size=5))
    def reconstruct(self, ids):
        missing = [i for i in ids if i not in self.rows]
        if missing:
            with pytest.raises(IndexError, match=f"is {missing[0]}, which is not in the index"):
                self.index.reconstruct(ids)
        else:
            assert self.index.reconstruct(ids).tolist() == [self.rows[i] for i in ids]

    @rule(q=VECTOR, k=st.integers(1, 20))
    def search(self, q, k):
        sign = 1 if self.metric == "l2" else -1

        def key(vector):
            if self.metric == "l2":
                return sum((a - b) ** 2 for a, b in zip(q, vector))
            return -sum(a * b for a, b in zip(q, vector))

        if not self.rows:
            with pytest.raises(ValueError, match="is empty"):
                self.index.search(np.array([q], np.float32), k)
            return
        found = sorted(((key(v), place, i) for place, (i, v) in enumerate(self.rows.items())))[:k]
        found += [(np.inf, 0, -1)] * (k - len(found))
        scores, ids = self.index.search(np.array([q], np.float32), k)
        assert ids.tolist() == [[i for _, _, i in found]]
        assert scores.tolist() == [[sign * s for s, _, _ in found]]

    @invariant()
    def holds_what_it_should(self):
        if hasattr(self, "index"):
            assert len(self.index) == self.index.ntotal == len(self.rows)
            assert self.index.ids.tolist() == list(self.rows)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
