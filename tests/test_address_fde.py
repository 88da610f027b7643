"""lutra.address.fde against its reference and against the definition in plain Python; options and errors.

What the encodings are good for is in test_address_fde_chamfer.py.
"""

from __future__ import annotations

import copy
import json
import pickle
from itertools import pairwise

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.address import FDE, BlockRows
from lutra.address._fde_encoder import tables_of
from lutra.reference import fde as reference

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
LENGTHS = (3, 0, 1, 40, 0, 17, 2)


def make(d, lengths=LENGTHS, dtype=np.float32, seed=0):
    """Small integers: every sum is exact in float32, whatever its order, so that signs are certain."""
    ptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.random.default_rng(seed).integers(-4, 5, (ptr[-1], d)).astype(dtype), ptr


def expected(tokens, ptr, e, query=False):
    planes, psi, scale, final = tables_of(e)
    return reference.fde(tokens, ptr, planes, psi, scale, query=query, fill_empty=e.fill_empty, final=final)


def defined(tokens, ptr, e, query):
    """The published definition, a number at a time, from the encoder's arrays."""
    rows = []
    for begin, end in pairwise(ptr):
        own, out = tokens[begin:end].astype(float), []
        for r in range(e.repetitions):
            bits = [[float(x @ e.planes[r, :, j].astype(float)) > 0 for j in range(e.k_sim)] for x in own]
            numbers = []
            for sketch in bits:
                g = 0
                for bit in sketch:
                    g = (g << 1) + (bit ^ (g & 1))
                numbers.append(g)
            for partition in range(1 << e.k_sim):
                members = [x for x, g in zip(own, numbers) if g == partition]
                block = np.zeros(e.d)
                if members:
                    block = sum(members) / (1 if query else len(members))
                elif len(own) and e.fill_empty and not query:
                    # the published C++ undoes the Gray code so, and compares from the last plane to the first
                    code, distances = partition ^ (partition >> 1), []
                    for sketch in bits:
                        left, differ = code, 0
                        for bit in reversed(sketch):
                            differ += bit != (left & 1)
                            left >>= 1
                        distances.append(differ)
                    block = own[distances.index(min(distances))]
                if e.projection == "signs":
                    block = [
                        sum(int(s) * v for s, v in zip(e.signs[r, :, o], block)) / e.d_proj**0.5
                        for o in range(e.d_proj)
                    ]
                elif e.projection == "count":
                    sketched = np.zeros(e.d_proj)
                    for i in range(e.d):
                        sketched[e.columns[r, i]] += e.signs[r, i] * block[i]
                    block = sketched
                out.extend(block)
        if e.final_dim is not None:
            target, sign, _ = tables_of(e).final
            sketched = np.zeros(e.final_dim)
            for v, t, s in zip(out, target, sign):
                sketched[t] += s * v
            out = sketched
        rows.append(out)
    return np.array(rows)


ENCODERS = (
    FDE(7, 2, 3, 4, seed=1),
    FDE(7, 2, 3, 4, projection="count", seed=2),
    FDE(7, 3, 2, projection=None, fill_empty=False),
    FDE(7, 1, 0, 5),
    FDE(7, 2, 4, 3, final_dim=11, seed=9),
    FDE(7, 1, 5, 7, projection="signs", fill_empty=False),
)


@pytest.mark.parametrize("e", ENCODERS, ids=str)
@pytest.mark.parametrize("query", [False, True])
def test_the_definition(e, query):
    tokens, ptr = make(7, (3, 0, 9, 1))
    want = defined(tokens, ptr, e, query)
    assert want.shape == (4, e.dim) and not want[1].any()
    np.testing.assert_allclose(expected(tokens, ptr, e, query), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lutra.address.fde(tokens, ptr, e, query=query), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("projection", ["signs", "count", None])
@pytest.mark.parametrize("d", SIZES)
def test_equals_the_reference(simd_level, d, projection):
    tokens, ptr = make(d, seed=d)
    for repetitions, k_sim, d_proj, final_dim in ((3, 3, 16, None), (2, 5, 5, None), (1, 0, 33, 40)):
        e = FDE(d, repetitions, k_sim, d_proj, projection=projection, final_dim=final_dim, seed=d)
        for query in (False, True):
            got = lutra.address.fde(tokens, ptr, e, query=query)
            assert got.dtype == np.float32 and got.shape == (len(LENGTHS), e.dim)
            want = expected(tokens, ptr, e, query)
            np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-5)
        if final_dim is None:
            rows = e.encode_queries(tokens, ptr, sparse=True)
            assert isinstance(rows, BlockRows) and rows.blocks.dtype == np.int32
            assert np.array_equal(rows.dense(e.num_blocks), got)  # to the bit
            for begin, end in pairwise(rows.ptr):
                assert (np.diff(rows.blocks[begin:end]) > 0).all()
            assert rows.ptr[1] - rows.ptr[0] <= 3 * repetitions and rows.ptr[2] == rows.ptr[1]


