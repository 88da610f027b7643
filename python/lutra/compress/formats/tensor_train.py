"""Tensor train: a table as a product of three small cores."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np

from ... import _checks, gather
from ..._arrays import is_torch, torch_kind
from ...reference import train as reference
from .base import Array, Data, Format, Shape, check_ids, register

Three = tuple[int, int, int]


@register
@dataclass(frozen=True)
class TensorTrain(Format):
    """Row ``(a * i2 + b) * i3 + c`` is ``core1[a] . core2[b] . core3[c]`` (Yin, Acun, Liu, Wu, TT-Rec, 2021).

    Ids and columns are split in a mixed radix: rows <= i1 i2 i3, dim = d1 d2 d3. The memory grows with the
    cube root of the rows, so that a table of millions of rows takes kilobytes; what it can express is as
    little. Trained from the start it serves recommenders; tables trained without it are rarely near a tensor
    train of a low rank. Encoded by TT-SVD (Oseledets 2011), which counts do not weigh; the order of the ids
    matters.

    A look-up takes rank^2 d1 d2 + rank dim multiply-adds: keep the rank low, and a multiple of 16.

    Parameters
    ----------
    rank : int, default 16
    ids : str, optional
        '32x32x30' for i1, i2, i3; default: three nearly equal numbers whose product is at least rows.
    dims : str, optional
        '4x4x4' for d1, d2, d3; default: the three factors of dim that are most alike, the least one in the
        middle, where the large core is.
    """

    rank: int = 16
    ids: str | None = None
    dims: str | None = None

    name: ClassVar[str] = "tt"
    layer: ClassVar[str] = "TensorTrain"

    def __post_init__(self) -> None:
        _checks.integer("rank", self.rank, 1)
        for name in ("ids", "dims"):
            if getattr(self, name) is not None:
                _three(name, getattr(self, name))

    def sizes(self, shape: Shape) -> tuple[Three, Three]:
        """(i1, i2, i3) and (d1, d2, d3).

        Raises
        ------
        ValueError
            Given sizes that do not fit the shape.
        """
        rows, dim = shape
        ids = _three("ids", self.ids) if self.ids else _split_rows(rows)
        dims = _three("dims", self.dims) if self.dims else _split_dim(dim)
        if prod(ids) < rows:
            raise ValueError(f"ids is {self.ids!r}; the product must be at least the number of rows, {rows}")
        if prod(dims) != dim:
            raise ValueError(f"dims is {self.dims!r}; the product must be the dimension, {dim}")
        return ids, dims

    def arrays(self, shape: Shape) -> dict[str, Array]:
        (i1, i2, i3), (d1, d2, d3) = self.sizes(shape)
        return {
            "core1": Array((i1, d1, self.rank)),
            "core2": Array((i2, self.rank, d2, self.rank)),
            "core3": Array((i3, d3, self.rank)),
        }

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> TensorTrain | None:
        (i1, _, i3), (d1, _, d3) = cls().sizes(shape)
        low, high = 0, max(i1 * d1, i3 * d3)  # a higher rank adds nothing
        while low < high:
            middle = (low + high + 1) // 2
            if cls(middle).nbytes(shape, dtype) <= nbytes:
                low = middle
            else:
                high = middle - 1
        return cls(low) if low else None

    # ---------------------------------------------------------------- data
    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        (i1, i2, i3), (d1, d2, d3) = self.sizes(table.shape)
        rows, dim = table.shape
        full = np.zeros((i1 * i2 * i3, dim), np.float32)
        full[:rows] = table
        x = full.reshape(i1, i2, i3, d1, d2, d3).transpose(0, 3, 1, 4, 2, 5).reshape(i1 * d1, -1)
        first = _leading(x @ x.T, self.rank)  # (i1 d1, r)
        rest = (first.T @ x).reshape(-1, i3 * d3)
        last = _leading(rest.T @ rest, self.rank)  # (i3 d3, r)
        middle = (rest @ last).reshape(-1, i2, d2, last.shape[1]).transpose(1, 0, 2, 3)
        r = self.rank
        core1, core2, core3 = np.zeros((i1, d1, r)), np.zeros((i2, r, d2, r)), np.zeros((i3, d3, r))
        core1[..., : first.shape[1]] = first.reshape(i1, d1, -1)
        core2[:, : middle.shape[1], :, : middle.shape[3]] = middle
        core3[..., : last.shape[1]] = last.reshape(i3, d3, -1)
        # The singular vectors have small entries: scales are spread evenly, for training and for float16.
        scales = [max(float(np.abs(c).max()), 1e-30) for c in (core1, core2, core3)]
        mean = prod(scales) ** (1 / 3)
        out = {"core1": core1, "core2": core2, "core3": core3}
        return {k: (c * (mean / s)).astype(np.float32) for (k, c), s in zip(out.items(), scales)}

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        data = {k: rng.standard_normal(a.shape, dtype=np.float32) for k, a in self.arrays(shape).items()}
        data["core2"] /= np.float32(self.rank)  # a value is a sum of rank^2 products
        return data

    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        cores = [data[k].astype(np.float32) for k in ("core1", "core2", "core3")]
        return reference.rows(cores[0], cores[1], cores[2], np.asarray(ids)).astype(np.float32)

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        (_, i2, i3), (d1, d2, _) = self.sizes(shape)
        r = self.rank
        prefix = ids // i3
        a, b, c = data["core1"][prefix // i2], data["core2"][prefix % i2], data["core3"][ids % i3]
        first = (a @ b.reshape(-1, r, d2 * r)).reshape(-1, d1 * d2, r)
        return (first @ c.transpose(1, 2)).reshape(-1, shape[1])

    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        if _by_torch(data):
            return self.lookup(data, shape, check_ids(ids, shape[0]))
        return gather.tensor_train(
            data["core1"], data["core2"], data["core3"], ids.reshape(-1, 1), rows=shape[0]
        )

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        if _by_torch(data) or mode not in ("sum", "mean"):
            return super().bag(
                data, shape, ids, offsets, weights, mode=mode, padding_idx=padding_idx,
                include_last_offset=include_last_offset, sparse=sparse,
            )  # fmt: skip
        return gather.tensor_train(
            data["core1"], data["core2"], data["core3"], ids, offsets, weights, rows=shape[0], mode=mode,
            padding_idx=padding_idx, include_last_offset=include_last_offset,
        )  # fmt: skip

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """The second and the third core stay; each slice of the first that holds new rows is fitted anew.

        Slices of old rows only stay as they are. New rows are as near as the other cores allow.
        """
        (i1, i2, i3), (d1, _, _) = self.sizes(shape)
        each, kept, dim = i2 * i3, min(rows, shape[0]), shape[1]
        total = kept + len(values)
        slices = max(-(-total // each), 1)
        found = TensorTrain(self.rank, f"{slices}x{i2}x{i3}", self.dims)
        core1 = np.zeros((slices, d1, self.rank), np.float32)
        core1[:i1] = data["core1"][:slices].astype(np.float32)
        second, third = data["core2"].astype(np.float64), data["core3"].astype(np.float64)
        for a in range(kept // each, slices) if len(values) else ():
            begin, end = a * each, min((a + 1) * each, total)
            old = self.rows(data, shape, np.arange(begin, max(min(end, kept), begin)))
            wanted = np.concatenate([old, values[max(begin - kept, 0) : end - kept]]).astype(np.float64)
            # (rank, rows of the slice * d2 d3): what a row of the first core is multiplied by
            tail = np.einsum("jrds,kes->rjkde", second, third).reshape(self.rank, each, -1)[:, : end - begin]
            tail = tail.reshape(self.rank, -1)
            goal = wanted.reshape(end - begin, d1, dim // d1).transpose(1, 0, 2).reshape(d1, -1)
            core1[a] = np.linalg.lstsq(tail @ tail.T, tail @ goal.T, rcond=1e-10)[0].T
        return found, {**data, "core1": core1.astype(data["core1"].dtype)}


def _by_torch(data: Data) -> bool:
    """Whether torch's own ops compute: where there is no kernel."""
    core = data["core1"]
    if not is_torch(core):
        return False
    return str(core.dtype) == "torch.float64" or (core.is_cuda and torch_kind(True).kernels is None)


