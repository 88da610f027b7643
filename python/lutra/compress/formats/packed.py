"""Rows of codes with their scales behind them: int8, int4, int2, NF4 and 8-bit floats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import _checks, gather
from ...reference import packed as reference
from .base import Array, Data, Format, Shape, register


class Packed(Format):
    """What the packed formats share: one array, ``codes`` (rows, row_bytes) uint8, of `pack_rows`.

    Nothing of it is trainable; gradients flow to the weights of a bag. Rows are float32; layers give them in
    their own type.
    """

    #: Groups that `fit` tries, from the most exact.
    groups: ClassVar[tuple[int | None, ...]] = (16, 32, 64, 128, None)

    @property
    def kind(self) -> str:
        """The kind of `lutra.gather.pack_rows`."""
        return self.name

    @property
    def columns(self) -> int | None:
        """Columns that share a scale; None: a row's."""
        return getattr(self, "group", None)

    def arrays(self, shape: Shape) -> dict[str, Array]:
        rows, dim = shape
        row_bytes = reference.layout(dim, self.kind, self.columns).row_bytes
        return {"codes": Array((rows, row_bytes), "uint8", False)}

    @classmethod
    def candidates(cls, dim: int) -> Iterator[Packed]:
        """Formats for rows of that dimension, from the most exact."""
        for group in cls.groups:
            if group is None or group < dim:
                yield cls(group)  # type: ignore[call-arg]

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> Packed | None:
        return next((f for f in cls.candidates(shape[1]) if f.nbytes(shape, dtype) <= nbytes), None)

    # ---------------------------------------------------------------- data
    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        return {"codes": gather.pack_rows(table, self.kind, self.columns)}

    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        return reference.unpack_rows(data["codes"], shape[1], self.kind, self.columns, ids)

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        from ...gather._packed_torch import decode

        return decode(data["codes"][ids], shape[1], self.kind, self.columns)

    # ---------------------------------------------------------------- computing
    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        return gather.unpack_rows(data["codes"], shape[1], self.kind, self.columns, ids)

    def between(
        self, data: Data, shape: Shape, begin: int, end: int, dtype: Any = None, out: Any = None
    ) -> Any:
        name, codes = str(dtype).removeprefix("torch."), data["codes"][begin:end]
        name = name if name in ("float16", "bfloat16") else "float32"
        if out is None:
            return gather.unpack_rows(codes, shape[1], self.kind, self.columns, dtype=name)
        from ..._arrays import torch_kind
        from ...gather._packed import _unpack_rows

        return _unpack_rows(
            torch_kind(codes.is_cuda), codes, None, shape[1], self.kind, self.columns, name,
            out if str(out.dtype) == f"torch.{name}" else None,
        )  # fmt: skip

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        return gather.bag_packed(
            data["codes"], ids, offsets, weights, dim=shape[1], kind=self.kind, group=self.columns, mode=mode,
            padding_idx=padding_idx, include_last_offset=include_last_offset,
        )  # fmt: skip

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        new = gather.pack_rows(np.ascontiguousarray(values, np.float32), self.kind, self.columns)
        return self, {"codes": np.concatenate([data["codes"][:rows], new])}  # old rows bit for bit


def _check_columns(name: str, value: int | None) -> None:
    if value is not None and _checks.integer(name, value, 1) % 16:
        raise ValueError(f"{name} is {value}; it must be a multiple of 16, or None: one scale a row")


@register
@dataclass(frozen=True)
class Int8(Packed):
    """8-bit codes with a float32 scale and minimum per row, or per ``group`` columns: FBGEMM's fused rows.

    Parameters
    ----------
    group : int, optional
        Columns that share a scale and minimum, a multiple of 16; default: a row.
    """

    group: int | None = None

    name: ClassVar[str] = "int8"
    layer: ClassVar[str] = "Int8"

    def __post_init__(self) -> None:
        _check_columns("group", self.group)


@register
@dataclass(frozen=True)
class Int4(Packed):
    """4-bit codes with a float16 scale and minimum per row, or per ``group`` columns.

    Parameters
    ----------
    group : int, optional
        Columns that share a scale and minimum, a multiple of 16; default: a row.
    """

    group: int | None = None

    name: ClassVar[str] = "int4"
    layer: ClassVar[str] = "Int4"

    def __post_init__(self) -> None:
        _check_columns("group", self.group)


@register
@dataclass(frozen=True)
class Int2(Packed):
    """2-bit codes with a float16 scale and minimum per row, or per ``group`` columns.

    Parameters
    ----------
    group : int, optional
        Columns that share a scale and minimum, a multiple of 16; default: a row.
    """

    group: int | None = None

    name: ClassVar[str] = "int2"
    layer: ClassVar[str] = "Int2"

    def __post_init__(self) -> None:
        _check_columns("group", self.group)


@register
@dataclass(frozen=True)
class NF4(Packed):
    """4-bit codes of the quantiles of a normal distribution, with a float16 absmax per block.

    QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

    Parameters
    ----------
    block : int, optional
        Columns that share an absmax, a multiple of 16; default 64. None: a row.
    """

    block: int | None = 64

    name: ClassVar[str] = "nf4"
    layer: ClassVar[str] = "NF4"

    def __post_init__(self) -> None:
        _check_columns("block", self.block)

    @property
    def columns(self) -> int | None:
        return self.block


@register
@dataclass(frozen=True)
class FP8(Packed):
    """8-bit floats with a float32 scale per row (Micikevicius et al. 2022, arXiv 2209.05433).

    Parameters
    ----------
    variant : {'e4m3', 'e5m2'}, default 'e4m3'
        4 bits of exponent and 3 of mantissa, or 5 and 2.
    """

    variant: str = "e4m3"

    name: ClassVar[str] = "fp8"
    layer: ClassVar[str] = "FP8"

    def __post_init__(self) -> None:
        if self.variant not in ("e4m3", "e5m2"):
            raise ValueError(f"variant must be 'e4m3' or 'e5m2', got {self.variant!r}")

    @property
    def kind(self) -> str:
        return f"fp8_{self.variant}"

    @classmethod
    def candidates(cls, dim: int) -> Iterator[Packed]:
        yield cls()