@pytest.mark.parametrize("k_sim, d_proj", [(1, 1), (4, 8), (6, 17), (7, 32), (8, 3), (10, 1), (16, 1)])
def test_partitions_and_widths(simd_level, k_sim, d_proj):
    tokens, ptr = make(20, (70, 5, 0, 1))
    for fill_empty in (True, False):
        e = FDE(20, 1 if k_sim > 8 else 3, k_sim, d_proj, fill_empty=fill_empty, seed=k_sim)
        got = lutra.address.fde(tokens, ptr, e)
        np.testing.assert_allclose(got, expected(tokens, ptr, e), rtol=3e-6, atol=1e-5)
        assert not got[2].any()
        if fill_empty:  # one token fills all
            blocks = got[3].reshape(e.repetitions, -1, d_proj)
            np.testing.assert_allclose(blocks, np.broadcast_to(blocks[:, :1], blocks.shape), rtol=1e-6)
    want = expected(tokens, ptr, e, True)
    rows = e.encode_queries(tokens, ptr, sparse=True)
    np.testing.assert_allclose(rows.dense(e.num_blocks), want, rtol=3e-6, atol=1e-5)


def test_many_planes(simd_level):
    """More products than one tile takes, and numbers of planes that no tile divides."""
    tokens, ptr = make(40, (33, 64, 1))
    for repetitions, k_sim in ((20, 5), (13, 1), (7, 7), (5, 11), (50, 2)):
        e = FDE(40, repetitions, k_sim, 2, seed=3)
        got = lutra.address.fde(tokens, ptr, e)
        np.testing.assert_allclose(got, expected(tokens, ptr, e), rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("d", [3, 16, 33])
def test_dtypes(simd_level, d, dtype):
    tokens, ptr = make(d)
    e = FDE(d, 3, 4, 6, seed=2)
    want = expected(tokens, ptr, e)
    mine = torch.from_numpy(tokens).to(getattr(torch, dtype))
    got = lutra.address.fde(mine, torch.from_numpy(ptr), e)
    assert got.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    np.testing.assert_allclose(got.numpy(), want, rtol=3e-6, atol=1e-5)
    rows = e.encode_queries(mine, torch.from_numpy(ptr), sparse=True)
    assert rows.values.dtype == got.dtype
    want = e.encode_queries(mine, torch.from_numpy(ptr))
    torch.testing.assert_close(rows.dense(e.num_blocks), want)
    if dtype != "bfloat16":
        same = lutra.address.fde(tokens.astype(dtype), ptr, e)
        np.testing.assert_array_equal(same, got.numpy())


@pytest.mark.skipif(_backend.core is None, reason="the CPU module was not built")
def test_threads_do_not_change_a_bit():
    rng = np.random.default_rng(0)
    ptr = np.concatenate([[0], np.cumsum(rng.integers(0, 120, 60))])
    tokens = rng.normal(size=(ptr[-1], 24)).astype(np.float32)
    e, results = FDE(24, 5, 4, 16), []
    sketched = FDE(24, 5, 4, 16, final_dim=100)
    for threads in (1, 2, 3, 5):
        lutra.set_num_threads(threads)
        try:
            rows = e.encode_queries(tokens, ptr, sparse=True)
            results.append(
                [lutra.address.fde(tokens, ptr, e), lutra.address.fde(tokens, ptr, sketched), *rows]
            )
        finally:
            lutra.set_num_threads(0)
    for one in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], one))
    # nor does what else is encoded, or where a document lies
    for i in (0, 7, 59):
        part = tokens[ptr[i] : ptr[i + 1]]
        alone = lutra.address.fde(part, np.array([0, len(part)]), e)
        assert np.array_equal(alone[0], results[0][0][i])


