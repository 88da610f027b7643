"""transplant: embeddings for another tokenizer's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import F64
from ..address import random_rows
from ..gather import bag
from ..scan import knn
from ._source import Source
from ._sparsemax import threshold
from ._tokens import canonical_tokens, script_of

METHODS = {"focus": 0, "script": 1, "mean": 2, "random": 3}
#: New tokens at a time, and similarities kept at a time.
_BLOCK, _SCORES = 4096, 1 << 22


class Transplant(NamedTuple):
    """Result of `transplant`.

    Attributes
    ----------
    rows : array, shape (new rows, dim), the library and type of the source
    copied_from : ndarray, shape (new rows,), int64
        The row of the source that a token has, -1 where it has a new one.
    drawn : ndarray, shape (new rows,), bool
        Rows that were drawn at random, from the mean and deviation of all rows or of a script.
    """

    rows: Any
    copied_from: np.ndarray
    drawn: np.ndarray


def transplant(
    source: Any,
    source_vocab: Mapping[str, int],
    target_vocab: Mapping[str, int],
    method: str = "focus",
    *,
    auxiliary: Any = None,
    match: str = "exact",
    rows: int | None = None,
    candidates: int = 64,
    min_tokens: int = 10,
    seed: int = 0,
) -> Transplant:
    """Rows for the tokens of a new vocabulary out of those of an old one.

    Tokens of both vocabularies keep their rows. The others get, by ``method``:

    - ``'focus'``: the sum of the rows of tokens in both, weighted by the sparsemax of the cosines between
      auxiliary vectors (FOCUS);
    - ``'script'``: N(mean, deviation) of the old tokens in the same script;
    - ``'mean'``: the mean of all rows;
    - ``'random'``: N(mean, deviation) of all rows.

    Parameters
    ----------
    source : array, shape (rows, dim), torch.nn.Embedding, compressed layer or `lutra.compress.Table`
        For an untied output head, call again with its weight.
    source_vocab, target_vocab : dict of str to int
        As ``tokenizer.get_vocab()`` gives them.
    method : {'focus', 'script', 'mean', 'random'}, default 'focus'
    auxiliary : array, shape (new rows, d), floating point; 'focus' only
        A vector for each id of the target vocabulary, of a small model trained on text in its tokens (the
        paper: fastText). Zero rows stand for tokens without one: they are drawn as by 'random'.
    match : {'exact', 'canonical'}, default 'exact'
        Tokens are the same where their texts are, or where their canonical forms are (`canonical_tokens`),
        which compares tokenizers of different kinds.
    rows : int, optional
        Rows of the result; default: the largest new id + 1. Ids that no token has are drawn as by 'random'.
    candidates : int, default 64
        'focus': how many neighbours are looked at first. Changes the time only: where the support of
        sparsemax may go beyond them, more are looked at, until it provably does not.
    min_tokens : int, default 10
        'script': scripts with fewer old tokens count as all rows.
    seed : int, default 0

    Returns
    -------
    Transplant

    Raises
    ------
    TypeError, ValueError, IndexError
        No vocabulary, ids that are negative, double or beyond the rows; shapes that do not fit; NaN;
        'focus' without auxiliary vectors or without a token in both vocabularies that has one.

    Notes
    -----
    Similarities are searched with `lutra.scan.knn` and summed with `lutra.gather.bag`, in blocks: the matrix
    (new tokens x common tokens) is never in memory. Cosines are float32, sparsemax of them is exact: a
    neighbour below the threshold of the k best has weight 0, and so has every one after it. Drawn rows depend
    on (seed, id) alone.

    References
    ----------
    Dobler and de Melo, FOCUS: Effective Embedding Initialization for Monolingual Specialization of
    Multilingual Models, EMNLP 2023, arXiv 2305.14481. Downey, Blevins, Goldfine and Steinert-Threlkeld,
    Embedding Structure Matters: Comparing Methods to Adapt Multilingual Vocabularies to New Languages, 2023,
    arXiv 2309.04679 (by script).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> old = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    >>> vectors = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5]], np.float32)
    >>> new = lutra.vocab.transplant(old, {"a": 0, "b": 1}, {"b": 0, "a": 1, "c": 2}, auxiliary=vectors)
    >>> new.rows[:2].tolist(), new.copied_from.tolist()
    ([[0.0, 1.0], [1.0, 0.0]], [1, 0, -1])
    """
    _checks.choice("method", method, METHODS)
    if match not in ("exact", "canonical"):
        raise ValueError(f"match must be 'exact' or 'canonical', got {match!r}")
    candidates = _checks.integer("candidates", candidates, 1)
    given = Source(source)
    old = _vocabulary("source_vocab", source_vocab, given.shape[0])
    new = _vocabulary("target_vocab", target_vocab, rows)
    count = max(new.values(), default=-1) + 1 if rows is None else _checks.integer("rows", rows, 0)
    if auxiliary is not None and method != "focus":
        raise ValueError(f"auxiliary goes with method 'focus', got method {method!r}")
    vectors = _auxiliary(auxiliary, count) if method == "focus" else None

    copied = _overlap(old, new, count, match)
    wide = np.float64 if given.table is None and given.code == F64 else np.float32
    out = np.empty((count, given.shape[1]), wide)
    kept = np.flatnonzero(copied >= 0)
    out[kept] = given.rows(copied[kept])
    tokens = np.zeros(count, bool)
    tokens[list(new.values())] = True
    todo = np.flatnonzero((copied < 0) & tokens)
    anyhow = np.flatnonzero(~tokens)  # ids between those of tokens
    drawn = np.zeros(count, bool)
    if method == "random":
        anyhow = np.concatenate([anyhow, todo])
    elif method == "mean":
        out[todo] = given.moments()[0]
    elif method == "script":
        for ids, (mean, deviation) in _by_script(given, old, new, todo, min_tokens):
            out[ids] = _draw(ids, mean, deviation, seed)
            drawn[ids] = True
    else:
        assert vectors is not None
        known = np.asarray(vectors.any(axis=1))
        anyhow = np.concatenate([anyhow, todo[~known[todo]]])
        _focus(out, vectors, kept[known[kept]], todo[known[todo]], candidates)
    if anyhow.size:
        mean, deviation = given.moments()
        out[anyhow] = _draw(anyhow, mean, deviation, seed)
        drawn[anyhow] = True
    return Transplant(given.back(out), copied, drawn)


# ---------------------------------------------------------------- checks
def _vocabulary(name: str, vocab: Mapping[str, int], rows: int | None) -> dict[str, int]:
    if not isinstance(vocab, Mapping):
        raise TypeError(f"{name} must be a dict from token to id, got {type(vocab).__qualname__}")
    ids: dict[int, str] = {}
    for token, number in vocab.items():
        if not isinstance(token, str):
            raise TypeError(f"{name} must be a dict from token (str) to id, got the key {token!r}")
        number = _checks.integer(f"{name}[{token!r}]", number, 0)
        if rows is not None and number >= rows:
            raise IndexError(
                f"{name}[{token!r}] is {number}; it must lie in [0, {rows}), the rows of the table"
            )
        if number in ids:
            raise ValueError(f"{name}: {token!r} and {ids[number]!r} both have the id {number}")
        ids[number] = token
    return dict(vocab)


def _auxiliary(auxiliary: Any, count: int) -> np.ndarray:
    if auxiliary is None:
        raise ValueError(
            "auxiliary is missing: method 'focus' needs a vector for each id of target_vocab (of a fastText "
            "model, say); methods 'script', 'mean' and 'random' need none"
        )
    given = Source(auxiliary)
    if given.shape[0] != count:
        raise ValueError(
            f"auxiliary has shape {given.shape}; it must have a row for each of the {count} new ids"
        )
    vectors = given.rows(np.arange(count)).astype(np.float32)
    bad = ~np.isfinite(vectors).all(1)
    if bad.any():
        raise ValueError(
            f"auxiliary[{int(bad.argmax())}] holds NaN or infinity; a missing vector is a zero row"
        )
    return vectors


def _overlap(old: dict[str, int], new: dict[str, int], count: int, match: str) -> np.ndarray:
    """The old id of each new id, -1 for none. Of old tokens of one form the lowest id."""
    if match == "canonical":
        forms, new_forms = canonical_tokens(old), canonical_tokens(new)
        known: dict[str, int] = {}
        for token, number in sorted(old.items(), key=lambda item: -item[1]):
            known[forms[token]] = number
    else:
        known, new_forms = old, {t: t for t in new}
    copied = np.full(count, -1, np.int64)
    for token, number in new.items():
        copied[number] = known.get(new_forms[token], -1)
    return copied


# ---------------------------------------------------------------- methods
def _draw(ids: np.ndarray, mean: np.ndarray, deviation: np.ndarray, seed: int) -> np.ndarray:
    return mean + deviation * random_rows(ids, len(mean), seed=seed)


def _by_script(
    given: Source, old: dict[str, int], new: dict[str, int], todo: np.ndarray, min_tokens: int
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """The ids among todo that are of one script, and the moments of the old rows of that script."""

    def grouped(vocab: dict[str, int], wanted: set[int] | None = None) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for token, form in canonical_tokens(vocab).items():
            if wanted is None or vocab[token] in wanted:
                groups.setdefault(script_of(form), []).append(vocab[token])
        return groups

    known, everything = grouped(old), None
    for script, ids in grouped(new, set(todo.tolist())).items():
        same = np.sort(np.array(known.get(script, []), np.int64))
        if len(same) >= max(min_tokens, 1):
            yield np.array(ids, np.int64), given.moments(same)
        else:
            everything = given.moments() if everything is None else everything
            yield np.array(ids, np.int64), everything


def _focus(out: np.ndarray, vectors: np.ndarray, known: np.ndarray, todo: np.ndarray, k: int) -> None:
    """out[todo] = weighted sums of out[known]."""
    if not todo.size:
        return
    if not known.size:
        raise ValueError(
            "no token is in both vocabularies and has an auxiliary vector: there is nothing to build rows of"
        )
    database, table = vectors[known], np.ascontiguousarray(out[known])
    while todo.size:  # once, but for tokens whose support may go beyond their k nearest: look further
        k = min(k, len(known))
        size = max(1, min(_BLOCK, _SCORES // k))
        todo = np.concatenate(
            [
                _combine(out, todo[i : i + size], vectors, database, table, k)
                for i in range(0, len(todo), size)
            ]
        )
        k *= 4


def _combine(
    out: np.ndarray, ids: np.ndarray, vectors: np.ndarray, database: np.ndarray, table: np.ndarray, k: int
) -> np.ndarray:
    """Rows of ids from their k nearest; gives back those for which k was too few, unwritten."""
    scores, near = knn(vectors[ids], database, k=k, metric="cosine")
    ordered = scores.astype(np.float64)
    tau = threshold(ordered)
    sure = np.ones(len(ids), bool) if k == len(database) else ordered[:, -1] <= tau[:, 0]
    weights = np.maximum(ordered - tau, 0)[sure]
    inside = weights > 0
    offsets = np.concatenate([[0], inside.sum(1).cumsum()])
    out[ids[sure]] = bag(
        table, near[sure][inside], offsets, weights[inside].astype(table.dtype), include_last_offset=True
    )
    return ids[~sure]
