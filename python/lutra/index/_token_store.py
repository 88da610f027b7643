"""The tokens of many documents, one after another, in one of several formats."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import quant
from .._arrays import BF16, F16, F32, I8, I32, U8
from ..scan import ResidualTokens
from . import _files
from ._home import HOST, Home
from ._rows import Rows

#: Formats of stored tokens: the dtype code, or the bits of residual codes.
FORMATS = {"float32": F32, "float16": F16, "bfloat16": BF16, "int8": I8}
RESIDUAL = {f"residual{bits}": bits for bits in (1, 2, 4, 8)}
_PART = 1 << 18  # tokens that are converted at a time


class TokenStore:
    """Tokens (n, d) of documents, ragged, with room to grow; mapped where they come from a file.

    ``docs``, ``offsets`` and ``options`` are what `lutra.scan.maxsim` takes, arrays of ``home``.
    """

    def __init__(self, d: int, format: str) -> None:
        if format not in FORMATS and format not in RESIDUAL:
            known = ", ".join(map(repr, (*FORMATS, *RESIDUAL)))
            raise ValueError(f"tokens must be one of {known}, got {format!r}")
        self.d, self.format, self.home = d, format, HOST
        self._there: dict[str, Any] | None = None  # what else a search needs in a home that is not the host
        self._ptr = np.zeros(1, np.int64)
        self.n = 0
        self.quantizer: Any = None
        if format in RESIDUAL:
            self.bits = RESIDUAL[format]
            self.rows = {
                "token_codes": Rows(HOST, (d * self.bits + 7) // 8, U8),
                "token_centroids": Rows(HOST, 1, I32),
            }
        else:
            self.rows = {"tokens": Rows(HOST, d, FORMATS[format])}
            if format == "int8":
                self.rows["token_scale"] = Rows(HOST, 1, F32)

    # ---- what is there
    @property
    def ptr(self) -> np.ndarray:
        """Where each document begins, and the end: (documents + 1,) int64. A view."""
        return self._ptr[: self.n + 1]

    @property
    def offsets(self) -> Any:
        """``ptr`` in the home."""
        return self.ptr if self.home is HOST else self._beside()["ptr"]

    def _beside(self) -> dict[str, Any]:
        """Offsets and books in the home; made by the first search behind a change."""
        if self._there is None:
            there = {"ptr": self.home.bring(self.ptr.copy())}
            if self.quantizer is not None:
                there["centroids"] = self.home.bring(self.quantizer.centroids)
                there["values"] = self.home.bring(self.quantizer.values)
            self.home.wait()  # other streams may search with them at once
            self._there = there
        return self._there

    @property
    def ntokens(self) -> int:
        return int(self._ptr[self.n])

    @property
    def is_trained(self) -> bool:
        return self.format not in RESIDUAL or self.quantizer is not None

    @property
    def nbytes(self) -> int:
        books = 0
        if self.quantizer is not None:
            books = self.quantizer.centroids.nbytes + self.quantizer.values.nbytes
        return sum(rows.nbytes for rows in self.rows.values()) + 8 * (self.n + 1) + books

    @property
    def docs(self) -> Any:
        """The tokens as `lutra.scan.maxsim` takes them. Views."""
        if self.format not in RESIDUAL:
            return self.rows["tokens"].view
        codes, ids = self.rows["token_codes"].view, self.rows["token_centroids"].view[:, 0]
        q = self.quantizer
        if self.home is not HOST:
            there = self._beside()
            return ResidualTokens(codes, ids, there["centroids"], there["values"], q.normalize)
        return ResidualTokens(codes, ids, q.centroids, q.values, q.normalize)

    @property
    def options(self) -> dict[str, Any]:
        return {"doc_scale": self.rows["token_scale"].view[:, 0]} if self.format == "int8" else {}

    def decode(self, position: int) -> np.ndarray:
        """The tokens of one document, float32, on the host."""
        low, high = self._ptr[position : position + 2]
        rows = {name: HOST.bring(each.view[low:high]) for name, each in self.rows.items()}
        if self.format in RESIDUAL:
            q = self.quantizer
            ids = np.ascontiguousarray(rows["token_centroids"][:, 0])
            return q.decode(ResidualTokens(rows["token_codes"], ids, q.centroids, q.values, q.normalize))
        tokens = rows["tokens"].astype(np.float32)
        return tokens * rows["token_scale"] if self.format == "int8" else tokens

    # ---- changes
    def to(self, home: Home) -> None:
        """Move the tokens to another home."""
        if home is not self.home:
            self.rows = {name: rows.to(home) for name, rows in self.rows.items()}
            self.home, self._there = home, None

    def train(self, tokens: Any, **options: Any) -> None:
        if self.format in RESIDUAL:
            quantizer = quant.ResidualQuantizer(self.d, self.bits)
            quantizer.train(tokens, **options)
            self.quantizer, self._there = quantizer, None

    def put(self, tokens: Any) -> None:
        """Write tokens, an array of the home, behind the others; `grow` makes them count."""
        home, count = self.home, int(tokens.shape[0])
        room = {name: rows.room(count) for name, rows in self.rows.items()}
        for i in range(0, count, _PART):
            part = tokens[i : i + _PART]
            part = part if home.kind.code(part) == F32 else home.kind.cast(part, F32)
            to = {name: out[i : i + _PART] for name, out in room.items()}
            if self.format in RESIDUAL:
                coded = self.quantizer.encode(part)
                to["token_codes"][:] = coded.codes
                to["token_centroids"][:, 0] = coded.centroid_ids
            elif self.format == "int8":
                scale = home.xp.amax(abs(part), axis=1, keepdims=True).clip(1e-30, None)
                scale = scale / home.full(
                    (1, 1), 127, F32
                )  # by a number torch multiplies with the reciprocal
                to["token_scale"][:] = scale
                to["tokens"][:] = home.kind.cast(home.xp.round(part / scale), I8)
            else:
                with np.errstate(over="ignore"):
                    to["tokens"][:] = part
                if self.format == "float16" and not home.all_finite(to["tokens"]):
                    good = HOST.bring(home.xp.isfinite(to["tokens"])).all(1)
                    row = int(good.argmin()) + i
                    raise ValueError(f"tokens[{row}] holds values that are too large for float16")

    def grow(self, ptr: np.ndarray) -> None:
        count, tokens = len(ptr) - 1, int(ptr[-1])
        if self.n + count + 1 > len(self._ptr):
            grown = np.empty(max(self.n + count + 1, (self.n + 1) * 3 // 2), np.int64)
            grown[: self.n + 1] = self.ptr
            self._ptr = grown
        self._ptr[self.n + 1 : self.n + count + 1] = self.ntokens + ptr[1:]
        self.n += count
        self._there = None
        for rows in self.rows.values():
            rows.grow(tokens)

    def keep(self, positions: np.ndarray) -> None:
        """Keep the documents at increasing positions."""
        lengths = np.diff(self.ptr)
        stay = np.zeros(self.n, bool)
        stay[positions] = True
        rows = np.flatnonzero(np.repeat(stay, lengths))
        for each in self.rows.values():
            each.keep(rows)
        self._ptr = np.concatenate([[0], np.cumsum(lengths[positions])])
        self.n, self._there = len(positions), None

    # ---- files
    def tensors(self) -> list[_files.Tensor]:
        found = [_files.Tensor.of_rows(name, rows) for name, rows in self.rows.items()]
        found.append(_files.Tensor.of_array("token_ptr", self.ptr))
        if self.quantizer is not None:
            found.append(_files.Tensor.of_array("token_books", self.quantizer.centroids))
            found.append(_files.Tensor.of_array("token_values", self.quantizer.values))
        return found

    def config(self) -> dict[str, Any]:
        q = self.quantizer
        return {} if q is None else {"num_centroids": len(q.centroids), "normalize": bool(q.normalize)}

    def restore(self, file: _files.File, n: int, config: dict[str, Any], mmap: bool) -> None:
        self._ptr = file.tensor("token_ptr", "I64", (n + 1,), mmap=False)[0]
        self.n = n
        if self._ptr[0] != 0 or (np.diff(self._ptr) < 0).any():
            file.fail("the tensor 'token_ptr' does not rise from 0")
        for name, rows in self.rows.items():
            shape = (self.ntokens, rows.width)
            array, mapped = file.tensor(name, _files.NAMES[rows.code], shape, mmap=mmap)
            self.rows[name] = Rows.of(array, rows.code, mapped=mapped)
        if self.format in RESIDUAL and file.has("token_books"):
            count, normalize = config.get("num_centroids"), config.get("normalize")
            if type(count) is not int or count < 1 or type(normalize) is not bool:
                file.fail(f"the tokens' config is {config!r}: no number of centroids, or no 'normalize'")
            centroids = file.tensor("token_books", "F32", (count, self.d), mmap=False)[0]
            values = file.tensor("token_values", "F32", (1 << self.bits,), mmap=False)[0]
            if not (np.isfinite(centroids).all() and np.isfinite(values).all()):
                file.fail("the centroids or values of the tokens are not finite")
            ids = self.rows["token_centroids"].view
            if len(ids) and (ids.min() < 0 or ids.max() >= count):
                file.fail("the tensor 'token_centroids' names centroids that are not there")
            try:
                self.quantizer = quant.ResidualQuantizer.of(centroids, values, self.bits, normalize)
            except ValueError as error:
                file.fail(f"the books of the tokens: {error}", error)
        elif self.format in RESIDUAL and self.ntokens:
            file.fail("the tensor 'token_books' is missing")
