"""lutra.gather.bag_pieces and its gradients against the reference."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.gather import Pieces, bag_pieces
from lutra.reference import gather as reference
from lutra.reference import pieces as rows_of

needs_kernel = pytest.mark.skipif(_backend.core is None, reason="torch's own ops compute it without a kernel")

torch = pytest.importorskip("torch")

import lutra.torch_ops  # noqa: E402  (operators are called by themselves)

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
ROWS = 60


def source(kind, width, m=3, bits=5, combine="concat"):
    """(pieces, stored) of a kind, for ROWS rows."""
    rng = np.random.default_rng(width)
    if kind == "codes":
        stored = rng.integers(0, 256, (ROWS, (m * bits + 7) // 8), dtype=np.uint8)
        return Pieces("codes", (m, bits), width, combine), stored
    if kind == "digits":
        return Pieces("digits", (3, 4, 5), width), None
    if kind == "qr":
        return Pieces("qr", (7, 9), width, combine), None
    if kind == "hash":
        numbers = rng.integers(1, rows_of.PRIME, 6).tolist()
        return Pieces("hash", (3, 13, *numbers), width, "sum"), None
    if kind == "robe":
        numbers = rng.integers(1, rows_of.PRIME, 6).tolist()
        return Pieces("robe", (4, 3 * width + 1, *numbers), width), None
    if kind == "modulo":
        return Pieces("modulo", (7,), width, combine), None
    stored = rng.integers(0, 6, -(-ROWS // 4)).astype(np.int32)
    return Pieces("blocks", (4, 6), width, "sum"), stored


#: Every kind of pieces, with the ways it is combined.
KINDS = (
    ("digits", "concat"), ("codes", "sum"), ("qr", "sum"), ("qr", "product"),
    ("hash", "sum"),
    ("robe", "concat"), ("modulo", "sum"), ("modulo", "concat"), ("blocks", "sum"),
)  # fmt: skip


def table_for(pieces, dtype="float32", seed=0):
    shape = (pieces.table_rows,) if pieces.kind == "robe" else (pieces.table_rows, pieces.width)
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values).to(getattr(torch, dtype))


def decoded(pieces, table, stored, factors=None):
    """All rows, by the reference."""
    table, factors = (None if a is None else a.float().numpy() for a in (table, factors))
    return rows_of.rows(
        pieces.kind, pieces.numbers, pieces.combine, table, np.arange(ROWS), stored, factors, pieces.width
    )


def calls(rng):
    """(ids, offsets, weights, options)"""
    ids = rng.integers(0, ROWS, 70)
    offsets = np.array([0, 4, 4, 33, 69])
    weights = rng.standard_normal(70).astype(np.float32)
    yield ids.reshape(14, 5), None, None, {}
    yield ids.reshape(14, 5), None, weights.reshape(14, 5), {}
    yield ids, offsets, None, {"mode": "mean", "padding_idx": int(ids[5])}
    yield ids.astype(np.int32), offsets.astype(np.int32), weights, {"padding_idx": -1}
    yield ids, np.array([3, 10, 60]), weights, {"include_last_offset": True}
    yield ids[:0].reshape(0, 3), None, None, {}
    yield ids[:0], np.zeros(3, np.int64), None, {"mode": "mean"}


def as_torch(*arrays):
    return [None if a is None else torch.from_numpy(a) for a in arrays]


def check(pieces, stored, dtype, factors=None):
    table = table_for(pieces, dtype)
    full = decoded(pieces, table, stored, factors)
    limit = TOLERANCE[dtype]
    for ids, offsets, weights, options in calls(np.random.default_rng(1)):
        want = reference.bag(full, ids, offsets, weights, **{"mode": "sum", **options})
        got = bag_pieces(
            table, *as_torch(ids, offsets, weights), pieces=pieces, rows=ROWS,
            stored=None if stored is None else torch.from_numpy(stored), piece_weights=factors, **options,
        )  # fmt: skip
        assert got.dtype == table.dtype and got.shape == want.shape
        bound = limit * (1 + np.abs(want).max(initial=0))
        assert np.abs(got.float().numpy() - want).max(initial=0) <= bound, (pieces, options)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", SIZES)
def test_codes_of_every_width(width, dtype, simd_level):
    for m, bits in ((1, 1), (3, 5), (4, 8), (9, 4), (17, 8)):
        check(*source("codes", width, m, bits), dtype)


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_of_every_number_of_bits(bits):
    for width in (2, 5):
        check(*source("codes", width, 5, bits), "float32")
    codes = source("codes", 1, 5, bits)[1]
    if bits <= 8:
        packed = lutra.quant._bits.unpack(codes, 5, bits)
        assert np.array_equal(rows_of.unpack(codes, 5, bits), packed)


def factors_for(pieces, dtype="float32"):
    values = np.random.default_rng(7).standard_normal((ROWS, pieces.m)).astype(np.float32)
    return torch.from_numpy(values).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind, combine", KINDS)
def test_every_kind(kind, combine, dtype, simd_level):
    for width in SIZES:
        pieces, stored = source(kind, width, combine=combine)
        check(pieces, stored, dtype)
        if combine == "sum":
            check(pieces, stored, dtype, factors_for(pieces, dtype))


@pytest.mark.parametrize("kind, combine", KINDS)
def test_addresses_are_those_of_torch_and_of_plain_integers(kind, combine):
    pieces, stored = source(kind, 3, combine=combine)
    ids = np.arange(ROWS)
    index, signs = rows_of.addresses(kind, pieces.numbers, ids, stored)
    composed, torch_signs = lutra.gather._pieces.addresses(
        pieces, torch.from_numpy(ids), None if stored is None else torch.from_numpy(stored)
    )
    assert np.array_equal(index, composed.numpy())
    assert index.min() >= 0 and index.max() < pieces.table_rows
    if signs is not None:
        assert np.array_equal(signs, torch_signs.numpy())


def test_hashes_do_not_overflow():
    """Numbers just below the prime, ids near 2**31: the same as Python's integers."""
    top = rows_of.PRIME - 1
    ids = np.array([0, 1, top, top + 1, 2**31 - 1, 2**31 - 2])
    rows, m, size = 2**31, 3, 1009
    hashed = Pieces("hash", (m, size, *(top - i for i in range(2 * m))), 1, "sum")
    robe = Pieces("robe", (m, size, *(top - i for i in range(6))), 1)
    table = np.arange(size, dtype=np.float32)
    for pieces in (hashed, robe):
        a = pieces.numbers
        want = []
        for x in ids.tolist():
            x %= rows_of.PRIME
            if pieces is hashed:
                want.append([(a[2 + j] * x + a[2 + m + j]) % rows_of.PRIME % size for j in range(m)])
            else:
                want.append([(a[2] * x + a[3] * j + a[4]) % rows_of.PRIME % size for j in range(m)])
        assert rows_of.addresses(pieces.kind, a, ids)[0].tolist() == want
        got = bag_pieces(table, ids.reshape(-1, 1), pieces=pieces, rows=rows)
        if pieces is hashed:
            assert got[:, 0].tolist() == np.sum(want, 1).tolist()
        else:
            assert np.abs(got).tolist() == want


