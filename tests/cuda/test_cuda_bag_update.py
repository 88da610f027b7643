"""Optimizer steps on touched rows on CUDA against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from bag_data import make_ids
from gpu_arrays import FLOATS, close, rounded, same_bits

import lutra
from lutra.gather._update import _numbers
from lutra.reference import row_update as reference

RULES = ("sgd", "momentum", "adagrad", "rowwise_adagrad", "adam")
OPTIONS = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.8, "betas": (0.8, 0.95), "eps": None, "step": 3}


def state_of(rng, rule, rows, dim):
    names = list(lutra.gather.row_state(np.zeros((1, 1), np.float32), rule))
    shape = (rows,) if rule == "rowwise_adagrad" else (rows, dim)
    return {name: rng.random(shape).astype(np.float32) for name in names}


def expected(table, state, rule, function, arrays, options=()):
    """Table and state after a step of the reference."""
    table, held = table.astype(np.float32).copy(), [a.copy() for a in state.values()]
    names = ("lr", "weight_decay", "momentum", "betas", "eps", "step")
    numbers = _numbers(rule, *(OPTIONS[k] for k in names))
    s0, s1, *_ = [*held, None, None]
    function(table, *arrays, s0, s1, rule, numbers, *options)
    return table, dict(zip(state, held))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_update_bags(gpu, dtype, rule):
    rng = np.random.default_rng(1)
    for dim in (1, 3, 8, 33, 64, 136, 264):
        for layout, mode in (("fixed", "sum"), ("offsets", "mean"), ("last", "sum")):
            rows = 40
            ids, offsets, last = make_ids(rows, layout, "int32" if dim == 8 else "int64", dim)
            bags = len(ids) if offsets is None else len(offsets) - last
            table = rounded(rng.standard_normal((rows, dim)).astype(np.float32), dtype)
            g = rounded(rng.standard_normal((bags, dim)).astype(np.float32), dtype)
            w = rng.standard_normal(ids.shape).astype(np.float32) if layout == "last" else None
            state = state_of(rng, rule, rows, dim)
            want, want_state = expected(
                table, state, rule, reference.update_bags, (g, ids, offsets, w, None), (mode, 2, last)
            )
            on_gpu = gpu.put(table, dtype)
            states = {k: gpu.put(v) for k, v in state.items()}
            arrays = [gpu.put(g, dtype), *map(gpu.put, (ids, offsets, w))]
            with gpu.no_sync():
                lutra.gather.update_bags(
                    on_gpu, *arrays, optimizer=rule, state=states or None, mode=mode, padding_idx=2,
                    include_last_offset=last, **OPTIONS,
                )  # fmt: skip
            close(gpu.get(on_gpu), want, dtype, 4)
            for name, a in states.items():
                close(gpu.get(a), want_state[name], "float32", 10)


@pytest.mark.parametrize("rule", RULES)
def test_update_rows_named_twice_and_in_any_order(gpu, rule):
    rng = np.random.default_rng(2)
    for rows, n, dim in ((7, 1, 4), (50, 33, 16), (50, 700, 5), (3, 9000, 8)):
        table = rng.standard_normal((rows, dim)).astype(np.float32)
        ids, g = rng.integers(0, rows, n), rng.standard_normal((n, dim)).astype(np.float32)
        state = state_of(rng, rule, rows, dim)
        want, want_state = expected(table, state, rule, reference.update_rows, (ids, g))
        on_gpu, states = gpu.put(table), {k: gpu.put(v) for k, v in state.items()}
        lutra.gather.update_rows(on_gpu, gpu.put(ids), gpu.put(g), rule, states or None, **OPTIONS)
        close(gpu.get(on_gpu), want, factor=50)
        for name, a in states.items():
            close(gpu.get(a), want_state[name], factor=50)


@pytest.mark.parametrize("dim", [6, 64])
def test_stochastic_rounding(gpu_torch, dim):
    """The reference's random bits; where float32 sums differ in the last bit, one unit of bfloat16."""
    rng = np.random.default_rng(3)
    table = rounded(rng.standard_normal((300, dim)).astype(np.float32), "bfloat16")
    ids, g = rng.permutation(300)[:200], rng.standard_normal((200, dim)).astype(np.float32)
    want = table.copy()
    reference.update_rows(want, ids, g, None, None, "sgd", (0.01, 1.0, 0.0, 0.0, 0.0, 1.0), 77)
    t = gpu_torch.put(table, "bfloat16")
    lutra.gather.update_rows(t, gpu_torch.put(ids), gpu_torch.put(g), lr=0.01, seed=77)
    got = gpu_torch.get(t)
    close(got, want, "bfloat16")
    assert (got == want).mean() > 0.98


