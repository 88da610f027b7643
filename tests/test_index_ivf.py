"""IVF and Codes against brute force, in every form of their lists."""

import copy
import json
import pickle
import threading
import warnings

import numpy as np
import pytest

import lutra
from lutra import _backend
from lutra.index import IVF, Codes, Flat, load
from lutra.quant import PQ, RQ, SQ, RotatedSQ
from lutra.quant._bits import pack, unpack
from lutra.reference.lists import scalar_codes

METRICS = ["l2", "ip", "cosine"]
D = 24


def vectors(n, d=D, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def quantizers():
    """One of each kind that this lutra has, trained on less than is advisable."""
    made = {"PQ4": PQ(D, 12, 4), "PQ5": PQ(D, 12, 5), "PQ6": PQ(D, 8, 6), "PQ8": PQ(D, 6, 8)}
    for name, arguments in {
        "OPQ": (D, 6, 4), "RQ": (D, 4, 4), "SQ": (D, "8bit"), "SQ6": (D, "6bit"), "SQ16": (D, "fp16"),
        "RaBitQ": (D,), "RotatedSQ": (D,), "RotatedSQ7": (D, 7), "RQ6": (D, 3, 6),
    }.items():  # fmt: skip
        made[name] = getattr(lutra.quant, name.rstrip("0123456789"))(*arguments)
    return made


def trained(index, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index.train(x)
    return index


def flat(x, metric, ids=None):
    index = Flat(x.shape[1], metric)
    index.add(x, ids)
    return index


def recall(found, want):
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, want)]) / want.shape[1]


def close(got, want, rtol=1e-5):
    """Equal ids but for near ties, close scores."""
    np.testing.assert_allclose(got.scores, want.scores, rtol=rtol, atol=1e-4)
    differ = got.ids != want.ids
    assert differ.mean() < 0.01
    np.testing.assert_allclose(got.scores[differ], want.scores[differ], rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "nlist"), [(1, 1), (17, 3), (65, 33), (3000, 50)])
def test_all_lists_are_brute_force(simd_level, n, nlist, metric):
    x, q = vectors(n), vectors(9, seed=1)
    index = trained(IVF(D, nlist, metric=metric, nprobe=nlist), x)
    ids = np.random.default_rng(2).choice(10**12, n, replace=False)
    index.add(x, ids)
    want = flat(x, metric, ids)
    for k in (1, 10, 70):
        close(index.search(q, k), want.search(q, k))


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("store", ["float32", "float16", "bfloat16", "int8"])
def test_integers_are_found_exactly(store, metric):
    if store == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    x, q = (rng.integers(-4, 5, (n, 7)).astype(np.float32) for n in (900, 20))
    for soar in (False, True):
        index = trained(IVF(7, 11, store, metric, nprobe=11, soar=soar), x)
        index.add(x)
        got, want = index.search(q, 40), flat(x, metric).search(q, 40)
        np.testing.assert_array_equal(got.ids, want.ids)  # with all their ties
        np.testing.assert_array_equal(got.scores, want.scores)
        np.testing.assert_array_equal(index.reconstruct([3, 3, 899]), x[[3, 3, 899]])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", quantizers())