def test_a_bag_longer_than_a_block(simd_level, threads):
    pieces, stored = source("codes", 4, 16, 8)
    table = table_for(pieces)
    ids = np.random.default_rng(0).integers(0, ROWS, 5000)
    offsets = np.array([0, 10, 3500, 3500, 4990])
    full = decoded(pieces, table, stored)
    for mode in ("sum", "mean"):
        got = bag_pieces(
            table,
            *as_torch(ids, offsets),
            pieces=pieces,
            rows=ROWS,
            stored=torch.from_numpy(stored),
            mode=mode,
        )
        want = reference.bag(full.astype(np.float64), ids, offsets, mode=mode)
        assert np.abs(got.numpy() - want).max() < 2e-5 * np.abs(want).max()


def test_non_contiguous_and_numpy():
    pieces, stored = source("codes", 4, 3, 8)
    table = table_for(pieces).numpy()
    wide = np.asfortranarray(table)
    ids = np.random.default_rng(0).integers(0, ROWS, (14, 10))[:, ::2]
    codes = np.repeat(stored, 2, 1)[:, ::2]
    got = bag_pieces(wide, ids, pieces=pieces, rows=ROWS, stored=codes)
    assert type(got) is np.ndarray
    want = reference.bag(decoded(pieces, torch.from_numpy(table), stored), ids)
    np.testing.assert_allclose(got, want, atol=1e-5)
    double = bag_pieces(table.astype(np.float64), ids, pieces=pieces, rows=ROWS, stored=codes)
    assert double.dtype == np.float64
    np.testing.assert_allclose(double, want, atol=1e-5)


