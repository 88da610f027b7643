"""Codes on CUDA against the reference: PQ and RQ encoding, bits, hash features, transforms, ball carving."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from gpu_arrays import FLOATS, SIZES, close, rounded

import lutra
from lutra.reference import address as reference
from lutra.reference import binary, fde, hashes, quant


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOATS)
def test_binarize(gpu, dtype):
    for n in (0, 1, 3, 65):
        for d in (0, *SIZES, 64, 128):
            rng = np.random.default_rng(d)
            x = rounded(rng.standard_normal((n, d)).astype(np.float32), dtype)
            x[rng.random(x.shape) < 0.1] = np.nan
            thresholds = rng.standard_normal(d).astype(np.float32)
            there, those = gpu.put(x, dtype), gpu.put(thresholds)
            with gpu.no_sync():
                got = [lutra.address.binarize(there), lutra.address.binarize(there, 0.25)]
                got.append(lutra.address.binarize(there, those))
            for bits, limit in zip(got, (np.zeros(d, np.float32), np.full(d, 0.25, np.float32), thresholds)):
                assert gpu.owns(bits)
                np.testing.assert_array_equal(gpu.get(bits), binary.binarize(x, limit))


@pytest.mark.parametrize("dtype", ("int32", "int64"))
def test_hash_features(gpu, dtype):
    ids = np.random.default_rng(0).integers(0, 2**31, (7, 5)).astype(dtype)
    if dtype == "int64":
        ids[0, :2] = 0, 2**32 - 1
    for k in (1, 3, 127, 129, 1024):
        for buckets in (2, 1000, 1_000_000, 2**31 - 1):
            got = lutra.address.hash_features(gpu.put(ids), k, buckets=buckets, seed=k)
            want = hashes.hash_features(ids, k, buckets=buckets, seed=k)
            assert gpu.owns(got)
            np.testing.assert_array_equal(gpu.get(got), want)
    if dtype == "int64":
        bad = gpu.get(lutra.address.hash_features(gpu.put(np.array([1, -1, 2**32])), 5))
        assert np.isnan(bad[1:]).all() and np.isfinite(bad[0]).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1 << i for i in range(15)])
def test_fwht(gpu, n, dtype):
    if gpu.name == "cupy" and n > 8192:
        with pytest.raises(NotImplementedError):
            lutra.address.fwht(gpu.put(np.ones((1, n), np.float32)))
        return
    for rows in (0, 1, 3, 17):
        x = np.random.default_rng(n).integers(-4, 5, (rows, n)).astype(np.float32)
        for scale in (1.0, n**-0.5):
            got = lutra.address.fwht(gpu.put(x, dtype), scale)
            assert gpu.owns(got)
            close(gpu.get(got), reference.fwht(x, scale), dtype)


def test_fwht_gradient(gpu_torch):
    x = gpu_torch.put(np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)).requires_grad_()
    lutra.address.fwht(x, 0.5).backward(x.detach())
    close(gpu_torch.get(x.grad), reference.fwht(gpu_torch.get(x), 0.5))


@pytest.mark.sanitize
@pytest.mark.parametrize("dsub", (1, 2, 3, 4, 8, 12, 16, 17, 24, 32, 40))
def test_pq_encode(gpu, dsub):
    """Whole numbers: errors are exact, and equal ones go to the first."""
    from lutra._arrays import kind_of
    from lutra.quant import _on_cuda

    rng = np.random.default_rng(dsub)
    for n in (1, 3, 127, 700):
        for m, ksub in ((1, 256), (3, 16), (5, 2)):
            x = rng.integers(-3, 4, (n, m * dsub)).astype(np.float32)
            books = rng.integers(-3, 4, (m, ksub, dsub)).astype(np.float32)
            there = gpu.put(x)
            got = _on_cuda.pq_entries(kind_of(there, "x"), there, books, _on_cuda.Copies())
            np.testing.assert_array_equal(gpu.get(got), quant.pq_encode(x, books))


def anisotropic_loss(x, toward, books, entries, threshold):
    """|r|^2 + (w - 1) <r, u>^2 of each vector."""
    m, _, dsub = books.shape
    r = (x - quant.pq_decode(entries, books)).astype(np.float64)
    squares = np.square(toward, dtype=np.float64).sum(1)
    share = np.minimum(threshold**2 / np.where(squares > 0, squares, 1), 0.81)
    more = np.where(squares > 0, np.maximum((m * dsub - 1) * share / (1 - share) - 1, 0), 0)
    u = toward / np.sqrt(np.where(squares > 0, squares, 1))[:, None]
    return np.square(r).sum(1) + more * np.square((r * u).sum(1))


@pytest.mark.sanitize
@pytest.mark.parametrize("dsub", (1, 2, 3, 8, 17))
def test_pq_encode_anisotropic(gpu, dsub):
    from lutra._arrays import kind_of
    from lutra.quant import _on_cuda
    from lutra.quant._kernels import ROUNDS

    rng = np.random.default_rng(dsub)
    for n in (1, 7, 65):
        for m, ksub in ((1, 256), (3, 16), (9, 40), (33, 4), (2, 1)):
            x, other = (rng.standard_normal((n, m * dsub)).astype(np.float32) for _ in range(2))
            books = rng.standard_normal((m, ksub, dsub)).astype(np.float32)
            other[n // 2] = 0  # has no direction
            for toward in (None, other):
                there = gpu.put(x)
                given = None if toward is None else gpu.put(toward)
                got = _on_cuda.pq_entries(kind_of(there, "x"), there, books, _on_cuda.Copies(), given, 0.5)
                got, along = gpu.get(got), x if toward is None else toward
                want = quant.pq_encode(x, books, toward, 0.5, ROUNDS)
                losses = [anisotropic_loss(x, along, books, e, 0.5) for e in (got, want)]
                same = (got == want).all(1)
                assert same.sum() >= 0.9 * n - 1  # sums in another order may swap near ties
                np.testing.assert_allclose(losses[0].mean(), losses[1].mean(), rtol=0.05, atol=1e-3)
                np.testing.assert_array_equal(got[n // 2] == want[n // 2], True)


@pytest.mark.parametrize("kind", ("PQ", "OPQ"))
def test_quantizers_of_the_anisotropic_loss(gpu, kind):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, 16)).astype(np.float32)
    left = x - rng.standard_normal((600, 16)).astype(np.float32) / 4
    quantizer = getattr(lutra.quant, kind)(16, 4, 4).train(left, loss="anisotropic", directions=x)
    for options in ({}, {"directions": x}):
        want = quantizer.encode(left, **options)
        got = quantizer.encode(gpu.put(left), **{name: gpu.put(a) for name, a in options.items()})
        assert gpu.owns(got)
        assert (gpu.get(got) == want).all(1).mean() > 0.98
    index = lutra.index.IVF(16, 4, lutra.quant.PQ(16, 4, 4, loss="anisotropic"), "ip", nprobe=4)
    index.train(x, n_iter=1)
    moved = copy.deepcopy(index).to("cuda")
    index.add(x)
    moved.add(gpu.put(x))
    found, want = moved.search(gpu.put(x[:5]), 20), index.search(x[:5], 20)
    same = [len(set(a) & set(b)) for a, b in zip(gpu.get(found.ids).tolist(), want.ids.tolist())]
    assert np.mean(same) > 18


@pytest.mark.parametrize("kind", ("PQ", "OPQ"))
def test_directions_on_another_device(gpu_torch, kind):
    torch = gpu_torch.torch
    rng = np.random.default_rng(1)
    x = rng.standard_normal((640, 16)).astype(np.float32)
    left = x - rng.standard_normal((640, 16)).astype(np.float32) / 4
    quantizer = getattr(lutra.quant, kind)(16, 4, 4).train(left, loss="anisotropic", directions=x)
    want = quantizer.encode(left, directions=x)
    for here, there in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("cuda:0", "cpu")):
        if "cuda:1" in (here, there) and torch.cuda.device_count() < 2:
            continue
        got = quantizer.encode(torch.from_numpy(left).to(here), directions=torch.from_numpy(x).to(there))
        assert str(got.device) == here
        np.testing.assert_array_equal(got.cpu().numpy(), want)  # by the host


@pytest.mark.sanitize
@pytest.mark.parametrize("beam", (1, 3, 16))
def test_rq_encode(gpu, beam):
    from lutra._arrays import kind_of
    from lutra.quant import _on_cuda
    from lutra.quant._kernels import rq_gram

    rng = np.random.default_rng(beam)
    for n, m, ksub, d in ((1, 1, 16, 5), (33, 4, 16, 7), (40, 3, 256, 9), (9, 6, 4, 3)):
        x = rng.integers(-9, 10, (n, d)).astype(np.float32)
        books = rng.integers(-4, 5, (m, ksub, d)).astype(np.float32)
        gram = rq_gram(books)
        norms = np.ascontiguousarray(np.diagonal(gram))
        want, _ = quant.rq_encode(x @ books.reshape(-1, d).T, norms, gram, m, beam)
        there = gpu.put(x)
        got = _on_cuda.rq_entries(kind_of(there, "x"), there, books, gram, beam, _on_cuda.Copies())
        np.testing.assert_array_equal(gpu.get(got), want[:, 0])


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("kind", ("PQ", "OPQ", "RQ"))
def test_quantizers_encode_where_vectors_are(gpu, kind, bits):
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((3000, 24)).astype(np.float32)
    made = {
        "PQ": lutra.quant.PQ(24, 6, bits),
        "OPQ": lutra.quant.OPQ(24, 6, bits),
        "RQ": lutra.quant.RQ(24, 3, bits),
    }
    quantizer = made[kind].train(x[:2000])
    want = quantizer.encode(x)
    got = quantizer.encode(gpu.put(x))
    assert gpu.owns(got) and gpu.get(got).dtype == np.uint8
    errors = [np.square(x - quantizer.decode(c)).sum(1) for c in (gpu.get(got), want)]
    assert (gpu.get(got) == want).all(1).mean() > 0.99  # sums in another order may swap near ties
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-3, atol=1e-4)
    x[5, 2] = np.nan
    with pytest.raises(ValueError, match=r"x\[5"):
        quantizer.encode(gpu.put(x))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOATS)
def test_ball_carving(gpu, dtype):
    for d in (1, 5, 33, 128):
        rng = np.random.default_rng(d)
        ptr = np.concatenate([[0], np.cumsum([3, 0, 1, 40, 0, 100, 2])]).astype(np.int64)
        x = rng.integers(-2, 3, (ptr[-1], d)).astype(np.float32)
        for threshold in (-5.0, 0.5, d / 2, 1e9):
            sums, bounds = lutra.address.ball_carving(gpu.put(x, dtype), gpu.put(ptr), threshold)
            want = fde.ball_carving(x, ptr, threshold)
            assert gpu.owns(sums) and gpu.owns(bounds)
            np.testing.assert_array_equal(gpu.get(bounds), want[1])
            np.testing.assert_array_equal(gpu.get(sums), want[0])
    none = lutra.address.ball_carving(gpu.put(x[:0], dtype), gpu.put(np.zeros(1, np.int64)))
    assert none[0].shape == (0, 128)
