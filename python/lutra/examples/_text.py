"""A text as tokens, bytes or a byte-pair encoding; batches that depend on seed and step only."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

HELD_OUT = 0.1  # the last part of the text, for evaluation


class Corpus:
    """Tokens of a file, the last tenth held out.

    Parameters
    ----------
    path : path of a file
        Read as bytes; as UTF-8 for BPE.
    tokens : {'byte', 'bpe'}
    vocab_size : int
        Of the BPE; 256 for bytes.
    context : int
        Tokens that a model sees at once.
    tokenizer : path, optional
        Where the BPE is kept: read where the file exists, else trained on the first nine tenths and written.

    Raises
    ------
    ValueError
        A text too short for one window in either part, or one that is not UTF-8 (BPE).
    """

    def __init__(
        self, path: str | os.PathLike[str], tokens: str, vocab_size: int, context: int,
        tokenizer: Path | None = None,
    ) -> None:  # fmt: skip
        self.context = context
        self.tokenizer = None
        size = os.stat(path).st_size
        if size == 0:
            raise ValueError(f"{os.fsdecode(path)} is empty")
        if tokens == "byte":
            self.vocab_size = 256
            ids = np.memmap(path, np.uint8, "r")  # not read before it is used, whatever its size
        else:
            self.tokenizer, ids = _byte_pairs(path, vocab_size, tokenizer)
            self.vocab_size = self.tokenizer.get_vocab_size()
        cut = len(ids) - int(len(ids) * HELD_OUT)
        self.train, self.held_out = ids[:cut], ids[cut:]
        self.tokens_per_byte = len(ids) / size
        for name, part in (("training", self.train), ("held-out", self.held_out)):
            if len(part) < context + 1:
                raise ValueError(
                    f"the {name} part of {os.fsdecode(path)} has {len(part)} tokens; one window takes "
                    f"context + 1 = {context + 1}: take a longer text or a shorter context"
                )

    def batch(self, seed: int, step: int, size: int) -> np.ndarray:
        """Windows of the training part, (size, context + 1) int64: the same for the same seed and step."""
        generator = np.random.Generator(np.random.Philox(key=[seed, step]))
        starts = generator.integers(0, len(self.train) - self.context, size)
        return self._windows(self.train, starts)

    def evaluation(self, windows: int) -> np.ndarray:
        """At most so many windows, spread evenly over the held-out part; always the same."""
        number = min(windows, (len(self.held_out) - 1) // self.context)
        starts = np.linspace(0, len(self.held_out) - self.context - 1, number).astype(np.int64)
        return self._windows(self.held_out, starts)

    def _windows(self, part: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return part[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)

    def decode(self, ids: list[int]) -> str:
        """Tokens as text; bytes that are no UTF-8 become replacement characters."""
        if self.tokenizer is not None:
            return str(self.tokenizer.decode(ids))
        return bytes(ids).decode("utf-8", "replace")


def _byte_pairs(path, vocab_size: int, kept: Path | None):
    """A byte-level BPE and the text's tokens in it."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("BPE needs the tokenizers package: pip install tokenizers") from error
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fsdecode(path)} is not UTF-8 ({error}); use --tokens byte") from error
    if kept is not None and kept.exists():
        made = Tokenizer.from_file(str(kept))
    else:
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 for a byte-level BPE, got {vocab_size}")
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        training = text[: len(text) - int(len(text) * HELD_OUT)]
        made.train_from_iterator(training.splitlines(keepends=True), trainer)
        if kept is not None:
            made.save(str(kept))
    ids: list[int] = []
    lines = text.splitlines(keepends=True)
    for i in range(0, len(lines), 10_000):
        for encoded in made.encode_batch(lines[i : i + 10_000]):
            ids.extend(encoded.ids)
    return made, np.asarray(ids, np.int32)