@pytest.mark.parametrize("residual", [True, False, None], ids=["residual", "plain", "flat"])
def test_scores_are_those_of_the_decoded_vectors(name, residual, metric):
    x, q = vectors(1500), vectors(21, seed=1)
    quantizer = quantizers()[name]
    if residual is None:
        index = Codes(quantizer, metric)
    else:
        index = IVF(D, 9, quantizer, metric, residual=residual, nprobe=9)
    trained(index, x).add(x)
    decoded = index.reconstruct(np.arange(1500))
    unit = q / np.linalg.norm(q, axis=1, keepdims=True) if metric == "cosine" else q
    inner = "ip" if metric == "cosine" else metric
    got, want = index.search(q, 1500), flat(decoded, inner).search(unit, 1500)
    scores = np.empty((2, 21, 1500), np.float32)
    for a, r in zip(scores, (got, want)):
        np.put_along_axis(a, r.ids, r.scores, 1)
    if name == "RaBitQ":  # whose estimate is not the product with what it decodes
        assert recall(got.ids[:, :100], flat(x, metric).search(q, 100).ids) > 0.3
    else:
        # fast tables are rounded: to a part of the spread of the scores
        np.testing.assert_allclose(*scores, rtol=1e-4, atol=0.05 * np.ptp(scores[1]))
        assert recall(got.ids[:, :50], want.ids[:, :50]) > 0.85


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["8bit", "6bit"])
@pytest.mark.parametrize("residual", [True, False, None], ids=["residual", "plain", "flat"])
@pytest.mark.parametrize("d", [1, 5, 35])
def test_scalar_codes_lose_nothing_but_rounding(simd_level, d, residual, kind, metric):
    """Far from the origin, where expanded squares would cancel; single queries, few and many."""
    x, q = vectors(700, d) + 100, vectors(23, d, seed=1) + 100
    if residual is None:
        index = Codes(SQ(d, kind), metric)
    else:
        index = IVF(d, 5, SQ(d, kind), metric, residual=residual, nprobe=5)
    trained(index, x).add(x)
    decoded = index.reconstruct(np.arange(700)).astype(np.float64)
    unit = q.astype(np.float64)
    if metric == "cosine":
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    want = np.square(unit[:, None] - decoded).sum(2) if metric == "l2" else unit @ decoded.T
    # a value of 100 is off by up to 2^-17, and so the difference that is squared
    atol = {"l2": 1e-4 * d, "ip": 2e-3 * d, "cosine": 1e-6}[metric]
    for batch in (1, 3, 23):
        got = index.search(q[:batch], 700)
        assert (np.sort(got.ids, 1) == np.arange(700)).all()
        np.testing.assert_allclose(
            got.scores, np.take_along_axis(want[:batch], got.ids, 1), rtol=1e-6, atol=atol
        )


@pytest.mark.parametrize("refine", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("soar", [False, True])
@pytest.mark.parametrize("name", ["PQ4", "PQ5", "SQ6"])
def test_refine(name, refine, soar):
    if refine == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, q = vectors(3000), vectors(15, seed=1)
    for metric in METRICS:
        index = IVF(D, 20, quantizers()[name], metric, refine=refine, nprobe=20, soar=soar)
        trained(index, x[:1000])
        index.add(x)
        index.refine_factor = 30
        want = flat(index.reconstruct(np.arange(3000)), metric).search(q, 10)
        got = index.search(q, 10)
        assert recall(got.ids, want.ids) > 0.97
        same = got.ids == want.ids
        np.testing.assert_allclose(got.scores[same], want.scores[same], rtol=1e-4, atol=1e-4)
        assert recall(index.search(q, 10, refine_factor=0).ids, want.ids) < recall(got.ids, want.ids)
        bound = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 250}[refine]
        assert np.abs(index.reconstruct(np.arange(3000)) - x).max() <= bound * np.abs(x).max()


def test_more_lists_find_more():
    x, q = vectors(4000), vectors(40, seed=1)
    want = flat(x, "l2").search(q, 10).ids
    index, twice = (trained(IVF(D, 64, soar=soar), x) for soar in (False, True))
    found = []
    for i in (index, twice):
        i.add(x)
        found.append([recall(i.search(q, 10, nprobe=n).ids, want) for n in (1, 4, 16, 64, 1000)])
        assert all(a < b or a == b == 1 for a, b in zip(found[-1], found[-1][1:])) and found[-1][-2] == 1
    assert found[1][1] > found[0][1]  # SOAR's second lists
    assert twice.list_sizes.sum() == 2 * index.list_sizes.sum() == 8000
    ids = twice.search(q, 400, nprobe=64).ids
    assert all(len(np.unique(row)) == 400 for row in ids)  # nobody twice


def test_imbalance():
    x = vectors(600)
    index = trained(IVF(D, 4), x)
    assert index.imbalance_factor() == 1
    index.add(x)
    sizes = index.list_sizes
    assert index.imbalance_factor() == pytest.approx(4 * (sizes**2).sum() / 600**2)
    assert f"imbalance={index.imbalance_factor():.2f}" in repr(index)


@pytest.mark.parametrize("make", [
    lambda: IVF(D, 30, nprobe=7), lambda: IVF(D, 30, PQ(D, 6, 8), nprobe=7),
    lambda: IVF(D, 30, PQ(D, 12, 4), refine="float32", nprobe=7, soar=True), lambda: Codes(PQ(D, 12, 4)),
    lambda: IVF(D, 30, SQ(D), nprobe=7), lambda: Codes(SQ(D, "6bit"), "cosine"),
    lambda: IVF(D, 30, PQ(D, 8, 6), nprobe=7), lambda: Codes(RotatedSQ(D, 5)),
])  # fmt: skip
def test_batches_and_threads_change_no_bit(make):
    x, q = vectors(20_000 if _backend.core else 3000), vectors(130, seed=1)
    index = trained(make(), x[:3000])
    index.add(x)
    before = lutra.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3) if _backend.core else (1,):
            lutra.set_num_threads(threads)
            whole = index.search(q, 20)
            results.append(whole)
            for part in (slice(0, 1), slice(50, 53), slice(7, 110)):
                for a, b in zip(index.search(q[part], 20), whole):
                    np.testing.assert_array_equal(a, b[part])
    finally:
        lutra.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            np.testing.assert_array_equal(a, b)


