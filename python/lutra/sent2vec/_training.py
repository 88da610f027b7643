"""The loop around the kernel: epochs, slices of the corpus, losses."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from .. import _backend
from ..index._progress import Progress
from ..reference import sent2vec as reference
from ._corpus import Corpus

_ALIGN = 16  # floats of a cache line: rows begin at one
_SLICE = 250_000  # words of a call: some tenths of a second, between which Ctrl-C is heard


def padded(dim: int) -> int:
    return -(-dim // _ALIGN) * _ALIGN


def empty_rows(rows: int, dim: int) -> np.ndarray:
    """(rows, padded dim) zeros, at a cache line, in huge pages where the system has them: rows are read in
    random order, and each small page would be looked up anew."""
    size = max(rows * padded(dim), 1)
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    memory = mmap.mmap(-1, 4 * size, flags=private) if private else mmap.mmap(-1, 4 * size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32, rows * padded(dim)).reshape(rows, padded(dim))


def first_rows(rows: int, dim: int, seed: int) -> np.ndarray:
    """Uniform in [-1/dim, 1/dim)."""
    out = empty_rows(rows, dim)
    rng = np.random.Generator(np.random.Philox(seed))
    for begin in range(0, rows, 65_536):
        part = out[begin : begin + 65_536, :dim]
        part[:] = (rng.random(part.shape, np.float32) * 2 - 1) / dim
    return out


def keep_thresholds(counts: np.ndarray, total: int, subsample: float, least: int) -> np.ndarray:
    """For each id the chance to be a target, times 2^32: sqrt(t / f) + t / f of its frequency f, 1 at most;
    0 for row 0 and words that are rarer than ``least``."""
    ratio = subsample * total / counts if subsample else np.ones(len(counts))
    chance = np.minimum(np.sqrt(ratio) + ratio, 1) if subsample else ratio
    chance = np.where(counts < least, 0, chance)
    return np.concatenate([[0], np.floor(chance * 2**32)]).astype(np.int64)


def _slices(corpus: Corpus, threads: int):
    """Sentences [first, last) of some hundred thousand words each."""
    ends = corpus.offsets
    first, last = 0, len(ends) - 1
    while first < last:
        stop = int(np.searchsorted(ends, ends[first] + _SLICE * threads, "left"))
        stop = min(max(stop, first + 1), last)
        yield first, stop
        first = stop


def train(
    corpus: Corpus, dim: int, *, word_ngrams: int, buckets: int, min_target_count: int, negatives: int,
    lr: float, epochs: int, subsample: float, dropout_k: int, threads: int, seed: int, progress: bool | None,
) -> tuple[np.ndarray, np.ndarray, list[float]]:  # fmt: skip
    """The two tables, padded, and the mean loss of a target in each epoch."""
    words = len(corpus.words) + 1
    keep = keep_thresholds(corpus.counts, corpus.total, subsample, min_target_count)
    if not (
        (keep[corpus.tokens] > 0) & np.repeat(np.diff(corpus.offsets) > 1, np.diff(corpus.offsets))
    ).any():
        raise ValueError(
            "no sentence has two known words of which one may be a target: there is nothing to learn from"
        )
    alias = reference.alias_table(np.sqrt(corpus.counts))
    rows, output = first_rows(words + buckets, dim, seed), empty_rows(words, dim)
    n = len(corpus.tokens)
    losses = []
    with Progress(epochs * n, "training", progress) as bar:
        for epoch in range(epochs):
            loss, count = 0.0, 0
            for first, last in _slices(corpus, threads):
                before = epoch * n
                if _backend.core is None:
                    part, targets = reference.train(
                        rows, output, corpus.tokens, corpus.offsets, first, last, n_words=words,
                        buckets=buckets, order=word_ngrams, dropout=dropout_k, negatives=negatives, keep=keep,
                        alias=alias, lr=lr, total=epochs * n, before=before, seed=seed,
                    )  # fmt: skip
                else:
                    part, targets, bad = _backend.core.sent2vec(
                        rows, output, words, buckets, rows.shape[1], corpus.tokens, n, corpus.offsets, first,
                        last, word_ngrams, dropout_k, negatives, keep, alias, lr, float(epochs * n), before,
                        seed, threads,
                    )  # fmt: skip
                    assert bad < 0, bad
                loss, count = loss + part, count + targets
                if not np.isfinite(loss):
                    raise FloatingPointError(
                        f"training diverged in epoch {epoch + 1} of {epochs}, at sentence {first} or later: "
                        f"the loss is {loss}; lr = {lr} is too large"
                    )
                bar.tick(int(corpus.offsets[last] - corpus.offsets[first]))
            losses.append(loss / max(count, 1))
    return rows, output, losses
