"""How the vectors of a list are stored and scanned: as rows, or as a quantizer's codes.

A codec knows the arrays of an arena (`_arena.Field`), makes their values from vectors, and calls the scan
that their form asks for:

=========  ==========================================  ==========================
form       arrays                                      scan
=========  ==========================================  ==========================
rows       rows of 16 vectors, interleaved             scan._lists.list_rows
lut4       4-bit entries in blocks of 16, add, mul     scan.fast_scan
lut8       entries of 5 to 8 bits, add, mul            scan._lists.lut8
scalar     8- or 6-bit codes in blocks of 16           scan._lists.list_scalar
=========  ==========================================  ==========================

Codes may be of residuals x - c to the centroid c of a row's list. Then, with r^ = decode(code) and the linear
form of the quantizer (quant.base), the scores are::

    ip: <q, c>     +     bias(q) + mul sum lut + add
    l2: |q - c|^2  - 2 (bias(q) + mul sum lut + add) + norm(r^) + 2 <c, r^>

where all that depends on the row alone is one array, ``add``. Scalar codes are decoded in registers,
residuals with their centroids. Cosine is ip of normalised vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arrays import F32, U8
from ..quant import _bits
from ..reference.lists import scalar_codes, scalar_rows
from ..scan import _lists
from ..scan._lists import Lists
from ._arena import CODES, Arena, Field
from ._home import HOST, Home

ROWS = ("float32", "float16", "bfloat16", "int8")
_SQ_ROWS = {"fp16": "float16", "bf16": "bfloat16"}
_TABLES = 32 << 20  # bytes of the tables of a part of a batch


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name, bfloat16 too."""
    return HOST.kind.dtype({"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}[name])  # type: ignore


def to_rows(x: np.ndarray, dtype: np.dtype[Any], first: int, name: str) -> np.ndarray:
    """float32 vectors in a row type; a ValueError that names the row where it cannot hold them."""
    with np.errstate(over="ignore", invalid="ignore"):
        rows = x.astype(dtype)
    if dtype == np.int8:
        bad = rows.astype(np.float32) != x
        why = "int8 rows hold integers from -128 to 127"
    elif dtype != np.float32:
        bad = ~np.isfinite(rows.astype(np.float32))
        why = f"beyond {name}"
    else:
        return rows
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"x[{first + row}, {column}] is {x[row, column]}; {why}")
    return rows


def to_rows_on_gpu(home: Home, x: Any, code: int, first: int, name: str) -> Any:
    """`to_rows` in a home that is not the host."""
    rows = home.kind.cast(x, code)
    if code == F32:
        return rows
    back = home.kind.cast(rows, F32)
    good = back == x if name == "int8" else home.xp.isfinite(back)
    if not bool(good.all()):
        row, column = (int(i) for i in np.argwhere(~HOST.bring(good))[0])
        why = "int8 rows hold integers from -128 to 127" if name == "int8" else f"beyond {name}"
        raise ValueError(f"x[{first + row}, {column}] is {float(x[row, column])}; {why}")
    return rows


class Codec:
    """Rows or codes of d dimensions, for metric 'ip' or 'l2'; a quantizer must be trained.

    Parameters
    ----------
    d : int
    store : str or Quantizer
        A row type of `ROWS`, or a quantizer.
    metric : {'ip', 'l2'}
    residual : bool
        Whether codes are of residuals.
    """

    def __init__(self, d: int, store: Any, metric: str, residual: bool) -> None:
        self.d = d
        self.metric = metric
        if type(store).__name__ == "SQ" and store.kind in _SQ_ROWS:
            store = _SQ_ROWS[store.kind]  # whose codes are the rows themselves
        self.quantizer: Any = None if isinstance(store, str) else store
        self.residual = residual and self.quantizer is not None
        self.form = "rows" if self.quantizer is None else self.quantizer.scan
        if self.quantizer is None:
            self.dtype = dtype_of(store)
            self.name = store
        elif self.form == "decode":  # SQ of 8 or 6 bits
            self.form = "scalar"
            self._step, self._offset = self.quantizer._steps()
        #: Whether tables give squared distances themselves (without row terms).
        self._distances = False
        self.fields = self._make_fields()

    # ---- arrays
    def _make_fields(self) -> dict[str, Field]:
        quantizer = self.quantizer
        if quantizer is None:
            return {"vectors_in_lists": Field(self.d, 1, self.dtype)}
        byte = np.dtype(np.uint8)
        if self.form == "scalar":
            return {"codes": Field(quantizer.code_size, 1, byte)}
        if self.form == "lut4":
            fields = {"codes": Field((quantizer.m + 7) // 8, 4, byte)}
        else:
            fields = {"codes": Field(1, _bits.packed_size(quantizer.m, quantizer.bits), byte)}
        zero = np.zeros((1, self.d), np.float32)
        if self.metric == "l2" and not self.residual:
            self._distances = quantizer._tables(zero, "l2") is not None
        terms = self._terms(quantizer._encode(zero + 1), zero)  # of any vector: to see which there are
        for name, term in zip(("add", "mul"), terms):
            if term is not None:
                fields[name] = Field(1, 1, np.dtype(np.float32))
        return fields

    def _terms(self, codes, centroids):
        """add and mul of rows, or None; ``centroids`` (n, d) those of their lists."""
        quantizer = self.quantizer
        add, mul = quantizer._row_terms(codes)
        if self.metric == "ip" or self._distances:
            return add, mul
        norm = quantizer._norms(codes)
        if self.residual:
            decoded = quantizer._decode(codes)
            norm = norm + 2 * np.einsum("ij,ij->i", centroids, decoded)
        return (norm if add is None else norm - 2 * add).astype(np.float32), mul

    def encode(self, x: np.ndarray, centroids: np.ndarray | None, first: int) -> dict[str, np.ndarray]:
        """Values of the arrays for float32 vectors; ``centroids`` those of their lists (residual)."""
        n = len(x)
        if self.quantizer is None:
            return {"vectors_in_lists": to_rows(x, self.dtype, first, self.name)[:, :, None]}
        values: dict[str, np.ndarray] = {}
        step = 1 << 14
        parts = []
        for i in range(0, n, step):
            part = x[i : i + step]
            center = None if centroids is None else centroids[i : i + step]
            if self.residual and self.quantizer._uses_directions:  # its loss is about the vector
                codes = self.quantizer._encode(part - center, part)
            else:
                codes = self.quantizer._encode(part - center if self.residual else part)
            made = {"codes": self._packed(codes)}
            if self.form != "scalar":
                for name, term in zip(("add", "mul"), self._terms(codes, center)):
                    if term is not None:
                        made[name] = term[:, None, None]
            parts.append(made)
        for name, field in self.fields.items():
            values[name] = np.concatenate(
                [part[name] for part in parts] or [np.empty((0, field.a, field.b), field.dtype)]
            )
        return values

    def encode_on_gpu(self, home: Home, x: Any, centroids: Any, first: int) -> dict[str, Any]:
        """`encode` of vectors of a home that is not the host.

        Rows are made there, and the codes of `PQ`, `OPQ` and `RQ`. The rest is a quantizer's own code, on the
        host.
        """
        if self.quantizer is None:
            rows = to_rows_on_gpu(home, x, CODES[self.dtype.name], first, self.name)
            return {"vectors_in_lists": rows[:, :, None]}
        made = self._codes_on_gpu(home, x, centroids)
        if made is not None:
            return made
        center = None if centroids is None else HOST.bring(centroids)
        values = self.encode(HOST.bring(x), center, first)
        return {name: home.bring(np.ascontiguousarray(value)) for name, value in values.items()}

    def _codes_on_gpu(self, home: Home, x: Any, centroids: Any) -> dict[str, Any] | None:
        """Values of the arrays for (residuals of) vectors on a GPU, or None: by the host."""
        quantizer, kind = self.quantizer, home.kind
        if type(quantizer).__name__ not in ("PQ", "OPQ", "RQ"):
            return None
        n, m, left = len(x), quantizer.m, kind.dense(x - centroids if self.residual else x)
        if self.residual and quantizer._uses_directions:  # its loss is about the vector
            entries = quantizer._entries_there(kind, left, kind.dense(x))
        else:
            entries = quantizer._entries_there(kind, left)
        if entries is None:
            return None
        if self.form == "lut4":
            groups = home.full((n, (m + 7) // 8, 2, 4), 0, U8)
            groups.reshape(n, -1)[:, :m] = entries
            values = {"codes": groups[:, :, 0] | groups[:, :, 1] << 4}
        elif quantizer.bits == 8:
            values = {"codes": entries[:, None]}
        else:
            values = {"codes": home.bring(_bits.pack(HOST.bring(entries), quantizer.bits))[:, None]}
        if "add" in self.fields:  # the norms, as in `_terms`
            decoded = quantizer._decode_there(kind, entries)
            norm = (decoded * decoded).sum(1)
            if self.residual:
                norm = norm + 2 * (centroids * decoded).sum(1)
            values["add"] = norm[:, None, None]
        return values

    def _packed(self, codes: np.ndarray) -> np.ndarray:
        """Codes as the values (n, a, b) of their array."""
        if self.form == "scalar":
            return scalar_rows(self.quantizer._entries(codes), self.quantizer.bits)[:, :, None]
        if self.form == "lut8":  # what may follow the entries is in the row terms
            return codes[:, None, : self.fields["codes"].b]
        entries = self.quantizer._entries(codes)
        n, m = entries.shape
        groups = np.zeros((n, (m + 7) // 8, 2, 4), np.uint8)
        groups.reshape(n, 8 * groups.shape[1])[:, :m] = entries
        return groups[:, :, 0] | groups[:, :, 1] << 4

    # ---- files of layout 1, which lutra wrote before it packed codes for the scans
    @property
    def fields_of_layout_1(self) -> dict[str, Field]:
        """Arrays that had another shape then."""
        if self.form == "scalar":
            return {"codes": Field(1, self.quantizer.code_size, np.dtype(np.uint8))}
        if self.form == "lut8" and self.quantizer.bits < 8:
            return {"codes": Field(1, self.quantizer.m, np.dtype(np.uint8))}
        return {}

    def of_layout_1(self, values: np.ndarray) -> np.ndarray:
        """The values (n, a, b) of codes in the array that they have now."""
        rows = np.ascontiguousarray(values[:, 0])
        return _bits.pack(rows, self.quantizer.bits)[:, None] if self.form == "lut8" else self._packed(rows)

    def _codes(self, values: np.ndarray) -> np.ndarray:
        """The quantizer's codes, of the values of their array."""
        if self.form == "scalar":
            return _bits.pack(scalar_codes(values[:, :, 0], self.quantizer.bits, self.d), self.quantizer.bits)
        if self.form == "lut8":
            return np.ascontiguousarray(values[:, 0])
        return self.quantizer.pack(self._entries(values))

    def _entries(self, values: np.ndarray) -> np.ndarray:
        """4-bit entries, a byte each."""
        every = np.stack([values & 15, values >> 4], 2).reshape(len(values), 8 * values.shape[1])
        return np.ascontiguousarray(every[:, : self.quantizer.m])

    def vectors(self, arena: Arena, rows: np.ndarray, centroids: np.ndarray | None) -> np.ndarray:
        """float32 vectors of rows of the arena, on the host; ``centroids`` those of their lists."""
        at = arena.home.positions(rows)
        if self.quantizer is None:
            return HOST.bring(arena.take("vectors_in_lists", at)[:, :, 0]).astype(np.float32)
        codes = HOST.bring(arena.take("codes", at))
        if self.form == "scalar" or hasattr(self.quantizer, "pack"):
            x = self.quantizer._decode(self._codes(codes))
        else:
            if self.form == "lut4":
                entries = self._entries(codes)
            else:
                entries = _bits.unpack(
                    np.ascontiguousarray(codes[:, 0]), self.quantizer.m, self.quantizer.bits
                )
            mul = HOST.bring(arena.take("mul", at)[:, 0]) if "mul" in self.fields else None
            x = self._from_tables(entries, mul)
        return x + centroids if self.residual else x

    def _from_tables(self, entries: np.ndarray, mul: np.ndarray | None) -> np.ndarray:
        """Vectors by the linear form: its values at the unit vectors, less that at 0."""
        points = np.concatenate([np.zeros((1, self.d), np.float32), np.eye(self.d, dtype=np.float32)])
        lut, bias = self.quantizer._tables(points, "ip")
        lut = lut[1:] - lut[:1]
        x = np.zeros((len(entries), self.d), np.float32)
        for j in range(entries.shape[1]):
            x += lut[:, j, entries[:, j]].T
        if mul is not None:
            x *= mul
        return x if bias is None else x + (bias[1:] - bias[0])

    # ---- scanning
    def tables(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Tables and bias of float32 queries whose sums are scores, up to base and row terms."""
        if self._distances:
            return tuple(self.quantizer._tables(q, "l2"))
        lut, bias = self.quantizer._tables(q, "ip")
        if self.metric == "l2":
            lut = lut * np.float32(-2)
            bias = None if bias is None else bias * np.float32(-2)
            if not self.residual:
                square = np.einsum("ij,ij->i", q, q)
                bias = square if bias is None else bias + square
        return lut, bias

    def part(self, k: int) -> int:
        """Queries of a part of a batch, so that tables and results stay small."""
        each = 12 * k
        if self.form in ("lut4", "lut8"):
            each += self.quantizer.m * 256 * 4 if self.form == "lut8" else self.quantizer.m * 16 * 4
        return max(1, _TABLES // each)

    def scan(
        self,
        q: np.ndarray,
        arena: Arena,
        lists: Lists,
        k: int,
        base: np.ndarray | None,
        centroids: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query's lists: scores and positions (int64)."""
        if self.form in ("rows", "scalar"):
            if lists.probes is None:
                lists = lists._replace(probes=np.zeros((len(q), 1), np.int64))
            x = next(iter(arena.arrays.values()))[:, :, :, 0]
            if self.form == "rows":
                return _lists.list_rows(q, x, lists, k, self.metric)
            steps = self.quantizer.bits, self._step, self._offset, centroids if self.residual else None
            return _lists.list_scalar(q, x, *steps, lists, k, self.metric)
        codes, add, mul = arena.arrays["codes"], arena.arrays.get("add"), arena.arrays.get("mul")
        add, mul = (None if a is None else a.reshape(-1) for a in (add, mul))
        lut, bias = self.tables(q)
        base = base if self.residual else None
        bits = 8
        if self.form == "lut4":  # only where nothing is compiled
            codes = self._entries(codes.transpose(0, 2, 1, 3).reshape(-1, codes.shape[1], 4))
        else:
            codes, bits = codes.reshape(-1, codes.shape[3]), self.quantizer.bits
        scores, ids = _lists.lut8(lut, codes, lists, k, self.metric, base, bias, add, mul, bits)
        if self.metric == "l2":  # rounding may leave small negative ones
            np.maximum(scores, 0, out=scores)
        return scores, ids

    def describe(self, arena: Arena) -> dict[str, Any]:
        """What `_core.ListSearcher` asks about the codes, but for the lists."""
        quantizer = self.quantizer
        names = {"rows": 0, "lut8": 1, "lut4": 2, "scalar": 3}
        about: dict[str, Any] = {
            "form": names[self.form], "type": 0, "m": 0, "ksub": 0, "dsub": 0, "books": None, "add": None,
            "mul": None, "distances": int(self._distances), "residual": int(self.residual), "bits": 8,
            "step": None, "offset": None, "levels": None, "high": 0.0,
        }  # fmt: skip
        if quantizer is None:
            about.update(codes=arena.arrays["vectors_in_lists"], type=_lists._TYPES[self.name])
            return about
        about.update(codes=arena.arrays["codes"], m=quantizer.m, ksub=16)
        if self.form != "lut4":
            about.update(bits=quantizer.bits)
        if self.form == "scalar":
            about.update(step=self._step, offset=self._offset)
            return about
        if self.form == "lut4" and (screen := quantizer._screen()) is not None:
            about.update(levels=screen[0], high=screen[1], bits=quantizer.bits)
        about.update({name: arena.arrays[name] for name in ("add", "mul") if name in arena.arrays})
        if type(quantizer).__name__ == "PQ" and quantizer.dsub:
            ksub = max(16, quantizer.ksub)  # unused entries are 0, as in PQ's own tables
            books = np.zeros((quantizer.m, quantizer.dsub, ksub), np.float32)
            books[:, :, : quantizer.ksub] = quantizer._books.transpose(0, 2, 1)
            about.update(books=books, dsub=quantizer.dsub, ksub=ksub)
        elif self.form == "lut8":
            about.update(ksub=quantizer._tables(np.zeros((1, self.d), np.float32), "ip").lut.shape[2])
        return about


def merge(found: list[Any], nq: int, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several results (scores, positions); a position that is found twice counts once."""
    worst = np.float32(np.inf if metric == "l2" else -np.inf)
    scores = np.concatenate([np.full((nq, k), worst, np.float32), *(s for s, _ in found)], 1)
    ids = np.concatenate([np.full((nq, k), -1, np.int64), *(i for _, i in found)], 1)
    key = scores if metric == "l2" else -scores
    order = np.lexsort((key, ids), axis=-1)  # by position, the better score first
    ids, key = np.take_along_axis(ids, order, 1), np.take_along_axis(key, order, 1)
    scores = np.take_along_axis(scores, order, 1)
    again = np.zeros(ids.shape, bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    ids = np.where(again, -1, ids)
    order = np.lexsort((ids, key, ids < 0), axis=-1)[:, :k]
    ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
    return np.where(ids < 0, worst, scores), ids