def test_ids_outside_the_table_are_left_out(gpu):
    table = np.ones((4, 8), np.float32)
    on_gpu = gpu.put(table)
    lutra.gather.update_bags(
        on_gpu, gpu.put(np.ones((2, 8), np.float32)), gpu.put(np.array([[0, 4], [-1, 2]])), lr=0.5
    )
    np.testing.assert_array_equal(gpu.get(on_gpu)[:, 0], [0.5, 1, 0.5, 1])


def test_maxima(gpu_torch):
    rng = np.random.default_rng(4)
    table = rng.standard_normal((30, 12)).astype(np.float32)
    ids, g = rng.integers(0, 30, (9, 6)), rng.standard_normal((9, 12)).astype(np.float32)
    t = gpu_torch.put(table)
    lutra.gather.update_bags(t, gpu_torch.put(g), gpu_torch.put(ids), lr=0.5, mode="max")
    host = table.copy()
    lutra.gather.update_bags(host, g, ids, lr=0.5, mode="max")
    close(gpu_torch.get(t), host)


def test_the_same_bits_every_time(gpu):
    rng = np.random.default_rng(5)
    ids = gpu.put(rng.zipf(1.2, (2048, 20)) % 1000)
    g = gpu.put(rng.standard_normal((2048, 64)).astype(np.float32))
    results = []
    for _ in range(3):
        t, s = gpu.put(np.ones((1000, 64), np.float32)), gpu.put(np.zeros(1000, np.float32))
        lutra.gather.update_bags(t, g, ids, lr=0.1, optimizer="rowwise_adagrad", state={"sum": s})
        results.append((gpu.get(t), gpu.get(s)))
    for t, s in results[1:]:
        same_bits(t, results[0][0])
        same_bits(s, results[0][1])


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RowwiseAdagrad", "Adam"])
def test_attached_layers_learn_as_those_on_the_cpu(gpu_torch, name):
    torch = gpu_torch.torch
    import lutra.nn
    import lutra.optim

    make = getattr(lutra.optim, name)
    rng = np.random.default_rng(6)
    start = torch.from_numpy(rng.standard_normal((60, 16)).astype(np.float32))
    weights = []
    for device in ("cpu", "cuda"):
        layer = lutra.nn.EmbeddingBag.from_pretrained(start.clone().to(device), freeze=False, mode="mean")
        optimizer = make(layer.parameters(), lr=0.05)
        optimizer.attach(layer)
        for step in range(3):
            ids = torch.from_numpy(np.random.default_rng(step).integers(0, 60, (25, 6))).to(device)
            layer(ids).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight.detach().cpu().numpy())
    close(weights[1], weights[0], factor=20)


@pytest.mark.sanitize
def test_small_update(gpu_torch):
    ids = gpu_torch.put(np.random.default_rng(0).integers(0, 20, (40, 7)))
    g = gpu_torch.put(np.ones((40, 20), np.float32))
    t, s = gpu_torch.put(np.zeros((20, 20), np.float32)), gpu_torch.put(np.zeros(20, np.float32))
    lutra.gather.update_bags(t, g, ids, lr=1.0, optimizer="rowwise_adagrad", state={"sum": s})
    count = np.bincount(gpu_torch.get(ids).reshape(-1), minlength=20)
    close(gpu_torch.get(s), (count**2).astype(np.float32))
