"""The int8 screen on CUDA: codes as the CPU's, and results as knn's to the bit."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from gpu_arrays import close, rounded, same_bits

import lutra
from lutra import _arrays
from lutra.reference import scan as exact
from lutra.reference import screen as reference
from lutra.scan import Screen, _screen, knn, knn_screened, quantize_int8
from lutra.scan._knn import _knn

METRICS = ("ip", "l2", "cosine")
STORAGE = ("float32", "float16", "bfloat16", "int8", "uint8")


@pytest.fixture(autouse=True)
def small():
    """The screen also for small collections."""
    lutra._backend.cuda.screen_paths(1, 0)
    yield
    lutra._backend.cuda.screen_paths(0, 0)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def values(rng, dtype, *shape):
    """float32 values that the type holds."""
    if dtype in ("int8", "uint8"):
        return rng.integers(-100 if dtype == "int8" else 0, 100, shape).astype(np.float32)
    return rounded(normal(rng, *shape), dtype)


def same_as_knn(gpu, q, x, k, metric, screen=None, **options):
    screen = quantize_int8(x, metric) if screen is None else screen
    with contextlib.nullcontext() if options else gpu.no_sync():
        got = knn_screened(q, x, screen, k, metric, **options)
    want = knn(q, x, k, metric, **options)
    assert gpu.owns(got.scores) and gpu.owns(got.ids)
    np.testing.assert_array_equal(gpu.get(got.ids), gpu.get(want.ids))
    same_bits(gpu.get(got.scores), gpu.get(want.scores))
    return got


# ---------------------------------------------------------------- codes
def same_codes(gpu, got, want):
    got = [gpu.get(a) for a in got]
    assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in want]
    difference = np.abs(got[0].astype(int) - want[0])
    assert difference.max(initial=0) <= 1 and (difference > 0).mean() < 0.01  # halves round either way
    np.testing.assert_allclose(got[3], want[3], atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-3, atol=1e-3)
    # some halves change a length, and what codes lose is known to some units of the last place of 127
    assert (got[4] >= want[4] * np.float32(0.999) - np.float32(5e-5)).all()
    assert (got[4] <= want[4] * np.float32(1.001) + np.float32(5e-5)).all()


@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("dtype", STORAGE)
def test_codes_are_those_of_the_reference(gpu, dtype, metric):
    rng = np.random.default_rng()
    for n, d in ((1, 1), (2, 3), (15, 4), (33, 5), (100, 64), (47, 97), (17, 1100)):
        x = values(rng, dtype, n, d) + np.float32(3 if dtype == "float32" else 0)
        a = gpu.put(x, dtype)
        with gpu.no_sync():
            got = quantize_int8(a, metric)
        assert all(gpu.owns(part) for part in got)
        same_codes(gpu, got, reference.quantize_int8(x, metric == "cosine"))


def test_small_integers_have_the_codes_of_the_cpu(gpu):
    """Without halves and with an exact mean there is one answer: the files are the same."""
    x = np.array([[i % 7 - 3, 127, -127, 5 - i % 2] for i in range(40)], np.float32)
    x -= x.mean(0).round()
    got, want = quantize_int8(gpu.put(x)), quantize_int8(x)
    np.testing.assert_array_equal(gpu.get(got.codes), want.codes)


def test_codes_in_parts_are_the_codes_at_once(gpu):
    x = gpu.put(normal(np.random.default_rng(0), 100, 20))
    kind = _arrays.kind_of(x, "x")
    whole = quantize_int8(x)
    parts = _screen.empty(kind, x, 100, 20)
    _screen.begin(kind, x, False, parts)
    for a, b in ((0, 7), (7, 16), (16, 47), (47, 100)):
        _screen.encode(kind, x[a:b], a, False, parts)
    for got, want in zip(parts, whole):
        same_bits(gpu.get(got), gpu.get(want))


def test_rows_that_cannot_be_coded_are_always_scored(gpu):
    rng = np.random.default_rng()
    x, q = normal(rng, 700, 12), normal(rng, 3, 12)
    x[5, 3], x[100, 0], x[333] = np.nan, np.inf, 1e18
    a = gpu.put(x)
    screen = quantize_int8(a)
    inverse = gpu.get(screen.inverse)
    np.testing.assert_array_equal(np.flatnonzero(inverse < 1e-30), [5, 100, 333])
    assert np.isfinite(gpu.get(screen.bounds)).all() and np.isfinite(gpu.get(screen.mean)).all()
    for metric in ("ip", "l2"):
        got = same_as_knn(gpu, gpu.put(q), a, 5, metric)
        assert (gpu.get(got.ids)[:, 0] == 5).all()


# ---------------------------------------------------------------- results
@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("nq", [1, 2, 7, 8, 9, 17, 33, 64, 65, 129])
def test_exact_values_and_ties(gpu, nq, metric):
    """Small integers, whose scores are exact, and many equal: the reference's results."""
    rng = np.random.default_rng(nq)
    for n, d, k in ((1, 3, 2), (15, 1, 3), (33, 5, 4), (290, 31, 10), (530, 33, 1), (1030, 16, 20)):
        x, q = (rng.integers(-3, 4, (m, d)).astype(np.float32) for m in (n, nq))
        a = gpu.put(x)
        got = knn_screened(gpu.put(q), a, quantize_int8(a, metric), k, metric)
        want = exact.knn(q, x, k, metric)
        np.testing.assert_array_equal(gpu.get(got.ids), want[1])
        np.testing.assert_array_equal(gpu.get(got.scores), want[0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_types_and_metrics(gpu, dtype, metric):
    rng = np.random.default_rng()
    for nq, n, d in ((1, 1500, 20), (12, 900, 64), (70, 700, 97)):
        x, q = gpu.put(values(rng, dtype, n, d), dtype), gpu.put(values(rng, dtype, nq, d))
        same_as_knn(gpu, q, x, 7, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 4, 31, 33, 63, 65, 128, 240, 241, 257, 400])
def test_dimensions(gpu_torch, d, metric):
    """Sums of up to 240 columns are floats by their bits, wider ones are converted."""
    rng = np.random.default_rng(d)
    x = gpu_torch.put(normal(rng, 700, d) + np.float32(0.3))
    for nq in (3, 20, 50, 66):
        same_as_knn(gpu_torch, gpu_torch.put(normal(rng, nq, d)), x, 5, metric)


def test_wide_rows(gpu_torch):
    """Blocks of 128 queries (of a sample 64, which takes more shared memory), 64 (32), 32, 8, and none."""
    rng = np.random.default_rng()
    many = ((520, 1500, 66), (520, 1530, 66), (520, 1800, 66), (520, 3300, 40))
    for n, d, nq in (*many, (300, 7200, 10), (300, 15_000, 2)):
        same_as_knn(gpu_torch, gpu_torch.put(normal(rng, nq, d)), gpu_torch.put(normal(rng, n, d)), 5, "l2")


@pytest.mark.parametrize("metric", METRICS)
def test_long_lists(gpu_torch, metric):
    rng = np.random.default_rng()
    x, q = gpu_torch.put(normal(rng, 3000, 24)), gpu_torch.put(normal(rng, 9, 24))
    for k in (17, 100, 256, 257):
        same_as_knn(gpu_torch, q, x, k, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [1, 20, 70])
def test_rows_that_the_codes_rule_out_are_not_read(gpu_torch, metric, nq):
    """So they may hold anything: the answer comes from the screen, not from the exact pass."""
    rng = np.random.default_rng(nq)
    x, q = normal(rng, 6000, 16), np.tile(normal(rng, 1, 16), (nq, 1))
    a = gpu_torch.put(x)
    screen = quantize_int8(a, metric)
    want = knn_screened(gpu_torch.put(q), a, screen, 3, metric)
    scores = exact.knn(q[:1], x, 6000, metric)[1][0]
    a[gpu_torch.put(scores[3000:])] = np.nan
    got = knn_screened(gpu_torch.put(q), a, screen, 3, metric)
    for one, other in zip(got, want):
        same_bits(gpu_torch.get(one), gpu_torch.get(other))


@pytest.mark.parametrize(("n", "d", "nq"), [(40_000, 16, 9), (60_000, 1500, 65), (100_000, 384, 1)])
def test_as_it_is_used(gpu_torch, n, d, nq):
    """A collection that is large enough for the screen as it is: the sample's bar decides."""
    if d > 16 and lutra._backend.cuda.device_name(0) == "emulated":
        pytest.skip("takes the emulator minutes")
    lutra._backend.cuda.screen_paths(0, 0)
    rng = np.random.default_rng(nq)
    a, q = gpu_torch.put(normal(rng, n, d)), gpu_torch.put(np.tile(normal(rng, 1, d), (nq, 1)))
    screen = quantize_int8(a)
    want = same_as_knn(gpu_torch, q, a, 10, "ip", screen)
    a[knn(q[:1], a, n).ids[0, n // 2 :]] = np.nan
    got = knn_screened(q, a, screen, 10)
    for one, other in zip(got, want):
        same_bits(gpu_torch.get(one), gpu_torch.get(other))


@pytest.mark.parametrize(
    ("n", "k", "nq", "screened"),
    [
        (33_000, 1, 9, True),
        (33_000, 1, 8, False),  # the codes save 1.6 MB
        (33_000, 20, 9, False),  # some 550 candidates
        (32_000, 1, 9, False),
    ],
)
def test_what_is_left_to_knn(gpu_torch, n, k, nq, screened):
    """It reads all rows, and so finds those that are NaN by now."""
    lutra._backend.cuda.screen_paths(0, 0)
    rng = np.random.default_rng(n)
    a, q = gpu_torch.put(normal(rng, n, 16)), gpu_torch.put(np.tile(normal(rng, 1, 16), (nq, 1)))
    screen = quantize_int8(a)
    a[knn(q[:1], a, n).ids[0, n // 2 :]] = np.nan
    scores = gpu_torch.get(knn_screened(q, a, screen, k).scores)
    assert np.isnan(scores).any() != screened


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("capacity", [8, 40])
def test_queries_with_too_many_candidates(gpu_torch, metric, capacity):
    rng = np.random.default_rng()
    lutra._backend.cuda.screen_paths(1, capacity)
    x = normal(rng, 1000, 10)
    x[300:900] = x[300]
    for nq in (2, 40):
        same_as_knn(gpu_torch, gpu_torch.put(normal(rng, nq, 10)), gpu_torch.put(x), 6, metric)


def hard_cases(rng, n, d):
    x = normal(rng, n, d)
    one = x.copy()
    one[np.arange(n), rng.integers(0, d, n)] = 3e4  # makes codes coarse: all that matters is lost
    outlier = x.copy()
    outlier[7] *= 1e10
    broken = x.copy()
    broken[rng.integers(0, n, 3)] = np.nan
    broken[rng.integers(0, n, 9), 0] = np.inf
    broken[rng.integers(0, n, 50)] = 0
    return {
        "near": 1 + x * 1e-6, "scales": x * np.exp(rng.uniform(-40, 30, (n, 1))).astype(np.float32),
        "tiny": x * np.float32(1e-23), "huge": x * np.float32(1e17), "coarse": one, "outlier": outlier,
        "repeated": x[rng.integers(0, 5, n)], "broken": broken, "all NaN": x * np.nan, "zeros": x * 0,
        "offset": x * np.float32(0.01) + 100, "rising": np.sort(x, 0), "overflowing": x * np.float32(1e20),
    }  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [8, 33])
def test_data_that_the_screen_cannot_order(gpu_torch, metric, nq):
    rng = np.random.default_rng()
    n, d = 600, 36
    for name, x in hard_cases(rng, n, d).items():
        q = normal(rng, nq, d)
        q[:2] = x[:2]
        q[2], q[3], q[4, 3], q[5, 3] = 0, q[3] * np.float32(1e25), np.nan, np.inf
        q[6] *= np.float32(1e-20)
        try:
            same_as_knn(gpu_torch, gpu_torch.put(q), gpu_torch.put(x), 10, metric)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("metric", METRICS)
def test_filters(gpu, metric):
    rng = np.random.default_rng()
    x = normal(rng, 900, 24)
    x[5] = np.nan
    a = gpu.put(x)
    screen = quantize_int8(a, metric)
    for nq in (1, 40, 70):
        q = gpu.put(normal(rng, nq, 24))
        for mask in (rng.random(900) < 0.3, np.zeros(900, bool), np.arange(900) % 400 == 7):
            mask[5] = False
            got = same_as_knn(gpu, q, a, 6, metric, screen, filter=mask)
            ids = gpu.get(got.ids)
            assert mask[ids[ids >= 0]].all()
    bits = np.packbits(mask, bitorder="little")
    for filter in (bits, gpu.put(mask), np.flatnonzero(mask).tolist(), lambda i: i % 400 == 7):
        again = knn_screened(q, a, screen, 6, metric, filter=filter)
        np.testing.assert_array_equal(gpu.get(again.ids), ids)


def test_bias(gpu):
    rng = np.random.default_rng()
    x, bias = normal(rng, 1500, 32), 5 * normal(rng, 1500)
    a, b = gpu.put(x), gpu.put(bias)
    kind = _arrays.kind_of(a, "x")
    screen = _screen._quantize_int8(kind, a, False, b, 256)
    for nq in (1, 9, 70):
        q = normal(rng, nq, 32)
        scores, ids = _screen._knn_screened(kind, gpu.put(q), a, *screen, k=8, bias=b)
        products = q @ x.T + bias
        close(gpu.get(scores), np.sort(products, 1)[:, ::-1][:, :8])
        close(np.take_along_axis(products, gpu.get(ids), 1), gpu.get(scores))


@pytest.mark.parametrize("nq", [1, 9, 70])
def test_biases_that_are_not_finite(gpu, nq):
    """Their rows pass for every query, those that only fill a block too; the order is knn's."""
    rng = np.random.default_rng(nq)
    x, bias = normal(rng, 4000, 16), normal(rng, 4000)
    bias[::3], bias[1], bias[2] = np.inf, np.nan, -np.inf
    kind = _arrays.kind_of(gpu.put(x), "x")
    q, a, b = gpu.put(normal(rng, nq, 16)), gpu.put(x), gpu.put(bias)
    screen = _screen._quantize_int8(kind, a, False, b, 256)
    scores, ids = _screen._knn_screened(kind, q, a, *screen, k=8, bias=b)
    want = _knn(kind, q, a, 8, "ip", None, b)
    np.testing.assert_array_equal(gpu.get(ids), gpu.get(want[1]))
    same_bits(gpu.get(scores), gpu.get(want[0]))


def test_codes_of_the_cpu(gpu):
    """A screen made on the host, moved to the device."""
    rng = np.random.default_rng()
    x, q = normal(rng, 1200, 40), normal(rng, 5, 40)
    for metric in METRICS:
        screen = Screen(*(gpu.put(part) for part in quantize_int8(x, metric)))
        same_as_knn(gpu, gpu.put(q), gpu.put(x), 10, metric, screen)


def test_empty(gpu):
    x = gpu.put(np.zeros((0, 4), np.float32))
    got = knn_screened(gpu.put(np.ones((2, 4), np.float32)), x, quantize_int8(x), 3)
    assert (gpu.get(got.ids) == -1).all() and (gpu.get(got.scores) == -np.inf).all()
    y = gpu.put(np.ones((50, 4), np.float32))
    assert knn_screened(x, y, quantize_int8(y), 3).ids.shape == (0, 3)
    y = gpu.put(np.ones((5, 0), np.float32))
    got = knn_screened(gpu.put(np.ones((2, 0), np.float32)), y, quantize_int8(y, "l2"), 2, "l2")
    np.testing.assert_array_equal(gpu.get(got.ids), [[0, 1], [0, 1]])


@pytest.mark.sanitize
@pytest.mark.parametrize("nq", [1, 12, 66])
def test_small(gpu_torch, nq):
    rng = np.random.default_rng(1)
    x, q = (rng.integers(-5, 5, (m, 33)).astype(np.float32) for m in (530, nq))
    for metric in ("l2", "ip"):
        a = gpu_torch.put(x)
        ids = knn_screened(gpu_torch.put(q), a, quantize_int8(a, metric), 5, metric).ids
        np.testing.assert_array_equal(gpu_torch.get(ids), exact.knn(q, x, 5, metric)[1])


def test_torch_ops_and_gradients(gpu_torch):
    torch = gpu_torch.torch
    rng = np.random.default_rng()
    x, q = gpu_torch.put(normal(rng, 900, 8)), gpu_torch.put(normal(rng, 5, 8))
    screen = quantize_int8(x, "l2")
    one, two = q.clone().requires_grad_(), q.clone().requires_grad_()
    with gpu_torch.no_sync():
        scores = knn_screened(one, x, screen, 4, "l2").scores
        scores.sum().backward()
    knn(two, x, 4, "l2").scores.sum().backward()
    torch.testing.assert_close(one.grad, two.grad)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (q, x, *screen, None, 4, "ip")
    torch.library.opcheck(torch.ops.lutra.knn_screened.default, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.lutra.quantize_int8.default, (x, True), test_utils=checks)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) for a in (q, x, *screen)]
        ids = torch.ops.lutra.knn_screened(*fake, None, 4)[1]
        assert ids.device.type == "cuda" and ids.shape == (5, 4)


def test_in_a_graph(gpu_torch):
    torch, rng = gpu_torch.torch, np.random.default_rng()
    q, x = gpu_torch.put(normal(rng, 70, 32)), gpu_torch.put(normal(rng, 3000, 32))
    knn_screened(q, x, quantize_int8(x), 10)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, ids = knn_screened(q, x, quantize_int8(x), 10)
    for data in (normal(rng, 3000, 32), np.tile(normal(rng, 1, 32), (3000, 1))):
        x.copy_(gpu_torch.put(data))
        graph.replay()
        want = knn(q, x, 10)
        np.testing.assert_array_equal(gpu_torch.get(ids), gpu_torch.get(want.ids))
        same_bits(gpu_torch.get(scores), gpu_torch.get(want.scores))


def test_bad_input(gpu):
    x = gpu.put(np.ones((20, 4), np.float32))
    screen = quantize_int8(x)
    with pytest.raises(TypeError, match="quantize_int8"):
        knn_screened(x, x, x)
    with pytest.raises(ValueError, match=r"screen.codes has shape"):
        knn_screened(x, x[:3], screen)
    with pytest.raises(TypeError, match="float64"):
        knn_screened(gpu.put(np.ones((2, 4))), gpu.put(np.ones((20, 4))), screen)
    with pytest.raises(TypeError, match="codes"):
        knn_screened(x, x, quantize_int8(np.ones((20, 4), np.float32)))


@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_bank(gpu_torch, dtype, metric):
    torch = gpu_torch.torch
    import lutra.nn

    rng = np.random.default_rng()
    keys, query = normal(rng, 2, 900, 16), normal(rng, 2, 5, 16)
    bank = lutra.nn.MemoryBank(2, 16, metric=metric, device="cuda", dtype=getattr(torch, dtype))
    a, q = gpu_torch.put(keys, dtype), gpu_torch.put(query)
    bank.add(a, a)
    for _ in range(2):
        with gpu_torch.no_sync():
            found = bank.search(q, 7)
        for head in range(2):
            want = knn(q[head], a[head], 7, metric)
            np.testing.assert_array_equal(gpu_torch.get(found.ids[head]), gpu_torch.get(want.ids))
            same_bits(gpu_torch.get(found.scores[head]), gpu_torch.get(want.scores))
        bank.build()
        assert bank._screens is not None and bank._screens[0].codes.is_cuda


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs", [1, 40])
def test_sparse_autoencoder(gpu_torch, inputs, dtype):
    """The latents of the CPU, and gradients through them; activations are not written."""
    import copy

    import lutra.nn

    torch = gpu_torch.torch
    torch.manual_seed(0)
    layer = lutra.nn.TopKSAE(24, 500, 6).to(getattr(torch, dtype))
    with torch.no_grad():
        layer.bias.normal_(std=0.3)
    there = copy.deepcopy(layer).to("cuda")
    x = torch.randn(inputs, 24)
    for training in (True, False):
        want, got = layer.train(training).encode(x), there.train(training).encode(x.to("cuda"))
        assert got.ids.is_cuda and got.values.dtype == want.values.dtype
        close(gpu_torch.get(got.values), want.values.detach().float().numpy(), dtype, factor=3)
        assert (got.ids.cpu() == want.ids).float().mean() > 0.99
    out = there(x.to("cuda"))[0]
    out.float().square().sum().backward()
    layer(x)[0].float().square().sum().backward()
    close(gpu_torch.get(there.weight.grad), layer.weight.grad.float().numpy(), dtype, factor=4)