# ---------------------------------------------------------------- gradients
def gradients(pieces, stored, call, dtype, factors=None):
    """Gradients of table, factors and weights by the kernels, and by torch's ops in float64."""
    ids, offsets, weights, options = call
    out = []
    for kind in (getattr(torch, dtype), torch.float64):
        table = table_for(pieces, dtype).to(kind).requires_grad_()
        f = None if factors is None else factors.to(kind).requires_grad_()
        i, o, w = as_torch(ids, offsets, weights)
        if w is not None:
            w = w.to(kind if kind == torch.float64 else torch.float32).requires_grad_()
        got = bag_pieces(
            table, i, o, w, pieces=pieces, rows=ROWS, piece_weights=f,
            stored=None if stored is None else torch.from_numpy(stored), **options,
        )  # fmt: skip
        grad = np.random.default_rng(5).standard_normal(got.shape).astype(np.float32)
        grad = torch.from_numpy(grad).to(getattr(torch, dtype)).to(kind)
        wanted = [a for a in (table, f, w) if a is not None]
        out.append(torch.autograd.grad(got, wanted, grad))
    return out


def check_gradients(pieces, stored, dtype="float32", factors=None):
    for call in calls(np.random.default_rng(2)):
        for got, want in zip(*gradients(pieces, stored, call, dtype, factors)):
            scale = 1 + float(want.abs().max()) if want.numel() else 1
            assert got.shape == want.shape
            assert (got.double() - want).abs().max() <= 4 * TOLERANCE[dtype] * scale if want.numel() else True


@pytest.mark.parametrize("width", SIZES)
def test_gradients_of_codes(width, simd_level):
    for m, bits in ((1, 1), (3, 5), (9, 4), (17, 8)):
        check_gradients(*source("codes", width, m, bits))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_halves(dtype, simd_level):
    for width in (2, 3, 4, 16, 33):
        check_gradients(*source("codes", width, 5, 8), dtype)


@pytest.mark.parametrize("kind, combine", KINDS)
def test_gradients_of_every_kind(kind, combine, simd_level):
    for width in (1, 3, 16, 17, 65):
        pieces, stored = source(kind, width, combine=combine)
        check_gradients(pieces, stored)
        if combine == "sum":
            check_gradients(pieces, stored, "float32", factors_for(pieces))
    check_gradients(*source(kind, 17, combine=combine), "bfloat16")


@needs_kernel
def test_ids_of_no_bag_may_be_anything():
    pieces, _ = source("hash", 8)
    ids = torch.tensor([999, -5, 3, 4, 5, 777])
    offsets = torch.tensor([2, 4, 5])
    table, factors = table_for(pieces).requires_grad_(), factors_for(pieces).requires_grad_()
    weights = torch.rand(6, requires_grad=True)
    out = bag_pieces(
        table,
        ids,
        offsets,
        weights,
        pieces=pieces,
        rows=ROWS,
        piece_weights=factors,
        include_last_offset=True,
    )
    got = torch.autograd.grad(out.square().sum(), (table, factors, weights))
    again = bag_pieces(
        table, ids[2:5], offsets[:2] - 2, weights[2:5], pieces=pieces, rows=ROWS, piece_weights=factors
    )
    want = torch.autograd.grad(again.square().sum(), (table, factors, weights))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    assert not got[2][[0, 1, 5]].any()


