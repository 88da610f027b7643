"""lutra.nn.TopKSAE against the same in torch's own ops; feature families of known trees."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

import lutra

torch = pytest.importorskip("torch")

import lutra.nn  # noqa: E402
import lutra.optim  # noqa: E402
from lutra import _backend  # noqa: E402
from lutra.nn._sae_ops import make_codes  # noqa: E402

F = torch.nn.functional


def sae(n=300, d=24, k=5, *, seed=0, **options):
    torch.manual_seed(seed)
    layer = lutra.nn.TopKSAE(d, n, k, **options)
    with torch.no_grad():
        layer.bias.normal_(std=0.3)
        layer.decoder_bias.normal_(std=0.3)
        layer.weight.add_(torch.randn_like(layer.weight), alpha=0.05)
    return layer


def dense(layer, x):
    """Codes and reconstruction with the dense activations."""
    flat = x.reshape(-1, x.shape[-1])
    activations = (flat - layer.decoder_bias) @ layer.weight.T + layer.bias
    values, ids = activations.topk(layer.k, 1)
    values = values.relu()
    out = torch.einsum("tk,tkd->td", values, F.embedding(ids, layer.decoder)) + layer.decoder_bias
    return values, ids, out.reshape(x.shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("inputs", "n", "k"), [(1, 1, 1), (3, 33, 7), (200, 300, 5), (130, 97, 97), (5, 700, 256)]
)
def test_equals_dense_activations(simd_level, inputs, n, k, training):
    layer = sae(n, k=k).train(training)
    x = torch.randn(inputs, 24)
    values, ids, out = dense(layer, x)
    for _ in range(2):  # the second time with what evaluation keeps
        with torch.no_grad():
            codes = layer.encode(x)
            got = layer.decode(codes)
        torch.testing.assert_close(codes.values, values, rtol=1e-4, atol=1e-5)
        assert (codes.ids == ids).float().mean() > 0.999
        torch.testing.assert_close(got, out, rtol=1e-4, atol=1e-5)


def test_ties_and_too_few_positive(simd_level):
    layer = lutra.nn.TopKSAE(4, 6, 4).eval()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([-1.0, 2, -2, 2, -1, 1]))
        codes = layer.encode(torch.zeros(2, 4))
    assert codes.ids.tolist() == [[1, 3, 5, 0]] * 2
    assert codes.values.tolist() == [[2, 2, 1, 0]] * 2


@pytest.mark.parametrize("training", [True, False])
def test_codes_with_zero_latents_zero_inputs_and_ties(simd_level, training):
    layer = lutra.nn.TopKSAE(8, 400, 3).train(training)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape))
        layer.weight[::2] = 0
        layer.bias.copy_(torch.randint(-3, 4, layer.bias.shape))
        x = torch.randint(-1, 2, (90, 8)).float()
        x[::4] = 0
        made = make_codes(len(x), layer.weight, layer.bias, 3)
        assert (made is None) == (_backend.core is None)  # the screen is compiled
        activations = (x @ layer.weight.T + layer.bias).numpy()
        want = np.argsort(-activations, axis=1, kind="stable")[:, :3]
        for _ in range(2):
            np.testing.assert_array_equal(layer.encode(x).ids, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [3, 60])
def test_half_precision_weights(simd_level, dtype, inputs):
    layer = sae().to(dtype)
    x = torch.randn(inputs, 24)
    with torch.no_grad():
        for training in (True, False):
            codes = layer.train(training).encode(x)
            want = dense(copy.deepcopy(layer).float(), x)[0]
            torch.testing.assert_close(codes.values.float(), want, rtol=1e-2, atol=1e-2)


def test_biases_beyond_the_screen(simd_level):
    layer = sae().eval()
    x = torch.randn(200, 24)
    with torch.no_grad():
        layer.bias[7] = 1e8
        assert (layer.encode(x).ids[:, 0] == 7).all() and layer._screen is None
        layer.bias[7] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            layer.encode(x)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_equal_those_of_dense_activations(simd_level, sparse):
    layer = sae(sparse=sparse)
    x, target = torch.randn(150, 24, requires_grad=True), torch.randn(150, 24)
    (layer(x)[0] - target).square().sum().backward()
    ours = {n: p.grad.to_dense() if p.grad.is_sparse else p.grad for n, p in layer.named_parameters()}
    assert layer.weight.grad.is_sparse == layer.decoder.grad.is_sparse == sparse
    ours["x"], x.grad = x.grad, None
    layer.zero_grad()
    (dense(layer, x)[2] - target).square().sum().backward()
    theirs = {**{n: p.grad for n, p in layer.named_parameters()}, "x": x.grad}
    for key, got in ours.items():
        torch.testing.assert_close(got, theirs[key], rtol=1e-3, atol=2e-3, msg=key)


def test_gradcheck():
    layer = sae(20, 6, 3).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def function(x, *parameters):
        names = [n for n, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))[0]

    layer.eval()
    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


def test_linear_topk_opcheck():
    x, weight, bias = torch.randn(3, 5), torch.randn(9, 5), torch.randn(9)
    torch.library.opcheck(torch.ops.lutra.linear_topk, (x, weight, bias, 4))


def test_what_evaluation_keeps_follows_the_encoder():
    layer = sae().eval()
    x = torch.randn(200, 24)
    with torch.no_grad():
        before = layer.encode(x).values
        assert (layer._screen is None) == (_backend.core is None)  # the screen is compiled
        layer.weight.mul_(2)
        after = layer.encode(x)
        torch.testing.assert_close(after.values, dense(layer, x)[0], rtol=1e-4, atol=1e-5)
        assert not torch.equal(before, after.values)
        layer.weight.data.mul_(0.5)  # an update that counts no version
        layer.train().eval()
        torch.testing.assert_close(layer.encode(x).values, dense(layer, x)[0], rtol=1e-4, atol=1e-5)


def test_manners():
    layer = sae().eval()
    x = torch.randn(2, 3, 24)
    want, codes = layer(x)
    assert codes.ids.shape == (2, 3, 5) and "num_latents=300" in repr(layer)
    other = sae(seed=1).eval()
    other.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for copied in (other, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x)[0], want)
    assert layer(x[:0])[0].shape == (0, 3, 24) and layer(x[0, 0])[0].shape == (24,)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)
        out = half(x.to(dtype))[0]
        torch.testing.assert_close(out.float(), want, rtol=0.1, atol=0.15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)[0].sum().backward()
    assert lutra.nn.TopKSAE(24, 50, 5, device="meta")(x.to("meta"))[0].shape == x.shape


def test_compile_without_graph_breaks():
    layer = sae()
    x = torch.randn(6, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    compiled(x)[0].sum().backward()
    assert layer.decoder.grad.abs().sum() > 0


def test_uses_and_the_auxiliary_loss():
    layer = sae(dead_after=5, aux_k=8)
    x = torch.randn(4, 24)
    out = layer.loss(x)
    assert out.auxiliary == 0 and len(layer.dead) == 0
    used = torch.unique(out.codes.ids[out.codes.values > 0])
    assert (layer.unused[used] == 0).all() and (layer.unused == 4).sum() == 300 - len(used)
    layer.zero_grad()
    out = layer.loss(x)
    dead = layer.dead
    assert set(dead.tolist()) == set(range(300)) - set(used.tolist())
    left = (x - out.reconstruction).detach()
    some = layer
    activations = ((x - some.decoder_bias) @ some.weight.T + some.bias)[:, dead]
    values, at = activations.topk(8, 1)
    missed = left - torch.einsum("tk,tkd->td", values.relu(), some.decoder[dead[at]])
    torch.testing.assert_close(out.auxiliary, missed.square().sum() / left.square().sum())
    variance = (x - x.mean(0)).square().sum()
    torch.testing.assert_close(out.fvu, left.square().sum() / variance)
    torch.testing.assert_close(out.loss, out.fvu + out.auxiliary / 32)
    out.loss.backward()
    assert (layer.decoder.grad[dead].abs().sum(1) > 0).any()
    layer.eval()
    before = layer.unused.clone()
    layer(x)
    assert torch.equal(before, layer.unused)


def test_decoder_rows_of_norm_one():
    layer = sae()
    with torch.no_grad():
        layer.decoder.mul_(3)
    layer.normalize_(torch.tensor([2, 2, 7]))
    norms = layer.decoder.norm(dim=1)
    torch.testing.assert_close(norms[[2, 7]], torch.ones(2))
    assert (norms[3:7] > 2).all()
    torch.testing.assert_close(layer.normalize_().decoder.norm(dim=1), torch.ones(300))


@pytest.mark.parametrize("sparse", [False, True])
def test_it_learns_a_dictionary(sparse):
    torch.manual_seed(3)
    atoms = F.normalize(torch.randn(48, 16), dim=1)
    layer = lutra.nn.TopKSAE(16, 64, 3, sparse=sparse, dead_after=2000)
    make = lutra.optim.Adam if sparse else torch.optim.Adam
    optimizer = make(layer.parameters(), lr=3e-3)
    first = None
    for _ in range(400):
        pick = torch.rand(128, 48).topk(3, 1).indices
        x = (atoms[pick] * (1 + torch.rand(128, 3, 1))).sum(1)
        optimizer.zero_grad()
        out = layer.loss(x)
        first = first or out.fvu.item()
        out.loss.backward()
        optimizer.step()
        layer.normalize_(out.codes.ids)
    assert out.fvu < 0.3 < first


def test_steering():
    layer = sae().eval()
    x = torch.randn(3, 24)
    with torch.no_grad():
        codes = layer.encode(x)
        latent, value = int(codes.ids[0, 0]), float(codes.values[0, 0])
        same = layer.steer(x[:1], {latent: value})
        torch.testing.assert_close(same, x[:1])
        without = layer.steer(x[:1], {latent: 0})
        torch.testing.assert_close(without, x[:1] - value * layer.decoder[latent])
        other = next(i for i in range(300) if i not in codes.ids)
        more = layer.steer(x, {other: 2.5})
        torch.testing.assert_close(more, x + 2.5 * layer.decoder[other])
        pure = layer.steer(x, {other: 2.5}, keep_error=False)
        torch.testing.assert_close(pure, layer.decode(codes) + 2.5 * layer.decoder[other])
        unit = layer.steer(x, {other: 50.0}, normalize=True)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(3))
    index = lutra.index.Flat(24, "ip")
    index.add(F.normalize(layer.decoder.detach()).numpy())
    assert (index.search(unit.numpy(), 1).ids == other).all()


# ---------------------------------------------------------------- families
def tree_codes():
    """Samples of two trees: 0 over 1 and 2, 1 over 3; 10 over 11, 12; and noise."""
    rng = np.random.default_rng(0)
    paths = [[0, 1, 3], [0, 1, 3], [0, 1], [0, 2], [0], [10, 11], [10, 12], [10]]
    ids = np.zeros((800, 4), np.int64)
    values = np.zeros((800, 4), np.float32)
    for row in range(800):
        path = paths[row % len(paths)]
        ids[row] = 20 + rng.choice(10, 4, replace=False)
        ids[row, : len(path)] = path
        values[row, : len(path)] = 1
        values[row, 3] = rng.random() < 0.2
    return values, ids


def families(**options):
    values, ids = (torch.from_numpy(a) for a in tree_codes())
    return lutra.nn.feature_families(values, ids, 30, max_density=0.7, **{"min_share": 0.9, **options})


def test_families_are_the_trees():
    found = families()
    first, second = found[:2]
    assert first.parent == 0 and set(first.children) == {1, 2, 3}
    assert dict(zip(first.children.tolist(), first.depth.tolist())) == {1: 1, 2: 1, 3: 2}
    assert second.parent == 10 and set(second.children) == {11, 12}
    assert first.strength == 1 and len(found) == 2
    with_pairs = families(min_size=2)
    assert (1, [3]) in [(f.parent, f.children.tolist()) for f in with_pairs]  # found once 0 is out


def test_co_activation_counts_samples():
    values, ids = tree_codes()
    together = lutra.nn.co_activation(values, ids, 30).toarray()
    active = np.zeros((800, 30), np.int64)
    for row in range(800):
        active[row, ids[row][values[row] > 0]] = 1
    np.testing.assert_array_equal(together, active.T @ active)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lutra.nn.TopKSAE(8, 4, 5), ValueError, "k is 5; it must be at most num_latents = 4"),
        (lambda: lutra.nn.TopKSAE(0, 4, 1), ValueError, "in_features must be >= 1"),
        (lambda: sae()(torch.zeros(2, 9)), ValueError, "last axis must be in_features = 24"),
        (lambda: sae()(torch.full((2, 24), float("nan"))), ValueError, "NaN"),
        (lambda: sae().decode((torch.ones(2, 3), torch.zeros(2, 4))), ValueError, "they must be equal"),
        (lambda: sae().steer(torch.zeros(1, 24), {300: 1.0}), ValueError, r"a latent must be in \[0, 299\]"),
        (lambda: sae().steer(torch.zeros(1, 24), 3), TypeError, "latents must be a mapping"),
        (lambda: lutra.nn.co_activation(np.ones((2, 2)), np.array([[0, 9]] * 2), 5), IndexError, r"\[0, 5\)"),
        (lambda: lutra.nn.co_activation(np.ones((2, 2)), np.ones((2, 3)), 5), ValueError, "samples, k"),
        (lambda: families(min_share=2), ValueError, r"min_share must be in \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
