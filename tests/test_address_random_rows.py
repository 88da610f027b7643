"""lutra.address.random_rows against its reference, its paper's answers and the normal distribution."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.reference import address as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 97, 128, 130)
IDS = np.array([[5, 7, 5], [2**32 - 1, 0, 31], [5, 7, 2**31]])
SEQUENCES = np.array([-3, 2**40 + 1, 0])


def words(counter, key):
    return [f"{w:08x}" for w in reference.philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))]


def test_known_answers_of_philox():
    """The vectors that Random123 of Salmon et al. (2011) is tested with."""
    assert words([0] * 4, [0] * 2) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = 0xFFFFFFFF
    assert words([ones] * 4, [ones] * 2) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert words(*pi) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_the_words_of_a_row_are_those_of_its_counters(simd_level):
    """Dimension 64 g + 16 w + l is word w of block 16 g + l; keys and counters go where they should."""
    zero = lutra.address.random_rows(np.array([0]), 64, output="words").view(np.uint32)[0]
    assert [f"{w:08x}" for w in zero[::16]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    seed, sequence, token = 0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3
    got = lutra.address.random_rows(
        np.array([token]), 200, np.array([sequence]), seed=seed, output="words"
    ).view(np.uint32)[0]
    for d in (0, 5, 17, 63, 64, 100, 199):
        block, word = d // 64 * 16 + d % 16, d % 64 // 16
        counter = np.array([block, token, 0x13198A2E, 0x03707344], np.uint32)
        assert got[d] == reference.philox4x32(counter, np.array([0xA4093822, 0x299F31D0], np.uint32))[word]


@pytest.mark.parametrize("id_dtype", [np.int64, np.int32])
def test_equals_the_reference(simd_level, id_dtype):
    ids = IDS if id_dtype is np.int64 else IDS % 1000
    for dim in SIZES:
        for sequences in (None, SEQUENCES, np.arange(9).reshape(3, 3), SEQUENCES.astype(np.int32)):
            args = ids.astype(id_dtype), dim, sequences
            exact = reference.random_rows(*args, seed=-5, output="words")
            got = lutra.address.random_rows(*args, seed=-5, output="words")
            assert got.dtype == np.int32 and (got == exact).all()
            values = lutra.address.random_rows(*args, seed=-5, scale=0.5)
            assert values.dtype == np.float32 and values.shape == (3, 3, dim)
            want = reference.random_rows(*args, seed=-5, scale=0.5, dtype="float64")
            np.testing.assert_allclose(values, want, atol=1e-6, rtol=0)


def test_the_tolerance_over_many_values(simd_level):
    ids = np.arange(300)
    got = lutra.address.random_rows(ids, 1024, seed=11)
    want = reference.random_rows(ids, 1024, seed=11, dtype="float64")
    assert np.abs(got - want).max() < 2e-6
    assert np.abs(want).max() > 4.2


@pytest.mark.parametrize("dtype, atol", [("float16", 3e-3), ("bfloat16", 2e-2), ("float64", 0)])
def test_dtypes(simd_level, dtype, atol):
    for dim in (1, 17, 64, 97):
        ids, sequences = torch.from_numpy(IDS), torch.from_numpy(SEQUENCES)
        got = lutra.address.random_rows(ids, dim, sequences, seed=3, dtype=dtype)
        want = reference.random_rows(IDS, dim, SEQUENCES, seed=3, dtype="float64")
        assert got.dtype == getattr(torch, dtype)
        np.testing.assert_allclose(got.double().numpy(), want, atol=atol, rtol=0)
        if dtype != "bfloat16":
            mine = lutra.address.random_rows(IDS, dim, SEQUENCES, seed=3, dtype=dtype)
            np.testing.assert_array_equal(mine, got.numpy())


def test_the_composition_in_torch_is_the_same():
    """What CUDA tensors are computed with."""
    from lutra.torch_ops.random_rows import compose

    ids, sequences = torch.from_numpy(IDS), torch.from_numpy(SEQUENCES)
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        for dim in (1, 64, 97):
            got = compose(ids, sequences, dim, seed, output="words").numpy()
            assert (got == reference.random_rows(IDS, dim, SEQUENCES, seed=seed, output="words")).all()
            got = compose(ids, sequences, dim, seed, 2.0, "float64").numpy()
            want = reference.random_rows(IDS, dim, SEQUENCES, seed=seed, scale=2.0, dtype="float64")
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_value_depends_on_its_key_alone(simd_level):
    wide = lutra.address.random_rows(IDS, 200, SEQUENCES, seed=1)
    assert (lutra.address.random_rows(IDS, 70, SEQUENCES, seed=1) == wide[..., :70]).all()
    assert (wide[0, 0] == wide[0, 2]).all()  # the same token in one sequence
    assert not (wide[0, 0] == wide[2, 0]).any()  # in another
    one = lutra.address.random_rows(IDS[1, 2:], 200, SEQUENCES[1:2], seed=1)
    assert (one[0] == wide[1, 2]).all()
    assert not (lutra.address.random_rows(IDS, 200, SEQUENCES, seed=2) == wide).any()
    low = lutra.address.random_rows(IDS, 64, SEQUENCES % 2**32, seed=1)
    assert not (low[:2] == wide[:2, :, :64]).any()  # both halves of a sequence count
    big = lutra.address.random_rows(IDS, 64, seed=1 + 2**64)
    assert (big == lutra.address.random_rows(IDS, 64, seed=1)).all()


def test_moments():
    """10^6 values: mean, variance, skewness, kurtosis and tails within five standard errors."""
    x = lutra.address.random_rows(np.arange(1000), 1000, np.arange(1000), seed=7).astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for level, p in (
        (1.0, 0.317310507863),
        (2.0, 0.045500263896),
        (3.0, 0.002699796063),
        (4.0, 6.334248367e-5),
    ):
        share = (np.abs(x) > level).mean()
        assert abs(share - p) < 5 * (p / n) ** 0.5, level


def test_the_distribution_is_normal():
    """Kolmogorov and Smirnov's distance, 200,000 values; above 1.95 / sqrt(n) with probability 0.1 %."""
    from math import erf

    x = np.sort(lutra.address.random_rows(np.arange(2000), 100, seed=3).reshape(-1))
    at = np.linspace(0, x.size - 1, 4000).astype(int)
    phi = np.array([(1 + erf(v / 2**0.5)) / 2 for v in x[at].astype(float)])
    assert np.abs(phi - (at + 0.5) / x.size).max() < 1.95 / x.size**0.5