def same_bits(pieces, stored, factors=None):
    """Results and gradients with 1, 2 and 3 threads, as bytes."""
    if _backend.core is None:
        pytest.skip("torch's own ops compute it without a kernel")
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, ROWS, (3000, 20)))
    table = table_for(pieces).requires_grad_()
    f = None if factors is None else factors.clone().requires_grad_()
    weights = torch.rand(3000, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for n in (1, 2, 3):
        lutra._backend.set_num_threads(n)
        out = bag_pieces(
            table, ids, None, weights, pieces=pieces, rows=ROWS, piece_weights=f,
            stored=None if stored is None else torch.from_numpy(stored),
        )  # fmt: skip
        wanted = [a for a in (table, weights, f) if a is not None]
        got = [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]
        results.append([a.numpy().tobytes() for a in got])
    lutra._backend.set_num_threads(0)
    assert results[0] == results[1] == results[2]


def test_codes_give_the_same_bits_with_any_number_of_threads(simd_level):
    same_bits(*source("codes", 4, 16, 8))
    same_bits(*source("codes", 40, 3, 8))


@pytest.mark.parametrize("kind, combine", KINDS)
def test_the_same_bits_with_any_number_of_threads(kind, combine):
    pieces, stored = source(kind, 20, combine=combine)
    same_bits(pieces, stored, factors_for(pieces) if combine == "sum" else None)


def test_gradcheck():
    pieces, stored = source("codes", 2, 3, 2)
    table = table_for(pieces).double().requires_grad_()
    weights = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, ROWS, (3, 4))

    def f(table, weights):
        return bag_pieces(
            table, ids, None, weights, pieces=pieces, rows=ROWS, stored=torch.from_numpy(stored)
        )

    assert torch.autograd.gradcheck(f, (table, weights))


@needs_kernel
def test_operator():
    pieces, stored = source("codes", 4, 3, 8)
    table = table_for(pieces).requires_grad_()
    ids, weights = torch.randint(0, ROWS, (5, 4)), torch.rand(5, 4)
    options = (pieces.kind, list(pieces.numbers), 4, "concat", ROWS, "sum", None, False)
    given = (table, ids, None, weights, torch.from_numpy(stored), None, *options)
    torch.library.opcheck(torch.ops.lutra.bag_pieces, given)
    compiled = torch.compile(
        lambda t, i: bag_pieces(t, i, pieces=pieces, rows=ROWS, stored=torch.from_numpy(stored)).sum(),
        backend="aot_eager",
    )
    compiled(table, ids).backward()
    got = table.grad.clone()
    table.grad = None
    bag_pieces(table, ids, pieces=pieces, rows=ROWS, stored=torch.from_numpy(stored)).sum().backward()
    torch.testing.assert_close(got, table.grad)


