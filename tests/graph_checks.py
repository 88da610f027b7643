"""What the tests of graphs share."""

from __future__ import annotations

import numpy as np

from lutra import _backend
from lutra.index import load


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
