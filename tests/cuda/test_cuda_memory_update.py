"""Fused optimizer steps on tables on the GPU, against the CPU's kernel and dense gradients."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import FLOATS, close, same_bits

torch = pytest.importorskip("torch")

from lutra._arrays import torch_kind  # noqa: E402
from lutra.gather._tables_update import _tables_square, _update_tables  # noqa: E402
from lutra.gather._update import Step, adam_step  # noqa: E402

NUMBERS = {
    "sgd": Step(0.1, 0.99),
    "momentum": Step(0.1, 0.99, 0.9),
    "adagrad": Step(0.1, 0.99, eps=1e-10),
    "rowwise_adagrad": Step(0.1, 0.99, eps=1e-8),
    "adam": adam_step(0.1, (0.9, 0.999), 1e-8, 3, 0.1),
}
# (tokens, tables, entries, dim): too few for the fused kernel; one chunk; a popular row; two chunks
SHAPES = ((9, 3, 16, 8), (97, 5, 16, 40), (600, 9, 256, 72), (4200, 3, 8, 24))


def problem(tokens, n_tables, entries, dim, dtype, rule, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n_tables, entries, dim)

    def floats(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    codes = rng.integers(0, entries - entries // 8, (tokens, n_tables)).astype(
        np.int32
    )  # some rows untouched
    codes[rng.random(codes.shape) < 0.3] = entries // 2
    state = [None, None]
    if rule in ("momentum", "adagrad", "adam"):
        state[0] = floats(*shape).abs()
    if rule == "adam":
        state[1] = floats(*shape).abs()
    if rule == "rowwise_adagrad":
        state[0] = floats(*shape[:2]).abs()
    kind = getattr(torch, dtype)
    return [floats(*shape).to(kind), floats(tokens, dim).to(kind), torch.from_numpy(codes),
            floats(tokens, n_tables), *state]  # fmt: skip


def updated(arrays, device, rule, seed=None):
    arrays = [None if a is None else a.to(device, copy=True) for a in arrays]
    _update_tables(torch_kind(device == "cuda"), *arrays, rule, NUMBERS[rule], seed)
    return [a.float().cpu().numpy() for a in (arrays[0], *arrays[4:]) if a is not None]


@pytest.mark.parametrize("rule", NUMBERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_as_on_the_cpu(dtype, rule):
    for shape in SHAPES:
        arrays = problem(*shape, dtype, rule, seed=shape[0])
        got = updated(arrays, "cuda", rule)
        for a, b in zip(updated(arrays, "cpu", rule), got):
            close(b, a, dtype, 4)
        for a, b in zip(got, updated(arrays, "cuda", rule)):
            same_bits(a, b)
        # rows that nobody touched are as they were
        touched = np.zeros(shape[1:3], bool)
        touched[np.arange(shape[1])[None], arrays[2].numpy()] = True
        np.testing.assert_array_equal(got[0][~touched], arrays[0].float().numpy()[~touched])


def test_random_rounding_is_that_of_the_cpu():
    arrays = problem(300, 4, 16, 64, "bfloat16", "sgd")
    a, b = updated(arrays, "cpu", "sgd", seed=7)[0], updated(arrays, "cuda", "sgd", seed=7)[0]
    assert (a == b).mean() > 0.98  # sums in another order round otherwise now and then
    close(b, a, "bfloat16", 2)
    nearest = updated(arrays, "cuda", "sgd")[0]
    assert 0.2 < (b != nearest).mean() < 0.8


@pytest.mark.parametrize("dtype", FLOATS)
def test_squares(dtype):
    for shape in SHAPES:
        tables, grad, codes, weights, *_ = problem(*shape, dtype, "sgd")
        found = [
            float(_tables_square(torch_kind(d == "cuda"), *(a.to(d) for a in (tables, grad, codes, weights))))
            for d in ("cpu", "cuda")
        ]
        np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_an_attached_layer():
    """Steps without a gradient of the tables are those with one."""
    import lutra.nn
    import lutra.optim

    layers = []
    for attach in (False, True):
        torch.manual_seed(0)
        layer = lutra.nn.MemoryLinear(64, 48, device="cuda")
        optimizer = lutra.optim.SGD(layer.parameters(), lr=0.1)
        if attach:
            optimizer.attach(layer)
        for i in range(3):
            x = torch.randn(200, 64, generator=torch.Generator().manual_seed(i)).cuda()
            optimizer.zero_grad()
            (layer(x) - 1).square().mean().backward()
            assert (layer.tables.grad is None) == attach
            optimizer.step()
        layers.append(layer)
    torch.testing.assert_close(layers[0].tables, layers[1].tables)
