"""What holds for every kind of index: threads, batches, errors, ids, kills during save."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.index import factory, load

pytestmark = pytest.mark.skipif(_backend.core is None, reason="the NumPy reference takes too long")

D = 16
TEXTS = [
    "Flat", "SQfp16", "PQ8x4", "PQ4,RFlat", "SQ8", "SQ4", "RaBitQ4", "RSQ4", "RQ2x4", "IVF8,Flat",
    "IVF8,PQ8x4,RFlat", "IVF8_SOAR,PQ8x4,RFlat", "IVF8,RaBitQ,Refine(SQ8)", "HNSW8", "HNSW8,SQ8,RFlat",
    "RR,IVF8,SQ8",
]  # fmt: skip


def vectors(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


@pytest.fixture(scope="module")
def trained():
    """An untouched, filled index for each text."""
    made = {}
    for number, text in enumerate(TEXTS):
        index = factory(text, D, ["l2", "ip", "cosine"][number % 3])
        index.train(vectors(700))
        index.add(vectors(700), np.arange(700) * 5 + 2**40)
        if "IVF" in text:
            index.nprobe = 4
        made[text] = index
    return made


@pytest.mark.parametrize("text", TEXTS)
def test_batches_and_threads_do_not_matter(trained, text):
    index, q = trained[text], vectors(37, 1)
    want = index.search(q, 9)
    assert want.ids.dtype == np.int64 and (want.ids >= 2**40).all()
    for size in (1, 5, 16, 36):
        parts = [index.search(q[i : i + size], 9) for i in range(0, 37, size)]
        np.testing.assert_array_equal(np.concatenate([p.ids for p in parts]), want.ids)
        np.testing.assert_array_equal(np.concatenate([p.scores for p in parts]), want.scores)
    if _backend.core is None:
        return
    try:
        for count in (1, 2, 3):
            lutra.set_num_threads(count)
            again = index.search(q, 9)
            np.testing.assert_array_equal(again.ids, want.ids)
            np.testing.assert_array_equal(again.scores, want.scores)
    finally:
        _backend.core.set_num_threads(0)


@pytest.mark.parametrize("text", TEXTS)
def test_errors(trained, text):
    empty = factory(text, D)
    with pytest.raises(ValueError, match=r"not trained|is empty"):
        empty.search(vectors(1), 1)
    if not empty.is_trained:
        with pytest.raises(ValueError, match="not trained"):
            empty.add(vectors(1))
    index = trained[text]
    bad = vectors(3, 1)
    bad[1, 2] = np.nan
    for x in (bad, np.where(np.isnan(bad), np.inf, bad)):
        with pytest.raises(ValueError, match=r"\[1, 2\] is"):
            index.search(x, 2)
        with pytest.raises(ValueError, match=r"\[1, 2\] is"):
            index.add(x)
    with pytest.raises(ValueError, match="17 columns"):
        index.search(np.zeros((1, 17), np.float32), 1)
    with pytest.raises(ValueError, match="17 columns"):
        index.add(np.zeros((1, 17), np.float32))
    for k in (0, -1):
        with pytest.raises(ValueError, match="k must be"):
            index.search(vectors(1), k)
    with pytest.raises(TypeError, match="k must be"):
        index.search(vectors(1), 1.5)
    with pytest.raises(ValueError, match="which is in the index"):
        index.add(vectors(1), [2**40])
    with pytest.raises(IndexError, match="not in the index"):
        index.reconstruct([3])
    assert len(index) == 700
    scores, ids = index.search(vectors(2), 800)
    missing = ids < 0
    assert missing[:, 700:].all()
    assert (scores[missing] == (np.inf if index.metric == "l2" else -np.inf)).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_filters_of_every_sort(trained, text):
    index, q = trained[text], vectors(8, 1)
    ids = index.ids
    allowed = ids[np.random.default_rng(0).random(len(ids)) < 0.3]
    want = index.search(q, 10, filter=allowed)
    found = want.ids[want.ids >= 0]
    assert len(found) and np.isin(found, allowed).all()
    calls = []

    def choose(all_ids):
        calls.append(1)
        return np.isin(all_ids, allowed)

    again = index.search(q, 10, filter=choose)
    np.testing.assert_array_equal(again.ids, want.ids)
    assert len(calls) == 1
    assert (index.search(q, 3, filter=[]).ids == -1).all()


@pytest.mark.parametrize("text", ["Flat", "PQ8x4", "IVF8,PQ8x4,RFlat", "HNSW8", "RR,IVF8,SQ8"])
def test_many_search_while_one_changes(text):
    index = factory(text, D)
    index.train(vectors(700))
    index.add(vectors(300))
    if "IVF" in text:
        index.nprobe = 8
    q = vectors(5, 9)
    failed, stop, rounds = [], threading.Event(), []

    def look():
        try:
            while not stop.is_set():
                scores, ids = index.search(q, 6)
                order = np.diff(scores, axis=1)
                assert (order >= 0).all() and ((ids >= 0) & (ids < 10**4)).all()
                assert all(len(set(row)) == 6 for row in ids.tolist())
                rounds.append(1)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=look) for _ in range(5)]
    for thread in threads:
        thread.start()
    for step in range(12):
        index.add(vectors(40, 20 + step))
        index.remove_ids(index.ids[5:25])
        time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert len(index) == 300 + 12 * 20 and rounds
    fresh = load_of(index)
    np.testing.assert_array_equal(fresh.search(q, 6).ids, index.search(q, 6).ids)


def load_of(index):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "index")
        index.save(path)
        return load(path, mmap=False)


SAVER = """
import sys
from lutra.index import load
a, b = load(sys.argv[1]), load(sys.argv[1])
b.remove_ids(b.ids[::2])
a.save(sys.argv[1])
print("ready", flush=True)
while True:
    b.save(sys.argv[1])
    a.save(sys.argv[1])
"""


def kill_during_save(folder, text, rounds, rng):
    """Two states are saved in turns until the process is killed: one of them is there, whole."""
    path = os.path.join(folder, "index")
    index = factory(text, D)
    index.train(vectors(700))
    index.add(vectors(4000))
    q = vectors(9, 3)
    half = load_of(index)
    half.remove_ids(half.ids[::2])
    want = {len(i): i.search(q, 5).ids for i in (index, load_of(half))}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(rounds):
        index.save(path)
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, path], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        left = load(path, mmap=False)
        np.testing.assert_array_equal(left.search(q, 5).ids, want[len(left)])


@pytest.mark.parametrize("text", ["IVF8,PQ8x4,RFlat"])
def test_a_kill_during_save(tmp_path, text):
    kill_during_save(tmp_path, text, 2, np.random.default_rng(0))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["Flat", "PQ8x4", "IVF8,SQ8", "HNSW8", "RR,IVF8,PQ8x4,RFlat"])
def test_many_kills_during_save(tmp_path, text):
    kill_during_save(tmp_path, text, 25, np.random.default_rng(1))
