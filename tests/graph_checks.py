"""What the tests of graphs share."""

from __future__ import annotations

import numpy as np

import lutra
from lutra import _backend
from lutra.index import load

_made: dict = {}


def once(key, make):
    """What the reference makes is the same at every SIMD level, and slow: it is made for the first one."""
    if key not in _made:
        _made[key] = make()
    return _made[key]


def same_links(a, b):
    """Two graphs are the same, link for link."""
    assert a.entry == b.entry
    for name in ("rows", "links"):
        np.testing.assert_array_equal(a.tables[name].view, b.tables[name].view)
    np.testing.assert_array_equal(a.upper.view, b.upper.view)


def two_thirds(n):
    """A filter that leaves out every third of n, packed, and how many it lets pass."""
    keep = np.packbits(np.arange(n) % 3 > 0, bitorder="little")
    return keep, int(np.unpackbits(keep, count=n, bitorder="little").sum())


def survives_damage(index, path, q, rounds, most):
    """Files with random changes are refused, or lead to an index that answers; none crashes."""
    rng = np.random.default_rng(0)
    index.save(path)
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    refused = answered = 0
    rounds = rounds if _backend.core is not None else rounds // 10
    for round_ in range(rounds):
        data = bytearray(good)
        low = 0 if round_ % 4 == 0 else start
        for at in rng.integers(low, len(data), rng.integers(1, most)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            index = load(path)
            with np.errstate(all="ignore"):
                found = index.search(q, 3, ef_search=5)
                index.add(q)
                index.remove_ids(index.ids[::2])
        except (ValueError, TypeError) as error:
            assert str(path) in str(error) or "lutra" not in str(error)
            refused += 1
            continue
        assert found.ids.shape == (len(q), 3)
        answered += 1
    assert refused > rounds // 20 and answered > rounds // 20


def threads_leave_no_trace(make, x, q):
    """The same graph and the same results with any number of threads; the last index and its results."""
    tables = []
    for threads in (1, 2, 3):
        lutra.set_num_threads(threads)
        try:
            index = make()
            index.add(x[:2000])
            index.add(x[2000:])
            index.remove_ids(np.arange(0, 3000, 4))
            found = index.search(q, 10)
        finally:
            lutra.set_num_threads(0)
        tables.append((index._graph.tables["links"].view, index._graph.upper.view, *found))
    for other in tables[1:]:
        for a, b in zip(tables[0], other):
            np.testing.assert_array_equal(a, b)
    return index, found


def survives_a_round_trip(index, path, q, more, mmap):
    """What is loaded finds the same, changes in the same way, and may be saved over its own file."""
    index.save(path)
    again = load(path, mmap=mmap)
    assert again._config() == index._config() and again.ntotal == 120 and again.is_trained
    for a, b in zip(index.search(q, 4), again.search(q, 4)):
        np.testing.assert_array_equal(a, b)
    for changed in (index, again):  # a mapped graph is copied when it changes
        changed.add(more)
        changed.remove_ids([3, 9, 12])
    for a, b in zip(index.search(q, 4), again.search(q, 4)):
        np.testing.assert_array_equal(a, b)
    again.save(path)  # over the file that it was mapped from
    np.testing.assert_array_equal(load(path).ids, index.ids)