@pytest.mark.parametrize("axis", ["sequences", "tokens", "dimensions", "words", "seeds"])
def test_independence(axis):
    """Neighbours in each part of the key are not correlated, neither in value nor in square."""
    n, dim = 500, 512
    if axis == "sequences":
        a, b = (lutra.address.random_rows(np.full(n, 9), dim, np.arange(n) + s) for s in (0, 1))
    elif axis == "tokens":
        a, b = (lutra.address.random_rows(np.arange(n) + s, dim) for s in (0, 1))
    elif axis == "seeds":
        a, b = (lutra.address.random_rows(np.arange(n), dim, seed=s) for s in (0, 1))
    else:  # dimensions of other blocks, and the two of one pair
        x = lutra.address.random_rows(np.arange(n), dim).reshape(n, -1, 4, 16)
        a, b = (x[..., 1:], x[..., :-1]) if axis == "dimensions" else (x[:, :, ::2], x[:, :, 1::2])
    a, b = (v.reshape(-1).astype(np.float64) for v in (a, b))
    assert abs((a * b).mean()) < 5 / a.size**0.5
    assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 5 * 2 / a.size**0.5


@pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")
def test_threads_do_not_change_a_bit():
    results = []
    for threads in (1, 2, 5):
        lutra.set_num_threads(threads)
        try:
            results.append(lutra.address.random_rows(np.arange(3000).reshape(30, 100), 97, np.arange(30)))
        finally:
            lutra.set_num_threads(0)
    assert all((results[0] == r).all() for r in results[1:])


def test_empty_and_not_contiguous(simd_level):
    assert lutra.address.random_rows(np.zeros((0, 4), np.int64), 8, np.zeros(0, np.int64)).shape == (0, 4, 8)
    assert lutra.address.random_rows(np.zeros((2, 0), np.int64), 8, np.zeros(2, np.int64)).shape == (2, 0, 8)
    assert lutra.address.random_rows(np.zeros((2, 3), np.int64), 0).shape == (2, 3, 0)
    base = np.arange(24).reshape(4, 6)
    keys = np.arange(8)[::2]
    got = lutra.address.random_rows(base[:, ::2], 33, keys)
    assert (got == lutra.address.random_rows(base[:, ::2].copy(), 33, keys.copy())).all()
    got = lutra.address.random_rows(base.T, 33)
    assert (got == lutra.address.random_rows(base, 33).transpose(1, 0, 2)).all()
    assert lutra.address.random_rows(torch.tensor(5), 8).shape == (8,)


def test_the_operator():
    ids, sequences = torch.from_numpy(IDS), torch.from_numpy(SEQUENCES)
    torch.library.opcheck(torch.ops.lutra.random_rows.default, (ids, sequences, 17, 5))
    torch.library.opcheck(torch.ops.lutra.random_rows.default, (ids, None, 17, 5, 1.0, "bfloat16", "normal"))
    compiled = torch.compile(
        lambda i, s: lutra.address.random_rows(i, 33, s, seed=2) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(ids, sequences), lutra.address.random_rows(ids, 33, sequences, seed=2) * 2)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"ids": np.array([[1, -1]])}, IndexError, "ids[0, 1] is -1"),
        ({"ids": np.array([[1], [2**32]])}, IndexError, "ids[1, 0] is 4294967296"),
        ({"ids": np.array([[1, -1]], np.int32)}, IndexError, "ids[0, 1] is -1"),
        ({"ids": np.array([1.0])}, TypeError, "ids has dtype float64"),
        ({"ids": [1]}, TypeError, "ids must be"),
        ({"dim": -1}, ValueError, "dim must be >= 0"),
        ({"dim": 2.0}, TypeError, "dim must be an integer"),
        ({"sequences": np.zeros(3, np.int64)}, ValueError, "sequences has shape (3,)"),
        ({"sequences": np.zeros(2)}, TypeError, "sequences has dtype float64"),
        ({"sequences": torch.zeros(2, dtype=torch.int64)}, TypeError, "sequences is a torch tensor"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"scale": "a"}, TypeError, "scale must be a number"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of 'float32'"),
        ({"output": "bits"}, ValueError, "output must be one of 'normal', 'words'"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    given = {"ids": np.zeros((2, 3), np.int64), "dim": 8, "sequences": np.zeros(2, np.int64), **change}
    if "ids" in change and not isinstance(change["ids"], list):
        given["sequences"] = None
    with pytest.raises(error) as caught:
        lutra.address.random_rows(**given)
    assert text in str(caught.value)


def test_the_reference_backend_alone():
    code = (
        "import numpy as np, lutra, sys\n"
        "got = lutra.address.random_rows(np.array([0]), 64, output='words').view(np.uint32)[0, ::16]\n"
        "assert [hex(w) for w in got.tolist()] == ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']\n"
        "assert 'torch' not in sys.modules\n"
        "assert abs(lutra.address.random_rows(np.arange(9), 500).std() - 1) < 0.1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LUTRA_BACKEND": "reference"})
