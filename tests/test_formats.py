"""Every registered format of `lutra.compress`: data, bytes, rows, bags, gradients."""

from __future__ import annotations

import dataclasses

import format_checks as checks
import numpy as np
import pytest

import lutra
from lutra.compress import FORMATS, Table

torch = pytest.importorskip("torch")

NAMES = sorted(FORMATS)
CASES = [(name, shape) for name in NAMES for shape in checks.SHAPES]


def case_table(name, shape) -> Table:
    found = checks.table(name, shape)
    if found is None:
        pytest.skip(f"{name} stores no table of {shape}")
    return found


def close(got, want, name="", scale=1.0):
    got = got.detach().float().numpy() if torch.is_tensor(got) else np.asarray(got, np.float32)
    bound = 2e-5 * scale * (1 + np.abs(want).max(initial=0))
    assert got.shape == want.shape, name
    assert np.abs(got - want).max(initial=0) <= bound, name


# ---------------------------------------------------------------- data and bytes
@pytest.mark.parametrize("name, shape", CASES)
def test_arrays_are_as_declared(name, shape):
    t = case_table(name, shape)
    declared = t.format.arrays(shape)
    assert set(declared) == set(t.data)
    for key, array in declared.items():
        assert t.data[key].shape == array.shape, key
        assert t.data[key].dtype == np.dtype(array.dtype), key
        assert not array.trainable or array.dtype == "float32", key
    assert t.nbytes == t.format.nbytes(shape)


@pytest.mark.parametrize("name", NAMES)
def test_fit_keeps_to_the_budget(name):
    shape, found = (3000, 64), 0
    for share in (0.001, 0.015, 0.03, 0.0625, 0.125, 0.25, 0.5, 0.9, 1.5):
        budget = int(shape[0] * shape[1] * 4 * share)
        for dtype in ("float32", "float16"):
            got = FORMATS[name].fit(shape, budget, dtype)
            if got is not None:
                found += 1
                assert got.nbytes(shape, dtype) <= budget, (share, got)
    assert found, "no budget up to 150 % of float32 gives any parameters"


@pytest.mark.parametrize("name", NAMES)
def test_text_and_config_give_the_format_back(name):
    found = checks.some_format(name, checks.SHAPES[0])
    assert lutra.compress.format(found.describe()) == found
    assert lutra.compress.format(found.config()) == found
    with pytest.raises(ValueError, match="no parameter 'nonsense'"):
        lutra.compress.format(name, nonsense=1)


@pytest.mark.parametrize("name", NAMES)
def test_encoding_is_repeatable_and_better_than_nothing(name):
    shape = checks.SHAPES[0]
    t = case_table(name, shape)
    again = t.format.encode(checks.dense(shape), seed=1, progress=False)
    for key in t.data:
        assert np.array_equal(t.data[key], again[key]), key
    dense = checks.dense(shape)
    assert np.square(t.decode() - dense).sum() < np.square(dense).sum()


@pytest.mark.parametrize("name", NAMES)
def test_initial_rows_are_about_standard_normal(name):
    shape = (200, 32)
    found = checks.some_format(name, shape)
    data = found.initial(shape, seed=3)
    t = Table(found, shape, data)
    rows = t.decode()
    assert np.isfinite(rows).all()
    assert 0.75 < rows.std() < 1.3, rows.std()
    assert np.abs(rows).max(1).min() > 0, "a row that could never be trained"
    again = found.initial(shape, seed=3)
    assert all(np.array_equal(data[k], again[k]) for k in data)


@pytest.mark.parametrize("name", NAMES)
def test_file(name, tmp_path):
    t = case_table(name, checks.SHAPES[1])
    t.save(tmp_path / "t.safetensors")
    back = Table.load(tmp_path / "t.safetensors")
    assert back.format == t.format and back.shape == t.shape
    assert all(np.array_equal(back.data[k], t.data[k]) for k in t.data)


