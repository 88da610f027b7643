"""ngrams and token_ngrams: hashed n-grams of strings and of integer tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .. import _backend, _checks
from .._arrays import I32, I64, call, eager, quick, type_name
from ..reference import ngrams as reference

TOKENIZERS = {"word": 0, "whitespace": 1}
_MAX_BUCKETS = 1 << 62
_MAX_ORDER = (1 << 31) - 1
_INTEGERS = (I32, I64)
_quick = quick("token_ngrams")
_tuple = tuple.__new__  # builds a named tuple in half the time of calling its class


class Ngrams(NamedTuple):
    """Result of `ngrams` and `token_ngrams`: ``ids`` of all texts in a row, and where each text's begin."""

    ids: Any
    offsets: Any


class Vocabulary:
    """Words and their indices, prepared once for many calls of `ngrams`.

    Parameters
    ----------
    words : sequence of str
        Distinct; a word's id is its position. Words are compared as they are: with ``lowercase=True`` a word
        with capitals is never found.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = _strings(words, "words")
        seen: dict[str, int] = {}
        for i, word in enumerate(self.words):
            if seen.setdefault(word, i) != i:
                raise ValueError(f"words must be distinct; {word!r} is at {seen[word]} and at {i}")
        _utf8_or_raise(self.words, "words")
        self._table = None if _backend.core is None else _backend.core.WordTable(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self.words)} words)"

    def __reduce__(self):
        return Vocabulary, (self.words,)


def ngrams(
    texts: str | Sequence[str],
    *,
    buckets: int = 2_000_000,
    word_ngrams: int = 2,
    char_ngrams: tuple[int, int] | None = None,
    vocabulary: Sequence[str] | Vocabulary | None = None,
    tokenizer: str = "word",
    lowercase: bool = True,
) -> Ngrams:
    """Hash the words, word n-grams and character n-grams of texts to integer ids.

    The ids and offsets are what `lutra.gather.bag` and ``torch.nn.EmbeddingBag`` take. The hashes are
    those of fastText and sent2vec, so that tables trained there can be read.

    Parameters
    ----------
    texts : str or sequence of str
        One text, or several. An empty text gives an empty bag.
    buckets : int, default 2_000_000
        Number of ids that hashes fall on.
    word_ngrams : int, default 2
        Longest n-gram of words: 1 gives the words alone, 0 not even those.
    char_ngrams : (int, int), optional
        Shortest and longest n-gram of characters (code points) of each word, taken from ``<word>``.
    vocabulary : sequence of distinct str or Vocabulary, optional
        Known words keep their index as id, other words are dropped, and hashed ids begin at
        ``len(vocabulary)`` (as in sent2vec). A `Vocabulary` is prepared once, a sequence at each call.
    tokenizer : {'word', 'whitespace'}, default 'word'
        Words are the longest runs of letters, digits, ``_`` and anything beyond ASCII; or whatever ASCII
        white space divides.
    lowercase : bool, default True
        Apply ``str.lower`` first.

    Returns
    -------
    ids : ndarray, int64
        In ``[0, buckets)``, or ``[0, len(vocabulary) + buckets)``. For each text: its words, then its word
        n-grams (by start, then length), then its character n-grams (by word, start, length).
    offsets : ndarray, shape (texts,), int64
        Where each text's ids begin.

    Raises
    ------
    TypeError
        ``texts`` or ``vocabulary`` is no sequence of str; the error says at which position.
    ValueError
        A number or ``tokenizer`` is out of range, a word is twice in ``vocabulary``, or a string holds a lone
        surrogate (and so has no UTF-8 form).

    Notes
    -----
    Cost: a few nanoseconds a byte for words, and as much for each id of a character n-gram; texts are
    worked on in parallel, without the GIL. The formulas: a word's value ``v`` is its FNV-1a hash (32 bits,
    signed bytes) sign-extended to 64 bits, or its index in ``vocabulary``; an n-gram's
    ``h = h * 116049371 + v``, from left to right, modulo 2**64; an id is ``len(vocabulary) + h mod buckets``.

    References
    ----------
    Bojanowski, Grave, Joulin, Mikolov, Enriching Word Vectors with Subword Information, TACL 2017.
    Pagliardini, Gupta, Jaggi, Unsupervised Learning of Sentence Embeddings using Compositional n-Gram
    Features, NAACL 2018.

    Examples
    --------
    >>> import lutra
    >>> lutra.address.ngrams(["to be or not", "to be"], buckets=1000, word_ngrams=1)
    Ngrams(ids=array([708, 232, 588, 802, 708, 232]), offsets=array([0, 4]))
    """
    buckets = _integer("buckets", buckets, 1, _MAX_BUCKETS)
    word_ngrams = _integer("word_ngrams", word_ngrams, 0, _MAX_ORDER)
    low, high = (1, 0) if char_ngrams is None else _char_range(char_ngrams)
    whitespace = _checks.choice("tokenizer", tokenizer, TOKENIZERS) == 1
    _bool("lowercase", lowercase)
    words = vocabulary
    if words is not None and not isinstance(words, Vocabulary):
        words = Vocabulary(_strings(words, "vocabulary"))
    texts = (texts,) if isinstance(texts, str) else _strings(texts, "texts", "a str or a sequence of str")
    if _backend.core is not None:
        table = None if words is None else words._table
        result = _backend.core.text_ngrams(
            texts, buckets, word_ngrams, low, high, table, whitespace, bool(lowercase)
        )  # fmt: skip
        if type(result) is tuple:
            return _tuple(Ngrams, result)
    _utf8_or_raise(texts, "texts")
    return Ngrams(
        *reference.ngrams(
            texts,
            buckets=buckets,
            word_ngrams=word_ngrams,
            char_ngrams=(low, high) if high else None,
            vocabulary=None if words is None else words.words,
            tokenizer=tokenizer,
            lowercase=lowercase,
        )
    )


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is int and low <= value <= high:
        return value
    return _checks.integer(name, value, low, high)


def _bool(name: str, value: Any) -> None:
    if value is not True and value is not False and not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type_name(value)}")


def _char_range(value: Any) -> tuple[int, int]:
    try:
        low, high = value
    except (TypeError, ValueError):
        raise TypeError(f"char_ngrams must be None or a pair (shortest, longest), got {value!r}") from None
    low = _checks.integer("char_ngrams[0]", low, 1, _MAX_ORDER)
    return low, _checks.integer("char_ngrams[1]", high, low, _MAX_ORDER)


def _strings(value: Any, name: str, need: str = "a sequence of str") -> tuple[str, ...]:
    """A sequence (or a 1-d array, or a column of a data frame) of str as a tuple."""
    if isinstance(value, (bytes, bytearray, memoryview, str)) or not (
        isinstance(value, Sequence) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1)
    ):
        raise TypeError(f"{name} must be {need}, got {type_name(value)}")
    strings = tuple(value)
    for i, s in enumerate(strings):
        if not isinstance(s, str):
            raise TypeError(f"{name}[{i}] must be a str, got {s!r:.60} of type {type_name(s)}")
    return strings


def _utf8_or_raise(strings: tuple[str, ...], name: str) -> None:
    for i, s in enumerate(strings):
        try:
            s.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}[{i}] holds a lone surrogate, U+{ord(s[error.start]):04X} at {error.start}, "
                "and cannot be encoded as UTF-8"
            ) from None


# ---------------------------------------------------------------- integer tokens
def token_ngrams(
    tokens: Any,
    offsets: Any = None,
    *,
    order: int = 2,
    buckets: int,
    first_bucket: int = 0,
    unigrams: bool = True,
) -> Ngrams:
    """Hash the n-grams of integer tokens to ids, with sent2vec's rolling hash.

    Parameters
    ----------
    tokens : array, shape (texts, length) or (total,), int32 or int64
    offsets : array, shape (texts,), int32 or int64, optional
        For 1-d tokens: where each text begins. The first is 0; a text may be empty.
    order : int, default 2
        Longest n-gram.
    buckets : int
        Number of ids that the hashes of n-grams fall on.
    first_bucket : int, default 0
        The first of those ids. When it is positive it is the size of the vocabulary, and a unigram's id is
        the token itself; when it is 0 the token modulo ``buckets``.
    unigrams : bool, default True
        Whether the tokens themselves are among the ids.

    Returns
    -------
    ids : array, int64
        For each text its unigrams, then the n-grams of 2..order tokens by start, then length.
    offsets : array, shape (texts,), int64
        Where each text's ids begin.

    Raises
    ------
    TypeError
        No array, or another dtype.
    ValueError
        Another number of dimensions, ``offsets`` missing or not increasing, or an option out of range.
    IndexError
        A token outside ``[0, first_bucket)`` where it is an id (on the CPU; on CUDA the id is passed on, and
        `lutra.gather.bag` gives NaN for it).

    Notes
    -----
    ``h = token_i``, ``h = h * 116049371 + token_j`` modulo 2**64 for each next token,
    ``id = first_bucket + h mod buckets``. Cost: about a nanosecond an id. The number of ids of ragged texts
    on CUDA is known only when the offsets are: that call waits for the device; 2-d tokens do not.

    References
    ----------
    Pagliardini, Gupta, Jaggi, Unsupervised Learning of Sentence Embeddings using Compositional n-Gram
    Features, NAACL 2018.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.address.token_ngrams(np.array([[1, 2, 3]]), buckets=100, first_bucket=10).ids
    array([  1,   2,   3,  83,  55])
    """
    if type(tokens) is np.ndarray or eager(tokens):
        result = _quick(tokens, offsets, order, buckets, first_bucket, unigrams)
        if result is not None:
            return _tuple(Ngrams, result)
    options = (order, buckets, first_bucket, unigrams)
    return _tuple(Ngrams, call("token_ngrams", _token_ngrams, (tokens, offsets), options))


def _count(length: Any, order: int, unigrams: bool) -> Any:
    """Number of ids of texts with so many tokens (an int or an array): the sum of length - n + 1 over n."""
    longest = min(length, order) if isinstance(length, int) else np.minimum(length, order)
    return (longest - 1) * (length + 1) - (longest + 2) * (longest - 1) // 2 + (length if unigrams else 0)


def _token_ngrams_shape(tokens, offsets, order, buckets, first_bucket, unigrams):
    """Checks that need no data."""
    _integer("order", order, 1, _MAX_ORDER)
    _integer("buckets", buckets, 1, _MAX_BUCKETS)
    _integer("first_bucket", first_bucket, 0, _MAX_BUCKETS)
    _bool("unigrams", unigrams)
    if offsets is None:
        if len(tokens.shape) == 1:
            raise ValueError("tokens is 1-d: it needs offsets; a single text has tokens of shape (1, length)")
        if len(tokens.shape) != 2:
            _checks.ndim(tokens, "tokens", 2)
    else:
        if len(tokens.shape) == 2:
            raise ValueError("tokens is 2-d: it takes no offsets; pass 1-d tokens")
        _checks.ndim(tokens, "tokens", 1)
        _checks.ndim(offsets, "offsets", 1)


def _token_ngrams(kind, tokens, offsets, order, buckets, first_bucket=0, unigrams=True):
    if offsets is not None:
        _checks.same_kind(kind, offsets, "offsets", tokens, "tokens")
    _token_ngrams_shape(tokens, offsets, order, buckets, first_bucket, unigrams)
    code = kind.code(tokens)
    if code not in _INTEGERS:
        _checks.dtype(kind, tokens, "tokens", _INTEGERS)
    if offsets is not None:
        _checks.dtype(kind, offsets, "offsets", _INTEGERS)
    if kind.kernels is None:
        _checks.no_kernel(kind, "token_ngrams")
    total = prod(tokens.shape)
    if offsets is None:
        texts, length = tokens.shape
        count = _count(length, order, unigrams)
        n_ids = texts * count
        if kind.cuda:
            starts = None
            out_starts = kind.empty((texts,), I64, tokens) if n_ids else _steps(kind, texts, 0, tokens)
        else:  # the binding writes them
            starts, out_starts = None, kind.empty((texts + 1,), I64, tokens)
    else:
        host = _offsets(kind.to_numpy(offsets), total)
        texts = len(host) - 1
        sums = np.zeros(texts + 1, np.int64)
        np.cumsum(_count(np.diff(host), order, unigrams), out=sums[1:])
        starts, out_starts = kind.from_numpy(host, I64, tokens), kind.from_numpy(sums, I64, tokens)
        n_ids = int(sums[-1])
    if not kind.cuda:
        if first_bucket and unigrams:
            _tokens_in_vocabulary(kind.to_numpy(tokens), first_bucket)
        if kind.kernels is None:
            ids, out_offsets = reference.token_ngrams(
                kind.to_numpy(tokens), None if offsets is None else host[:-1], order=order, buckets=buckets,
                first_bucket=first_bucket, unigrams=unigrams,
            )  # fmt: skip
            return kind.from_numpy(ids, I64, tokens), kind.from_numpy(out_offsets, I64, tokens)
    tokens = kind.dense(tokens)
    ids = kind.empty((n_ids,), I64, tokens)
    if kind.cuda:
        kind.kernels.token_ngrams(
            kind.ptr(tokens), code, total, -1 if offsets is not None else length,
            None if starts is None else kind.ptr(starts), kind.ptr(out_starts), texts, order, first_bucket,
            buckets, bool(unigrams), kind.ptr(ids), n_ids, *kind.launch(tokens),
        )  # fmt: skip
        return ids, out_starts[:texts]
    if code != I64:
        tokens = kind.cast(tokens, I64)
    kind.kernels.token_ngrams(
        kind.ptr(tokens), total, None if starts is None else kind.ptr(starts), kind.ptr(out_starts), texts,
        order, first_bucket, buckets, bool(unigrams), kind.ptr(ids), n_ids,
    )  # fmt: skip
    return ids, out_starts[:texts]


def _steps(kind, n, step, like):
    """0, step, 2 step, ..., n step on the GPU of ``like``, without waiting for it."""
    if kind.name == "cupy":
        with like.device:
            return kind.cupy.arange(n + 1, dtype=np.int64) * step
    return kind.torch.arange(n + 1, dtype=kind.torch.int64, device=like.device) * step


def _offsets(offsets: np.ndarray, total: int) -> np.ndarray:
    """The starts with the end appended, checked."""
    full = np.append(offsets.astype(np.int64), total)
    if full[0] != 0 and len(offsets):
        raise ValueError(f"offsets[0] must be 0, got {full[0]}")
    if not len(offsets) and total:
        raise ValueError(f"offsets is empty, but tokens has {total} values")
    down = np.flatnonzero(np.diff(full) < 0)
    if len(down):
        i = down[0]
        if i + 1 == len(offsets):
            raise ValueError(f"offsets[{i}] is {full[i]}; tokens has only {total} values")
        raise ValueError(
            f"offsets must not decrease: offsets[{i}] is {full[i]}, offsets[{i + 1}] is {full[i + 1]}"
        )
    return full


def _tokens_in_vocabulary(tokens: np.ndarray, size: int) -> None:
    if tokens.size and (tokens.min() < 0 or tokens.max() >= size):
        at = np.argwhere((tokens < 0) | (tokens >= size))[0]
        where = ", ".join(map(str, at))
        raise IndexError(f"tokens[{where}] is {tokens[tuple(at)]}; it must be in [0, first_bucket = {size})")
