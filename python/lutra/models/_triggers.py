"""Triggers: what `top_triggers` finds, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ..index import _files
from ._column_top import ColumnTop

_KIND = "triggers"
_ARRAYS = {"scores": "F32", "sequences": "I64", "positions": "I64", "next_tokens": "I64", "contexts": "I32"}


class Trigger(NamedTuple):
    """A token of a corpus that triggered a key.

    Attributes
    ----------
    score : float
        The key's coefficient.
    sequence, position : int
        Number of the sequence in the corpus, and the token's place in it (padding counts).
    tokens : ndarray, int32
        The prefix up to and with the token; its last ``context`` tokens.
    next_token : int
        The token that follows, -1 at the end of a sequence.
    """

    score: float
    sequence: int
    position: int
    tokens: np.ndarray
    next_token: int


class LayerTriggers:
    """The triggers of a layer's keys.

    Attributes
    ----------
    scores : ndarray, float32, (keys, top)
        Coefficients, largest first; -inf where the corpus has fewer tokens.
    sequences, positions, next_tokens : ndarray, int64, (keys, top)
        As of `Trigger`; -1 where there is none.
    contexts : ndarray, int32, (keys, top, context)
        Prefixes, at the end of their rows; -1 before.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.scores, self.sequences = arrays["scores"], arrays["sequences"]
        self.positions, self.next_tokens = arrays["positions"], arrays["next_tokens"]
        self.contexts = arrays["contexts"]

        self._rows = np.full(self.scores.shape, -1, np.int64)  # of ColumnTop, while a corpus goes by

    @classmethod
    def empty(cls, keys: int, top: int, context: int) -> LayerTriggers:
        """Without any trigger."""
        arrays: dict[str, np.ndarray] = {
            name: np.full((keys, top), -1, np.int64) for name in ("sequences", "positions", "next_tokens")
        }
        arrays["scores"] = np.full((keys, top), -np.inf, np.float32)
        arrays["contexts"] = np.full((keys, top, context), -1, np.int32)
        return cls(arrays)

    def _take(
        self, scores: np.ndarray, rows: np.ndarray, tokens: np.ndarray, begin: int, sequence: int
    ) -> None:
        """Follow the lists of a `ColumnTop`; rows from ``begin`` on are those of ``tokens``."""
        keys = np.flatnonzero((rows != self._rows).any(1))
        now, context = rows[keys], self.contexts.shape[2]
        # What stays keeps its order: the j-th that stays was number j before.
        stays = (now >= 0) & (now < begin)
        source = np.where(stays, np.cumsum(stays, 1) - 1, 0)
        new = now >= begin
        row, place = np.divmod(now[new] - begin, tokens.shape[1] - context)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, context, 1)
        fresh = {
            "sequences": sequence + row,
            "positions": place,
            "next_tokens": tokens[row, place + context],
            "contexts": windows[row, place],
        }
        for name, values in fresh.items():
            held = getattr(self, name)
            old = held[keys]
            moved = np.take_along_axis(old, source[..., None] if old.ndim == 3 else source, 1)
            moved[~stays] = -1
            moved[new] = values
            held[keys] = moved
        self.scores[keys], self._rows[keys] = scores[keys], now

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        keys, top, context = self.contexts.shape
        return f"LayerTriggers({keys} keys, top {top}, context {context})"

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def prefixes(self, key: int) -> list[Trigger]:
        """The triggers of a key, strongest first."""
        key = _checks.integer("key", key, 0, len(self) - 1)
        return [
            Trigger(
                float(self.scores[key, i]), int(self.sequences[key, i]), int(self.positions[key, i]),
                self.contexts[key, i][self.contexts[key, i] >= 0], int(self.next_tokens[key, i]),
            )
            for i in range(self.scores.shape[1])
            if self.sequences[key, i] >= 0
        ]  # fmt: skip

    def agreement(self, ids: Any) -> float:
        """The share of keys whose value promotes most the token that follows their strongest trigger.

        Parameters
        ----------
        ids : array, shape (keys,) or (keys, k)
            Of `value_tokens`; the first of each counts.

        Returns
        -------
        float
            The paper's agreement rate (section 4.2), of the keys whose strongest trigger does not end its
            sequence; NaN where there are none.
        """
        ids = np.asarray(ids.detach().cpu() if isinstance(ids, Tensor) else ids)
        if len(ids) != len(self):
            raise ValueError(f"ids is of {len(ids)} values, the layer has {len(self)} keys")
        first, follows = ids.reshape(len(ids), -1)[:, 0], self.next_tokens[:, 0]
        known = follows >= 0
        return float((first == follows)[known].mean()) if known.any() else float("nan")


