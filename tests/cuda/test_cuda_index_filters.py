"""Filters that lie on the GPU: what the host's give, without waiting for the device."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from lutra import address, quant, scan
from lutra.index import IVF, PQ, Binary, Codes, Flat, Shards

pytestmark = pytest.mark.filterwarnings("ignore:.* (points|vectors) for .* centroids")
D, N, K = 16, 333, 7

INDEXES = {
    "flat": lambda: Flat(D, "l2"),
    "ivf": lambda: IVF(D, 4, nprobe=4),
    "pq": lambda: PQ(D, 4, 4),
    "codes": lambda: Codes(quant.PQ(D, 8, 4)),
    "binary": lambda: Binary(D),
}


def packed(mask):
    return np.packbits(mask, bitorder="little")


def forms(mask):
    """The same filter in all forms; numbers out of range are passed over."""
    rows = np.flatnonzero(mask)
    mixed = np.random.default_rng(1).permutation(
        np.concatenate([rows, rows[:9], [-1, 9 * len(mask), -(2**62)]])
    )
    return {"bools": mask, "bits": packed(mask), "ids": rows, "int32": rows.astype(np.int32), "mixed": mixed}


def filled(gpu, kind, ids):
    index, x = INDEXES[kind](), np.random.default_rng(2).standard_normal((N, D)).astype(np.float32)
    if hasattr(index, "train"):
        index.train(gpu.put(x))
    index.add(gpu.put(x), ids)
    return index


@pytest.mark.parametrize("order", ["positions", "increasing", "mixed"])
@pytest.mark.parametrize("kind", INDEXES)
def test_indexes(gpu, kind, order):
    rng = np.random.default_rng(3)
    ids = None if order == "positions" else rng.choice(1000, N, replace=False)
    index = filled(gpu, kind, np.sort(ids) if order == "increasing" else ids)
    assert index.device.startswith("cuda")
    q = gpu.put(rng.standard_normal((5, D)).astype(np.float32))
    mask = rng.random(N if ids is None else 1000) < 0.3
    want = index.search(q, K, filter=mask)  # resolved on the host
    found = gpu.get(want.ids)
    assert mask[found[found >= 0]].all() and (found >= 0).any()
    for form in forms(mask).values():
        given = gpu.put(form)
        with gpu.no_sync():
            got = index.search(q, K, filter=given)
        np.testing.assert_array_equal(gpu.get(got.ids), found)
        np.testing.assert_array_equal(gpu.get(got.scores), gpu.get(want.scores))
    for form in (np.zeros(len(mask), bool), np.empty(0, np.int64)):
        assert (gpu.get(index.search(q, K, filter=gpu.put(form)).ids) == -1).all()
    if ids is not None:  # ids beyond the bools do not pass
        short = gpu.get(index.search(q, K, filter=gpu.put(mask[:500])).ids)
        np.testing.assert_array_equal(short, gpu.get(index.search(q, K, filter=mask[:500]).ids))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 65, 97])
def test_ops(gpu, n):
    rng = np.random.default_rng(n)
    q, x = (gpu.put(rng.standard_normal((m, D)).astype(np.float32)) for m in (3, n))
    mask = rng.random(n) < 0.5
    bits = [address.binarize(a) for a in (q, x)]
    calls = {
        "knn": lambda keep: scan.knn(q, x, K, filter=keep).ids,
        "range_search": lambda keep: scan.range_search(q, x, 0.0, filter=keep).ids,
        "binary": lambda keep: scan.binary(*bits, K, filter=keep).ids,
    }
    for name, call in calls.items():
        want = gpu.get(call(mask))
        for form in forms(mask).values():
            given = gpu.put(form)
            with gpu.no_sync() if name != "range_search" else contextlib.nullcontext():
                got = call(given)
            np.testing.assert_array_equal(gpu.get(got), want)


def test_range_search(gpu):
    index = filled(gpu, "flat", np.arange(N) * 3)
    q = gpu.put(np.random.default_rng(3).standard_normal((5, D)).astype(np.float32))
    wanted = np.arange(0, 3 * N, 6)
    want, got = (index.range_search(q, 20.0, filter=f) for f in (wanted, gpu.put(wanted)))
    for a, b in zip(want, got):
        np.testing.assert_array_equal(gpu.get(a), gpu.get(b))
    assert len(gpu.get(got.ids)) > 5


def test_shards(gpu):
    x = np.random.default_rng(2).standard_normal((N, D)).astype(np.float32)
    index = Flat(D, "l2")
    index.add(x)
    q, mask = x[:5] + 1, np.arange(N) % 3 == 0
    want = index.search(q, K, filter=mask)
    shards = Shards(index, ["cuda", "cuda"])
    for form in forms(mask).values():
        np.testing.assert_array_equal(
            gpu.get(shards.search(gpu.put(q), K, filter=gpu.put(form)).ids), want.ids
        )


def test_refused(gpu):
    index = filled(gpu, "flat", None)
    q = gpu.put(np.zeros((1, D), np.float32))
    with pytest.raises(ValueError, match=f"filter has 3 bools; it needs {N}"):
        index.search(q, filter=gpu.put(np.ones(3, bool)))
    with pytest.raises(ValueError, match="filter must be 1-d"):
        index.search(q, filter=gpu.put(np.ones((N, 1), bool)))
    with pytest.raises(TypeError, match="filter has dtype float32"):
        scan.knn(q, q, filter=gpu.put(np.ones(1, np.float32)))


@pytest.mark.parametrize("kind", ["flat", "ivf", "pq", "binary"])
def test_in_cuda_graphs(gpu_torch, kind):
    torch = gpu_torch.torch
    index = filled(gpu_torch, kind, np.arange(N) * 2 + 1)
    rng = np.random.default_rng(4)
    q = gpu_torch.put(rng.standard_normal((5, D)).astype(np.float32))
    mask = gpu_torch.put(rng.random(2 * N) < 0.3)
    index.search(q, K, filter=mask)  # what an index keeps for its searches is made by the first
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = index.search(q, K, filter=mask)
    for _ in range(2):
        mask.copy_(gpu_torch.put(rng.random(2 * N) < 0.3))
        graph.replay()
        want = index.search(q, K, filter=gpu_torch.get(mask))
        np.testing.assert_array_equal(gpu_torch.get(out.ids), gpu_torch.get(want.ids))
