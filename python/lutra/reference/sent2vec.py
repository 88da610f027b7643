"""Reference of sent2vec's training (csrc/gather/sent2vec.h): a gradient step a target, one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .ngrams import _STEP

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
#: A negative that is the target is drawn again so often; then it is the word after the target.
TRIES = 64


def mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def draws(seed: int, token: int) -> Iterator[int]:
    """The random 64-bit numbers of a token: functions of the seed, the token's number and the draw's."""
    key = mix((mix(seed) + (token + 1) * _GOLDEN) & _MASK)
    k = 1
    while True:
        yield mix((key + k * _GOLDEN) & _MASK)
        k += 1


def alias_table(weights: np.ndarray) -> np.ndarray:
    """Walker's table (1977, in Vose's order): with it a draw from a distribution takes one look.

    Entry i, uint64, is alias << 32 | accept: a random number r means column c = (r >> 32) n >> 32, and c
    itself if its lower half is below accept, else the alias.
    """
    n = len(weights)
    scaled = (np.asarray(weights, np.float64) * (n / np.sum(weights))).tolist()
    small = [i for i in range(n) if scaled[i] < 1]
    large = [i for i in range(n) if scaled[i] >= 1]
    accept, alias = [0xFFFFFFFF] * n, list(range(n))
    while small and large:
        s, g = small.pop(), large[-1]
        accept[s], alias[s] = int(scaled[s] * 2**32), g
        scaled[g] -= 1 - scaled[s]
        if scaled[g] < 1:
            small.append(large.pop())
    return np.array(alias, np.uint64) << np.uint64(32) | np.array(accept, np.uint64)


def context(
    words: list[int], at: int, dropped: set[int], n_words: int, buckets: int, order: int
) -> list[int]:
    """Rows of the context of the target at a position: the words, 0 in its place, and their n-grams, without
    those that hold a dropped position."""
    values = [0 if j == at else w for j, w in enumerate(words)]
    rows = list(values)
    for i in range(len(values)):
        h = values[i]
        for j in range(i + 1, min(i + order, len(values))):
            if dropped.intersection(range(i, j + 1)):
                break
            h = (h * _STEP + values[j]) & _MASK
            rows.append(n_words + h % buckets)
    return rows


def step(rows, output, context, target, negatives, lr) -> float:
    """One target: the loss, before the step; ``rows`` and ``output`` go down its gradient, in place.

    loss = -ln s(<h, output[target]>) - sum of ln s(-<h, output[n]>) over the negatives, with h the mean of
    the rows of the context and s the logistic function.
    """
    h = rows[context].mean(0)
    ids = np.array([target, *negatives])
    sign = np.where(np.arange(len(ids)) == 0, 1, -1)
    score = sign * (output[ids] @ h)
    down = lr * sign / (1 + np.exp(np.minimum(score, 80)))  # minus the gradient of the scores, times lr
    g = (down[:, None] * output[ids]).sum(0) / len(context)
    np.add.at(output, ids, (down[:, None] * h).astype(output.dtype))
    np.add.at(rows, context, g.astype(rows.dtype))
    return float(np.logaddexp(0, -score.astype(np.float64)).sum())


def train(
    rows, output, tokens, offsets, first, last, *, n_words, buckets, order, dropout, negatives, keep, alias,
    lr, total, before, seed,
) -> tuple[float, int]:  # fmt: skip
    """Sentences [first, last) of an epoch, in place; the sum of the losses and the number of targets.

    ``before`` tokens of ``total`` come before the epoch; the learning rate of a sentence is
    ``lr (1 - tokens before it / total)``.
    """
    loss, count = 0.0, 0
    for s in range(first, last):
        begin, end = int(offsets[s]), int(offsets[s + 1])
        words = tokens[begin:end].tolist()
        n = len(words)
        if n < 2:
            continue
        rate = np.float32(lr * (1 - (before + begin) / total))
        for at, target in enumerate(words):
            random = draws(seed, before + begin + at)
            if next(random) >> 32 >= keep[target]:
                continue
            dropped: set[int] = set()
            while len(dropped) < min(dropout if order > 1 else 0, n - 2):
                dropped.add((next(random) >> 32) * n >> 32)
            drawn = []
            for _ in range(negatives):
                for _ in range(TRIES):
                    r = next(random)
                    c = (r >> 32) * len(alias) >> 32
                    entry = int(alias[c])
                    word = 1 + (c if r & 0xFFFFFFFF < entry & 0xFFFFFFFF else entry >> 32)
                    if word != target:
                        break
                else:
                    word = target % len(alias) + 1
                drawn.append(word)
            rows_of = context(words, at, dropped, n_words, buckets, order)
            loss += step(rows, output, rows_of, target, drawn, rate)
            count += 1
    return loss, count