class Triggers(dict[str, LayerTriggers]):
    """The triggers of several layers: a dict of `LayerTriggers` by the layers' names.

    Attributes
    ----------
    sequences, tokens : int
        What the corpus held; padding does not count among the tokens.
    """

    def __init__(self, layers: dict[str, LayerTriggers]) -> None:
        super().__init__(layers)
        self.sequences = self.tokens = self._rows = 0

    def __repr__(self) -> str:
        return f"Triggers({self.tokens} tokens of {self.sequences} sequences, layers {list(self)})"

    def take(self, kept: dict[str, ColumnTop], ids: Tensor, real: Tensor, context: int) -> None:
        """Look up what has come into the layers' lists with a batch, whose tokens are the last rows."""
        batch, length = ids.shape
        tokens = torch.full((batch, context + length), -1, dtype=torch.int32)  # a prefix may be shorter
        tokens[:, context - 1 : -1] = ids.masked_fill(~real, -1)
        for name, top in kept.items():
            if name not in self:
                self[name] = LayerTriggers.empty(top.columns, top.k, context)
            self[name]._take(
                top.scores.cpu().numpy(), top.rows.cpu().numpy(), tokens.numpy(), self._rows, self.sequences
            )
        self.sequences += batch
        self.tokens += int(real.sum())
        self._rows += ids.numel()

    # ---------------------------------------------------------------- what it is for
    def to_dict(self) -> dict[str, list[list[dict[str, Any]]]]:
        """Lists of lists of dicts by layer, key and rank, of plain Python values."""
        return {
            name: [
                [{**t._asdict(), "tokens": t.tokens.tolist()} for t in layer.prefixes(key)]
                for key in range(len(layer))
            ]
            for name, layer in self.items()
        }

    def table(
        self, layer: str, keys: Sequence[int], *, count: int = 3, decode: Any = None, promotes: Any = None
    ) -> Any:
        """The strongest prefixes of some keys as a table of the package rich.

        Parameters
        ----------
        layer : str
        keys : sequence of int
        count : int, default 3
            Prefixes of a key.
        decode : callable, optional
            From a list of token ids to a string: a tokenizer's ``decode``.
        promotes : array, shape (keys, k), optional
            Ids of `value_tokens`, shown beside.
        """
        from rich.table import Table
        from rich.text import Text

        decode = (lambda ids: " ".join(map(str, ids))) if decode is None else decode
        table = Table(title=layer)
        for column in ("key", "coefficient", "sequence", "position", "prefix"):
            table.add_column(column, justify="left" if column == "prefix" else "right")
        if promotes is not None:
            table.add_column("value promotes")
        for key in keys:
            for i, t in enumerate(self[layer].prefixes(key)[:count]):
                row = [str(key) if i == 0 else "", f"{t.score:.4g}", str(t.sequence), str(t.position)]
                text = [Text(decode(t.tokens.tolist()))]
                if promotes is not None:
                    words = [decode([int(p)]) for p in promotes[key]] if i == 0 else []
                    text.append(Text(", ".join(words)))
                table.add_row(*row, *text)
        return table

    # ---------------------------------------------------------------- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all: the arrays of each layer under its name."""
        tensors = [
            _files.Tensor.of_array(f"{name}.{array}", values)
            for name, layer in self.items()
            for array, values in layer.arrays().items()
        ]
        shapes = {name: list(layer.contexts.shape) for name, layer in self.items()}
        config = {"layers": shapes, "sequences": self.sequences, "tokens": self.tokens}
        _files.write(path, tensors, _files.describe(_KIND, config))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = True) -> Triggers:
        """What `save` wrote; mapped, unless ``mmap`` is False.

        Raises
        ------
        FileNotFoundError, OSError
            The file cannot be opened.
        ValueError
            It is no such file, is of a newer version or is damaged.
        """
        with open(path, "rb") as opened:
            file = _files.File(path, opened)
            file.expect(_KIND, "Triggers")
            shapes = file.config.get("layers")
            if not isinstance(shapes, dict):
                file.fail("its config names no layers")
            layers = {name: cls._layer(file, name, shape, mmap) for name, shape in shapes.items()}
            file.finish()
            found = cls(layers)
            found.sequences, found.tokens = file.integer("sequences"), file.integer("tokens")
        return found

    @staticmethod
    def _layer(file: _files.File, name: str, shape: Any, mmap: bool) -> LayerTriggers:
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
            file.fail(f"the shape of layer {name!r} in the metadata is {shape!r}")
        arrays = {}
        for array, dtype in _ARRAYS.items():
            whole = tuple(shape) if array == "contexts" else tuple(shape[:2])
            arrays[array] = file.tensor(f"{name}.{array}", dtype, whole, mmap=mmap)[0]
        return LayerTriggers(arrays)

    def rows(self) -> Iterator[tuple[str, int, Trigger]]:
        """All triggers, with layer and key."""
        for name, layer in self.items():
            for key in range(len(layer)):
                for t in layer.prefixes(key):
                    yield name, key, t
