"""Damaged and hostile files of every kind: each is refused with a ValueError, or loads and can be searched.

Mutations run in a subprocess, so that a crash is a failed test rather than the end of all tests.
"""

import os
import subprocess
import sys

import pytest

PROGRAM = r"""
import json, pathlib, sys, tempfile, warnings
import numpy as np
import lutra
from lutra.index import IVF, MultiVector, Transformed, factory, load, transforms
from lutra import quant

warnings.simplefilter("ignore")
seed, count = int(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(seed)
D = 16
x = np.random.default_rng(0).standard_normal((300, D)).astype(np.float32)
TEXTS = [
    "Flat", "SQfp16", "PQ8x4", "PQ8x3,Refine(SQfp16)", "SQ8", "SQ4", "RaBitQ", "RaBitQ4,Refine(SQ8)", "RSQ4",
    "RQ2x4", "IVF8,Flat", "IVF8,PQ8x4,RFlat", "IVF8_SOAR,PQ8x4", "IVF8,RaBitQ4", "IVF8,SQ6", "HNSW4",
    "HNSW4,SQ8,RFlat", "PCA8,IVF8,SQfp16", "L2norm,RR,PQ8x4", "OPQ8,PQ8x4",
]
folder = pathlib.Path(tempfile.mkdtemp())
files = []
for number, text in enumerate(TEXTS):
    index = factory(text, D, ["l2", "ip", "cosine"][number % 3])
    index.train(x)
    index.add(x[:200], None if number % 2 else np.arange(200)[::-1] * 3)
    path = folder / f"{number}"
    index.save(path)
    files.append(path.read_bytes())
binary = factory("BFlat", D, "hamming")
binary.add(x[:200])
binary.save(folder / "binary")
files.append((folder / "binary").read_bytes())

for dtype in ("float32", "int8", "pq"):
    blocks = lutra.index.Blocks(D, 8, dtype)
    blocks.train(x, n_iter=1)
    blocks.add(x[:200], np.arange(200)[::-1] * 3)
    blocks.save(folder / "blocks")
    files.append((folder / "blocks").read_bytes())

for inner, tokens in (("float16", "int8"), ("pq", "residual2"), ("HNSW4", "float16")):
    many = MultiVector(4, inner, tokens, repetitions=2, k_sim=2, d_proj=4)
    sets = [x[i:i + i % 7, :4] for i in range(260)]
    many.train(sets, progress=False)
    many.add(sets[:40], ids=np.arange(40)[::-1] * 3, progress=False)
    many.save(folder / inner)
    files.append((folder / inner).read_bytes())

INTERESTING = [0, 1, -1, 2, 15, 16, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -2**63, 10**30, 0.5,
               None, "", "x", [], {}, True, "l2", "ip", [1], {"kind": "PQ"}]

def header_of(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + length]), raw[8 + length:]

def with_header(header, data):
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + data

def places(value, path=()):
    if isinstance(value, dict):
        for key in value:
            yield path + (key,)
            yield from places(value[key], path + (key,))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield path + (i,)
            yield from places(item, path + (i,))

def edit(value):
    where = list(places(value))
    path = where[rng.integers(len(where))]
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if rng.random() < 0.15:
        del inner[path[-1]]
    else:
        inner[path[-1]] = json.loads(json.dumps(INTERESTING[rng.integers(len(INTERESTING))]))

def mutate(raw):
    way = rng.integers(6)
    raw = bytearray(raw)
    end = 8 + int.from_bytes(raw[:8], "little")
    if way == 0:    # bits of the header
        for _ in range(rng.integers(1, 5)):
            raw[rng.integers(end)] ^= 1 << rng.integers(8)
    elif way == 1:  # bits anywhere
        for _ in range(rng.integers(1, 40)):
            raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    elif way == 2:  # cut, or longer
        if rng.random() < 0.8:
            return bytes(raw[: rng.integers(len(raw))])
        return bytes(raw) + bytes(int(rng.integers(1, 99)))
    elif way == 3:  # a stretch of the data: ids, lists, links, centroids
        if end < len(raw):
            start = int(rng.integers(end, len(raw)))
            stretch = min(int(rng.integers(1, 600)), len(raw) - start)
            fill = [0, 255, 127][rng.integers(3)]
            raw[start:start + stretch] = bytes([fill]) * stretch if rng.random() < 0.5 else rng.bytes(stretch)
    else:           # values of the metadata and of the header
        header, data = header_of(bytes(raw))
        for _ in range(rng.integers(1, 3)):
            if way == 4 and isinstance(header.get("__metadata__"), dict):
                try:
                    config = json.loads(header["__metadata__"]["config"])
                    edit(config)
                    header["__metadata__"]["config"] = json.dumps(config)
                except (KeyError, ValueError, TypeError):
                    pass
            else:
                edit(header)
        return with_header(header, data)
    return bytes(raw)

refused = loaded = 0
path = folder / "mutant"
last = folder / "last"
for turn in range(count):
    which = int(rng.integers(len(files)))
    raw = mutate(files[which])
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    print(turn, which, flush=True)
    try:
        index = load(path, mmap=bool(turn % 2))
    except ValueError as error:
        assert str(path) in str(error), f"{turn}: no path in: {error}"
        refused += 1
        continue
    except MemoryError:
        refused += 1
        continue
    loaded += 1
    if index.d > 4096 or index.ntotal > 10**6:
        continue
    q = np.random.default_rng(1).standard_normal((3, index.d)).astype(np.float32)
    if isinstance(index, MultiVector):
        q = [q[:2], q]
    for action in (lambda: index.search(q, 5), lambda: index.reconstruct(index.ids[:9]),
                   lambda: index.add(q), lambda: index.remove_ids(index.ids[::7]),
                   lambda: index.search(q, 400)):
        try:
            action()
        except (ValueError, IndexError):
            pass
print("done", refused, loaded, flush=True)
"""


def fuzz(seed, count):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM, str(seed), str(count)],
        env=environment, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    last = lines[-1] if lines else "nothing"
    assert run.returncode == 0, f"at mutation {last} (exit {run.returncode}):\n{run.stderr[-3000:]}"
    word, refused, loaded = last.split()
    assert word == "done" and int(refused) + int(loaded) == count
    assert int(refused) > count // 5 and int(loaded) > count // 50  # both ways are exercised


def test_some_mutations():
    fuzz(0, 400)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_mutations(seed):
    fuzz(seed, 2500)