def test_filters():
    x, q = vectors(2000), vectors(5, seed=1)
    ids = np.arange(2000) * 3 + 5
    for index in (IVF(D, 20, nprobe=20), IVF(D, 20, "float16", nprobe=20), IVF(D, 20, PQ(D, 6, 8), nprobe=20),
                  Codes(PQ(D, 6, 8)), Codes(SQ(D)), IVF(D, 20, SQ(D, "6bit"), nprobe=20),
                  IVF(D, 20, PQ(D, 12, 4), nprobe=20), Codes(PQ(D, 12, 4))):  # fmt: skip
        trained(index, x).add(x, ids)
        every = index.search(q, 2000)
        chosen = np.random.default_rng(1).choice(ids, 300, replace=False)
        mask = np.zeros(6005, bool)
        mask[chosen] = True
        for f in (
            chosen.tolist(), chosen, mask, np.packbits(mask, bitorder="little"),
            lambda i, chosen=chosen: np.isin(i, chosen),
        ):  # fmt: skip
            got = index.search(q, 310, filter=f)
            for row, (found, order) in enumerate(zip(got.ids, every.ids)):
                np.testing.assert_array_equal(found[:300], order[np.isin(order, chosen)])
                assert (found[300:] == -1).all() and np.isinf(got.scores[row, 300:]).all()
        none = index.search(q, 3, filter=[])
        assert (none.ids == -1).all()


