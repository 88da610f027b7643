"""n-gram memories and vector stores: what a look-up and an opening take at the sizes of the documents.

``python benchmarks/bench_ngrams.py`` prints the figures of docs/ngram-memories.md, docs/vector-store.md and
docs/sent2vec.md (some minutes and several GB of memory), ``--only match`` a section, ``--quick`` all of it on
small sizes, which ``pytest benchmarks/bench_ngrams.py`` runs. Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from layers import sent2vec
from real_data import data_folder

import lutra


def best(function: Callable[[], object], seconds: float = 1.0) -> float:
    """The median time of a call, after one to warm up."""
    function()
    times: list[float] = []
    while (sum(times) < seconds and len(times) < 50) or len(times) < 3:
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def random_fgrams(size: int) -> lutra.vocab.FGrams:
    """As many n-grams of 2 to 5 tokens of 32,000: all ends of random ones, so that each leads to the next."""
    rng = np.random.default_rng(0)
    rows = (32_000 ** rng.random((size * 2 // 5 + 1000, 5))).astype(np.int64)
    parts, ids = [], rows[:, 4]
    for n in (2, 3, 4, 5):
        _, first, ids = np.unique(ids << 15 | rows[:, 5 - n], return_index=True, return_inverse=True)
        parts.append(np.pad(rows[first, 5 - n :], ((0, 0), (0, 5 - n)), constant_values=-1))
    return lutra.vocab.FGrams(np.concatenate(parts)[:size])


def match(quick: bool) -> Iterator[str]:
    """Tokens a second of longest_match, one and two threads."""
    size = 20_000 if quick else 10_000_000
    begin = time.perf_counter()
    fgrams = random_fgrams(size)
    made = time.perf_counter() - begin
    yield f"{len(fgrams)} f-grams, {fgrams.nbytes / 1e6:.0f} MB of table, made in {made:.1f} s"
    rng = np.random.default_rng(1)
    picks = fgrams.array[rng.integers(0, len(fgrams), 1_000_000)].reshape(-1)
    hits = picks[picks >= 0].astype(np.int64)[:2_000_000]
    noise = rng.integers(0, 32_000, len(hits))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.safetensors")
        fgrams.save(path)
        mapped = lutra.vocab.FGrams.load(path)
        for threads in (1, 2):
            lutra.set_num_threads(threads)
            for name, tokens in (("f-grams in a row", hits), ("random tokens", noise)):
                for where, v in (("memory", fgrams), ("mapped", mapped)):
                    found = lutra.address.longest_match(tokens, v)
                    rate = len(tokens) / best(lambda t=tokens, v=v: lutra.address.longest_match(t, v))
                    yield (
                        f"{threads} threads, {name}, {where}: {rate / 1e6:.1f} M tokens/s "
                        f"(mean length {found.lengths.mean():.2f})"
                    )
    lutra.set_num_threads(0)
    # the peer: a dictionary of tuples, on a small part, for it takes its time
    part = hits[: 2_000 if quick else 20_000]
    known = {g: i for i, g in enumerate(fgrams.most_frequent(min(len(fgrams), 1_000_000)))}
    small = fgrams.most_frequent(len(known))
    values = part.tolist()

    def dictionary() -> list[int]:
        out = []
        for i in range(len(values)):
            for n in range(min(5, i + 1), 1, -1):
                found = known.get(tuple(values[i - n + 1 : i + 1]))
                if found is not None:
                    break
            out.append(-1 if i == 0 or found is None else found)
        return out

    assert dictionary() == lutra.address.longest_match(part, small).ids.tolist()
    yield f"a dictionary of {len(known)} tuples: {len(part) / best(dictionary) / 1e6:.2f} M tokens/s"


def count(quick: bool) -> Iterator[str]:
    """Counting the f-grams of a text's bytes."""
    folder = data_folder()
    if folder is None:
        yield "no real data here"
        return
    text = np.fromfile(folder / "tinyshakespeare.txt", np.uint8)[: 100_000 if quick else None]
    begin = time.perf_counter()
    fgrams = lutra.vocab.count_fgrams(text, 50_000, 5, progress=False)
    seconds = time.perf_counter() - begin
    found = lutra.address.longest_match(text.astype(np.int64), fgrams)
    yield (
        f"{len(text)} bytes, 4 passes: {seconds:.2f} s; {len(fgrams)} f-grams match at "
        f"{(found.ids >= 0).mean():.1%} of the bytes, mean length {found.lengths.mean():.2f}"
    )
    first = [bytes(g).decode() for g in list(fgrams)[:8]]
    yield f"the most frequent: {first}"


