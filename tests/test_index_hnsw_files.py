"""Files of lutra.index.HNSW: what is saved is what is loaded; hostile files are refused or harmless."""

import json

import numpy as np
import pytest
from graph_checks import survives_a_round_trip, survives_damage

from lutra.index import HNSW, load
from lutra.index._graph import STORAGES


def vectors(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def made(n=120, d=9, **options):
    index = HNSW(d, 4, ef_construction=15, **options)
    index.add(vectors(n, d), np.arange(n) * 3)
    return index


def parts(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])


def write(path, header, body):
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))


def tensor(header, body, name, dtype):
    start, end = header[name]["data_offsets"]
    return np.frombuffer(body, dtype, (end - start) // np.dtype(dtype).itemsize, start)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mmap", [True, False])
def test_round_trip(tmp_path, storage, mmap):
    index = made(storage=storage, metric="cosine", ef_search=17, seed=5)
    survives_a_round_trip(index, tmp_path / "index", vectors(10, 9, 1), vectors(20, 9, 2), mmap)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_tiny(tmp_path, n):
    index = made(n)
    index.save(tmp_path / "index")
    again = load(tmp_path / "index")
    assert len(again) == n
    again.add(vectors(3, 9, 2))
    assert again.search(vectors(3, 9, 2), 1).ids.shape == (3, 1)


def test_settings_are_kept(tmp_path):
    index = made()
    index.ef_search = 99
    index.save(tmp_path / "index")
    assert load(tmp_path / "index").ef_search == 99


@pytest.mark.parametrize(
    ("name", "dtype", "value", "message"),
    [
        ("links", np.int32, 120, "'links' names nodes from"),
        ("links", np.int32, -2, "'links' names nodes from -2"),
        ("links", np.int32, 2**31 - 1, "'links' names nodes from"),
        ("upper", np.int32, 120, "'upper' names nodes from"),
        ("levels", np.uint8, 200, "a level is 200"),
    ],
)
@pytest.mark.parametrize("mmap", [True, False])
def test_lists_that_lead_nowhere(tmp_path, name, dtype, value, message, mmap):
    path = tmp_path / "index"
    made().save(path)
    header, body = parts(path)
    tensor(header, body, name, dtype)[5] = value
    write(path, header, body)
    with pytest.raises(ValueError, match=message):
        load(path, mmap=mmap)


@pytest.mark.parametrize("entry", [-1, 120, "0", None, 1.0, 2**70])
def test_entry(tmp_path, entry):
    path = tmp_path / "index"
    made().save(path)
    header, body = parts(path)
    config = json.loads(header["__metadata__"]["config"])
    config["entry"] = entry
    header["__metadata__"]["config"] = json.dumps(config)
    write(path, header, body)
    with pytest.raises(ValueError, match="'entry' in the metadata"):
        load(path)


@pytest.mark.parametrize(
    ("name", "value"), [("M", 5), ("d", 300), ("storage", "float32"), ("refine", "float16"), ("n", 119)]
)
def test_metadata_that_do_not_fit(tmp_path, name, value):
    path = tmp_path / "index"
    made().save(path)
    header, body = parts(path)
    config = json.loads(header["__metadata__"]["config"])
    config[name] = value
    header["__metadata__"]["config"] = json.dumps(config)
    write(path, header, body)
    with pytest.raises(ValueError, match=str(path)):
        load(path)


def test_any_bytes(tmp_path):
    survives_damage(made(60, 5), tmp_path / "index", vectors(3, 5, 1), 400, 20)


def test_lists_that_change_behind_our_back():
    """Ids out of range that appear after loading (in a mapped file) end a list; they are never followed."""
    index = made(300, 6)
    q = vectors(20, 6, 1)
    rng = np.random.default_rng(0)
    links = index._graph.tables["links"].view
    for value in (300, 2**31 - 1, -7):
        links[rng.integers(0, 300, 40), rng.integers(0, links.shape[1], 40)] = value
        index._graph.upper.view[:, 1] = value
        found = index.search(q, 5, ef_search=8)
        assert ((found.ids >= 0) & (found.ids < 900)).all()
    index.add(q)
    index.remove_ids(np.arange(0, 900, 6))
    assert index.search(q, 5, ef_search=8).ids.shape == (20, 5)
