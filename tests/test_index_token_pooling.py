"""pool_tokens and prune_tokens: smaller documents."""

import builtins
import itertools

import numpy as np
import pytest

from lutra.index import pool_tokens, prune_tokens

LENGTHS = (5, 0, 1, 12, 2, 19)
PTR = np.cumsum([0, *LENGTHS])


def tokens_of(d=6, seed=0):
    x = np.random.default_rng(seed).standard_normal((PTR[-1], d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def split(tokens, ptr):
    return [tokens[a:b] for a, b in itertools.pairwise(ptr)]


def ward(x, count):
    """Ward's method as it is defined: merge the two clusters whose union adds least to the squared error."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    clusters = [[i] for i in range(len(x))]

    def cost(members):
        return np.square(x[members] - x[members].mean(0)).sum()

    while len(clusters) > count:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
        a, b = min(
            pairs,
            key=lambda p: cost(clusters[p[0]] + clusters[p[1]]) - cost(clusters[p[0]]) - cost(clusters[p[1]]),
        )
        clusters[b] += clusters.pop(a)
    return sorted(sorted(members) for members in clusters)


@pytest.mark.parametrize("factor", [1, 1.5, 2, 3, 6, 100])
@pytest.mark.parametrize("protect", [0, 1, 3])
def test_pooling(factor, protect):
    pytest.importorskip("scipy")
    x = tokens_of().astype(np.float64) * np.linspace(0.5, 2, PTR[-1])[:, None]
    for normalize in (False, True):
        pooled, ptr = pool_tokens(x, PTR, factor, protect=protect, normalize=normalize)
        assert pooled.dtype == np.float64 and ptr.dtype == np.int64
        for before, after in zip(split(x, PTR), split(pooled, ptr)):
            fixed = min(protect, len(before))
            count = int(np.ceil((len(before) - fixed) / factor))
            assert len(after) == fixed + count
            expected = [before[i] for i in range(fixed)]
            for members in ward(before[fixed:], count) if len(before) > fixed else []:
                mean = before[fixed:][members].mean(0)
                norm = np.linalg.norm(before[fixed:][members], axis=1).mean()
                expected.append(mean * norm / np.linalg.norm(mean) if normalize else mean)
            np.testing.assert_allclose(after, np.array(expected).reshape(-1, 6), rtol=2e-5, atol=2e-6)


def test_unit_vectors_stay_unit_vectors():
    pytest.importorskip("scipy")
    pooled, _ = pool_tokens(tokens_of(), PTR, 3)
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, rtol=1e-5)
    plain, _ = pool_tokens(tokens_of(), PTR, 3, normalize=False)
    assert np.linalg.norm(plain, axis=1).min() < 0.9


def test_equal_tokens_and_zeros():
    pytest.importorskip("scipy")
    x = np.repeat(np.eye(4, dtype=np.float32)[[0, 1]], 4, 0)
    pooled, ptr = pool_tokens(x, [0, 8], 4)
    np.testing.assert_array_equal(pooled, np.eye(4)[[0, 1]])
    pooled, ptr = pool_tokens(np.zeros((6, 4), np.float32), [0, 6], 2)
    assert pooled.shape == (3, 4) and not pooled.any() and ptr.tolist() == [0, 3]
    pooled, ptr = pool_tokens(np.empty((0, 4), np.float32), [0, 0], 2)
    assert pooled.shape == (0, 4) and ptr.tolist() == [0, 0]


def test_parts_change_nothing(monkeypatch):
    pytest.importorskip("scipy")
    x = tokens_of()
    whole, ptr = pool_tokens(x, PTR, 2, protect=1)
    import lutra.index._pool_tokens as module

    monkeypatch.setattr(module, "_PART", 7)
    parts, again = pool_tokens(x, PTR, 2, protect=1)
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(again, ptr)


def test_scipy_is_asked_for(monkeypatch):
    original = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("scipy"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install scipy"):
        pool_tokens(tokens_of(), PTR, 2)


@pytest.mark.parametrize("keep", [1, 3, 100, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("by", ["first", "norm", "weights", "similarity"])
@pytest.mark.parametrize("protect", [0, 2])
def test_pruning(keep, by, protect):
    rng = np.random.default_rng(1)
    x = tokens_of() * rng.permutation(np.linspace(0.5, 2, PTR[-1]))[:, None].astype(np.float32)
    weights = rng.integers(0, 5, PTR[-1]) if by == "weights" else by
    kept, ptr = prune_tokens(x, PTR, keep, weights, protect=protect)
    assert kept.dtype == x.dtype and ptr.dtype == np.int64
    for i, (before, after) in enumerate(zip(split(x, PTR), split(kept, ptr))):
        n = len(before)
        count = int(np.ceil(n * keep)) if isinstance(keep, float) else min(n, keep)
        assert len(after) == count
        if by == "first":
            chosen = list(range(count))
        elif by == "similarity":
            unit = before / np.linalg.norm(before, axis=1, keepdims=True)
            chosen = list(range(min(count, max(protect, 1))))
            while len(chosen) < count:
                rest = [j for j in range(n) if j not in chosen]
                chosen.append(min(rest, key=lambda j: (unit[chosen] @ unit[j]).max()))
        else:
            score = np.square(before).sum(1) if by == "norm" else weights[PTR[i] : PTR[i + 1]]
            rest = sorted(range(n), key=lambda j: (j >= protect, -(j >= protect) * float(score[j]), j))
            chosen = rest[:count]
        np.testing.assert_array_equal(after, before[sorted(chosen)])


def test_pruning_of_equal_tokens():
    x = np.ones((6, 3), np.float32)
    for by in ("similarity", "norm", np.zeros(6)):
        kept, ptr = prune_tokens(x, [0, 4, 6], 2, by)
        assert len(kept) == 4 and ptr.tolist() == [0, 2, 4]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int8"])
def test_torch(dtype):
    pytest.importorskip("scipy")
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(tokens_of() * 20).to(getattr(torch, dtype))
    pooled, ptr = pool_tokens(x, torch.from_numpy(PTR), 2)
    assert pooled.dtype == (torch.float32 if dtype == "int8" else x.dtype)
    assert isinstance(ptr, torch.Tensor) and ptr.dtype == torch.int64
    expected, _ = pool_tokens(x.float().numpy(), PTR, 2)
    np.testing.assert_allclose(pooled.float().numpy(), expected, rtol=0.01, atol=0.05)
    kept, ends = prune_tokens(x, PTR, 0.5)
    assert kept.dtype == x.dtype and isinstance(ends, torch.Tensor)
    np.testing.assert_array_equal(kept.float().numpy(), prune_tokens(x.float().numpy(), PTR, 0.5)[0])


X = tokens_of()
NAN = np.where(np.arange(PTR[-1])[:, None] == 7, np.nan, X)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "factor must be at least 1", lambda: pool_tokens(X, PTR, 0.5)),
        (ValueError, "factor must be a positive", lambda: pool_tokens(X, PTR, 0)),
        (TypeError, "factor must be a number", lambda: pool_tokens(X, PTR, "2x")),
        (ValueError, "protect", lambda: pool_tokens(X, PTR, 2, protect=-1)),
        (ValueError, "ptr must end", lambda: pool_tokens(X, PTR[:-1], 2)),
        (ValueError, r"tokens\[7, 0\] is nan", lambda: pool_tokens(NAN, PTR, 2)),
        (ValueError, "keep must be >= 1", lambda: prune_tokens(X, PTR, 0)),
        (ValueError, "keep must be a share", lambda: prune_tokens(X, PTR, 1.5)),
        (ValueError, "keep must be a share", lambda: prune_tokens(X, PTR, float("nan"))),
        (TypeError, "keep must be an integer", lambda: prune_tokens(X, PTR, "half")),
        (ValueError, "by must be one of", lambda: prune_tokens(X, PTR, 2, "idf")),
        (TypeError, "by must be one of", lambda: prune_tokens(X, PTR, 2, None)),
        (ValueError, "by has shape", lambda: prune_tokens(X, PTR, 2, np.ones(3))),
        (TypeError, "by must hold numbers", lambda: prune_tokens(X, PTR, 2, np.array(["a"] * PTR[-1]))),
        (ValueError, r"by\[7\] is NaN", lambda: prune_tokens(X, PTR, 2, NAN[:, 0])),
        (ValueError, r"tokens\[7, 0\] is nan", lambda: prune_tokens(NAN, PTR, 2)),
        (ValueError, "ptr must rise", lambda: prune_tokens(X, [0, 7, 5, PTR[-1]], 2)),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    pytest.importorskip("scipy")
    with pytest.raises(error, match=message):
        call()