# ---------------------------------------------------------------- errors
def test_errors():
    pieces, stored = source("codes", 4, 3, 8)
    table = table_for(pieces).numpy()
    ids = np.zeros((2, 2), np.int64)
    ok = {"pieces": pieces, "rows": ROWS, "stored": stored}
    for bad in (ROWS, -1):
        wrong = ids.copy()
        wrong[1, 0] = bad
        with pytest.raises(IndexError, match=rf"ids\[1, 0\] is {bad}"):
            bag_pieces(table, wrong, **ok)
    with pytest.raises(IndexError, match=r"offsets\[1\]"):
        bag_pieces(table, ids.reshape(-1), np.array([0, 9]), **ok)
    with pytest.raises(ValueError, match="mode must be one of"):
        bag_pieces(table, ids, mode="max", **ok)
    with pytest.raises(ValueError, match="table has shape"):
        bag_pieces(table[1:], ids, **ok)
    with pytest.raises(ValueError, match="stored has shape"):
        bag_pieces(table, ids, **{**ok, "stored": stored[1:]})
    with pytest.raises(ValueError, match="stored is missing"):
        bag_pieces(table, ids, **{**ok, "stored": None})
    with pytest.raises(TypeError, match="stored has dtype"):
        bag_pieces(table, ids, **{**ok, "stored": stored.astype(np.int64)})
    with pytest.raises(TypeError, match="ids has dtype"):
        bag_pieces(table, ids.astype(np.float32), **ok)
    with pytest.raises(ValueError, match="weights go with mode 'sum'"):
        bag_pieces(table, ids, None, np.ones((2, 2), np.float32), mode="mean", **ok)
    with pytest.raises(ValueError, match="piece_weights go with combine 'sum'"):
        bag_pieces(table, ids, piece_weights=np.ones((ROWS, 3), np.float32), **ok)
    blocks, remap = source("blocks", 4)
    remap[3] = 6
    with pytest.raises(IndexError, match=r"stored\[3\] is 6"):
        bag_pieces(table_for(blocks).numpy(), ids + 13, pieces=blocks, rows=ROWS, stored=remap)
    few = Pieces("qr", (7, 8), 4, "sum")
    with pytest.raises(ValueError, match="more than 8 quotients"):
        bag_pieces(table_for(few).numpy(), ids, pieces=few, rows=ROWS)
    with pytest.raises(ValueError, match="too few for ids below 60"):
        bag_pieces(table, ids, pieces=Pieces("digits", (2, 5, 5), 4), rows=ROWS)
    with pytest.raises(ValueError, match="width is 4; it must be at most"):
        bag_pieces(table, ids, pieces=Pieces("robe", (2, 3, 1, 1, 1, 1, 1, 1), 4), rows=ROWS)
    with pytest.raises(ValueError, match="combine 'product' is for two pieces"):
        bag_pieces(table, ids, pieces=Pieces("modulo", (3,), 4, "product"), rows=ROWS)
    with pytest.raises(ValueError, match="are not concatenated"):
        bag_pieces(table, ids, pieces=Pieces("qr", (7, 9), 4), rows=ROWS)
    with pytest.raises(ValueError, match="bits must be in"):
        bag_pieces(table, ids, **{**ok, "pieces": Pieces("codes", (3, 17), 4)})
    with pytest.raises(ValueError, match="kind of pieces must be one of"):
        bag_pieces(table, ids, **{**ok, "pieces": Pieces("nonsense", (3, 8), 4)})
    with pytest.raises(ValueError, match="numbers of pieces"):
        bag_pieces(table, ids, **{**ok, "pieces": Pieces("codes", (3,), 4)})


@needs_kernel
@pytest.mark.parametrize("size", [7, ROWS, ROWS + 3])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scaled_rows_operator(size, mode):
    """The gradients of all of a scaled table's arrays in one op."""
    ids, offsets = torch.randint(0, ROWS, (30,)), torch.tensor([1, 4, 4, 29])
    grad, table, scale = torch.randn(4, 17), torch.randn(size, 17), torch.randn(ROWS, 1)
    weights = torch.rand(30) if mode == "sum" else None
    given = (grad, table, scale, ids, offsets, weights, mode, 3, False, True, True, True)
    torch.library.opcheck(torch.ops.lutra.scaled_rows_backward.default, given)
    got = torch.ops.lutra.scaled_rows_backward(*given)
    leaves = [
        a.double().requires_grad_() for a in (table, scale, torch.ones(30) if mode == "mean" else weights)
    ]
    rows = leaves[0][ids % size] * leaves[1][ids] * leaves[2][:, None] * (ids != 3)[:, None]
    spans = [rows[a:b] for a, b in ((1, 4), (4, 4), (4, 29), (29, 30))]
    kept = [int((ids[a:b] != 3).sum()) for a, b in ((1, 4), (4, 4), (4, 29), (29, 30))]
    out = torch.stack([r.sum(0) / (max(n, 1) if mode == "mean" else 1) for r, n in zip(spans, kept)])
    want = torch.autograd.grad(out, leaves, grad.double())
    for a, b in zip(got[: 2 if mode == "mean" else 3], want):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    with pytest.raises(IndexError, match="60"):
        torch.ops.lutra.scaled_rows_backward(grad, table, scale, torch.full((30,), 60), *given[4:])