FORMS = {
    "rows": lambda: IVF(D, 12, nprobe=5),
    "float16": lambda: IVF(D, 12, "float16", "cosine", nprobe=5),
    "codes8": lambda: IVF(D, 12, PQ(D, 6, 8), "ip", refine="float16", nprobe=5),
    "codes4": lambda: IVF(D, 12, PQ(D, 12, 4), refine="int8", nprobe=5, soar=True),
    "one list": lambda: IVF(D, 1, PQ(D, 12, 4)),
    "flat8": lambda: Codes(PQ(D, 6, 8), "cosine"),
    "flat4": lambda: Codes(PQ(D, 12, 4), refine="float32"),
    "scalar8": lambda: IVF(D, 12, SQ(D), "ip", refine="float16", nprobe=5),
    "scalar6": lambda: IVF(D, 12, SQ(D, "6bit"), nprobe=5, soar=True),
    "flat scalar6": lambda: Codes(SQ(D, "6bit"), "cosine"),
    "codes6": lambda: IVF(D, 12, PQ(D, 6, 6), refine="float16", nprobe=5, soar=True),
    "flat5": lambda: Codes(PQ(D, 12, 5)),
    "flat7": lambda: Codes(RotatedSQ(D, 7)),
    "residual 5": lambda: IVF(D, 12, RQ(D, 5, 5), nprobe=5),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mmap", [True, False])
def test_files(tmp_path, name, mmap):
    x, q = vectors(1200), vectors(9, seed=1)
    index = FORMS[name]()
    index.save(tmp_path / "untrained")
    assert not load(tmp_path / "untrained", mmap=mmap).is_trained
    trained(index, x)
    index.save(tmp_path / "empty")
    path = tmp_path / "index"
    for first in (0, 1000, 1010):
        index.add(x[first : first + (1000 if first == 0 else 10 if first == 1000 else 190)])
    index.save(path)
    again = load(path, mmap=mmap)
    for i in (again, load(tmp_path / "empty", mmap=mmap)):
        if i is not again:
            i.add(x)
        assert repr(i) == repr(index)
        for a, b in zip(i.search(q, 12), index.search(q, 12)):
            np.testing.assert_array_equal(a, b)
    some = [0, 5, 1199]
    np.testing.assert_array_equal(again.reconstruct(some), index.reconstruct(some))
    for i in (again, index):  # and it goes on living
        i.remove_ids(np.arange(0, 1200, 3))
        i.add(x[:100])
        i.compact()
    for a, b in zip(again.search(q, 12), index.search(q, 12)):
        np.testing.assert_array_equal(a, b)
    again.save(path)
    for a, b in zip(load(path).search(q, 12), index.search(q, 12)):
        np.testing.assert_array_equal(a, b)


def write_layout_1(index, path):
    """The file that lutra wrote before codes were stored as they are scanned."""
    safetensors = pytest.importorskip("safetensors.numpy")
    index.save(path)
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    config = json.loads(metadata["config"])
    assert config.pop("layout") == 2
    metadata["config"] = json.dumps(config)
    tensors = safetensors.load_file(path)
    quantizer, codes = index.quantizer, tensors["codes"]
    n, size = 16 * len(codes), quantizer.code_size
    rows = codes.transpose(0, 2, 1, 3).reshape(n, -1)
    if quantizer.scan == "decode":
        rows = pack(scalar_codes(rows, quantizer.bits, D), quantizer.bits)
        assert rows.shape == (n, size)
    elif quantizer.scan == "lut8":
        rows = unpack(rows, quantizer.m, quantizer.bits)
    else:
        return safetensors.save_file(tensors, path, metadata)
    tensors["codes"] = np.ascontiguousarray(rows.reshape(-1, 1, 16, rows.shape[1]))
    safetensors.save_file(tensors, path, metadata)


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("rows", "float16")])
@pytest.mark.parametrize("mmap", [True, False])
def test_files_of_layout_1(tmp_path, monkeypatch, name, mmap):
    monkeypatch.setattr("lutra.index._coded._UPGRADED", 7)
    x, q = vectors(1200), vectors(9, seed=1)
    index = trained(FORMS[name](), x)
    index.add(x[:1100])
    write_layout_1(index, tmp_path / "old")
    old = load(tmp_path / "old", mmap=mmap)
    for i in (index, old):
        i.add(x[1100:])
    for a, b in zip(old.search(q, 12), index.search(q, 12)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(old.reconstruct([0, 1150]), index.reconstruct([0, 1150]))


@pytest.mark.parametrize("quantizer", [
    PQ(128, 16, 5), PQ(128, 64, 5), PQ(128, 32, 6), PQ(128, 16, 7), PQ(128, 16, 8), SQ(128), SQ(128, "6bit"),
    RotatedSQ(128, 5), RotatedSQ(128, 7),
], ids=repr)  # fmt: skip
def test_codes_take_their_bytes(quantizer):
    """Less than a tenth more, without what the quantizer itself takes."""
    x = vectors(2000, 128)
    index = Codes(quantizer, "ip" if isinstance(quantizer, RotatedSQ) else "l2")
    trained(index, x[:300]).add(x)
    index.compact()
    own = sum(a.nbytes for a in quantizer._tensors().values())
    assert index.nbytes - own <= 1.10 * 2000 * quantizer.code_size
    held = sum(a.nbytes for a in index._lists.arrays.values())
    assert 2000 * quantizer.code_size <= held <= 1.10 * 2000 * quantizer.code_size


def test_an_unknown_layout_is_refused(tmp_path):
    index = Codes(SQ(D))
    trained(index, vectors(50)).add(vectors(50))
    index.save(tmp_path / "x")
    raw = (tmp_path / "x").read_bytes().replace(rb"\"layout\": 2", rb"\"layout\": 3")
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(ValueError, match=r"x: .*'layout' must be an integer from 1 to 2, it is 3"):
        load(tmp_path / "x")


def test_damaged_files(tmp_path):
    x = vectors(500)
    index = trained(IVF(D, 8, PQ(D, 6, 8), nprobe=8), x)
    index.add(x)
    index.save(tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])

    def change(name, values):
        begin = 8 + length + header[name]["data_offsets"][0]
        return raw[:begin] + values + raw[begin + len(values) :]

    for name, values, message in (
        ("list_rows", np.array([10**6], np.int64), "the lists hold"),
        ("list_rows", np.array([-5], np.int64), "the lists hold"),
        ("centroids", np.array([np.nan], np.float32), "centroids hold NaN"),
        ("quantizer.codebooks", np.array([np.inf], np.float32), "holds NaN or infinities"),
    ):
        (tmp_path / "y").write_bytes(change(name, values.tobytes()))
        with pytest.raises(ValueError, match=f"y: .*{message}"):
            load(tmp_path / "y")
    (tmp_path / "y").write_bytes(change("positions", np.array([10**6], np.int32).tobytes()))
    with pytest.raises(ValueError, match=r"damaged|not below"):
        load(tmp_path / "y").search(x[:3], 500)