@pytest.mark.parametrize("name", NAMES)
def test_resize(name):
    shape = checks.SHAPES[0]
    t = case_table(name, shape)
    new = checks.dense((9, shape[1]))
    for keep, values in ((shape[0], new), (50, new[:0]), (50, new)):
        rows = keep + len(values)
        found, data = t.format.resize(t.data, shape, values, keep)
        grown = Table(found, (rows, shape[1]), data).decode()
        assert grown.shape == (rows, shape[1])
        old = t.decode()[:keep]
        assert np.square(grown[:keep] - old).sum() <= 0.6 * np.square(old).sum() + 1e-6


# ---------------------------------------------------------------- rows and bags
@pytest.mark.parametrize("name, shape", CASES)
def test_rows(name, shape, simd_level):
    t = case_table(name, shape)
    ids = np.random.default_rng(0).integers(0, shape[0], 50)
    want = t.format.rows(t.data, shape, ids)
    close(t.format.gather(t.data, shape, ids), want, "NumPy")
    close(t.format.gather(t.data, shape, ids[:0]), want[:0], "none")
    tt = checks.as_torch(t)
    for kind in (torch.int64, torch.int32):
        close(tt.format.gather(tt.data, shape, torch.from_numpy(ids).to(kind)), want, "torch")
    close(tt.format.lookup(tt.data, shape, torch.from_numpy(ids)), want, "composition")
    wide = checks.as_torch(t, torch.float64)
    close(wide.format.gather(wide.data, shape, torch.from_numpy(ids)), want, "float64")