def test_a_long_document():
    tokens, _ = make(8, (3000,))
    for ptr in ([0, 3000], [0, 0, 2999, 3000, 3000]):
        e = FDE(8, 2, 4, 4)
        got = lutra.address.fde(tokens, np.array(ptr), e)
        np.testing.assert_allclose(got, expected(tokens, np.array(ptr), e), rtol=2e-6, atol=2e-6)


def test_a_point_fills_by_the_bits_of_the_sketch():
    """Partition 0 has the bits 00; of 1 (01), 3 (10) and 2 (11) only the numbers 1 and 2 differ from 0 in a
    single bit, but by their sketches 1 and 3 are the nearest."""
    e = FDE(2, 1, 2, projection=None)
    object.__setattr__(e, "seed", 0)
    planes = np.eye(2, dtype=np.float32)[None]
    two = np.array([[1.0, 1.0], [2.0, -1.0]])  # bits 11 and 10: partitions 2 and 3
    got = reference.fde(two, np.array([0, 2]), planes, None).reshape(4, 2)
    assert lutra.address.simhash(two, planes)[:, 0].tolist() == [2, 3]
    assert got.tolist() == [[2, -1], [1, 1], [1, 1], [2, -1]]  # 00 is nearer to 10, 01 to 11
    tie = np.array([[-1.0, 1.0], [1.0, -1.0]])  # bits 01 and 10: both one away from 00 and 11
    got = reference.fde(tie, np.array([0, 2]), planes, None).reshape(4, 2)
    assert got[0].tolist() == got[2].tolist() == [-1, 1]


def test_empty_input(simd_level):
    e = FDE(5, 2, 3, 4)
    for documents in (0, 1, 3):
        tokens, ptr = np.zeros((0, 5), np.float32), np.zeros(documents + 1, np.int64)
        for query in (False, True):
            got = lutra.address.fde(tokens, ptr, e, query=query)
            assert got.shape == (documents, e.dim) and not got.any()
        rows = lutra.address.fde(tokens, ptr, e, query=True, sparse=True)
        assert rows.values.shape == (0, 4) and rows.blocks.shape == (0,) and not rows.ptr.any()
        assert rows.dense(e.num_blocks).shape == (documents, e.dim)


def test_not_contiguous(simd_level):
    tokens, ptr = make(9)
    e = FDE(9, 2, 3, 4)
    want = lutra.address.fde(tokens, ptr, e)
    wide = np.zeros((2 * len(tokens), 20), np.float32)
    wide[::2, 1:19:2] = tokens
    spread = np.stack([ptr, ptr + 1], 1)[:, 0]
    assert np.array_equal(lutra.address.fde(wide[::2, 1:19:2], spread, e), want)
    assert np.array_equal(
        lutra.address.fde(torch.from_numpy(tokens.T.copy()).T, torch.from_numpy(ptr), e), want
    )
    swapped = tokens.astype(">f4")
    assert np.array_equal(lutra.address.fde(swapped, ptr.astype(">i8"), e), want)
    fixed = tokens.copy()
    fixed.setflags(write=False)
    assert np.array_equal(lutra.address.fde(fixed, ptr, e), want)


# ---------------------------------------------------------------- the encoder
def test_the_same_numbers_for_ever():
    """From the seed alone; a change here changes every index of encodings that was saved."""
    e = FDE(7, 2, 2, 3, seed=5)
    assert (e.planes[0, :, 0] * 4096).tolist() == [2709, 4952, -1033, -3434, 2572, 1868, -397]
    assert e.signs[1, :2].tolist() == [[1, 1, -1], [-1, -1, 1]]
    c = FDE(7, 2, 2, 3, seed=5, projection="count", final_dim=10)
    assert c.columns.tolist() == [[2, 0, 2, 2, 2, 0, 0], [0, 0, 2, 2, 1, 0, 2]]
    assert c.signs.tolist() == [[-1, -1, -1, 1, 1, 1, 1], [1, -1, 1, 1, -1, 1, 1]]
    target, sign, length = tables_of(c).final
    assert length == 10 and target.tolist()[:8] == [1, 3, 1, 3, 9, 7, 0, 0]
    assert sign.tolist()[:8] == [-1, -1, -1, -1, -1, 1, -1, 1]


