"""The rule of readers and writers, on the lock alone and on an index."""

import copy
import os
import pickle
import threading
import time

import numpy as np
import pytest

from lutra.index import Flat
from lutra.index._lock import ReadWriteLock

WAIT = 10.0


def start(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_readers_share_and_a_writer_waits_for_them():
    lock, log = ReadWriteLock(), []
    inside, leave = threading.Barrier(3), threading.Event()

    def read():
        with lock.reading():
            inside.wait(WAIT)  # all readers and the test: at once
            leave.wait(WAIT)
            log.append("read")

    def write():
        with lock.writing():
            log.append("write")

    readers = [start(read) for _ in range(2)]
    inside.wait(WAIT)
    writer = start(write)
    while lock._writer is None:
        time.sleep(0.001)
    late = start(lambda: (lock.acquire_read(), log.append("late"), lock.release_read()))
    time.sleep(0.05)
    assert log == []  # the writer waits, and holds back the late reader
    leave.set()
    for thread in (*readers, writer, late):
        thread.join(WAIT)
        assert not thread.is_alive()
    assert log == ["read", "read", "write", "late"]


def test_neither_side_starves():
    lock, stop, counts = ReadWriteLock(), threading.Event(), {"read": 0, "write": 0}

    def loop(what, guard):
        while not stop.is_set():
            with guard():
                counts[what] += 1

    threads = [start(lambda: loop("read", lock.reading)) for _ in range(3)]
    threads += [start(lambda: loop("write", lock.writing)) for _ in range(2)]
    deadline = time.time() + WAIT
    while min(counts.values()) < 50 and time.time() < deadline:
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join(WAIT)
    assert min(counts.values()) >= 50


def test_exclusion_under_pressure():
    lock, value, wrong = ReadWriteLock(), [0, 0], []

    def write():
        for _ in range(300):
            with lock.writing():
                value[0] += 1
                time.sleep(0)
                value[1] += 1

    def read():
        for _ in range(3000):
            with lock.reading():
                if value[0] != value[1]:
                    wrong.append(tuple(value))

    threads = [start(read) for _ in range(3)] + [start(write) for _ in range(3)]
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong and value == [900, 900]


def test_nesting():
    lock = ReadWriteLock()
    with lock.reading():
        with lock.reading():
            pass
        with pytest.raises(RuntimeError, match="from within a search"):
            lock.acquire_write()
    with lock.writing(), lock.writing(), lock.reading():
        pass
    with lock.writing():
        pass
    assert not lock._readers and lock._writer is None


def test_copies_have_their_own_lock():
    index = Flat(2)
    index.add(np.eye(2, dtype=np.float32))
    with index._lock.writing():
        for twin in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
            assert start(lambda twin=twin: twin.search(np.eye(2, dtype=np.float32), 1)).join(WAIT) is None
            twin.add(np.eye(2, dtype=np.float32))
            assert len(twin) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_forgets_the_other_threads():
    lock = ReadWriteLock()
    hold, held = threading.Event(), threading.Event()

    def read():
        with lock.reading():
            held.set()
            hold.wait(WAIT)

    thread = start(read)
    held.wait(WAIT)
    child = os.fork()
    if child == 0:
        with lock.writing():
            os._exit(7)
    deadline = time.time() + WAIT
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.time() < deadline:
        time.sleep(0.01)
    hold.set()
    thread.join(WAIT)
    assert os.waitstatus_to_exitcode(status[1]) == 7 and status[0] == child


def test_searches_while_another_thread_adds_and_removes():
    """Every result is that of the index before or after a change, never of something between."""
    d, step = 4, 50
    index = Flat(d, "l2")
    x = np.repeat(np.arange(40 * step, dtype=np.float32)[:, None], d, 1)
    index.add(x[:step])
    stop, wrong = threading.Event(), []

    def search():
        while not stop.is_set():
            ids = index.search(x[:3], 2 * step).ids
            found = ids[0][ids[0] >= 0]
            if len(found) % step or not np.array_equal(np.sort(found), np.arange(len(found))):
                wrong.append(found)

    threads = [start(search) for _ in range(3)]
    for _ in range(15):
        index.add(x[step : 2 * step], ids=np.arange(step, 2 * step))
        assert index.remove_ids(np.arange(step, 2 * step)) == step
    stop.set()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert not wrong


def test_a_filter_may_search_but_not_change_the_index():
    index = Flat(2, "l2")
    index.add(np.eye(2, dtype=np.float32))
    q = np.zeros((1, 2), np.float32)

    def nested(ids):
        assert index.search(q, 1).ids.tolist() == [[0]]
        return ids == 1

    assert index.search(q, 2, filter=nested).ids.tolist() == [[1, -1]]
    with pytest.raises(RuntimeError, match="from within a search"):
        index.search(q, 1, filter=lambda ids: index.add(q))
