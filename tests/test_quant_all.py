"""What holds for every quantizer: the linear form, files, errors, libraries, seeds and batches."""

from __future__ import annotations

import json

import numpy as np
import pytest

import lutra
from lutra import quant

MAKERS = {
    "PQ4": lambda d, **o: quant.PQ(d, d // 4, 4, **o),
    "PQ6": lambda d, **o: quant.PQ(d, d // 4, 6, **o),
    "OPQ3": lambda d, **o: quant.OPQ(d, d // 2, 3, **o),
    "RQ4": lambda d, **o: quant.RQ(d, 5, 4, **o),
    "RQ5": lambda d, **o: quant.RQ(d, 3, 5, beam=1, **o),
    "SQ8": lambda d: quant.SQ(d, "8bit"),
    "SQ6": lambda d: quant.SQ(d, "6bit"),
    "SQ4": lambda d: quant.SQ(d, "4bit"),
    "fp16": lambda d: quant.SQ(d, "fp16"),
    "bf16": lambda d: quant.SQ(d, "bf16"),
    "RaBitQ1": lambda d, **o: quant.RaBitQ(d, 1, **o),
    "RaBitQ3": lambda d, **o: quant.RaBitQ(d, 3, **o),
    "RaBitQ8": lambda d, **o: quant.RaBitQ(d, 8, center=False, **o),
    "RotatedSQ2": lambda d, **o: quant.RotatedSQ(d, 2, **o),
    "RotatedSQ4": lambda d, **o: quant.RotatedSQ(d, 4, **o),
    "RotatedSQ7": lambda d, **o: quant.RotatedSQ(d, 7, **o),
}
SEEDED = [name for name, make in MAKERS.items() if name[:2] not in ("SQ", "fp", "bf")]
pytestmark = pytest.mark.filterwarnings("ignore:.*advisable")


def cloud(n, d, seed=0):
    rng = np.random.default_rng([seed, d])
    centres = np.random.default_rng(d).standard_normal((5, d))
    return (0.3 + centres[rng.integers(0, 5, n)] + 0.4 * rng.standard_normal((n, d))).astype(np.float32)


@pytest.fixture(scope="module", params=MAKERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def quantizer(name):
    return MAKERS[name](20).train(cloud(300, 20))


def test_decoded_codes_are_near(quantizer, name):
    x = cloud(200, 20, 1)
    codes = quantizer.encode(x)
    assert codes.dtype == np.uint8
    assert codes.shape == (200, quantizer.code_size)
    error = np.square(x - quantizer.decode(codes)).sum() / np.square(x - x.mean(0)).sum()
    limit = {"RaBitQ1": 0.9, "RotatedSQ2": 0.2, "SQ4": 0.05, "RaBitQ3": 0.08, "RotatedSQ4": 0.02}
    assert error < limit.get(name, 0.35 if name[0] in "PORQ" and name[-1] in "3456" else 0.005)


def test_linear_form(quantizer):
    x, q = cloud(40, 20, 2), cloud(7, 20, 3)
    codes = quantizer.encode(x)
    decoded = quantizer.decode(codes).astype(np.float64)
    add, mul = quantizer.row_terms(codes)
    if quantizer.scan == "decode":
        assert add is None
        assert mul is None
        with pytest.raises(ValueError, match="not scanned by look-ups"):
            quantizer.tables(q)
        with pytest.raises(ValueError, match="not scanned by look-ups"):
            quantizer.entries(codes)
        return
    entries = quantizer.entries(codes)
    assert entries.shape == (40, quantizer.m)
    lut, bias = quantizer.tables(q, "ip")
    assert lut.dtype == np.float32
    assert lut.shape[:2] == (7, quantizer.m)
    assert lut.shape[2] == 16 if quantizer.scan == "lut4" else 16 <= lut.shape[2] <= 256
    linear = sum(lut[:, j, entries[:, j]].astype(np.float64) for j in range(quantizer.m))
    linear *= 1 if mul is None else mul
    linear += (0 if add is None else add) + (0 if bias is None else bias[:, None])
    expected = q @ decoded.T
    if isinstance(quantizer, quant.RaBitQ) and quantizer.center:
        # which knows <c, x - c> of a row: the estimate is of <q - c, decoded - c> only
        expected += (x.astype(np.float64) - decoded) @ quantizer.mean
    np.testing.assert_allclose(linear, expected, atol=5e-4)
    norms = quantizer.norms(codes)
    own = np.square(x.astype(np.float64) if isinstance(quantizer, quant.RaBitQ) else decoded).sum(1)
    np.testing.assert_allclose(norms, own, rtol=1e-4)
    distances = quantizer.tables(q, "l2")
    if distances is not None:
        sums = sum(distances.lut[:, j, entries[:, j]] for j in range(quantizer.m))
        np.testing.assert_allclose(sums, np.square(q[:, None] - decoded).sum(-1), rtol=1e-4, atol=1e-4)


def test_batches_and_threads_change_nothing(quantizer, threads):
    x = cloud(97, 20, 4)
    codes = quantizer.encode(x)
    parts = [quantizer.encode(x[i : i + step]) for i, step in ((0, 1), (1, 2), (3, 17), (20, 77))]
    np.testing.assert_array_equal(np.concatenate(parts), codes)
    np.testing.assert_array_equal(quantizer.decode(codes[5:6]), quantizer.decode(codes)[5:6])
    if quantizer.scan != "decode":
        whole, one = quantizer.tables(x), quantizer.tables(x[50:51])
        np.testing.assert_array_equal(whole.lut[50], one.lut[0])
        if whole.bias is not None:
            assert whole.bias[50] == one.bias[0]


@pytest.mark.parametrize("name", SEEDED)
def test_seed(name):
    x = cloud(300, 20)
    same = [MAKERS[name](20, seed=5).train(x).encode(x) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(same[0], MAKERS[name](20, seed=6).train(x).encode(x))


def test_save_and_load(quantizer, tmp_path):
    path = tmp_path / "quantizer"
    quantizer.save(path)
    loaded = quant.load(path)
    assert repr(loaded) == repr(quantizer)
    assert loaded.is_trained
    x = cloud(50, 20, 5)
    codes = quantizer.encode(x)
    np.testing.assert_array_equal(loaded.encode(x), codes)
    np.testing.assert_array_equal(loaded.decode(codes), quantizer.decode(codes))
    with pytest.raises(ValueError, match="quantizer"):
        lutra.index.load(path)


def test_untrained(name, tmp_path):
    quantizer = MAKERS[name](20)
    quantizer.save(tmp_path / "untrained")
    assert quant.load(tmp_path / "untrained").is_trained == quantizer.is_trained == (name in ("fp16", "bf16"))
    if not quantizer.is_trained:
        for call in (quantizer.encode, quantizer.decode, quantizer.norms, quantizer.row_terms):
            with pytest.raises(ValueError, match=r"is not trained: call train"):
                call(np.zeros((1, 20), np.float32))


def test_other_libraries(quantizer):
    torch = pytest.importorskip("torch")
    x = cloud(33, 20, 6)
    codes = quantizer.encode(x)
    for given in (torch.from_numpy(x), torch.from_numpy(x).to(torch.bfloat16), torch.from_numpy(x).half()):
        coded = quantizer.encode(given)
        assert isinstance(coded, torch.Tensor)
        np.testing.assert_array_equal(coded.numpy(), quantizer.encode(given.float().numpy()))
        decoded = quantizer.decode(coded)
        assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(quantizer.encode(x.astype(np.float64)), codes)
    np.testing.assert_array_equal(quantizer.encode(np.asfortranarray(x)), codes)
    small = np.random.default_rng(0).integers(0, 3, (9, 20))
    np.testing.assert_array_equal(
        quantizer.encode(small.astype(np.int8)), quantizer.encode(small.astype(np.float32))
    )
    if quantizer.scan != "decode":
        assert isinstance(quantizer.tables(torch.from_numpy(x)).lut, torch.Tensor)
        assert isinstance(quantizer.entries(torch.from_numpy(codes)), torch.Tensor)
    assert isinstance(quantizer.norms(torch.from_numpy(codes)), torch.Tensor)


def test_nothing_coded(quantizer):
    none = quantizer.encode(np.zeros((0, 20), np.float32))
    assert none.shape == (0, quantizer.code_size)
    assert quantizer.decode(none).shape == (0, 20)
    assert quantizer.norms(none).shape == (0,)
    if quantizer.scan != "decode":
        assert quantizer.entries(none).shape == (0, quantizer.m)
        assert quantizer.tables(np.zeros((0, 20), np.float32)).lut.shape[:2] == (0, quantizer.m)


def test_any_bytes_are_a_code(quantizer):
    codes = np.random.default_rng(0).integers(0, 256, (300, quantizer.code_size)).astype(np.uint8)
    with np.errstate(all="ignore"):
        decoded = quantizer.decode(codes)
    assert decoded.shape == (300, 20)
    if quantizer.scan != "decode":
        entries = quantizer.entries(codes)
        assert entries.max() < (16 if quantizer.scan == "lut4" else 256)


def test_errors(quantizer):
    with pytest.raises(ValueError, match="x has 19 columns; the quantizer has d = 20"):
        quantizer.encode(np.zeros((2, 19), np.float32))
    with pytest.raises(ValueError, match="x must be 2-d"):
        quantizer.encode(np.zeros(20, np.float32))
    with pytest.raises(TypeError, match="x must be a NumPy"):
        quantizer.encode([[0.0] * 20])
    bad = np.zeros((5, 20), np.float32)
    bad[3, 7] = np.inf
    with pytest.raises(ValueError, match=r"x\[3, 7\] is inf"):
        quantizer.encode(bad)
    with pytest.raises(ValueError, match=r"codes must have shape \(n, \d+\)"):
        quantizer.decode(np.zeros((2, quantizer.code_size + 1), np.uint8))
    with pytest.raises(TypeError, match="codes has dtype float32"):
        quantizer.decode(np.zeros((2, quantizer.code_size), np.float32))
    if quantizer.is_trained and quantizer._layout():
        with pytest.raises(ValueError, match="x has 0 rows"):
            quantizer.train(np.zeros((0, 20), np.float32))


def test_constant_and_zero_vectors(name):
    x = np.full((300, 20), 2.5, np.float32)
    quantizer = MAKERS[name](20).train(x)
    decoded = quantizer.decode(quantizer.encode(x[:3]))
    limit = 0.01 if name == "RaBitQ8" else 1e-4
    np.testing.assert_allclose(decoded, x[:3], atol=2.5 * (limit if name != "RaBitQ8" else 0.05))
    assert np.isfinite(quantizer.decode(quantizer.encode(np.zeros((2, 20), np.float32)))).all()


# ---- files that are wrong
def rewritten(path, change):
    """The file with another header: ``change`` gets the header as a dict and may edit it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def with_config(**changes):
    def change(header):
        metadata = header["__metadata__"]
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **changes})

    return change


def with_kind(kind):
    return lambda header: header["__metadata__"].update(kind=kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_config(d=21), "do not describe a PQ"),
        (with_config(bits=3), r"'codebooks' is F32 \(5, 16, 4\); by the metadata it must be F32 \(5, 8, 4\)"),
        (with_config(bits="4"), "do not describe a PQ"),
        (with_config(surprise=1), "do not describe a PQ"),
        (with_config(trained=None), "no 'trained'"),
        (with_config(trained=False), "unexpected tensors"),
        (with_kind("quantizer QP"), "a quantizer of kind 'QP'; this lutra knows PQ, OPQ"),
        (with_kind("Flat"), "an index of kind 'Flat', not a quantizer"),
    ],
)
def test_wrong_metadata(tmp_path, change, message):
    path = tmp_path / "file"
    quant.PQ(20, 5, 4).train(cloud(300, 20)).save(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        quant.load(path)
    assert str(path) in str(caught.value)


def test_wrong_values(quantizer):
    tensors = {k: v.copy() for k, v in quantizer._tensors().items()}
    if not tensors:
        return
    fresh = quant.build(type(quantizer).__name__, quantizer._config())
    first = next(iter(tensors))
    with pytest.raises(ValueError, match="the state of"):
        fresh._restore({k: v for k, v in tensors.items() if k != first})
    with pytest.raises(ValueError, match=rf"'{first}' must be F32"):
        fresh._restore({**tensors, first: tensors[first][:0]})
    broken = tensors[first].copy()
    broken.flat[0] = np.nan
    with pytest.raises(ValueError, match=rf"'{first}' holds NaN"):
        fresh._restore({**tensors, first: broken})
    if "rotation" in tensors:
        with pytest.raises(ValueError, match="'rotation' is no rotation"):
            fresh._restore({**tensors, "rotation": 2 * tensors["rotation"]})
    assert not fresh.is_trained
    fresh._restore(tensors)
    x = cloud(9, 20, 7)
    np.testing.assert_array_equal(fresh.encode(x), quantizer.encode(x))


def test_truncated_and_damaged_files(tmp_path):
    path = tmp_path / "file"
    quant.RaBitQ(20, 2).train(cloud(300, 20)).save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    broken = tmp_path / "broken"
    loaded = 0
    for i in range(600):
        if i % 3 == 0:
            damaged = data[: rng.integers(0, len(data))]
        else:
            damaged = bytearray(data)
            for _ in range(int(rng.integers(1, 4))):
                damaged[rng.integers(0, len(data) if i % 3 == 1 else 500)] = rng.integers(0, 256)
        broken.write_bytes(damaged)
        try:
            quant.load(broken)
            loaded += 1
        except ValueError as error:
            assert str(broken) in str(error)
    assert loaded < 500  # small changes of a mean's or rotation's values cannot be told