def bags(rows):
    """(ids, offsets, weights, options) of several kinds."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, rows, 60)
    offsets = np.array([0, 3, 3, 20, 59])
    weights = rng.standard_normal(60).astype(np.float32)
    for mode in ("sum", "mean", "max"):
        yield ids.reshape(12, 5), None, None, {"mode": mode}
        yield ids, offsets, None, {"mode": mode, "padding_idx": int(ids[4])}
    yield ids, np.append(offsets, 60), weights, {"include_last_offset": True}
    yield ids.reshape(6, 10), None, weights.reshape(6, 10), {"padding_idx": -1}
    yield ids[:0], np.zeros(2, np.int64), None, {}


@pytest.mark.parametrize("name, shape", CASES)
def test_bags(name, shape, simd_level):
    t = case_table(name, shape)
    tt = checks.as_torch(t)
    for ids, offsets, weights, options in bags(shape[0]):
        want = checks.bag(t, ids, offsets, weights, **options)
        close(lutra.gather.bag(t, ids, offsets, weights, **options), want, str(options), 10)
        arrays = [None if a is None else torch.from_numpy(a) for a in (ids, offsets, weights)]
        close(lutra.gather.bag(tt, *arrays, **options), want, f"torch {options}", 10)


@pytest.mark.parametrize("name", NAMES)
def test_bad_ids(name):
    t = case_table(name, checks.SHAPES[0])
    rows = t.shape[0]
    for given in (t, checks.as_torch(t)):
        for bad in ([[0, rows]], [[-1, 0]]):
            ids = np.array(bad)
            if given is not t:
                ids = torch.from_numpy(ids)
            with pytest.raises(IndexError):
                lutra.gather.bag(given, ids)
            with pytest.raises(IndexError):
                given.format.gather(given.data, given.shape, ids.reshape(-1))
        floats = np.zeros((1, 2), np.float32)
        with pytest.raises(TypeError):
            lutra.gather.bag(given, floats if given is t else torch.from_numpy(floats))


# ---------------------------------------------------------------- gradients
def trainable(t):
    return {k: v for k, v in t.data.items() if v.requires_grad}


@pytest.mark.parametrize("name, shape", CASES)
@pytest.mark.parametrize("mode", ("sum", "mean", "max"))
def test_gradients(name, shape, mode):
    """The kernels' gradients are those of the composition in torch's own ops, in float64."""
    t = case_table(name, shape)
    fast, slow = checks.as_torch(t), checks.as_torch(t, torch.float64)
    for ids, offsets, weights, options in bags(shape[0]):
        if options.get("mode", "sum") != mode:
            continue
        gradients = []
        for given, dtype in ((fast, torch.float32), (slow, torch.float64)):
            arrays = [None if a is None else torch.from_numpy(a) for a in (ids, offsets, weights)]
            if arrays[2] is not None:
                arrays[2] = arrays[2].to(dtype).requires_grad_(True)
            if given is fast:
                out = lutra.gather.bag(given, *arrays, **options)
            else:
                rows = given.format.lookup(given.data, shape, torch.arange(shape[0]))
                out = lutra.gather.bag(rows, *arrays, **options)
            torch.manual_seed(0)
            loss = (out * torch.randn(out.shape, dtype=torch.float64).to(dtype)).sum()
            inputs = [*trainable(given).values(), *(a for a in arrays[2:] if a is not None)]
            gradients.append(
                torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else ()
            )
        names = [*trainable(fast), "weights"]
        for key, got, want in zip(names, *gradients):
            got = torch.zeros(1) if got is None else got.to_dense() if got.is_sparse else got
            want = torch.zeros(1) if want is None else want
            scale = 1 + float(want.abs().max()) if want.numel() else 1
            assert torch.allclose(got.double(), want, atol=1e-4 * scale, rtol=1e-3), (key, options)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_single_rows(name):
    shape = checks.SHAPES[1]
    t = case_table(name, shape)
    ids = torch.tensor([0, 5, 5, 64, 1])
    gradients = []
    for dtype, function in ((torch.float32, "gather"), (torch.float64, "lookup")):
        given = checks.as_torch(t, dtype)
        if not trainable(given):
            pytest.skip(f"{name} has no trainable array")
        out = getattr(given.format, function)(given.data, shape, ids)
        torch.manual_seed(0)
        weight = torch.randn(out.shape, dtype=torch.float64).to(dtype)
        gradients.append(torch.autograd.grad((out * weight).sum(), list(trainable(given).values())))
    for key, got, want in zip(trainable(given), *gradients):
        scale = 1 + float(want.abs().max())
        assert torch.allclose(got.double(), want, atol=1e-4 * scale, rtol=1e-3), key


@pytest.mark.parametrize("name", NAMES)
def test_gradients_do_not_depend_on_threads(name, threads):
    shape = (300, 16)
    t = checks.table(name, shape)
    given = checks.as_torch(t)
    ids = torch.randint(0, 300, (400, 20), generator=torch.Generator().manual_seed(0))
    out = lutra.gather.bag(given, ids)
    got = [out.detach()]
    if trainable(given):
        got += torch.autograd.grad(out.square().sum(), list(trainable(given).values()))
    key = (name, "threads")
    first = _first.setdefault(key, got)
    assert all(torch.equal(a, b) for a, b in zip(first, got))


_first: dict = {}


def test_names_are_unique_and_fields_plain():
    assert len({cls.layer for cls in FORMATS.values()}) == len(FORMATS)
    for name, cls in FORMATS.items():
        assert cls.name == name and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen


# ---------------------------------------------------------------- errors
def test_unknown_format():
    with pytest.raises(ValueError, match="format must be one of"):
        lutra.compress.format("zip")
    with pytest.raises(ValueError, match="must read parameter=value"):
        lutra.compress.format("low_rank:4")


def test_bad_tables():
    good = checks.dense((20, 8))
    with pytest.raises(ValueError, match=r"table\[3\] holds NaN"):
        bad = good.copy()
        bad[3, 2] = np.nan
        lutra.compress.encode(bad, "low_rank", rank=2)
    with pytest.raises(TypeError, match="dtype"):
        lutra.compress.encode(good.astype(np.int32), "low_rank", rank=2)
    with pytest.raises(ValueError, match="2-d"):
        lutra.compress.encode(good[0], "low_rank", rank=2)
    with pytest.raises(ValueError, match="counts"):
        lutra.compress.encode(good, "low_rank", rank=2, counts=np.ones(3))


def test_damaged_files(tmp_path):
    path = tmp_path / "t.safetensors"
    lutra.compress.encode(checks.dense((20, 8)), "low_rank", rank=2).save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"damaged|no table"):
            Table.load(path)
    path.write_bytes(whole.replace(b"low_rank", b"low_bank"))
    with pytest.raises(ValueError, match="format"):
        Table.load(path)