def test_the_random_numbers():
    e = FDE(128, 20, 5, 16, seed=3)
    x = e.planes.astype(float).reshape(-1)
    assert e.planes.shape == (20, 128, 5) and e.planes.dtype == np.float32
    assert abs(x.mean()) < 5 / x.size**0.5 and abs(x.var() - 1) < 5 * (2 / x.size) ** 0.5
    assert e.signs.dtype == np.int8 and set(np.unique(e.signs)) == {-1, 1}
    assert abs(e.signs.mean()) < 5 / e.signs.size**0.5
    c = FDE(128, 20, 5, 16, projection="count", seed=3)
    counts = np.bincount(c.columns.reshape(-1), minlength=16)
    assert counts.min() > 100 and counts.sum() == 2560
    # a larger encoder begins with the numbers of a smaller one, and another seed has others
    big = FDE(130, 21, 7, 20, seed=3)
    assert np.array_equal(big.planes[:20, :128, :5], e.planes)
    assert np.array_equal(big.signs[:20, :128, :16], e.signs)
    assert not np.array_equal(FDE(128, 20, 5, 16, seed=4).planes, e.planes)
    with pytest.raises(ValueError, match="read-only"):
        e.planes[0] = 0


def test_an_encoder_is_its_parameters():
    e = FDE(128, 20, 5, 16, projection="count", fill_empty=False, final_dim=1000, seed=2**40)
    config = json.loads(json.dumps(e.config()))
    for same in (FDE(**config), copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        assert same == e and hash(same) == hash(e) and same.config() == config
    assert e != FDE(128, 20, 5, 16) and e.dim == 1000 and FDE(128, 20, 5, 16).dim == 10240
    assert FDE(128).num_blocks == 640 and FDE(128).width == 16
    none = FDE(128, 20, 5, projection=None)
    assert none.width == 128 and none == FDE(128, 20, 5, 3, projection=None) and none.signs is None
    assert FDE(np.int64(8), k_sim=np.int32(2)) == FDE(8, k_sim=2)
    assert FDE(6, 2, 3, 6).width == 6  # signs of the width itself
    with pytest.raises(AttributeError):
        e.d = 3


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"d": 0}, ValueError, "d must be in [1"),
        ({"d": 2.5}, TypeError, "d must be an integer"),
        ({"repetitions": 0}, ValueError, "repetitions must be in [1"),
        ({"k_sim": 17}, ValueError, "k_sim must be in [0, 16], got 17"),
        ({"k_sim": -1}, ValueError, "k_sim must be in [0, 16]"),
        ({"k_sim": True}, TypeError, "k_sim must be an integer"),
        ({"d_proj": 0}, ValueError, "d_proj must be in [1"),
        ({"projection": "sign"}, ValueError, "projection must be one of 'signs', 'count', None"),
        ({"fill_empty": 1}, TypeError, "fill_empty must be True or False"),
        ({"final_dim": 0}, ValueError, "final_dim must be in [1"),
        ({"seed": -1}, ValueError, "seed must be in [0"),
        ({"seed": "a"}, TypeError, "seed must be an integer"),
        ({"k_sim": 16, "d_proj": 2000}, ValueError, "make encodings of 2621440000 values (10.5 GB each)"),
    ],
)
def test_bad_parameters_are_named(change, error, text):
    with pytest.raises(error) as caught:
        FDE(**{"d": 8, **change})
    assert text in str(caught.value)


TOKENS, PTR = make(4, (2, 3))


