"""lutra.index.Blocks: its manners as an index; the scans themselves are in test_scan_blocks.py."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from lutra.index import Blocks, Flat, load

DTYPES = ["float32", "float16", "bfloat16", "int8", "pq"]
D, WIDTH = 64, 16


def sparse(rng, nq, d=D, width=WIDTH, share=0.5):
    q = rng.standard_normal((nq, d // width, width)).astype(np.float32)
    q[rng.random((nq, d // width)) > share] = 0
    return q.reshape(nq, d)


def block_rows(q, width=WIDTH):
    parts = q.reshape(len(q), -1, width)
    query, block = np.nonzero(parts.any(2))
    ptr = np.searchsorted(query, np.arange(len(q) + 1))
    return SimpleNamespace(ptr=ptr, blocks=block.astype(np.int32), values=parts[query, block])


def made(dtype, n=700, seed=0, ids=None):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(seed)
    index = Blocks(D, WIDTH, dtype)
    x = rng.standard_normal((n, D)).astype(np.float32)
    if dtype == "pq":
        assert not index.is_trained
        with pytest.warns(UserWarning, match="centroids"):
            index.train(x[:300] if n >= 300 else rng.standard_normal((300, D)), n_iter=2)
    index.add(x, ids)
    return index, x


@pytest.mark.parametrize("dtype", DTYPES)
def test_search_is_that_of_the_stored_vectors(dtype):
    index, x = made(dtype)
    rng = np.random.default_rng(1)
    q = sparse(rng, 9)
    vectors = index.reconstruct(index.ids)
    assert vectors.dtype == np.float32
    if dtype != "pq":
        limit = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 200}[dtype]
        assert (np.abs(vectors - x) <= limit * np.abs(x).max(1, keepdims=True) + 1e-7).all()
    exact = Flat(D)
    exact.add(vectors)
    want, got = exact.search(q, 20), index.search(q, 20)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4, atol=1e-4)
    assert (got.ids == want.ids).mean() > 0.98
    again = index.search_blocks(block_rows(q), 20)
    assert again.scores.tobytes() == got.scores.tobytes() and (again.ids == got.ids).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_files(dtype, tmp_path):
    index, _ = made(dtype, 300, ids=np.arange(300)[::-1] * 5)
    q = sparse(np.random.default_rng(1), 3)
    want = index.search(q, 7)
    index.save(tmp_path / "x")
    for mmap in (True, False):
        back = load(tmp_path / "x", mmap=mmap)
        assert repr(back) == repr(index) and back.nbytes == index.nbytes
        got = back.search(q, 7)
        assert got.scores.tobytes() == want.scores.tobytes() and (got.ids == want.ids).all()
        # mapped panels are copied when they are changed, the file is not
        extra = np.random.default_rng(2).standard_normal((40, D))
        for one in (back, copied := copy.deepcopy(index)):
            one.remove_ids([5, 0, 1000, 77])
            one.add(extra)
            one.remove_ids(np.arange(400) * 10)
        assert (back.ids == copied.ids).all()
        assert back.reconstruct(back.ids).tobytes() == copied.reconstruct(back.ids).tobytes()
    assert load(tmp_path / "x").search(q, 7).ids.tolist() == want.ids.tolist()
    again = pickle.loads(pickle.dumps(index))
    assert again.search(q, 7).ids.tolist() == want.ids.tolist()
    empty = Blocks(D, WIDTH, dtype)
    empty.save(tmp_path / "x")
    assert load(tmp_path / "x").ntotal == 0


def test_files_do_not_hold_what_was_removed(tmp_path):
    index, _ = made("float32", 10)
    index.add(np.full((3, D), 7.0))
    index.remove_ids([2, 10, 11, 12])
    index.save(tmp_path / "x")
    (panel,) = load_file(tmp_path / "x")["vectors"]
    assert (panel[..., 9:] == 0).all() and (panel[..., :9] != 0).any()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_any_changes(dtype, tmp_path):
    """Against a dict, over panel borders."""
    rng = np.random.default_rng(3)
    index, rows = Blocks(6, 2, dtype), {}
    for turn in range(40):
        if turn % 3 != 2:
            ids = rng.choice(10**6, int(rng.integers(0, 400)), replace=False)
            ids = np.array([i for i in ids if i not in rows], np.int64)
            x = rng.integers(-4, 5, (len(ids), 6)).astype(np.float32)
            x[:, 0] = 127  # so that int8 has a scale of 1
            index.add(x, ids)
            rows.update(zip(ids.tolist(), x))
        elif rows:
            gone = rng.choice(list(rows), int(rng.integers(1, len(rows))), replace=False)
            assert index.remove_ids(np.append(gone, -5)) == len(gone)
            for i in gone.tolist():
                del rows[i]
        if turn % 7 == 6:
            index.save(tmp_path / "x")
            index = load(tmp_path / "x", mmap=bool(turn % 2))
        assert index.ids.tolist() == list(rows)
        if rows:
            np.testing.assert_array_equal(index.reconstruct(index.ids), np.array(list(rows.values())))
            q = np.array([[0, 0, 1, 2, 0, 0]], np.float32)
            scores = np.array(list(rows.values())) @ q[0]
            order = np.lexsort((np.arange(len(rows)), -scores))[:5]
            found = index.search(q, 5)
            assert found.ids[0, : len(order)].tolist() == [list(rows)[i] for i in order]
            assert (found.scores[0, : len(order)] == scores[order]).all()


def test_a_failed_addition_changes_nothing():
    index, x = made("float16", 300)
    before = index.reconstruct(index.ids)
    bad = np.ones((500, D), np.float32)
    bad[400, 3] = 1e6
    with pytest.raises(ValueError, match=r"x\[400, 3\] is 1000000.0, which is too large for float16"):
        index.add(bad)
    assert index.ntotal == 300 and (index.reconstruct(index.ids) == before).all()
    index.add(x[:9])
    assert index.ids.tolist() == list(range(309))


def test_filters_and_torch():
    torch = pytest.importorskip("torch")
    index, _ = made("float32", 600)
    q = sparse(np.random.default_rng(4), 5)
    every = index.search(q, 600)
    some = index.search(q, 10, filter=lambda ids: ids % 3 == 0)
    for row, all_ids in zip(some.ids, every.ids):
        assert row.tolist() == [i for i in all_ids if i % 3 == 0][:10]
    rows = block_rows(q)
    found = index.search_blocks(rows, 10, filter=np.arange(600) % 3 == 0)
    assert (found.ids == some.ids).all()
    own = SimpleNamespace(**{k: torch.from_numpy(v) for k, v in vars(rows).items()})
    found = index.search_blocks(own, 4)
    assert isinstance(found.ids, torch.Tensor) and found.ids.tolist() == every.ids[:, :4].tolist()
    assert isinstance(index.search(torch.from_numpy(q), 4).scores, torch.Tensor)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="metric must be 'ip', got 'l2': a block that a query does not have"):
        Blocks(64, 16, metric="l2")
    with pytest.raises(ValueError, match="width must divide d = 64, got 10"):
        Blocks(64, 10)
    with pytest.raises(ValueError, match="dsub must divide width = 12, got 8"):
        Blocks(24, 12, "pq")
    with pytest.raises(ValueError, match="dtype must be one of"):
        Blocks(64, 16, "float64")
    with pytest.raises(ValueError, match="not trained"):
        Blocks(64, 16, "pq").add(np.ones((3, 64)))
    index, x = made("float32", 20)
    q = sparse(np.random.default_rng(0), 4, share=1)
    good = block_rows(q)

    def fails(error, match, **change):
        with pytest.raises(error, match=match):
            index.search_blocks(SimpleNamespace(**{**vars(good), **change}), 3)

    fails(ValueError, r"rows.ptr must rise from 0 to 16", ptr=good.ptr[::-1].copy())
    fails(ValueError, r"rows.ptr must rise", ptr=good.ptr[:-1])
    fails(
        ValueError,
        r"rows.blocks\[1\] is 4; the index has blocks 0 to 3",
        blocks=good.blocks + (np.arange(16) == 1) * 3,
    )
    fails(ValueError, r"rows.blocks\[0\] is -1", blocks=good.blocks - 1)
    fails(ValueError, r"rows.blocks\[1\] must be greater", blocks=np.zeros(16, np.int32))
    fails(ValueError, r"rows.blocks has 15 entries, rows.values 16", blocks=good.blocks[1:])
    fails(ValueError, r"rows.values has 8 columns; the index has width = 16", values=good.values[:, :8])
    fails(
        ValueError,
        r"rows.values\[2, 1\] is nan",
        values=np.where(np.arange(256).reshape(16, 16) == 33, np.nan, good.values),
    )
    fails(TypeError, r"rows.blocks has dtype float32", blocks=good.blocks.astype(np.float32))
    with pytest.raises(TypeError, match="rows must have the arrays ptr, blocks and values"):
        index.search_blocks(q, 3)
    with pytest.raises(ValueError, match="k must be >= 1"):
        index.search_blocks(good, 0)
    with pytest.raises(ValueError, match="is empty"):
        Blocks(64, 16).search(q)
    with pytest.raises(ValueError, match="holds 300 coded vectors"):
        made("pq", 300)[0].train(x)
    index.train(x)  # nothing to do


def test_damaged_files(tmp_path):
    import json

    index, _ = made("float32", 20)
    index.save(tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    for old, new in (
        (b'\\"width\\": 16', b'\\"width\\": 32'),
        (b'\\"n\\": 20', b'\\"n\\": 99'),
        (b"true", b"null"),
    ):
        assert raw.count(old) == 1
        (tmp_path / "y").write_bytes(raw.replace(old, new))
        with pytest.raises(ValueError, match=str(tmp_path)):
            load(tmp_path / "y")
    assert json.dumps(index._config()) == '{"d": 64, "width": 16, "dtype": "float32", "metric": "ip"}'
