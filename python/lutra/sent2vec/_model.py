"""Sent2Vec: an estimator of sentence vectors."""

from __future__ import annotations

import inspect
import math
import os
from typing import Any

import numpy as np

from .. import _checks, address, gather
from ..index import _files
from . import _corpus, _fasttext, _training

_KIND = "sent2vec"
_TEXTS = 1 << 14  # of a call of transform at a time: their ids fit into the caches


class Sent2Vec:
    """Vectors of sentences: the mean of trained vectors of their words and word n-grams.

    A sentence is a str whose words are divided by white space, or a list of words. Nothing else is done to
    it: split punctuation off and lower capitals before, or with ``lowercase``.

    Parameters
    ----------
    dim : int, default 100
    word_ngrams : int, default 2
        Longest n-gram of words, at most 64; 1 for words alone.
    buckets : int, default 2_000_000
        Rows that the hashes of n-grams fall on, ``4 dim`` bytes each.
    min_count : int, default 5
        Rarer words are unknown: they are passed over, as if they were not in the sentence.
    min_target_count : int, default 0
        Rarer words are context only, never the word to be told from the others (the original's
        minCountLabel).
    max_words : int, optional
        Keep the most frequent ones only.
    negatives : int, default 10
        Words drawn against each target, in proportion to the square roots of the counts.
    lr : float, default 0.2
        Learning rate at the start; it falls linearly to 0.
    epochs : int, default 5
    subsample : float, default 1e-4
        A word of relative frequency f is a target with the chance ``sqrt(t / f) + t / f``, t this number; 0:
        always. It is part of the context in any case.
    dropout_k : int, default 2
        For each target, n-grams with any of so many words drawn at random are left out of the context.
    lowercase : bool, default False
        Apply ``str.lower``, in `fit` and `transform`.
    threads : int, default 1
        With 1, `fit` gives the same bits for the same sentences and parameters (on one SIMD level). More
        train without locks (Hogwild): faster, as good, and never twice the same.
    seed : int, default 0
    progress : bool, optional
        None: a bar after two seconds, on a terminal and where tqdm is installed; True: at once; False: never.

    Attributes
    ----------
    words_ : list of str, the most frequent first
    counts_ : ndarray, (words,), int64
    table_ : ndarray, (1 + words + buckets, dim), float32
        The rows that sentences are means of: row 0 stood for the missing word in training, row 1 + i is word
        i's, row ``1 + words + h`` that of the n-grams of hash h. ``buckets`` is 1 where word_ngrams is 1.
    output_ : ndarray, (1 + words, dim), float32
        The rows of targets and negatives.
    loss_ : list of float
        The mean loss of a target in each epoch, as it was before its step.

    Notes
    -----
    Training is the published code's, target by target: the context of a target is its sentence with the
    target taken out (row 0 in its place), and the n-grams of that. ``</s>`` is no word here, so frequencies
    and negatives differ a little from the original's. A sentence costs its targets times
    ``2 (negatives + 1)`` rows of the cache and its words times four rows of memory: what its targets have in
    common is read and written once (csrc/gather/sent2vec.h). The ids of the corpus are held in memory, 4
    bytes a word.

    References
    ----------
    Pagliardini, Gupta, Jaggi, Unsupervised Learning of Sentence Embeddings using Compositional n-Gram
    Features, NAACL 2018 (arXiv 1703.02507). Niu, Recht, Re, Wright, Hogwild!, NIPS 2011.

    Examples
    --------
    >>> import lutra
    >>> model = lutra.Sent2Vec(dim=16, buckets=1000, min_count=1, epochs=1)
    >>> model.fit(["the cat sat", "the dog sat", "a cat"]).transform(["the cat", "unheard of"]).shape
    (2, 16)
    """

    def __init__(
        self, dim: int = 100, *, word_ngrams: int = 2, buckets: int = 2_000_000, min_count: int = 5,
        min_target_count: int = 0, max_words: int | None = None, negatives: int = 10, lr: float = 0.2,
        epochs: int = 5, subsample: float = 1e-4, dropout_k: int = 2, lowercase: bool = False,
        threads: int = 1, seed: int = 0, progress: bool | None = None,
    ) -> None:  # fmt: skip
        self.dim, self.word_ngrams, self.buckets = dim, word_ngrams, buckets
        self.min_count, self.min_target_count, self.max_words = min_count, min_target_count, max_words
        self.negatives, self.lr, self.epochs = negatives, lr, epochs
        self.subsample, self.dropout_k, self.lowercase = subsample, dropout_k, lowercase
        self.threads, self.seed, self.progress = threads, seed, progress
        self._check()

    def _check(self) -> None:
        for name, low, high in (
            ("dim", 1, 1 << 20), ("word_ngrams", 1, 64), ("buckets", 1, 1 << 40), ("min_count", 1, None),
            ("min_target_count", 0, None), ("negatives", 1, 1 << 20), ("epochs", 1, None),
            ("dropout_k", 0, None), ("threads", 1, 1024), ("seed", 0, (1 << 64) - 1),
        ):  # fmt: skip
            _checks.integer(name, getattr(self, name), low, high)
        if self.max_words is not None:
            _checks.integer("max_words", self.max_words, 2, (1 << 31) - 2)
        _checks.positive("lr", self.lr)
        if not isinstance(self.subsample, (int, float)) or not 0 <= self.subsample < math.inf:
            raise ValueError(f"subsample must be a number >= 0, got {self.subsample!r}")
        for name, allowed in (("lowercase", (True, False)), ("progress", (True, False, None))):
            if not any(getattr(self, name) is value for value in allowed):
                raise TypeError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    # ---------------------------------------------------------------- scikit-learn's manners
    @classmethod
    def _names(cls) -> list[str]:
        return list(inspect.signature(cls.__init__).parameters)[1:]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters, by name."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Sent2Vec:
        """Change parameters; they hold from the next `fit` on."""
        before = self.get_params()
        for name, value in params.items():
            if name not in before:
                raise ValueError(f"there is no parameter {name!r}; there are {', '.join(before)}")
            setattr(self, name, value)
        try:
            self._check()
        except (TypeError, ValueError):
            self.__dict__.update(before)
            raise
        return self

    def __repr__(self) -> str:
        default = {k: p.default for k, p in inspect.signature(type(self)).parameters.items()}
        said = ", ".join(f"{k}={v!r}" for k, v in self.get_params().items() if v != default[k])
        known = f", {len(self.words_)} words" if hasattr(self, "words_") else ""
        return f"Sent2Vec({said}{known})" if said else f"Sent2Vec({known[2:]})"

    # ---------------------------------------------------------------- training
    def fit(self, sentences: Any, y: Any = None) -> Sent2Vec:
        """Train on sentences, from the beginning.

        Parameters
        ----------
        sentences : sequence of str or of lists of str, or path of a UTF-8 text file with one a line
        y : ignored

        Raises
        ------
        ValueError
            Fewer than two words occur ``min_count`` times, or no sentence has a target and a context.
        FloatingPointError
            The loss is no longer finite: ``lr`` is too large.
        """
        self._check()
        corpus = _corpus.read(
            sentences, min_count=self.min_count, max_words=self.max_words, lowercase=self.lowercase,
            progress=self.progress,
        )  # fmt: skip
        buckets = self.buckets if self.word_ngrams > 1 else 1
        rows, output, losses = _training.train(
            corpus, self.dim, word_ngrams=self.word_ngrams, buckets=buckets,
            min_target_count=self.min_target_count, negatives=self.negatives, lr=float(self.lr),
            epochs=self.epochs, subsample=float(self.subsample), dropout_k=self.dropout_k,
            threads=self.threads, seed=self.seed, progress=self.progress,
        )  # fmt: skip
        self._set(corpus.words, corpus.counts, corpus.total, rows, output, losses)
        return self

    def _set(self, words, counts, total, rows, output, losses) -> None:
        self.words_: list[str] = words
        self.counts_: np.ndarray = counts
        self.total_: int = total
        self.loss_: list[float] = losses
        self._rows, self._output = rows, output  # perhaps wider than dim, with zeros
        self._fitted = {k: getattr(self, k) for k in ("dim", "word_ngrams", "lowercase")}
        self._look_up = _corpus.look_up(words)
        self._words: np.ndarray | None = None

    def _need(self) -> None:
        if not hasattr(self, "_rows"):
            raise ValueError("this Sent2Vec has no vectors yet: call fit, or Sent2Vec.load(path)")

    @property
    def table_(self) -> np.ndarray:
        self._need()
        return self._rows[:, : self._fitted["dim"]]

    @property
    def output_(self) -> np.ndarray:
        self._need()
        return self._output[:, : self._fitted["dim"]]

    @property
    def vectors_(self) -> np.ndarray:
        """The words' own vectors, (words, dim), in the order of ``words_``."""
        if getattr(self, "_words", None) is None:
            self._words = np.ascontiguousarray(self.table_[1 : 1 + len(self.words_)])
        return self._words  # type: ignore[return-value]

    # ---------------------------------------------------------------- inference
    def transform(self, sentences: Any) -> np.ndarray:
        """The vectors of sentences, (n, dim) float32; zeros where no word is known.

        Parameters
        ----------
        sentences : sequence of str or of lists of str

        Notes
        -----
        `address.ngrams` and `gather.bag`, on lutra's threads; the same bits whatever their number.
        """
        self._need()
        texts = _corpus.sentence_list(sentences)
        out = np.empty((len(texts), self._fitted["dim"]), np.float32)
        for begin in range(0, len(texts), _TEXTS):
            ids, offsets = address.ngrams(
                texts[begin : begin + _TEXTS], buckets=len(self._rows) - len(self._look_up),
                word_ngrams=self._fitted["word_ngrams"], vocabulary=self._look_up, tokenizer="whitespace",
                lowercase=self._fitted["lowercase"],
            )  # fmt: skip
            found = gather.bag(self._rows, ids, offsets, mode="mean")
            out[begin : begin + _TEXTS] = found[:, : self._fitted["dim"]]
        return out

    def fit_transform(self, sentences: Any, y: Any = None) -> np.ndarray:
        """`fit`, then `transform` of the same sentences (no path here)."""
        texts = _corpus.sentence_list(sentences)
        return self.fit(texts).transform(texts)

    def embed(self, sentence: str | list[str]) -> np.ndarray:
        """The vector of one sentence, (dim,) float32."""
        return self.transform([sentence])[0]

    def most_similar(self, query: Any, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` words whose vectors have the largest cosine with the query's, and the cosines.

        Parameters
        ----------
        query : str (a word or a sentence), list of words, or array of shape (dim,)
            The query's own words are not among the result.
        k : int, default 10
        """
        from ..scan import knn

        self._need()
        k = _checks.integer("k", k, 1)
        own: set[str] = set()
        if isinstance(query, (str, list, tuple)):
            (text,) = _corpus.sentence_list([query], "query")
            own = set((text.lower() if self._fitted["lowercase"] else text).split())
            query = self.embed(text)
            if not query.any():
                raise KeyError(f"no word of {text!r} is known")
        vector = np.ascontiguousarray(query, np.float32)
        if vector.shape != (self._fitted["dim"],):
            raise ValueError(f"query has shape {vector.shape}; a vector has ({self._fitted['dim']},)")
        wanted = min(k + len(own), len(self.words_))
        scores, rows = knn(vector[None], self.vectors_, wanted, "cosine")
        found = [(self.words_[r], float(s)) for r, s in zip(rows[0].tolist(), scores[0])]
        return [(word, s) for word, s in found if word not in own][:k]

    # ---------------------------------------------------------------- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all: tensors table, output, counts, words, word_ends."""
        self._need()
        dim = self._fitted["dim"]

        def rows(name: str, array: np.ndarray) -> _files.Tensor:
            def parts():
                for begin in range(0, len(array), 65_536):
                    yield array[begin : begin + 65_536, :dim]

            return _files.Tensor(name, "F32", (len(array), dim), parts)

        encoded = [word.encode() for word in self.words_]
        ends = np.cumsum([len(word) for word in encoded], dtype=np.int64)
        of = _files.Tensor.of_array
        tensors = [
            rows("table", self._rows), rows("output", self._output), of("counts", self.counts_),
            of("words", np.frombuffer(b"".join(encoded), np.uint8)), of("word_ends", ends),
        ]  # fmt: skip
        config = {
            "params": {**self.get_params(), **self._fitted}, "n_words": len(encoded), "total": self.total_,
            "rows": len(self._rows), "word_bytes": int(ends[-1]), "loss": self.loss_, "dim": dim,
        }  # fmt: skip
        _files.write(path, tensors, _files.describe(_KIND, config))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = True) -> Sent2Vec:
        """A model that was saved; its rows are mapped, unless ``mmap`` is False.

        Raises
        ------
        FileNotFoundError, OSError
            The file cannot be opened.
        ValueError
            It is no such file, is of a newer version or is damaged; the message names the path.
        """
        path = os.fsdecode(path)
        with open(path, "rb") as opened:
            file = _files.File(path, opened)
            file.expect(_KIND, "a Sent2Vec")
            dim, n, n_rows, n_bytes = (file.integer(k, 1) for k in ("dim", "n_words", "rows", "word_bytes"))
            total, losses = file.integer("total"), file.config.get("loss")
            try:
                self = cls(**file.config["params"])
                losses = [float(x) for x in losses]
            except (TypeError, ValueError, KeyError) as error:
                file.fail(f"its parameters cannot be: {error}")
            buckets = self.buckets if self.word_ngrams > 1 else 1
            if self.dim != dim or n_rows != 1 + n + buckets:
                file.fail(f"{n_rows} rows of {dim} for {n} words cannot be")
            rows = file.tensor("table", "F32", (n_rows, dim), mmap=mmap)[0]
            output = file.tensor("output", "F32", (1 + n, dim), mmap=mmap)[0]
            counts = file.tensor("counts", "I64", (n,), mmap=False)[0]
            blob = file.tensor("words", "U8", (n_bytes,), mmap=False)[0].tobytes()
            ends = file.tensor("word_ends", "I64", (n,), mmap=False)[0]
            file.finish()
            starts = np.concatenate([[0], ends[:-1]])
            try:
                words = [blob[a:b].decode() for a, b in zip(starts.tolist(), ends.tolist())]
                if (starts >= ends).any() or ends[-1] != n_bytes:
                    raise ValueError("they do not follow one another")
                self._set(words, counts, total, rows, output, losses)
            except ValueError as error:
                file.fail(f"its words are damaged: {error}")
        return self

    @classmethod
    def from_epfml(cls, path: str | os.PathLike[str]) -> Sent2Vec:
        """From the ``.bin`` that epfml/sent2vec's ``fasttext sent2vec`` writes (not quantized).

        Raises
        ------
        FileNotFoundError, OSError
            The file cannot be opened.
        ValueError
            It is another file, another kind of model, quantized, pruned or truncated.
        """
        m = _fasttext.read(path)
        self = cls(**m.params)
        rows = m.rows if self.word_ngrams > 1 else m.rows[: len(m.words) + 2]
        self._set(m.words, m.counts, m.total, rows, m.output, [])
        return self

    def save_epfml(self, path: str | os.PathLike[str]) -> None:
        """Write the form that epfml/sent2vec reads (``print-sentence-vectors``, its Python module)."""
        self._need()
        params = {**self.get_params(), **self._fitted, "buckets": len(self._rows) - len(self._look_up)}
        _fasttext.write(
            path,
            _fasttext.Model(self.words_, self.counts_, self.total_, self.table_, self.output_, params),
        )

    def save_text(self, path: str | os.PathLike[str]) -> None:
        """Write words and their vectors as text, in the form of word2vec and fastText's .vec."""
        from ..store import _text

        vectors = self.vectors_
        _text.write(path, self.words_, lambda i, j: vectors[i:j], vectors.shape[1])

    def to_vector_store(self, **options: Any) -> Any:
        """The words' vectors as a `lutra.VectorStore`; ``options`` are those of its `from_arrays`."""
        from ..store import VectorStore

        return VectorStore.from_arrays(self.words_, self.vectors_, **options)