def spoiled(value):
    tokens = TOKENS.copy()
    tokens[3, 2] = value
    return tokens


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"tokens": TOKENS[:, :3]}, ValueError, "tokens has shape (5, 3); the encoder is for vectors of 4"),
        ({"tokens": TOKENS[0]}, ValueError, "tokens must be 2-d"),
        ({"tokens": TOKENS.astype(np.int32)}, TypeError, "tokens has dtype int32"),
        ({"tokens": TOKENS.tolist()}, TypeError, "tokens must be a NumPy"),
        ({"tokens": spoiled(np.nan)}, ValueError, "tokens[3] holds NaN or infinity"),
        ({"tokens": spoiled(-np.inf)}, ValueError, "tokens[3] holds NaN or infinity"),
        ({"tokens": spoiled(np.inf).astype(np.float16)}, ValueError, "tokens[3] holds NaN or infinity"),
        ({"ptr": np.array([1, 5])}, ValueError, "ptr goes from 1 to 5; it must begin with 0 and end with 5"),
        ({"ptr": np.array([0, 4])}, ValueError, "ptr goes from 0 to 4"),
        ({"ptr": np.array([0, 3, 2, 5])}, ValueError, "ptr must not fall: ptr[1] is 3, ptr[2] is 2"),
        ({"ptr": np.array([0, 6, 5])}, ValueError, "ptr must not fall: ptr[1] is 6"),
        ({"ptr": np.zeros(0, np.int64)}, ValueError, "ptr is empty"),
        ({"ptr": PTR[None]}, ValueError, "ptr must be 1-d"),
        ({"ptr": PTR.astype(np.int32)}, TypeError, "ptr has dtype int32"),
        ({"ptr": torch.from_numpy(PTR)}, TypeError, "ptr is a torch tensor"),
        ({"encoder": {"d": 4}}, TypeError, "encoder must be a lutra.address.FDE"),
        ({"sparse": True}, ValueError, "sparse=True needs query=True"),
        (
            {"encoder": FDE(4, final_dim=8), "sparse": True, "query": True},
            ValueError,
            "without final_dim, which is 8",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    given = {"tokens": TOKENS, "ptr": PTR, "encoder": FDE(4, 2, 2, 3), **change}
    ways = [{}, {"query": True}, {"query": True, "sparse": True}]
    for way in ways if "tokens" in change or "ptr" in change else [{}]:
        with pytest.raises(error) as caught:
            lutra.address.fde(**{**given, **way})
        assert text in str(caught.value)


# ---------------------------------------------------------------- torch
@pytest.mark.parametrize("e", ENCODERS, ids=str)
def test_the_composition_in_torch_is_the_same(e):
    """What CUDA tensors are computed with where there is no kernel."""
    from lutra.torch_ops.fde import compose, compose_blocks, occupied

    for lengths in ((3, 0, 9, 1), (0, 0), (0, 5)):
        tokens, ptr = make(7, lengths, seed=4)
        pair = torch.from_numpy(tokens), torch.from_numpy(ptr)
        for query in (False, True):
            got = compose(*pair, e, query)
            np.testing.assert_allclose(got.numpy(), expected(tokens, ptr, e, query), rtol=3e-6, atol=1e-5)
        if e.final_dim is None:
            got = compose_blocks(*pair, e)
            planes, psi, scale, _ = tables_of(e)
            for one, want in zip(got, reference.fde_blocks(tokens, ptr, planes, psi, scale)):
                np.testing.assert_allclose(one.numpy(), want, rtol=3e-6, atol=1e-5)
            dense = torch.from_numpy(expected(tokens, ptr, e, True))
            for one, want in zip(occupied(dense, *pair, e), got):
                torch.testing.assert_close(one, want, rtol=3e-6, atol=1e-5)


@pytest.mark.traces
def test_the_operators():
    tokens, ptr = (torch.from_numpy(a) for a in make(6, (3, 0, 5)))
    options = (6, 2, 2, 3, "signs", True, None, 1)
    torch.library.opcheck(torch.ops.lutra.fde.default, (tokens, ptr, *options))
    torch.library.opcheck(
        torch.ops.lutra.fde.default, (tokens.half(), ptr, 6, 2, 2, 6, None, True, 5, 1, True)
    )
    torch.library.opcheck(torch.ops.lutra.fde_blocks.default, (tokens, ptr, *options))
    e = FDE(6, 2, 2, 3, seed=1)
    compiled = torch.compile(lambda t, p: e.encode_documents(t, p) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens, ptr), e.encode_documents(tokens, ptr) * 2)


def test_not_differentiable():
    tokens, ptr = (torch.from_numpy(a) for a in make(6, (3, 0, 5)))
    e = FDE(6, 2, 2, 3)
    out = e.encode_documents(tokens.requires_grad_(), ptr)
    with pytest.raises(NotImplementedError, match="lutra::fde is not differentiable"):
        out.sum().backward()
