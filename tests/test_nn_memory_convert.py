"""MemoryLinear.from_linear: the hash, the regression and the errors that it reports; LookupFFN."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = pytest.importorskip("lutra.nn")

from lutra.nn import _memory_convert as convert  # noqa: E402
from lutra.nn._hashes import tree_codes  # noqa: E402
from lutra.nn._split_trees import best_splits, learn_tree  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def linear(inputs, outputs, rank=None):
    layer = torch.nn.Linear(inputs, outputs)
    torch.nn.init.normal_(layer.weight, std=inputs**-0.5)
    torch.nn.init.normal_(layer.bias)
    return layer


def relative_error(layer, dense, x, calibration):
    with torch.no_grad():
        y = dense(x)
        return ((layer(x) - y).square().sum() / (y - dense(calibration).mean(0)).square().sum()).item()


def test_best_splits_by_brute_force():
    values = torch.randint(0, 6, (40,)).float()
    y, groups = torch.randn(40, 2), torch.randint(0, 3, (40,))
    groups[groups == 1] = 2  # an empty group
    _, thresholds = best_splits(values, y, groups, 3)

    def left_over(part, limit):
        v, z = values[part], y[part]
        sides = [z[v < limit], z[v >= limit]]
        return sum(float((s - s.mean(0)).square().sum()) for s in sides if len(s))

    for g in (0, 2):
        part = groups == g
        best = min(left_over(part, limit) for limit in (-1, 0.5, 1.5, 2.5, 3.5, 4.5))
        assert left_over(part, thresholds[g]) == pytest.approx(best, rel=1e-5)
    assert thresholds[1] == float("inf")


def test_a_tree_finds_the_clusters():
    centers = torch.tensor([[0.0, 0, 5], [0, 4, 5], [20, 0, 5], [20, 9, 5]])
    which = torch.randint(0, 4, (200,))
    x = centers[which] + 0.1 * torch.randn(200, 3)
    dims, thresholds, leaves = learn_tree(x, torch.eye(3), 2)
    assert sorted(dims.tolist()) == [0, 1]
    for leaf in range(4):
        assert len(set(which[leaves == leaf].tolist())) == 1
    codes, weights = tree_codes(x, dims[None], thresholds[None])
    assert torch.equal(codes[:, 0].long(), leaves) and (weights == 1).all()
    dims, thresholds, leaves = learn_tree(torch.zeros(5, 2), torch.eye(2), 3)  # nothing to split
    assert len(set(leaves.tolist())) == 1


def test_lloyd_on_a_normal_distribution():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((40000, 2))).float()
    for levels, want in ((2, [0.0]), (3, [-0.612, 0.612]), (4, [-0.982, 0.0, 0.982])):
        got = convert.lloyd(x, levels)
        np.testing.assert_allclose(got.numpy(), np.tile(want, (2, 1)), atol=0.05)


def test_regression_equals_the_closed_form():
    codes = torch.randint(0, 4, (50, 3), dtype=torch.int32)
    weights, y = torch.rand(50, 3) + 0.5, torch.randn(50, 5)
    design = (torch.nn.functional.one_hot(codes.long(), 4) * weights.unsqueeze(2)).reshape(50, 12)
    want = torch.linalg.solve(design.t() @ design + 0.3 * torch.eye(12), design.t() @ y).view(3, 4, 5)
    got = convert.regress((3, 4, 5), codes, weights, y, 0.3, 40)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method, most", [("rotation", 0.42), ("tree", 0.55)])
def test_error_on_held_back_inputs(method, most):
    dense, x, held = linear(32, 24), torch.randn(2000, 32) + 1, torch.randn(500, 32) + 1
    layer = nn.MemoryLinear.from_linear(dense, x, method, held_back=held)
    report = layer.conversion_error
    assert report["held_back"] == pytest.approx(relative_error(layer, dense, held, x), rel=1e-3)
    assert report["calibration"] == pytest.approx(relative_error(layer, dense, x, x), rel=1e-3)
    assert report["rows"] == 2000 and report["held_back_rows"] == 500
    assert 0.05 < report["held_back"] < most
    more = nn.MemoryLinear.from_linear(dense, x, method, num_tables=8, held_back=held)
    assert more.conversion_error["held_back"] < 0.7 * report["held_back"]
    # Inputs of few directions, as activations are: a small part remains.
    narrow = torch.randn(2000, 4) @ torch.randn(4, 32)
    few = nn.MemoryLinear.from_linear(dense, narrow, method)
    assert few.conversion_error["held_back"] < 0.5 * report["held_back"]


@pytest.mark.parametrize("score", ["none", "prob", "scaled"])
def test_several_layers_of_one_input(score):
    parts = [linear(16, n) for n in (8, 12)]
    x = torch.randn(1500, 16)
    layer = nn.MemoryLinear.from_linear(parts, x.view(3, 500, 16), bits=4, score=score)
    assert layer.score == score and layer.out_features == (8, 12)
    out = layer(x)
    for a, dense in zip(out, parts):
        y = dense(x)
        assert ((a - y).square().sum() / (y - y.mean(0)).square().sum()).item() < 0.5


def test_types_copies_and_state():
    x = torch.randn(800, 16)
    for method in ("rotation", "tree"):
        dense = linear(16, 8).to(torch.bfloat16)
        layer = nn.MemoryLinear.from_linear(dense, x, method, bits=4)
        assert layer.tables.dtype == torch.bfloat16 and layer(x.bfloat16()).dtype == torch.bfloat16
        layer = nn.MemoryLinear.from_linear(linear(16, 8), x, method, bits=4)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        options = {"hash": "tree", "num_tables": 4} if method == "tree" else {"projection": "dense"}
        fresh = nn.MemoryLinear(16, 8, 4, score="none", **options)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), layer(x))
        again = nn.MemoryLinear.from_linear(linear(16, 8), x, method, bits=4)
        assert torch.isfinite(again.tables).all()
        small = copy.deepcopy(layer).quantize_()
        assert (small(x) - layer(x)).norm() < 0.02 * layer(x).norm()


def test_bad_arguments_are_named():
    dense, x = linear(16, 8), torch.randn(50, 16)
    call = nn.MemoryLinear.from_linear
    with pytest.raises(ValueError, match="method must be 'rotation' or 'tree'; got 'lsh'"):
        call(dense, x, "lsh")
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear or several, got Conv1d"):
        call([torch.nn.Conv1d(1, 1, 1)], x)
    with pytest.raises(ValueError, match="linear is empty"):
        call([], x)
    with pytest.raises(ValueError, match=r"in_features \[8, 16\]"):
        call([dense, linear(8, 8)], x)
    with pytest.raises(ValueError, match=r"calibration_inputs has shape \(50, 12\)"):
        call(dense, x[:, :12])
    with pytest.raises(TypeError, match="calibration_inputs must be a floating-point tensor"):
        call(dense, x.long())
    x[7, 3] = float("nan")
    with pytest.raises(ValueError, match="calibration_inputs row 7 is not finite"):
        call(dense, x)
    with pytest.raises(ValueError, match="held_back must be"):
        call(dense, torch.randn(50, 16), held_back=1.5)
    with pytest.raises(ValueError, match="ridge must be positive"):
        call(dense, torch.randn(50, 16), ridge=0.0)
    with pytest.raises(ValueError, match="span 2 directions, enough for 16"):
        call(dense, torch.randn(50, 2) @ torch.randn(2, 16), bits=4, num_tables=5)


def test_real_activations(data_folder):
    """Rows of a real embedding table through a random map: figures of docs/memoryformer.md, coarsely."""
    table = np.load(data_folder / "minilm_token_table_30522x384_f16.npy", mmap_mode="r")[:6000]
    x = torch.from_numpy(table.astype(np.float32))
    layer = nn.MemoryLinear.from_linear(linear(384, 32), x, ridge=float("inf"))
    assert layer.conversion_error["held_back"] < 0.3


# ---------------------------------------------------------------- LookupFFN
@pytest.mark.parametrize("projection", ["hadamard", "dense"])
@pytest.mark.parametrize("norm", [True, False])
def test_lookup_ffn(projection, norm):
    layer = nn.LookupFFN(24, 10, num_tables=7, bits=5, projection=projection, norm=norm)
    x = torch.randn(2, 3, 24, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 3, 10) and layer.memory.tables.shape == (7, 32, 10)
    z = layer.memory.projection(layer.norm(x) if norm else x).unflatten(-1, (7, 5))
    codes = ((z >= 0).long() << torch.arange(5)).sum(-1)
    weights = torch.sigmoid(2 * z.abs()).prod(-1) * z.abs().sum(-1)
    rows = layer.memory.tables[torch.arange(7), codes]
    torch.testing.assert_close(y, (weights.unsqueeze(-1) * rows).sum(-2) + layer.memory.bias)
    y.sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in layer.parameters())
    twin = nn.LookupFFN(24, 10, num_tables=7, bits=5, projection=projection, norm=norm)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), y)
    assert nn.LookupFFN(20, bits=8).memory.num_tables == 3 and nn.LookupFFN(20)(torch.zeros(20)).shape == (
        20,
    )


def test_lookup_ffn_learns_what_a_linear_layer_cannot():
    x = torch.randn(256, 12)
    y = (x[:, :1] * x[:, 1:2]).sign()
    layer = nn.LookupFFN(12, 1, num_tables=24, bits=6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    with pytest.raises(ValueError, match="projection must be 'hadamard' or 'dense'"):
        nn.LookupFFN(12, projection=None)
