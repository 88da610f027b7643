"""Store: an index in a folder that is added to, against one index that was given everything."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import lutra
from lutra import quant
from lutra.index import HNSW, IVF, PQ, Codes, Flat, Store, compact, create, load
from lutra.index import _files as files
from lutra.index import _manifest as manifest


def vectors(n, d=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def flat():
    return Flat(8, "l2")


def pq():
    index = PQ(8, 4, 4, "ip")
    index.train(vectors(700, seed=5), n_iter=3)
    return index


def refined():
    index = PQ(8, 4, 4, "cosine", refine="float16")
    index.train(vectors(700, seed=5), n_iter=3)
    return index


def planes():
    index = Codes(quant.RotatedSQ(8, 4), "ip", refine="float16")
    index.train(vectors(700, seed=5))
    return index


def lists():
    index = IVF(8, 6, quant.PQ(8, 4, 4), "l2", nprobe=6)
    index.train(vectors(700, seed=5))
    return index


def rows():
    index = IVF(8, 6, metric="cosine", nprobe=6)
    index.train(vectors(700, seed=5))
    return index


def graph():
    return HNSW(8, 8, "l2", ef_search=400)


KINDS = {
    "flat": flat, "pq": pq, "refined": refined, "planes": planes, "lists": lists, "rows": rows,
    "graph": graph,
}  # fmt: skip


def same(store, index):
    """The store answers as the index does."""
    options = {}
    if isinstance(index, (PQ, Codes)) and index.refine:  # each part refines its own best
        options = {"refine" if isinstance(index, PQ) else "refine_factor": 500}
    assert store.ntotal == len(store) == index.ntotal
    np.testing.assert_array_equal(store.ids, index.ids)
    if index.ntotal:
        for k in (1, 7, index.ntotal + 3):
            got, want = (i.search(vectors(9, seed=3), k, **options) for i in (store, index))
            if isinstance(index, Flat):
                np.testing.assert_array_equal(got.ids, want.ids)
            else:  # the same code in two parts: scores that differ in the last bit
                assert (got.ids == want.ids).mean() > 0.98
            np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(store.reconstruct(store.ids), index.reconstruct(index.ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_is_one_index(tmp_path, kind):
    index, first = KINDS[kind](), KINDS[kind]()
    path = tmp_path / "store"
    for i in (index, first):
        i.add(vectors(300))
    store = create(path, first)
    same(store, index)
    rng = np.random.default_rng(1)
    for step in range(6):
        x = vectors(int(rng.integers(1, 60)), seed=10 + step)
        ids = rng.permutation(10_000)[: len(x)] + 20_000 * (step + 1) if step % 2 else None
        gone = rng.choice(index.ids, 20, replace=False)
        for i in (store, index):
            i.add(x, ids)
            assert i.remove_ids(gone) == 20
        same(store, index)
        if step in (1, 2, 4):
            store.commit()
            same(store, index)
            with lutra.index.open(path) as reader:
                same(reader, index)
    back = index.ids[-1:]
    for i in (store, index):  # an id that was removed comes back
        i.remove_ids(back)
        i.add(vectors(1, seed=99), back)
    store.compact()
    same(store, index)
    assert len(store.parts) == 1 and len(os.listdir(path)) == 3  # manifest, base, lock
    store.close()
    same(lutra.index.open(path), index)
    store = lutra.index.open(path, "a")
    for i in (store, index):
        i.add(vectors(3, seed=7))  # ids go on where they were
    same(store, index)


def test_added_vectors_are_compacted_as_they_were_added(tmp_path):
    """Not as their codes: the vectors that refine keeps are those of the caller."""
    with create(tmp_path / "s", refined()) as store:
        store.add(vectors(50))
        store.commit()
        store.remove_ids([3])
        store.add(vectors(20, seed=1))
    compact(tmp_path / "s")
    index = refined()
    index.add(vectors(50))
    index.remove_ids([3])
    index.add(vectors(20, seed=1))
    same(lutra.index.open(tmp_path / "s"), index)


def test_filters_speak_of_ids_and_are_called_once(tmp_path):
    index = flat()
    index.add(vectors(40), np.arange(40) * 3)
    store = create(tmp_path / "s", index)
    store.add(vectors(30, seed=1))
    store.remove_ids([9, 12, 120])
    index.add(vectors(30, seed=1))
    index.remove_ids([9, 12, 120])
    calls = []

    def odd(ids):
        calls.append(ids)
        return ids % 2 == 1

    mask = np.random.default_rng(0).random(150) < 0.5
    for choice in (odd, mask, np.packbits(mask, bitorder="little"), [3, 9, 15, 118, 119], []):
        got, want = (i.search(vectors(5, seed=2), 8, filter=choice) for i in (store, index))
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.scores, want.scores)
    np.testing.assert_array_equal(calls[0], store.ids)
    assert len(calls) == 2  # once by each


def test_a_commit_writes_what_is_new(tmp_path):
    index = flat()
    index.add(vectors(5000))
    store = create(tmp_path / "s", index)
    base = tmp_path / "s" / "000001-base.safetensors"
    before = base.stat()
    store.add(vectors(2))
    store.remove_ids([17])
    store.commit()
    after = base.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    written = sum(
        f.stat().st_size for f in (tmp_path / "s").iterdir() if f.name[:6] == "000002" or f.suffix == ".json"
    )
    assert written < 4000
    generation = store.generation
    store.commit()  # nothing to do
    assert store.generation == generation


def test_a_reader_keeps_its_state(tmp_path):
    path = tmp_path / "s"
    index = pq()
    index.add(vectors(2000))
    create(path, index).close()
    reader = lutra.index.open(path)
    want = reader.search(vectors(9, seed=3), 5)
    with lutra.index.open(path, "a") as store:
        store.remove_ids(want.ids.ravel())
        store.add(vectors(100, seed=8))
        store.commit()
        store.compact()
    assert not (path / "000001-base.safetensors").exists()
    again = reader.search(vectors(9, seed=3), 5)
    np.testing.assert_array_equal(again.ids, want.ids)
    assert reader.refresh() and not reader.refresh()
    assert not np.isin(reader.search(vectors(9, seed=3), 5).ids, want.ids).any()


def test_one_writer(tmp_path):
    path = tmp_path / "s"
    store = create(path, flat())
    with pytest.raises(BlockingIOError, match="another writer"):
        lutra.index.open(path, "a")
    reader = lutra.index.open(path)
    for change in (
        lambda: reader.add(vectors(1)),
        lambda: reader.remove_ids([0]),
        reader.commit,
        reader.compact,
    ):
        with pytest.raises(ValueError, match="open for reading"):
            change()
    store.add(vectors(3))
    with pytest.raises(ValueError, match="not committed"):
        store.refresh()
    store.close()  # without commit
    with lutra.index.open(path, "a") as store:
        assert len(store) == 0
        store.add(vectors(3))
    with pytest.raises(RuntimeError), lutra.index.open(path, "a") as store:
        store.add(vectors(4))
        raise RuntimeError
    assert len(lutra.index.open(path)) == 3


def test_what_an_interrupted_commit_left_is_swept(tmp_path, monkeypatch):
    path = tmp_path / "s"
    create(path, pq()).close()

    def fail(*arguments):
        raise OSError("injected")

    store = lutra.index.open(path, "a")
    store.add(vectors(20))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", fail)
        with pytest.raises(OSError, match="injected"):
            store.commit()
    assert (path / "000002-segment.safetensors").exists()
    assert len(lutra.index.open(path)) == 0 and len(store) == 20
    store.close()
    (path / "mine.txt").write_text("not ours")
    lutra.index.open(path, "a").close()
    assert sorted(os.listdir(path)) == [".lock", "000001-base.safetensors", "manifest.json", "mine.txt"]


def test_errors(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(ValueError, match="not trained"):
        create(path, PQ(8, 4))
    assert not path.exists()
    store = create(path, flat())
    with pytest.raises(FileExistsError):
        create(path, flat())
    with pytest.raises(ValueError, match="empty"):
        store.search(vectors(1))
    store.add(vectors(5))
    with pytest.raises(ValueError, match=r"ids\[1\] is 3, which is in the index"):
        store.add(vectors(2), [77, 3])
    with pytest.raises(ValueError, match="unique"):
        store.add(vectors(2), [77, 77])
    with pytest.raises(ValueError, match="ids has shape"):
        store.add(vectors(2), [77])
    with pytest.raises(ValueError, match="not finite"):
        store.add(np.full((1, 8), np.nan))
    with pytest.raises(ValueError, match="has d = 8"):
        store.search(vectors(2, 9))
    with pytest.raises(ValueError, match="k must be"):
        store.search(vectors(2), 0)
    with pytest.raises(IndexError, match=r"ids\[1\] is 5"):
        store.reconstruct([4, 5])
    with pytest.raises(ValueError, match="mode must be"):
        lutra.index.open(path, "w")
    with pytest.raises(FileNotFoundError):
        lutra.index.open(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="no store"):
        lutra.index.open(tmp_path / "other")
    assert len(store) == 5 and "parts=2" in repr(store)


def edit(path, **changes):
    value = json.loads((path / "manifest.json").read_text())
    value.update(changes)
    (path / "manifest.json").write_text(json.dumps(value))


def test_damaged_folders(tmp_path):
    whole = tmp_path / "whole"
    with create(whole, pq()) as store:
        store.add(vectors(20))
        store.commit()
        store.remove_ids([3])
    value = json.loads((whole / "manifest.json").read_text())
    parts = value["parts"]
    base, segment = parts

    def part(**changes):
        return [base, {**segment, **changes}]

    for change, match in [
        ({"format": "x"}, "no manifest"),
        ({"version": 2}, "version is 2"),
        ({"next_id": 2}, "next_id"),
        ({"next_id": -1}, "next_id"),
        ({"generation": True}, "generation"),
        ({"parts": []}, "parts"),
        ({"parts": [3]}, "a part must have"),
        ({"parts": [base, base]}, "an id is in two parts")
        if base["n"]
        else ({"parts": [segment, segment]}, "two"),
        ({"parts": part(n=19)}, "holds 20 vectors"),
        ({"parts": part(file="../../etc/passwd")}, "not the name"),
        ({"parts": part(file="000009-segment.safetensors")}, "is missing"),
        ({"parts": part(file=segment["vectors"])}, "kind"),
        ({"parts": part(removed=segment["vectors"])}, "should hold the removed"),
        ({"parts": part(removed=5)}, "not the name"),
    ]:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "x")
        edit(tmp_path / "x", **change)
        with pytest.raises(ValueError, match=match) as caught:
            lutra.index.open(tmp_path / "x")
        assert str(tmp_path / "x") in str(caught.value)
    for text in (b"", b"{", b"[" * 100_000, b"\xff\xfe"):
        (tmp_path / "x" / "manifest.json").write_bytes(text)
        with pytest.raises(ValueError, match="no manifest"):
            lutra.index.open(tmp_path / "x")


def test_torch_in_torch_out(tmp_path):
    torch = pytest.importorskip("torch")
    store = create(tmp_path / "s", flat())
    store.add(torch.from_numpy(vectors(9)))
    scores, ids = store.search(torch.from_numpy(vectors(2)), 3)
    assert isinstance(scores, torch.Tensor) and ids[:, 0].tolist() == [0, 1]
    assert isinstance(store.reconstruct(torch.tensor([1, 2])), torch.Tensor)


def test_searches_while_another_thread_adds(tmp_path):
    store = create(tmp_path / "s", flat())
    store.add(vectors(50))
    failed, stop = [], threading.Event()

    def look():
        try:
            while not stop.is_set():
                scores, ids = store.search(vectors(4), 1)
                assert ids[:, 0].tolist() == [0, 1, 2, 3] and (scores < 1e-4).all()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(15):
        store.add(vectors(20, seed=step + 1))
        store.remove_ids(store.ids[-5:])
        if step % 4 == 3:
            store.commit()
        if step % 8 == 7:
            store.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed


WRITER = """
import sys
import numpy as np
import lutra
store = lutra.index.open(sys.argv[1], "a")
step = len(store) // 10
for turn in range(10**9):
    store.add(np.full((10, 8), step, np.float32))
    store.commit()
    if step % 5 == 4:
        store.compact()
    step += 1
    if turn == 0:
        print("ready", flush=True)
"""


def kill_writers(path, rounds, rng):
    """Kill a writer again and again; after each death the folder opens and holds whole commits."""
    create(path, flat()).close()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.random() * 0.06)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        store = lutra.index.open(path)
        n = len(store)
        assert n % 10 == 0
        want = np.repeat(np.arange(n // 10), 10)
        if n:
            np.testing.assert_array_equal(store.reconstruct(store.ids)[:, 0], want)
    assert n > 0


def test_killed_writers(tmp_path):
    kill_writers(tmp_path / "s", 3, np.random.default_rng(0))


@pytest.mark.slow
def test_killed_writers_many_times(tmp_path):
    kill_writers(tmp_path / "s", 60, np.random.default_rng(1))


def test_files_of_a_store_are_index_files(tmp_path):
    """A base can be loaded by itself; what lies beside it cannot be mistaken for an index."""
    with create(tmp_path / "s", pq()) as store:
        store.add(vectors(5))
    assert len(load(tmp_path / "s" / "000002-segment.safetensors")) == 5
    with pytest.raises(ValueError, match="kind 'store vectors'"):
        load(tmp_path / "s" / "000002-vectors.safetensors")
    assert isinstance(store, Store) and files.VERSION >= 1
