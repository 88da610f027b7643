"""Sentences in, numbers out: the vocabulary of a corpus, and its words as ids."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import address
from ..address._ngrams import Vocabulary
from ..index._progress import Progress

#: Row 0. The name is the original's; as a word of the look-up it is a space, which no word of a text is.
PLACEHOLDER = "<PLACEHOLDER>"
_BLOCK = 1 << 22  # bytes of a file, and about as many of a list, at a time
_TEXTS = 1 << 15


class Corpus(NamedTuple):
    """What training reads."""

    words: list[str]  # the most frequent first; word i has id i + 1
    counts: np.ndarray  # (words,), int64
    total: int  # words of the corpus, unknown ones too
    tokens: np.ndarray  # ids of the known ones, int32
    offsets: np.ndarray  # (sentences + 1,), int64


def look_up(words: Sequence[str]) -> Vocabulary:
    """The vocabulary for `address.ngrams`, row 0 before the words."""
    return Vocabulary([" ", *words])


def sentence_list(sentences: Any, name: str = "sentences") -> list[str]:
    """A sequence of texts, or of lists of words, as texts."""
    if isinstance(sentences, (str, bytes, os.PathLike)) or not isinstance(sentences, Iterable):
        raise TypeError(
            f"{name} must be a sequence of str (or of lists of words), got {type(sentences).__qualname__}"
        )
    texts = list(sentences)
    for i, text in enumerate(texts):
        if isinstance(text, str):
            continue
        if not isinstance(text, (list, tuple)) or not all(isinstance(word, str) for word in text):
            raise TypeError(f"{name}[{i}] must be a str or a list of str, got {text!r:.60}")
        for word in text:
            if len(word.encode(errors="surrogatepass").split()) != 1 or word.strip(" \t\n\v\f\r") != word:
                raise ValueError(f"{name}[{i}]: {word!r} is not one word: it is empty or holds white space")
        texts[i] = " ".join(text)
    return texts


class Texts:
    """Blocks of sentences, as often as they are asked for: the lines of a file, or a list."""

    def __init__(self, source: Any) -> None:
        self.path = os.fsdecode(source) if isinstance(source, os.PathLike) else None
        if isinstance(source, str):
            self.path = source
        self._list = [] if self.path is not None else sentence_list(source)
        self.size = len(self._list) if self.path is None else os.path.getsize(self.path)

    def __iter__(self) -> Iterator[tuple[list[str], int]]:
        """Blocks and their sizes, in the unit of ``size``."""
        if self.path is None:
            for begin in range(0, len(self._list), _TEXTS):
                block = self._list[begin : begin + _TEXTS]
                yield block, len(block)
            return
        done = 0
        with open(self.path, "rb") as file:
            while lines := file.readlines(_BLOCK):
                data = b"".join(lines)
                try:
                    text = data.decode()
                except UnicodeDecodeError as error:
                    line = done + data.count(b"\n", 0, error.start) + 1
                    raise ValueError(f"{self.path}, line {line}: not UTF-8 ({error.reason})") from None
                done += len(lines)
                yield text.removesuffix("\n").split("\n"), len(data)


def read(
    source: Any, *, min_count: int, max_words: int | None, lowercase: bool, progress: bool | None
) -> Corpus:
    """Two passes over the sentences: counts, then ids."""
    texts = Texts(source)
    found: Counter[bytes] = Counter()
    with Progress(2 * texts.size, "reading", progress) as bar:
        for block, size in texts:
            text = "\n".join(block)
            try:
                found.update((text.lower() if lowercase else text).encode().split())
            except UnicodeEncodeError:
                bad = next(i for i, t in enumerate(block) if any("\ud800" <= c <= "\udfff" for c in t))
                raise ValueError(
                    f"a sentence holds a lone surrogate and has no UTF-8 form: {block[bad]!r:.80}"
                ) from None
            bar.tick(size)
        kept = [(word, n) for word, n in found.most_common(max_words) if n >= min_count]
        if len(kept) < 2:
            most = found.most_common(1)
            raise ValueError(
                f"sentences hold {len(kept)} words that occur min_count = {min_count} times, at least 2 are "
                f"needed; there are {len(found)} different words, the most frequent "
                + (f"occurs {most[0][1]} times" if most else "does not exist: the corpus is empty")
            )
        words = [word.decode() for word, _ in kept]
        vocabulary = look_up(words)
        tokens, lengths = [], []
        for block, size in texts:
            ids, starts = address.ngrams(
                block, buckets=1, word_ngrams=1, vocabulary=vocabulary, tokenizer="whitespace",
                lowercase=lowercase,
            )  # fmt: skip
            tokens.append(ids.astype(np.int32))
            lengths.append(np.diff(starts, append=len(ids)))
            bar.tick(size)
    offsets = np.concatenate([[0], *lengths]).cumsum()
    longest = int(np.diff(offsets).max())
    if longest >= 1 << 24:
        raise ValueError(f"a sentence has {longest} words; at most {(1 << 24) - 1} are taken")
    counts = np.array([n for _, n in kept], np.int64)
    return Corpus(words, counts, found.total(), np.concatenate(tokens), offsets.astype(np.int64))
