"""maxsim: the arrays of a call, checked."""

from __future__ import annotations

from .. import _checks
from .._arrays import F32, F64, FLOATS, I8, I32, I64, NAMES, U8
from ..reference import maxsim as reference

_FLOATS = (*FLOATS, F64)


class Call:
    """Checked arrays of a call."""

    def __init__(
        self, kind, queries, query_ptr, docs, doc_ptr, candidates, doc_scale, doc_mask, query_mask, codes
    ):
        named = {
            "query_ptr": query_ptr, "docs": docs, "doc_ptr": doc_ptr, "candidates": candidates,
            "doc_scale": doc_scale,
            "doc_mask": doc_mask, "query_mask": query_mask, "centroid_ids": codes[0], "centroids": codes[1],
            "values": codes[2],
        }  # fmt: skip
        for name, a in named.items():
            if a is not None:
                _checks.same_kind(kind, a, name, queries, "queries")
        self.kind, self.coded = kind, codes[0] is not None
        _checks.ndim(queries, "queries", 2)
        _checks.ndim(docs, "docs", 2)
        self.q_code = _checks.dtype(kind, queries, "queries", (*_FLOATS, I8))
        self.x_code = _checks.dtype(kind, docs, "docs", (U8,) if self.coded else (*_FLOATS, I8))
        if (self.q_code == F64) != (self.x_code == F64) or (self.q_code == I8 and self.x_code != I8):
            raise TypeError(
                f"docs has dtype {NAMES[self.x_code]}, queries has {NAMES[self.q_code]}; "
                "float64 goes with float64, and int8 queries with int8 docs"
            )
        self.d = queries.shape[1]
        self.bits = 0
        if self.coded:
            self._check_codes(docs, *codes)
        elif docs.shape[1] != self.d:
            raise ValueError(
                f"docs has {docs.shape[1]} columns, queries has {self.d}; tokens must be of one width"
            )
        self.q, self.x, self.codes = queries, docs, codes
        self.q_ptr = self._ptr(query_ptr, "query_ptr", queries, "queries")
        self.x_ptr = self._ptr(doc_ptr, "doc_ptr", docs, "docs")
        self.nq, self.documents = query_ptr.shape[0] - 1, doc_ptr.shape[0] - 1
        self.q_mask = self._mask(query_mask, "query_mask", queries, "queries")
        self.x_mask = self._mask(doc_mask, "doc_mask", docs, "docs")
        self.scale = doc_scale
        if doc_scale is not None:
            if self.x_code != I8:
                raise ValueError(f"doc_scale goes with int8 docs, docs is {NAMES[self.x_code]}")
            _checks.dtype(kind, doc_scale, "doc_scale", (F32,))
            self._shape(doc_scale, "doc_scale", docs, "docs")
            self.scale = kind.dense(doc_scale)
        self.cand = candidates
        if candidates is not None:
            _checks.ndim(candidates, "candidates", 2)
            if _checks.dtype(kind, candidates, "candidates", (I32, I64)) == I32:
                candidates = kind.cast(candidates, I64)
            if candidates.shape[0] != self.nq:
                raise ValueError(
                    f"candidates has {candidates.shape[0]} rows; it must have {self.nq}, one for each query"
                )
            self.cand = kind.dense(candidates)
        self.columns = self.documents if candidates is None else candidates.shape[1]

    def _check_codes(self, codes, ids, centroids, values):
        kind = self.kind
        _checks.ndim(centroids, "centroids", 2)
        _checks.ndim(values, "values", 1)
        for a, name, code in (
            (ids, "centroid_ids", I32),
            (centroids, "centroids", F32),
            (values, "values", F32),
        ):
            _checks.dtype(kind, a, name, (code,))
        self._shape(ids, "centroid_ids", codes, "codes")
        if centroids.shape[1] != self.d:
            raise ValueError(
                f"centroids has {centroids.shape[1]} columns, queries has {self.d}; tokens must be of one "
                f"width"
            )
        if values.shape[0] not in (2, 4, 16, 256):
            raise ValueError(
                f"values has {values.shape[0]} entries; it must have 2, 4, 16 or 256 (1, 2, 4, 8 bits)"
            )
        self.bits = {2: 1, 4: 2, 16: 4, 256: 8}[values.shape[0]]
        width = (self.d * self.bits + 7) // 8
        if codes.shape[1] != width:
            raise ValueError(
                f"codes has {codes.shape[1]} columns; it must have {width}, {self.d} dimensions of "
                f"{self.bits} bits"
            )

    def _ptr(self, ptr, name, rows, of):
        kind = self.kind
        _checks.ndim(ptr, name, 1)
        if _checks.dtype(kind, ptr, name, (I32, I64)) == I32:
            ptr = kind.cast(ptr, I64)
        if ptr.shape[0] == 0:
            raise ValueError(f"{name} is empty; it must begin with 0 and end with the number of rows of {of}")
        if not kind.cuda and (int(ptr[0]) != 0 or int(ptr[-1]) != rows.shape[0]):
            reference.check_ptr(name, kind.to_numpy(ptr), rows.shape[0], of)
        return kind.dense(ptr)

    def _shape(self, a, name, rows, of):
        if tuple(a.shape) != (rows.shape[0],):
            raise ValueError(
                f"{name} has shape {tuple(a.shape)}; it must be ({rows.shape[0]},), one for each row of {of}"
            )

    def _mask(self, mask, name, rows, of):
        if mask is None:
            return None
        dtype = str(mask.dtype).removeprefix("torch.")
        if dtype not in ("bool", "uint8"):
            raise TypeError(f"{name} has dtype {dtype}; it must be bool")
        self._shape(mask, name, rows, of)
        mask = self.kind.dense(mask)
        if dtype == "uint8":
            return mask
        return mask.view(self.kind._dtypes[U8])

    @property
    def wide(self):
        return F64 if self.q_code == F64 else F32

    def numpy(self):
        """Arguments of the reference."""
        to = self.kind.to_numpy
        q, x = to(self.q), to(self.x)
        if self.coded:
            ids, centroids, values = (to(a) for a in self.codes)
            x = reference.decode_residual(x, ids, centroids, values, self.unit)
        optional = [None if a is None else to(a) for a in (self.cand, self.scale, self.x_mask, self.q_mask)]
        return q, to(self.q_ptr), x, to(self.x_ptr), *optional

    unit = False


def rows_of(kind, a):
    """A matrix whose rows lie anywhere but are dense themselves, and the distance of two rows."""
    if kind.name == "torch" and a.ndim == 2 and a.stride(1) == 1 and a.stride(0) >= a.shape[1]:
        return a, a.stride(0)
    a = kind.dense(a)
    return a, a.shape[1]