def whole_numbers(*shape):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(len(shape))).float()


@needs_kernel
@pytest.mark.parametrize(
    ("width", "bits"),
    [(w, b) for w in SIZES for b in (4, 11)] + [(w, b) for w in (3, 33) for b in (1, 2, 3, 7, 8)],
)
def test_summed_books(width, bits, simd_level):
    """Residual codes: groups of books, bags longer than a block; whole numbers, so exact."""
    m = 5
    rng = np.random.default_rng(width)
    stored = torch.from_numpy(rng.integers(0, 256, (ROWS, (m * bits + 7) // 8), dtype=np.uint8))
    pieces = Pieces("codes", (m, bits), width, "sum")
    table = whole_numbers(pieces.table_rows, width).requires_grad_()
    offsets = torch.tensor([0, 2, 2, 4000])  # a bag of more entries than a block has
    # Few entries take another way.
    for n, starts, w, padding in (
        (5000, offsets, None, None),
        (5000, offsets, whole_numbers(5000), 7),
        (9, offsets[:2], None, None),
    ):
        ids = torch.from_numpy(rng.integers(0, ROWS, n))
        options = {"pieces": pieces, "rows": ROWS, "stored": stored, "padding_idx": padding}
        out = bag_pieces(table, ids, starts, w, **options)
        wide = table.detach().double().requires_grad_()
        want = bag_pieces(wide, ids, starts, None if w is None else w.double(), **options)
        assert torch.equal(out.double(), want)
        grad = whole_numbers(*out.shape)
        (got,) = torch.autograd.grad(out, table, grad)
        (wanted,) = torch.autograd.grad(want, wide, grad.double())
        assert torch.equal(got.double(), wanted)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_summed_books_on_threads(dtype):
    """The same bits, forward and backward, and means; an id that is out of range far behind is named."""
    pieces = Pieces("codes", (7, 4), 40, "sum")
    rng = np.random.default_rng(0)
    stored = torch.from_numpy(rng.integers(0, 256, (ROWS, 4), dtype=np.uint8))
    table = torch.randn(pieces.table_rows, 40, dtype=dtype, requires_grad=True)
    ids = torch.from_numpy(rng.integers(0, ROWS, (700, 31)))
    options = {"pieces": pieces, "rows": ROWS, "stored": stored, "mode": "mean"}
    results, before = [], lutra.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            lutra.set_num_threads(threads)
            out = bag_pieces(table, ids, **options)
            results.append((out, *torch.autograd.grad(out, table, out.detach())))
    finally:
        lutra.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
    wide = table.detach().double().requires_grad_()
    want = bag_pieces(wide, ids, **options)
    (to_table,) = torch.autograd.grad(want, wide, results[0][0].detach().double())
    close = max(2 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(results[0][0].double(), want, rtol=close, atol=close)
    torch.testing.assert_close(results[0][1].double(), to_table, rtol=close, atol=10 * close)
    ids[-1, -1] = ROWS
    with pytest.raises(IndexError, match=str(ROWS)):
        bag_pieces(table, ids, **options)


@needs_kernel
def test_operators_of_gradients():
    pieces, stored = source("codes", 4, 3, 8)
    table, ids = table_for(pieces), torch.randint(0, ROWS, (5, 4))
    of = (pieces.kind, list(pieces.numbers), 4, "concat", ROWS)
    stored = torch.from_numpy(stored)
    given = (torch.rand(5, 12), ids, None, None, stored, None, None, *of, "sum", None, False)
    torch.library.opcheck(torch.ops.lutra.bag_pieces_backward.default, given)
    given = (torch.rand(5, 12), table, ids, None, stored, *of, None, False)
    torch.library.opcheck(torch.ops.lutra.piece_dots.default, given)
