"""Scans of a codec's arrays on a GPU: look-up tables made there, and what stays from search to search."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..scan import _lists
from ..scan._lists import Lists
from ._arena import Arena
from ._home import Home

_TABLES = 512 << 20  # bytes of the tables of a part of a batch
SELECTED = 2048  # candidates up to which a scan selects them itself (kMaxK); beyond, every row is sorted


class GpuScan:
    """The scan of a codec's arrays on a GPU; made anew when the quantizer has changed.

    Look-up tables are affine in the query, but for the squared distances of product quantizers. Those have
    their codebooks as they are; of the others the values at 0 and at multiples of the unit vectors say all.
    """

    def __init__(self, codec: Any, home: Home) -> None:
        self.codec = codec
        self.home = home
        self._arrays: dict[str, Any] = {}
        if codec.form == "scalar":
            self._keep("step", codec._step)
            self._keep("offset", codec._offset)
        elif codec.form != "rows":
            self._tables_of(codec.quantizer)

    def _keep(self, name: str, a: np.ndarray) -> None:
        self._arrays[name] = self.home.bring(np.ascontiguousarray(a, np.float32))

    def _tables_of(self, quantizer: Any) -> None:
        kind = type(quantizer).__name__
        factor = np.float32(-2 if self.codec.metric == "l2" and not self.codec._distances else 1)
        d = quantizer.d
        if kind in ("PQ", "OPQ") and quantizer.dsub:
            books = np.zeros((quantizer.m, quantizer.dsub, max(16, quantizer.ksub)), np.float32)
            books[:, :, : quantizer.ksub] = quantizer._books.transpose(0, 2, 1)
            self._keep("books", books * factor)
            if kind == "OPQ":
                self._keep("rotation", quantizer._turned(np.eye(d, dtype=np.float32))[None])
            return
        if kind == "SQ":
            levels = quantizer._tables(np.ones((1, d), np.float32), "ip").lut[0]  # (d, 16)
            self._keep("books", levels[:, None] * factor)
            return
        mean = getattr(quantizer, "_state", {}).get("mean") if kind == "RaBitQ" else None
        center = np.zeros(d, np.float32) if mean is None else mean
        # Unit vectors of a length beside which the mean's digits do not count.
        length = np.float32(2.0 ** np.ceil(np.log2(1 + 8 * float(np.abs(center).max(initial=0)))))
        points = np.concatenate([np.zeros((1, d), np.float32), np.eye(d, dtype=np.float32) * length]) + center
        lut, bias = quantizer._tables(points, "ip")
        self.shape = lut.shape[1:]
        flat = lut.reshape(d + 1, -1)
        self._keep("dense", ((flat[1:] - flat[:1]) * (factor / length))[None])
        self._keep("constant", flat[:1] * factor)
        if mean is not None:
            self._keep("center", center)
        if bias is not None:
            self._keep("bias", ((bias[1:] - bias[0]) * (factor / length))[None, :, None])
            self._keep("bias0", (bias[:1] * factor)[None])

    def part(self, k: int) -> int:
        """Queries of a part of a batch."""
        each, codec = 12 * k, self.codec
        if codec.form in ("lut4", "lut8"):
            each += codec.quantizer.m * (256 if codec.form == "lut8" else 16) * 4
        return max(1, _TABLES // each)

    def tables(self, q: Any) -> tuple[Any, Any]:
        """As `Codec.tables`, on the GPU."""
        a, codec = self._arrays, self.codec
        bias = None
        if "books" in a:
            turned = _lists.query_tables(q, a["rotation"])[:, 0] if "rotation" in a else q
            lut = _lists.query_tables(turned, a["books"], distances=codec._distances)
        else:
            lower = q - a["center"] if "center" in a else q
            lut = _lists.query_tables(lower, a["dense"], a["constant"]).reshape(len(q), *self.shape)
            if "bias" in a:
                bias = _lists.query_tables(lower, a["bias"], a["bias0"]).reshape(-1)
        if codec.metric == "l2" and not codec._distances and not codec.residual:
            square = (q * q).sum(1)
            bias = square if bias is None else bias + square
        return lut, bias

    def scan(self, q: Any, arena: Arena, lists: Lists, k: int, base: Any, centroids: Any) -> tuple[Any, Any]:
        """The k best rows of each query's lists, as `Codec.scan`."""
        codec, a = self.codec, self._arrays
        metric = codec.metric
        if codec.form in ("rows", "scalar"):
            x = next(iter(arena.arrays.values()))
            x = x.reshape(x.shape[:3])
            if codec.form == "rows":
                return _lists.list_rows(q, x, lists, k, metric)
            steps = codec.quantizer.bits, a["step"], a["offset"], centroids if codec.residual else None
            return _lists.list_scalar(q, x, *steps, lists, k, metric)
        codes, bits = arena.arrays["codes"], codec.quantizer.bits if codec.form == "lut8" else 4
        if codec.form == "lut8":
            codes = codes.reshape(-1, codes.shape[3])
        add, mul = (arena.arrays.get(name) for name in ("add", "mul"))
        add, mul = (None if t is None else t.reshape(-1) for t in (add, mul))
        lut, bias = self.tables(q)
        base = base if codec.residual else None
        return _lists.lut8(lut, codes, lists, k, metric, base, bias, add, mul, bits)


def distinct(home: Home, scores: Any, ids: Any, k: int, metric: str) -> tuple[Any, Any]:
    """The k best of results (nq, c), best first, in which a position may stand twice: it counts once."""
    xp = home.xp
    worst = float("inf") if metric == "l2" else -float("inf")
    order = _stable(home, ids)  # of equal positions the better score comes first
    sorted_ids = xp.take_along_dim(ids, order, 1) if home.kind.name == "torch" else _along(xp, ids, order)
    again = xp.zeros_like(sorted_ids)
    again[:, 1:] = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    flags = xp.zeros_like(ids)
    if home.kind.name == "torch":
        flags.scatter_(1, order, again)
    else:
        flags[home.arange(len(order))[:, None], order] = again  # CuPy has put_along_axis since 14
    gone = (flags > 0) | (ids < 0)
    keep = _stable(home, home.kind.cast(gone, 6))[:, :k]  # what stays, in the order that it has
    if home.kind.name == "torch":
        scores, ids, gone = (xp.take_along_dim(a, keep, 1) for a in (scores, ids, gone))
    else:
        scores, ids, gone = (_along(xp, a, keep) for a in (scores, ids, gone))
    return xp.where(gone, worst, scores), xp.where(gone, -1, ids)


def _stable(home: Home, a: Any) -> Any:
    """The stable order of each row."""
    if home.kind.name == "torch":
        return home.xp.argsort(a, dim=1, stable=True)
    # CuPy's sort of rows is not stable: each value with its place in one number.
    width = a.shape[1]
    return home.xp.argsort((a + 1) * width + home.xp.arange(width), axis=1)


def _along(xp: Any, a: Any, order: Any) -> Any:
    return xp.take_along_axis(a, order, 1)