def layers(quick: bool) -> Iterator[str]:
    """SconeEmbedding with a mapped table, and Engram, forward."""
    import torch

    size, dim = (20_000, 16) if quick else (10_000_000, 64)
    fgrams = random_fgrams(size)
    picks = fgrams.array[np.random.default_rng(1).integers(0, len(fgrams), 200_000)].reshape(-1)
    tokens = torch.from_numpy(picks[picks >= 0][: 64 * 512].astype(np.int64).reshape(64, 512))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, "rows.safetensors")
        embed = torch.nn.Embedding(32_000, dim)
        begin = time.perf_counter()
        lutra.nn.SconeEmbedding.build_table(
            lambda t: embed(t).mean(1), fgrams, path, batch_size=65_536, progress=False
        )
        built = time.perf_counter() - begin
        yield f"build_table, {len(fgrams)} x {dim} float16, a mean of rows: {built:.1f} s"
        begin = time.perf_counter()
        layer = lutra.nn.SconeEmbedding(32_000, dim, fgrams, path=path)
        opened = time.perf_counter() - begin
        yield f"SconeEmbedding with the file: {1e3 * opened:.0f} ms, most of it the tokens' own embeddings"
        yield f"SconeEmbedding, 64 x 512 tokens: {1e3 * best(lambda: layer(tokens)):.2f} ms"
        yield f"nn.Embedding, the same tokens: {1e3 * best(lambda: embed(tokens)):.2f} ms"
    engram = lutra.nn.Engram(512, 32_000, rows=1_000 if quick else 100_003)
    hidden = torch.randn(8, 512, 512)
    t = tokens[:8]
    with torch.no_grad():
        yield f"Engram(512), 8 x 512 tokens: {1e3 * best(lambda: engram(hidden, t)):.2f} ms"
        ours = best(lambda: engram.ids(t))
        from lutra.address._xor_ngrams import composition

        args = engram.multipliers, engram.moduli, engram.orders, 0
        assert torch.equal(composition(t, *args), engram.ids(t))
        theirs = best(lambda: composition(t, *args))
        yield f"its ids: {1e3 * ours:.3f} ms; in torch's own ops {1e3 * theirs:.3f} ms"


_OPEN = """
import time, sys
import lutra, lutra.index, safetensors.numpy
begin = time.perf_counter()
store = lutra.VectorStore(sys.argv[1])
opened = time.perf_counter()
store[sys.argv[2]]
print(1e3 * (opened - begin), 1e6 * (time.perf_counter() - opened))
"""


def store(quick: bool) -> Iterator[str]:
    """Opening and asking a vector store."""
    n, dim = (5_000, 32) if quick else (1_000_000, 100)
    rng = np.random.default_rng(0)
    keys = [f"key{i:x}_{i * 7919 % 1000}" for i in range(n)]
    rows = rng.standard_normal((n, dim), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float16", "int8"):
            path = Path(folder, f"{dtype}.safetensors")
            begin = time.perf_counter()
            made = lutra.VectorStore.from_arrays(keys, rows, dtype=dtype)
            seconds = time.perf_counter() - begin
            made.save(path)
            command = [sys.executable, "-c", _OPEN, str(path), keys[n // 2]]
            runs = [
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                for _ in range(5)
            ]
            opened, first = np.median(np.array(runs, float), 0)
            s = lutra.VectorStore(path)
            assert s.rows_of(keys[:1000]).tolist() == list(range(1000))
            many = [keys[i] for i in rng.integers(0, n, 1000)]
            one = best(lambda s=s: s[keys[7]], 0.2)
            similar = best(lambda s=s: s.most_similar(keys[7]), 0.5)
            several = best(lambda s=s, many=many: s[many], 0.2)
            unknown = best(lambda s=s: s["keyf00_unheard"], 0.2)
            yield (
                f"{n} x {dim} {dtype}, {path.stat().st_size / 1e6:.0f} MB, made in {seconds:.1f} s: a fresh "
                f"process opens it in {opened:.1f} ms and has its first vector {first:.0f} us later; one key "
                f"{1e6 * one:.1f} us, 1000 keys {1e6 * several:.0f} us, an unknown one {1e6 * unknown:.0f} "
                f"us, most_similar {1e3 * similar:.1f} ms"
            )


SECTIONS = {"match": match, "count": count, "layers": layers, "store": store, "sent2vec": sent2vec.lines}


def test_sections():
    for section in SECTIONS.values():
        assert all(list(section(True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()
    for name, section in SECTIONS.items():
        if options.only is None or name in options.only:
            print(f"== {name}")
            for line in section(options.quick):
                print(line, flush=True)


if __name__ == "__main__":
    main()
