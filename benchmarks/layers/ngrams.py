"""n-gram memories: longest matches, counted vocabularies, SconeEmbedding and Engram."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from real_data import data_folder

import lutra

from .timing import median_seconds


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
                    rate = len(tokens) / median_seconds(
                        lambda t=tokens, v=v: lutra.address.longest_match(t, v)
                    )
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
    rate = len(part) / median_seconds(dictionary)
    yield f"a dictionary of {len(known)} tuples: {rate / 1e6:.2f} M tokens/s"


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
        yield f"SconeEmbedding, 64 x 512 tokens: {1e3 * median_seconds(lambda: layer(tokens)):.2f} ms"
        yield f"nn.Embedding, the same tokens: {1e3 * median_seconds(lambda: embed(tokens)):.2f} ms"
    engram = lutra.nn.Engram(512, 32_000, rows=1_000 if quick else 100_003)
    hidden = torch.randn(8, 512, 512)
    t = tokens[:8]
    with torch.no_grad():
        yield f"Engram(512), 8 x 512 tokens: {1e3 * median_seconds(lambda: engram(hidden, t)):.2f} ms"
        ours = median_seconds(lambda: engram.ids(t))
        from lutra.address._xor_ngrams import composition

        args = engram.multipliers, engram.moduli, engram.orders, 0
        assert torch.equal(composition(t, *args), engram.ids(t))
        theirs = median_seconds(lambda: composition(t, *args))
        yield f"its ids: {1e3 * ours:.3f} ms; in torch's own ops {1e3 * theirs:.3f} ms"


def lines(quick: bool) -> Iterator[str]:
    """All of it, a line each."""
    for part in (match, count, layers):
        yield from part(quick)
