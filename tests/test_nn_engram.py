"""lutra.address.xor_ngrams and lutra.nn.Engram."""

import copy
import pickle

import numpy as np
import pytest

import lutra
from lutra.address import xor_ngrams
from lutra.reference.ngrams import xor_ngrams as reference

torch = pytest.importorskip("torch")

from lutra.address._xor_ngrams import composition  # noqa: E402
from lutra.nn import Engram  # noqa: E402
from lutra.nn._engram import _is_prime, _primes  # noqa: E402

rng = np.random.default_rng(0)
MULTIPLIERS, MODULI = [(1 << 62) + 12345, 3, (1 << 61) + 7, 99], [7, 11, 13, 17, 1_000_003, 1 << 40]


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (0, 3), (1, 1), (3, 17), (2, 3, 65), (1, 5000)])
def test_against_reference(shape, simd_level, threads):
    for dtype in (np.int32, np.int64):
        tokens = rng.integers(0, 1 << 31, shape).astype(dtype)
        for orders in ([1, 2], [2, 3], [2, 4], [3]):
            got = xor_ngrams(tokens, MULTIPLIERS, MODULI, orders, pad=5)
            assert got.dtype == np.int64 and got.shape == (*shape, 6)
            assert np.array_equal(got, reference(tokens, MULTIPLIERS, MODULI, orders, 5))
    part = rng.integers(0, 100, (6, 40))[::2, ::3]
    assert np.array_equal(xor_ngrams(part, MULTIPLIERS, MODULI), reference(part, MULTIPLIERS, MODULI, (2, 3)))


def test_torch():
    tokens = torch.randint(0, 1000, (3, 20))
    small = [(1 << 52) + 1, 3, (1 << 51) + 7]
    got = xor_ngrams(tokens, small, MODULI)
    assert np.array_equal(got, reference(tokens.numpy(), small, MODULI, (2, 3)))
    assert torch.equal(composition(tokens, small, MODULI, [2, 3], 0), got)
    torch.library.opcheck(
        torch.ops.lutra.xor_ngrams, (tokens, small, MODULI, [2, 3], 0),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_primes():
    sieve = [n for n in range(2, 3000) if all(n % p for p in range(2, int(n**0.5) + 1))]
    assert [n for n in range(3000) if _is_prime(n)] == sieve
    assert _primes(100, 3) == (101, 103, 107) and _is_prime((1 << 31) - 1) and not _is_prime(3215031751)


def by_hand(layer, hidden, tokens):
    """The formula, a token at a time."""
    rows = layer.memory.weight if isinstance(layer.memory, lutra.nn.Embedding) else layer.memory.table
    ids = reference(tokens.numpy(), layer.multipliers, layer.moduli, layer.orders, layer.pad)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    out = torch.zeros_like(hidden)
    for b in range(tokens.shape[0]):
        values = []
        for i in range(tokens.shape[1]):
            e = torch.cat([rows[j] for j in ids[b, i]])
            key, value = layer.key.weight @ e, layer.value.weight @ e
            h = norm(hidden[b, i], layer.norm_hidden.weight)
            a = (h * norm(key, layer.norm_key.weight)).sum() / layer.d**0.5
            if layer.gate == "root":
                a = torch.sign(a) * max(abs(a), torch.tensor(1e-6)) ** 0.5
            values.append(torch.sigmoid(a) * value)
        for i, v in enumerate(values):
            out[b, i] = v
            if layer.conv is not None:
                total = torch.zeros_like(v)
                for k in range(layer.kernel_size):
                    past = i - (layer.kernel_size - 1 - k) * layer.orders[-1]
                    if past >= 0:
                        total = total + layer.conv.weight[:, 0, k] * norm(
                            values[past], layer.norm_value.weight
                        )
                out[b, i] = v + torch.nn.functional.silu(total)
    return out


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize(("kernel_size", "gate"), [(0, "sigmoid"), (3, "root"), (3, "sigmoid")])
def test_forward_and_gradient(host, kernel_size, gate):
    torch.manual_seed(0)
    layer = Engram(
        12, 50, (2, 3), 2, rows=40, memory_dim=8, kernel_size=kernel_size, gate=gate, host=host, pad=4
    )
    if kernel_size:
        with torch.no_grad():
            layer.conv.weight.normal_()
    hidden, tokens = torch.randn(2, 9, 12, requires_grad=True), torch.randint(0, 50, (2, 9))
    out, want = layer(hidden, tokens), by_hand(layer, hidden, tokens)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
    table = layer.memory.table if host else layer.memory.weight
    inputs = [hidden, table, layer.key.weight, layer.value.weight]
    weight = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * weight).sum(), inputs), torch.autograd.grad((want * weight).sum(), inputs)
    ):
        torch.testing.assert_close(a.to_dense() if a.is_sparse else a, b, atol=1e-4, rtol=1e-3)
    layer(hidden, tokens).sum().backward()
    assert table.grad.is_sparse and set(table.grad.coalesce().indices()[0].tolist()) == set(
        layer.ids(tokens).flatten().tolist()
    )


