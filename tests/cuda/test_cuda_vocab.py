"""lutra.vocab and lutra.compress, which work on the host, with arrays that lie on the GPU."""

from __future__ import annotations

import numpy as np

import lutra
from lutra import vocab


def test_a_vocabulary_is_pruned(gpu):
    rng = np.random.default_rng(0)
    table, ids = rng.standard_normal((30, 8)).astype(np.float32), rng.integers(0, 20, (5, 7))
    counts = vocab.count_tokens(gpu.put(ids), 30)
    np.testing.assert_array_equal(counts, np.bincount(ids.reshape(-1), minlength=30))
    pruned = vocab.prune(gpu.put(table), gpu.put(counts))
    assert gpu.owns(pruned.table)
    new = vocab.map_ids(gpu.put(ids), gpu.put(pruned.id_map))
    assert gpu.owns(new)
    np.testing.assert_array_equal(gpu.get(pruned.table)[gpu.get(new)], table[ids])


def test_a_table_is_compressed(gpu):
    table = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    want, got = (lutra.compress.encode(t, "int8") for t in (table, gpu.put(table)))
    for name, array in want.data.items():
        np.testing.assert_array_equal(np.asarray(got.data[name]), array)
