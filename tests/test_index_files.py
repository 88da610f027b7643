"""Index files: round trips, mapping, interrupted writes, damaged and foreign files."""

import errno
import json
import os
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lutra
from lutra.index import PQ, Flat, load
from lutra.index import _files as files


def vectors(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def flat(n=30, d=6, ids=True, metric="l2"):
    index = Flat(d, metric)
    index.add(vectors(n, d), ids=np.arange(n)[::-1] * 5 if ids else None)
    return index


def pq(n=300, d=8, bits=4, metric="l2", refine=None, trained=True):
    """A PQ index whose codebooks come from no training, which is another test's subject."""
    index = PQ(d, 4, bits, metric, refine=refine)
    if trained:
        index._codebooks = vectors(4 * index.ksub, index.dsub, 9).reshape(4, index.ksub, index.dsub)
        index._move(lutra.index._home.HOST)
        index.add(vectors(n, d), ids=np.arange(n) * 2 + 1)
    return index


INDEXES = {
    "flat": flat,
    "flat-cosine": lambda: flat(metric="cosine"),
    "flat-default-ids": lambda: flat(ids=False),
    "flat-empty": lambda: Flat(3),
    "pq": pq,
    "pq-8-bits": lambda: pq(bits=8),
    "pq-float16": lambda: pq(refine="float16", metric="cosine"),
    "pq-float32": lambda: pq(refine="float32", metric="ip"),
    "pq-empty": lambda: pq(n=0),
    "pq-untrained": lambda: pq(trained=False),
}


def same(a, b):
    assert type(a) is type(b) and repr(a) == repr(b)
    np.testing.assert_array_equal(a.ids, b.ids)
    if a.ntotal:
        q = vectors(5, a.d, 3)
        for x, y in zip(a.search(q, 7), b.search(q, 7)):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(a.reconstruct(a.ids), b.reconstruct(b.ids))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", INDEXES)
def test_round_trip(tmp_path, name, mmap):
    index = INDEXES[name]()
    path = tmp_path / "index.lutra"
    index.save(path)
    again = load(str(path), mmap=mmap)
    same(index, again)
    if index.is_trained:
        for i in (index, again):  # and it goes on living
            i.remove_ids(i.ids[1:20])
            i.add(vectors(11, i.d, 4))
        same(index, again)


@pytest.mark.parametrize("name", INDEXES)
def test_the_safetensors_package_reads_them(tmp_path, name):
    index = INDEXES[name]()
    index.save(tmp_path / "x")
    with safetensors.safe_open(tmp_path / "x", framework="numpy") as file:
        metadata = file.metadata()
        assert metadata["format"] == "lutra.index" and metadata["version"] == "1"
        assert metadata["kind"] == type(index).__name__
        config = json.loads(metadata["config"])
        assert config["d"] == index.d and config["n"] == len(index)
        if isinstance(index, Flat):
            np.testing.assert_array_equal(file.get_tensor("vectors"), index.reconstruct(index.ids))
    raw = (tmp_path / "x").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0  # the data can be mapped


def test_files_of_the_safetensors_package_are_read(tmp_path):
    """Tensors in another order and with no alignment to speak of."""
    index = pq(n=301, refine="float32")
    index.save(tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.numpy.save_file(tensors, tmp_path / "b", metadata)
    same(index, load(tmp_path / "b"))
    header = {"__metadata__": metadata}  # codes first: floats at odd addresses
    data = b""
    for name in ("codes", "vectors", "ids", "codebooks"):
        raw = tensors[name].tobytes()
        dtype = {"u1": "U8", "f4": "F32", "i8": "I64"}[tensors[name].dtype.str[1:]]
        header[name] = {
            "dtype": dtype, "shape": tensors[name].shape, "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + 1)
    (tmp_path / "c").write_bytes(len(text).to_bytes(8, "little") + text + data)
    same(index, load(tmp_path / "c"))


def test_mapped_vectors_are_not_read_or_copied_by_load(tmp_path):
    index = flat(2000, 16)
    index.save(tmp_path / "x")
    mapped = load(tmp_path / "x")._rows["vectors"]
    assert mapped.mapped and not mapped.view.flags.writeable and not mapped.view.flags.owndata
    assert not load(tmp_path / "x", mmap=False)._rows["vectors"].mapped
    # the kernels read it where it lies
    assert lutra._arrays.NUMPY.dense(mapped.view) is not None
    assert np.shares_memory(lutra._arrays.NUMPY.dense(mapped.view), mapped.view)


def test_changing_a_mapped_index_leaves_the_file_alone(tmp_path):
    index = flat()
    index.save(tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    again = load(tmp_path / "x")
    again.remove_ids(again.ids[3])
    again.add(vectors(2, 6))
    assert (tmp_path / "x").read_bytes() == before
    same(index, load(tmp_path / "x"))


@pytest.mark.parametrize("name", ["flat", "pq-float16"])
def test_saving_over_the_mapped_file(tmp_path, name):
    index = INDEXES[name]()
    path = tmp_path / "x"
    index.save(path)
    first = load(path)
    second = load(path)
    second.save(path)  # unchanged
    same(index, load(path))
    second.remove_ids(second.ids[::2])
    second.save(path)
    same(second, load(path))
    same(index, first)  # still sees the file that it mapped


def test_permissions_and_links(tmp_path):
    path = tmp_path / "x"
    before = os.umask(0o027)
    try:
        flat().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    os.chmod(path, 0o600)
    flat(31).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(path)
    flat(32).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(load(path)) == 32


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flat().save("x")
    assert len(load("x")) == 30


class Full:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 900])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, room):
    old = flat()
    old.save(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", lambda *a: Full(open(*a), room), raising=False)  # noqa: SIM115
        with pytest.raises(OSError, match="No space left"):
            flat(50).save(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]
    same(old, load(tmp_path / "x"))
    flat(50).save(tmp_path / "x")
    assert len(load(tmp_path / "x")) == 50


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failures_of_the_last_steps_leave_the_old_file(tmp_path, monkeypatch, step):
    old = flat()
    old.save(tmp_path / "x")

    def fail(*args):
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, step, fail)
        with pytest.raises(OSError, match="injected"):
            flat(50).save(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]
    same(old, load(tmp_path / "x"))


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    old = flat()
    old.save(tmp_path / "x")

    def interrupt(tensors, metadata):
        yield b"half a header"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "_serialize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            flat(50).save(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]
    same(old, load(tmp_path / "x"))


def test_a_killed_process_leaves_a_whole_file(tmp_path):
    """Two indexes are saved in turns until the process is killed: one of them is there, whole."""
    path = tmp_path / "x"
    flat(n=20_000, d=16).save(path)
    script = (
        "import sys\nfrom lutra.index import load\n"
        "a, b = load(sys.argv[1]), load(sys.argv[1])\n"
        "b.remove_ids(b.ids[::2])\nprint('ready', flush=True)\n"
        "while True:\n    a.save(sys.argv[1])\n    b.save(sys.argv[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for wait in (0.0, 0.003, 0.011, 0.025):
        flat(n=20_000, d=16).save(path)
        process = subprocess.Popen(
            [sys.executable, "-c", script, path], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(wait)
        process.kill()
        process.communicate()
        index = load(path, mmap=False)
        assert len(index) in (20_000, 10_000)
        step = 20_000 // len(index)
        want = vectors(20_000, 16)[step - 1 :: step]
        np.testing.assert_array_equal(index.reconstruct(index.ids), want)


def test_the_order_of_syncs(tmp_path, monkeypatch):
    """Data are on disk before the name, and the name before save returns."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        steps.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(a, b):
        steps.append("rename")
        replace(a, b)

    monkeypatch.setattr(files.os, "fsync", note_fsync)
    monkeypatch.setattr(files.os, "replace", note_replace)
    flat().save(tmp_path / "x")
    assert steps == ["file", "rename", "directory"]


def test_paths_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent/x'$"):
        flat().save(tmp_path / "absent" / "x")
    for wrong in (None, 0, True):
        with pytest.raises(TypeError):
            load(wrong)
        with pytest.raises(TypeError):
            flat().save(wrong)


def test_names_of_all_sorts(tmp_path):
    for name in ("n" * 255, "with space\n", "\u00fcml\u00e4ut", os.fsencode("bytes")):
        path = os.path.join(tmp_path, os.fsdecode(name))
        flat().save(os.fsencode(path) if isinstance(name, bytes) else path)
        assert len(load(os.fsencode(path))) == 30


# ---- damaged and foreign files
def rewrite(path, change):
    """Change the header of a file (as a dict) and keep its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def config(path, **changes):
    def change(header):
        values = json.loads(header["__metadata__"]["config"])
        values.update(changes)
        header["__metadata__"]["config"] = json.dumps(values)

    rewrite(path, change)


def metadata(path, **changes):
    rewrite(path, lambda header: header["__metadata__"].update(changes))


def fails(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["flat", "pq-float16"])
def test_every_truncation_is_noticed(tmp_path, name):
    path = tmp_path / "x"
    INDEXES[name]().save(path)
    raw = path.read_bytes()
    cuts = [*range(0, 700, 13), *range(700, len(raw), 397), len(raw) - 1]
    for cut in cuts:
        path.write_bytes(raw[:cut])
        fails(path, "truncated|not an index file")
    path.write_bytes(raw + b"x")
    fails(path, "not a valid safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"PK\x03\x04" + bytes(100),
        b"\x80\x04\x95" + bytes(500),
        b"just some text, and more of it\n" * 9,
    ],
)
def test_files_of_other_formats(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    fails(tmp_path / "x", "not an index file|not a safetensors file")


def test_foreign_safetensors(tmp_path):
    safetensors.numpy.save_file({"vectors": vectors(3, 4)}, tmp_path / "x")
    fails(tmp_path / "x", "not one of lutra.index")
    safetensors.numpy.save_file({"vectors": vectors(3, 4)}, tmp_path / "x", {"format": "pt"})
    fails(tmp_path / "x", "not one of lutra.index")


def test_wrong_metadata(tmp_path):
    path = tmp_path / "x"

    def fresh(index=None):
        (index or flat()).save(path)

    for change, match in [
        ({"version": "2"}, "version of the format is 2, .* newer lutra"),
        ({"version": "0"}, "version of the format is 0"),
        ({"version": "one"}, "'one', not a number"),
        ({"kind": "Fancy"}, r"kind 'Fancy'; this lutra knows .*Flat.*, PQ"),
        ({"kind": "PQ"}, "do not describe an index"),
        ({"config": "{"}, "no JSON object"),
        ({"config": "[]"}, "no JSON object"),
        ({"config": "[" * 100_000}, "no JSON object"),
        ({"config": "{}"}, "'n' in the metadata must be"),
    ]:
        fresh()
        metadata(path, **change)
        fails(path, match)
    for change, match in [
        ({"d": 7}, r"'vectors' is F32 \(30, 6\); by the metadata it must be F32 \(30, 7\)"),
        ({"d": 0}, "d must be"),
        ({"d": "6"}, "d must be an integer"),
        ({"d": 10**40}, "d must be"),
        ({"metric": "hamming"}, "metric must be one of"),
        ({"n": 29}, "'vectors' is"),
        ({"n": -1}, "'n' in the metadata"),
        ({"n": 30.0}, "'n' in the metadata"),
        ({"n": True}, "'n' in the metadata"),
        ({"n": 10**40}, "'n' in the metadata"),
        ({"next_id": 3}, "the next id is 3, but 145 is in use"),
        ({"unknown": 1}, "do not describe an index"),
        ({"self": 1}, "do not describe an index"),
    ]:
        fresh()
        config(path, **change)
        fails(path, match)
    for change, match in [
        ({"bits": 3}, "'codebooks' is F32"),
        ({"m": 2}, "'codebooks' is F32"),
        ({"m": 3}, "m must divide"),
        ({"refine": "float16"}, "'vectors' is missing"),
        ({"trained": False}, "not true, but there are vectors"),
        ({"trained": 1}, "not true, but there are vectors"),
    ]:
        fresh(pq())
        config(path, **change)
        fails(path, match)


def test_wrong_tensors(tmp_path):
    path = tmp_path / "x"

    def with_tensors(index, **changes):
        index.save(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            described = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors.update(changes)
        safetensors.numpy.save_file({n: t for n, t in tensors.items() if t is not None}, path, described)

    ids = flat().ids
    twice, negative = ids.copy(), ids.copy()
    twice[4], negative[4] = twice[3], -4
    for changes, match in [
        ({"vectors": None}, "'vectors' is missing"),
        ({"vectors": vectors(30, 6).astype(np.float64)}, "'vectors' is F64"),
        ({"vectors": vectors(31, 6)}, "'vectors' is"),
        ({"vectors": vectors(30, 6).ravel()}, "'vectors' is"),
        ({"ids": ids.astype(np.int32)}, "'ids' is I32"),
        ({"ids": ids[:-1]}, "'ids' is"),
        ({"ids": twice}, r"ids\[3\] and ids\[4\] are both 130; ids must be unique"),
        ({"ids": negative}, r"ids\[4\] is -4; ids must be >= 0"),
        ({"more": ids}, "unexpected tensors: 'more'"),
    ]:
        with_tensors(flat(), **changes)
        fails(path, match)
    codes = np.zeros((300, 4), np.uint8)
    codes[17, 2] = 16
    books = pq()._codebooks.copy()
    books[1, 2] = np.nan
    for changes, match in [
        ({"codes": codes}, "row 17 of the codes holds 16; with 4 bits they are < 16"),
        ({"codes": codes.astype(np.int8)}, "'codes' is I8"),
        ({"codebooks": books}, "codebooks hold NaN"),
        ({"codebooks": None}, "'codebooks' is missing"),
    ]:
        with_tensors(pq(), **changes)
        fails(path, match)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_never_crash(tmp_path, data):
    """Any change of header bytes: a ValueError that names the file, or an index that can be searched."""
    name = data.draw(st.sampled_from(["flat", "pq-float16"]))
    path = tmp_path / "damaged"
    INDEXES[name]().save(path)
    raw = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        index = load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        index.search(vectors(2, index.d), 5)