def test_manners():
    layer = Engram(16, 30, heads=4, rows=50)
    hidden, tokens = torch.randn(2, 9, 16), torch.randint(0, 30, (2, 9))
    want = layer(hidden, tokens)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(hidden, tokens), want)
    fresh = Engram(16, 30, heads=4, rows=50)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(hidden, tokens), want)
    assert len(set(layer.moduli)) == 8 and all(m % 2 and m * 30 < 1 << 63 for m in layer.multipliers)
    assert Engram(16, 30, heads=4, seed=1).multipliers != layer.multipliers
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(hidden, tokens), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(layer(hidden, tokens)).all()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    torch.testing.assert_close(half(hidden.bfloat16(), tokens).float(), want, atol=0.05, rtol=0.1)
    # causal: later tokens change nothing before
    later = tokens.clone()
    later[:, 5:] = 0
    assert torch.equal(layer(hidden, later)[:, :5], want[:, :5])


def test_learns_n_grams():
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (32, 40))
    target = (tokens + 3 * tokens.roll(1, 1) + 5 * tokens.roll(2, 1)) % 4
    layer, head = Engram(16, 20, heads=4, rows=20_011), torch.nn.Linear(16, 4)
    hidden = torch.ones(32, 40, 16)
    dense = [p for n, p in [*layer.named_parameters(), *head.named_parameters()] if n != "memory.weight"]
    optimizers = torch.optim.Adam(dense, 0.02), torch.optim.SparseAdam([layer.memory.weight], 0.02)
    for _ in range(40):
        scores = head(layer(hidden, tokens))[:, 2:].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(scores, target[:, 2:].flatten())
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o in optimizers:
            o.step()
    assert loss < 0.2


def test_bad_input():
    with pytest.raises(IndexError, match=r"tokens\[0, 1\] is -1"):
        xor_ngrams(np.array([[0, -1]]), [1, 3], [5], [2])
    for options, problem in (
        (([1], [5], [2]), "multipliers are 1"), (([1, 1], [5], [2, 2]), "orders must be increasing"),
        (([1, 1], [0], [2]), "moduli must be 1 at least"), (([1, 1, 1], [5], [2, 3]), "moduli are 1"),
        (([1, -1], [5], [2]), "multipliers must lie"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            xor_ngrams(np.array([1]), *options)
    with pytest.raises(ValueError, match="memory_dim is 10"):
        Engram(10, 5)
    with pytest.raises(ValueError, match="orders must be increasing"):
        Engram(16, 5, (3, 2))
    with pytest.raises(ValueError, match="gate must be 'sigmoid' or 'root'"):
        Engram(16, 5, gate="softmax")
    with pytest.raises(ValueError, match="hidden must be"):
        Engram(16, 5)(torch.ones(2, 3, 16), torch.ones(2, 4, dtype=torch.int64))
