"""Codes of vectors that lie on a GPU, without the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arrays import F32, I64, U8
from ._kernels import ROUNDS

HELD = 1 << 26  # products with centroids that are held at once


class Copies:
    """Arrays of a quantizer on the devices where they were needed, until it is trained again."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[np.ndarray, Any]] = {}

    def get(self, kind: Any, name: str, array: np.ndarray, like: Any) -> Any:
        key = (kind.name, kind.launch(like)[0], name)
        found = self._made.get(key)
        if found is None or found[0] is not array:
            found = self._made[key] = array, kind.from_numpy(array, F32, like)
        return found[1]

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles begin without
        return {"_made": {}}


def floats(kind: Any, x: Any) -> Any:
    """float32 rows, or None where one is not finite: the host's path says which."""
    x = kind.dense(x if kind.code(x) == F32 else kind.cast(x, F32))
    library = kind.torch if kind.name == "torch" else kind.cupy
    return x if bool(library.isfinite(x).all()) else None


def pq_entries(
    kind: Any, x: Any, books: np.ndarray, copies: Copies, directions: Any = None, threshold: float = 0.0
) -> Any:
    """Entries (n, m) of float32 vectors, by csrc/address/pq_encode.cu."""
    m, ksub, dsub = books.shape
    there, out = copies.get(kind, "books", books, x), kind.empty((x.shape[0], m), U8, x)
    kind.kernels.pq_encode(
        kind.ptr(x), kind.ptr(there), x.shape[0], m, ksub, dsub, kind.ptr(out),
        None if directions is None else kind.ptr(directions), threshold, ROUNDS, *kind.launch(x),
    )  # fmt: skip
    return out


def rq_entries(kind: Any, x: Any, books: np.ndarray, gram: np.ndarray, beam: int, copies: Copies) -> Any:
    """Entries (n, m) by csrc/address/rq_encode.cu, or None where the beam is too wide for it.

    The products with the centroids are those of the arrays' library.
    """
    (m, ksub, d), n = books.shape, x.shape[0]
    if not kind.kernels.rq_encode_fits(m, ksub, beam, 1, *kind.launch(x)):
        return None
    centroids = copies.get(kind, "books", books, x).reshape(m * ksub, d)
    there = copies.get(kind, "gram", gram, x)
    norms = kind.dense(there.diagonal())
    out, step = kind.empty((n, m), U8, x), max(1, HELD // (m * ksub))
    for i in range(0, n, step):
        dots = kind.dense(x[i : i + step] @ centroids.T)
        kind.kernels.rq_encode(
            kind.ptr(dots), kind.ptr(norms), kind.ptr(there), dots.shape[0], m, ksub, beam, 0, m, 1, 1, None,
            None, kind.ptr(out[i : i + step]), None, *kind.launch(x),
        )  # fmt: skip
    return out


def pq_vectors(kind: Any, entries: Any, books: np.ndarray, copies: Copies) -> Any:
    """Vectors (n, m * dsub) of entries (n, m), each below ksub."""
    there, numbers = copies.get(kind, "books", books, entries), kind.cast(entries, I64)
    m, n = books.shape[0], entries.shape[0]
    parts = [there[j][numbers[:, j]] for j in range(m)]
    library = kind.torch if kind.name == "torch" else kind.cupy
    return library.stack(parts, 1).reshape(n, m * books.shape[2])


def rq_vectors(kind: Any, entries: Any, books: np.ndarray, copies: Copies) -> Any:
    """Sums (n, d) of the centroids that entries (n, m) name."""
    there, numbers = copies.get(kind, "books", books, entries), kind.cast(entries, I64)
    out = there[0][numbers[:, 0]]
    for j in range(1, books.shape[0]):
        out = out + there[j][numbers[:, j]]
    return out


def pack(kind: Any, entries: Any, bits: int) -> Any:
    """What `lutra.quant._bits.pack` gives, of 2, 4 or 8 bits."""
    if bits == 8:
        return entries
    per, m = 8 // bits, entries.shape[1]
    out = kind.empty((entries.shape[0], -(-m // per)), U8, entries)
    out[...] = entries[:, ::per]
    for j in range(1, per):
        part = entries[:, j::per]
        out[:, : part.shape[1]] |= part << (j * bits)
    return out