def test_searches_while_another_thread_adds():
    x = vectors(6000)
    index = trained(IVF(D, 16, PQ(D, 12, 4), refine="float32", nprobe=16), x)
    index.add(x[:1000])
    index.refine_factor = 400
    stop, wrong, searches = threading.Event(), [], []

    def search():
        while not stop.is_set():
            before = index.ntotal
            got = index.search(x[:4], 10)
            after = index.ntotal
            searches.append(1)
            fits = got.ids.max() < after and (got.ids[:, 0] == np.arange(4)).all() and before <= after
            if not fits or (got.ids < 0).any():
                wrong.append(got)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for t in threads:
        t.start()
    for i in range(1000, 6000, 250):
        index.add(x[i : i + 250])
    stop.set()
    for t in threads:
        t.join(30)
        assert not t.is_alive()
    assert searches and not wrong and len(index) == 6000


def test_errors():
    x = vectors(300)
    with pytest.raises(TypeError, match=r"quantizer must be one of lutra\.quant, or 'float32'"):
        IVF(D, 4, "int4")
    with pytest.raises(ValueError, match=r"quantizer has d = 8; the index has d = 24"):
        IVF(D, 4, PQ(8, 4))
    with pytest.raises(ValueError, match="refine must be None or one of"):
        IVF(D, 4, refine="float64")
    with pytest.raises(ValueError, match="soar needs two lists"):
        IVF(D, 1, soar=True)
    with pytest.raises(TypeError, match=r"quantizer must be one of lutra\.quant"):
        Codes("float32")
    index = IVF(D, 4)
    with pytest.raises(ValueError, match="this IVF is not trained"):
        index.add(x)
    with pytest.raises(ValueError, match="this IVF is not trained"):
        index.search(x)
    with pytest.raises(ValueError, match="x has 3 rows; at least 4 are needed"):
        index.train(x[:3])
    trained(index, x)
    with pytest.raises(ValueError, match="this IVF is empty"):
        index.search(x)
    index.add(x)
    with pytest.raises(ValueError, match="holds 300 vectors in its lists"):
        index.train(x)
    with pytest.raises(ValueError, match="nprobe must be >= 1, got 0"):
        index.search(x, nprobe=0)
    with pytest.raises(ValueError, match="refine_factor is 2, but the index keeps no vectors"):
        index.search(x, refine_factor=2)
    with pytest.raises(ValueError, match="q has 3 columns"):
        index.search(x[:, :3])
    bad = x[:5].copy()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"q\[3, 2\] is nan"):
        index.search(bad)
    with pytest.raises(ValueError, match=r"x\[3, 2\] is nan"):
        index.add(bad)
    assert len(index) == 300
    whole = trained(IVF(D, 4, "int8"), x)
    with pytest.raises(ValueError, match=r"x\[0, 0\] is .*integers from -128 to 127"):
        whole.add(x)
    assert len(whole) == 0
    half = trained(IVF(D, 4, PQ(D, 6, 4), refine="float16"), x)
    with pytest.raises(ValueError, match=r"beyond float16, in which refine='float16' keeps"):
        half.add(x * 1e6)


def test_copies():
    x, q = vectors(500), vectors(3, seed=1)
    index = trained(IVF(D, 8, PQ(D, 6, 8), nprobe=3), x)
    index.add(x)
    want = index.search(q, 5)
    for twin in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        twin.add(x)
        np.testing.assert_array_equal(index.search(q, 5).ids, want.ids)
        assert len(twin) == 1000 and twin.search(q, 5).ids[0, 0] == want.ids[0, 0]


def test_a_batch_in_parts(monkeypatch):
    x, q = vectors(500), vectors(50, seed=1)
    index = trained(IVF(D, 8, PQ(D, 12, 4), refine="float16", nprobe=3), x)
    index.add(x)
    want = index.search(q, 5)
    monkeypatch.setattr("lutra.index._coded._PROBES", 21)
    got = index.search(q, 5)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.scores, want.scores)


def test_torch():
    torch = pytest.importorskip("torch")
    x, q = vectors(800), vectors(5, seed=1)
    index = trained(IVF(D, 8, nprobe=3), torch.from_numpy(x))
    index.add(torch.from_numpy(x).double())
    got = index.search(torch.from_numpy(q), 4)
    assert isinstance(got.ids, torch.Tensor) and got.ids.dtype == torch.int64
    np.testing.assert_array_equal(got.ids.numpy(), index.search(q, 4).ids)