def _three(name: str, text: str) -> Three:
    try:
        a, b, c = (int(part) for part in text.split("x"))
    except (ValueError, AttributeError):
        raise ValueError(f"{name} must read like '32x32x30', got {text!r}") from None
    if min(a, b, c) < 1:
        raise ValueError(f"{name} must hold positive numbers, got {text!r}")
    return a, b, c


def _split_rows(rows: int) -> Three:
    """Three nearly equal numbers whose product is at least ``rows``."""
    i3 = max(round(rows ** (1 / 3)), 1)
    i2 = max(round((rows / i3) ** 0.5), 1)
    return max(-(-rows // (i2 * i3)), 1), i2, i3


def _split_dim(dim: int) -> Three:
    """The three factors of ``dim`` of the least sum, the least in the middle."""
    best = (1, 1, dim)
    for a in range(1, int(dim ** (1 / 3)) + 2):
        if dim % a:
            continue
        for b in range(a, int((dim // a) ** 0.5) + 1):
            if (dim // a) % b == 0 and a + b + dim // a // b < sum(best):
                best = (a, b, dim // a // b)
    a, b, c = sorted(best)
    return b, a, c


def _leading(gram: np.ndarray, rank: int) -> np.ndarray:
    """The leading eigenvectors of a symmetric matrix as columns, at most ``rank`` of them."""
    return np.linalg.eigh(gram.astype(np.float64))[1][:, ::-1][:, :rank]
